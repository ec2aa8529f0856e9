"""The Transformer for Keras, in its three kinds."""

from __future__ import annotations

from os import PathLike
from typing import Any

import keras
from keras import ops

from attn_core.backends.keras.arguments import (
    as_is,
    bare,
    check_graph,
    in_our_words,
    padding_of,
    with_mask,
)
from attn_core.backends.keras.layer_parts import Linear
from attn_core.backends.keras.model_parts import Stack
from attn_core.backends.keras.portable import Portable, opened
from attn_core.backends.keras.tensors import (
    Array,
    dtype_of,
    indices,
    integers,
    known,
    on_host,
    product,
    shape,
    tanh,
    tensor,
    within,
)
from attn_core.model import calls
from attn_core.model.cache import Memory, ModelCache, ModelOutput
from attn_core.model.transformer import TransformerConfig

Given = str | PathLike[str] | dict[str, Any] | None


@keras.saving.register_keras_serializable(package="attn_core")
class Transformer(Portable):
    """The Transformer of a TransformerConfig: encoder, decoder or encoder-decoder.

    Args:
        config: TransformerConfig, a path or a mapping; its fields may also be given by name.
        seed: of the first values: the same numbers in every framework.
        dtype: of the parameters, or a policy of Keras; as in MultiHeadAttention.
        name, trainable: as in every layer of Keras.

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
        name: str | None = None,
        trainable: bool = True,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        c, policy = opened(TransformerConfig, config, dtype, options)
        super().__init__(c, policy, name=name, trainable=trainable)
        self.seed = seed
        self.encoder = self.decoder = self.head = None
        with keras.name_scope(self.name):
            for stack in c.stacks:
                setattr(self, stack, Stack(c, stack, policy))
            if "head.weight" in self.plan:
                width, predicted = self.plan["head.weight"].shape
                self.head = Linear(width, predicted, c.bias, name="head", dtype=policy)
        self.initialise(seed)
        if not trainable:
            self.trainable = False

    @in_our_words
    def __call__(self, given: Any, source: Any = None, *, mask: Any = None, **options: Any) -> Any:
        """`call`, in which Keras has given the name `mask` to something else."""
        types = options.get("types")
        calls.check_given("keras.ops.convert_to_tensor", given=given, source=source, types=types)
        options = with_mask(options, mask)
        if source is None and options.get("given_mask") is None:
            options["given_mask"] = padding_of(given)
        if options.get("types") is not None:
            options["types"] = tensor(options["types"])
        return super().__call__(tensor(given), tensor(source), **options)

    def call(
        self,
        given: Array,
        source: Array | None = None,
        *,
        types: Array | None = None,
        attention_mask: Any = None,
        lengths: Any = None,
        source_lengths: Any = None,
        seed: Any = None,
        cache: ModelCache | None = None,
        return_weights: bool = False,
        training: bool | None = None,
        given_mask: Any = None,
        source_mask: Any = None,
    ) -> Any:
        """Logits or vectors, or ModelOutput(out, weights, cache) when an extra is asked for.

        Args:
            given: int tokens (B, T); of an encoder with `inputs`, vectors (B, T, inputs).
            source: of an encoder-decoder, what the encoder reads.
            types: of a model with `token_types`, int (B, T), one for each token; 0 where left out.
            attention_mask: called `mask` where the model is called; as in `attn_core.attention`,
                in the self-attention of what reads `given`.
            lengths, source_lengths: int (B,): what lies beyond is padding, seen by nobody.
            seed: of a training step, an int or an integer scalar; read with dropout in training.
            cache: what earlier calls left (`make_cache`): tokens stand after those.
            return_weights: also the attention weights of every block.
            training: as in every layer of Keras.
            given_mask, source_mask: of padding, which Keras hands on, and which are refused:
                `lengths` say it.

        Returns:
            (B, T, vocabulary); of an encoder (B, T, width), or (B, classes).

        Raises:
            TypeError, ValueError: an argument is not of its form, or the cache is full; nothing
                has been computed.
        """
        c = self.config
        padding = given_mask, source_mask
        reading = bare(attention_mask), lengths
        stack = self._check(given, source, source_lengths, cache, padding, types, reading)
        options = {"seed": seed, "return_weights": return_weights, "training": training}
        memories, weights = () if cache is None else cache.memories, {}
        if source is not None:
            encoded, seen = self._encode(source, source_lengths, options)
            memories, weights["encoder"] = self._memories(encoded, source_lengths), seen
        # Stacks are not called but run: Keras would look for tensors in what they are given.
        options |= {"mask": reading[0], "lengths": lengths}
        if self.decoder is None:
            x, seen, _ = self.encoder.call(given, types=types, **options)
            out = self._capped(self._classes(x, lengths)) if c.classes is not None else x
            filled = None
        else:
            x, seen, blocks = self.decoder.call(given, cache=cache, memories=memories, **options)
            if self.head is None:
                table = ops.convert_to_tensor(self.decoder.embedding.weight)
                table = ops.transpose(ops.cast(table, x.dtype))
                out = product(x, table)
            else:
                out = self.head(x)
            out = self._capped(out)
            filled = None if cache is None else ModelCache(blocks, memories)
        if cache is None and not return_weights:
            return out
        return ModelOutput(out, {**weights, stack: seen} if return_weights else None, filled)

    def compute_output_spec(
        self,
        given: Any,
        source: Any = None,
        *,
        types: Any = None,
        attention_mask: Any = None,
        lengths: Any = None,
        source_lengths: Any = None,
        cache: Any = None,
        return_weights: bool = False,
        given_mask: Any = None,
        source_mask: Any = None,
        **options: Any,
    ) -> Any:
        """The same of KerasTensors."""
        check_graph(seed=options.get("seed"), mask=attention_mask)
        if cache is not None or return_weights:
            raise ValueError(
                "`cache` and `return_weights` must be left out in a graph of KerasTensors, whose "
                "nodes return one tensor. Got a symbolic call."
            )
        padding = given_mask, source_mask
        reading = bare(attention_mask), lengths
        self._check(given, source, source_lengths, None, padding, types, reading)
        return keras.KerasTensor(self.compute_output_shape(given.shape), dtype=self.compute_dtype)

    def compute_output_shape(self, given_shape: Any, *others: Any, **named: Any) -> Any:
        """(B, T, vocabulary); of an encoder (B, T, width), or (B, classes)."""
        c, (batch, rows) = self.config, given_shape[:2]
        if c.kind != "encoder":
            return batch, rows, c.vocabulary
        return (batch, rows, c.width) if c.classes is None else (batch, c.classes)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes an equal model of; weights apart."""
        return {
            "config": self.config.to_mapping(),
            "seed": self.seed,
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    @as_is
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
        calls.check_length(c, "length", length if isinstance(length, int) else None)
        memories: tuple[Memory, ...] = ()
        if source is not None:
            calls.check_given("keras.ops.convert_to_tensor", source=source)
            source = tensor(source)
            calls.check_counts("source_lengths", source_lengths, shape(source))
            encoded, _ = self._encode(source, source_lengths, {})
            memories = self._memories(encoded, source_lengths)
        blocks = [b.attention.make_cache(batch, length, dtype) for b in self.decoder.blocks]
        return ModelCache(tuple(blocks), memories)

    @as_is
    def generate(
        self,
        prompt: Array,
        steps: int,
        *,
        source: Array | None = None,
        lengths: Any = None,
        source_lengths: Any = None,
        stop: int | None = None,
        step: Any = None,
    ) -> Array:
        """The likeliest next token, `steps` times: int (B, steps).

        Args:
            prompt: int tokens (B, T), of which the first lengths[b] count; one at least.
            steps: how many tokens are made for every row.
            source, source_lengths: of an encoder-decoder.
            stop: a token after which a row goes on with that token.
            step: what answers step(tokens, cache) -> ModelOutput in this model's place, such as
                `tf.function(lambda tokens, cache: model(tokens, cache=cache))`.

        Every step asks the same question of a cache of T + steps - 1 positions: a `step` is traced
        once for all steps, and within a tf.function or jax.jit they are one loop, whose body is
        traced once.
        """
        calls.check_given("keras.ops.convert_to_tensor", prompt=prompt, source=source)
        prompt = tensor(prompt)
        read = dtype_of(prompt), on_host(prompt)
        calls.check_prompt(self.config, shape(prompt), steps, stop, *read)
        batch, rows = ops.shape(prompt)
        last = integers("lengths", rows if lengths is None else lengths)
        calls.check_lengths("lengths", shape(last), shape(prompt))
        calls.check_reach("lengths", lengths, 1, shape(prompt)[1], known)
        if source is not None:
            source = tensor(source)
            calls.check_reach("source_lengths", source_lengths, 0, shape(source)[1], known)
        last = ops.broadcast_to(within(last, 1, rows), (batch,)) - 1
        options = {"source": source, "source_lengths": source_lengths}
        # The last token is not read.
        cache = self.make_cache(batch, rows + max(steps - 1, 0), **options)
        found = self(prompt, lengths=lengths, cache=cache, training=False)
        flat = ops.reshape(found.out, (-1, found.out.shape[-1]))
        logits = ops.take(flat, ops.arange(batch, dtype="int32") * rows + last, axis=0)
        kind = dtype_of(prompt)
        # No gradient flows from step to step, and torch is to record none. The memories never
        # change: they are read from outside the loop.
        memories = keras.tree.map_structure(_stopped, found.cache.memories)
        first = ops.cast(ops.argmax(logits, -1), kind)
        step = step or (lambda tokens, cache: self(tokens, cache=cache, training=False))
        places = ops.arange(steps, dtype="int32")[None]

        def following(number: Array, made: Array, token: Array, blocks: Any) -> Any:
            blocks = keras.tree.map_structure(_stopped, blocks)
            found = step(token[:, None], ModelCache(blocks, memories))
            after = ops.cast(ops.argmax(found.out[:, 0], -1), kind)
            if stop is not None:
                after = ops.where(token == stop, ops.full_like(after, stop), after)
            made = ops.where(places == number, after[:, None], made)
            return number + 1, made, after, found.cache.blocks

        made = ops.repeat(first[:, None], steps, axis=1)
        held = ops.convert_to_tensor(1, "int32"), made, first, found.cache.blocks
        return ops.while_loop(lambda number, *_: number < steps, following, held)[1]

    def _check(
        self,
        given: Any,
        source: Any,
        source_lengths: Any,
        cache: Any,
        padding: tuple[Any, ...],
        types: Any,
        reading: tuple[Any, Any],
    ) -> str:
        c = self.config
        calls.check_classes(c, *reading, shape(given))
        if any(one is not None for one in padding):
            raise ValueError(
                "a padding mask of Keras must be left out: `lengths` and `source_lengths` say "
                "where padding begins. Got one: give the model its input without its mask."
            )
        if cache is not None:
            calls.check_kind("cache", cache, ModelCache)
        kept = None if cache is None else bool(cache.memories)
        calls.check_source(c, source is not None, kept, source_lengths)
        stack: str = c.stacks[-1]
        calls.check_read(c, stack, "given", shape(given), dtype_of(given))
        calls.check_tokens("given", on_host(given), c.tokens(stack))
        calls.check_counts("lengths", reading[1], shape(given))
        if types is not None:
            calls.check_types(c, shape(types), dtype_of(types), shape(given))
            calls.check_tokens("types", on_host(types), c.token_types, "`token_types`")
        if source is not None:
            calls.check_read(c, "encoder", "source", shape(source), dtype_of(source))
            calls.check_counts("source_lengths", source_lengths, shape(source))
        if cache is not None:
            calls.check_blocks(c, stack, [shape(b.key) for b in cache.blocks], shape(given))
        return stack

    def _encode(self, source: Array, lengths: Any, options: dict[str, Any]) -> tuple[Array, Any]:
        calls.check_read(self.config, "encoder", "source", shape(source), dtype_of(source))
        calls.check_tokens("source", on_host(source), self.config.tokens("encoder"))
        x, seen, _ = self.encoder.call(source, lengths=lengths, **options)
        return x, seen

    def _memories(self, encoded: Array, lengths: Any) -> tuple[Memory, ...]:
        return tuple([b.cross.memory(encoded, lengths=lengths) for b in self.decoder.blocks])

    def _capped(self, logits: Array) -> Array:
        cap = self.config.logit_softcap
        return logits if cap is None else cap * tanh(logits / cap)

    def _classes(self, x: Array, lengths: Any) -> Array:
        """Logits of classes from the mean of the rows that count; 0 where none does."""
        if lengths is None:
            return self.head(ops.sum(x, 1) / ops.cast(ops.shape(x)[1], x.dtype))
        lengths = ops.reshape(within(integers("lengths", lengths), 0, ops.shape(x)[1]), (-1, 1))
        counts = indices(x) < lengths
        total = ops.sum(ops.where(counts[..., None], x, ops.zeros_like(x)), 1)
        return self.head(total / ops.cast(ops.maximum(lengths, 1), x.dtype))


def _stopped(x: Any) -> Any:
    return None if x is None else ops.stop_gradient(x)
