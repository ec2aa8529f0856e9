"""Dropout's keep mask by Philox4x32-10 (Salmon et al., SC 2011), in JAX.

Counter (k // 4, q mod 2**32, h, b), word k mod 4, key (low, high) of the seed; an entry is kept
when its word is at least the threshold. Words are uint32, and the 64-bit product of two of them
is put together from their 16-bit halves, since JAX has no 64-bit integers unless x64 is on.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

Array = Any

_M = 0xFFFFFFFF


def keep(threshold: int, seed: Any, batch: Any, heads: int, q: Array, k_len: Any) -> Array:
    """Boolean (B, Hq, Tq, Tk), True = kept. q: (B or 1, Tq) absolute positions."""
    h = jnp.arange(heads, dtype=jnp.int32)[:, None, None]
    b = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    return keep_at(threshold, seed, b, h, q[:, None, :, None], 0, k_len)


def keep_at(
    threshold: int, seed: Any, b: Array, h: Array, q: Array, first: Any, keys: Any
) -> Array:
    """The same over keys first to first + keys - 1, where `first` is a multiple of 4.

    b, h and q broadcast to (..., rows, 1); the result is (..., rows, keys). A seed of a part
    (cuts.py) also says with which batch and head of the whole the part begins.
    """
    low, high = words(seed)
    blocks = first // 4 + jnp.arange((keys + 3) // 4, dtype=jnp.int32)
    counter = [jnp.asarray(c).astype(jnp.uint32) for c in (blocks, q, h, b)]
    if isinstance(seed, tuple) and len(seed) == 4:
        counter[2:] = counter[2] + seed[3], counter[3] + seed[2]
    shape = jnp.broadcast_shapes(*[c.shape for c in counter])
    x = philox([jnp.broadcast_to(c, shape) for c in counter], low, high)
    drawn = jnp.stack(x, -1).reshape(*shape[:-1], shape[-1] * 4)
    return drawn[..., :keys] >= np.uint32(threshold)


def words(seed: Any) -> tuple[Array, Array]:
    """(low, high) 32-bit words of a seed."""
    if isinstance(seed, tuple) or seed.ndim:
        return jnp.asarray(seed[0], jnp.uint32), jnp.asarray(seed[1], jnp.uint32)
    if seed.dtype.itemsize == 8:
        return (seed & _M).astype(jnp.uint32), ((seed >> 32) & _M).astype(jnp.uint32)
    if jnp.issubdtype(seed.dtype, jnp.unsignedinteger):
        return seed.astype(jnp.uint32), jnp.zeros((), jnp.uint32)
    seed = seed.astype(jnp.int32)
    return seed.astype(jnp.uint32), (seed >> 31).astype(jnp.uint32)


def philox(x: list[Array], low: Array, high: Array) -> list[Array]:
    """Ten rounds over four 32-bit words."""
    for i in range(10):
        if i:
            low = low + np.uint32(0x9E3779B9)
            high = high + np.uint32(0xBB67AE85)
        upper_a, lower_a = multiply(x[0], 0xD2511F53)
        upper_b, lower_b = multiply(x[2], 0xCD9E8D57)
        x = [upper_b ^ x[1] ^ low, lower_b, upper_a ^ x[3] ^ high, lower_a]
    return x


def multiply(x: Array, by: int) -> tuple[Array, Array]:
    """Upper and lower word of the 64-bit product of a word and a constant; no sum here wraps."""
    x_low, x_high = x & np.uint32(0xFFFF), x >> np.uint32(16)
    by_low, by_high = np.uint32(by & 0xFFFF), np.uint32(by >> 16)
    middle = x_high * by_low + (x_low * by_low >> np.uint32(16))
    rest = x_low * by_high + (middle & np.uint32(0xFFFF))
    upper = x_high * by_high + (middle >> np.uint32(16)) + (rest >> np.uint32(16))
    return upper, x * np.uint32(by)
