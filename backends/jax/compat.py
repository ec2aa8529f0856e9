"""jax.nn's `dot_product_attention`, its signature and conventions, computed by `attention`.

jax.nn's conventions, where they differ from ours, and how each is kept:

| jax.nn | here |
|---|---|
| (B, T, N, H), or (T, N, H) without a batch | `layout="BTHD"`, a batch of one |
| `mask` and `bias` are padded with leading axes, so rank 3 is (heads, q, k) | padded likewise |
| `is_causal` and `local_window_size` start at the first key | `query_offset="start"` |
| `local_window_size` counts neighbours, inclusive; an int is both sides | `from_jax_window` |
| lengths beyond the arrays hide nothing | clamped |
| a traced `scale` is legal | a score that multiplies |
| `bias` of any number type | cast to the type of the scores |
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_core import masks
from attn_core.api import attention
from attn_core.backends.jax import describe
from attn_core.backends.jax.arrays import is_wide, x64
from attn_core.compat.conventions import from_jax_window
from attn_core.language.values import Mask, Score, score
from attn_core.registry import UnsupportedError
from attn_core.spec import as_output


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any | None = None,
    mask: Any | None = None,
    *,
    scale: float | Any | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any | None = None,
    key_value_seq_lengths: Any | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, computed by `attn_core.attention`.

        query (B, T, N, H), key (B, S, K, H), value (B, S, K, Hv) -> (B, T, N, Hv); or without B
        out = softmax(scale * query keyᵀ + bias) value

    Args:
        query, key, value: arrays of one dtype; query head n reads key head n // (N / K).
        bias: added to the scores, broadcast to (B, N, T, S) by leading axes; receives its gradient.
        mask: boolean, True = attend, broadcast likewise.
        scale: a number or a scalar array, 1 / sqrt(H) when left out.
        is_causal: query i sees keys 0 .. i, also where T and S differ.
        query_seq_lengths, key_value_seq_lengths: integer arrays (B,).
        local_window_size: (left, right) neighbours besides the position itself; an int is both.
        implementation: None leaves the choice to `attn_core` (and to `attn_core.use(impl=...)`);
            "xla" takes `chunked`, XLA's own operations; "cudnn" cuDNN's kernel, on a GPU, or
            raises.
        return_residual: also return the log of the softmax's denominator, (B, T, N), in key's
            dtype and without a gradient, as jax.nn does.

    All masks apply together. A row that may see no key gives 0, and a residual of -inf, where
    jax.nn gives the mean of the values. float64 is computed in float64; jax.nn takes its softmax
    in float32.

    Raises:
        TypeError, ValueError: an argument is not of its form; nothing has been computed.
        UnsupportedError: `implementation="cudnn"`, and cuDNN's kernel cannot answer.

    Source: JAX's documentation of the function of that name.
    """
    query, key, value = [array(x) for x in (query, key, value)]
    kwargs: dict[str, Any] = {"layout": "BTHD", "impl": _impl(implementation, query)}
    with x64(any(is_wide(x) for x in (query, key, value))):
        q, k, v = [
            _rank4(name, x) for name, x in (("query", query), ("key", key), ("value", value))
        ]
        if bias is not None:
            kwargs["bias"] = as_bias(_rank4("bias", array(bias)), q.dtype)
        kwargs["mask"] = joined(
            None if mask is None else _rank4("mask", _boolean(array(mask))),
            masks.causal() if is_causal else None,
            None if local_window_size is None else from_jax_window(local_window_size),
        )
        if is_causal or local_window_size is not None:
            kwargs["query_offset"] = "start"
        if query_seq_lengths is not None:
            kwargs["q_lengths"] = _lengths("query_seq_lengths", query_seq_lengths, q)
        if key_value_seq_lengths is not None:
            kwargs["kv_lengths"] = _lengths("key_value_seq_lengths", key_value_seq_lengths, q)
        kwargs["scale"], kwargs["score"] = scaled(scale)
        output = as_output(attention(q, k, v, return_lse=return_residual, **kwargs))
        out = output.out.reshape(*query.shape[:-1], v.shape[-1])
        if not return_residual:
            return out
        residual = jnp.transpose(output.lse, (0, 2, 1)).astype(k.dtype)
        return out, jax.lax.stop_gradient(residual.reshape(query.shape[:-1]))


def array(x: Any) -> Any:
    """What JAX makes of an array-like: without x64 host float64 becomes float32."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def as_bias(bias: Any, dtype: Any) -> Any:
    """A bias of any number type, in a dtype that the scores hold."""
    if bias.dtype == jnp.bool_:
        raise TypeError("`bias` must be numbers, which are added. Got bool; that is `mask=`.")
    accumulation = jnp.promote_types(dtype, jnp.float32)
    narrow = jnp.issubdtype(bias.dtype, jnp.floating) and bias.dtype.itemsize <= 4
    return bias if narrow else bias.astype(accumulation)


def joined(*given: Any) -> Mask | None:
    """All that is given, Masks and boolean arrays, as one Mask."""
    parts = [x if isinstance(x, Mask) else masks.dense(x) for x in given if x is not None]
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part
    return whole


def scaled(scale: Any) -> tuple[Any, Score | None]:
    """`scale` and a score: a scale that is an array multiplies the scores, and can be learnt."""
    if not isinstance(scale, (jax.Array, np.ndarray)):
        return scale, None
    if scale.ndim:
        raise ValueError(f"`scale` must be a number or a scalar array. Got shape {scale.shape}.")
    factor = jnp.asarray(scale)
    return 1.0, score(lambda s, b, h, q, k: s * factor)


def _rank4(name: str, x: Any) -> Any:
    """Padded with leading axes of 1, as jax.nn does it."""
    if not 1 <= x.ndim <= 4:
        raise ValueError(f"`{name}` must have rank 4, or less without leading axes. Got {x.shape}.")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _boolean(mask: Any) -> Any:
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"`mask` must be boolean, True = attend. Got {mask.dtype.name}; an additive mask is "
            "`bias=`."
        )
    return mask


def _lengths(name: str, lengths: Any, q: Any) -> Any:
    lengths = array(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers. Got {lengths.dtype.name}.")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"`{name}` must have shape (B,) = {q.shape[:1]}. Got {lengths.shape}.")
    return lengths


def _impl(implementation: str | None, query: Any) -> str:
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f'`implementation` must be None, "xla" or "cudnn". Got {implementation!r}.'
        )
    if implementation == "cudnn" and describe(query).device != "gpu":
        raise UnsupportedError(
            '`implementation="cudnn"` needs arrays on a GPU. '
            f"Got arrays on {describe(query).device}: leave `implementation` out."
        )
    return _IMPLEMENTATIONS[implementation]


_IMPLEMENTATIONS = {None: "auto", "xla": "chunked", "cudnn": "native"}
