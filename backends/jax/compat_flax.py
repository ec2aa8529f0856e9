"""Flax' `dot_product_attention`, for `attention_fn=` of linen's and nnx' multi-head attention.

    flax.linen.MultiHeadDotProductAttention(..., attention_fn=dot_product_attention)
    flax.nnx.MultiHeadAttention(..., attention_fn=dot_product_attention)

Flax' conventions, where they differ from ours, and how each is kept:

| Flax | here |
|---|---|
| (batch..., T, heads, width), any number of batch dimensions, none too | folded; `layout="BTHD"` |
| query, key, value are promoted to one dtype, or cast to `dtype` | by Flax' own function |
| the scale is fixed, 1 / sqrt(width) | the default |
| a mask of numbers: what is not 0 attends | cast |
| `is_causal` (nnx) starts at the first key | `query_offset="start"` |
| `broadcast_dropout`: one dropout mask for all of batch and heads | a vmap, in which b = h = 0 |
| `dropout_rng` is a key | a seed is drawn from it |
| `module` sows the weights | `return_weights`, sown in Flax' place |
| `precision` None, or one of jax.lax.Precision | at least as exact |
| `einsum_dot_general` and the two einsums | refused: nothing here multiplies by them |
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx

from attn_core import masks
from attn_core.api import attention
from attn_core.backends.jax.arrays import is_wide, x64
from attn_core.backends.jax.compat import array, as_bias, joined
from attn_core.language.values import Dropout
from attn_core.registry import UnsupportedError
from attn_core.spec import as_output


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any | None = None,
    mask: Any | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any | None = None,
    precision: Any | None = None,
    module: Any | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any | None = None,
    qk_attn_weights_einsum: Any | None = None,
    attn_weights_value_einsum: Any | None = None,
    promote_dtype: Any | None = None,
    is_causal: bool = False,
) -> Any:
    """Flax' `dot_product_attention`, of linen and of nnx, computed by `attn_core.attention`.

        query (..., T, N, H), key (..., S, K, H), value (..., S, K, Hv) -> (..., T, N, Hv)
        out = dropout(softmax(query keyᵀ / sqrt(H) + bias)) value

    Args:
        query, key, value: arrays, promoted to one dtype; query head n reads key head n // (N / K).
        bias: added to the scores, broadcast to (..., N, T, S); receives its gradient.
        mask: True = attend, broadcast likewise; numbers are compared with 0.
        broadcast_dropout: the same dropout mask for all of batch and heads.
        dropout_rng: a key of JAX, from which the seed is drawn. The mask is that of
            `attn_core.Dropout`, not Flax'.
        dropout_rate, deterministic: dropout is applied where the rate is above 0 and
            `deterministic` is false, as in Flax.
        dtype: to which query, key and value are cast; None promotes them.
        precision: None, a jax.lax.Precision or its name. "highest" asks for float32 products, or
            is refused; with every other they are at least as exact as asked.
        module: a linen or nnx module in which the weights are sown, before dropout.
        force_fp32_for_softmax: softmax is always in float32, or float64.
        einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: None, or refused.
        promote_dtype: nnx' function that promotes, `(arrays, dtype=...) -> arrays`.
        is_causal: query i sees keys 0 .. i, also where T and S differ.

    A row that may see no key gives 0, where Flax gives the mean of the values.

    Raises:
        TypeError, ValueError: an argument is not of its form; nothing has been computed.
        UnsupportedError: an einsum of the caller's, or a precision that is not JAX' Precision.

    Source: Flax' documentation of the functions of that name.
    """
    for name, given in (
        ("einsum_dot_general", einsum_dot_general),
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        if given is not None:
            raise UnsupportedError(
                f"`{name}` must be None: attn_core multiplies by its own kernels. Got {given!r}; "
                "use Flax' own attention_fn for quantised products."
            )
    arrays = tuple(array(x) for x in (query, key, value))
    if promote_dtype is None:
        query, key, value = flax.linen.dtypes.promote_dtype(*arrays, dtype=dtype)
    else:
        query, key, value = promote_dtype(arrays, dtype=dtype)
    with x64(any(is_wide(x) for x in (query, key, value))):
        return _attend(
            (query, key, value),
            None if bias is None else as_bias(array(bias), query.dtype),
            None if mask is None else array(mask).astype(jnp.bool_),
            _dropout(dropout_rate, dropout_rng, deterministic),
            bool(broadcast_dropout),
            bool(is_causal),
            module,
            _precision(precision),
        )


def _attend(
    arrays: tuple[Any, Any, Any],
    bias: Any,
    mask: Any,
    dropout: Dropout | None,
    shared: bool,
    is_causal: bool,
    module: Any,
    precision: str | None,
) -> Any:
    lead = _lead(arrays)
    batch = math.prod(lead)
    q, k, v = [x.reshape(batch, *x.shape[-3:]) for x in arrays]
    full = (*lead, q.shape[2], q.shape[1], k.shape[1])
    bias, mask = _folded("bias", bias, full), _folded("mask", mask, full)
    kwargs: dict[str, Any] = {"precision": precision, "return_weights": module is not None}
    if is_causal:
        kwargs["query_offset"] = "start"

    def call(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
        seen = joined(mask, masks.causal() if is_causal else None)
        return as_output(
            attention(q, k, v, layout="BTHD", mask=seen, bias=bias, dropout=dropout, **kwargs)
        )

    output = (_shared if dropout is not None and shared else _straight)(call, q, k, v, bias, mask)
    if module is not None:
        _sow(module, output.weights.reshape(*full))
    return output.out.reshape(*lead, *output.out.shape[1:])


def _straight(call: Any, *arrays: Any) -> Any:
    return call(*arrays)


def _shared(call: Any, q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
    """Each head of each batch as a problem of its own, in which b = h = 0: one dropout mask."""
    batch, rows, heads, _ = q.shape
    group = heads // k.shape[2]
    k, v = [jnp.repeat(x, group, 2) for x in (k, v)]

    def spread(x: Any) -> Any:
        return None if x is None else jnp.broadcast_to(x, (batch, heads, *x.shape[2:]))

    def one(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
        return call(
            *[x[None, :, None] for x in (q, k, v)],
            *[None if x is None else x[None, None] for x in (bias, mask)],
        )

    given = (q, k, v, spread(bias), spread(mask))
    inner = jax.vmap(one, in_axes=(1, 1, 1, *[None if x is None else 0 for x in given[3:]]))
    axes = tuple([None if x is None else 0 for x in given])
    output = jax.vmap(inner, in_axes=axes)(*given)
    out = jnp.moveaxis(output.out[:, :, 0, :, 0], 1, 2)
    weights = None if output.weights is None else output.weights[:, :, 0, 0]
    return output._replace(out=out.reshape(batch, rows, heads, v.shape[-1]), weights=weights)


def _lead(arrays: tuple[Any, Any, Any]) -> tuple[int, ...]:
    """The batch dimensions, which must be the same of all three."""
    query = arrays[0]
    for name, x in zip(("query", "key", "value"), arrays, strict=True):
        if x.ndim < 3:
            raise ValueError(f"`{name}` must have rank 3 or more, (..., T, N, H). Got {x.shape}.")
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"`{name}` must have the batch dimensions of query, {query.shape[:-3]}. "
                f"Got {x.shape[:-3]}."
            )
    return tuple(query.shape[:-3])


def _folded(name: str, x: Any, full: tuple[int, ...]) -> Any:
    """Broadcast to (..., N, T, S), with the batch dimensions folded into one; 1 where all are."""
    if x is None:
        return None
    if x.ndim > len(full) or any(
        size not in (1, whole) for size, whole in zip(x.shape[::-1], full[::-1], strict=False)
    ):
        raise ValueError(f"`{name}` must broadcast to (..., N, T, S) = {full}. Got {x.shape}.")
    x = x.reshape((1,) * (max(len(full), 3) - x.ndim) + x.shape)
    if any(size != 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*full[:-3], *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _dropout(rate: float, key: Any, deterministic: bool) -> Dropout | None:
    if deterministic or rate == 0.0:
        return None
    if key is None:
        raise ValueError(
            "`dropout_rng` must be given where `dropout_rate` is above 0 and `deterministic` is "
            "false. Got None."
        )
    words = jax.random.bits(key, (2,), jnp.uint32)
    return Dropout(rate, words)


def _precision(precision: Any) -> str | None:
    """Ours is the strictest that can be had; only "highest" is a promise that may be refused."""
    if precision is None:
        return None
    pair = precision if isinstance(precision, (tuple, list)) else (precision, precision)
    try:
        levels = [jax.lax.Precision(x) for x in pair]
    except (ValueError, TypeError):
        raise UnsupportedError(
            f"`precision` must be None, a jax.lax.Precision or its name. Got {precision!r}."
        ) from None
    return "highest" if jax.lax.Precision.HIGHEST in levels else None


def _sow(module: Any, weights: Any) -> None:
    """Where Flax' own function puts them."""
    if isinstance(module, nnx.Module):
        module.sow(nnx.Intermediate, "attention_weights", weights)
    else:
        module.sow("intermediates", "attention_weights", weights)
