"""Our Triton kernels on torch tensors: what they are launched with.

The schedule of tiles is made on the tensors' device from the interval reading: nothing waits for
the device, and nothing depends on what the tensors hold.

Imported where it is used: torch alone does not need triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from triton import cdiv, next_power_of_2

from attn_core.backends.torch import philox, reference
from attn_core.backends.torch.chunked_backward import Saved, Upstream
from attn_core.backends.torch.chunked_parts import Ask
from attn_core.backends.torch.tiles import Tiles
from attn_core.blocks import FULL, PARTIAL, block_grid
from attn_core.kernels import backward as _backward
from attn_core.kernels import forward as _forward
from attn_core.kernels.source import function
from attn_core.language.duals import differentiate
from attn_core.language.neighbours import full_tiles_are_neighbours
from attn_core.language.tree import Tree
from attn_core.language.values import drop_threshold
from attn_core.schedule import Schedule, of_status
from attn_core.spec import Operands

Array = Any

_ROWS, _KEYS = 64, 64
"""Rows and keys of a tile."""

_NORMAL = 2.0**-126
"""The least normal float32: a scale below it would be 0, and 0 times -inf NaN."""


class Call:
    """What forward and backward kernels are told alike.

    Attributes:
        q, k, v: heads first, by their strides.
        arrays: mask operands, score operands, bias, its strides, the seed.
        lengths: kv_lengths, q_lengths, offsets; int32 (B or 1,).
        numbers: scale, dropout's threshold, 1 / (1 - rate).
        options: what is compiled in.
    """

    def __init__(self, ask: Ask, scale: float, x: Operands) -> None:
        self.ask, self.scale, self.x = ask, scale, x
        self.q, self.k, self.v = (self.heads_first(t) for t in x[:3])
        self.batch, self.heads, self.q_len, self.width = self.q.shape
        self.kv_heads = self.k.shape[1]
        self.k_len, self.v_width = self.v.shape[2:]
        self.group = self.heads // self.kv_heads
        self.device = x.query.device
        ints = {"dtype": torch.int32, "device": self.device}
        offsets = reference.offset(ask, x, self.q_len, self.k_len).reshape(-1).to(torch.int32)
        self.kv_lengths, self.q_lengths = (
            None if given is None else reference.lengths(given, most).reshape(-1)
            for given, most in ((x.kv_lengths, self.k_len), (x.q_lengths, self.q_len))
        )
        none = torch.zeros(1, **ints)
        self.lengths = (
            none if self.kv_lengths is None else self.kv_lengths,
            none if self.q_lengths is None else self.q_lengths,
            offsets,
        )
        self.length_strides = tuple(0 if len(n) == 1 else 1 for n in self.lengths)
        bias, seed = none[None, None, None], none
        if x.bias is not None:
            bias = x.bias if x.bias.dim() == 4 else x.bias[None, None]
        self.bias_strides = spanned(bias)
        if ask.rate:
            seed = torch.stack(
                [torch.as_tensor(w, device=self.device) for w in philox.words(x.seed)]
            )
        self.seed, self.bias = seed, bias
        self.sinks = none if x.sinks is None else x.sinks.contiguous()
        self.numbers = (scale, drop_threshold(ask.rate) if ask.rate else 0, 1 / (1 - ask.rate))
        self.options = {
            "D": self.width,
            "DV": self.v_width,
            "PAD": max(16, next_power_of_2(self.width)),
            "PAD_V": max(16, next_power_of_2(self.v_width)),
            "MASK": device_function(ask.mask, x.mask),
            "KV_LENGTHS": self.kv_lengths is not None,
            "Q_LENGTHS": self.q_lengths is not None,
            "DROPOUT": bool(ask.rate),
            # Of 16-bit numbers it means nothing. TF32 only where the caller's own switch allows it.
            "PRECISION": "ieee",
        }

    def heads_first(self, x: Array) -> Array:
        return x if self.ask.layout == "BHTD" else x.transpose(1, 2)

    def map_strides(self, schedule: Schedule) -> tuple[int, ...]:
        lines = schedule.full
        return tuple(0 if n == 1 else s for n, s in zip(lines.shape, lines.stride(), strict=True))[
            :2
        ]

    def status(self, rows: int, keys: int) -> Array:
        """(Bm, Hm, rows, columns), Hm over key heads; a tile in which keys end is partial."""
        found = block_grid(
            Tiles(self.device),
            self.ask.mask,
            self.x.mask,
            q_len=self.q_len,
            k_len=self.k_len,
            block_q=rows,
            block_k=keys,
            batch=self.batch,
            heads=self.heads,
            offsets=self.lengths[2],
            kv_lengths=self.kv_lengths,
            q_lengths=self.q_lengths,
        )
        if found.shape[1] > 1:
            grouped = found.unflatten(1, (self.kv_heads, -1))
            some = torch.where(grouped.amax(2) >= PARTIAL, PARTIAL, 0)
            found = torch.where(grouped.amin(2) == FULL, FULL, some)
        if self.k_len % keys:
            found = torch.cat([found[..., :-1], found[..., -1:].clamp(max=PARTIAL)], -1)
        return found


class _Rows(NamedTuple):
    """(B, Hq, Tq): m and log l, float32, and whether the row may see a key, boolean."""

    m: Array
    log_l: Array
    alive: Array


def forward(ask: Ask, scale: float, x: Operands) -> tuple[Array, ...]:
    """out, lse, weights (none), m, log l and alive, as `chunked_forward.forward`."""
    c = Call(ask, scale, x)
    out = torch.empty((*x.query.shape[:3], c.v_width), dtype=c.q.dtype, device=c.device)
    o = c.heads_first(out)
    m = torch.empty((c.batch, c.heads, c.q_len), dtype=torch.float32, device=c.device)
    rows = _Rows(m, torch.empty_like(m), torch.empty_like(m, dtype=torch.bool))
    schedule = of_status(Tiles(c.device), c.status(_ROWS, _KEYS))
    tiles = cdiv(c.q_len, _ROWS)
    plain = ask.score is None and x.bias is None
    _forward.forward[(tiles * c.batch * c.heads,)](
        *(c.q, c.k, c.v, o, rows.m, rows.log_l, rows.alive.view(torch.int8)),
        *(c.bias, c.sinks, *c.lengths, c.seed, *schedule),
        *(arguments(x.mask), arguments(x.score), *c.numbers),
        *(c.q.stride(), c.k.stride(), c.v.stride(), o.stride(), c.bias_strides),
        *(c.length_strides, c.map_strides(schedule), c.heads, c.group, c.q_len, c.k_len),
        *(tiles, schedule.order.shape[-1]),
        M=_ROWS,
        N=_KEYS,
        PACK=1,
        SPLITS=1,
        SCORE=device_function(ask.score, x.score, score=True),
        BIAS=x.bias is not None,
        SINKS=x.sinks is not None,
        LATE=plain and _NORMAL <= scale <= 1 / _NORMAL,
        RUN=neighbours(ask.mask, "k"),
        DESCRIPTORS=False,
        **c.options,
    )
    lse = rows.m.new_empty(0)
    if ask.lse:
        lse = torch.where(rows.log_l == torch.inf, -torch.inf, rows.m + rows.log_l)
    return out, lse, x.query.new_empty(0), *rows


def backward(
    ask: Ask, scale: float, x: Operands, saved: Saved, up: Upstream, wanted: Sequence[bool]
) -> list[Array]:
    """Gradients of query, key, value, bias, sinks and the score's operands, those wanted."""
    c = Call(ask, scale, x)
    d_out = up.out
    if d_out is None:
        d_out = torch.zeros_like(saved.out)
    g, o = c.heads_first(d_out), c.heads_first(saved.out)
    t = torch.empty_like(saved.m)
    alive = saved.alive.contiguous().view(torch.int8)
    tiles, wide = cdiv(c.q_len, _ROWS), cdiv(c.k_len, _KEYS)
    d_lse = t if up.lse is None else up.lse.to(torch.float32).contiguous()
    pad_v = c.options["PAD_V"]
    _backward.delta[(tiles * c.batch * c.heads,)](
        *(o, g, d_lse, alive, saved.log_l, t, o.stride(), g.stride(), c.heads, c.q_len, tiles),
        DV=c.v_width,
        PAD_V=pad_v,
        M=_ROWS,
        LSE=up.lse is not None,
    )
    statistics = (saved.m, saved.log_l, t, alive)
    arrays = (arguments(x.mask), arguments(x.score), (c.bias,), c.bias_strides, (c.seed,))
    shapes = (c.heads, c.group, c.q_len, c.k_len)
    derivative = None if ask.score is None else differentiate(ask.score)
    score = device_function(derivative and derivative.tree, x.score, score=True)
    options = {**c.options, "M": _ROWS, "N": _KEYS, "SCORE": score}
    given = (c.q, c.k, c.v, g)
    strides = (c.q.stride(), g.stride(), c.k.stride(), c.v.stride())
    status = c.status(_ROWS, _KEYS)
    found: dict[int, Array] = {}
    if wanted[1] or wanted[2]:
        dk, dv = (torch.empty(a.shape, dtype=a.dtype, device=c.device) for a in (x.key, x.value))
        dk_h, dv_h = c.heads_first(dk), c.heads_first(dv)
        columns = of_status(Tiles(c.device), status.transpose(-1, -2).contiguous())
        _backward.d_keys[(wide * c.batch * c.kv_heads,)](
            *(*given, dk_h, dv_h, statistics, arrays, c.numbers, c.lengths, tuple(columns)),
            *((*strides, dk_h.stride(), dv_h.stride()), c.length_strides),
            *(c.map_strides(columns), *shapes, wide, columns.order.shape[-1]),
            BIAS=x.bias is not None,
            RUN=neighbours(ask.mask, "q", "row"),
            DESCRIPTORS=False,
            **options,
        )
        found[1], found[2] = dk, dv
    sites = () if derivative is None or not any(wanted[5:]) else derivative.sites
    if wanted[0] or sites:
        dq = torch.empty(x.query.shape, dtype=c.q.dtype, device=c.device)
        dq_h = c.heads_first(dq)
        tables = [torch.zeros(a.shape, dtype=torch.float32, device=c.device) for a in x.score]
        rows = of_status(Tiles(c.device), status)
        places = [n for s in sites for n in (tables[s.operand], *tables[s.operand].shape)]
        _backward.d_query[(tiles * c.batch * c.heads,)](
            *(*given, dq_h, statistics, arrays, c.numbers, c.lengths, tuple(rows)),
            *((*strides, dq_h.stride()), tuple(places), c.length_strides),
            *(c.map_strides(rows), *shapes, tiles, rows.order.shape[-1]),
            BIAS=x.bias is not None,
            SITES=_backward.sites_of(s.indices for s in sites),
            RUN=neighbours(ask.mask, "k"),
            DESCRIPTORS=False,
            **options,
        )
        found[0] = dq
        found |= {5 + n: a.to(x.score[n].dtype) for n, a in enumerate(tables)}
    if wanted[3]:
        found[3] = _bias(c, x, given, strides, statistics, arrays, options)
    if wanted[4]:
        found[4] = _sinks(c, x, saved, t)
    return [found[n] for n, yes in enumerate(wanted) if yes]


