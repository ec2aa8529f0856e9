"""What the interval reading asks of an array library, in JAX's words.

The names and their order are those of `attn_core.language.rules.Host`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

Array = Any


class Tiles:
    """Tile positions and operands as int32 (or bool) arrays, under x64 as well."""

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return jnp.where(condition, x, y)

    def minimum(self, x: Array, y: Array) -> Array:
        return jnp.minimum(x, y)

    def maximum(self, x: Array, y: Array) -> Array:
        return jnp.maximum(x, y)

    def floordiv(self, x: Array, y: Array) -> Array:
        return jnp.floor_divide(x, y)

    def rshift(self, x: Array, count: Array) -> Array:
        return jnp.right_shift(x, count)

    def take(self, x: Array, index: Array) -> Array:
        return jnp.take(x.reshape(-1), index, mode="clip")

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        return jnp.concatenate(list(parts), axis)

    def index(self, x: Any) -> Array:
        return jnp.asarray(x, jnp.int32)

    def array(self, x: Any) -> Array:
        x = jnp.asarray(x)
        return x if x.dtype in (jnp.bool_, jnp.int64) else x.astype(jnp.int32)

    def least(self, x: Array) -> Array:
        return x.min(-1)

    def most(self, x: Array) -> Array:
        return x.max(-1)

    def total(self, x: Array) -> Array:
        return x.sum(-1, dtype=jnp.int32)

    def descending(self, x: Array) -> Array:
        return jnp.argsort(-x, -1, stable=True).astype(jnp.int32)
