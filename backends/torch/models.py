"""The Transformer for torch, in its three kinds.

Modules are named so that `state_dict()` has the plan's names: `encoder.0.attention.query.weight`.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import torch
from torch.nn import functional as F

from attn_core.backends.torch import describe
from attn_core.backends.torch.layer_parts import (
    ACTIVATIONS,
    Array,
    Norm,
    Portable,
    check_tensors,
    embedding,
    hidden_dropout,
    indices,
    integers,
    known,
    linear,
    made,
    on_host,
    sinusoidal,
    turns_for,
)
from attn_core.backends.torch.layers import MultiHeadAttention
from attn_core.model import calls
from attn_core.model.cache import BlockWeights, Cache, LayerOutput, Memory, ModelCache, ModelOutput
from attn_core.model.parameters import parameters
from attn_core.model.seeds import sites
from attn_core.model.transformer import TransformerConfig
from attn_core.model.words import in_our_words

Given = str | PathLike[str] | dict[str, Any] | None


def model_norm(config: TransformerConfig, **make: Any) -> Norm:
    """A norm of the residual stream; that of kind "rms" has no bias."""
    bias = config.bias and config.norm == "layer"
    return Norm(config.width, config.norm, bias, config.norm_epsilon, **make)


class FeedForward(torch.nn.Module):
    """activation(x W1 + b1) W2 + b2; gated: (activation(x Wg + bg) * (x W1 + b1)) W2 + b2."""

    def __init__(self, config: TransformerConfig, **make: Any) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.hidden_width, config.bias
        self.activation = config.activation
        self.input = linear(width, hidden, bias, **make)
        self.gate = linear(width, hidden, bias, **make) if config.gated_hidden else None
        self.output = linear(hidden, width, bias, **make)

    def forward(self, x: Array) -> Array:
        active = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.output(active(self.input(x)))
        return self.output(active(self.gate(x)) * self.input(x))


class Block(torch.nn.Module):
    """Self-attention, attention to an encoder where there is one, feed-forward; x flows on."""

    cross: Any
    cross_norm: Any

    def __init__(self, config: TransformerConfig, stack: str, number: int, device: Any) -> None:
        super().__init__()
        self.config, make = config, made(config, device)
        place = sites(config)
        self.places = {
            name: place[f"{stack}.{number}.{name}"]
            for name in ("attention", "cross", "feed")
            if name != "cross" or config.crosses(stack)
        }

        def attend(name: str) -> MultiHeadAttention:
            inner = config.attention(stack, cross=name == "cross", number=number)
            site = place[f"{stack}.{number}.{name}.weights"]
            return MultiHeadAttention(inner, site=site, device=device)

        self.attention, self.cross = attend("attention"), None
        if config.crosses(stack):
            self.cross = attend("cross")
        self.feed = FeedForward(config, **make)
        for name in self.places:
            self.add_module(f"{name}_norm", model_norm(config, **make))
            after = model_norm(config, **make) if config.norm_out else None
            self.register_module(f"{name}_out_norm", after)

    def forward(
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
        c, site = self.config, self.places[name]
        norm, after = getattr(self, f"{name}_norm"), getattr(self, f"{name}_out_norm")
        found = sublayer(norm(x) if c.norm_first else x)
        found = found if isinstance(found, LayerOutput) else LayerOutput(found)
        y = found.out if after is None else after(found.out)
        x = x + hidden_dropout(y, c.dropout, seed, site, at, self.training)
        return (x if c.norm_first else norm(x)), found


class Stack(torch.nn.Module):
    """An encoder or a decoder: embedding and positions, blocks named by number, a norm."""

    embedding: Any
    input: Any
    types: Any
    positions: Any
    embedding_norm: Any
    norm: Any

    def __init__(self, config: TransformerConfig, stack: str, device: Any) -> None:
        super().__init__()
        self.config, make = config, made(config, device)
        self.site = sites(config)[f"{stack}.embedding"]
        tokens, width = config.tokens(stack), config.width
        self.embedding = self.input = self.types = self.positions = None
        self.embedding_norm = self.norm = None
        if tokens is None:
            self.input = linear(config.inputs or 0, width, config.bias, **make)
        else:
            self.embedding = embedding(tokens, width, **make)
        if config.token_types is not None:
            self.types = embedding(config.token_types, width, **make)
        if config.positions == "learned":
            self.positions = embedding(config.max_length or 0, width, **make)
        if config.norm_embedding:
            self.embedding_norm = model_norm(config, **make)
        self.count = config.blocks(stack)
        for number in range(self.count):
            self.add_module(str(number), Block(config, stack, number, device))
        if config.ends_in_norm:
            self.norm = model_norm(config, **make)

    @property
    def blocks(self) -> list[Any]:
        """The blocks in order."""
        return [getattr(self, str(number)) for number in range(self.count)]

    def forward(
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
            x = x + (self.types.weight[0] if types is None else self.types(types))
        if self.positions is not None:
            x = x + self.positions(at.clamp(0, self.positions.num_embeddings - 1))
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(turns_for(x, 10000.0, c.width), at, x.dtype)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = hidden_dropout(x, c.dropout, seed, self.site, at, self.training)
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


class Transformer(Portable):
    """The Transformer of a TransformerConfig: encoder, decoder or encoder-decoder.

    Args:
        config: TransformerConfig, a path or a mapping; its fields may also be given by name.
        seed: of the first values: the same numbers in every framework.
        device: of the parameters.

    Source: Vaswani et al., arXiv 1706.03762.
    """

    encoder: Any
    decoder: Any
    head: Any

    def __init__(
        self,
        config: TransformerConfig | Given = None,
        *,
        seed: int = 0,
        device: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = c = TransformerConfig.of(config, **options)
        self.plan = parameters(c)
        self.encoder = self.decoder = None
        for name in c.stacks:
            setattr(self, name, Stack(c, name, device))
        self.head = None
        if "head.weight" in self.plan:
            width, predicted = self.plan["head.weight"].shape
            self.head = linear(width, predicted, c.bias, **made(c, device))
        self.initialise(seed)

    @in_our_words
    def forward(
        self,
        given: Array,
        source: Array | None = None,
        *,
        types: Array | None = None,
        mask: Any = None,
        lengths: Any = None,
        source_lengths: Any = None,
        seed: Any = None,
        cache: ModelCache | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Logits or vectors, or ModelOutput(out, weights, cache) when an extra is asked for.

        Args:
            given: int tokens (B, T); of an encoder with `inputs`, vectors (B, T, inputs).
            source: of an encoder-decoder, what the encoder reads.
            types: of a model with `token_types`, int (B, T), one for each token; 0 where left out.
            mask: as in `attn_core.attention`, in the self-attention of what reads `given`.
            lengths, source_lengths: int (B,): what lies beyond is padding, seen by nobody.
            seed: of a training step, an int or an integer scalar; read with dropout in training.
            cache: what earlier calls left (`make_cache`): tokens stand after those.
            return_weights: also the attention weights of every block.

        Returns:
            (B, T, vocabulary); of an encoder (B, T, width), or (B, classes).

        Raises:
            TypeError, ValueError: an argument is not of its form, or the cache is full; nothing
                has been computed.
        """
        c = self.config
        check_tensors(given=given, source=source, types=types)
        if cache is not None:
            calls.check_kind("cache", cache, ModelCache)
        kept = None if cache is None else bool(cache.memories)
        calls.check_source(c, source is not None, kept, source_lengths)
        stack = c.stacks[-1]
        calls.check_read(c, stack, "given", given.shape, describe(given).dtype)
        calls.check_classes(c, mask, lengths, given.shape)
        calls.check_tokens("given", on_host(given), c.tokens(stack))
        if not torch.compiler.is_compiling():
            calls.check_counts("lengths", lengths, given.shape)
        if types is not None:
            calls.check_types(c, types.shape, describe(types).dtype, given.shape)
            calls.check_tokens("types", on_host(types), c.token_types, "`token_types`")
        if cache is not None:
            calls.check_blocks(c, stack, [b.key.shape for b in cache.blocks], given.shape)
        options = {"seed": seed, "return_weights": return_weights}
        memories, weights = () if cache is None else cache.memories, {}
        if source is not None:
            encoded, seen = self._encode(source, source_lengths, options)
            memories, weights["encoder"] = self._memories(encoded, source_lengths), seen
        options |= {"mask": mask, "lengths": lengths}
        if self.decoder is None:
            x, seen, _ = self.encoder(given, types=types, **options)
            out = self._capped(self._classes(x, lengths)) if c.classes is not None else x
            filled = None
        else:
            x, seen, blocks = self.decoder(given, cache=cache, memories=memories, **options)
            out = F.linear(x, self.decoder.embedding.weight) if self.head is None else self.head(x)
            out = self._capped(out)
            filled = None if cache is None else ModelCache(blocks, memories)
        if cache is None and not return_weights:
            return out
        return ModelOutput(out, {**weights, stack: seen} if return_weights else None, filled)

    def make_cache(
        self,
        batch: int,
        length: int,
        *,
        source: Array | None = None,
        source_lengths: Any = None,
        dtype: Any = None,
    ) -> ModelCache:
        """An empty cache of `length` positions; in an encoder-decoder it holds the source."""
        c = self.config
        kept = None if c.kind != "encoder" else False
        calls.check_source(c, source is not None, kept, source_lengths)
        calls.check_length(c, "length", length)
        memories: tuple[Memory, ...] = ()
        if source is not None:
            encoded, _ = self._encode(source, source_lengths, {})
            memories = self._memories(encoded, source_lengths)
        blocks = [b.attention.make_cache(batch, length, dtype) for b in self.decoder.blocks]
        return ModelCache(tuple(blocks), memories)

    @torch.no_grad()
    def generate(
        self,
        prompt: Array,
        steps: int,
        *,
        source: Array | None = None,
        lengths: Any = None,
        source_lengths: Any = None,
        stop: int | None = None,
    ) -> Array:
        """The likeliest next token, `steps` times: int (B, steps).

        Args:
            prompt: int tokens (B, T), of which the first lengths[b] count; one at least.
            steps: how many tokens are made for every row.
            source, source_lengths: of an encoder-decoder.
            stop: a token after which a row goes on with that token.

        Every step asks the same question of a cache of T + steps - 1 positions: a compiled model
        (`model.compile()`) is compiled once for the prompt and once for all steps.
        """
        check_tensors(prompt=prompt, source=source)
        read = describe(prompt).dtype, on_host(prompt)
        calls.check_prompt(self.config, prompt.shape, steps, stop, *read)
        options = {"source": source, "source_lengths": source_lengths}
        batch, rows = prompt.shape
        last = integers("lengths", rows if lengths is None else lengths, prompt.device)
        calls.check_lengths("lengths", last.shape, prompt.shape)
        calls.check_reach("lengths", lengths, 1, rows, known)
        if source is not None:
            calls.check_reach("source_lengths", source_lengths, 0, source.shape[1], known)
        cache = self.make_cache(batch, rows + max(steps - 1, 0), **options)  # the last is not read
        found = self(prompt, lengths=lengths, cache=cache)
        last = last.clamp(1, rows).expand(batch) - 1
        logits = found.out[torch.arange(batch, device=prompt.device), last.to(torch.int64)]
        made = [logits.argmax(-1).to(prompt.dtype)]
        for _ in range(steps - 1):
            found = self(made[-1][:, None], cache=found.cache)
            token = found.out[:, 0].argmax(-1).to(prompt.dtype)
            made.append(token if stop is None else torch.where(made[-1] == stop, stop, token))
        return torch.stack(made, 1)[:, :steps]

    def _encode(self, source: Array, lengths: Any, options: dict[str, Any]) -> tuple[Array, Any]:
        check_tensors(source=source)
        calls.check_read(self.config, "encoder", "source", source.shape, describe(source).dtype)
        calls.check_tokens("source", on_host(source), self.config.tokens("encoder"))
        if not torch.compiler.is_compiling():
            calls.check_counts("source_lengths", lengths, source.shape)
        x, seen, _ = self.encoder(source, lengths=lengths, **options)
        return x, seen

    def _memories(self, encoded: Array, lengths: Any) -> tuple[Memory, ...]:
        return tuple([b.cross.memory(encoded, lengths=lengths) for b in self.decoder.blocks])

    def _capped(self, logits: Array) -> Array:
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _classes(self, x: Array, lengths: Any) -> Array:
        """Logits of classes from the mean of the rows that count; 0 where none does."""
        if lengths is None:
            return self.head(x.mean(1))
        lengths = integers("lengths", lengths, x.device).clamp(0, x.shape[1]).reshape(-1, 1)
        counts = indices(x) < lengths
        total = torch.where(counts[..., None], x, 0.0).sum(1)
        return self.head(total / lengths.clamp(min=1).to(x.dtype))