def _bias(
    c: Call,
    x: Operands,
    given: tuple[Array, ...],
    strides: tuple[Any, ...],
    statistics: tuple[Array, ...],
    arrays: tuple[Any, ...],
    options: dict[str, Any],
) -> Array:
    bias = x.bias if x.bias.dim() == 4 else x.bias[None, None]
    into = torch.empty(bias.shape, dtype=torch.float32, device=c.device)
    spans = [n > 1 for n in bias.shape]
    tall, wide = cdiv(c.q_len, _ROWS), cdiv(c.k_len, _KEYS)
    sizes = (c.batch, c.heads, tall, wide)
    programs = 1
    for yes, n in zip(spans, sizes, strict=True):
        programs *= n if yes else 1
    _backward.d_bias[(programs,)](
        *(*given, into, statistics, arrays, c.numbers, c.lengths, strides, spanned(into)),
        *(c.length_strides, c.batch, c.heads, c.group, c.q_len, c.k_len, tall, wide),
        **dict(zip(("B", "H", "ROWS", "KEYS"), spans, strict=True)),
        **options,
    )
    return into.view(x.bias.shape).to(x.bias.dtype)


def _sinks(c: Call, x: Operands, saved: Saved, t: Array) -> Array:
    """(d lse - delta) times the sink's weight, which is what t is the negative of."""
    sinks = x.sinks.to(torch.float32)[:, None]
    weight = torch.exp((sinks - saved.m) - saved.log_l)
    if c.q_lengths is not None:
        row = torch.arange(c.q_len, device=c.device)
        weight = torch.where(row < c.q_lengths[:, None, None], weight, 0.0)
    moved = torch.where(sinks == -torch.inf, 0.0, -t * weight)
    return moved.sum((0, 2)).to(x.sinks.dtype)


def device_function(tree: Tree | None, operands: Sequence[Array], score: bool = False) -> Any:
    if tree is None:
        return None
    return function(tree, tuple((a.dim(), a.dtype == torch.bool) for a in operands), score).call


def neighbours(mask: Tree | None, *along: str) -> bool:
    """Whether the full tiles of a row (along "k") or a column (along "q", "row") are neighbours."""
    return mask is None or full_tiles_are_neighbours(mask, *along)


def arguments(operands: Sequence[Array]) -> tuple[Any, ...]:
    """Pointer and sizes of each operand; of an empty one nothing is looked up but a zero."""
    found: list[Any] = []
    for a in operands:
        a = a.contiguous() if a.numel() else a.new_zeros((1,) * a.dim())
        found += [a.view(torch.int8) if a.dtype == torch.bool else a, *a.shape]
    return tuple(found)


def spanned(x: Array) -> tuple[int, ...]:
    """Strides, 0 along an axis of one entry."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
