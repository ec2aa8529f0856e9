"""The backward pass: for every column of tiles, dK and dV over its live tiles of rows, and dQ.

With e = exp(s - m) of a tile, and l and delta = sum(dO * O) of its rows::

    dV += e^T (dO / l)          P = e / l, whose division is done on the rows beforehand
    g   = e * (dO / l V^T - (delta - dlse) / l)
    dQ += scale * ds K          ds = g * d score / d s
    dK += scale * ds^T Q

Tiles are computed again from (m, l); dQ is added up in tiles of the accumulation dtype. Whatever is
not allowed is selected away before it meets a product or a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf import chunked_loops as loops
from attn_core.backends.tf import chunked_parts as parts
from attn_core.backends.tf import chunked_tile as tiles
from attn_core.backends.tf.arrays import DTYPES, entry, sizes
from attn_core.backends.tf.chunked_forward import Rows, inverted, line, over_tiles
from attn_core.backends.tf.chunked_grid import Plan, plan, schedule
from attn_core.backends.tf.chunked_parts import Geometry, Inputs, Part, Tiled
from attn_core.backends.tf.chunked_tile import Logits
from attn_core.language.duals import Derivative, differentiate
from attn_core.spec import Operands, Problem

Array = Any


class _Pulled(NamedTuple):
    """What flows back; what is one number for each row, in tiles of rows.

    Attributes:
        out: dO in the problem's layout.
        alive: boolean (parts * rows, B', Hk', G * block_q, 1), the row may see a key.
        base: (delta - dlse) / l, None until delta is known; m, 1 / l: as `alive`, accumulation
            dtype.
        weights: dW, or None.
        lone: boolean, as `alive`: the row gives all its weight to one key, as far as its sum shows.
            None where a gradient of lse moves the logit of that key all the same.
    """

    out: Array
    alive: Array
    base: Array | None
    m: Array
    inverse: Array
    weights: Tiled | None
    lone: Array | None


def backward(
    p: Problem,
    asked: Operands,
    g: Geometry,
    rows: Rows,
    cotangents: tuple[Array, Array | None, Array | None],
) -> Operands:
    """Gradients of query, key, value, bias, sinks and the score's floats; None for the rest."""
    dtype = DTYPES[p.accumulation]
    d_out, d_lse, d_weights = cotangents

    def cut(a: Array) -> Array:
        return parts.cut(tf.expand_dims(a, -1), g, (g.rows, g.block_q), p.group)

    x = parts.lay_out(p, asked, g)
    todo = plan(p, x, g, asked)
    total = cut(rows.total)
    pulled = _Pulled(
        parts.filled(d_out),
        cut(rows.alive),
        None,
        cut(rows.m),
        inverted(total),
        None if d_weights is None else parts.spread(d_weights, p, g),
        tf.equal(total, 1) if d_lse is None else None,
    )
    t = _deltas(p, x, g, pulled, parts.filled(rows.out))
    if pulled.weights is not None:
        t += _weighed(p, x, g, todo, pulled, pulled.weights)
    if d_lse is not None:
        # Padded rows, and those without keys and sink, hand nothing on.
        t -= cut(tf.where(tf.not_equal(rows.total, 0), d_lse, tf.zeros_like(d_lse)))
    pulled = pulled._replace(base=t * pulled.inverse)
    d_sinks = None
    if asked.sinks is not None:
        size = (sizes(rows.m)[0], sizes(rows.m)[2])
        t = tf.squeeze(parts.join(t, g, (g.rows, g.block_q), p.group, size, "BHTD"), -1)
        sinks = tf.cast(asked.sinks, dtype)[:, None]
        share = tf.exp(sinks - rows.m) * inverted(rows.total)
        moved = tf.where(tf.equal(sinks, -np.inf), tf.zeros_like(share), -share * t)
        d_sinks = tf.cast(tf.reduce_sum(moved, (0, 2)), asked.sinks.dtype)
    found = _columns(p, x, g, todo, pulled)
    return _restored(p, asked, x, g, found)._replace(sinks=d_sinks)


