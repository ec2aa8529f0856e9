"""The Transformer for torch, in its three kinds."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch.nn import functional as F

from attn_core.backends.torch import describe
from attn_core.backends.torch.layer_parts import (
    Array,
    check_tensors,
    indices,
    integers,
    known,
    linear,
    made,
    on_host,
)
from attn_core.backends.torch.model_parts import Stack
from attn_core.backends.torch.portable import Portable
from attn_core.model import calls
from attn_core.model.cache import Memory, ModelCache, ModelOutput
from attn_core.model.parameters import parameters
from attn_core.model.transformer import TransformerConfig
from attn_core.model.words import in_our_words

Given = str | PathLike[str] | dict[str, Any] | None


class Transformer(Portable):
    """The Transformer of a TransformerConfig: encoder, decoder or encoder-decoder.

    Args:
        config: TransformerConfig, a path or a mapping; its fields may also be given by name.
        seed: of the first values: the same numbers in every framework.
        device: of the parameters.

    Raises:
        TypeError, ValueError: a field of the config is unknown, or not of its form.

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
