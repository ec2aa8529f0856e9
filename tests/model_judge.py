"""The judge of models: a Transformer as plain NumPy, its attention that of layer_judge."""

from __future__ import annotations

import math
from typing import Any

import layer_judge
import numpy as np

Array = Any
ATTENTION = (
    *("heads", "kv_heads", "head_width", "qk_norm", "norm_epsilon", "gate", "softcap"),
    *("rotary_base", "rotary_fraction", "rotary_pairs", "scale"),
)


def sinusoidal(positions: Array, width: int) -> Array:
    """PE[p, 2 i] = sin(p / 10000**(2 i / width)), PE[p, 2 i + 1] its cosine."""
    found = np.zeros((*positions.shape, width))
    for place in np.ndindex(positions.shape):
        for i in range(width // 2):
            angle = positions[place] / 10000 ** (2 * i / width)
            found[(*place, 2 * i)] = math.sin(angle)
            found[(*place, 2 * i + 1)] = math.cos(angle)
    return found


def erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x) if x.size else x


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


class Judge:
    """One forward pass; `options` are the fields of a TransformerConfig that are not left out."""

    def __init__(
        self, options: dict[str, Any], weights: dict[str, Array], dtype: Any, sites: Any, seed: Any
    ) -> None:
        self.options, self.dtype = options, dtype
        self.weights = {name: np.asarray(x, dtype) for name, x in weights.items()}
        self.sites, self.seed = sites, seed  # seed is None in evaluation
        self.logit = 1.0

    def get(self, name: str, default: Any = None) -> Any:
        found = self.options.get(name)
        return default if found is None else found

    def within(self, prefix: str) -> dict[str, Array]:
        cut = len(prefix) + 1
        return {n[cut:]: x for n, x in self.weights.items() if n.startswith(prefix + ".")}

    def norm(self, name: str, x: Array) -> Array:
        w, epsilon = self.within(name), self.get("norm_epsilon", 1e-6)
        if self.get("norm", "layer") == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * w["scale"]
        return y + w["bias"] if "bias" in w else y

    def drop(self, name: str, x: Array) -> Array:
        rate = self.get("dropout", 0.0)
        if not rate or self.seed is None:
            return x
        at = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
        kept = layer_judge.kept(rate, self.seed, self.sites[name], x.shape[0], 1, at, x.shape[2])
        return np.where(kept[:, 0], x / self.dtype(1 - rate), 0)

    def attend(
        self, name: str, stack: str, x: Array, source: Any, lengths: Any, keys: Any
    ) -> Array:
        options = {n: self.options[n] for n in ATTENTION if n in self.options}
        more: dict[str, Any] = {}
        positions, window = self.get("positions"), self.get("window")
        blocks, number = self.get("window_blocks"), int(name.split(".")[1])
        if blocks is not None and number not in blocks:
            window = None
        if source is None:
            if positions in ("rotary", "alibi"):
                options["positions"] = positions
            options["causal"] = stack == "decoder"
            if window is not None:
                far = window if stack == "encoder" else 10**9
                more["sees"] = lambda b, h, q, k: q - k <= window and k - q <= far
        rate = self.get("attention_dropout", self.get("dropout", 0.0))
        if rate and self.seed is not None:
            options["dropout"] = rate
            at = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
            columns = x.shape[1] if source is None else source.shape[1]
            shape = (x.shape[0], options["heads"])
            place = self.sites[f"{name}.weights"]
            more["keep"] = layer_judge.kept(rate, self.seed, place, *shape, at, columns)
        found = layer_judge.layer(
            options,
            self.within(name),
            x,
            source,
            q_lengths=lengths,
            kv_lengths=keys,
            dtype=self.dtype,
            **more,
        )
        self.logit = max(self.logit, found.logit)
        return found.out

    def feed(self, name: str, x: Array) -> Array:
        w, active = self.within(name), ACTIVATIONS[self.get("activation", "relu")]
        y = layer_judge.linear(w, "input", x)
        if self.get("gated_hidden"):
            y = active(layer_judge.linear(w, "gate", x)) * y
        else:
            y = active(y)
        return layer_judge.linear(w, "output", y.astype(self.dtype))

    def capped(self, logits: Array) -> Array:
        cap = self.get("logit_softcap")
        return logits if cap is None else self.dtype(cap) * np.tanh(logits / self.dtype(cap))

    def stack(
        self,
        stack: str,
        given: Array,
        lengths: Any,
        source: Any,
        source_lengths: Any,
        types: Any = None,
    ) -> Array:
        w, width = self.within(stack), self.get("width")
        first = self.options.get("norm_first", True)
        if "embedding.weight" in w:
            x = w["embedding.weight"][given]
            if self.options.get("scale_embedding", True):
                x = x * self.dtype(math.sqrt(width))
        else:
            x = layer_judge.linear(w, "input", np.asarray(given, self.dtype))
        if self.get("token_types"):
            x = x + w["types.weight"][np.zeros_like(given) if types is None else types]
        rows = np.arange(x.shape[1])
        positions = self.options.get("positions", "sinusoidal")
        if positions == "learned":
            x = x + w["positions.weight"][rows]
        elif positions == "sinusoidal":
            x = x + sinusoidal(rows, width).astype(self.dtype)
        if self.get("norm_embedding"):
            x = self.norm(f"{stack}.embedding_norm", x)
        x = self.drop(f"{stack}.embedding", x)
        crosses = source is not None
        depth = self.get(f"{stack}_depth", self.get("depth"))
        for i in range(depth):
            name = f"{stack}.{i}"
            parts = [part for part in ("attention", "cross", "feed") if part != "cross" or crosses]
            for part in parts:
                y = self.norm(f"{name}.{part}_norm", x) if first else x
                if part == "feed":
                    y = self.feed(f"{name}.feed", y)
                elif part == "cross":
                    y = self.attend(f"{name}.cross", stack, y, source, lengths, source_lengths)
                else:
                    y = self.attend(f"{name}.attention", stack, y, None, lengths, lengths)
                if self.get("norm_out"):
                    y = self.norm(f"{name}.{part}_out_norm", y)
                x = x + self.drop(f"{name}.{part}", y)
                x = x if first else self.norm(f"{name}.{part}_norm", x)
        return self.norm(f"{stack}.norm", x) if f"{stack}.norm.scale" in self.weights else x


