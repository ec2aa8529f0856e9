"""Additive attention for JAX, in linear memory."""

from __future__ import annotations

from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp

from attn_core import masks
from attn_core.api import attention
from attn_core.backends.jax.layer_parts import (
    Array,
    Linear,
    blank,
    integers,
    made,
    shape,
    weights_dropout,
    widened,
)
from attn_core.backends.jax.layers import starts
from attn_core.backends.jax.portable import Portable
from attn_core.language.values import Mask
from attn_core.model import calls, fields
from attn_core.model.additive import AdditiveConfig, tile
from attn_core.model.cache import LayerOutput
from attn_core.model.rules import at_rows, joined_mask
from attn_core.model.words import in_our_words


class AdditiveAttention(Portable):
    """Attention by a small network (Bahdanau et al., arXiv 1409.0473), in linear memory.

        s[i, j] = score . tanh(query_i Wq + key_j Wk + bias)
        out_i = sum over allowed j of softmax(s)[i, j] value_j

    Args:
        config: AdditiveConfig, a path or a mapping; its fields may also be given by name.
        seed: of the first values: the same numbers in every framework.
        site: the number of this layer's stream of dropout.

    Raises:
        TypeError, ValueError: a field of the config is unknown, or not of its form.
    """

    def __init__(
        self,
        config: AdditiveConfig | str | PathLike[str] | dict[str, Any] | None = None,
        *,
        seed: int = 0,
        site: int = 0,
        **options: Any,
    ) -> None:
        self.config = c = AdditiveConfig.of(config, **options)
        fields.count("site", site, 0)
        self.site, self.deterministic = site, False
        s, make = c.sizes, made(c)
        self.query = Linear(s.query_input, s.width, False, **make)
        self.key = Linear(s.key_input, s.width, False, **make)
        self.bias = blank((s.width,), **make)
        self.score = blank((s.width,), **make)
        self.initialise(seed)

    @in_our_words
    @widened
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array | None = None,
        *,
        mask: Any = None,
        kv_lengths: Any = None,
        q_lengths: Any = None,
        query_offset: Any = None,
        seed: Any = None,
        return_weights: bool = False,
    ) -> Any:
        """out (B, Tq, Dv), or LayerOutput(out, weights (B, 1, Tq, Tk), None).

        Args:
            query: (B, Tq, query_input).
            key: (B, Tk, key_input).
            value: (B, Tk, Dv); the key where left out.
            The others are those of MultiHeadAttention.

        Raises:
            TypeError, ValueError: an argument is not of its form.
        """
        value = key if value is None else value
        calls.check_given("jnp.asarray", query=query, key=key, value=value)
        calls.check_additive(self.config, shape(query), shape(key), shape(value))
        batch, rows, keys = query.shape[0], query.shape[1], key.shape[1]
        calls.check_rows(mask, shape(query)[1])
        mask = joined_mask(masks.causal() if self.config.causal else None, mask)
        reads = isinstance(mask, Mask) and mask.tree.reads("q")
        if query_offset is None and not reads:
            query_offset = 0
        first = starts(query, key, kv_lengths, q_lengths, query_offset).reshape(-1)
        first = jnp.broadcast_to(first, (batch,))
        drop = weights_dropout(self.config.dropout, seed, self.site, not self.deterministic)
        q, k = self.query(query) + self.bias[...], self.key(key)
        value = value.astype(q.dtype)
        if q_lengths is not None:
            q_lengths = integers("q_lengths", q_lengths).clip(0, rows)
        told = isinstance(rows, int) and isinstance(keys, int) and isinstance(batch, int)
        size = tile(batch, keys, self.config.width) if told else rows

        def part(q: Array, start: Any) -> Any:
            s = jnp.tanh(q[:, :, None] + k[:, None]) @ self.score[...].astype(q.dtype)
            found = attention(
                jnp.zeros_like(q[:, None, :, :1]),
                jnp.zeros_like(k[:, None, :, :1]),
                value[:, None],
                bias=s[:, None],
                mask=mask if start is None else _tile_mask(mask, start, rows),
                kv_lengths=kv_lengths,
                q_lengths=q_lengths if start is None else (ends - start).clip(0, size),
                query_offset=first if start is None else first + start,
                dropout=drop,
                impl=self.config.impl,
                return_weights=return_weights,
            )
            return found if return_weights else LayerOutput(found)

        if not told or rows <= size:
            found = part(q, None)
            out, weights = found.out, found.weights
        else:
            # The last tile is filled up with rows that count for nothing.
            ends = jnp.full((batch,), rows) if q_lengths is None else q_lengths
            tiles = -(-rows // size)
            cut = jnp.pad(q, ((0, 0), (0, tiles * size - rows), (0, 0)))
            cut = cut.reshape(batch, tiles, size, -1).swapaxes(0, 1)
            # Of a tile nothing is kept but what it was made from: it is computed again backward.
            again = jax.checkpoint(part, prevent_cse=False)
            starting = jnp.arange(tiles, dtype=jnp.int32) * size
            _, found = jax.lax.scan(lambda _, x: (None, again(*x)), None, (cut, starting))
            out = _joined(found.out, rows)
            weights = _joined(found.weights, rows) if return_weights else None
        return LayerOutput(out[:, 0], weights) if return_weights else out[:, 0]


def _joined(tiles: Array, rows: int) -> Array:
    """(tiles, B, 1, rows of a tile, ..) as (B, 1, rows, ..)."""
    whole = jnp.moveaxis(tiles, 0, 2)
    return whole.reshape(*whole.shape[:2], -1, whole.shape[-1])[:, :, :rows]


def _tile_mask(mask: Any, start: Array, rows: int) -> Any:
    """A mask as the rows from `start` on see it."""
    if not isinstance(mask, Mask):
        given: Any = getattr(mask, "shape", ())
        if len(given) not in (2, 4) or given[-2] != rows or "bool" not in str(mask.dtype):
            return mask  # alike for every row, or for `attention` to refuse
        mask = masks.dense(mask)
    return at_rows(mask, start, rows) if mask.tree.reads("row") else mask
