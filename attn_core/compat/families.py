"""The families of transformers in our words: a TransformerConfig, and whose array is whose.

GPT-2     norms before, learned positions, gelu_tanh, tied head; q, k, v side by side (in, out)
Llama     rms, rotary halves, silu gated, grouped heads, no biases; Mistral: and a window
Gemma 2   Llama's, with norms on both sides of a sublayer, scales that are stored less 1, capped
          scores and logits, a scale of its own, a window in every other block
BERT      an encoder: norms after, learned positions, types of tokens, a norm on their sum
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attn_core.compat.original import Original


def _gpt2(o: Original) -> dict[str, Any]:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        o.must(name, o.need(name), False, "no field says it")
    dropout, first = o.need("resid_pdrop"), o.need("embd_pdrop")
    if not o.quiet:
        o.must("embd_pdrop", first, dropout, "both are `dropout` here, which may be given by name")
    width, tied = o.need("n_embd"), o.need("tie_word_embeddings")
    o.copy("wte.weight", "decoder.embedding.weight")
    o.copy("wpe.weight", "decoder.positions.weight")
    for n in range(o.need("n_layer")):
        theirs, ours = f"h.{n}", f"decoder.{n}"
        parts = [f"{ours}.attention.{part}" for part in ("query", "key", "value")]
        o.norm(f"{theirs}.ln_1", f"{ours}.attention_norm", bias=True)
        o.conv(f"{theirs}.attn.c_attn", *parts)
        o.conv(f"{theirs}.attn.c_proj", f"{ours}.attention.out")
        o.norm(f"{theirs}.ln_2", f"{ours}.feed_norm", bias=True)
        o.conv(f"{theirs}.mlp.c_fc", f"{ours}.feed.input")
        o.conv(f"{theirs}.mlp.c_proj", f"{ours}.feed.output")
    o.norm("ln_f", "decoder.norm", bias=True)
    o.head("wte.weight", tied)
    return {
        "kind": "decoder",
        "width": width,
        "depth": o.need("n_layer"),
        "heads": o.need("n_head"),
        "vocabulary": o.need("vocab_size"),
        "hidden": o.get("n_inner") or 4 * width,
        "activation": o.activation("activation_function"),
        "norm_epsilon": o.need("layer_norm_epsilon"),
        "positions": "learned",
        "max_length": o.need("n_positions"),
        "scale_embedding": False,
        "tie_embeddings": tied,
        "scale": None if o.need("scale_attn_weights") else 1.0,
        "dropout": dropout,
        "attention_dropout": o.need("attn_pdrop"),
    }


def _llama(o: Original) -> dict[str, Any]:
    fields = _rotary_decoder(o, less=0)
    _gated_blocks(o, {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_norm"})
    o.head("embed_tokens.weight", fields["tie_embeddings"])
    return {**fields, "scale_embedding": False}


def _mistral(o: Original) -> dict[str, Any]:
    o.must("layer_types", o.get("layer_types"), None, "the window is that of every block")
    return {**_llama(o), **_window(o, o.get("sliding_window"))}


def _gemma2(o: Original) -> dict[str, Any]:
    both = bool(o.get("use_bidirectional_attention"))
    o.must("use_bidirectional_attention", both, False, "a decoder here is causal")
    fields = _rotary_decoder(o, less=1, activation="hidden_activation")
    _gated_blocks(
        o,
        {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "feed_norm",
            "post_feedforward_layernorm": "feed_out_norm",
        },
        less=1,
    )
    o.head("embed_tokens.weight", fields["tie_embeddings"])
    sliding, full = "sliding_attention", "full_attention"
    types = o.get("layer_types")
    if types is None:
        types = [(sliding, full)[n % 2] for n in range(fields["depth"])]
    o.must("len(layer_types)", len(types), fields["depth"], "one for each block")
    for word in types:
        if word not in (sliding, full):
            o.must("layer_types", word, sliding, f"or {full!r}, of each block")
    blocks = [n for n, word in enumerate(types) if word == sliding]
    window = _window(o, o.get("sliding_window")) if blocks else {}
    return {
        **fields,
        **window,
        **({"window_blocks": blocks} if window and len(blocks) < len(types) else {}),
        "head_width": o.need("head_dim"),
        "scale": o.need("query_pre_attn_scalar") ** -0.5,
        "softcap": o.get("attn_logit_softcapping"),
        "logit_softcap": o.get("final_logit_softcapping"),
        "norm_out": True,
    }


def _rotary_decoder(
    o: Original,
    less: int,
    activation: str = "hidden_act",
) -> dict[str, Any]:
    """The fields of Llama and its kin; and the weights of what is outside the blocks."""
    heads = o.need("num_attention_heads")
    rope = o.get("rope_scaling") or o.get("rope_parameters") or {}
    nested = [name for name, held in rope.items() if isinstance(held, Mapping)]
    o.must("rope_parameters", nested, [], "one set of angles turns every block")
    kind = rope.get("rope_type", rope.get("type", "default"))
    o.must("rope_type", kind, "default", "scaled angles are said by no field")
    part = rope.get("partial_rotary_factor", o.need("partial_rotary_factor"))
    o.must("partial_rotary_factor", part, 1.0, "no part stays")
    base = rope["rope_theta"] if "rope_theta" in rope else o.need("rope_theta")
    o.copy("embed_tokens.weight", "decoder.embedding.weight")
    o.norm("norm", "decoder.norm", less=less)
    return {
        "kind": "decoder",
        "width": o.need("hidden_size"),
        "depth": o.need("num_hidden_layers"),
        "heads": heads,
        "kv_heads": o.get("num_key_value_heads") or heads,
        "head_width": o.get("head_dim"),
        "vocabulary": o.need("vocab_size"),
        "hidden": o.need("intermediate_size"),
        "activation": o.activation(activation),
        "gated_hidden": True,
        "norm": "rms",
        "norm_epsilon": o.need("rms_norm_eps"),
        "bias": bool(o.need("attention_bias") or o.need("mlp_bias")),
        "positions": "rotary",
        "rotary_base": float(base),
        "tie_embeddings": o.need("tie_word_embeddings"),
        "attention_dropout": o.get("attention_dropout") or 0.0,
    }


def _gated_blocks(o: Original, norms: dict[str, str], less: int = 0) -> None:
    """The weights of the blocks of Llama and its kin."""
    attends, feeds = bool(o.need("attention_bias")), bool(o.need("mlp_bias"))
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    hidden = {"gate_proj": "gate", "up_proj": "input", "down_proj": "output"}
    for n in range(o.need("num_hidden_layers")):
        theirs, ours = f"layers.{n}", f"decoder.{n}"
        for name, part in parts.items():
            o.linear(f"{theirs}.self_attn.{name}", f"{ours}.attention.{part}", attends)
        for name, part in hidden.items():
            o.linear(f"{theirs}.mlp.{name}", f"{ours}.feed.{part}", feeds)
        for name, norm in norms.items():
            o.norm(f"{theirs}.{name}", f"{ours}.{norm}", less=less)


def _window(o: Original, width: int | None) -> dict[str, Any]:
    """Neighbours, of a total width that counts the position itself."""
    return {} if width is None else {"window": width - 1}


def _bert(o: Original) -> dict[str, Any]:
    for name in ("is_decoder", "add_cross_attention"):
        o.must(name, o.need(name), False, "BERT is an encoder here")
    kind = o.need("position_embedding_type")
    o.must("position_embedding_type", kind, "absolute", "no field says another")
    theirs = "embeddings"
    o.copy(f"{theirs}.word_embeddings.weight", "encoder.embedding.weight")
    o.copy(f"{theirs}.token_type_embeddings.weight", "encoder.types.weight")
    o.copy(f"{theirs}.position_embeddings.weight", "encoder.positions.weight")
    o.norm(f"{theirs}.LayerNorm", "encoder.embedding_norm", bias=True)
    for n in range(o.need("num_hidden_layers")):
        theirs, ours = f"encoder.layer.{n}", f"encoder.{n}"
        for part in ("query", "key", "value"):
            o.linear(f"{theirs}.attention.self.{part}", f"{ours}.attention.{part}", True)
        o.linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out", True)
        o.norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm", bias=True)
        o.linear(f"{theirs}.intermediate.dense", f"{ours}.feed.input", True)
        o.linear(f"{theirs}.output.dense", f"{ours}.feed.output", True)
        o.norm(f"{theirs}.output.LayerNorm", f"{ours}.feed_norm", bias=True)
    return {
        "kind": "encoder",
        "width": o.need("hidden_size"),
        "depth": o.need("num_hidden_layers"),
        "heads": o.need("num_attention_heads"),
        "vocabulary": o.need("vocab_size"),
        "hidden": o.need("intermediate_size"),
        "activation": o.activation("hidden_act"),
        "norm_first": False,
        "norm_embedding": True,
        "norm_epsilon": o.need("layer_norm_eps"),
        "positions": "learned",
        "max_length": o.need("max_position_embeddings"),
        "token_types": o.need("type_vocab_size"),
        "scale_embedding": False,
        "dropout": o.need("hidden_dropout_prob"),
        "attention_dropout": o.need("attention_probs_dropout_prob"),
    }


FAMILIES: dict[str, tuple[str, Callable[[Original], dict[str, Any]]]] = {
    "gpt2": ("transformer.", _gpt2),
    "llama": ("model.", _llama),
    "mistral": ("model.", _mistral),
    "gemma2": ("model.", _gemma2),
    "bert": ("bert.", _bert),
}
