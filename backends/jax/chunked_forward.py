"""The forward pass: for every row of tiles, softmax built up over the live tiles of keys.

The running maximum m and sum l of a row are those of the keys seen so far; a new tile rescales what
is there. Rows end as (out, m, log l): with a single number, m + log l, a row of large biases could
not be rebuilt. Where l is 0, log l is +inf instead, so that exp((z - m) - log l) is 0 there
without a mask. With a scale s that is kept back it is exp(s (z - m) - log l).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_core.backends.jax import chunked_tile as tiles
from attn_core.backends.jax.arrays import DTYPES
from attn_core.backends.jax.chunked_tile import Geometry, Part
from attn_core.backends.jax.meshes import spread
from attn_core.schedule import Schedule
from attn_core.spec import Operands, Problem

Array = Any


class Rows(NamedTuple):
    """What a forward pass leaves of every row.

    Attributes:
        out: (B', Hk', G, T, Dv), dtype of query; as `words` where rows of tiles are put together.
        m, log_l: (B', Hk', G, T), accumulation dtype; m is to be scaled by `kept_back`.
        alive: boolean, the row may see a key.
        weights: (B', Hk', G, T, keys), where they are asked for; words too.
    """

    out: Array
    m: Array
    log_l: Array
    alive: Array
    weights: Array | None = None


def forward(p: Problem, x: Operands, g: Geometry, part: Part, by_rows: Schedule) -> Rows:
    """All rows of a part; `by_rows` is its schedule, (rows, width) and twice (rows,)."""
    shape = rows_shape(p, part)
    dtype = DTYPES[p.accumulation]

    def empty(*last: int) -> Array:
        return tiles.words(jnp.zeros((*shape, *last), DTYPES[p.dtype]))

    rows = Rows(
        empty(p.v_width),
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, bool),
        empty(part.laid.key.shape[2]) if p.return_weights else None,
    )

    def turn(line: Array, rows: Rows) -> Rows:
        row = _row(p, x, g, part, by_rows, line)
        row = row._replace(out=tiles.words(row.out))
        start = line * g.step_q
        out, m, log_l, alive = (
            jax.lax.dynamic_update_slice_in_dim(old, new, start, 3)
            for old, new in zip(rows[:4], row[:4], strict=True)
        )
        rows = Rows(out, m, log_l, alive, rows.weights)
        return _weights(p, x, g, part, by_rows, line, row, rows) if p.return_weights else rows

    return times(g, g.rows, turn, rows)


def _row(p: Problem, x: Operands, g: Geometry, part: Part, by_rows: Schedule, line: Array) -> Rows:
    dtype = DTYPES[p.accumulation]
    i = line * g.step_q
    scale = tiles.later(p)
    q = query_tile(p, g, part, i)
    outer = (*q.shape[:2], p.group, g.block_q)

    def step(masked: bool) -> Any:
        def body(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, total, acc = carry
            k, v = (tiles.key_tile(p, g, a, j) for a in (part.laid.key, part.laid.value))
            z, found, *_ = tiles.logits(p, x, g, part, (i, j), q, k, masked, left=scale)
            hidden = z if found is None else jnp.where(found, z, -jnp.inf)
            highest = jnp.maximum(m, hidden.max(-1))
            base = jnp.where(highest == -jnp.inf, 0.0, highest)
            e = jnp.exp(_times(hidden - base[..., None], scale))
            if found is not None:
                # exp(-inf) is 0; where the maximum is NaN or +inf, all of the row is NaN anyway.
                v = tiles.only(v, tiles.seen(found))
            fade = jnp.exp(_times(m - base, scale))
            total = total * fade + e.sum(-1)
            if p.rate:
                e = jnp.where(tiles.kept(p, x, g, part, i, j), e * (1 / (1 - p.rate)), 0.0)
            added = tiles.dot(p, tiles.fold(e).astype(v.dtype), v, (3, 2))
            return highest, total, acc * fade[..., None] + tiles.unfold(added, p.group)

        return body

    carry = (
        jnp.full(outer, -jnp.inf, dtype),
        jnp.zeros(outer, dtype),
        jnp.zeros((*outer, p.v_width), dtype),
    )
    m, total, acc = over_tiles(g, by_rows, line, g.step_k, step, carry)
    alive = total != 0
    if x.sinks is not None:
        m = _times(m, scale)
        sink = sinks_of(p, x, g, part, i)
        highest = jnp.maximum(m, sink)
        base = jnp.where(highest == -jnp.inf, 0.0, highest)
        fade = jnp.exp(m - base)
        total = total * fade + jnp.exp(sink - base)
        acc = acc * fade[..., None]
        m = highest
    m = jnp.where(m == -jnp.inf, 0.0, m)
    summed = total != 0
    out = acc / jnp.where(summed, total, 1.0)[..., None]
    out = jnp.where(alive[..., None], out, 0.0).astype(DTYPES[p.dtype])
    log_l = jnp.where(summed, jnp.log(jnp.where(summed, total, 1.0)), jnp.inf)
    return Rows(out, m, log_l, alive)


def _weights(
    p: Problem,
    x: Operands,
    g: Geometry,
    part: Part,
    by_rows: Schedule,
    line: Array,
    row: Rows,
    rows: Rows,
) -> Rows:
    """The weights of a row of tiles, once its (m, log l) are known."""
    i = line * g.step_q
    q = query_tile(p, g, part, i)

    def step(masked: bool) -> Any:
        def body(j: Array, weights: Array) -> Array:
            k = tiles.key_tile(p, g, part.laid.key, j)
            left = tiles.kept_back(p)
            z, found, *_ = tiles.logits(p, x, g, part, (i, j), q, k, masked, left=left)
            w = probability(p, z, found, row.m, row.log_l)
            w = tiles.words(w.astype(DTYPES[p.dtype]))
            zero = jnp.int32(0)
            at = (zero, zero, zero, i, j)
            return jax.lax.dynamic_update_slice(weights, w, at)

        return body

    return rows._replace(weights=over_tiles(g, by_rows, line, g.step_k, step, rows.weights))


def probability(p: Problem, z: Array, found: Array | None, m: Array, log_l: Array) -> Array:
    """A tile's softmax weights from the statistics of its rows."""
    weights = jnp.exp(_times(z - m[..., None], tiles.kept_back(p)) - log_l[..., None])
    return weights if found is None else jnp.where(found, weights, 0.0)


