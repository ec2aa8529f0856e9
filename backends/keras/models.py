"""The Transformer for Keras, in its three kinds.

Layers are named as the plan is: `encoder.0.attention.query.weight`.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import keras
from keras import ops

from attn_core.backends.keras.layer_parts import (
    ACTIVATIONS,
    TAKEN,
    Array,
    Embedding,
    Linear,
    Norm,
    Portable,
    Words,
    as_is,
    bare,
    dtype_of,
    hidden_dropout,
    indices,
    integers,
    leaf,
    opened,
    product,
    shape,
    sinusoidal,
    tensor,
    variable,
    within,
    words_of,
)
from attn_core.backends.keras.layers import MultiHeadAttention
from attn_core.model import calls
from attn_core.model.cache import BlockWeights, Cache, LayerOutput, Memory, ModelCache, ModelOutput
from attn_core.model.seeds import sites
from attn_core.model.transformer import TransformerConfig

Given = str | PathLike[str] | dict[str, Any] | None


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


@keras.saving.register_keras_serializable(package="attn_core")
class Transformer(Portable):
    """The Transformer of a TransformerConfig: encoder, decoder or encoder-decoder.

    Args:
        config: TransformerConfig, a path or a mapping; its fields may also be given by name.
        seed: of the first values: the same numbers in every framework.
        dtype: of the parameters, or a policy of Keras; as in MultiHeadAttention.
        name, trainable: as in every layer of Keras.

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

    def __call__(self, given: Any, source: Any = None, *, mask: Any = None, **options: Any) -> Any:
        """`call`, in which Keras has given the name `mask` to something else."""
        if mask is not None:
            options["attention_mask"] = leaf(mask)
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
        mask: Any = None,
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
            mask, given_mask, source_mask: of padding, which Keras hands on, and which are refused:
                `lengths` say it.

        Returns:
            (B, T, vocabulary); of an encoder (B, T, width), or (B, classes).

        Raises:
            TypeError, ValueError: an argument is not of its form, or the cache is full; nothing
                has been computed.
        """
        c = self.config
        stack = self._check(given, source, cache, (mask, given_mask, source_mask), types)
        options = {"seed": seed, "return_weights": return_weights, "training": training}
        memories, weights = () if cache is None else cache.memories, {}
        if source is not None:
            encoded, seen = self._encode(source, source_lengths, options)
            memories, weights["encoder"] = self._memories(encoded, source_lengths), seen
        # Stacks are not called but run: Keras would look for tensors in what they are given.
        options |= {"mask": bare(attention_mask), "lengths": lengths}
        if self.decoder is None:
            x, seen, _ = self.encoder.call(given, types=types, **options)
            out = self._capped(self._classes(x, lengths)) if c.classes is not None else x
            kept = None
        else:
            x, seen, blocks = self.decoder.call(given, cache=cache, memories=memories, **options)
            if self.head is None:
                table = ops.convert_to_tensor(self.decoder.embedding.weight)
                table = ops.transpose(ops.cast(table, x.dtype))
                out = product(x, table)
            else:
                out = self.head(x)
            out = self._capped(out)
            kept = None if cache is None else ModelCache(blocks, memories)
        if cache is None and not return_weights:
            return out
        return ModelOutput(out, {**weights, stack: seen} if return_weights else None, kept)

    def compute_output_spec(
        self,
        given: Any,
        source: Any = None,
        *,
        types: Any = None,
        cache: Any = None,
        return_weights: bool = False,
        mask: Any = None,
        given_mask: Any = None,
        source_mask: Any = None,
        **options: Any,
    ) -> Any:
        """The same of KerasTensors."""
        c = self.config
        if cache is not None or return_weights:
            raise ValueError(
                "`cache` and `return_weights` must be left out in a graph of KerasTensors, whose "
                "nodes return one tensor. Got a symbolic call."
            )
        self._check(given, source, cache, (mask, given_mask, source_mask), types)
        batch, rows = given.shape[:2]
        if c.kind != "encoder":
            found: tuple[Any, ...] = (batch, rows, c.vocabulary)
        else:
            found = (batch, rows, c.width) if c.classes is None else (batch, c.classes)
        return keras.KerasTensor(found, dtype=self.compute_dtype)

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
        calls.check_source(c, source is not None, None if c.kind != "encoder" else False)
        calls.check_length(c, "length", length if isinstance(length, int) else None)
        memories: tuple[Memory, ...] = ()
        if source is not None:
            encoded, _ = self._encode(tensor(source), source_lengths, {})
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

        Every step asks the same question of a cache of T + steps positions, so a `step` is traced
        once for all steps. Within a tf.function or jax.jit all steps are one graph.
        """
        prompt = tensor(prompt)
        batch, rows = ops.shape(prompt)
        options = {"source": source, "source_lengths": source_lengths}
        cache = self.make_cache(batch, rows + steps, **options)
        found = self(prompt, lengths=lengths, cache=cache, training=False)
        last = (
            ops.broadcast_to(integers("lengths", rows if lengths is None else lengths), (batch,))
            - 1
        )
        flat = ops.reshape(found.out, (-1, found.out.shape[-1]))
        logits = ops.take(flat, ops.arange(batch, dtype="int32") * rows + last, axis=0)
        kind = dtype_of(prompt)
        made = [ops.cast(ops.argmax(logits, -1), kind)]
        step = step or (lambda tokens, cache: self(tokens, cache=cache, training=False))
        for _ in range(steps - 1):
            # No gradient flows from step to step, and torch is to record none.
            cache = keras.tree.map_structure(_stopped, found.cache)
            found = step(made[-1][:, None], cache)
            token = ops.cast(ops.argmax(found.out[:, 0], -1), kind)
            if stop is not None:
                token = ops.where(made[-1] == stop, ops.full_like(token, stop), token)
            made.append(token)
        return ops.stack(made, 1)[:, :steps]

    def _check(
        self, given: Any, source: Any, cache: Any, padding: tuple[Any, ...], types: Any
    ) -> str:
        c = self.config
        if any(one is not None for one in padding):
            raise ValueError(
                "a padding mask of Keras must be left out: `lengths` and `source_lengths` say "
                "where padding begins. Got one: give the model its input without its mask."
            )
        calls.check_source(c, source is not None, None if cache is None else bool(cache.memories))
        stack: str = c.stacks[-1]
        calls.check_read(c, stack, "given", shape(given), dtype_of(given))
        if types is not None:
            calls.check_types(c, shape(types), dtype_of(types), shape(given))
        if source is not None:
            calls.check_read(c, "encoder", "source", shape(source), dtype_of(source))
        if cache is not None:
            calls.check_blocks(c, stack, len(cache.blocks), shape(cache.blocks[0].key)[1])
        return stack

    def _encode(self, source: Array, lengths: Any, options: dict[str, Any]) -> tuple[Array, Any]:
        calls.check_read(self.config, "encoder", "source", shape(source), dtype_of(source))
        x, seen, _ = self.encoder.call(source, lengths=lengths, **options)
        return x, seen

    def _memories(self, encoded: Array, lengths: Any) -> tuple[Memory, ...]:
        return tuple([b.cross.memory(encoded, lengths=lengths) for b in self.decoder.blocks])

    def _capped(self, logits: Array) -> Array:
        cap = self.config.logit_softcap
        return logits if cap is None else cap * ops.tanh(logits / cap)

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
