"""What each implementation spends: bytes beside arguments and results, and in which numbers.

Counted from the same sizes by which the work is cut up: within the loops a few tiles of logits are
held, and slices of the arguments. Of a mask whose map the graph finds out, it is the more that
tiles of the grid and runs of keys would take. `out` is written where it belongs; of gradients, what
the loops leave is put together afterwards, which takes a second copy of it, of one after the other.
"""

from __future__ import annotations

import tensorflow as tf

from attn_core.backends.tf import chunked_runs
from attn_core.backends.tf.chunked_grid import cut_up
from attn_core.backends.tf.chunked_loops import SIDE_BY_SIDE
from attn_core.backends.tf.chunked_narrow import Spans, spans
from attn_core.footprint import differs, reading, sizes
from attn_core.language.duals import differentiate
from attn_core.spec import WIDTH, Account, Problem

_PHILOX = 32
"""Bytes of an entry of dropout's mask while it is made: words and their products are uint64."""


def account(p: Problem, impl: str) -> Account:
    numbers = (p.accumulation, _lowered(p))
    found = sizes(p)
    if found is None:
        return Account(None, None, None, *numbers)
    if impl == "chunked" and 0 not in found:
        return _chunked(p, numbers)
    batch, q_len, k_len = found
    wide = WIDTH[p.accumulation] // 8
    entries = batch * p.heads * q_len * k_len
    whole = {"b": batch, "h": p.heads, "row": q_len, "k": k_len}
    more = reading(p.mask, whole, wide) + reading(p.score, whole, wide)
    more += _PHILOX * entries if p.rate else 0
    # Arrays of all entries at the peak; a tape keeps more of them.
    return Account(None, 11 * wide * entries // 2 + more, 10 * wide * entries + more, *numbers)


def _chunked(p: Problem, numbers: tuple[str, tuple[str, str] | None]) -> Account:
    narrow, wide = WIDTH[p.dtype] // 8, WIDTH[p.accumulation] // 8
    found = spans(p)
    if found is not None:
        return _spans(p, found, (narrow, wide), numbers)
    g = cut_up(p, p.batch, p.q_len, p.k_len, differs(p))
    entries = g.batches * g.heads * p.group * g.block_q * g.block_k
    tile = entries * wide
    tiled = {"b": g.batches, "h": g.heads * p.group, "row": g.block_q, "k": g.block_k}
    hidden = reading(p.mask, tiled, wide)
    if p.mask is not None or p.kv_lengths or p.q_lengths or g.padded_rows or g.padded_keys:
        hidden += 2 * entries
    score = reading(p.score, tiled, wide)
    slope = 0 if p.score is None else reading(differentiate(p.score).tree, tiled, wide)
    dropped = _PHILOX * entries if p.rate else 0
    rows = g.batch * p.heads * g.rows * g.block_q
    keys = g.batch * p.kv_heads * g.columns * g.block_k
    part = g.batches * g.heads
    q, kv = part * p.group * g.block_q, part * g.block_k
    saved = rows * (2 * wide + 1)
    forward = 2 * tile + hidden + score + dropped + 2 * saved
    forward += (q * (p.width + p.v_width) + kv * (p.width + p.v_width)) * wide
    backward = 3 * tile + hidden + slope + dropped + 4 * saved
    backward += 2 * (q + kv) * (p.width + p.v_width) * wide
    # Gradients are summed in the accumulation dtype, beside which the results are made.
    sums = [rows * p.width, keys * p.width, keys * p.v_width]
    backward += max(sums) * wide + sum(sums) * (wide - narrow)
    if chunked_runs.possible(p) is not None:
        # Which of the two it is, the graph finds out.
        runs = _runs(p, (narrow, wide))
        forward, backward = (max(a, b) for a, b in zip((forward, backward), runs, strict=True))
    return Account((g.block_q, g.block_k), forward, backward, *numbers)


def _runs(p: Problem, sizes: tuple[int, int]) -> tuple[int, int]:
    """Bytes of a forward pass in runs, and of both, where turns are of several rows."""
    narrow, wide = sizes
    batch, q_len, k_len = p.batch or 0, p.q_len or 0, p.k_len or 0
    heads, block, short = chunked_runs.heads(p), chunked_runs.BLOCK, chunked_runs.SHORT
    entries = min(chunked_runs.AT_ONCE // 4, heads * p.group * q_len * k_len)
    keys, rows = entries // (p.group * block), entries // (short * block)
    tile, width = entries * wide, (p.width + p.v_width) * wide
    tiled = {"b": 1, "h": 1, "row": block, "k": keys // heads}
    # What the mask says, and as numbers, which all heads of a turn share.
    hidden = reading(p.mask, tiled, wide) + p.group * block * (keys // heads) * (1 + wide)
    kept = batch * p.heads * q_len * wide * (1 + 2 * p.return_lse)
    forward = SIDE_BY_SIDE * (2 * tile + hidden + (rows + keys) * width) + kept
    backward = SIDE_BY_SIDE * (3 * tile + hidden + 2 * (rows + keys) * width) + 2 * kept
    if narrow < wide:
        # Sums beside the gradients that they are rounded to.
        backward += batch * p.kv_heads * k_len * width
    return forward, backward


def _spans(
    p: Problem, s: Spans, sizes: tuple[int, int], numbers: tuple[str, tuple[str, str] | None]
) -> Account:
    narrow, wide = sizes
    height = s.starts.shape[1]
    rows, keys = height * p.group * s.block, height * s.keys
    tile, width = rows * s.keys * wide, (p.width + p.v_width) * wide
    batch = p.batch or 0
    queries = batch * p.heads * (p.q_len or 0)
    saved = queries * (2 * wide + 1)
    # The patterns of the mask as numbers, and those of a turn.
    hidden = s.patterns.size * (1 + wide) + tile
    forward = SIDE_BY_SIDE * (2 * tile + (rows + keys) * width) + hidden + 2 * saved
    backward = SIDE_BY_SIDE * (4 * tile + 2 * (rows + keys) * width) + hidden + 4 * saved
    if narrow < wide:
        # Sums beside the gradients that they are rounded to.
        backward += batch * p.kv_heads * (p.k_len or 0) * width
    return Account((s.block, s.block), forward, backward, *numbers, s.keys // s.block)


def _lowered(p: Problem) -> tuple[str, str] | None:
    """What TensorFlow's own switch allows for products of float32."""
    if (p.accumulation, p.device) != ("float32", "gpu"):
        return None
    if not tf.config.experimental.tensor_float_32_execution_enabled():
        return None
    return "TF32", "tf.config.experimental.tensor_float_32_execution_enabled() is True"
