"""Keras' `ops.dot_product_attention`, its signature and conventions, computed by `attention`.

Keras' backends disagree with each other; this is one meaning on all of them, and where they agree
it is theirs:

| Keras | here |
|---|---|
| (B, T, N, H) | `layout="BTHD"` |
| query, key and value are cast to their common dtype, `bias` to the same | cast likewise |
| a mask of numbers is cast: what is not 0 attends (torch, JAX; TensorFlow raises) | cast |
| mask and bias are right-aligned, of any rank up to 4 | padded with leading axes |
| `is_causal` starts at the first key, whatever the lengths | `query_offset="start"` |
| torch refuses bias beside mask, TensorFlow and JAX take both | both apply |
| TensorFlow refuses a single key head for several query heads (`K == 1`) | grouped heads |
| `attn_logits_soft_cap` only on a TPU under JAX: cap * tanh(s / cap) | everywhere |
"""

from __future__ import annotations

from typing import Any

import keras

from attn_core import config, masks, registry, scores
from attn_core.api import attention
from attn_core.language.values import Mask, score


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any | None = None,
    mask: Any | None = None,
    scale: Any | None = None,
    is_causal: bool = False,
    flash_attention: bool | None = None,
    attn_logits_soft_cap: float | None = None,
) -> Any:
    """`keras.ops.dot_product_attention`, computed by `attn_core.attention`.

        query (B, T, N, H), key (B, S, K, H), value (B, S, K, Hv) -> (B, T, N, Hv)
        out = softmax(cap * tanh(scale * query keyᵀ / cap) + bias) value

    Args:
        query, key, value: tensors of Keras' backend, KerasTensors, or what Keras converts; cast to
            their common dtype. Query head n reads key head n // (N / K).
        bias: added to the scores, broadcast to (B, N, T, S); receives its gradient.
        mask: True = attend, broadcast likewise. Numbers are cast to boolean, as Keras does it: an
            additive mask belongs into `bias`.
        scale: a number or a scalar tensor; 1 / sqrt(H) when left out.
        is_causal: query i sees keys 0 .. i, also where T and S differ.
        flash_attention: None leaves the choice to `attn_core`; True asks for memory that is linear
            in the lengths (`native` or `chunked`), False for the plain formula (`reference`).
        attn_logits_soft_cap: c > 0; the scaled scores become c * tanh(s / c), before bias and mask.

    All masks apply together. A row that may see no key gives 0, where Keras gives the mean of the
    values under TensorFlow and JAX.

    Raises:
        TypeError, ValueError: an argument is not of its form; nothing has been computed.

    Source: Keras' documentation of the function of that name.
    """
    operation = DotProductAttention(is_causal, flash_attention, attn_logits_soft_cap)
    return operation(query, key, value, bias=bias, mask=mask, scale=scale)


@keras.saving.register_keras_serializable(package="attn_core")
class DotProductAttention(keras.Operation):
    """The same as an operation, so that KerasTensors become a graph that can be saved."""

    def __init__(
        self,
        is_causal: bool = False,
        flash_attention: bool | None = None,
        attn_logits_soft_cap: float | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if flash_attention not in (None, True, False):
            raise ValueError(f"`flash_attention` must be None or a bool. Got {flash_attention!r}.")
        self.is_causal = bool(is_causal)
        self.flash_attention = flash_attention
        self.attn_logits_soft_cap = attn_logits_soft_cap

    def get_config(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal,
            "flash_attention": self.flash_attention,
            "attn_logits_soft_cap": self.attn_logits_soft_cap,
            "name": self.name,
        }

    def call(
        self,
        query: Any,
        key: Any,
        value: Any,
        bias: Any | None = None,
        mask: Any | None = None,
        scale: Any | None = None,
    ) -> Any:
        convert = keras.ops.convert_to_tensor
        query, key, value = [convert(x) for x in (query, key, value)]
        dtypes = [keras.backend.standardize_dtype(x.dtype) for x in (query, key, value)]
        dtype = keras.backend.result_type(*dtypes)
        query, key, value = [keras.ops.cast(x, dtype) for x in (query, key, value)]
        kwargs: dict[str, Any] = {"layout": "BTHD", "impl": _impl(self.flash_attention)}
        if bias is not None:
            kwargs["bias"] = _rank4("bias", convert(bias, dtype=dtype))
        seen: Mask | None = None
        if mask is not None:
            seen = masks.dense(_rank4("mask", keras.ops.cast(convert(mask), "bool")))
        if self.is_causal:
            seen = masks.causal() if seen is None else seen & masks.causal()
            kwargs["query_offset"] = "start"
        factor = None
        if scale is not None and registry.owner(scale) is not None:
            factor = keras.ops.cast(convert(scale), "float64" if dtype == "float64" else "float32")
            if len(factor.shape):
                raise ValueError(
                    f"`scale` must be a number or a scalar tensor. Got shape {factor.shape}."
                )
            kwargs["score"] = score(lambda s, b, h, q, k: s * factor)
        kwargs["scale"] = scale if factor is None else 1.0
        if self.attn_logits_soft_cap is not None:
            cap = scores.softcap(self.attn_logits_soft_cap)
            kwargs["score"] = kwargs["score"].then(cap) if "score" in kwargs else cap
        # Under Keras' NumPy backend arrays are the host's, and the flag would choose where to go.
        with config.use(backend="numpy"):
            return attention(query, key, value, mask=seen, **kwargs)

    def compute_output_spec(
        self,
        query: Any,
        key: Any,
        value: Any,
        bias: Any | None = None,
        mask: Any | None = None,
        scale: Any | None = None,
    ) -> Any:
        dtype = keras.backend.result_type(query.dtype, key.dtype, value.dtype)
        return keras.KerasTensor((*query.shape[:-1], value.shape[-1]), dtype=dtype)


def _rank4(name: str, x: Any) -> Any:
    """Padded with leading axes of 1: right-aligned, as arrays broadcast."""
    rank = len(x.shape)
    if rank > 4:
        raise ValueError(f"`{name}` must have rank 4 or less. Got rank {rank}, {tuple(x.shape)}.")
    return x[(None,) * (4 - rank)] if rank < 4 else x


def _impl(flash_attention: bool | None) -> str:
    """None leaves the choice open; of what "auto" asks first, all is linear in memory."""
    if flash_attention is None:
        return "auto"
    if not flash_attention:
        return "reference"
    if config.get("impl") == "reference":
        raise ValueError(
            "`flash_attention` must not be True where the flag names impl='reference', which is "
            "the plain formula. Got True: leave it out, or the flag."
        )
    return "auto"
