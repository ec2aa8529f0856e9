"""The judge of layers: one attention layer as plain NumPy, sharing nothing with what it judges.

Everything comes in as plain numbers and arrays: a dictionary of sizes and words, weights by name,
and what may be seen as a Python rule of (b, h, q, k), read entry by entry. `dtype` is float64 for
the judge, and float32 for the textbook by whose error others are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

Array = Any


class Judged(NamedTuple):
    """out (B, Tq, out), weights (B, Hq, Tq, Tk), and the largest |logit| that was allowed."""

    out: Array
    weights: Array
    logit: float


def linear(w: dict[str, Array], name: str, x: Array) -> Array:
    y = x @ w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def heads(x: Array, count: int) -> Array:
    """(B, T, H D) -> (B, H, T, D)."""
    batch, rows, wide = x.shape
    return x.reshape(batch, rows, count, wide // count).transpose(0, 2, 1, 3)


def rms(x: Array, scale: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rotate(x: Array, positions: Array, base: float, fraction: float, pairs: str) -> Array:
    """Each pair of channels of (B, H, T, D) as a complex number, times exp(i angle)."""
    count = int(x.shape[-1] * fraction)
    out = x.copy()
    for j in range(count // 2):
        a, b = (j, j + count // 2) if pairs == "half" else (2 * j, 2 * j + 1)
        angle = positions[:, None, :].astype(np.float64) * base ** (-2 * j / count)
        cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., b] * cos + x[..., a] * sin
    return out


def slopes(count: int) -> list[float]:
    """ALiBi's, as its paper gives them."""
    power = 2 ** math.floor(math.log2(count))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return first + [2 ** (-4 * (2 * i + 1) / power) for i in range(count - power)]


def layer(
    options: dict[str, Any],
    weights: dict[str, Array],
    query: Array,
    key: Array | None = None,
    value: Array | None = None,
    *,
    sees: Callable[..., bool] = lambda b, h, q, k: True,
    bias: Array | None = None,
    score: Callable[..., Array] | None = None,
    kv_lengths: Any = None,
    q_lengths: Any = None,
    offset: Any = 0,
    positions: Array | None = None,
    keep: Array | None = None,
    dtype: Any = np.float64,
) -> Judged:
    """`options` are the fields of an AttentionConfig that are not left out.

    sees: what the config's and the call's masks allow, in absolute positions. score: (s, q, k) ->
    s, between ALiBi and softcap. keep: boolean (B, Hq, Tq, Tk), what dropout keeps.
    """
    given = options.get
    w = {name: np.asarray(x, dtype) for name, x in weights.items()}
    key = query if key is None else key
    value = key if value is None else value
    x_q, x_k, x_v = [np.asarray(x, dtype) for x in (query, key, value)]
    batch, rows, keys = x_q.shape[0], x_q.shape[1], x_k.shape[1]
    count, kv = options["heads"], given("kv_heads") or options["heads"]
    q, k = heads(linear(w, "query", x_q), count), heads(linear(w, "key", x_k), kv)
    v = heads(linear(w, "value", x_v), kv)
    if given("qk_norm"):
        q = rms(q, w["query_norm.scale"], given("norm_epsilon", 1e-6))
        k = rms(k, w["key_norm.scale"], given("norm_epsilon", 1e-6))
    at = np.broadcast_to(np.asarray(offset), (batch,))[:, None] + np.arange(rows)
    index = np.broadcast_to(np.arange(keys), (batch, keys))
    if given("positions") == "rotary":
        how = (given("rotary_base", 1e4), given("rotary_fraction", 1.0))
        how = (*how, given("rotary_pairs", "half"))
        told = None if positions is None else np.broadcast_to(positions, (batch, rows))
        q = rotate(q, at if told is None else told, *how)
        k = rotate(k, index if told is None else told, *how)
    group = count // kv
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if given("scale") is None else given("scale")
    s = (q @ k.swapaxes(-1, -2)) * dtype(scale)
    away = abs(at[:, None, :, None] - np.arange(keys))
    if given("positions") == "alibi":
        s = s - (np.array(slopes(count))[:, None, None] * away).astype(dtype)
    if score is not None:
        s = score(s, at[:, None, :, None], np.arange(keys)).astype(dtype)
    if given("softcap"):
        s = dtype(given("softcap")) * np.tanh(s / dtype(given("softcap")))
    if bias is not None:
        s = s + np.asarray(bias, dtype)
    allowed = np.zeros(s.shape, bool)
    kv_lengths = np.broadcast_to(keys if kv_lengths is None else kv_lengths, (batch,))
    q_lengths = np.broadcast_to(rows if q_lengths is None else q_lengths, (batch,))
    for b in range(batch):
        for h in range(count):
            for i in range(q_lengths[b]):
                for j in range(kv_lengths[b]):
                    place = int(at[b, i])
                    near = not given("causal") or j <= place
                    if given("window") is not None:
                        near = near and place - j <= given("window")
                    allowed[b, h, i, j] = near and sees(b, h, place, j)
    m = np.where(allowed, s, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    e = np.where(allowed, np.exp(np.where(allowed, s - np.where(np.isfinite(m), m, 0), 0)), 0)
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    shares = p if keep is None else np.where(keep, p / dtype(1 - given("dropout")), 0)
    out = (shares.astype(dtype) @ v).transpose(0, 2, 1, 3).reshape(batch, rows, -1)
    if given("gate"):
        out = out / (1 + np.exp(-linear(w, "gate", x_q)))
    logit = float(abs(s[allowed]).max(initial=0.0))
    return Judged(linear(w, "out", out).astype(dtype), p.astype(dtype), logit)


def philox(counter: list[int], low: int, high: int) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011), one counter, in Python's integers."""
    x, mask = list(counter), 2**32 - 1
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32) ^ x[1] ^ low, b & mask, (a >> 32) ^ x[3] ^ high, a & mask]
        low, high = (low + 0x9E3779B9) & mask, (high + 0xBB67AE85) & mask
    return x


def kept(rate: float, seed: int, site: int, batch: int, count: int, at: Array, keys: int) -> Array:
    """What dropout keeps, (B, heads, rows, keys), rows standing at `at` (B, rows)."""
    places = tuple(map(tuple, np.asarray(at).tolist()))
    return _kept(rate, seed, site, batch, count, places, keys)


@lru_cache(maxsize=256)
def _kept(
    rate: float, seed: int, site: int, batch: int, count: int, at: tuple[Any, ...], keys: int
) -> Array:
    least = min(round(rate * 2**32), 2**32 - 1)
    found = np.zeros((batch, count, len(at[0]), keys), bool)
    for b, h, i, k in np.ndindex(found.shape):
        low, high = seed % 2**32, seed // 2**32 % 2**32 * 0x6A09E667 + site
        words = philox([k // 4, at[b][i] % 2**32, h, b], low, high % 2**32)
        found[b, h, i, k] = words[k % 4] >= least
    return found
