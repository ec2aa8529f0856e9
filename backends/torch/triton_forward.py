"""The forward kernel on torch tensors: how it is cut up, and what it is launched with.

Many queries are cut into tiles of rows, a program to each. Few (decoding) leave most of a GPU
idle so, and spend their time on reading keys; then

    rows of a tile   are those of all heads of a group, which read the same keys once
    keys             are shared out among as many programs as fill the device, whose parts `combine`
                     puts together

as the sizes and the device say, which are known before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from triton import cdiv, next_power_of_2

from attn_core.backends.torch import triton_launch as launcher
from attn_core.backends.torch.chunked_parts import Ask
from attn_core.backends.torch.triton import FEW
from attn_core.backends.torch.triton_call import (
    Call,
    arguments,
    forms,
    map_strides,
    neighbours,
    tiled,
)
from attn_core.kernels import forward as _kernels
from attn_core.kernels.configs import Config
from attn_core.kernels.source import of_score
from attn_core.spec import Operands

Array = Any

_NORMAL = 2.0**-126
"""The least normal float32: a scale below it would be 0, and 0 times -inf NaN."""

_SHARE, _MOST = 2, 128
"""Tiles of keys that a split has at least, and splits at most."""


class Cut(NamedTuple):
    """How a call is cut up.

    Attributes:
        shape: of the launch; its rows are `pack` times those of one head.
        pack: heads of a group in one tile, a power of two; 1 where they are not packed.
        splits: programs that share the keys of one tile of rows, a power of two.
    """

    shape: Config
    pack: int
    splits: int

    @property
    def rows(self) -> int:
        """Of one head in a tile."""
        return self.shape.rows // self.pack


class Sizes(NamedTuple):
    """B, Hq, Hk, Tq and Tk."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int


class _Rows(NamedTuple):
    """(B, Hq, Tq): m and log l, float32, and whether the row may see a key, boolean."""

    m: Array
    log_l: Array
    alive: Array


def cut(sizes: Sizes, config: Callable[[str], Config], device: torch.device) -> Cut:
    """How a call is cut up, by its sizes and its device; `config` gives the shape of a kernel."""
    if sizes.q_len > FEW:
        return Cut(config("forward"), 1, 1)
    shape, group = config("decode"), sizes.heads // sizes.kv_heads
    rows, pack, most = next_power_of_2(sizes.q_len), next_power_of_2(group), max(16, shape.rows)
    if pack > most:
        pack = 1
    shape = replace(shape, rows=min(max(16, rows * pack), most))
    tiles = cdiv(sizes.q_len, shape.rows // pack)
    programs = tiles * sizes.batch * (sizes.heads if pack == 1 else sizes.kv_heads)
    filling = shape.programs * launcher.processors(device)
    return Cut(shape, pack, splits(programs, cdiv(sizes.k_len, shape.keys), filling))


def splits(programs: int, tiles: int, filling: int) -> int:
    """Programs for each of `programs`, as many as fill the device together: a power of two.

    Args:
        tiles: of keys, which they share.
        filling: programs that the device is filled by.
    """
    room = min(filling // programs, tiles // _SHARE, _MOST)
    return 1 << (max(1, room).bit_length() - 1)


def forward(ask: Ask, scale: float, x: Operands) -> tuple[Array, ...]:
    """out, lse, weights (none), m, log l and alive, as `chunked_forward.forward`."""
    with launcher.launching("forward", ask, x):
        c = Call(ask, scale, x)
        out = torch.empty((*x.query.shape[:3], c.v_width), dtype=c.q.dtype, device=c.device)
        m = torch.empty((c.batch, c.heads, c.q_len), dtype=torch.float32, device=c.device)
        rows = _Rows(m, torch.empty_like(m), torch.empty_like(m, dtype=torch.bool))
        sizes = Sizes(c.batch, c.heads, c.kv_heads, c.q_len, c.k_len)
        way = cut(sizes, c.config, c.device)
        if way.splits == 1:
            _rows_of(c, way, c.heads_first(out), rows)
        else:
            _parts_of(c, way, c.heads_first(out), rows)
        lse = m.new_empty(0)
        if ask.lse:
            lse = torch.where(rows.log_l == torch.inf, -torch.inf, rows.m + rows.log_l)
        return out, lse, x.query.new_empty(0), *rows


def _parts_of(c: Call, way: Cut, o: Array, rows: _Rows) -> None:
    sizes = (c.batch, c.heads, way.splits, c.q_len)
    m = torch.empty(sizes, dtype=torch.float32, device=c.device)
    total, parts = torch.empty_like(m), m.new_empty((*sizes, c.v_width))
    _rows_of(c, way, parts, _Rows(m, total, rows.alive))
    shape = c.config("combine")
    launcher.launch(
        *(_kernels.combine, c.batch * c.heads * c.q_len, shape),
        *(parts, m, total, o, rows.m, rows.log_l, rows.alive.view(torch.int8)),
        *(c.sinks, c.lengths[1], c.length_strides[1], o.stride(), c.heads, c.q_len, way.splits),
        DV=c.v_width,
        PAD_V=c.options["PAD_V"],
        N=shape.keys,
        SINKS=c.x.sinks is not None,
        Q_LENGTHS=c.options["Q_LENGTHS"],
    )


def _rows_of(c: Call, way: Cut, o: Array, rows: _Rows) -> None:
    ask, x = c.ask, c.x
    schedule = c.schedule(way.rows, way.shape.keys)
    tiles = cdiv(c.q_len, way.rows)
    packs = c.heads if way.pack == 1 else c.kv_heads
    options = {**c.options, **of_score(ask.score, forms(x.score, c.k_len))}
    plain = ask.score is None and x.bias is None
    (k, v), described = tiled(way.shape, (), (c.k, c.v))
    launcher.launch(
        *(_kernels.forward, tiles * c.batch * packs * way.splits, way.shape),
        *(c.q, k, v, o, rows.m, rows.log_l, rows.alive.view(torch.int8)),
        *(c.bias, c.sinks, *c.lengths, c.seed, *schedule),
        *(arguments(x.mask), arguments(x.score), *c.numbers),
        *(c.q.stride(), c.k.stride(), c.v.stride(), o.stride(), c.bias_strides),
        *(c.length_strides, *map_strides(schedule), c.heads, c.group, c.q_len, c.k_len),
        *(tiles, schedule.order.shape[-1], way.splits),
        M=way.shape.rows,
        N=way.shape.keys,
        PACK=way.pack,
        SPLIT=way.splits > 1,
        BIAS=x.bias is not None,
        WHOLE=c.k_len % 16 == 0 and (x.bias is not None or c.q_len > FEW),
        SINKS=x.sinks is not None and way.splits == 1,  # else they join in `combine`
        LATE=plain and _NORMAL <= c.scale <= 1 / _NORMAL,
        RUN=neighbours(ask.mask, "k"),
        DESCRIPTORS=described,
        **options,
    )
