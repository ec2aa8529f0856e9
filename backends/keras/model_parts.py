"""What a Transformer of Keras is made of: feed-forward, blocks, stacks.

Layers are named as the plan is: `encoder.0.attention.query.weight`.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from attn_core.backends.keras.layer_parts import (
    ACTIVATIONS,
    Embedding,
    Linear,
    Norm,
    Words,
    hidden_dropout,
    sinusoidal,
    words_of,
)
from attn_core.backends.keras.layers import MultiHeadAttention
from attn_core.backends.keras.portable import TAKEN, variable
from attn_core.backends.keras.tensors import Array, dtype_of, indices, within
from attn_core.model.cache import BlockWeights, Cache, LayerOutput, Memory, ModelCache
from attn_core.model.seeds import sites
from attn_core.model.transformer import TransformerConfig


def model_norm(config: TransformerConfig, **make: Any) -> Norm:
    """A norm of the residual stream; that of kind "rms" has no bias."""
    bias = config.bias and config.norm == "layer"
    return Norm(config.width, config.norm, bias, config.norm_epsilon, **make)


class Part(keras.layers.Layer):
    """A part of a model, whose arguments Keras hands on as they are."""

    def __init__(self, name: str, policy: Any) -> None:
        super().__init__(name=name, dtype=policy, autocast=False)
        self._convert_input_args = False
        self._allow_non_tensor_positional_args = True

    def put(self, name: str, part: Any) -> None:
        """Set a part under the plan's name."""
        setattr(self, TAKEN.get(name, name), part)

    def get(self, name: str) -> Any:
        """The part of that name."""
        return variable(self, name)


class FeedForward(Part):
    """activation(x W1 + b1) W2 + b2; gated: (activation(x Wg + bg) * (x W1 + b1)) W2 + b2."""

    def __init__(self, config: TransformerConfig, name: str, policy: Any) -> None:
        super().__init__(name, policy)
        width, hidden, bias = config.width, config.hidden_width, config.bias
        self.activation = config.activation
        self.gate = None
        with keras.name_scope(name):
            self.put("input", Linear(width, hidden, bias, name="input", dtype=policy))
            if config.gated_hidden:
                self.gate = Linear(width, hidden, bias, name="gate", dtype=policy)
            self.put("output", Linear(hidden, width, bias, name="output", dtype=policy))
        self.built = True

    def call(self, x: Array) -> Array:
        active, first, last = ACTIVATIONS[self.activation], self.get("input"), self.get("output")
        if self.gate is None:
            return last(active(first(x)))
        return last(active(self.gate(x)) * first(x))


class Block(Part):
    """Self-attention, attention to an encoder where there is one, feed-forward; x flows on."""

    cross: Any

    def __init__(self, config: TransformerConfig, stack: str, number: int, policy: Any) -> None:
        super().__init__(str(number), policy)
        self.config = config
        place = sites(config)
        self.places = {
            name: place[f"{stack}.{number}.{name}"]
            for name in ("attention", "cross", "feed")
            if name != "cross" or config.crosses(stack)
        }

        def attend(name: str) -> MultiHeadAttention:
            inner = config.attention(stack, cross=name == "cross", number=number)
            site = place[f"{stack}.{number}.{name}.weights"]
            return MultiHeadAttention(inner, site=site, name=name, dtype=policy)

        with keras.name_scope(self.name):
            self.attention = attend("attention")
            self.cross = attend("cross") if config.crosses(stack) else None
            self.feed = FeedForward(config, "feed", policy)
            for sublayer in self.places:
                for name in ("norm", "out_norm") if config.norm_out else ("norm",):
                    name = f"{sublayer}_{name}"
                    setattr(self, name, model_norm(config, name=name, dtype=policy))
        self.built = True

    def call(
        self,
        x: Array,
        at: Array,
        *,
        mask: Any,
        lengths: Any,
        seed: Any,
        cache: Cache | None,
        memory: Memory | None,
        return_weights: bool,
        training: Any = None,
    ) -> tuple[Array, BlockWeights, Cache | None]:
        """x, (B, T, width), whose rows stand at `at` (B or 1, T)."""
        options = {"seed": seed, "q_lengths": lengths, "return_weights": return_weights}
        options["training"] = bool(training)

        def itself(y: Array) -> Any:
            keys = None if cache is not None else lengths
            return self.attention(y, mask=mask, kv_lengths=keys, cache=cache, **options)

        x, mine = self._flow(x, itself, "attention", at, seed, training)
        crossed = LayerOutput(None)
        if self.cross is not None:

            def source(y: Array) -> Any:
                return self.cross(y, memory, **options)

            x, crossed = self._flow(x, source, "cross", at, seed, training)
        x, _ = self._flow(x, self.feed, "feed", at, seed, training)
        return x, BlockWeights(mine.weights, crossed.weights), mine.cache

    def _flow(
        self, x: Array, sublayer: Any, name: str, at: Array, seed: Any, training: Any
    ) -> tuple[Array, LayerOutput]:
        """x with a sublayer's output added, and what else the sublayer returned."""
        c, site = self.config, self.places[name]
        norm = getattr(self, f"{name}_norm")
        found = sublayer(norm(x) if c.norm_first else x)
        found = found if isinstance(found, LayerOutput) else LayerOutput(found)
        y = getattr(self, f"{name}_out_norm")(found.out) if c.norm_out else found.out
        x = x + hidden_dropout(y, c.dropout, seed, site, at, training)
        return (x if c.norm_first else norm(x)), found


