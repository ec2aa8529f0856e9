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
    rows = tf.shape(q)[-1] if q.shape[-1] is None else q.shape[-1]
    place = (
        tf.range(batch)[:, None, None, None],
        tf.range(heads)[:, None, None],
        q[:, None, :, None],
    )
    return keep_at(threshold, seed, place, (batch, heads, rows), (0, k_len))


def keep_at(
    threshold: int,
    seed: Any,
    place: tuple[Array, Array, Array],
    outer: tuple[Any, ...],
    keys: tuple[Any, Any],
) -> Array:
    """Boolean (*outer, keys), True = kept, for a tile of positions.

    Args:
        place: b, h and q, which broadcast to (*outer, 1).
        outer: the tile's shape but for its keys.
        keys: the first key, a multiple of 4, and how many there are.
    """
    low, high = words(seed)
    first, count = keys
    blocks = (count + 3) // 4
    b, h, q = [tf.cast(tf.cast(x, tf.int64) & _M, tf.uint64) for x in place]
    k = tf.cast(tf.range(blocks) + first // 4, tf.uint64)
    # Four rounds, and each word is a number of every place.
    x = philox([k, q, h, b], low, high)
    drawn = tf.reshape(tf.stack(x, -1), (*outer, blocks * 4))
    return drawn[..., :count] >= threshold


def words(seed: Any) -> tuple[Array, Array]:
    """(low, high) 32-bit words of a seed."""
    if isinstance(seed, tf.Tensor) and seed.shape.rank == 0:
        if seed.dtype != tf.uint64:
            seed = tf.bitcast(tf.cast(seed, tf.int64), tf.uint64)
        return seed & _M, tf.bitwise.right_shift(seed, tf.constant(32, tf.uint64))
    return tf.cast(seed[0], tf.uint64), tf.cast(seed[1], tf.uint64)


def philox(x: list[Array], low: Array, high: Array) -> list[Array]:
    """Ten rounds over four 32-bit words held in uint64."""
    # A constant is an operation too, and there are ten rounds: each is made once.
    times = [tf.constant(n, tf.uint64) for n in (0xD2511F53, 0xCD9E8D57)]
    mask, upper = tf.constant(_M, tf.uint64), tf.constant(32, tf.uint64)
    keys = (
        tf.unstack((word + tf.constant([i * step for i in range(10)], tf.uint64)) & mask)
        for word, step in ((low, 0x9E3779B9), (high, 0xBB67AE85))
    )
    for low, high in zip(*keys, strict=True):
        a, b = x[0] * times[0], x[2] * times[1]
        above = [tf.bitwise.right_shift(n, upper) for n in (a, b)]
        x = [above[1] ^ x[1] ^ low, b & mask, above[0] ^ x[3] ^ high, a & mask]
    return x
