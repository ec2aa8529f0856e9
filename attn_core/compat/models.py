"""Whole models of transformers in our terms: a TransformerConfig, and weights under our names.

    config, weights = from_transformers("config.json", "model.safetensors")
    model = attn_core.build(config, backend="jax")
    model.load_weights(weights)

No framework is needed to read one, and transformers itself is not either: a model is what its
config.json says and what its arrays are called. What each family is in our words:

    GPT-2     norms before, learned positions, gelu_tanh, tied head; q, k, v side by side (in, out)
    Llama     rms, rotary halves, silu gated, grouped heads, no biases; Mistral: and a window
    Gemma 2   Llama's, with norms on both sides of a sublayer, scales that are stored less 1, capped
              scores and logits, a scale of its own, a window in every other block
    BERT      an encoder: norms after, learned positions, types of tokens, a norm on their sum

What a config leaves out is what transformers takes then, which DEFAULTS says; null is none. Where
ours has a bias and the original none, it is 0. What a config says that no field of ours does
is refused by its name, and so is an array that nothing reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attn_core.compat.defaults import DEFAULTS, unaliased
from attn_core.config import nearest, read
from attn_core.model.parameters import parameters
from attn_core.model.transformer import TransformerConfig
from attn_core.model.weights import checked, read_arrays

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


class ConvertedModel(NamedTuple):
    """A model in our terms.

    Attributes:
        config: what the model computes.
        weights: name -> NumPy array, copies, for `load_weights` and `save_weights`.
    """

    config: TransformerConfig
    weights: dict[str, np.ndarray]


def from_transformers(config: Any, weights: Any, **changes: Any) -> ConvertedModel:
    """A model of transformers as (TransformerConfig, weights).

    Args:
        config: its config: the path of config.json, the mapping that it holds, or the object.
        weights: its state dict: names of transformers -> NumPy arrays, with the prefix of the base
            model ("model.", "transformer.", "bert.") or without; or the path of a safetensors file
            of them. Of several files, the arrays of each, `safetensors.numpy.load_file`, in one
            mapping; NumPy knows bfloat16 once ml_dtypes is imported.
        changes: fields of our config, such as dropout=0.0, impl="chunked" or backend="jax".

    Of GPT-2, Llama, Mistral and Gemma 2 the model with its head is meant, which gives logits; of
    BERT the encoder alone, which gives the last hidden state. Padding goes with the call: `lengths`
    where it stands at the end, else `mask=from_hf_mask(attention_mask)`.

    Raises:
        ValueError: another family; a field of its config that says what none of ours can; a weight
            that is missing, of another shape, or read by nobody.
        TypeError: a weight is no NumPy array, or they do not share one dtype; a config that is
            none.
    """
    told = _told(config)
    family = told.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"`model_type` must be one of {', '.join(_FAMILIES)}. "
            f"Got {family!r}.{nearest(family, tuple(_FAMILIES))}"
        )
    prefix, convert = _FAMILIES[family]
    if isinstance(weights, (str, PathLike)):
        weights = read_arrays(weights, _UNLEARNT)
    original = _Original(family, told, weights, prefix, "dropout" in changes)
    fields = convert(original)
    original.check_read()
    ours = TransformerConfig.load({"dtype": original.dtype, **fields, **changes})
    plan = parameters(ours)
    arrays = original.made
    for name, parameter in plan.items():
        if parameter.kind == "bias" and name not in arrays:
            arrays[name] = np.zeros(parameter.shape, original.kind)
    held = {name: np.array(x, order="C") for name, x in arrays.items()}
    return ConvertedModel(ours, checked(plan, held, dict.fromkeys(plan, ours.dtype)))


def _told(config: Any) -> Mapping[str, Any]:
    """What config.json holds."""
    if isinstance(config, Mapping):
        return config
    if isinstance(config, (str, PathLike)):
        return read(Path(config))
    if hasattr(config, "to_dict"):
        found: Mapping[str, Any] = config.to_dict()
        return found
    raise TypeError(
        "`config` must be the path of a config.json, the mapping that it holds, or a config of "
        f"transformers. Got {type(config).__name__}."
    )


class _Original:
    """What transformers says of a model, each weight to be read once."""

    def __init__(
        self, family: str, told: Mapping[str, Any], weights: Any, prefix: str, quiet: bool
    ) -> None:
        self.family, self.told, self.quiet = family, unaliased(family, told), quiet
        if not isinstance(weights, Mapping) or not weights:
            raise TypeError(
                "`weights` must be a mapping of names to NumPy arrays, or a path. "
                f"Got {type(weights).__name__}{' of nothing' if weights == {} else ''}."
            )
        for name, x in weights.items():
            if not isinstance(x, np.ndarray):
                raise TypeError(
                    f"`{name}` must be a NumPy array. Got {type(x).__module__}.{type(x).__name__}."
                )
        self.held: dict[str, np.ndarray] = {}
        for name, x in weights.items():
            if re.search(_UNLEARNT, name):
                continue
            new = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", _renamed, name.removeprefix(prefix))
            if new in self.held:
                raise ValueError(f"`weights` must hold {new!r} once. Got it as {name!r} too.")
            self.held[new] = x
        kinds = {x.dtype.name: x.dtype for x in self.held.values()}
        if len(kinds) != 1:
            raise TypeError(
                f"the weights of a model must share one dtype. Got {', '.join(sorted(kinds))}."
            )
        ((self.dtype, self.kind),) = kinds.items()
        self.read: set[str] = set()
        self.made: dict[str, np.ndarray] = {}

    def get(self, name: str) -> Any:
        """A field of the config: None where it is null, transformers' default where left out."""
        default = DEFAULTS[self.family][name]
        return self.told.get(name, default)

    def need(self, name: str) -> Any:
        """A field that null does not say."""
        found = self.get(name)
        if found is None:
            raise ValueError(f"`{name}` of a config of {self.family} must be given. Got null.")
        return found

    def must(self, name: str, got: Any, wanted: Any, why: str) -> None:
        """Refuse what no field of ours says."""
        if got != wanted:
            raise ValueError(
                f"`{name}` of a config of {self.family} must be {wanted!r}: {why}. Got {got!r}."
            )

    def activation(self, name: str) -> str:
        """Ours of that formula."""
        word = self.need(name)
        if word not in ACTIVATIONS:
            raise ValueError(
                f"`{name}` of a config of {self.family} must be one of {', '.join(ACTIVATIONS)}. "
                f"Got {word!r}.{nearest(word, tuple(ACTIVATIONS))}"
            )
        return ACTIVATIONS[word]

    def take(self, name: str) -> np.ndarray:
        """An array of theirs."""
        if name not in self.held:
            raise ValueError(
                f"`weights` of {self.family} must hold {name!r}. Got none."
                f"{nearest(name, tuple(self.held))}"
            )
        self.read.add(name)
        return self.held[name]

    def copy(self, theirs: str, ours: str) -> None:
        """A table, or a vector."""
        self.made[ours] = self.take(theirs)

    def linear(self, theirs: str, ours: str, bias: bool) -> None:
        """A torch.nn.Linear, whose matrix is (out, in)."""
        self.made[f"{ours}.weight"] = self.take(f"{theirs}.weight").T
        if bias:
            self.copy(f"{theirs}.bias", f"{ours}.bias")

    def conv(self, theirs: str, *ours: str) -> None:
        """A Conv1D, (in, out), whose outputs may lie side by side."""
        weights = np.split(self.take(f"{theirs}.weight"), len(ours), 1)
        biases = np.split(self.take(f"{theirs}.bias"), len(ours))
        for name, weight, bias in zip(ours, weights, biases, strict=True):
            self.made[f"{name}.weight"], self.made[f"{name}.bias"] = weight, bias

    def norm(self, theirs: str, ours: str, bias: bool = False, less: int = 0) -> None:
        """A norm; its scale may be stored `less` than it is: the sum is rounded once."""
        scale = self.take(f"{theirs}.weight")
        if less:
            wide = np.promote_types(np.float32, np.float64 if self.dtype == "float64" else "f4")
            scale = (less + scale.astype(wide)).astype(self.kind)
        self.made[f"{ours}.scale"] = scale
        if bias:
            self.copy(f"{theirs}.bias", f"{ours}.bias")

    def head(self, table: str, tied: bool) -> None:
        """The matrix of the logits: the embeddings' table itself, or one of its own."""
        if not tied:
            self.linear("lm_head", "head", False)
            return
        own = self.take("lm_head.weight") if "lm_head.weight" in self.held else self.held[table]
        if not np.array_equal(own, self.held[table]):
            raise ValueError(
                "`lm_head.weight` must be the embeddings' table where a config says "
                "`tie_word_embeddings`. Got another."
            )

    def check_read(self) -> None:
        """Every array has been read."""
        left = [name for name in self.held if name not in self.read]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ValueError(
                f"`weights` must hold what a model of {self.family} computes with here. Got "
                f"{left[0]!r}{more}, which nothing reads: leave it out if it is not needed."
            )


