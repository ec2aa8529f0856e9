"""The forward pass: for every row of tiles, softmax built up over its live tiles of keys.

The running maximum m and sum l of a row are those of the keys seen so far; a new tile rescales what
is there. Rows end as (out, m, l): with a single number, m + log l, a row of large biases could not
be rebuilt. A row without a sum has m = l = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf import chunked_loops as loops
from attn_core.backends.tf import chunked_parts as parts
from attn_core.backends.tf import chunked_tile as tiles
from attn_core.backends.tf import chunked_written as written
from attn_core.backends.tf.arrays import DTYPES, sizes
from attn_core.backends.tf.chunked_grid import Plan, schedule
from attn_core.backends.tf.chunked_parts import Geometry, Inputs, Part
from attn_core.schedule import Schedule
from attn_core.spec import Problem

Array = Any


class Rows(NamedTuple):
    """What a forward pass leaves of every row.

    Attributes:
        out: (B, Hq, Tq, Dv) in the problem's layout, dtype of query.
        m, total: (B, Hq, Tq), the maximum and the sum of exp(s - m), accumulation dtype; None where
            nobody reads them.
        alive: boolean, the row may see a key.
        weights: (B, Hq, Tq, Tk), dtype of query, or None.
    """

    out: Array
    m: Array | None
    total: Array | None
    alive: Array
    weights: Array | None = None


def forward(
    p: Problem, x: Inputs, g: Geometry, todo: Plan, sinks: Array | None, size: tuple[Any, Any, Any]
) -> Rows:
    """All rows. `sinks` is (Hq,) or None, `size` is (B, Tq, Tk) as they are."""
    count, by_rows = g.parts[0] * g.parts[1] * g.rows, schedule(todo)
    outer = (g.batches, g.heads, p.group * g.block_q)
    dtype = DTYPES[p.accumulation]
    shapes = [(DTYPES[p.dtype], p.v_width), (dtype, 1), (dtype, 1), (tf.bool, 1)]
    arrays: list[Any] = [loops.fresh(count, (*outer, last), kind) for kind, last in shapes]
    # One tile is all there is, and need not be put into its place.
    several = not isinstance(count, int) or count > 1
    if several:
        arrays[0] = written.start(p, g)
    like = None
    if p.return_weights:
        full = (size[0], p.heads, size[1], size[2])
        like = parts.like(full, p, g)
        arrays.append(loops.blank(like.count, like.inner, DTYPES[p.dtype]))

    def turn(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, i = parts.divided(n, g.rows)
        part = parts.part_of(p, x, g, number)
        found = _row(p, x, g, todo, by_rows, part, i, sinks)
        out, *kept = carry
        out = written.tile(out, p, g, part, i, found[0]) if several else out.write(n, found[0])
        kept[:3] = [a.write(n, r) for a, r in zip(kept, found[1:], strict=False)]
        if like is not None:
            kept[3] = _weights(p, x, g, todo, by_rows, part, i, found, like, kept[3])
        return (out, *kept)

    def joined(tiles: Any, layout: str) -> Array:
        blocks = (g.rows, g.block_q)
        return parts.join(tiles.stack(), g, blocks, p.group, size[:2], layout)

    out, *kept = loops.loop(0, count, turn, arrays)
    out = written.done(out, p, g, size[:2]) if several else joined(out, p.layout)
    m, total, alive = (tf.squeeze(joined(a, "BHTD"), -1) for a in kept[:3])
    weights = None if like is None else parts.gather_up(kept[3].stack(), like)
    return Rows(out, m, total, alive, weights)


def _row(
    p: Problem,
    x: Inputs,
    g: Geometry,
    todo: Plan,
    by_rows: Schedule,
    part: Part,
    i: Array,
    sinks: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """(out, m, total, alive) of row i of tiles, folded."""
    dtype = DTYPES[p.accumulation]
    q = tiles.query_of(p, x, g, part, i)
    shape = (g.batches, g.heads, p.group * g.block_q)

    def body(masked: bool) -> Any:
        def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            m, total, acc = carry
            k, v = (tiles.keys_of(p, a, g, part, j) for a in (x.key, x.value))
            found = tiles.logits(p, x, g, part, (i, j), q, k, masked)
            z = found.z
            if found.allowed is not None:
                z = tf.where(found.allowed, z, _low(dtype))
                v = tf.where(tiles.seen(found.allowed), v, tf.zeros((), dtype))
            z = tf.reshape(z, (*shape, g.block_k))
            top = tf.reduce_max(z, -1, keepdims=True)
            highest = tf.maximum(m, top)
            base = tf.where(tf.equal(highest, -np.inf), tf.zeros_like(highest), highest)
            # TensorFlow's softmax is a maximum, an exponential and a sum in the time of one of
            # them. The sum it divides by is found in the largest share: exp(0) over the sum.
            share = tf.nn.softmax(z)
            added = tf.exp(top - base) / tf.reduce_max(share, -1, keepdims=True)
            fade = tf.exp(m - base)
            if p.rate:
                keep = tf.reshape(tiles.kept(p, x, g, part, i, j), (*shape, g.block_k))
                share = tf.where(keep, share * (1 / (1 - p.rate)), tf.zeros_like(share))
            # A row all of whose logits are hidden, or -inf themselves, has shares of 0 / 0.
            added = tf.where(tf.equal(top, -np.inf), tf.zeros_like(added), added)
            more = tf.math.multiply_no_nan(tf.matmul(share, v), added)
            return highest, total * fade + added, acc * fade + more

        return step

    start = (
        tf.fill((*shape, 1), _low(dtype)),
        tf.zeros((*shape, 1), dtype),
        tf.zeros((*shape, p.v_width), dtype),
    )
    m, total, acc = over_tiles(todo, by_rows, line(g, todo, part, g.rows, i), body, start)
    alive = tf.not_equal(total, 0)
    if sinks is not None:
        sink = _sink_rows(p, g, part, tf.cast(sinks, dtype), i)
        highest = tf.maximum(m, sink)
        base = tf.where(tf.equal(highest, -np.inf), tf.zeros_like(highest), highest)
        fade = tf.exp(m - base)
        total, acc, m = total * fade + tf.exp(sink - base), acc * fade, highest
    m = tf.where(tf.equal(m, -np.inf), tf.zeros_like(m), m)
    divisor = tf.where(tf.equal(total, 0), tf.ones_like(total), total)
    out = tf.where(alive, acc / divisor, tf.zeros_like(acc))
    return tf.cast(out, DTYPES[p.dtype]), m, total, alive


def _sink_rows(p: Problem, g: Geometry, part: Part, sinks: Array, i: Array) -> Array:
    """The sink of each folded row of tile i; padded rows have none."""
    sink = tf.gather(sinks, part.h)
    if part.q_lengths is not None:
        row = parts.along(parts.span(g.block_q, i * g.block_q), (1, 1, 1, -1, 1))
        sink = tf.where(row < part.q_lengths, sink, _low(sink.dtype))
    return parts.fold(tf.broadcast_to(sink, (*g.outer(p), 1)), g, p.group)


def _weights(
    p: Problem,
    x: Inputs,
    g: Geometry,
    todo: Plan,
    by_rows: Schedule,
    part: Part,
    i: Array,
    row: tuple[Array, Array, Array, Array],
    like: parts.Tiled,
    kept: Any,
) -> Any:
    """The weights of a row of tiles, once its statistics are known."""
    q = tiles.query_of(p, x, g, part, i)
    _, m, total, _ = row
    m, inverse = (tf.reshape(r, (*g.outer(p), 1)) for r in (m, inverted(total)))

    def body(masked: bool) -> Any:
        def step(j: Array, carry: tuple[Any]) -> tuple[Any]:
            k = tiles.keys_of(p, x.key, g, part, j)
            found = tiles.logits(p, x, g, part, (i, j), q, k, masked)
            w = tf.exp(found.z - m) * inverse
            if found.allowed is not None:
                w = tf.where(found.allowed, w, tf.zeros_like(w))
            w = tf.reshape(tf.cast(w, DTYPES[p.dtype]), like.inner)
            return (carry[0].write(like.number(part, i, j), w),)

        return step

    return over_tiles(todo, by_rows, line(g, todo, part, g.rows, i), body, (kept,))[0]


def inverted(total: Array) -> Array:
    """1 / l, and 0 for a row without a sum."""
    return tf.math.reciprocal_no_nan(total)


def line(g: Geometry, todo: Plan, part: Part, count: Any, at: Array) -> Array:
    """Number of a row (or column) of tiles in a schedule whose parts have `count` of them."""
    along_batch, along_heads = todo.parts
    number: Any = part.batch if along_batch else 0
    if along_heads:
        number = number * g.parts[1] + part.head
    return number * count + at


def over_tiles(
    todo: Plan, lines: Schedule, at: Array, body: Any, carry: Sequence[Any]
) -> tuple[Any, ...]:
    """`body(False)` over the full tiles of a row or column, then `body(True)` over the partial."""
    carry = tuple(carry)
    if todo.single:
        return tuple(body(todo.some_partial)(0, carry))
    full, live = (tf.gather(tf.reshape(n, (-1,)), at) for n in lines[1:])
    order = tf.reshape(lines.order, (-1,))
    wide = sizes(lines.order)[-1]

    def step(masked: bool) -> Any:
        run = body(masked)
        return lambda t, now: run(tf.gather(order, at * wide + t), now)

    if todo.some_full:
        carry = loops.loop(tf.constant(0), full, step(False), carry)
    if todo.some_partial:
        carry = loops.loop(full, live, step(True), carry)
    return carry


def _low(dtype: Any) -> Array:
    return tf.constant(-np.inf, dtype)
