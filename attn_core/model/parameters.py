"""The plan: every parameter's name, shape and kind. The naming scheme of weights files, version 1.

A matrix is (in, out): y = x @ matrix. Where heads lie along an axis they are its slowest part, so
head h of width D has the channels h * D to (h + 1) * D - 1. Names are words between dots; blocks
are numbered from 0.

    of an attention layer, for E, Hq, Hk, D, Dv and widths of the sources Ek, Ev
    query.weight (E, Hq D)    query.bias (Hq D)        key.weight (Ek, Hk D)    key.bias
    value.weight (Ev, Hk Dv)  value.bias (Hk Dv)       out.weight (Hq Dv, out)  out.bias (out)
    query_norm.scale (D)      key_norm.scale (D)       gate.weight (E, Hq Dv)   gate.bias

    of a model, under `encoder.` and `decoder.`
    embedding.weight (tokens, width), or input.weight (inputs, width) and input.bias
    types.weight (token_types, width)         positions.weight (max_length, width)
    embedding_norm.scale, .bias
    3.attention.query.weight ..  3.attention_norm.scale, .bias      3.cross. ..  3.cross_norm. ..
    3.feed.input.weight (width, hidden) ..  3.feed.gate. ..  3.feed.output. ..  3.feed_norm. ..
    3.attention_out_norm. ..  3.cross_out_norm. ..  3.feed_out_norm. ..
    norm.scale, norm.bias
    and at the top head.weight (width, vocabulary or classes), head.bias

    of additive attention: query.weight (E, A), key.weight (Ek, A), bias (A), score (A)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from attn_core.model.additive import AdditiveConfig
from attn_core.model.config import AttentionConfig
from attn_core.model.transformer import TransformerConfig

VERSION = "attn-core/1"


class Parameter(NamedTuple):
    """One array of the plan.

    Attributes:
        shape: as stored.
        kind: "matrix" (in, out), "bias", "scale" (of a norm), "table" (a row for each token or
            position) or "vector" (multiplied with, like a matrix of one column).
    """

    shape: tuple[int, ...]
    kind: str


Plan = dict[str, Parameter]


def parameters(config: Any) -> Plan:
    """Name -> Parameter, in the order in which a call meets them."""
    if isinstance(config, TransformerConfig):
        return _transformer(config)
    if isinstance(config, AttentionConfig):
        return _attention(config)
    if isinstance(config, AdditiveConfig):
        return _additive(config)
    raise TypeError(
        "`config` must be an AttentionConfig, an AdditiveConfig or a TransformerConfig. "
        f"Got {type(config).__name__}."
    )


def _additive(config: AdditiveConfig) -> Plan:
    s = config.sizes
    return {
        "query.weight": Parameter((s.query_input, s.width), "matrix"),
        "key.weight": Parameter((s.key_input, s.width), "matrix"),
        "bias": Parameter((s.width,), "bias"),
        "score": Parameter((s.width,), "vector"),
    }


def _attention(config: AttentionConfig) -> Plan:
    s = config.sizes
    plan = {
        **_linear("query", s.width, s.heads * s.head, config.bias),
        **_linear("key", s.key_input, s.kv_heads * s.head, config.bias),
        **_linear("value", s.value_input, s.kv_heads * s.value, config.bias),
    }
    if config.qk_norm:
        plan["query_norm.scale"] = Parameter((s.head,), "scale")
        plan["key_norm.scale"] = Parameter((s.head,), "scale")
    if config.gate:
        plan |= _linear("gate", s.width, s.heads * s.value, config.bias)
    return plan | _linear("out", s.heads * s.value, s.out, config.out_bias)


def _transformer(config: TransformerConfig) -> Plan:
    plan: Plan = {}
    for stack in config.stacks:
        for name, parameter in _stack(config, stack).items():
            plan[f"{stack}.{name}"] = parameter
    predicted = config.classes if config.kind == "encoder" else config.vocabulary
    if predicted is not None and not config.tie_embeddings:
        plan |= _linear("head", config.width, predicted, config.bias)
    return plan


def _stack(config: TransformerConfig, stack: str) -> Plan:
    tokens = config.tokens(stack)
    if tokens is None:
        plan = _linear("input", config.inputs or 0, config.width, config.bias)
    else:
        plan = {"embedding.weight": Parameter((tokens, config.width), "table")}
    if config.token_types is not None:
        plan["types.weight"] = Parameter((config.token_types, config.width), "table")
    if config.positions == "learned":
        plan["positions.weight"] = Parameter((config.max_length or 0, config.width), "table")
    if config.norm_embedding:
        plan |= _norm("embedding_norm", config)
    for i in range(config.blocks(stack)):
        for name, parameter in _block(config, stack).items():
            plan[f"{i}.{name}"] = parameter
    return plan | (_norm("norm", config) if config.ends_in_norm else {})


def _block(config: TransformerConfig, stack: str) -> Plan:
    plan: Plan = {}
    for name, cross in (("attention", False), ("cross", True)):
        if not cross or config.crosses(stack):
            inner = _attention(config.attention(stack, cross))
            plan |= {f"{name}.{key}": parameter for key, parameter in inner.items()}
            plan |= _norms(name, config)
    plan |= _linear("feed.input", config.width, config.hidden_width, config.bias)
    if config.gated_hidden:
        plan |= _linear("feed.gate", config.width, config.hidden_width, config.bias)
    plan |= _linear("feed.output", config.hidden_width, config.width, config.bias)
    return plan | _norms("feed", config)


def _norms(sublayer: str, config: TransformerConfig) -> Plan:
    after = _norm(f"{sublayer}_out_norm", config) if config.norm_out else {}
    return _norm(f"{sublayer}_norm", config) | after


def _linear(name: str, inner: int, outer: int, bias: bool) -> Plan:
    plan = {f"{name}.weight": Parameter((inner, outer), "matrix")}
    if bias:
        plan[f"{name}.bias"] = Parameter((outer,), "bias")
    return plan


def _norm(name: str, config: TransformerConfig) -> Plan:
    plan = {f"{name}.scale": Parameter((config.width,), "scale")}
    if config.norm == "layer" and config.bias:
        plan[f"{name}.bias"] = Parameter((config.width,), "bias")
    return plan