def _deltas(p: Problem, x: Inputs, g: Geometry, pulled: _Pulled, out: Array) -> Array:
    """sum(dO * O) of every row, in tiles."""
    dtype = DTYPES[p.accumulation]
    count, outer = g.parts[0] * g.parts[1] * g.rows, (g.batches, g.heads, p.group * g.block_q, 1)

    def turn(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, i = parts.divided(n, g.rows)
        part = parts.part_of(p, x, g, number)
        moved = _selected(p, g, pulled, part, i, pulled.out)
        moved *= _selected(p, g, pulled, part, i, out)
        return (carry[0].write(n, tf.reduce_sum(moved, -1, keepdims=True)),)

    start = loops.fresh(count, outer, dtype)
    return loops.loop(0, count, turn, (start,))[0].stack()


def _selected(p: Problem, g: Geometry, pulled: _Pulled, part: Part, i: Array, x: Array) -> Array:
    """Tile i of rows in the accumulation dtype, 0 in rows that may see no key."""
    found = parts.rows_at(x, p, g, part, i, (g.rows, g.block_q), p.group)
    alive = parts.nth(pulled.alive, _rows(g, part, i))
    return tf.cast(tf.where(alive, found, tf.zeros_like(found)), DTYPES[p.accumulation])


def _queries(p: Problem, x: Inputs, g: Geometry, pulled: _Pulled, part: Part, i: Array) -> Array:
    """Rows of a tile as `tiles.query_of` gives them, but 0 where they may see no key."""
    q = _selected(p, g, pulled, part, i, x.query)
    return q * p.scale if tiles.prescaled(p) else q


class _Sums(NamedTuple):
    """The gradients as TensorArrays of tiles, and the tables of a score."""

    query: Any
    key: Any
    value: Any
    bias: Any
    tables: tuple[Array, ...]


def _columns(p: Problem, x: Inputs, g: Geometry, todo: Plan, pulled: _Pulled) -> _Sums:
    dtype = DTYPES[p.accumulation]
    derivative = None if p.score is None else differentiate(p.score)
    count, by_columns = g.parts[0] * g.parts[1] * g.columns, schedule(todo, columns=True)

    start = _Sums(
        loops.blank(
            g.parts[0] * g.parts[1] * g.rows,
            (g.batches, g.heads, p.group * g.block_q, p.width),
            dtype,
        ),
        loops.fresh(count, (g.batches, g.heads, g.block_k, p.width), dtype),
        loops.fresh(count, (g.batches, g.heads, g.block_k, p.v_width), dtype),
        None if x.bias is None else loops.blank(x.bias.count, x.bias.inner, dtype),
        # One entry more, for an operand that turns out to be empty.
        tuple([tf.zeros((_entries(x.score[n]) + 1,), dtype) for n in _moving(derivative)]),
    )

    def turn(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, j = parts.divided(n, g.columns)
        part = parts.part_of(p, x, g, number)
        k, v = (tiles.keys_of(p, a, g, part, j) for a in (x.key, x.value))
        now = _packed(carry, start)
        dk, dv = (
            tf.zeros((g.batches, g.heads, last, g.block_k), dtype) for last in (p.width, p.v_width)
        )
        body = _tile(p, x, g, part, pulled, (j, k, v), derivative, start)
        at = line(g, todo, part, g.columns, j)
        inner = _flat(now._replace(key=dk, value=dv))
        new = _packed(over_tiles(todo, by_columns, at, body, inner), start)
        dk, dv = (tf.linalg.matrix_transpose(a) for a in (new.key, new.value))
        dk = dk if tiles.prescaled(p) else dk * p.scale
        written = (now.key.write(n, dk), now.value.write(n, dv))
        return _flat(new._replace(key=written[0], value=written[1]))

    return _packed(loops.loop(0, count, turn, _flat(start)), start)


def _tile(
    p: Problem,
    x: Inputs,
    g: Geometry,
    part: Part,
    pulled: _Pulled,
    column: tuple[Array, Array, Array],
    derivative: Derivative | None,
    like: _Sums,
) -> Any:
    """What one tile adds to the sums of its column, and to its rows of dQ."""
    j, k_all, v_all = column

    def body(masked: bool) -> Any:
        def step(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            sums = _packed(carry, like)
            n = _rows(g, part, i)
            q = _queries(p, x, g, pulled, part, i)
            d_out = _selected(p, g, pulled, part, i, pulled.out) * parts.nth(pulled.inverse, n)
            found = tiles.logits(p, x, g, part, (i, j), q, k_all, masked, derivative)
            k = k_all
            if found.allowed is not None:
                k = tf.where(tiles.seen(found.allowed), k, tf.zeros((), k.dtype))
            kept, slope = _slopes(p, x, g, part, pulled, (i, j), found, v_all, d_out)
            # Sums over rows as (D, rows) x (rows, keys): faster than the tile turned over.
            value = sums.value + tf.matmul(d_out, _folded(kept, g), transpose_a=True)
            bias, tables = sums.bias, sums.tables
            if x.bias is not None:
                number = x.bias.number(part, i, j)
                added = tf.reshape(_reduced(slope, x.bias.size), x.bias.inner)
                bias = bias.write(number, bias.read(number) + added)
            if derivative is not None:
                tables = _tables(p, x, derivative, found, slope, tables)
                slope = slope * found.slope
                if found.allowed is not None:
                    slope = tf.where(found.allowed, slope, tf.zeros_like(slope))
            ds = _folded(slope, g)
            dq = tf.matmul(ds, k)
            query = sums.query.write(n, sums.query.read(n) + dq)
            key = sums.key + tf.matmul(q, ds, transpose_a=True)
            return _flat(_Sums(query, key, value, bias, tables))

        return step

    return body


def _slopes(
    p: Problem,
    x: Inputs,
    g: Geometry,
    part: Part,
    pulled: _Pulled,
    at: tuple[Array, Array],
    found: Logits,
    v: Array,
    d_out: Array,
) -> tuple[Array, Array]:
    """(e after dropout, gradient of the logits), both over the tile."""
    n, zero = _rows(g, part, at[0]), tf.zeros((), DTYPES[p.accumulation])
    shape = (*g.outer(p), 1)
    m, base = (tf.reshape(parts.nth(a, n), shape) for a in (pulled.m, pulled.base))
    e = tf.exp(found.z - m)
    if found.allowed is not None:
        e = tf.where(found.allowed, e, zero)
    dp = tf.matmul(d_out, v, transpose_b=True)
    dp = tf.reshape(dp, tf.shape(e) if None in tuple(e.shape) else e.shape)
    kept = e
    if p.rate:
        keep = tiles.kept(p, x, g, part, *at)
        kept, dp = (tf.where(keep, a * (1 / (1 - p.rate)), zero) for a in (e, dp))
    if pulled.weights is not None:
        inverse = tf.reshape(parts.nth(pulled.inverse, n), shape)
        dp = dp + tf.cast(parts.tile_of(pulled.weights, part, *at), dp.dtype) * inverse
    slope = e * (dp - base)
    if found.allowed is not None:
        # Nothing has selected away before what comes of a value that may not be seen. By the mask
        # and not by e = 0: a key that may be seen and has no weight is data, as it is elsewhere.
        slope = tf.where(found.allowed, slope, zero)
    if pulled.lone is not None:
        moved, lone = slope, tf.reshape(parts.nth(pulled.lone, n), shape)
        slope = tf.cond(tf.reduce_any(lone), lambda: settled(moved, e, lone), lambda: moved)
    return kept, slope


def settled(slope: Array, e: Array, lone: Array) -> Array:
    """The gradient of the logits, with 0 at a key that has all the weight of its row.

    There dP and delta are equal but for their rounding, which would be all that is left. The sum of
    such a row is 1, also where other keys have weights too small to show in it: those keep their
    gradient, which is no difference of equals.
    """
    # Beside a sum of 1 the key that makes it up has e = 1, and no other one more than half an ulp.
    most = tf.where(lone, tf.constant(0.5, e.dtype), tf.constant(np.inf, e.dtype))
    return slope * tf.cast(e <= most, slope.dtype)


def _weighed(
    p: Problem, x: Inputs, g: Geometry, todo: Plan, pulled: _Pulled, weights: Tiled
) -> Array:
    """sum_k P dW of every row, in tiles: what the weights' own cotangent adds to delta."""
    dtype = DTYPES[p.accumulation]
    outer = (g.batches, g.heads, p.group * g.block_q, 1)
    count, by_rows = g.parts[0] * g.parts[1] * g.rows, schedule(todo)

    def turn(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, i = parts.divided(n, g.rows)
        part = parts.part_of(p, x, g, number)
        q = _queries(p, x, g, pulled, part, i)
        m = tf.reshape(parts.nth(pulled.m, n), (*g.outer(p), 1))

        def body(masked: bool) -> Any:
            def step(j: Array, now: tuple[Array]) -> tuple[Array]:
                k = tiles.keys_of(p, x.key, g, part, j)
                found = tiles.logits(p, x, g, part, (i, j), q, k, masked)
                moved = tf.exp(found.z - m) * tf.cast(parts.tile_of(weights, part, i, j), dtype)
                if found.allowed is not None:
                    moved = tf.where(found.allowed, moved, tf.zeros_like(moved))
                added = tf.reduce_sum(moved, -1, keepdims=True)
                return (now[0] + tf.reshape(added, outer),)

            return step

        at = line(g, todo, part, g.rows, i)
        (total,) = over_tiles(todo, by_rows, at, body, (tf.zeros(outer, dtype),))
        return (carry[0].write(n, total * parts.nth(pulled.inverse, n)),)

    start = loops.fresh(count, outer, dtype)
    return loops.loop(0, count, turn, (start,))[0].stack()


def _tables(
    p: Problem,
    x: Inputs,
    derivative: Derivative,
    found: Logits,
    slope: Array,
    tables: tuple[Array, ...],
) -> tuple[Array, ...]:
    """The gradients of a score's operands, with what this tile adds."""
    sums = dict(zip(_moving(derivative), tables, strict=True))
    for site, (adjoint, index) in zip(derivative.sites, found.sites, strict=True):
        moved = slope * adjoint
        if found.allowed is not None:
            moved = tf.where(found.allowed, moved, tf.zeros_like(moved))
        # Summed first along the axes that the look-up does not tell apart.
        alike = [a for a in range(5) if all(len(i.shape) == 0 or i.shape[a] == 1 for i in index)]
        moved = tf.reduce_sum(moved, alike, keepdims=True)
        shape = sizes(x.score[site.operand])
        place = entry(shape, index) if index else tf.zeros((1, 1, 1, 1, 1), tf.int64)
        # In an operand that turns out to be empty there is but the entry beyond.
        place = tf.minimum(place, _entries(x.score[site.operand]))
        place = tf.reshape(tf.broadcast_to(place, tf.shape(moved)), (-1, 1))
        added = tf.reshape(moved, (-1,))
        sums[site.operand] = tf.tensor_scatter_nd_add(sums[site.operand], place, added)
    return tuple(sums.values())


def _restored(p: Problem, asked: Operands, x: Inputs, g: Geometry, found: _Sums) -> Operands:
    """Tiles put together, each gradient in its input's shape and dtype."""
    axis = 2 if p.layout == "BHTD" else 1
    made: dict[str, Array] = {}
    before: list[Array] = []
    for name, blocks, group in (
        ("key", (g.columns, g.block_k), 1),
        ("value", (g.columns, g.block_k), 1),
        ("query", (g.rows, g.block_q), p.group),
    ):
        array = getattr(asked, name)
        now = sizes(array)
        # One after the other: each is copied twice on its way, and they are not small.
        with tf.control_dependencies(before):
            tiled = getattr(found, name).stack()
        tiled = parts.join(tiled, g, blocks, group, (now[0], now[axis]), p.layout)
        tiled = tiled * p.scale if name == "query" else tiled
        made[name] = tf.cast(tiled, array.dtype)
        before = [made[name]]
    bias = None
    if x.bias is not None:
        bias = tf.cast(parts.gather_up(found.bias.stack(), x.bias), asked.bias.dtype)
    score: list[Any] = [None] * len(asked.score)
    if p.score is not None:
        for number, table in zip(_moving(differentiate(p.score)), found.tables, strict=True):
            array = asked.score[number]
            score[number] = tf.cast(tf.reshape(table[:-1], sizes(array)), array.dtype)
    return Operands(**made, bias=bias, score=tuple(score))


def _reduced(x: Array, size: Sequence[Any]) -> Array:
    """Sums over the axes of a tile along which an array of this size has one entry."""
    split: list[Any] = []
    for now, then in zip(sizes(x), size, strict=True):
        # (n, 1) to be summed, or (1, n): which axes they are must be known even to XLA.
        summed = 1 if now is then else now if isinstance(then, int) else now // then
        if isinstance(then, int) and then != 1:
            summed = 1
        split += [summed, then]
    return tf.reshape(tf.reduce_sum(tf.reshape(x, split), (0, 2, 4, 6, 8)), size)


def _moving(derivative: Derivative | None) -> list[int]:
    """Numbers of the operands that have a gradient."""
    return [] if derivative is None else sorted({site.operand for site in derivative.sites})


def _entries(table: Array) -> Any:
    known = table.shape.num_elements()
    return tf.size(table, tf.int64) if known is None else known


def _folded(x: Array, g: Geometry) -> Array:
    batch, heads, group, rows, last = sizes(x)
    return tf.reshape(x, (batch, heads, group * rows, last))


def _rows(g: Geometry, part: Part, i: Array) -> Array:
    return part.number * g.rows + i


def _flat(sums: _Sums) -> tuple[Any, ...]:
    return (*[a for a in sums[:4] if a is not None], *sums.tables)


def _packed(flat: Sequence[Any], like: _Sums) -> _Sums:
    """The inverse of `_flat`; `like` says whether there is a bias."""
    rest = iter(flat)
    query, key, value, bias = (None if a is None else next(rest) for a in like[:4])
    return _Sums(query, key, value, bias, tuple(rest))
