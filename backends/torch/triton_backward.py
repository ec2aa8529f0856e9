"""The backward kernels on torch tensors: split, one to each gradient, or fused.

    split    d_keys and d_query, each with tiles of its own: two products more, and no atomics;
             where the table says so (`Config.apart` of "d_keys") dV and dK are two launches of
             d_keys, again with tiles of their own and one product more, and one launch where only
             one of them is wanted
    fused    d_keys alone, which adds dQ by atomics on its way, where the table of configurations
             says that this is the faster one (`Config.instead` of "fused")

What is added by atomics, gradients of the arrays that a score looks up among it, is added in an
order that no two runs share. Where torch is asked for deterministic algorithms the split runs,
whatever the table says, and `chunked` adds those arrays' gradients, in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton import cdiv

from attn_core.backends.torch import chunked_backward
from attn_core.backends.torch import triton_launch as launcher
from attn_core.backends.torch.chunked_backward import Saved, Upstream
from attn_core.backends.torch.chunked_parts import Ask, Work
from attn_core.backends.torch.triton_call import (
    Call,
    arguments,
    forms,
    map_strides,
    neighbours,
    spanned,
    tiled,
)
from attn_core.kernels import backward as _kernels
from attn_core.kernels.bias import d_bias
from attn_core.kernels.configs import Config
from attn_core.kernels.source import of_score
from attn_core.kernels.statistics import LINE, delta
from attn_core.language.duals import Derivative, differentiate
from attn_core.spec import Operands

Array = Any

_TABLES = 5
"""Gradients before those of a score's operands: query, key, value, bias, sinks."""


def backward(
    ask: Ask, scale: float, x: Operands, saved: Saved, up: Upstream, wanted: Sequence[bool]
) -> list[Array]:
    """Gradients of query, key, value, bias, sinks and the score's operands, those wanted."""
    with launcher.launching("backward", ask, x):
        # Ids and the like have none, wherever they are looked up.
        tables, ordered = any(wanted[_TABLES:]), torch.are_deterministic_algorithms_enabled()
        apart = tables and ordered
        here = [*wanted[:_TABLES], *[yes and not apart for yes in wanted[_TABLES:]]]
        found = _Backward(ask, scale, x, saved, up).found(here, ordered)
        if apart:
            rest = [False] * _TABLES + list(wanted[_TABLES:])
            found += chunked_backward.backward(Work(ask, scale, x), saved, up, rest)
        return found


