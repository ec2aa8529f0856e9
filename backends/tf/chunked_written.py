"""Rows of tiles, written where they belong: `out` is there once.

A graph writes into no tensor: what a loop leaves would be collected tile by tile, and then joined,
beside which the result stands once more. So the loops carry `out` itself, as a matrix whose rows
are runs of numbers that lie together,

    "BHTD"      unit rows of one head           unit divides both T and the rows of a tile
    "BTHD"      one row of all heads of a part

and TensorFlow's `InplaceUpdate` overwrites those of a tile. That is sound where every value of
`out` is used once, by the turn that follows, and starts in memory of its own: `Empty` is not folded
into a constant that calls would share. Its kernel is the CPU's; elsewhere, and under XLA, whose
compiler sees by itself that a scatter needs no copy, it is a scatter. Which of them runs is settled
where the graph runs, so a function traced for the one may be compiled for the other.
"""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from attn_core.backends.tf import chunked_loops as loops
from attn_core.backends.tf import chunked_parts as parts
from attn_core.backends.tf.arrays import DTYPES
from attn_core.backends.tf.chunked_parts import Geometry, Part
from attn_core.spec import Problem

Array = Any


def blank(rows: Any, width: Any, dtype: Any, zeros: bool = False) -> Array:
    """A matrix in memory of its own, every row of which must be written before it is read.

    Args:
        zeros: it holds zeros, and may be read and added to.
    """
    found = tf.raw_ops.Empty(shape=[rows, width], dtype=dtype, init=zeros)
    found.set_shape(loops.static((rows, width)))
    return found


def put(out: Array, place: Array, rows: Array, real: Any = None) -> Array:
    """`out` with `rows` at `place`, of each group the first `real` ones; the argument is used up.

    Args:
        out: (N, X), from `blank` or from here.
        place: int32 (groups, n), numbers of rows of `out`.
        rows: (groups, n, X).
    """
    last = out.shape[-1] or tf.shape(out)[-1]

    def written() -> Array:
        at, new = place, rows
        if real is not None:
            at, new = place[:, :real], rows[:, :real]
        new = tf.reshape(new, (-1, last))
        return tf.raw_ops.InplaceUpdate(x=out, i=tf.reshape(at, (-1,)), v=new)

    def scattered() -> Array:
        at = place
        if real is not None:
            # What lies beyond the end is left out, here and under XLA, whose shapes are static.
            at = tf.where(tf.range(tf.shape(at)[1]) < real, at, tf.shape(out)[0])
        new = tf.reshape(rows, (-1, last))
        return tf.tensor_scatter_nd_update(out, tf.reshape(at, (-1, 1)), new)

    found = tf.__internal__.execute_fn_for_device({"CPU": written}, scattered)
    found.set_shape(out.shape)
    return found


def add(out: Array, place: Array, rows: Array) -> Array:
    """`out`, from `blank` with zeros, with `rows` added at `place`; the argument is used up.

    Args:
        place: int32 (n,), numbers of rows of `out`, each once.
        rows: (n, X).
    """

    def written() -> Array:
        return tf.raw_ops.InplaceAdd(x=out, i=place, v=rows)

    def scattered() -> Array:
        return tf.tensor_scatter_nd_add(out, place[:, None], rows)

    found = tf.__internal__.execute_fn_for_device({"CPU": written}, scattered)
    found.set_shape(out.shape)
    return found


def start(p: Problem, g: Geometry) -> Array:
    """`out` before a tile is written."""
    _, length, unit = _units(p, g)
    if p.layout == "BHTD":
        found = (g.batch * p.heads * (length // unit), unit * p.v_width)
    else:
        found = (g.batch * length * g.parts[1], g.heads * p.group * p.v_width)
    return blank(*found, DTYPES[p.dtype])


def tile(out: Array, p: Problem, g: Geometry, part: Part, i: Array, found: Array) -> Array:
    """`out` with row i of tiles, (B', Hk', G * block_q, Dv), of a part; `out` is used up."""
    block, length, unit = _units(p, g)
    b = parts.span(g.batches, part.batch * g.batches)
    t = parts.span(block // unit, i * (block // unit))
    found = tf.reshape(found, (g.batches, g.heads * p.group, block, p.v_width))
    if p.layout == "BHTD":
        h = tf.reshape(part.h, (1, -1, 1))
        place = (tf.reshape(b, (-1, 1, 1)) * p.heads + h) * (length // unit) + t
        place = tf.reshape(place, (-1, block // unit))
        found = tf.reshape(found, (-1, block // unit, unit * p.v_width))
    else:
        place = (b[:, None] * length + t) * g.parts[1] + part.head
        found = tf.reshape(tf.transpose(found, (0, 2, 1, 3)), (g.batches, block, -1))
    real = tf.minimum(block, length - i * block) // unit if g.padded_rows else None
    return put(out, place, found, real)


def done(out: Array, p: Problem, g: Geometry, size: tuple[Any, Any]) -> Array:
    """`out` in the problem's layout; `size` is (B, Tq) as they are."""
    _, length, _ = _units(p, g)
    shape = [g.batch, p.heads, length, p.v_width]
    along = 2
    if p.layout != "BHTD":
        shape[1], shape[2], along = length, p.heads, 1
    out = tf.reshape(out, shape)
    shape[0], shape[along] = size
    # No copy but where a size that was not known turns out to be 0.
    return tf.slice(out, [0] * 4, shape)


def _units(p: Problem, g: Geometry) -> tuple[Any, Any, Any]:
    """(rows of a tile, Tq and at least 1, rows of a unit)."""
    block, length = g.block_q, g.q_len
    if p.layout != "BHTD":
        unit: Any = 1
    elif isinstance(length, int):
        unit = math.gcd(block, length)
    else:
        # The greatest power of two, of sizes of which a tile's is a multiple of 8, or the length.
        length = tf.maximum(length, 1)
        twos = tf.minimum(*[tf.bitwise.bitwise_and(n, -n) for n in (block, length)])
        unit = tf.where(tf.equal(block, length), length, twos)
    return block, length if isinstance(length, int) else tf.maximum(length, 1), unit