class Stack(Part):
    """An encoder or a decoder: embedding and positions, blocks named by number, a norm."""

    wheel: Words
    embedding: Any
    types: Any
    positions: Any
    embedding_norm: Any
    norm: Any

    def __init__(self, config: TransformerConfig, stack: str, policy: Any) -> None:
        super().__init__(stack, policy)
        self.config, make = config, {"dtype": policy}
        self.site = sites(config)[f"{stack}.embedding"]
        tokens, width = config.tokens(stack), config.width
        self.embedding = self.types = self.positions = self.embedding_norm = self.norm = None
        self.count = config.blocks(stack)
        with keras.name_scope(stack):
            if tokens is None:
                first = Linear(config.inputs or 0, width, config.bias, name="input", **make)
                self.put("input", first)
            else:
                self.embedding = Embedding(tokens, width, name="embedding", **make)
            if config.token_types is not None:
                self.types = Embedding(config.token_types, width, name="types", **make)
            if config.positions == "learned":
                self.positions = Embedding(config.max_length or 0, width, name="positions", **make)
            if config.norm_embedding:
                self.embedding_norm = model_norm(config, name="embedding_norm", **make)
            for number in range(self.count):
                self.put(str(number), Block(config, stack, number, policy))
            if config.ends_in_norm:
                self.norm = model_norm(config, name="norm", **make)
        turns = width if config.positions == "sinusoidal" else 0
        object.__setattr__(self, "wheel", words_of(10000.0, turns))
        self.built = True

    @property
    def blocks(self) -> list[Any]:
        """The blocks in order."""
        return [self.get(str(number)) for number in range(self.count)]

    def call(
        self,
        given: Array,
        *,
        types: Any = None,
        mask: Any = None,
        lengths: Any = None,
        seed: Any = None,
        cache: ModelCache | None = None,
        memories: tuple[Memory, ...] = (),
        return_weights: bool = False,
        training: Any = None,
    ) -> tuple[Array, Any, tuple[Cache, ...]]:
        """Vectors (B, T, width) of tokens (B, T), or of vectors; weights and caches of blocks."""
        c, at = self.config, indices(given)
        if cache is not None:
            at = cache.blocks[0].lengths[:, None] + at
        if self.embedding is not None:
            x = self.embedding(given)
            x = x * math.sqrt(c.width) if c.scale_embedding else x
        else:
            x = self.get("input")(given)
        if self.types is not None:
            x = x + self.types(ops.zeros((1, 1), "int32") if types is None else types)
        if self.positions is not None:
            x = x + self.positions(within(at, 0, (c.max_length or 1) - 1))
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(self.wheel, at, dtype_of(x))
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = hidden_dropout(x, c.dropout, seed, self.site, at, training)
        weights, caches = [], []
        for number, block in enumerate(self.blocks):
            x, seen, kept = block.call(
                x,
                at,
                mask=mask,
                lengths=lengths,
                seed=seed,
                cache=None if cache is None else cache.blocks[number],
                memory=memories[number] if memories else None,
                return_weights=return_weights,
                training=training,
            )
            weights.append(seen)
            caches.append(kept)
        x = x if self.norm is None else self.norm(x)
        return x, tuple(weights), tuple(caches) if cache is not None else ()
