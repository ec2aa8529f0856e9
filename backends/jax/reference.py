"""The formula in JAX's own operations; O(Tq * Tk) memory, every option, every transform.

Selection comes before every product: what may not be seen is replaced by zero before it is
multiplied, so that no 0 * NaN arises forward or backward, and every result is selected once more
where a cotangent could carry poison in. The running maximum is held constant under
differentiation, which leaves first and higher derivatives exact, since the result does not depend
on it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn_core.backends.jax.arrays import DTYPES, Reading
from attn_core.backends.jax.philox import keep
from attn_core.language.values import drop_threshold
from attn_core.spec import FAR, AttentionOutput, Operands, Problem

Array = Any


def attend(p: Problem, x: Operands) -> AttentionOutput:
    dtype = DTYPES[p.accumulation]
    q, k, v = [_heads_first(a, p).astype(dtype) for a in (x.query, x.key, x.value)]
    full = (q.shape[0], p.heads, q.shape[2], k.shape[2])
    index = indices(p, x, *full)
    allowed = jnp.broadcast_to(structure(p, x, index), full)
    bias = None if x.bias is None else x.bias.astype(dtype)
    if bias is not None:
        allowed = allowed & (bias != -jnp.inf)
    if p.score is not None:
        # A score may hide keys too, by -inf, whatever the bias is there; what it hides must not be
        # multiplied either.
        allowed = allowed & (_logits(p, x, q, k, None, index, allowed) != -jnp.inf)
    logits = _logits(p, x, q, k, bias, index, allowed)
    allowed = allowed & (logits != -jnp.inf)
    rows, seen = allowed.any(-1), _seen(p, allowed)

    hidden = jnp.where(allowed, logits, -jnp.inf)
    m = _maximum(jax.lax.stop_gradient(hidden))
    sinks = None
    if x.sinks is not None:
        sinks = jnp.broadcast_to(x.sinks.astype(dtype)[:, None], full[:3])
        if x.q_lengths is not None:
            sinks = jnp.where(_valid(p, x, index), sinks, -jnp.inf)
        m = jnp.maximum(m, jax.lax.stop_gradient(sinks))
    m = jnp.where(m == -jnp.inf, 0.0, m)
    e = jnp.where(allowed, jnp.exp(hidden - m[..., None]), 0.0)
    total = e.sum(-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - m)
    summed = total != 0
    total = jnp.where(summed, total, 1.0)
    weights = jnp.where(allowed, e / total[..., None], 0.0)
    lse = jnp.where(summed, m + jnp.log(total), -jnp.inf)
    shares = weights
    if p.rate:
        threshold = drop_threshold(p.rate)
        kept = keep(threshold, x.seed, full[0], p.heads, index["q"][:, 0, :, 0], full[3])
        shares = jnp.where(kept, weights * (1 / (1 - p.rate)), 0.0)
    out = _select(_product(p, shares, _select(v, seen)), rows).astype(x.query.dtype)
    return AttentionOutput(
        _heads_first(out, p),
        lse if p.return_lse else None,
        weights.astype(x.query.dtype) if p.return_weights else None,
    )


def indices(p: Problem, x: Operands, batch: Any, heads: int, q_len: Any, k_len: Any) -> Any:
    """b, h, q, k and row as int32 arrays that broadcast to (B, Hq, Tq, Tk)."""
    row = jnp.arange(q_len, dtype=jnp.int32)[None, None, :, None]
    return {
        "b": jnp.arange(batch, dtype=jnp.int32)[:, None, None, None],
        "h": jnp.arange(heads, dtype=jnp.int32)[None, :, None, None],
        "q": row + offset(p, x, q_len, k_len),
        "k": jnp.arange(k_len, dtype=jnp.int32)[None, None, None, :],
        "row": row,
    }


def offset(p: Problem, x: Operands, q_len: Any, k_len: Any) -> Array:
    """query_offset as int32, (B or 1, 1, 1, 1)."""
    if p.offset == "zero":
        return jnp.zeros((1, 1, 1, 1), jnp.int32)
    if p.offset == "given":
        return within(x.query_offset, -FAR, FAR).reshape(-1, 1, 1, 1)
    keys = k_len if x.kv_lengths is None else lengths(x.kv_lengths, k_len)
    rows = q_len if x.q_lengths is None else lengths(x.q_lengths, q_len)
    if x.kv_lengths is None and x.q_lengths is None:
        return jnp.full((1, 1, 1, 1), keys - rows, jnp.int32)
    return (keys - rows).reshape(-1, 1, 1, 1)


def lengths(given: Array, most: Any) -> Array:
    """Lengths clamped to [0, most]: traced values cannot raise."""
    return within(given, 0, most)


def within(x: Array, low: Any, high: Any) -> Array:
    """Integers of any width held within the bounds, which must hold for their dtype too."""
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.int32)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return jnp.minimum(x, high).astype(jnp.int32)
    return jnp.clip(x, low, high).astype(jnp.int32)


def structure(p: Problem, x: Operands, index: dict[str, Array]) -> Array:
    """Mask and lengths, before bias and score have a say; broadcasts to (B, Hq, Tq, Tk)."""
    allowed = jnp.ones((1, 1, 1, 1), bool)
    if p.mask is not None:
        allowed = allowed & Reading(p.accumulation, x.mask).read(p.mask, index, x.mask)[0]
    if x.kv_lengths is not None:
        keys = lengths(x.kv_lengths, index["k"].shape[-1])
        allowed = allowed & (index["k"] < keys.reshape(-1, 1, 1, 1))
    if x.q_lengths is not None:
        allowed = allowed & _valid(p, x, index)[..., None]
    return allowed


def _valid(p: Problem, x: Operands, index: dict[str, Array]) -> Array:
    """(B or 1, 1, Tq): the row is no padding."""
    rows = lengths(x.q_lengths, index["row"].shape[2])
    return index["row"][..., 0] < rows.reshape(-1, 1, 1)


def _logits(
    p: Problem, x: Operands, q: Array, k: Array, bias: Array | None, index: Any, allowed: Array
) -> Array:
    """The scaled product with score and bias, from selected operands."""
    q, k = _select(q, allowed.any(-1)), _select(k, _seen(p, allowed))
    z = p.scale * _product(p, q, k.swapaxes(-1, -2))
    if p.score is not None:
        s = jnp.where(allowed, z, 0.0)
        reading = Reading(p.accumulation, x.score, allowed)
        z = reading.read(p.score, {**index, "s": s}, x.score)[0]
        z = jnp.broadcast_to(z, allowed.shape)
    if bias is not None:
        z = z + jnp.where(allowed, bias, 0.0)
    return z


def _maximum(hidden: Array) -> Array:
    return hidden.max(-1, initial=-jnp.inf)


def _heads_first(x: Array, p: Problem) -> Array:
    """(B, H, T, D) from the layout, or back: the exchange is its own inverse."""
    return x if p.layout == "BHTD" else x.swapaxes(1, 2)


def _seen(p: Problem, allowed: Array) -> Array:
    """(B, Hk, Tk): some query of the group may see the key."""
    batch, _, rows, keys = allowed.shape
    return allowed.reshape(batch, p.kv_heads, p.group * rows, keys).any(2)


def _select(x: Array, rows: Array) -> Array:
    return jnp.where(rows[..., None], x, 0.0)


def _product(p: Problem, a: Array, b: Array) -> Array:
    """(B, Hq, T, X) @ (B, Hk, X, Y), the heads of a group as one tall matrix."""
    batch, _, rows, inner = a.shape
    folded = a.reshape(batch, p.kv_heads, p.group * rows, inner)
    # HIGHEST is float32 as float32 on every device; DEFAULT allows TF32 and bfloat16 passes.
    precision = jax.lax.Precision.DEFAULT if p.precision == "fast" else jax.lax.Precision.HIGHEST
    product = jnp.matmul(folded, b, precision=precision)
    return product.reshape(batch, p.heads, rows, b.shape[-1])