def _times(x: Array, scale: float) -> Array:
    """The scale after the difference: 0 stays 0 however large the two were."""
    return x if scale == 1.0 else x * scale


def query_tile(p: Problem, g: Geometry, part: Part, i: Array) -> Array:
    """Folded rows of the tile from row i on, scaled where that may be done beforehand."""
    q = tiles.folded_tile(p, g, part.laid.query, i, part.laid.key.shape[1])
    return q * jnp.asarray(p.scale, q.dtype) if tiles.prescaled(p) else q


def rows_shape(p: Problem, part: Part) -> tuple[int, int, int, int]:
    """(B', Hk', G, T) of a part's rows."""
    query, key = part.laid.query, part.laid.key
    return query.shape[0], key.shape[1], p.group, query.shape[2]


def sinks_of(p: Problem, x: Operands, g: Geometry, part: Part, i: Array) -> Array:
    """The sink of every row of the tile from row i on; padded rows have none."""
    dtype = DTYPES[p.accumulation]
    sink = x.sinks.astype(dtype)[part.h[0, :, :, 0, 0]][None, :, :, None]
    row = i + jnp.arange(g.block_q, dtype=jnp.int32)
    valid = row < p.q_len
    if part.laid.q_lengths is not None:
        valid = valid & (row < part.laid.q_lengths[..., 0])
    return jnp.where(valid, sink, -jnp.inf)


def over_tiles(
    g: Geometry, schedule: Schedule, line: Array, size: int, step: Any, carry: Any
) -> Any:
    """`step(False)` over the full tiles of a row or column, then `step(True)` over the partial.

    Args:
        size: `g.step_k` along a row, `g.step_q` along a column.
        step: of whether the tile needs its mask; takes (where the tile starts, carry).
    """
    first = jnp.int32(0)
    if g.single:
        return step(g.partial)(first, carry)
    if g.spans:
        return step(g.partial)(schedule.order[line, 0] * size, carry)
    full, live = schedule.full[line], schedule.live[line]
    carry = spread(g.axes, carry)

    def over(masked: bool, first: Array, beyond: Array, carry: Any) -> Any:
        body = step(masked)
        return jax.lax.fori_loop(
            first, beyond, lambda t, carry: body(schedule.order[line, t] * size, carry), carry
        )

    carry = over(False, first, full, carry) if g.full else carry
    return over(True, full, live, carry) if g.partial else carry


def times(g: Geometry, count: int, turn: Any, carry: Any) -> Any:
    first = jnp.int32(0)
    if count == 1:
        return turn(first, carry)
    return jax.lax.fori_loop(first, jnp.int32(count), turn, spread(g.axes, carry))
