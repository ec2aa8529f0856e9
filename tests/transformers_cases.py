"""Tiny models of transformers, made of NumPy alone: what config.json says, and the arrays.

The tests of torch load the arrays into transformers' own models, so that names, shapes and words
are known to be theirs; those of the other frameworks need neither.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import transformers_judge

from attn_core.conformance import tolerance

B, T, TOKENS, POSITIONS = 3, 9, 23, 12
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 20,
    "vocab_size": TOKENS,
    "n_positions": POSITIONS,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-3,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "vocab_size": TOKENS,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "attention_bias": False,
    "mlp_bias": False,
}
GEMMA2 = {
    **{name: x for name, x in LLAMA.items() if name not in ("hidden_act", "mlp_bias")},
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 3,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "vocab_size": TOKENS,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MISTRAL = {name: x for name, x in LLAMA.items() if not name.endswith("_bias")}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2, a head of its own": {**GPT2, "tie_word_embeddings": False},
    "gpt2, not scaled": {**GPT2, "scale_attn_weights": False, "n_inner": None},
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tie_word_embeddings": True},
    "llama, biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama, biases in attention": {**LLAMA, "attention_bias": True},
    "mistral": {**MISTRAL, "model_type": "mistral", "sliding_window": 4},
    "gemma2": GEMMA2,
    "gemma2, no caps": {
        **GEMMA2,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "bert": BERT,
}


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names that transformers gives, and their shapes."""
    if c["model_type"] == "gpt2":
        return _gpt2(c["n_embd"], c["n_inner"] or 4 * c["n_embd"], c)
    if c["model_type"] == "bert":
        return _bert(c["hidden_size"], c["intermediate_size"], c)
    return _llama(c["hidden_size"], c["intermediate_size"], c)


def _both(name: str, *shape: int, bias: int | None = None) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": shape}
    return found if bias is None else {**found, f"{name}.bias": (bias,)}


def _gpt2(width: int, inner: int, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    found = {
        "transformer.wte.weight": (TOKENS, width),
        "transformer.wpe.weight": (POSITIONS, width),
    }
    for n in range(c["n_layer"]):
        h = f"transformer.h.{n}"
        found |= _both(f"{h}.ln_1", width, bias=width) | _both(f"{h}.ln_2", width, bias=width)
        found |= _both(f"{h}.attn.c_attn", width, 3 * width, bias=3 * width)
        found |= _both(f"{h}.attn.c_proj", width, width, bias=width)
        found |= _both(f"{h}.mlp.c_fc", width, inner, bias=inner)
        found |= _both(f"{h}.mlp.c_proj", inner, width, bias=width)
    found |= _both("transformer.ln_f", width, bias=width)
    return found | {"lm_head.weight": (TOKENS, width)}


def _llama(width: int, inner: int, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    wide, narrow = (c[f"num_{kind}_heads"] * c["head_dim"] for kind in ("attention", "key_value"))
    attends, feeds = c.get("attention_bias"), c.get("mlp_bias")
    norms = ["input_layernorm", "post_attention_layernorm"]
    if c["model_type"] == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    found = {"model.embed_tokens.weight": (TOKENS, width), "model.norm.weight": (width,)}
    for n in range(c["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        for part, rows in (("q", wide), ("k", narrow), ("v", narrow)):
            name, bias = f"{layer}.self_attn.{part}_proj", rows if attends else None
            found |= _both(name, rows, width, bias=bias)
        found |= _both(f"{layer}.self_attn.o_proj", width, wide, bias=width if attends else None)
        for part in ("gate", "up"):
            found |= _both(f"{layer}.mlp.{part}_proj", inner, width, bias=inner if feeds else None)
        found |= _both(f"{layer}.mlp.down_proj", width, inner, bias=width if feeds else None)
        found |= {f"{layer}.{name}.weight": (width,) for name in norms}
    return found | {"lm_head.weight": (TOKENS, width)}


def _bert(width: int, inner: int, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    found = {
        "embeddings.word_embeddings.weight": (TOKENS, width),
        "embeddings.position_embeddings.weight": (POSITIONS, width),
        "embeddings.token_type_embeddings.weight": (c["type_vocab_size"], width),
        **_both("embeddings.LayerNorm", width, bias=width),
    }
    for n in range(c["num_hidden_layers"]):
        layer = f"encoder.layer.{n}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            found |= _both(f"{layer}.attention.{part}", width, width, bias=width)
        found |= _both(f"{layer}.attention.output.LayerNorm", width, bias=width)
        found |= _both(f"{layer}.intermediate.dense", inner, width, bias=inner)
        found |= _both(f"{layer}.output.dense", width, inner, bias=width)
        found |= _both(f"{layer}.output.LayerNorm", width, bias=width)
    return found


TABLES = ("embeddings.weight", "embed_tokens.weight", "wte.weight", "wpe.weight")


def weights(c: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random arrays, float32: scales near 1 (Gemma's near 0), the rest small: logits within 7."""
    made: dict[str, np.ndarray] = {}
    for name, shape in shapes(c).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        scale = len(shape) == 1 and name.endswith(".weight")
        first = 1.0 if scale and c["model_type"] != "gemma2" else 0.0
        spread = 0.6 if name.endswith(TABLES) else 0.3
        made[name] = (first + spread * rng.standard_normal(shape)).astype(np.float32)
    table = [name for name in made if name.endswith(("wte.weight", "embed_tokens.weight"))]
    if table and c["tie_word_embeddings"]:
        made["lm_head.weight"] = made[table[0]].copy()
    return made


def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(1, TOKENS, (B, T)).astype(np.int32)


def types(c: dict[str, Any]) -> np.ndarray:
    return np.random.default_rng(6).integers(0, c["type_vocab_size"], (B, T)).astype(np.int32)


LENGTHS = np.array([9, 5, 1], np.int32)


def padding(side: str) -> np.ndarray:
    """(B, T), 1 = a token: rows of LENGTHS tokens, filled up at a side."""
    at = np.arange(T) if side == "right" else np.arange(T)[::-1]
    return (at < LENGTHS[:, None]).astype(np.int64) if side != "none" else np.ones((B, T), np.int64)


def shares(
    c: dict[str, Any],
    held: dict[str, np.ndarray],
    seen: np.ndarray,
    results: dict[str, Any],
    types: np.ndarray | None = None,
) -> dict[str, float]:
    """Each result's error, where tokens stand, as a share of what is allowed."""
    want, logit = transformers_judge.model(c, held, tokens(), seen, types)
    plain, _ = transformers_judge.model(c, held, tokens(), seen, types, dtype=np.float32)
    alive = seen.astype(bool)
    return {
        name: tolerance.share(
            np.asarray(out)[alive], want[alive], plain[alive], "float32", "out", logit
        )
        for name, out in results.items()
    }


def greedy(c: dict[str, Any], held: dict[str, np.ndarray], prompt: np.ndarray, steps: int) -> Any:
    """The likeliest tokens by the judge, the whole sequence again for each."""
    given = prompt
    for _ in range(steps):
        out, _ = transformers_judge.model(c, held, given, np.ones_like(given))
        given = np.concatenate([given, out[:, -1:].argmax(-1).astype(given.dtype)], 1)
    return given[:, prompt.shape[1] :]


def inside(found: dict[str, float]) -> bool:
    return all(share <= 1 for share in found.values())
