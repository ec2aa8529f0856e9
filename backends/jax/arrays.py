"""JAX's spelling of the array reading."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_core.language.arrays import ArrayReading

Array = Any

DTYPES = {
    "float64": jnp.float64,
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
}


class Reading(ArrayReading):
    """Reads trees with JAX arrays; floats are in the accumulation dtype.

    Integers are int32, or int64 where an operand is, which takes x64.
    """

    def __init__(
        self, accumulation: str, operands: Sequence[Array], guard: Array | None = None
    ) -> None:
        super().__init__(guard)
        self.float_dtype = DTYPES[accumulation]
        wide = any(t.dtype == jnp.int64 for t in operands)
        self.int_dtype = jnp.int64 if wide else jnp.int32

    def const(self, kind: str, value: Any) -> Array:
        dtypes = {"bool": jnp.bool_, "int": self.int_dtype, "float": self.float_dtype}
        return jnp.full((), value, dtypes[kind])

    def lookup(self, table: Array, index: Sequence[Array]) -> Array:
        if jnp.issubdtype(table.dtype, jnp.floating):
            table = table.astype(self.float_dtype)
        elif table.dtype != jnp.bool_:
            table = table.astype(self.int_dtype)
        if not index:
            return table
        if 0 in table.shape:
            # Nothing is looked up in an empty table: the tile of indices is empty as well.
            return jnp.zeros(jnp.broadcast_shapes(*[i.shape for i in index]), table.dtype)
        return table.at[clamp(table.shape, index)].get(mode="promise_in_bounds")

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return jnp.where(condition, x, y)

    def zeros_like(self, x: Array) -> Array:
        return jnp.zeros_like(x)

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
        return jnp.abs(x)

    def exp(self, x: Array) -> Array:
        return jnp.exp(x)

    def log(self, x: Array) -> Array:
        return jnp.log(x)

    def tanh(self, x: Array) -> Array:
        return jnp.tanh(x)

    def floor(self, x: Array) -> Array:
        return jnp.floor(x)

    def truncate(self, x: Array) -> Array:
        return jnp.trunc(x)

    def stop_gradient(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def as_int(self, x: Array) -> Array:
        return x.astype(self.int_dtype)

    def as_float(self, x: Array) -> Array:
        return x.astype(self.float_dtype)


def clamp(shape: Sequence[Any], index: Sequence[Array]) -> tuple[Array, ...]:
    """Look-up indices held within [0, size - 1] of each axis."""
    return tuple(jnp.clip(i, 0, size - 1) for i, size in zip(index, shape, strict=True))


def is_wide(x: Any) -> bool:
    """Whether computing with `x` takes x64: a JAX array of 64-bit numbers, or host float64."""
    if isinstance(x, jax.Array):
        return x.dtype in (jnp.float64, jnp.int64, jnp.uint64)
    return isinstance(x, np.ndarray) and x.dtype == np.float64


def x64(wanted: bool) -> Any:
    """A context in which 64-bit numbers stay so, where that is wanted; no setting is touched."""
    return jax.enable_x64(True) if wanted else nullcontext()


def from_host(x: np.ndarray) -> Array:
    """A copy of `x` with its dtype, 64-bit ones too, which JAX alone would narrow."""
    with x64(x.dtype.itemsize == 8):
        return jnp.array(x)
