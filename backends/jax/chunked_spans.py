"""A window's forward pass where nothing but `out` is asked for: short lines, many at a time.

A short line of rows wastes little of what it multiplies: 128 rows of a window of 256 see 384 keys.
But XLA's CPU gives a product so small one core, however many are batched. It gives both to

    e = exp(z - max z),  z = min(Q K^T, limit)      limit = +inf where allowed, else -inf
    out = (e V) / sum e

since each of the two is one fusion of its library, whose loops go over the batch for the sake of
the reduction. For that nobody else may want z, its maximum or the sum: so statistics are not
there, nor a mask that is selected by (a minimum with +inf changes nothing). Lines are batched
beside the heads. What asks for more, or differentiates, takes `chunked_forward`.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn_core.backends.jax import chunked_tile as tiles
from attn_core.backends.jax.chunked_forward import times
from attn_core.backends.jax.chunked_parts import (
    lay_out,
    spans_in,
    spans_of,
    start_of,
)
from attn_core.backends.jax.chunked_tile import Geometry, Part
from attn_core.backends.jax.meshes import axes_of
from attn_core.language.tree import Tree
from attn_core.spec import AttentionOutput, Operands, Problem

Array = Any

_LINE, _STEP = 128, 128
"""Rows of a line, and the steps in which its keys start and end."""

_PRODUCTS, _HEADS = 32, 4
"""Lines of all heads in one turn, about, and of how many heads at least.

Measured on a CPU, of 8 heads and a window of 256 at length 8192: 41, 41, 24 and 28 ms with 8, 16,
32 and 64. The library cuts up no fewer than 32, and 64 leave the cache. The mask is read once for
all heads, so that with one head it takes longer than is saved.
"""

_WIDEST = 64
"""The widest heads: their products are large enough by themselves beyond it."""

_LESS = 0.8
"""The share of the entries of long lines down to which those of short ones must come.

