"""Weights of Flax' multi-head attention, of linen and of nnx."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_core.backends.jax import to_numpy
from attn_core.backends.jax.compat_flax import dot_product_attention
from attn_core.compat.weights import Converted, converted, flat, output, projection, refuse


def from_linen_attention(module: Any, params: Any, **changes: Any) -> Converted:
    """`flax.linen.MultiHeadDotProductAttention` and its params as (AttentionConfig, weights).

    Args:
        module: the layer, for what is not in its params: dropout, and what is refused.
        params: variables["params"] of the layer, or variables themselves.
        changes: fields of the config that the layer does not say itself, such as causal=True.

    Its dropout is one mask for all of batch and heads by default; ours is each element's own.

    Raises:
        TypeError, ValueError: it is no such layer, or a subclass; params are not those of it;
            `normalize_qk`, whose norm subtracts the mean, which ours does not; einsums of the
            caller's, or an `attention_fn` that is neither Flax' own nor `attn_core.compat.flax`'s;
            or `changes` gainsay the layer.
    """
    import flax.linen

    stock = (
        flax.linen.MultiHeadDotProductAttention,
        flax.linen.MultiHeadAttention,
        flax.linen.SelfAttention,
    )
    if type(module) not in stock:
        raise TypeError(
            "`module` must be a flax.linen.MultiHeadDotProductAttention, and no subclass of it, "
            f"which may compute something else. Got {type(module).__name__}."
        )
    for option in ("qkv_dot_general", "out_dot_general", "qk_attn_weights_einsum_cls"):
        if getattr(module, option) is not None:
            refuse("flax.linen's layer", option, True, "ours multiplies by its own kernels")
    params = params.get("params", params)
    for part in ("query", "key", "value", "out"):
        if part not in params:
            raise ValueError(
                f"`params` must hold {part!r}, as the layer's variables['params'] do. "
                f"Got {', '.join(sorted(params))}."
            )
    held = {part: (params[part]["kernel"], params[part].get("bias")) for part in _PARTS}
    its = flax.linen.dot_product_attention
    return _converted("flax.linen's layer", module, its, held, changes)


def from_nnx_attention(module: Any, **changes: Any) -> Converted:
    """`flax.nnx.MultiHeadAttention` as (AttentionConfig, weights).

    Args:
        module: the layer.
        changes: fields of the config that the layer does not say itself, such as causal=True.

    Raises:
        TypeError, ValueError: as `from_linen_attention`.
    """
    from flax import nnx

    if type(module) is not nnx.MultiHeadAttention:
        raise TypeError(
            "`module` must be a flax.nnx.MultiHeadAttention, and no subclass of it, which may "
            f"compute something else. Got {type(module).__name__}."
        )
    held = {}
    for part in _PARTS:
        layer = getattr(module, part)
        held[part] = (layer.kernel[...], None if layer.bias is None else layer.bias[...])
    return _converted("flax.nnx' layer", module, nnx.dot_product_attention, held, changes)


_PARTS = ("query", "key", "value", "out")


def _converted(source: str, module: Any, its: Any, held: dict[str, Any], changes: Any) -> Converted:
    if module.attention_fn not in (its, dot_product_attention):
        name = getattr(module.attention_fn, "__name__", type(module.attention_fn).__name__)
        refuse(source, "attention_fn", name, "what it computes no config says")
    if module.normalize_qk:
        refuse(source, "normalize_qk", True, "its norm subtracts the mean, ours does not")
    arrays: dict[str, np.ndarray | None] = {}
    for part, (kernel, bias) in held.items():
        shaped = output if part == "out" else projection
        arrays[f"{part}.weight"] = shaped(to_numpy(kernel))
        arrays[f"{part}.bias"] = None if bias is None else flat(to_numpy(bias))
    width, heads, head = held["query"][0].shape
    key_input, kv_heads, _ = held["key"][0].shape
    value_input = held["value"][0].shape[0]
    out = held["out"][0].shape[-1]
    fields = {
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads if kv_heads != heads else None,
        "head_width": head,
        "key_input": key_input if key_input != width else None,
        "value_input": value_input if value_input != key_input else None,
        "out_width": out if out != width else None,
        "bias": arrays["query.bias"] is not None,
        "out_bias": arrays["out.bias"] is not None,
        "dropout": module.dropout_rate,
    }
    return converted(fields, arrays, changes)