def model(
    options: dict[str, Any],
    weights: dict[str, Array],
    given: Array,
    source: Array | None = None,
    *,
    lengths: Any = None,
    source_lengths: Any = None,
    types: Array | None = None,
    sites: Any = None,
    seed: Any = None,
    dtype: Any = np.float64,
) -> tuple[Array, float]:
    """Logits or vectors, and the largest |logit| of any attention (1 at least)."""
    judge = Judge(options, weights, dtype, sites, seed)
    if options["kind"] == "encoder":
        x = judge.stack("encoder", given, lengths, None, None, types)
        if "head.weight" not in weights:
            return x, judge.logit
        ends = np.broadcast_to(x.shape[1] if lengths is None else lengths, x.shape[:1])
        x = np.stack([x[b, :n].sum(0) / max(n, 1) for b, n in enumerate(ends)])
        logits = layer_judge.linear(judge.weights, "head", x.astype(dtype))
        return judge.capped(logits), judge.logit
    encoded = None
    if source is not None:
        encoded = judge.stack("encoder", source, source_lengths, None, None)
    x = judge.stack("decoder", given, lengths, encoded, source_lengths)
    if options.get("tie_embeddings"):
        return judge.capped(x @ judge.weights["decoder.embedding.weight"].T), judge.logit
    return judge.capped(layer_judge.linear(judge.weights, "head", x)), judge.logit


def additive(
    weights: dict[str, Array],
    query: Array,
    key: Array,
    value: Array,
    sees: Array,
    dtype: Any = np.float64,
    keep: Any = None,
    rate: float = 0.0,
) -> tuple[Array, Array]:
    """Bahdanau's attention with every pair at once; sees is boolean (B, Tq, Tk)."""
    w = {name: np.asarray(x, dtype) for name, x in weights.items()}
    q, k = np.asarray(query, dtype) @ w["query.weight"], np.asarray(key, dtype) @ w["key.weight"]
    s = np.tanh(q[:, :, None] + k[:, None] + w["bias"]) @ w["score"]
    e = np.where(sees, np.exp(s), 0)
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    shares = p if keep is None else np.where(keep, p / dtype(1 - rate), 0)
    return shares @ np.asarray(value, dtype), p
