"""Weights of torch's `nn.MultiheadAttention`, and of layers and models of transformers.

torch.nn.Linear holds its matrix as (out, in), GPT-2's Conv1D as (in, out). Of transformers those
layers are known that are named below: their names alone do not say whether rotary pairs lie in
halves, or a norm adds 1 to its scale, so that a layer of another class is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.utils.parametrize import type_before_parametrizations

from attn_core import masks
from attn_core.backends.torch import to_numpy
from attn_core.compat.models import ConvertedModel, from_transformers
from attn_core.compat.weights import Converted, converted, refuse

Arrays = dict[str, "np.ndarray | None"]


def from_multihead_attention(module: Any, **changes: Any) -> Converted:
    """`torch.nn.MultiheadAttention` as (AttentionConfig, weights).

    Args:
        module: the layer, `batch_first` or not; ours is always (B, T, E).
        changes: fields of the config that the layer does not say itself, such as causal=True.

    Its masks go with the call: `attn_core.compat.from_torch_mha_mask`. The weights that it returns
    are the mean over heads, ours are each head's.

    Raises:
        TypeError: it is no such layer, or a subclass.
        ValueError: it adds a key (`add_bias_kv`, `add_zero_attn`), which no config says; or
            `changes` gainsay it.
    """
    # A parametrization (weight_norm, ..) makes a class of its own, of the same meaning.
    if type_before_parametrizations(module) is not torch.nn.MultiheadAttention:
        raise TypeError(
            "`module` must be a torch.nn.MultiheadAttention, and no subclass of it, which may "
            f"compute something else. Got {type(module).__name__}."
        )
    for option, got in (("add_bias_kv", module.bias_k), ("add_zero_attn", module.add_zero_attn)):
        if got is not None and got is not False:
            refuse("torch.nn.MultiheadAttention", option, True, "it adds a key, which ours cannot")
    width = module.embed_dim
    if module.in_proj_weight is not None:
        q, k, v = _array(module.in_proj_weight).reshape(3, width, width)
    else:
        held = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        q, k, v = [_array(x) for x in held]
    biases = [None] * 3
    if module.in_proj_bias is not None:
        biases = list(_array(module.in_proj_bias).reshape(3, width))
    arrays: Arrays = {
        "query.weight": q.T,
        "key.weight": k.T,
        "value.weight": v.T,
        "out.weight": _array(module.out_proj.weight).T,
        "query.bias": biases[0],
        "key.bias": biases[1],
        "value.bias": biases[2],
        "out.bias": _array(module.out_proj.bias),
    }
    fields = {
        "width": width,
        "heads": module.num_heads,
        "key_input": module.kdim if module.kdim != width else None,
        "value_input": module.vdim if module.vdim != module.kdim else None,
        "bias": module.in_proj_bias is not None,
        "out_bias": module.out_proj.bias is not None,
        "dropout": module.dropout,
    }
    return converted(fields, arrays, changes)


def from_attention(module: Any, **changes: Any) -> Converted:
    """An attention layer of transformers as (AttentionConfig, weights).

    Args:
        module: GPT2Attention, BertAttention (its dense layer after attention included, the norm
            and the sum after that not), LlamaAttention, MistralAttention, Qwen2Attention,
            Qwen3Attention or Gemma2Attention.
        changes: fields of the config that the layer does not say itself, such as impl="chunked".

    Scale, softcap, window, rotary base and dropout come along. Learned positions stand in the
    model, not in the layer. Masks of padding go with the call: `from_hf_mask`, or `kv_lengths`.

    Raises:
        TypeError: another layer, with those that are known.
        ValueError: rotary positions that are scaled (`rope_type`), which no config says; or
            `changes` gainsay the layer.
    """
    name = type(module).__name__
    if name not in _LAYERS or not type(module).__module__.startswith("transformers.models."):
        raise TypeError(
            f"`module` must be one of transformers' {', '.join(_LAYERS)}. "
            f"Got {type(module).__module__}.{name}."
        )
    fields, arrays = _LAYERS[name](module)
    return converted(fields, arrays, changes)


def from_model(model: Any, **changes: Any) -> ConvertedModel:
    """A model of transformers as (TransformerConfig, weights).

    Args:
        model: GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM or Gemma2ForCausalLM, which
            give logits; or BertModel, without its pooler (`add_pooling_layer=False`), which gives
            the last hidden state.
        changes: fields of the config that the model does not say itself, such as backend="jax".

    What it keeps and what it refuses: `attn_core.compat.from_transformers`, which reads the same
    from config.json and arrays, without torch.

    Raises:
        TypeError: another model, with those that are known.
        ValueError: as `from_transformers`.
    """
    name = type(model).__name__
    if name not in _MODELS or not type(model).__module__.startswith("transformers.models."):
        raise TypeError(
            f"`model` must be one of transformers' {', '.join(_MODELS)}. "
            f"Got {type(model).__module__}.{name}."
        )
    held = {name: to_numpy(x) for name, x in model.state_dict().items()}
    return from_transformers(model.config, held, **changes)


_MODELS = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "BertModel",
)


def _gpt2(module: Any) -> tuple[dict[str, Any], Arrays]:
    width = module.embed_dim
    if module.is_cross_attention:
        query, both = (_conv(x) for x in (module.q_attn, module.c_attn))
        parts = [query, *[(x, y) for x, y in zip(*_cut(both, 2), strict=True)]]
    else:
        parts = list(zip(*_cut(_conv(module.c_attn), 3), strict=True))
    out = _conv(module.c_proj)
    arrays: Arrays = {}
    for part, (weight, bias) in zip(("query", "key", "value", "out"), (*parts, out), strict=True):
        arrays[f"{part}.weight"], arrays[f"{part}.bias"] = weight, bias
    fields = {
        "width": width,
        "heads": module.num_heads,
        "scale": _scale(module.scaling, module.head_dim),
        "causal": module.is_causal,
        "dropout": module.attn_dropout.p,
    }
    return fields, arrays


def _bert(module: Any) -> tuple[dict[str, Any], Arrays]:
    inner = module.self
    arrays = _linears(
        {"query": inner.query, "key": inner.key, "value": inner.value, "out": module.output.dense}
    )
    fields = {
        "width": inner.query.in_features,
        "heads": inner.num_attention_heads,
        "head_width": inner.attention_head_size,
        "scale": _scale(inner.scaling, inner.attention_head_size),
        "causal": inner.is_causal,
        "dropout": inner.dropout.p,
    }
    return fields, arrays


def _llama(module: Any) -> tuple[dict[str, Any], Arrays]:
    config, head = module.config, module.head_dim
    parts = {"query": module.q_proj, "key": module.k_proj, "value": module.v_proj}
    arrays = _linears({**parts, "out": module.o_proj})
    rope = dict(config.rope_parameters)
    if rope.get("rope_type", "default") != "default":
        refuse(type(module).__name__, "rope_type", rope["rope_type"], "its angles are scaled")
    fields: dict[str, Any] = {
        "width": module.q_proj.in_features,
        "heads": module.q_proj.out_features // head,
        "kv_heads": module.k_proj.out_features // head,
        "head_width": head,
        "bias": module.q_proj.bias is not None,
        "out_bias": module.o_proj.bias is not None,
        "scale": _scale(module.scaling, head),
        "causal": module.is_causal,
        "positions": "rotary",
        "rotary_base": float(rope["rope_theta"]),
        "rotary_fraction": float(rope.get("partial_rotary_factor", 1.0)),
        "dropout": module.attention_dropout,
    }
    return fields, arrays


def _windowed(module: Any) -> tuple[dict[str, Any], Arrays]:
    """Llama's, with a window: of every layer (Mistral), or of this one (Qwen, Gemma 2)."""
    fields, arrays = _llama(module)
    width = getattr(module, "sliding_window", None)
    if not hasattr(module, "sliding_window"):
        width = getattr(module.config, "sliding_window", None)
    if width is not None:
        fields["window"] = width - 1  # the total width counts the position itself
    return fields, arrays


