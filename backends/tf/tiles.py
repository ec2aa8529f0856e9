"""What the interval reading asks of an array library, in TensorFlow's words.

The names and their order are those of `attn_core.language.rules.Host`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from attn_core.backends.tf.arrays import sizes

Array = Any


class Tiles:
    """Tile positions and operands as int64 (or bool) tensors: TensorFlow promotes nothing."""

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return tf.where(condition, x, y)

    def minimum(self, x: Array, y: Array) -> Array:
        return tf.minimum(x, y)

    def maximum(self, x: Array, y: Array) -> Array:
        return tf.maximum(x, y)

    def floordiv(self, x: Array, y: Array) -> Array:
        return tf.math.floordiv(x, y)

    def rshift(self, x: Array, count: Array) -> Array:
        return tf.bitwise.right_shift(x, count)

    def take(self, x: Array, index: Array) -> Array:
        return tf.gather(tf.reshape(x, [-1]), index)

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        return tf.concat(list(parts), axis)

    def index(self, x: Any) -> Array:
        return tf.cast(tf.convert_to_tensor(x), tf.int64)

    def array(self, x: Any) -> Array:
        x = tf.convert_to_tensor(x)
        return x if x.dtype == tf.bool else tf.cast(x, tf.int64)

    def least(self, x: Array) -> Array:
        return tf.reduce_min(x, -1)

    def most(self, x: Array) -> Array:
        return tf.reduce_max(x, -1)

    def total(self, x: Array) -> Array:
        return tf.reduce_sum(x, -1)

    def descending(self, x: Array) -> Array:
        # top_k puts equal ones as they stand, and XLA has it for int32.
        return tf.math.top_k(tf.cast(x, tf.int32), sizes(x)[-1]).indices
