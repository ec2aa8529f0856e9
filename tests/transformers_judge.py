"""The judge of whole models of transformers: each family as plain NumPy, from its own names.

It shares nothing with the converter: it reads config.json's words and the state dict's names, as
transformers documents them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from layer_judge import heads, rms, rotate
from model_judge import ACTIVATIONS

Array = Any
ACTIVE = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}


def layer_norm(x: Array, w: dict[str, Array], name: str, epsilon: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Array, w: dict[str, Array], name: str) -> Array:
    """torch.nn.Linear's."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def conv(x: Array, w: dict[str, Array], name: str) -> Array:
    """Conv1D's."""
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


class Judge:
    """One forward pass of rows that begin at position 0; `seen` (B, T) are 1 = a token."""

    def __init__(self, c: dict[str, Any], weights: dict[str, Array], seen: Array, dtype: Any):
        self.c, self.seen, self.dtype, self.logit = c, np.asarray(seen, bool), dtype, 1.0
        self.w = {name: np.asarray(x, dtype) for name, x in weights.items()}

    def attend(self, q: Array, k: Array, v: Array, causal: bool = True, **more: Any) -> Array:
        """(B, T, H D) of each, with its heads: entry by entry what may be seen."""
        count, kv = more["count"], more.get("kv", more["count"])
        q, k, v = heads(q, count), heads(k, kv), heads(v, kv)
        batch, rows = q.shape[0], q.shape[2]
        if "base" in more:
            at = np.broadcast_to(np.arange(rows), (batch, rows))
            q, k = [rotate(x, at, more["base"], 1.0, "half") for x in (q, k)]
        k, v = [np.repeat(x, count // kv, 1) for x in (k, v)]
        s = q @ k.swapaxes(-1, -2) * self.dtype(more.get("scale", q.shape[-1] ** -0.5))
        if more.get("cap"):
            s = self.dtype(more["cap"]) * np.tanh(s / self.dtype(more["cap"]))
        width = more.get("width") or rows
        sees = np.zeros((batch, 1, rows, rows), bool)
        for b, _, i, j in np.ndindex(sees.shape):
            sees[b, 0, i, j] = self.seen[b, j] and (not causal or i - width < j <= i)
        self.logit = max(self.logit, float(abs(np.where(sees, s, 0)).max()))
        e = np.where(sees, np.exp(np.where(sees, s, 0)), 0)
        total = e.sum(-1, keepdims=True)
        p = (e / np.where(total == 0, 1, total)).astype(self.dtype)
        return (p @ v).transpose(0, 2, 1, 3).reshape(batch, rows, -1)

    def gpt2(self, tokens: Array) -> Array:
        c, w = self.c, {n.removeprefix("transformer."): x for n, x in self.w.items()}
        epsilon, act = c["layer_norm_epsilon"], ACTIVATIONS[ACTIVE[c["activation_function"]]]
        x = w["wte.weight"][tokens] + w["wpe.weight"][: tokens.shape[1]]
        for n in range(c["n_layer"]):
            y = conv(layer_norm(x, w, f"h.{n}.ln_1", epsilon), w, f"h.{n}.attn.c_attn")
            y = self.attend(*np.split(y, 3, -1), count=c["n_head"], **self.scaled())
            x = x + conv(y, w, f"h.{n}.attn.c_proj")
            y = conv(layer_norm(x, w, f"h.{n}.ln_2", epsilon), w, f"h.{n}.mlp.c_fc")
            x = x + conv(act(y).astype(self.dtype), w, f"h.{n}.mlp.c_proj")
        x = layer_norm(x, w, "ln_f", epsilon)
        return x @ w["wte.weight" if c["tie_word_embeddings"] else "lm_head.weight"].T

    def scaled(self) -> dict[str, float]:
        return {} if self.c["scale_attn_weights"] else {"scale": 1.0}

    def llama(self, tokens: Array) -> Array:
        """Mistral and Gemma 2, too."""
        c, w = self.c, {n.removeprefix("model."): x for n, x in self.w.items()}
        gemma = c["model_type"] == "gemma2"
        act = ACTIVATIONS[ACTIVE[c["hidden_activation" if gemma else "hidden_act"]]]

        def norm(x: Array, name: str) -> Array:
            return rms(x, w[f"{name}.weight"] + (1 if gemma else 0), c["rms_norm_eps"])

        x = w["embed_tokens.weight"][tokens]
        x = x * self.dtype(math.sqrt(c["hidden_size"])) if gemma else x
        for n in range(c["num_hidden_layers"]):
            name = f"layers.{n}"
            options = {
                "count": c["num_attention_heads"],
                "kv": c["num_key_value_heads"],
                "base": c["rope_parameters"]["rope_theta"],
                "width": c.get("sliding_window"),
            }
            if gemma:
                options["scale"] = 1 / math.sqrt(c["query_pre_attn_scalar"])
                options["cap"] = c["attn_logit_softcapping"]
                if c["layer_types"][n] == "full_attention":
                    options["width"] = None
            y = norm(x, f"{name}.input_layernorm")
            q, k, v = [linear(y, w, f"{name}.self_attn.{part}_proj") for part in "qkv"]
            y = linear(self.attend(q, k, v, **options), w, f"{name}.self_attn.o_proj")
            y = norm(y, f"{name}.post_attention_layernorm") if gemma else y
            x = x + y
            before = "pre_feedforward" if gemma else "post_attention"
            y = norm(x, f"{name}.{before}_layernorm")
            gate, up = [linear(y, w, f"{name}.mlp.{part}_proj") for part in ("gate", "up")]
            y = linear((act(gate) * up).astype(self.dtype), w, f"{name}.mlp.down_proj")
            y = norm(y, f"{name}.post_feedforward_layernorm") if gemma else y
            x = x + y
        x = norm(x, "norm")
        x = x @ w["embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"].T
        cap = c.get("final_logit_softcapping")
        return self.dtype(cap) * np.tanh(x / self.dtype(cap)) if cap else x

    def bert(self, tokens: Array, types: Array | None) -> Array:
        c, w, epsilon = self.c, self.w, self.c["layer_norm_eps"]
        e = "embeddings"
        x = w[f"{e}.word_embeddings.weight"][tokens]
        x = x + w[f"{e}.token_type_embeddings.weight"][0 * tokens if types is None else types]
        x = x + w[f"{e}.position_embeddings.weight"][: tokens.shape[1]]
        x = layer_norm(x, w, f"{e}.LayerNorm", epsilon)
        for n in range(c["num_hidden_layers"]):
            name = f"encoder.layer.{n}"
            parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
            y = [linear(x, w, part) for part in parts]
            y = self.attend(*y, causal=False, count=c["num_attention_heads"])
            y = linear(y, w, f"{name}.attention.output.dense")
            x = layer_norm(x + y, w, f"{name}.attention.output.LayerNorm", epsilon)
            y = ACTIVATIONS[ACTIVE[c["hidden_act"]]](linear(x, w, f"{name}.intermediate.dense"))
            y = linear(y.astype(self.dtype), w, f"{name}.output.dense")
            x = layer_norm(x + y, w, f"{name}.output.LayerNorm", epsilon)
        return x


def model(
    config: dict[str, Any],
    weights: dict[str, Array],
    tokens: Array,
    seen: Array,
    types: Array | None = None,
    dtype: Any = np.float64,
) -> tuple[Array, float]:
    """Logits, or BERT's last hidden state, and the largest |logit| of any attention."""
    judge = Judge(config, weights, seen, dtype)
    family = config["model_type"]
    if family == "bert":
        return judge.bert(tokens, types), judge.logit
    out = judge.gpt2(tokens) if family == "gpt2" else judge.llama(tokens)
    return out, judge.logit