class _Backward:
    """One backward pass: what all of its kernels are told."""

    def __init__(self, ask: Ask, scale: float, x: Operands, saved: Saved, up: Upstream) -> None:
        self.x, self.saved = x, saved
        self.c = c = Call(ask, scale, x)
        d_out = torch.zeros_like(saved.out) if up.out is None else up.out
        g, o = c.heads_first(d_out), c.heads_first(saved.out)
        line = cdiv(c.q_len, LINE.value) * LINE.value
        told = torch.empty(4, c.batch, c.heads, line, dtype=torch.float32, device=c.device)
        self.t = told[2, :, :, : c.q_len]
        alive = saved.alive.contiguous().view(torch.int8)
        d_lse = saved.m if up.lse is None else up.lse.to(torch.float32).contiguous()
        shape = c.config("delta")
        launcher.launch(
            *(delta, line // shape.rows * c.batch * c.heads, shape),
            *(o, g, d_lse, alive, saved.m, saved.log_l, told.unbind(), o.stride(), g.stride()),
            *(c.heads, c.q_len),
            DV=c.v_width,
            PAD_V=c.options["PAD_V"],
            M=shape.rows,
            LSE=up.lse is not None,
        )
        self.statistics = told.unbind()
        bias, seed = (c.bias,), (c.seed,)  # either tuples stand in a tuple, or none
        self.arrays = (arguments(x.mask), arguments(x.score), bias, c.bias_strides, seed)
        self.sizes = (c.heads, c.group, c.q_len, c.k_len)
        self.derivative: Derivative | None = None
        if ask.score is not None:
            self.derivative = differentiate(ask.score)
        tree = self.derivative and self.derivative.tree
        self.options = {**c.options, **of_score(tree, forms(x.score, c.k_len))}
        self.given = (c.q, c.k, c.v, g)
        self.strides = (c.q.stride(), g.stride(), c.k.stride(), c.v.stride())

    def found(self, wanted: Sequence[bool], ordered: bool) -> list[Array]:
        """Those wanted; `ordered` where every sum is to be added up in one order."""
        found: dict[int, Array] = {}
        keys, tables = wanted[1] or wanted[2], any(wanted[_TABLES:])
        query = wanted[0] or tables
        added: list[Array] = []
        if keys and query and not ordered and self.c.config("fused").instead:
            found[0], found[1], found[2], added = self.fused(tables)
        else:
            if keys:
                found[1], found[2] = self.keys(wanted[1], wanted[2])
            if query:
                found[0], added = self.query(tables)
        found |= {_TABLES + n: table for n, table in enumerate(added)}
        if wanted[3]:
            found[3] = self.bias()
        if wanted[4]:
            found[4] = self.sinks()
        return [found[n] for n, yes in enumerate(wanted) if yes]

    def keys(self, key: bool, value: bool) -> tuple[Array, Array]:
        """dK and dV, those wanted at least; None what was not made."""
        c, none = self.c, _Tables((), None)
        both = c.config("d_keys")
        if not both.apart:
            return self._keys(both, None, none)
        dk = dv = None
        if value:
            _, dv = self._keys(c.config("d_value"), None, none, key=False)
        if key:
            dk, _ = self._keys(c.config("d_key"), None, none, value=False)
        return dk, dv

    def fused(self, tables: bool) -> tuple[Array, Array, Array, list[Array]]:
        """dQ, dK, dV, and the gradients of the score's arrays where they are asked for."""
        c, x = self.c, self.x
        dq = torch.zeros(x.query.shape, dtype=torch.float32, device=c.device)
        into = _Tables(x.score, self.derivative) if tables else _Tables((), None)
        dk, dv = self._keys(c.config("fused"), dq, into)
        return dq.to(c.q.dtype), dk, dv, into.found()

    def _keys(
        self,
        shape: Config,
        dq: Array | None,
        into: _Tables,
        *,
        key: bool = True,
        value: bool = True,
    ) -> tuple[Array, Array]:
        """dK and dV, or one of them; dQ is added to `dq` where there is one."""
        c, x = self.c, self.x
        dk = torch.empty(x.key.shape, dtype=x.key.dtype, device=c.device) if key else None
        dv = torch.empty(x.value.shape, dtype=x.value.dtype, device=c.device) if value else None
        dk_h, dv_h = (None if a is None else c.heads_first(a) for a in (dk, dv))
        schedule = c.schedule(shape.rows, shape.keys, columns=True)
        tiles = cdiv(c.k_len, shape.keys)
        q, k, v, g = self.given
        dq_h = () if dq is None else (c.heads_first(dq),)
        # What is not made is written nowhere, by whatever strides.
        made = [(k if dk_h is None else dk_h).stride(), (v if dv_h is None else dv_h).stride()]
        (q, g, *dq_t, k, v), described = tiled(shape, (q, g, *dq_h), (k, v))
        strides = (*self.strides, *made, *[a.stride() for a in dq_h])
        launcher.launch(
            *(_kernels.d_keys, tiles * c.batch * c.kv_heads, shape),
            *(q, k, v, g, dk_h, dv_h, *(dq_t or [None]), self.statistics, self.arrays),
            *(c.numbers, c.lengths, tuple(schedule), strides, into.places, c.length_strides),
            *(map_strides(schedule), *self.sizes, tiles, schedule.order.shape[-1]),
            M=shape.rows,
            N=shape.keys,
            BIAS=x.bias is not None,
            SITES=into.sites,
            KEY=key,
            VALUE=value,
            FUSED=dq is not None,
            ALONE=c.group == 1,
            RUN=neighbours(c.ask.mask, "q", "row"),
            DESCRIPTORS=described,
            **self.options,
        )
        return dk, dv

    def query(self, tables: bool) -> tuple[Array, list[Array]]:
        """dQ, and the gradients of the score's arrays where they are asked for."""
        c, x = self.c, self.x
        into = _Tables(x.score, self.derivative) if tables else _Tables((), None)
        dq = torch.empty(x.query.shape, dtype=c.q.dtype, device=c.device)
        dq_h = c.heads_first(dq)
        shape = c.config("d_query")
        schedule = c.schedule(shape.rows, shape.keys)
        tiles = cdiv(c.q_len, shape.rows)
        q, k, v, g = self.given
        (k, v), described = tiled(shape, (), (k, v))
        launcher.launch(
            *(_kernels.d_query, tiles * c.batch * c.heads, shape),
            *(q, k, v, g, dq_h, self.statistics, self.arrays, c.numbers, c.lengths),
            *(tuple(schedule), (*self.strides, dq_h.stride()), into.places, c.length_strides),
            *(map_strides(schedule), *self.sizes, tiles, schedule.order.shape[-1]),
            M=shape.rows,
            N=shape.keys,
            BIAS=x.bias is not None,
            SITES=into.sites,
            RUN=neighbours(c.ask.mask, "k"),
            DESCRIPTORS=described,
            **self.options,
        )
        return dq, into.found()

    def bias(self) -> Array:
        c, x = self.c, self.x
        bias = x.bias if x.bias.dim() == 4 else x.bias[None, None]
        into = torch.empty(bias.shape, dtype=torch.float32, device=c.device)
        shape = c.config("d_bias")
        spans = [n > 1 for n in bias.shape]
        tall, wide = cdiv(c.q_len, shape.rows), cdiv(c.k_len, shape.keys)
        options = {**self.options, **dict(zip(("B", "H", "ROWS", "KEYS"), spans, strict=True))}
        programs = 1
        for yes, n in zip(spans, (c.batch, c.heads, tall, wide), strict=True):
            programs *= n if yes else 1
        launcher.launch(
            *(d_bias, programs, shape),
            *(*self.given, into, self.statistics, self.arrays, c.numbers, c.lengths),
            *(self.strides, spanned(into), c.length_strides, c.batch, *self.sizes, tall, wide),
            M=shape.rows,
            N=shape.keys,
            **options,
        )
        return into.view(x.bias.shape).to(x.bias.dtype)

    def sinks(self) -> Array:
        """(d lse - delta) times the sink's weight, which is what t is the negative of."""
        c, x = self.c, self.x
        sinks = x.sinks.to(torch.float32)[:, None]
        weight = torch.exp((sinks - self.saved.m) - self.saved.log_l)
        if c.told.given[1]:
            row = torch.arange(c.q_len, device=c.device)
            weight = torch.where(row < c.lengths[1][:, None, None], weight, 0.0)
        moved = torch.where(sinks == -torch.inf, 0.0, -self.t * weight)
        return moved.sum((0, 2)).to(x.sinks.dtype)


class _Tables:
    """Where the gradients of a score's arrays are added up, float32.

    Attributes:
        sites: what kernels know of each look-up, () where no gradient is asked for.
        places: for each of them a pointer and sizes.
    """

    def __init__(self, given: Sequence[Array], derivative: Derivative | None) -> None:
        self.given = given
        sites = () if derivative is None else derivative.sites
        self.into: dict[int, Array] = {}
        for n in {s.operand for s in sites}:
            # Of an empty table nothing is looked up, but a place to add to there must be.
            a = given[n]
            size = a.shape if a.numel() else (1,) * a.dim()
            self.into[n] = torch.zeros(size, dtype=torch.float32, device=a.device)
        self.sites = _kernels.sites_of(s.indices for s in sites)
        self.places = tuple(
            n for s in sites for n in (self.into[s.operand], *self.into[s.operand].shape)
        )

    def found(self) -> list[Array]:
        """Each as its array has it; zeros of those that no look-up hands anything on to."""
        return [
            self.into[n].to(a.dtype) if n in self.into and a.numel() else torch.zeros_like(a)
            for n, a in enumerate(self.given)
        ]
