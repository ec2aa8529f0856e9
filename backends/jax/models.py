"""The Transformer for JAX, in its three kinds."""

from __future__ import annotations

import functools
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_core.backends.jax.layer_parts import (
    Array,
    Linear,
    indices,
    integers,
    known,
    made,
    on_host,
    shape,
    widened,
)
from attn_core.backends.jax.model_parts import Stack
from attn_core.backends.jax.portable import Portable
from attn_core.model import calls
from attn_core.model.cache import Memory, ModelCache, ModelOutput
from attn_core.model.transformer import TransformerConfig
from attn_core.model.words import in_our_words

Given = str | PathLike[str] | dict[str, Any] | None


class Transformer(Portable):
    """The Transformer of a TransformerConfig: encoder, decoder or encoder-decoder.

    Args:
        config: TransformerConfig, a path or a mapping; its fields may also be given by name.
        seed: of the first values: the same numbers in every framework.

    Training is what nnx.Module.train() and .eval() set; a new model trains.

    Raises:
        TypeError, ValueError: a field of the config is unknown, or not of its form.

    Source: Vaswani et al., arXiv 1706.03762.
    """

    encoder: Any
    decoder: Any
    head: Any

    def __init__(
        self, config: TransformerConfig | Given = None, *, seed: int = 0, **options: Any
    ) -> None:
        self.config = c = TransformerConfig.of(config, **options)
        self.encoder = Stack(c, "encoder") if "encoder" in c.stacks else None
        self.decoder = Stack(c, "decoder") if "decoder" in c.stacks else None
        head = self.plan.get("head.weight")
        self.head = (
            None if head is None else Linear(head.shape[0], head.shape[1], c.bias, **made(c))
        )
        self.initialise(seed)

    @in_our_words
    @widened
    def __call__(
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
        calls.check_given("jnp.asarray", given=given, source=source, types=types)
        if cache is not None:
            calls.check_kind("cache", cache, ModelCache)
        kept = None if cache is None else bool(cache.memories)
        calls.check_source(c, source is not None, kept, source_lengths)
        stack = c.stacks[-1]
        calls.check_read(c, stack, "given", shape(given), given.dtype.name)
        calls.check_classes(c, mask, lengths, shape(given))
        calls.check_tokens("given", on_host(given), c.tokens(stack))
        calls.check_counts("lengths", lengths, shape(given))
        if types is not None:
            calls.check_types(c, shape(types), types.dtype.name, shape(given))
            calls.check_tokens("types", on_host(types), c.token_types, "`token_types`")
        if cache is not None:
            calls.check_blocks(c, stack, [shape(b.key) for b in cache.blocks], shape(given))
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
            out = x @ self.decoder.embedding.weight[...].T if self.head is None else self.head(x)
            out = self._capped(out)
            filled = None if cache is None else ModelCache(blocks, memories)
        if cache is None and not return_weights:
            return out
        return ModelOutput(out, {**weights, stack: seen} if return_weights else None, filled)

    @widened
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

    @widened
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

        All of it is one compiled program for each shape of prompt and source and each number of
        steps: the prompt fills a cache of T + steps - 1 positions, and a loop on the device, whose
        body is compiled once, makes the tokens.
        """
        calls.check_given("jnp.asarray", prompt=prompt, source=source)
        # What follows is compiled, and sees no values.
        read = prompt.dtype.name, on_host(jnp.asarray(prompt))
        calls.check_prompt(self.config, jnp.shape(prompt), steps, stop, *read)
        definition, state = nnx.split(self)
        calls.check_reach("lengths", lengths, 1, jnp.shape(prompt)[1], known)
        if source is not None:
            calls.check_reach("source_lengths", source_lengths, 0, jnp.shape(source)[1], known)
        told = {"lengths": lengths, "source_lengths": source_lengths}
        told = {name: None if x is None else integers(name, x) for name, x in told.items()}
        if lengths is not None:
            calls.check_lengths("lengths", shape(told["lengths"]), jnp.shape(prompt))
        told["source"] = None if source is None else jnp.asarray(source)
        if source is not None:
            calls.check_tokens("source", on_host(told["source"]), self.config.tokens("encoder"))
        return _generated(definition, steps, stop, state, jnp.asarray(prompt), told)

    def _encode(self, source: Array, lengths: Any, options: dict[str, Any]) -> tuple[Array, Any]:
        calls.check_given("jnp.asarray", source=source)
        calls.check_read(self.config, "encoder", "source", shape(source), source.dtype.name)
        calls.check_tokens("source", on_host(source), self.config.tokens("encoder"))
        calls.check_counts("source_lengths", lengths, shape(source))
        x, seen, _ = self.encoder(source, lengths=lengths, **options)
        return x, seen

    def _memories(self, encoded: Array, lengths: Any) -> tuple[Memory, ...]:
        return tuple([b.cross.memory(encoded, lengths=lengths) for b in self.decoder.blocks])

    def _capped(self, logits: Array) -> Array:
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _classes(self, x: Array, lengths: Any) -> Array:
        """Logits of classes from the mean of the rows that count; 0 where none does."""
        if lengths is None:
            return self.head(x.mean(1))
        lengths = integers("lengths", lengths).clip(0, x.shape[1]).reshape(-1, 1)
        counts = indices(x) < lengths
        total = jnp.where(counts[..., None], x, 0.0).sum(1)
        return self.head(total / lengths.clip(1).astype(x.dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generated(
    definition: Any, steps: int, stop: int | None, state: Any, prompt: Array, told: dict[str, Any]
) -> Array:
    """The loop of `generate`."""
    model, lengths = nnx.merge(definition, state), told.pop("lengths")
    batch, rows = prompt.shape
    cache = model.make_cache(batch, rows + max(steps - 1, 0), **told)  # the last is not read
    found = model(prompt, lengths=lengths, cache=cache)
    last = integers("lengths", rows if lengths is None else lengths)
    last = jnp.broadcast_to(last.clip(1, rows), (batch,)) - 1
    logits = jnp.take_along_axis(found.out, last[:, None, None], 1)[:, 0]
    first = logits.argmax(-1).astype(prompt.dtype)

    def step(held: Any, _: Any) -> Any:
        token, blocks = held
        # The memories never change: they are read from outside the loop.
        found = model(token[:, None], cache=ModelCache(blocks, cache.memories))
        following = found.out[:, 0].argmax(-1).astype(prompt.dtype)
        if stop is not None:
            following = jnp.where(token == stop, token, following)
        return (following, found.cache.blocks), token

    held, made = jax.lax.scan(step, (first, found.cache.blocks), length=max(steps - 1, 0))
    return jnp.concatenate([made, held[0][None]]).T[:, :steps]