def _renamed(found: re.Match[str]) -> str:
    """As files from before torch call a norm's scale and bias, BERT's own among them."""
    return {"gamma": "weight", "beta": "bias"}[found[0]]


_UNLEARNT = r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|embeddings\.position_ids)$"
"""Constants that old checkpoints hold among their weights."""


def _gpt2(o: _Original) -> dict[str, Any]:
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


def _llama(o: _Original) -> dict[str, Any]:
    fields = _rotary_decoder(o, less=0)
    _gated_blocks(o, {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_norm"})
    o.head("embed_tokens.weight", fields["tie_embeddings"])
    return {**fields, "scale_embedding": False}


def _mistral(o: _Original) -> dict[str, Any]:
    o.must("layer_types", o.get("layer_types"), None, "the window is that of every block")
    return {**_llama(o), **_window(o, o.get("sliding_window"))}


def _gemma2(o: _Original) -> dict[str, Any]:
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
    window = _window(o, o.get("sliding_window"))
    blocks = [n for n, word in enumerate(types) if word == sliding]
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
    o: _Original,
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


def _gated_blocks(o: _Original, norms: dict[str, str], less: int = 0) -> None:
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


def _window(o: _Original, width: int | None) -> dict[str, Any]:
    """Neighbours, of a total width that counts the position itself."""
    return {} if width is None else {"window": width - 1}


def _bert(o: _Original) -> dict[str, Any]:
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


_FAMILIES: dict[str, tuple[str, Callable[[_Original], dict[str, Any]]]] = {
    "gpt2": ("transformer.", _gpt2),
    "llama": ("model.", _llama),
    "mistral": ("model.", _mistral),
    "gemma2": ("model.", _gemma2),
    "bert": ("bert.", _bert),
}
