"""Dropout's keep mask by Philox4x32-10 (Salmon et al., SC 2011), in torch.

Counter (k // 4, q mod 2**32, h, b), word k mod 4, key (low, high) of the seed; an entry is kept
when its word is at least the threshold. Words are held in int64, which never overflows here.
"""

from __future__ import annotations

from typing import Any

import torch

Array = Any

_M = 0xFFFFFFFF


def keep(threshold: int, seed: Any, batch: Any, heads: int, q: Array, k_len: Any) -> Array:
    """Boolean (B, Hq, Tq, Tk), True = kept. q: (B or 1, Tq) absolute positions."""
    if isinstance(seed, tuple) and torch.compiler.is_compiling():
        # Either word may be a symbol there, and inductor's C++ of the rounds over one is no C++.
        seed = torch.tensor(seed, dtype=torch.int64, device=q.device)
    low, high = words(seed)
    # One block more than k_len may need: whether there is a rest is then no question of its length.
    blocks = k_len // 4 + 1
    wide = {"dtype": torch.int64, "device": q.device}
    counter = (
        torch.arange(blocks, **wide),
        (q.to(torch.int64) & _M)[:, None, :, None],
        torch.arange(heads, **wide)[:, None, None],
        torch.arange(batch, **wide)[:, None, None, None],
    )
    shape = (batch, heads, q.shape[-1], blocks)
    x = philox([c.expand(shape) for c in counter], low, high)
    drawn = torch.stack(x, -1).reshape(batch, heads, q.shape[-1], blocks * 4)
    return drawn[..., :k_len] >= threshold


def keep_tile(
    threshold: int, words: tuple[int, int], b: Array, h: Array, q: Array, first: int, count: int
) -> Array:
    """The keep mask over keys [first, first + count) of a tile, its indices being 5-D.

    first is a multiple of 4, the keys that one counter draws.
    """
    wide = {"dtype": torch.int64, "device": q.device}
    blocks = torch.arange(first // 4, -(-(first + count) // 4), **wide)
    counter = [blocks, q.to(torch.int64) & _M, h.to(torch.int64), b.to(torch.int64)]
    shape = torch.broadcast_shapes(*[c.shape for c in counter])
    x = philox([c.expand(shape) for c in counter], *words)
    return torch.stack(x, -1).flatten(-2)[..., :count] >= threshold


def words(seed: Any) -> tuple[Array, Array]:
    """(low, high) 32-bit words of a seed."""
    if isinstance(seed, torch.Tensor) and seed.dim() == 0:
        seed = seed.to(torch.int64)
        return seed & _M, (seed >> 32) & _M
    if isinstance(seed, torch.Tensor):
        seed = seed.to(torch.int64)
    return seed[0], seed[1]


def philox(x: list[Array], low: Any, high: Any) -> list[Array]:
    """Ten rounds over four 32-bit words held in int64."""
    for i in range(10):
        if i:
            low = (low + 0x9E3779B9) & _M
            high = (high + 0xBB67AE85) & _M
        upper_a, lower_a = product(x[0], 0xD2511F53)
        upper_b, lower_b = product(x[2], 0xCD9E8D57)
        x = [upper_b ^ x[1] ^ low, lower_b, upper_a ^ x[3] ^ high, lower_a]
    return x


def product(x: Array, y: int) -> tuple[Array, Array]:
    """(high, low) words of x * y, for odd y, taken about the middle of x's range.

    x * y itself may overflow an int64, which is undefined in the C++ that torch.compile writes, and
    came out wrong there; this cannot. x is read only once, since inductor's work grows
    exponentially, over the rounds, with every further time.
    """
    t = (x - 2**31) * y + 2**31
    return (t >> 32) + (y >> 1), t & _M
