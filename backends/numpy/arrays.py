"""NumPy's spelling of the array reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_core.language.arrays import ArrayReading

Array = Any


class Reading(ArrayReading):
    """Reads trees with NumPy arrays; floats are in the accumulation dtype."""

    def __init__(self, accumulation: str, guard: Array | None = None) -> None:
        super().__init__(guard)
        self.float_dtype = np.dtype(accumulation)
        self.int_dtype = np.dtype(np.int32)

    def const(self, kind: str, value: Any) -> Array:
        dtypes = {"bool": np.dtype(bool), "int": self.int_dtype, "float": self.float_dtype}
        return np.asarray(value, dtypes[kind])

    def lookup(self, table: Array, index: Sequence[Array]) -> Array:
        if table.dtype.kind in "iu":
            table = table.astype(self.int_dtype)
        elif table.dtype.kind != "b":
            table = table.astype(self.float_dtype)
        if 0 in table.shape:
            # Nothing is looked up in an empty table: the tile of indices is empty as well.
            return np.zeros(np.broadcast_shapes(*[i.shape for i in index]), table.dtype)
        return table[clamp(table.shape, index)]

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return np.where(condition, x, y)

    def zeros_like(self, x: Array) -> Array:
        return np.zeros_like(x)

    def equal(self, x: Array, y: Array) -> Array:
        return x == y

    def not_equal(self, x: Array, y: Array) -> Array:
        return x != y

    def int_floordiv(self, x: Array, y: Array) -> Array:
        return x // y

    def int_mod(self, x: Array, y: Array) -> Array:
        return x % y

    def int_rshift(self, x: Array, count: Array) -> Array:
        return x >> count

    def absolute(self, x: Array) -> Array:
        return np.abs(x)

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def log(self, x: Array) -> Array:
        return np.log(x)

    def tanh(self, x: Array) -> Array:
        return np.tanh(x)

    def floor(self, x: Array) -> Array:
        return np.floor(x)

    def truncate(self, x: Array) -> Array:
        return np.trunc(x)

    def stop_gradient(self, x: Array) -> Array:
        return x

    def as_int(self, x: Array) -> Array:
        return x.astype(self.int_dtype)

    def as_float(self, x: Array) -> Array:
        return x.astype(self.float_dtype)


def clamp(shape: Sequence[int], index: Sequence[Array]) -> tuple[Array, ...]:
    """Look-up indices held within [0, size - 1] of each axis."""
    return tuple(np.clip(i, 0, size - 1) for i, size in zip(index, shape, strict=True))
