"""Additive attention for Keras, in linear memory."""

from __future__ import annotations

from os import PathLike
from typing import Any

import keras
from keras import ops

from attn_core import masks
from attn_core.api import attention
from attn_core.backends.keras.arguments import (
    bare,
    check_graph,
    in_our_words,
    padding_mask,
    with_mask,
)
from attn_core.backends.keras.layer_parts import Linear, weights_dropout
from attn_core.backends.keras.layers import starts
from attn_core.backends.keras.portable import Portable, opened
from attn_core.backends.keras.tensors import Array, integers, product, shape, tanh, tensor, within
from attn_core.language.values import Mask
from attn_core.model import additive, calls, fields
from attn_core.model.additive import AdditiveConfig, tile
from attn_core.model.cache import LayerOutput
from attn_core.model.rules import at_rows, joined_mask


@keras.saving.register_keras_serializable(package="attn_core")
class AdditiveAttention(Portable):
    """Attention by a small network (Bahdanau et al., arXiv 1409.0473), in linear memory.

        s[i, j] = score . tanh(query_i Wq + key_j Wk + bias)
        out_i = sum over allowed j of softmax(s)[i, j] value_j

    Args:
        config: AdditiveConfig, a path or a mapping; its fields may also be given by name.
        seed: of the first values: the same numbers in every framework.
        site: the number of this layer's stream of dropout.
        dtype: of the parameters, or a policy of Keras; as in MultiHeadAttention.
        name, trainable: as in every layer of Keras.

    Raises:
        TypeError, ValueError: a field of the config is unknown, or not of its form.
    """

    causal: Mask | None

    def __init__(
        self,
        config: AdditiveConfig | str | PathLike[str] | dict[str, Any] | None = None,
        *,
        seed: int = 0,
        site: int = 0,
        name: str | None = None,
        trainable: bool = True,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        c, policy = opened(AdditiveConfig, config, dtype, options)
        fields.count("site", site, 0)
        super().__init__(c, policy, name=name, trainable=trainable)
        self.supports_masking = True
        self.seed, self.site = seed, site
        self.keep(causal=masks.causal() if c.causal else None)
        s, make = c.sizes, {"dtype": policy, "trainable": trainable}
        with keras.name_scope(self.name):
            self.query = Linear(s.query_input, s.width, False, name="query", **make)
            self.key = Linear(s.key_input, s.width, False, name="key", **make)
        self.bias = self.add_weight((s.width,), "zeros", name="bias")
        self.score = self.add_weight((s.width,), "zeros", name="score")
        self.initialise(seed)

    @in_our_words
    def __call__(
        self, query: Any, key: Any, value: Any = None, *, mask: Any = None, **options: Any
    ) -> Any:
        """`call`, in which Keras has given the name `mask` to something else."""
        calls.check_given("keras.ops.convert_to_tensor", query=query, key=key, value=value)
        options = with_mask(options, mask)
        found = super().__call__(tensor(query), tensor(key), tensor(value), **options)
        return LayerOutput(*found) if isinstance(found, tuple) else found

    def call(
        self,
        query: Array,
        key: Array,
        value: Array | None = None,
        *,
        attention_mask: Any = None,
        kv_lengths: Any = None,
        q_lengths: Any = None,
        query_offset: Any = None,
        seed: Any = None,
        return_weights: bool = False,
        training: bool | None = None,
        query_mask: Any = None,
        key_mask: Any = None,
        value_mask: Any = None,
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
        calls.check_additive(self.config, shape(query), shape(key), shape(value))
        (batch, rows), keys = ops.shape(query)[:2], ops.shape(key)[1]
        mask = bare(attention_mask)
        calls.check_rows(mask, shape(query)[1])
        mask = joined_mask(self.causal, mask)
        mask = joined_mask(padding_mask(query_mask, key_mask, value_mask, key), mask)
        reads = isinstance(mask, Mask) and mask.tree.reads("q")
        if query_offset is None and not reads:
            query_offset = 0
        first = starts(query, key, kv_lengths, q_lengths, query_offset)
        first = ops.broadcast_to(ops.reshape(first, (-1,)), (batch,))
        drop = weights_dropout(self.config.dropout, seed, self.site, training)
        q = self.query(query)
        q, k = q + ops.cast(self.bias, q.dtype), self.key(key)
        value, score = ops.cast(value, q.dtype), ops.cast(self.score, q.dtype)
        if q_lengths is not None:
            q_lengths = within(integers("q_lengths", q_lengths), 0, rows)
        size, tiles = self._tiles(batch, rows, keys)
        ends = q_lengths
        mask = mask if size is None else _by_rows(mask)

        def part(q: Array, k: Array, value: Array, score: Array, start: Any = None) -> Any:
            s = product(tanh(q[:, :, None] + k[:, None]), score[:, None])[..., 0]
            found = attention(
                ops.zeros_like(q[:, None, :, :1]),
                ops.zeros_like(k[:, None, :, :1]),
                value[:, None],
                bias=s[:, None],
                mask=mask if start is None else _tile_mask(mask, start, shape(query)[1]),
                kv_lengths=kv_lengths,
                q_lengths=q_lengths if start is None else within(ends - start, 0, size),
                query_offset=first if start is None else first + start,
                dropout=drop,
                impl=self.config.impl,
                return_weights=return_weights,
            )
            return (found.out, found.weights) if return_weights else (found,)

        if size is None:
            found = part(q, k, value, score)
        else:
            # The last tile is filled up with rows that count for nothing.
            ends = integers("q_lengths", rows if ends is None else ends)
            ends = ops.broadcast_to(ends, (batch,))
            filled = ops.zeros((batch, tiles * size - rows, self.config.width), q.dtype)
            cut = ops.concatenate([q, filled], 1)
            cut = ops.reshape(cut, (batch, tiles, size, self.config.width))
            cut = ops.transpose(cut, (1, 0, 2, 3))
            starting = ops.arange(tiles, dtype="int32") * size

            def step(given: Any) -> Any:
                # Of a tile nothing is kept but what it was made from: it is computed again
                # backward. TensorFlow has gradients of arguments alone, and warns of integers.
                again = keras.remat(lambda q, k, v, score: part(q, k, v, score, given[1]))
                return tuple(again(given[0], k, value, score))

            found = [_joined(x, rows) for x in ops.map(step, (cut, starting))]
        out = found[0][:, 0]
        return LayerOutput(out, found[1]) if return_weights else out

    def compute_output_spec(
        self,
        query: Any,
        key: Any,
        value: Any = None,
        *,
        return_weights: bool = False,
        **options: Any,
    ) -> Any:
        """The same of KerasTensors: out, or (out, weights), which `__call__` gives their names."""
        check_graph(seed=options.get("seed"), mask=options.get("attention_mask"))
        value = key if value is None else value
        calls.check_additive(self.config, shape(query), shape(key), shape(value))
        batch, rows, _ = query.shape
        out = keras.KerasTensor((batch, rows, value.shape[2]), dtype=self.compute_dtype)
        if not return_weights:
            return out
        seen = (batch, 1, rows, key.shape[1])
        return out, keras.KerasTensor(seen, dtype=self.compute_dtype)

    def compute_output_shape(
        self, query_shape: Any, key_shape: Any, value_shape: Any = None, **named: Any
    ) -> Any:
        """(B, Tq, Dv)."""
        return (*query_shape[:2], (key_shape if value_shape is None else value_shape)[2])

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

    def _tiles(self, batch: Any, rows: Any, keys: Any) -> tuple[Any, Any]:
        """Rows of a tile, and how many tiles; None and 1 where one tile holds all.

        So it does where sizes are symbols of JAX, which has no loop of a symbolic length.
        """
        sizes, width = (batch, rows, keys), self.config.width
        if all(isinstance(n, int) for n in sizes):
            size = tile(batch, keys, width)
            return (None, 1) if rows <= size else (size, -(-rows // size))
        if not all(isinstance(n, int) or ops.is_tensor(n) for n in sizes):
            return None, 1
        # `tile`, of numbers that a tf.function does not know.
        least = ops.maximum(rows, 1)
        size = additive.PAIRS // width // ops.maximum(keys, 1) // ops.maximum(batch, 1)
        size = within(size, 1, least)
        return size, (least + size - 1) // size


def _joined(tiles: Array, rows: Any) -> Array:
    """(tiles, B, 1, rows of a tile, ..) as (B, 1, rows, ..)."""
    whole = ops.transpose(tiles, (1, 2, 0, 3, 4))
    count, batch, _, size, width = ops.shape(tiles)
    return ops.reshape(whole, (batch, 1, count * size, width))[:, :, :rows]


def _by_rows(mask: Any) -> Any:
    """A mask that can be cut into rows: an array that differs from row to row as a Mask."""
    if mask is None or isinstance(mask, Mask):
        return mask
    given: Any = getattr(mask, "shape", ())
    if len(given) not in (2, 4) or given[-2] == 1 or "bool" not in str(mask.dtype):
        return mask  # alike for every row, or for `attention` to refuse
    return masks.dense(mask)


def _tile_mask(mask: Any, start: Array, rows: int | None) -> Any:
    """A mask as the rows from `start` on see it."""
    if not isinstance(mask, Mask) or not mask.tree.reads("row"):
        return mask
    return at_rows(mask, start, 2**30 if rows is None else rows)
