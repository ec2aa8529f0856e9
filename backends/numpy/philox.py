"""Dropout's keep mask by Philox4x32-10 (Salmon et al., SC 2011), in NumPy.

Counter (k // 4, q mod 2**32, h, b), word k mod 4, key (low, high) of the seed; an entry is kept
when its word is at least the threshold.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

_M = np.uint64(0xFFFFFFFF)


def keep(threshold: int, seed: Any, batch: int, heads: int, q: Array, k_len: int) -> Array:
    """Boolean (B, Hq, Tq, Tk), True = kept. q: (B or 1, Tq) absolute positions."""
    low, high = words(seed)
    blocks = -(-k_len // 4)
    counter = (
        np.arange(blocks, dtype=np.uint64),
        (q.astype(np.int64) & 0xFFFFFFFF).astype(np.uint64)[:, None, :, None],
        np.arange(heads, dtype=np.uint64)[:, None, None],
        np.arange(batch, dtype=np.uint64)[:, None, None, None],
    )
    shape = (batch, heads, q.shape[-1], blocks)
    x = philox([np.broadcast_to(c, shape) for c in counter], low, high)
    drawn = np.stack(x, -1).reshape(batch, heads, q.shape[-1], blocks * 4)
    return drawn[..., :k_len] >= np.uint64(threshold)


def words(seed: Any) -> tuple[Array, Array]:
    """(low, high) 32-bit words of a seed."""
    return np.uint64(seed[0]), np.uint64(seed[1])


def philox(x: list[Array], low: Array, high: Array) -> list[Array]:
    """Ten rounds over four 32-bit words held in uint64."""
    for i in range(10):
        if i:
            low = (low + np.uint64(0x9E3779B9)) & _M
            high = (high + np.uint64(0xBB67AE85)) & _M
        a = x[0] * np.uint64(0xD2511F53)
        b = x[2] * np.uint64(0xCD9E8D57)
        upper_a, upper_b = a >> np.uint64(32), b >> np.uint64(32)
        x = [upper_b ^ x[1] ^ low, b & _M, upper_a ^ x[3] ^ high, a & _M]
    return x
