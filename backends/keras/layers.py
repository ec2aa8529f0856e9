"""Attention layers for Keras: what `attn_core.model` says, in keras.layers' words."""

from __future__ import annotations

from os import PathLike
from typing import Any

import keras
import numpy as np
from keras import ops

from attn_core.api import attention
from attn_core.backends.keras.arguments import (
    as_is,
    bare,
    check_graph,
    in_our_words,
    leaf,
    padding_mask,
    padding_of,
    with_mask,
)
from attn_core.backends.keras.layer_parts import (
    Linear,
    Norm,
    Words,
    rotated,
    weights_dropout,
    words_of,
)
from attn_core.backends.keras.portable import Portable, opened
from attn_core.backends.keras.tensors import (
    Array,
    cache_dtype,
    indices,
    integers,
    known,
    merged,
    room,
    shape,
    tensor,
    within,
)
from attn_core.model import calls, fields
from attn_core.model.cache import Cache, Filling, LayerOutput, Memory, check_room, filling
from attn_core.model.config import AttentionConfig
from attn_core.model.positions import offset, turned
from attn_core.model.rules import Rules, joined_mask, joined_score, rules


@keras.saving.register_keras_serializable(package="attn_core")
class MultiHeadAttention(Portable):
    """Multi-head attention over (B, T, width), everything static in an AttentionConfig.

        q, k, v = query Wq + bq, key Wk + bk, value Wv + bv, cut into heads
        out = (attention(q, k, v) * gate) Wo + bo

    Args:
        config: AttentionConfig, a path or a mapping; its fields may also be given by name,
            `MultiHeadAttention(width=64, heads=4, causal=True)`.
        seed: of the first values, Xavier uniform: the same numbers in every framework.
        site: the number of this layer's stream of dropout, 0 on its own.
        dtype: of the parameters, or a policy of Keras such as "mixed_bfloat16". Left out, the
            config's, under the global policy where that has parameters of this dtype.
        name, trainable: as in every layer of Keras.

    The same class computes on TensorFlow, JAX and torch, whichever Keras runs on. The weights
    are those of layers `query`, `key`, `value`, `out` (and `gate`), norms `query_norm`,
    `key_norm`.

    Raises:
        TypeError, ValueError: a field of the config is unknown, or not of its form.

    Source: Vaswani et al., arXiv 1706.03762; config.py names those of the options.
    """

    rules: Rules
    wheel: Words

    def __init__(
        self,
        config: AttentionConfig | str | PathLike[str] | dict[str, Any] | None = None,
        *,
        seed: int = 0,
        site: int = 0,
        name: str | None = None,
        trainable: bool = True,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        c, policy = opened(AttentionConfig, config, dtype, options)
        fields.count("site", site, 0)
        super().__init__(c, policy, name=name, trainable=trainable)
        self.supports_masking = True
        self.seed, self.site = seed, site
        self.keep(rules=rules(c), wheel=words_of(c.rotary_base, turned(c)))
        s, make = c.sizes, {"dtype": policy, "trainable": trainable}
        with keras.name_scope(self.name):
            self.query = Linear(s.width, s.heads * s.head, c.bias, name="query", **make)
            self.key = Linear(s.key_input, s.kv_heads * s.head, c.bias, name="key", **make)
            self.value = Linear(s.value_input, s.kv_heads * s.value, c.bias, name="value", **make)
            self.query_norm = self.key_norm = self.gate = None
            if c.qk_norm:
                norm = (s.head, c.qk_norm, False, c.norm_epsilon)
                self.query_norm = Norm(*norm, name="query_norm", **make)
                self.key_norm = Norm(*norm, name="key_norm", **make)
            if c.gate:
                self.gate = Linear(s.width, s.heads * s.value, c.bias, name="gate", **make)
            self.out = Linear(s.heads * s.value, s.out, c.out_bias, name="out", **make)
        self.initialise(seed)

    @in_our_words
    def __call__(
        self, query: Any, key: Any = None, value: Any = None, *, mask: Any = None, **options: Any
    ) -> Any:
        """`call`, in which Keras has given the name `mask` to something else."""
        keys = {} if isinstance(key, Memory) else {"key": key, "value": value}
        calls.check_given("keras.ops.convert_to_tensor", query=query, **keys)
        calls.check_keyed(key, value)
        options = with_mask(options, mask)
        if "score" in options:
            options["score"] = leaf(options["score"])
        if key is None and options.get("query_mask") is None:
            options["query_mask"] = padding_of(query)
        found = super().__call__(tensor(query), tensor(key), tensor(value), **options)
        return LayerOutput(*found) if isinstance(found, tuple) else found

    def call(
        self,
        query: Array,
        key: Any = None,
        value: Array | None = None,
        *,
        attention_mask: Any = None,
        bias: Any = None,
        score: Any = None,
        kv_lengths: Any = None,
        q_lengths: Any = None,
        query_offset: Any = None,
        positions: Any = None,
        seed: Any = None,
        cache: Cache | None = None,
        return_weights: bool = False,
        training: bool | None = None,
        query_mask: Any = None,
        key_mask: Any = None,
        value_mask: Any = None,
    ) -> Any:
        """out (B, Tq, out), or LayerOutput(out, weights, cache) when an extra is asked for.

        Args:
            query: (B, Tq, width).
            key: (B, Tk, key_input); self-attention where left out. Or a Memory.
            value: (B, Tk, value_input); the key where left out. It needs a key.
            attention_mask: called `mask` where the layer is called, `layer(x, mask=..)`.
            mask, bias, score, kv_lengths, q_lengths, query_offset: as in `attn_core.attention`.
                A mask holds together with the config's; a score stands after ALiBi, before
                softcap.
            positions: int (Tq,) or (B, Tq), where rotary self-attention is to place its rows,
                instead of row + query_offset.
            seed: of a training step, an int or an integer scalar; read with dropout in training.
            cache: what earlier calls left (`make_cache`): the new rows stand after what it holds,
                and attend to that and to themselves. `q_lengths` says how many of them count. Steps
                give what one call gives where causal or a mask hides from each row those after it;
                else rows of one call see one another, and none of a later call.
            return_weights: also return the softmax weights (B, Hq, Tq, Tk), before dropout.
            training: as in every layer of Keras.
            query_mask, key_mask, value_mask: boolean (B, T), False = padding, which Keras hands on
                from layers before: the rows of padding see nothing, and nobody sees them.

        A row that may see no key, and a padded row, gives out's bias.

        Raises:
            TypeError, ValueError: an argument is not of its form, or the cache is full; nothing
                has been computed. Where the cache's lengths are traced, a row of the batch for
                which it has no room answers NaN instead.
        """
        c, own = self.config, key is None and value is None
        padding = padding_mask(query_mask, key_mask, value_mask, key)
        memory = key if isinstance(key, Memory) else None
        if key is None and cache is None and query_offset is None and shape(query)[1] is None:
            query_offset = 0  # of unknown sizes, too: keys are the rows themselves
        if memory is None:
            key = query if key is None else key
            value = key if value is None else value
        self._check(query, key, value, memory, cache, kv_lengths, query_offset)
        if padding is not None and cache is not None:
            raise ValueError(
                "a padding mask of Keras must be left out with a cache, which says how many rows "
                "count by `q_lengths`. Got one: give the layer's input without its mask."
            )
        if positions is not None:
            positions = integers("positions", positions)
            calls.check_positions(c, shape(positions), shape(query), own)
            positions = ops.reshape(positions, (-1, ops.shape(query)[1]))

        fill = None
        if cache is not None:
            fill = self._filling(cache, query, q_lengths)
            query_offset, kv_lengths = cache.lengths, fill.lengths
            positions = fill.positions if positions is None else positions
        if memory is not None:
            k, v, kv_lengths = memory
        else:
            k, v = self._keys(key, value, positions)
        q = self._split(self.query(query), c.sizes.heads)
        if self.query_norm is not None:
            q = self.query_norm(q)
        if c.positions == "rotary":
            if positions is None:
                positions = starts(q, k, kv_lengths, q_lengths, query_offset) + indices(q)
            q = rotated(q, self.wheel, positions, c.rotary_pairs)
        if cache is not None and fill is not None:
            k, v = _filled(cache.key, k, fill), _filled(cache.value, v, fill)
            cache = Cache(k, v, fill.lengths)
        k, v = ops.cast(k, q.dtype), ops.cast(v, q.dtype)

        found = attention(
            q,
            k,
            v,
            mask=joined_mask(joined_mask(self.rules.mask, padding), bare(attention_mask)),
            bias=bias,
            score=joined_score(self.rules, bare(score)),
            scale=c.scale,
            kv_lengths=kv_lengths,
            q_lengths=q_lengths,
            query_offset=query_offset,
            dropout=weights_dropout(c.dropout, seed, self.site, training),
            layout="BTHD",
            impl=c.impl,
            return_weights=return_weights,
        )
        out = merged(found.out if return_weights else found)
        if self.gate is not None:
            out = out * ops.sigmoid(self.gate(query))
        out = self.out(out)
        if fill is not None and not known(fill.full):
            out = ops.where(fill.full[:, None, None], ops.full_like(out, np.nan), out)
        if cache is None and not return_weights:
            return out
        return LayerOutput(out, found.weights if return_weights else None, cache)

    def compute_output_spec(
        self,
        query: Any,
        key: Any = None,
        value: Any = None,
        *,
        kv_lengths: Any = None,
        query_offset: Any = None,
        cache: Any = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Any:
        """The same of KerasTensors: out, or (out, weights), which `__call__` gives their names."""
        read = {name: options.get(name) for name in ("seed", "score")}
        check_graph(mask=options.get("attention_mask"), **read)
        memory = key if isinstance(key, Memory) else None
        if memory is None:
            key = query if key is None else key
            value = key if value is None else value
        self._check(query, key, value, memory, cache, kv_lengths, query_offset)
        if cache is not None:
            raise ValueError(
                "`cache` must hold tensors: a graph of KerasTensors keeps none. Got a symbolic "
                "call, which a keras.Model with a `call` of its own makes with tensors."
            )
        c, (batch, rows, _) = self.config, query.shape
        out = keras.KerasTensor((batch, rows, c.sizes.out), dtype=self.compute_dtype)
        if not return_weights:
            return out
        keys = memory.key.shape[1] if memory is not None else key.shape[1]
        seen = (batch, c.heads, rows, keys)
        return out, keras.KerasTensor(seen, dtype=self.compute_dtype)

    def compute_output_shape(self, query_shape: Any, *others: Any, **named: Any) -> Any:
        """(B, Tq, out), whatever keys and values are."""
        return (*query_shape[:2], self.config.sizes.out)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes an equal layer of; weights apart."""
        return {
            "config": self.config.to_mapping(),
            "seed": self.seed,
            "site": self.site,
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    @as_is
    def make_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty Cache of `length` slots; in the policy's compute dtype, or in other floats."""
        calls.check_slots(batch, length)
        s, dtype = self.config.sizes, self.compute_dtype if dtype is None else cache_dtype(dtype)
        return Cache(
            ops.zeros((batch, length, s.kv_heads, s.head), dtype),
            ops.zeros((batch, length, s.kv_heads, s.value), dtype),
            ops.zeros((batch,), "int32"),
        )

    @as_is
    def memory(self, key: Array, value: Array | None = None, lengths: Any = None) -> Memory:
        """A source projected once, to be given as `key` to many calls of cross-attention."""
        calls.check_given("keras.ops.convert_to_tensor", key=key, value=value)
        key, value = tensor(key), tensor(key if value is None else value)
        query = (shape(key)[0], 0, self.config.width)
        calls.check_inputs(self.config.sizes, query, shape(key), shape(value))
        if lengths is not None:
            lengths = _checked(lengths, shape(key)[1])
        return Memory(*self._keys(key, value, None), lengths)

    def _check(
        self,
        query: Array,
        key: Any,
        value: Any,
        memory: Memory | None,
        cache: Cache | None,
        kv_lengths: Any,
        query_offset: Any,
    ) -> None:
        c = self.config
        if memory is not None:
            calls.check_memory(value, kv_lengths, cache)
            calls.check_inputs(c.sizes, shape(query), None, ())
            kept = shape(memory.key), shape(memory.value)
            calls.check_kept("key", c, *kept, shape(query))
        else:
            calls.check_inputs(c.sizes, shape(query), shape(key), shape(value))
        if cache is not None:
            calls.check_kind("cache", cache, Cache)
            kept = shape(cache.key), shape(cache.value)
            calls.check_kept("cache", c, *kept, shape(query))
            size = shape(cache.key)[1]
            calls.check_cached(shape(query), shape(key), size, kv_lengths, query_offset)

    def _split(self, x: Array, heads: int) -> Array:
        """(B, T, H D) into (B, T, H, D)."""
        return ops.reshape(x, (*ops.shape(x)[:2], heads, x.shape[-1] // heads))

    def _keys(self, key: Array, value: Array, positions: Any) -> tuple[Array, Array]:
        """Keys and values of new rows; keys normed, and turned by their own index if not told."""
        c = self.config
        k = self._split(self.key(key), c.sizes.kv_heads)
        v = self._split(self.value(value), c.sizes.kv_heads)
        if self.key_norm is not None:
            k = self.key_norm(k)
        if c.positions == "rotary":
            at = indices(k) if positions is None else positions
            k = rotated(k, self.wheel, at, c.rotary_pairs)
        return k, v

    def _filling(self, cache: Cache, query: Array, q_lengths: Any) -> Filling:
        (batch, rows), size = ops.shape(query)[:2], ops.shape(cache.key)[1]
        counts = integers("q_lengths", rows if q_lengths is None else q_lengths)
        calls.check_lengths("q_lengths", shape(counts), shape(query))
        counts = ops.broadcast_to(within(counts, 0, rows), (batch,))
        if known(cache.lengths) and known(counts):
            read = room().to_numpy
            check_room(read(cache.lengths), read(counts), size)
        return filling(cache.lengths, counts, indices(query)[0], indices(cache.key)[0], size)


def starts(q: Array, k: Array, kv_lengths: Any, q_lengths: Any, query_offset: Any) -> Array:
    """Where row 0 of a query without a cache stands, int32 (B or 1, 1)."""
    rows, keys = ops.shape(q)[1], ops.shape(k)[1]
    if kv_lengths is not None:
        kv_lengths = within(integers("kv_lengths", kv_lengths), 0, keys)
    if q_lengths is not None:
        q_lengths = within(integers("q_lengths", q_lengths), 0, rows)
    if query_offset is None:
        rows, keys = shape(q)[1], shape(k)[1]
    start = offset(query_offset, kv_lengths, q_lengths, rows, keys)
    return ops.reshape(integers("query_offset", start), (-1, 1))


def _filled(held: Array, new: Array, fill: Filling) -> Array:
    """A cache's array with the new rows in their slots: another array, the old one stays."""
    if new.shape[1] == 0:
        return held
    taken = new  # of one row, which every slot that is written takes
    if new.shape[1] != 1:
        if not isinstance(new.shape[1], int):
            new = ops.pad(new, ((0, 0), (0, 1), (0, 0), (0, 0)))  # there may turn out to be none
        batch, rows = ops.shape(new)[:2]
        flat = ops.reshape(new, (batch * rows, *new.shape[2:]))
        source = within(fill.source, 0, rows - 1) + ops.arange(batch, dtype="int32")[:, None] * rows
        taken = ops.take(flat, source, axis=0)
    return ops.where(fill.written[:, :, None, None], ops.cast(taken, held.dtype), held)


def _checked(lengths: Any, keys: int | None) -> Array:
    """A Memory's lengths as a tensor; host values are refused where they are out of range."""
    if not ops.is_tensor(lengths):
        host = np.asarray(lengths)
        if host.size and (host.min() < 0 or (keys is not None and host.max() > keys)):
            raise ValueError(f"`lengths` must be from 0 to Tk = {keys}. Got {lengths}.")
    return integers("lengths", lengths)
