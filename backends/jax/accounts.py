"""What each implementation spends: bytes beside arguments and results, and in which numbers.

Counted from the same sizes by which the work is cut up. XLA fuses what mask, score and dropout
compute into the loops over a tile, so what counts is how many tiles of logits are held, the arrays
of a part, and whatever is laid out anew.
"""

from __future__ import annotations

from math import prod

from attn_core.backends.jax.chunked_parts import level_of, sizes_of
from attn_core.backends.jax.chunked_spans import Lines, lines_of
from attn_core.backends.jax.chunked_tile import Geometry
from attn_core.footprint import differs, sizes
from attn_core.spec import WIDTH, Account, Problem


def account(p: Problem, impl: str) -> Account:
    products = p.accumulation if impl == "reference" else p.dtype
    numbers = (products, _lowered(p, products))
    found = sizes(p)
    if found is None:
        return Account(None, None, None, *numbers)
    if impl == "chunked" and 0 not in found:
        return _chunked(p, found[0], numbers)
    batch, q_len, k_len = found
    entries = batch * p.heads * q_len * k_len * WIDTH[p.accumulation] // 8
    # Three arrays of all entries at the peak, five with those kept for the backward pass.
    extra = (2 if p.score is not None else 0) + (1 if p.rate else 0)
    return Account(None, 3 * entries, (5 + extra) * entries, *numbers)


def _chunked(p: Problem, batch: int, numbers: tuple[str, tuple[str, str] | None]) -> Account:
    g, lines = sizes_of(p, columns=False), lines_of(p)
    forward, backward = _pass(p, batch, g)[0], _pass(p, batch, sizes_of(p, columns=True))[1]
    turn = _turn(p, batch, g)
    if lines is not None:
        # What is told is the call itself; a backward pass has its own forward pass before it.
        g, turn = lines.geometry, lines.turn
        forward = _lines(p, batch, lines)
    # Of a span, the blocks that it takes together: what is live is counted in those.
    tiles, together = (g.block_q, g.step_k), g.block_k // g.step_k
    return Account(tiles, forward, backward, *numbers, together, turn)


def _lines(p: Problem, batch: int, lines: Lines) -> int:
    """Bytes of a forward pass by short lines: one tile of exponentials, its operands, its mask."""
    g, count, wide = lines.geometry, lines.rows.shape[1], WIDTH[p.accumulation] // 8
    n, widths = prod(lines.turn), p.width + p.v_width
    tile = count * ((n + 1) * g.block_q * g.block_k + n * (g.block_q + g.block_k) * widths)
    rows, keys = g.q_size, g.k_size
    moved = p.layout == "BTHD" or (rows, keys) != (p.q_len, p.k_len)
    whole = rows * widths + keys * widths
    return wide * (tile + (batch * p.heads * whole if moved else 0))


def _turn(p: Problem, batch: int, g: Geometry) -> tuple[int, int]:
    """Batches and key heads of one turn of the outer loop."""
    level = level_of(p, 4 * p.group * g.block_q * g.block_k, *differs(p))
    return batch if level == 0 else 1, p.kv_heads if level < 2 else 1


def _pass(p: Problem, batch: int, g: Geometry) -> tuple[int, int]:
    """Bytes of a forward and of a backward pass that are cut up like this."""
    narrow, wide = WIDTH[p.dtype] // 8, WIDTH[p.accumulation] // 8
    n = prod(_turn(p, batch, g))
    tile = n * p.group * g.block_q * g.block_k * wide
    # Entries of the arrays of a part, and of all.
    q, out = (n * p.group * g.q_size * x for x in (p.width, p.v_width))
    kv = n * g.k_size * (p.width + p.v_width)
    parts = batch * p.kv_heads // n
    moved = p.layout == "BTHD" or (g.q_size, g.k_size) != (p.q_len, p.k_len)
    taken = (q + kv) * narrow if parts > 1 else 0
    taken += (q + kv) * parts * narrow if moved else 0
    # On a CPU 16 bits are cut as words, which are copies; what is laid out anew is one already.
    sixteen = narrow < wide and p.device == "cpu"
    as_words = (q + kv) * narrow * parts if sixteen and not moved else 0
    # Each product has keys or values of its own: all that there is, where rows are few.
    beside = n * g.block_k * (p.width + p.v_width) * narrow
    # One part is written where the result stands; others, and what is cut to size, are put there.
    apart = parts if moved else 1 if parts > 1 else 0
    kept = apart * out * narrow
    if p.return_weights:
        kept += apart * n * p.group * g.q_size * g.k_size * narrow
    forward = 5 * tile // 2 + beside + kept + taken + as_words
    turned = 2 * (q + out) * narrow if sixteen and p.group == 1 else 0
    grads = q * wide + (kv * narrow if parts > 1 else 0)
    backward = 4 * tile + 3 * beside // 2 + grads + kept + taken + as_words + turned
    return forward, backward


def _lowered(p: Problem, products: str) -> tuple[str, str] | None:
    """What is allowed for products of float32; "fast" is asked for in each of them."""
    if products != "float32" or p.precision != "fast":
        return None
    return "TF32 or bfloat16", 'precision is "fast"'
