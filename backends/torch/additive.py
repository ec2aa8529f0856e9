"""Additive attention for torch, in linear memory."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from attn_core import masks
from attn_core.api import attention
from attn_core.backends.torch.layer_parts import (
    Array,
    check_dtype,
    check_tensors,
    integers,
    linear,
    made,
    weights_dropout,
)
from attn_core.backends.torch.layers import starts
from attn_core.backends.torch.portable import Portable
from attn_core.language.values import Mask
from attn_core.model import calls, fields
from attn_core.model.additive import AdditiveConfig, tile
from attn_core.model.cache import LayerOutput
from attn_core.model.parameters import parameters
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
        device: of the parameters.

    Raises:
        TypeError, ValueError: a field of the config is unknown, or not of its form.
    """

    def __init__(
        self,
        config: AdditiveConfig | str | PathLike[str] | dict[str, Any] | None = None,
        *,
        seed: int = 0,
        site: int = 0,
        device: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = c = AdditiveConfig.of(config, **options)
        fields.count("site", site, 0)
        self.plan, self.site = parameters(c), site
        self.causal = masks.causal() if c.causal else None
        s, make = c.sizes, made(c, device)
        self.query = linear(s.query_input, s.width, False, **make)
        self.key = linear(s.key_input, s.width, False, **make)
        self.bias = torch.nn.Parameter(torch.empty(s.width, **make))
        self.score = torch.nn.Parameter(torch.empty(s.width, **make))
        self.initialise(seed)

    @in_our_words
    def forward(
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
        check_tensors(query=query, key=key, value=value)
        check_dtype(self.query, query=query)
        check_dtype(self.key, key=key)
        calls.check_additive(self.config, query.shape, key.shape, value.shape)
        batch, rows, keys = query.shape[0], query.shape[1], key.shape[1]
        calls.check_rows(mask, rows)
        mask = joined_mask(self.causal, mask)
        reads = isinstance(mask, Mask) and mask.tree.reads("q")
        if query_offset is None and not reads:
            query_offset = 0
        first = starts(query, key, kv_lengths, q_lengths, query_offset).reshape(-1).expand(batch)
        drop = weights_dropout(self.config.dropout, seed, self.site, self.training)
        q, k = self.query(query) + self.bias, self.key(key)
        value = value.to(q.dtype)
        if q_lengths is not None:
            q_lengths = integers("q_lengths", q_lengths, query.device).clamp(0, rows)
        size = tile(batch, keys, self.config.width)

        def part(q: Array, k: Array, value: Array, score: Array, start: int) -> Any:
            s = torch.tanh(q[:, :, None] + k[:, None]) @ score.to(q.dtype)
            found = attention(
                torch.zeros_like(q[:, None, :, :1]),
                torch.zeros_like(k[:, None, :, :1]),
                value[:, None],
                bias=s[:, None],
                mask=_tile_mask(mask, start, size, rows),
                kv_lengths=kv_lengths,
                q_lengths=None if q_lengths is None else (q_lengths - start).clamp(0, q.shape[1]),
                query_offset=first + start,
                dropout=drop,
                impl=self.config.impl,
                return_weights=return_weights,
            )
            return (found.out, found.weights) if return_weights else (found, found)

        parts = []
        for start in range(0, max(rows, 1), size):
            given = (q[:, start : start + size], k, value, self.score, start)
            # Of a tile nothing is kept but what it was made from: it is computed again backward.
            parts.append(
                checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False)
                if rows > size and torch.is_grad_enabled()
                else part(*given)
            )
        out = torch.cat([one[0] for one in parts], 2)[:, 0]
        if not return_weights:
            return out
        return LayerOutput(out, torch.cat([one[1] for one in parts], 2))


def _tile_mask(mask: Any, start: int, size: int, rows: int) -> Any:
    """A mask as the rows from `start` on see it."""
    if mask is None or rows <= size:
        return mask
    if not isinstance(mask, Mask):
        shape: Any = getattr(mask, "shape", ())
        if len(shape) not in (2, 4) or shape[-2] == 1:
            return mask  # alike for every row, or for `attention` to refuse
        return mask[..., start : start + size, :]
    return at_rows(mask, start) if mask.tree.reads("row") else mask
