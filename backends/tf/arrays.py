"""TensorFlow's spelling of the array reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from attn_core.language.arrays import ArrayReading
from attn_core.language.tree import Tree

Array = Any

DTYPES = {
    "float64": tf.float64,
    "float32": tf.float32,
    "bfloat16": tf.bfloat16,
    "float16": tf.float16,
}

_WIDE = (tf.int64, tf.uint32, tf.uint64)


class Reading(ArrayReading):
    """Reads trees with TensorFlow tensors; floats are in the accumulation dtype.

    Integers are int32, or int64 where an operand does not fit that. TensorFlow promotes nothing,
    so the indices are cast to the same.
    """

    def __init__(
        self, accumulation: str, operands: Sequence[Array], guard: Array | None = None
    ) -> None:
        super().__init__(guard)
        self.float_dtype = DTYPES[accumulation]
        self.int_dtype = tf.int64 if any(t.dtype in _WIDE for t in operands) else tf.int32

    def read(
        self, tree: Tree, indices: Mapping[str, Array], operands: Sequence[Array]
    ) -> list[Array]:
        cast = {name: self.as_int(x) for name, x in indices.items() if tree.reads(name)}
        return super().read(tree, cast | {"s": indices.get("s")}, operands)

    def const(self, kind: str, value: Any) -> Array:
        dtypes = {"bool": tf.bool, "int": self.int_dtype, "float": self.float_dtype}
        return tf.constant(value, dtypes[kind])

    def lookup(self, table: Array, index: Sequence[Array]) -> Array:
        if table.dtype.is_floating:
            table = self.as_float(table)
        elif table.dtype != tf.bool:
            table = self.as_int(table)
        if not index:
            return table
        place = entry(sizes(table), index)
        flat = tf.reshape(table, (-1,))
        if not table.shape.num_elements():
            # Empty, or it may turn out to be, where the tile of indices is not: one zero to read.
            # The outer reshape makes the gradient of the look-up dense.
            flat = tf.reshape(tf.pad(flat, ((0, 1),)), (-1,))
            place = tf.minimum(place, tf.size(flat, tf.int64) - 1)
        return tf.gather(flat, place)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return tf.where(condition, x, y)

    def zeros_like(self, x: Array) -> Array:
        return tf.zeros_like(x)

    def equal(self, x: Array, y: Array) -> Array:
        return tf.equal(x, y)

    def not_equal(self, x: Array, y: Array) -> Array:
        return tf.not_equal(x, y)

    def int_floordiv(self, x: Array, y: Array) -> Array:
        return tf.math.floordiv(x, y)

    def int_mod(self, x: Array, y: Array) -> Array:
        return tf.math.floormod(x, y)

    def int_rshift(self, x: Array, count: Array) -> Array:
        return tf.bitwise.right_shift(x, count)

    def absolute(self, x: Array) -> Array:
        return tf.abs(x)

    def exp(self, x: Array) -> Array:
        return tf.exp(x)

    def log(self, x: Array) -> Array:
        return tf.math.log(x)

    def tanh(self, x: Array) -> Array:
        return tf.tanh(x)

    def floor(self, x: Array) -> Array:
        return tf.floor(x)

    def truncate(self, x: Array) -> Array:
        return tf.where(x < 0, tf.math.ceil(x), tf.floor(x))

    def stop_gradient(self, x: Array) -> Array:
        return tf.stop_gradient(x)

    def as_int(self, x: Array) -> Array:
        return tf.cast(x, self.int_dtype)

    def as_float(self, x: Array) -> Array:
        return tf.cast(x, self.float_dtype)


def entry(shape: Sequence[Any], index: Sequence[Array]) -> Array:
    """The number of what is looked up, int64, among the entries of an array of this shape.

    Indices are held within [0, size - 1] of each axis; they are 0 where an axis is empty.
    """
    place: Array | None = None
    for i, size in zip(index, shape, strict=True):
        wide = size if isinstance(size, int) else tf.cast(size, tf.int64)
        within = tf.maximum(tf.minimum(tf.cast(i, tf.int64), wide - 1), 0)
        place = within if place is None else place * wide + within
    return place


def sizes(x: Array) -> tuple[Any, ...]:
    """The size of each axis: an int where it is known, else an int32 scalar."""
    if x.shape.is_fully_defined():
        return tuple(x.shape)
    now = zip(x.shape, tf.unstack(tf.shape(x)), strict=True)
    return tuple([then if size is None else size for size, then in now])