Measured on a CPU: windows of 64, 128 and 256 take 0.53, 0.54 and 0.76 of the time; one of 512, with
0.83 of the entries, 1.3.
"""


class Lines(NamedTuple):
    """Short lines of rows, each with one run of keys.

    Attributes:
        geometry: static sizes; a tile is a line and its run.
        rows, keys: int32 (turns, lines of a turn), where each line and its run start. The last
            turn is filled up with the last line, which is computed again.
        turn: batches and heads of a turn.
    """

    geometry: Geometry
    rows: np.ndarray
    keys: np.ndarray
    turn: tuple[int, int]


def lines_of(p: Problem) -> Lines | None:
    """The lines; None where long lines or tiles are the better way, or more than `out` is wanted.

    Of float32, without score, bias, dropout, sinks or statistics, and with a head of keys for each
    head: all else would stand between the two products, or make them large enough.
    """
    if p.return_lse or p.bias is not None or p.score is not None or p.rate or p.sinks_dtype:
        return None
    if p.dtype != "float32" or p.group > 1 or max(p.width, p.v_width) > _WIDEST:
        return None
    long = spans_of(p, columns=False)
    if long is None:
        return None
    assert p.mask is not None
    assert p.batch is not None
    assert p.q_len is not None
    assert p.k_len is not None
    lengths = p.q_len, p.k_len
    return _lines(p.mask, lengths, start_of(p), (p.batch, p.heads), long.entries)


@lru_cache(maxsize=1024)
def _lines(
    mask: Tree, lengths: tuple[int, int], start: int, heads: tuple[int, int], entries: int
) -> Lines | None:
    spans = spans_in(mask, lengths, start, (_LINE, _STEP), columns=False)
    turn = _turn(*heads)
    if spans is None or spans.entries > _LESS * entries or prod(turn) < _HEADS:
        return None
    turns = -(-spans.lines // -(-_PRODUCTS // prod(turn)))
    together = -(-spans.lines // turns)
    line = np.minimum(np.arange(turns * together), spans.lines - 1).reshape(turns, together)
    rows = (line * spans.line).astype(np.int32)
    keys = (spans.starts[line, 0] * spans.step).astype(np.int32)
    tile = spans.line, spans.width * spans.step
    steps = spans.line, spans.step, spans.lines, spans.steps
    return Lines(Geometry(*tile, *steps, 0, full=False, partial=True), rows, keys, turn)


def _turn(batch: int, heads: int) -> tuple[int, int]:
    """As many (batches, heads) as are no more than `_PRODUCTS` lines, and divide what there is."""
    for whole in range(min(batch, _PRODUCTS // heads), 0, -1):
        if batch % whole == 0:
            return whole, heads
    return 1, max(n for n in range(1, _PRODUCTS + 1) if heads % n == 0)


def attend(p: Problem, x: Operands, lines: Lines) -> AttentionOutput:
    """`out` alone. Batches are as good as heads: the mask is the same for all."""
    g = lines.geometry._replace(axes=axes_of(x))
    laid = lay_out(p, x, g)
    query, key, value = (a.reshape(-1, prod(lines.turn), *a.shape[2:]) for a in laid[:3])
    one = jnp.zeros((1, 1, 1, 1, 1), jnp.int32)  # which the mask does not read
    part = Part(laid, one, one)
    turns, together = lines.rows.shape
    rows, keys = jnp.asarray(lines.rows), jnp.asarray(lines.keys)

    def turn(t: Array, out: Array) -> Array:
        some, row, key_at = t // turns, rows[t % turns], keys[t % turns]
        q = _taken(query, some, row, g.block_q) * p.scale
        k, v = (_taken(a, some, key_at, g.block_k) for a in (key, value))
        # As the mask of a tile: what a conditional gives is written down, for all heads.
        shape = (together, 1, g.block_q, g.block_k)
        limit = jax.lax.cond(
            t >= 0,
            lambda: _limit(p, x, g, part, row, key_at),
            lambda: jnp.zeros(shape, q.dtype),
        )
        seen, alive = (limit > 0).any(2), (limit > 0).any(3)
        k, v = tiles.only(k, seen), tiles.only(v, seen)
        z = jnp.minimum(limit, tiles.dot(p, q, k, (3, 3)))
        # A row that sees nothing has no maximum, and e is 0.
        highest = jnp.maximum(z.max(-1, keepdims=True), jnp.finfo(z.dtype).min)
        e = jnp.exp(z - highest)
        found = tiles.dot(p, e, v, (3, 2)) / e.sum(-1, keepdims=True)
        found = jnp.where(alive[..., None], found, 0.0)
        zero = jnp.int32(0)
        for line in range(together):
            at = (some, zero, row[line], zero)
            out = jax.lax.dynamic_update_slice(out, found[line : line + 1], at)
        return out

    out = jnp.zeros((*query.shape[:3], p.v_width), query.dtype)
    out = times(g, len(out) * turns, turn, out)
    out = out.reshape(-1, p.heads, *out.shape[2:])[:, :, : p.q_len]
    return AttentionOutput(out if p.layout == "BHTD" else out.swapaxes(1, 2))


def _taken(x: Array, some: Array, starts: Array, size: int) -> Array:
    """(lines, H, size, X): pieces of (parts, H, T, X), side by side where batches are elsewhere."""
    zero = jnp.int32(0)
    sizes = (1, x.shape[1], size, x.shape[3])
    return jnp.concatenate(
        [jax.lax.dynamic_slice(x, (some, zero, start, zero), sizes) for start in starts]
    )


def _limit(p: Problem, x: Operands, g: Geometry, part: Part, rows: Array, keys: Array) -> Array:
    """(lines, 1, block_q, block_k): +inf where allowed, else -inf."""
    row = rows[:, None, None, None, None] + jnp.arange(g.block_q, dtype=jnp.int32)[:, None]
    k = keys[:, None, None, None, None] + jnp.arange(g.block_k, dtype=jnp.int32)
    index = {"b": part.b, "h": part.h, "q": row + part.laid.offset, "k": k, "row": row}
    shape = (len(rows), 1, 1, g.block_q, g.block_k)
    allowed = jnp.broadcast_to(tiles.allowed(p, x, g, part, index), shape)
    return jnp.where(allowed, jnp.inf, -jnp.inf)[:, :, 0].astype(part.laid.query.dtype)
