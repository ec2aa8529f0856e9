"""What a Transformer of JAX is made of: feed-forward, blocks, stacks.

Modules are named so that `nnx.state()` has the plan's names: `encoder.0.attention.query.weight`.
"""

from __future__ import annotations

import math
from typing import Any

from flax import nnx

from attn_core.backends.jax.layer_parts import (
    ACTIVATIONS,
    Array,
    Embedding,
    Linear,
    Norm,
    hidden_dropout,
    indices,
    made,
    sinusoidal,
    wheel,
)
from attn_core.backends.jax.layers import MultiHeadAttention
from attn_core.model.cache import BlockWeights, Cache, LayerOutput, Memory, ModelCache
from attn_core.model.seeds import sites
from attn_core.model.transformer import TransformerConfig


def model_norm(config: TransformerConfig, **make: Any) -> Norm:
    """A norm of the residual stream; that of kind "rms" has no bias."""
    bias = config.bias and config.norm == "layer"
    return Norm(config.width, config.norm, bias, config.norm_epsilon, **make)


class FeedForward(nnx.Module):
    """activation(x W1 + b1) W2 + b2; gated: (activation(x Wg + bg) * (x W1 + b1)) W2 + b2."""

    def __init__(self, config: TransformerConfig, **make: Any) -> None:
        width, hidden, bias = config.width, config.hidden_width, config.bias
        self.activation = config.activation
        self.input = Linear(width, hidden, bias, **make)
        self.gate = Linear(width, hidden, bias, **make) if config.gated_hidden else None
        self.output = Linear(hidden, width, bias, **make)

    def __call__(self, x: Array) -> Array:
        active = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.output(active(self.input(x)))
        return self.output(active(self.gate(x)) * self.input(x))


class Block(nnx.Module):
    """Self-attention, attention to an encoder where there is one, feed-forward; x flows on."""

    cross: Any

    def __init__(self, config: TransformerConfig, stack: str, number: int) -> None:
        self.config, make = config, made(config)
        self.name, self.deterministic = f"{stack}.{number}", False
        place = sites(config)

        def attend(name: str) -> MultiHeadAttention:
            inner = config.attention(stack, cross=name == "cross", number=number)
            site = place[f"{stack}.{number}.{name}.weights"]
            return MultiHeadAttention(inner, site=site)

        self.attention = attend("attention")
        self.cross = attend("cross") if config.crosses(stack) else None
        self.feed = FeedForward(config, **make)
        for name in ("attention", "feed") if self.cross is None else ("attention", "cross", "feed"):
            setattr(self, f"{name}_norm", model_norm(config, **make))
            after = model_norm(config, **make) if config.norm_out else None
            setattr(self, f"{name}_out_norm", after)

    def __call__(
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
    ) -> tuple[Array, BlockWeights, Cache | None]:
        """x, (B, T, width), whose rows stand at `at` (B or 1, T)."""
        options = {"seed": seed, "q_lengths": lengths, "return_weights": return_weights}

        def itself(y: Array) -> Any:
            keys = None if cache is not None else lengths
            return self.attention(y, mask=mask, kv_lengths=keys, cache=cache, **options)

        x, mine = self._flow(x, itself, "attention", at, seed)
        crossed = LayerOutput(None)
        if self.cross is not None:

            def source(y: Array) -> Any:
                return self.cross(y, memory, **options)

            x, crossed = self._flow(x, source, "cross", at, seed)
        x, _ = self._flow(x, self.feed, "feed", at, seed)
        return x, BlockWeights(mine.weights, crossed.weights), mine.cache

    def _flow(
        self, x: Array, sublayer: Any, name: str, at: Array, seed: Any
    ) -> tuple[Array, LayerOutput]:
        """x with a sublayer's output added, and what else the sublayer returned."""
        c, site = self.config, sites(self.config)[f"{self.name}.{name}"]
        norm, after = getattr(self, f"{name}_norm"), getattr(self, f"{name}_out_norm")
        found = sublayer(norm(x) if c.norm_first else x)
        found = found if isinstance(found, LayerOutput) else LayerOutput(found)
        y = found.out if after is None else after(found.out)
        x = x + hidden_dropout(y, c.dropout, seed, site, at, not self.deterministic)
        return (x if c.norm_first else norm(x)), found


class Stack(nnx.Module):
    """An encoder or a decoder: embedding and positions, blocks named by number, a norm."""

    input: Any
    embedding: Any
    types: Any
    positions: Any
    embedding_norm: Any
    norm: Any

    def __init__(self, config: TransformerConfig, stack: str) -> None:
        self.config, make = config, made(config)
        self.site, self.deterministic = sites(config)[f"{stack}.embedding"], False
        tokens, width = config.tokens(stack), config.width
        told, learned = tokens is not None, config.positions == "learned"
        self.input = None if told else Linear(config.inputs or 0, width, config.bias, **make)
        self.embedding = Embedding(tokens or 0, width, **make) if told else None
        types = config.token_types
        self.types = None if types is None else Embedding(types, width, **make)
        self.positions = Embedding(config.max_length or 0, width, **make) if learned else None
        self.embedding_norm = model_norm(config, **make) if config.norm_embedding else None
        self.count = config.blocks(stack)
        for number in range(self.count):
            setattr(self, str(number), Block(config, stack, number))
        self.norm = model_norm(config, **make) if config.ends_in_norm else None

    @property
    def blocks(self) -> list[Any]:
        """The blocks in order."""
        return [getattr(self, str(number)) for number in range(self.count)]

    def __call__(
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
    ) -> tuple[Array, Any, tuple[Cache, ...]]:
        """Vectors (B, T, width) of tokens (B, T), or of vectors; weights and caches of blocks."""
        c, at = self.config, indices(given)
        if cache is not None:
            at = cache.blocks[0].lengths[:, None] + at
        if self.embedding is not None:
            x = self.embedding(given)
            x = x * math.sqrt(c.width) if c.scale_embedding else x
        else:
            x = self.input(given)
        if self.types is not None:
            x = x + (self.types.weight[...][0] if types is None else self.types(types))
        if self.positions is not None:
            x = x + self.positions(at.clip(0, (c.max_length or 1) - 1))
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(wheel(10000.0, c.width), at, x.dtype)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = hidden_dropout(x, c.dropout, seed, self.site, at, not self.deterministic)
        weights, caches = [], []
        for number, block in enumerate(self.blocks):
            x, seen, kept = block(
                x,
                at,
                mask=mask,
                lengths=lengths,
                seed=seed,
                cache=None if cache is None else cache.blocks[number],
                memory=memories[number] if memories else None,
                return_weights=return_weights,
            )
            weights.append(seen)
            caches.append(kept)
        x = x if self.norm is None else self.norm(x)
        return x, tuple(weights), tuple(caches) if cache is not None else ()
