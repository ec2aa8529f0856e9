"""Attention layers for JAX: what `attn_core.model` says, in flax.nnx's words."""

from __future__ import annotations

from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_core.api import attention
from attn_core.backends.jax.arrays import DTYPES, x64
from attn_core.backends.jax.layer_parts import (
    Array,
    Linear,
    Norm,
    indices,
    integers,
    known,
    made,
    rotated,
    rules,
    shape,
    weights_dropout,
    wheel,
    widened,
)
from attn_core.backends.jax.portable import Portable
from attn_core.model import calls, fields
from attn_core.model.cache import Cache, Filling, LayerOutput, Memory, check_room, filling
from attn_core.model.config import AttentionConfig
from attn_core.model.positions import offset, turned
from attn_core.model.rules import Rules, joined_mask, joined_score
from attn_core.model.words import in_our_words


class MultiHeadAttention(Portable):
    """Multi-head attention over (B, T, width), everything static in an AttentionConfig.

        q, k, v = query Wq + bq, key Wk + bk, value Wv + bv, cut into heads
        out = (attention(q, k, v) * gate) Wo + bo

    Args:
        config: AttentionConfig, a path or a mapping; its fields may also be given by name,
            `MultiHeadAttention(width=64, heads=4, causal=True)`.
        seed: of the first values, Xavier uniform: the same numbers in every framework.
        site: the number of this layer's stream of dropout, 0 on its own.

    The weights are nnx.Param, (in, out), in the modules `query`, `key`, `value`, `out` (and
    `gate`), norms `query_norm`, `key_norm`. Training is what nnx.Module.train() and .eval() set,
    `deterministic`; a new layer trains. float64 needs no setting in a call; under jax.jit and
    jax.grad it needs jax_enable_x64, as everywhere in JAX.

    Raises:
        TypeError, ValueError: a field of the config is unknown, or not of its form.

    Source: Vaswani et al., arXiv 1706.03762; config.py names those of the options.
    """

    def __init__(
        self,
        config: AttentionConfig | str | PathLike[str] | dict[str, Any] | None = None,
        *,
        seed: int = 0,
        site: int = 0,
        **options: Any,
    ) -> None:
        self.config = c = AttentionConfig.of(config, **options)
        fields.count("site", site, 0)
        self.site, self.deterministic = site, False
        s, make = c.sizes, made(c)
        self.query = Linear(s.width, s.heads * s.head, c.bias, **make)
        self.key = Linear(s.key_input, s.kv_heads * s.head, c.bias, **make)
        self.value = Linear(s.value_input, s.kv_heads * s.value, c.bias, **make)
        self.query_norm = (
            Norm(s.head, c.qk_norm, False, c.norm_epsilon, **make) if c.qk_norm else None
        )
        self.key_norm = (
            Norm(s.head, c.qk_norm, False, c.norm_epsilon, **make) if c.qk_norm else None
        )
        self.gate = Linear(s.width, s.heads * s.value, c.bias, **make) if c.gate else None
        self.out = Linear(s.heads * s.value, s.out, c.out_bias, **make)
        self.initialise(seed)

    @in_our_words
    @widened
    def __call__(
        self,
        query: Array,
        key: Any = None,
        value: Array | None = None,
        *,
        mask: Any = None,
        bias: Any = None,
        score: Any = None,
        kv_lengths: Any = None,
        q_lengths: Any = None,
        query_offset: Any = None,
        positions: Any = None,
        seed: Any = None,
        cache: Cache | None = None,
        return_weights: bool = False,
    ) -> Any:
        """out (B, Tq, out), or LayerOutput(out, weights, cache) when an extra is asked for.

        Args:
            query: (B, Tq, width).
            key: (B, Tk, key_input); self-attention where left out. Or a Memory.
            value: (B, Tk, value_input); the key where left out. It needs a key.
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

        A row that may see no key, and a padded row, gives out's bias.

        Raises:
            TypeError, ValueError: an argument is not of its form, or the cache is full; nothing
                has been computed. Where the cache's lengths are traced, a row of the batch for
                which it has no room answers NaN instead.
        """
        calls.check_keyed(key, value)
        c, own = self.config, key is None
        memory = key if isinstance(key, Memory) else None
        if memory is None:
            key = query if key is None else key
            value = key if value is None else value
            calls.check_given("jnp.asarray", query=query, key=key, value=value)
        else:
            calls.check_given("jnp.asarray", query=query)
        self._check(query, key, value, memory, cache, kv_lengths, query_offset)
        if positions is not None:
            positions = integers("positions", positions)
            calls.check_positions(c, shape(positions), shape(query), own)
            positions = positions if positions.ndim == 2 else positions[None]
        if own and query_offset is None and shape(query)[1] is None:
            query_offset = 0  # one array's rows are as many as its rows, told or not

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
            k, v = k.astype(q.dtype), v.astype(q.dtype)

        found = attention(
            q,
            k,
            v,
            mask=joined_mask(self.rules.mask, mask),
            bias=bias,
            score=joined_score(self.rules, score),
            scale=c.scale,
            kv_lengths=kv_lengths,
            q_lengths=q_lengths,
            query_offset=query_offset,
            dropout=weights_dropout(c.dropout, seed, self.site, not self.deterministic),
            layout="BTHD",
            impl=c.impl,
            return_weights=return_weights,
        )
        out = found.out if return_weights else found
        out = out.reshape(*out.shape[:2], c.sizes.heads * c.sizes.value)
        if self.gate is not None:
            out = out * jax.nn.sigmoid(self.gate(query))
        out = self.out(out)
        if fill is not None and not known(fill.full):
            out = jnp.where(fill.full[:, None, None], jnp.nan, out)
        if cache is None and not return_weights:
            return out
        return LayerOutput(out, found.weights if return_weights else None, cache)

    def make_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty Cache of `length` slots; in the dtype of the weights, or in other floats."""
        calls.check_slots(batch, length)
        s, like = self.config.sizes, self.query.weight
        dtype = like.dtype if dtype is None else DTYPES[calls.cache_dtype(dtype, DTYPES)]
        make = {"dtype": jnp.dtype(dtype)}
        with x64(make["dtype"] == jnp.float64):
            return Cache(
                jnp.zeros((batch, length, s.kv_heads, s.head), **make),
                jnp.zeros((batch, length, s.kv_heads, s.value), **make),
                jnp.zeros(batch, dtype=jnp.int32),
            )

    @widened
    def memory(self, key: Array, value: Array | None = None, lengths: Any = None) -> Memory:
        """A source projected once, to be given as `key` to many calls of cross-attention."""
        value = key if value is None else value
        calls.check_given("jnp.asarray", key=key, value=value)
        query = (shape(key)[0], 0, self.config.width)
        calls.check_inputs(self.config.sizes, query, shape(key), shape(value))
        return Memory(*self._keys(key, value, None), lengths)

    @property
    def rules(self) -> Rules:
        """The masks and scores of the config."""
        return rules(self.config)

    @property
    def wheel(self) -> np.ndarray:
        """How far channel pairs turn, int32 (2, pairs)."""
        return wheel(self.config.rotary_base, turned(self.config))

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
            held = shape(memory.key), shape(memory.value)
            calls.check_kept("key", c, *held, shape(query))
        else:
            calls.check_inputs(c.sizes, shape(query), shape(key), shape(value))
        if cache is not None:
            calls.check_kind("cache", cache, Cache)
            held = shape(cache.key), shape(cache.value)
            calls.check_kept("cache", c, *held, shape(query))
            size = held[0][1]
            calls.check_cached(shape(query), shape(key), size, kv_lengths, query_offset)

    def _split(self, x: Array, heads: int) -> Array:
        """(B, T, H D) into (B, T, H, D)."""
        return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

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
        rows, size = query.shape[1], cache.key.shape[1]
        told = rows if q_lengths is None else q_lengths
        given = integers("q_lengths", told)
        calls.check_lengths("q_lengths", shape(given), shape(query))
        if known(cache.lengths) and known(told) and isinstance(rows, int):
            counts = np.broadcast_to(np.clip(told, 0, rows), query.shape[:1])
            check_room(np.asarray(cache.lengths), counts, size)
        counts = jnp.broadcast_to(given.clip(0, rows), query.shape[:1])
        return filling(cache.lengths, counts, indices(query)[0], indices(cache.key)[0], size)


def starts(q: Array, k: Array, kv_lengths: Any, q_lengths: Any, query_offset: Any) -> Array:
    """Where row 0 of a query without a cache stands, int32 (B or 1, 1)."""
    rows, keys = q.shape[1], k.shape[1]
    if kv_lengths is not None:
        kv_lengths = integers("kv_lengths", kv_lengths).clip(0, keys)
    if q_lengths is not None:
        q_lengths = integers("q_lengths", q_lengths).clip(0, rows)
    start = offset(query_offset, kv_lengths, q_lengths, rows, keys)
    return integers("query_offset", start).reshape(-1, 1)


def _filled(held: Array, new: Array, fill: Filling) -> Array:
    """A cache's array with the new rows in their slots: another array, the old one stays."""
    rows = new.shape[1]
    if rows == 0:
        return held
    taken = new  # of one row, which every slot that is written takes
    if rows > 1:
        source = fill.source.clip(0, rows - 1)
        taken = jnp.take_along_axis(new, source[:, :, None, None], 1, mode="clip")
    return jnp.where(fill.written[:, :, None, None], taken.astype(held.dtype), held)
