"""Dropout's keep mask by Philox4x32-10 (Salmon et al., SC 2011), in TensorFlow.

Counter (k // 4, q mod 2**32, h, b), word k mod 4, key (low, high) of the seed; an entry is kept
when its word is at least the threshold. Words are held in uint64, where the product of two fits.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Array = Any

_M = 0xFFFFFFFF


def keep(threshold: int, seed: Any, batch: Any, heads: int, q: Array, k_len: Any) -> Array:
    """Boolean (B, Hq, Tq, Tk), True = kept. q: (B or 1, Tq) absolute positions."""
    low, high = words(seed)
    blocks = (k_len + 3) // 4
    counter = (
        tf.cast(tf.range(blocks), tf.uint64),
        tf.cast(tf.cast(q, tf.int64) & _M, tf.uint64)[:, None, :, None],
        tf.cast(tf.range(heads), tf.uint64)[:, None, None],
        tf.cast(tf.range(batch), tf.uint64)[:, None, None, None],
    )
    rows = tf.shape(q)[-1] if q.shape[-1] is None else q.shape[-1]
    shape = (batch, heads, rows, blocks)
    x = philox([tf.broadcast_to(c, shape) for c in counter], low, high)
    drawn = tf.reshape(tf.stack(x, -1), (batch, heads, rows, blocks * 4))
    return drawn[..., :k_len] >= threshold


def words(seed: Any) -> tuple[Array, Array]:
    """(low, high) 32-bit words of a seed."""
    if isinstance(seed, tf.Tensor) and seed.shape.rank == 0:
        if seed.dtype != tf.uint64:
            seed = tf.bitcast(tf.cast(seed, tf.int64), tf.uint64)
        return seed & _M, tf.bitwise.right_shift(seed, _upper())
    return tf.cast(seed[0], tf.uint64), tf.cast(seed[1], tf.uint64)


def philox(x: list[Array], low: Array, high: Array) -> list[Array]:
    """Ten rounds over four 32-bit words held in uint64."""
    for i in range(10):
        if i:
            low = (low + 0x9E3779B9) & _M
            high = (high + 0xBB67AE85) & _M
        a = x[0] * 0xD2511F53
        b = x[2] * 0xCD9E8D57
        upper_a = tf.bitwise.right_shift(a, _upper())
        upper_b = tf.bitwise.right_shift(b, _upper())
        x = [upper_b ^ x[1] ^ low, b & _M, upper_a ^ x[3] ^ high, a & _M]
    return x


def _upper() -> Array:
    return tf.constant(32, tf.uint64)
