"""A model of transformers as its files say it: fields of its config, and arrays to be read once.

What a config leaves out is what transformers takes then, which DEFAULTS says; null is none. A field
that no field of ours says is refused by its name, and so is an array that nothing reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from attn_core.compat.defaults import DEFAULTS, unaliased
from attn_core.config import nearest

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

UNLEARNT = r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|embeddings\.position_ids)$"
"""Constants that old checkpoints hold among their weights."""


class Original:
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
            if re.search(UNLEARNT, name):
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
