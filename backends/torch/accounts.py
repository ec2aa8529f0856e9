"""What each implementation spends: bytes beside arguments and results, and in which numbers.

Counted from the same sizes by which the work is cut up. Torch runs one operation after another and
fuses none, so what a tile takes is its logits, the selected keys, and every step of mask and score;
of the loop's own there are the statistics of all rows and the keys and values of a part.
"""

from __future__ import annotations

import torch

from attn_core.backends.torch import native, native_tiles
from attn_core.backends.torch.chunked_parts import joined, tiles_of, together
from attn_core.footprint import differs, reading, sizes
from attn_core.language.duals import differentiate
from attn_core.language.shifts import slides
from attn_core.spec import WIDTH, Account, Problem

Numbers = tuple[str, tuple[str, str] | None]

_PHILOX = 20
"""Bytes of an entry of dropout's mask while it is made: words and their products are int64."""


_ROWS, _KEYS = 256, 512
"""Of the tile that each thread of torch's fused kernel holds on a CPU, at most."""


def account(p: Problem, impl: str) -> Account:
    products = p.dtype if impl == "native" else p.accumulation
    numbers = (products, _lowered(products))
    found = sizes(p)
    if found is None:
        return Account(None, None, None, *numbers)
    if impl == "native":
        return _native(p, found, numbers)
    if impl == "chunked" and 0 not in found:
        return _chunked(p, found, numbers)
    return _reference(p, found, numbers)


def _chunked(p: Problem, found: tuple[int, int, int], numbers: Numbers) -> Account:
    batch, q_len, k_len = found
    wide, width = WIDTH[p.accumulation] // 8, p.width + p.v_width
    block_q, _, block_k, _ = tiles_of(p.group, q_len, k_len)
    keys = min(k_len, block_k * joined(block_k))
    batch_map, head_map = differs(p)
    batches, heads = together(block_q * p.group * keys * wide, p.kv_heads, batch_map, head_map)
    batches = min(batches, batch)
    n, tall = batches * heads, block_q * p.group
    span, rows = n * tall * keys, n * tall * width * wide
    of_part = n * k_len * width * wide
    # The loop makes the next part while it holds the last one.
    copied = 2 * of_part if p.dtype != p.accumulation or p.layout == "BTHD" else 0
    tile = {"b": batches, "h": heads * p.group, "row": block_q, "k": keys}
    hidden = reading(p.mask, tile, wide)
    if p.mask is not None or p.kv_lengths or p.q_lengths:
        # Whether a key is seen, and keys or values selected by that.
        hidden += tall * keys + n * keys * max(p.width, p.v_width) * wide
    if p.bias is not None:
        hidden += span
    score = slope = 0
    if p.score is not None:
        score = reading(p.score, tile, wide)
        slope = reading(differentiate(p.score).tree, tile, wide)
    dropped = _PHILOX * span if p.rate else 0
    saved = batch * p.heads * q_len * (2 * wide + 1)
    forward = saved + copied + span * wide + rows + hidden + score + dropped
    # Two spans are held, three with dropout, and gradients of this part's keys and the last one's.
    spans = (3 if p.rate else 2) * span * wide
    backward = saved + copied + spans + 3 * of_part // 2 + 2 * rows + hidden + slope + dropped
    return Account((block_q, block_k) if block_q else None, forward, backward, *numbers)


def _reference(p: Problem, found: tuple[int, int, int], numbers: Numbers) -> Account:
    batch, q_len, k_len = found
    wide = WIDTH[p.accumulation] // 8
    entries = batch * p.heads * q_len * k_len
    whole = {"b": batch, "h": p.heads, "row": q_len, "k": k_len}
    more = reading(p.mask, whole, wide) + reading(p.score, whole, wide)
    more += _PHILOX * entries if p.rate else 0
    # Five arrays of all entries at the peak, seven with those kept for the backward pass.
    return Account(None, entries * (5 * wide + 1) + more, entries * (7 * wide + 1) + more, *numbers)


def _native(p: Problem, found: tuple[int, int, int], numbers: Numbers) -> Account:
    batch, q_len, k_len = found
    narrow, wide = WIDTH[p.dtype] // 8, WIDTH[p.accumulation] // 8
    statistics = batch * p.heads * q_len * wide
    inputs = batch * (p.heads * q_len * p.width + p.kv_heads * k_len * (p.width + p.v_width))
    held = statistics
    if p.device == "cpu":
        held += torch.get_num_threads() * wide * _ROWS * (_KEYS + p.width)
    if native._kind(p) != "tiles":
        # torch's kernel copies on its way to gradients that lie as (B, T, H, D).
        return Account(None, held, 2 * statistics + inputs * narrow, *numbers)
    block_q, _, block_k, _ = tiles_of(p.group, q_len, k_len, native_tiles._ROWS, native_tiles._KEYS)
    selected = 0
    if p.mask is not None and slides(p.mask) and not (p.kv_lengths or p.q_lengths):
        selected = block_q * min(k_len, native_tiles._JOINED) * narrow
    elif p.mask is not None or p.kv_lengths or p.q_lengths:
        selected = min(native_tiles._SELECTION, batch * q_len * k_len * narrow)
    # What one call over many tiles gives, before it is put where it belongs.
    outputs = min(native_tiles._BAND, batch * p.heads * q_len * p.v_width * narrow)
    # Neighbouring tiles see some keys twice.
    gradients = min(native_tiles._BAND, 3 * inputs // 2 * narrow)
    # Gradients are added up span by span, in memory of their own where entries have 16 bits.
    added = inputs * wide if narrow < wide else 0
    backward = held + statistics + selected + gradients + added
    return Account((block_q, block_k), held + selected + outputs, backward, *numbers)


def _lowered(products: str) -> tuple[str, str] | None:
    """What torch's own switch allows for products of float32."""
    if products != "float32":
        return None
    try:
        switch = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Torch refuses to say where its older and its newer switches have both been turned.
        return "TF32 or bfloat16", "torch's switches of float32 products disagree"
    if switch == "highest":
        return None
    what = "TF32" if switch == "high" else "TF32 or bfloat16"
    return what, f"torch.get_float32_matmul_precision() is {switch!r}"