def _qwen3(module: Any) -> tuple[dict[str, Any], Arrays]:
    fields, arrays = _windowed(module)
    arrays["query_norm.scale"] = _array(module.q_norm.weight)
    arrays["key_norm.scale"] = _array(module.k_norm.weight)
    return {**fields, "qk_norm": "rms", "norm_epsilon": module.q_norm.variance_epsilon}, arrays


def _gemma2(module: Any) -> tuple[dict[str, Any], Arrays]:
    fields, arrays = _windowed(module)
    if not module.is_causal and "window" in fields:
        # To both sides, and then counting neighbours.
        width = fields.pop("window") + 1
        fields["mask"] = masks.window(left=width, right=width)
    return {**fields, "softcap": module.attn_logit_softcapping}, arrays


_LAYERS = {
    "GPT2Attention": _gpt2,
    "BertAttention": _bert,
    "LlamaAttention": _llama,
    "MistralAttention": _windowed,
    "Qwen2Attention": _windowed,
    "Qwen3Attention": _qwen3,
    "Gemma2Attention": _gemma2,
}


def _array(x: Any) -> Any:
    return None if x is None else to_numpy(x)


def _conv(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weight (in, out) and bias of a Conv1D."""
    return _array(layer.weight), _array(layer.bias)


def _cut(layer: tuple[np.ndarray, np.ndarray], parts: int) -> tuple[Any, Any]:
    """Weights and biases of projections that stand side by side."""
    weight, bias = layer
    return np.split(weight, parts, 1), np.split(bias, parts)


def _linears(layers: dict[str, Any]) -> Arrays:
    arrays: Arrays = {}
    for name, layer in layers.items():
        arrays[f"{name}.weight"], arrays[f"{name}.bias"] = (
            _array(layer.weight).T,
            _array(layer.bias),
        )
    return arrays


def _scale(scale: float, head: int) -> float | None:
    """None where it is the usual one."""
    return None if scale == head**-0.5 else float(scale)
