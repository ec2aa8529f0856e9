"""The backward pass: each tile is rebuilt once, and gives its share of every gradient.

With P = exp((z - m) - log l), dP = dO V^T (dropped and rescaled where P was) + dW, and
delta = sum(dO * O) + sum(P * dW) for each row::

    dz = P * (dP - delta + d lse)        where allowed; P * d lse where P is 1
    dV = (P after dropout)^T dO          dsink = sum of exp((sink - m) - log l) * (d lse - delta)
    ds = dz * dscore/ds                  dQ = scale * ds K,  dK = scale * ds^T Q

Inside, every row's 1 / l is moved from P to what comes from upstream, so that P / exp(-log l) =
exp(z - m) is all that a tile computes. What comes from upstream is selected by row before anything
else: rows that may see no key pass nothing on, but for their sink's share of d lse.

Where P is 1 a row sees one key only, or as good as one, and delta is dP. It is made of O, which was
rounded to 16 bits perhaps, so that a difference would be left of what is 0; it is not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from attn_core.backends.torch.arrays import clamp
from attn_core.backends.torch.chunked_parts import Span, Work
from attn_core.backends.torch.chunked_tile import Logits, Tile, exponential, hide, seen, slopes
from attn_core.language.duals import Derivative

Array = Any


class Saved(NamedTuple):
    """What the forward pass left: out as given, the others (B, Hq, Tq)."""

    out: Array
    m: Array
    log_l: Array
    alive: Array

    def only(self, rows: Array) -> Saved:
        """Of these rows alone: to the gradients the others give nothing, as rows without keys."""
        alive = self.alive & rows
        m, log_l = self.m.masked_fill(~alive, 0.0), self.log_l.masked_fill(~alive, torch.inf)
        return Saved(self.out, m, log_l, alive)

    def replaced(self, other: Saved, rows: Array, axis: int) -> Saved:
        """These rows as another has them; `axis` is that of the heads in out."""
        out = torch.where(rows.movedim(1, axis)[..., None], other.out, self.out)
        pairs = zip(other[1:], self[1:], strict=True)
        return Saved(out, *(torch.where(rows, new, old) for new, old in pairs))


class Upstream(NamedTuple):
    """Cotangents of out, lse and weights; None where there is none."""

    out: Array | None
    lse: Array | None
    weights: Array | None


class _Rows(NamedTuple):
    """Of a tile of rows: (n, M, ...), upstream selected and divided by l.

    Attributes:
        q: rows that see nothing are 0.
        m: of the forward pass.
        share: 1 / l, 0 where l is 0.
        d_out: dO / l, rescaled for dropout; None where it is not given.
        t: (delta - d lse) / l.
        lone: whether one weight is 1; None where no row's is.
        d_lse: d lse / l; None where it is not given.
        d_sinks: (B', Hk', G, rows), d lse - delta times the sink's weight; None without sinks.
    """

    q: Array
    m: Array
    share: Array
    d_out: Array | None
    t: Array
    lone: Array | None
    d_lse: Array | None
    d_sinks: Array | None


class _Gradients:
    """Where gradients are added up: those of query, key and value by part, the rest throughout."""

    def __init__(self, w: Work, wanted: Sequence[bool]) -> None:
        x = w.x
        given = (x.query, x.key, x.value, x.bias, x.sinks, *x.score)
        self.wanted = wanted
        self.into = [
            _place(w, n, a) if yes else None
            for n, (a, yes) in enumerate(zip(given, wanted, strict=True))
        ]
        self.query, self.key, self.value, self.bias, self.sinks, *self.tables = self.into
        # Whatever lies behind the logits.
        self.logits = wanted[0] or wanted[1] or wanted[3] or any(wanted[5:])
        self.given = given

    def found(self) -> list[Array]:
        return [g.to(a.dtype) for g, a in zip(self.into, self.given, strict=True) if g is not None]


def _place(w: Work, number: int, x: Array) -> Array:
    if number < 3:
        # Of these every entry is written, once.
        return torch.empty(x.shape, dtype=x.dtype, device=w.device)
    return torch.zeros(x.shape, dtype=w.dtype, device=w.device)


def backward(w: Work, saved: Saved, up: Upstream, wanted: Sequence[bool]) -> list[Array]:
    """Gradients of query, key, value, bias, sinks and the score's operands, those wanted."""
    grads = _Gradients(w, wanted)
    rows = saved._replace(
        out=w.grouped(saved.out),
        **{n: w.grouped_rows(getattr(saved, n)) for n in saved._fields[1:]},
    )
    up = Upstream(
        None if up.out is None else w.grouped(up.out),
        *[None if g is None else w.grouped_rows(g) for g in up[1:]],
    )
    derivative = None
    if w.ask.score is not None and grads.logits:
        derivative = slopes(w.ask.score, any(wanted[5:]))
    for part in w.parts():
        d_key = torch.zeros_like(part.key) if grads.key is not None else None
        d_value = torch.zeros_like(part.value) if grads.value is not None else None
        for at, spans in zip(w.rows, part.spans, strict=True):
            tile = Tile(w, part, at)
            row = _upstream(tile, rows, up, spans)
            if grads.sinks is not None:
                assert row.d_sinks is not None
                into = grads.sinks.view(w.kv_heads, w.group)[part.heads]
                into.add_(row.d_sinks.sum((0, 3)))
            d_query = torch.zeros_like(row.q) if grads.query is not None else None
            for span in spans:
                _tile(tile, span, row, up, derivative, grads, (d_query, d_key, d_value))
            if grads.query is not None:
                tile.put(d_query, w.grouped(grads.query))
        for d, into in ((d_key, grads.key), (d_value, grads.value)):
            if d is not None and into is not None:
                place = w.heads_first(into)[part.batch, part.heads]
                place.copy_(d.view(place.shape))
    return grads.found()


def _upstream(tile: Tile, saved: Saved, up: Upstream, spans: Sequence[Span]) -> _Rows:
    w = tile.w
    m, log_l, alive = (tile.folded(a)[..., None] for a in saved[1:])
    q = torch.where(alive, tile.folded(w.query).to(w.dtype), 0.0)
    share = torch.exp(-log_l)
    delta, d_out = torch.zeros_like(m), None
    if up.out is not None:
        d_out = torch.where(alive, tile.folded(up.out).to(w.dtype), 0.0)
        delta = (d_out * tile.folded(saved.out).to(w.dtype)).sum(-1, keepdim=True)
        d_out.mul_(share if not w.ask.rate else share * (1 / (1 - w.ask.rate)))
    if up.weights is not None:
        for span in spans:
            z, allowed, *_ = tile.logits(q, span)
            exponential(z.sub_(m)).mul_(_weights(tile, span, up.weights, share))
            hide(z, allowed, tile, 0.0)
            delta = delta + z.sum(-1, keepdim=True)
    lse = None
    if up.lse is not None:
        lse = tile.folded(up.lse)[..., None].to(w.dtype)
        lse = torch.where(log_l < torch.inf, lse, 0.0)
        delta = delta - lse
        lse.mul_(share)
    d_sinks = None
    if w.x.sinks is not None:
        weight = torch.exp((tile.sinks() - m) - log_l)
        d_sinks = (weight * -delta).view(tile.shape)
    lone = log_l == 0
    # As in `chunked_tile._narrowed`: asking is cheap on a CPU, on a device it would wait.
    some = w.device.type != "cpu" or bool(lone.any())
    return _Rows(q, m, share, d_out, delta * share, lone if some else None, lse, d_sinks)


def _weights(tile: Tile, span: Span, d_weights: Array, share: Array) -> Array:
    d = tile.folded(d_weights[..., span.start : span.stop]).to(share.dtype)
    return d * share


def _tile(
    tile: Tile,
    span: Span,
    row: _Rows,
    up: Upstream,
    derivative: Derivative | None,
    grads: _Gradients,
    into: tuple[Array | None, Array | None, Array | None],
) -> None:
    w, part = tile.w, tile.part
    keys = slice(span.start, span.stop)
    d_query, d_key, d_value = into
    logits = tile.logits(row.q, span, derivative=derivative)
    e, allowed = logits.z, logits.allowed
    exponential(e.sub_(row.m))
    hide(e, allowed, tile, 0.0)
    kept = tile.kept(span) if w.ask.rate and row.d_out is not None else None
    if d_value is not None and row.d_out is not None:
        shares = e
        if kept is not None:
            shares = w.room(2, *e.shape).copy_(e)
            hide(shares, kept, tile, 0.0)
        d_value[:, keys].baddbmm_(shares.transpose(1, 2), row.d_out)
    if not grads.logits:
        return
    g = w.room(1, *e.shape)
    if row.d_out is None:
        g.zero_()
    else:
        torch.baddbmm(g, row.d_out, part.value[:, keys].transpose(1, 2), beta=0, out=g)
        hide(g, kept, tile, 0.0)
    if up.weights is not None:
        g.add_(_weights(tile, span, up.weights, row.share))
    g.sub_(row.t).mul_(e)
    if row.lone is not None:
        alone = (e == 1) & row.lone
        g.masked_fill_(alone, 0.0)
        if row.d_lse is not None:
            g.add_(alone * row.d_lse)
    hide(g, allowed, tile, 0.0)
    if grads.bias is not None:
        place = tile.bias(w.spread(grads.bias), span)
        place.add_(tile.open(g).sum_to_size(place.shape))
    if derivative is not None:
        _tables(tile, g, logits, derivative, grads.tables)
        tile.open(g).mul_(logits.slope)
        hide(g, allowed, tile, 0.0)
    if d_query is not None:
        d_query.baddbmm_(g, seen(part.key[:, keys], allowed, tile), alpha=w.scale)
    if d_key is not None:
        d_key[:, keys].baddbmm_(g.transpose(1, 2), row.q, alpha=w.scale)


def _tables(
    tile: Tile,
    g: Array,
    logits: Logits,
    derivative: Derivative,
    tables: Sequence[Array | None],
) -> None:
    """The share of every look-up of the score, added where its indices point."""
    for site, (adjoint, index) in zip(derivative.sites, logits.sites, strict=True):
        table = tables[site.operand]
        if table is None or not table.numel():
            continue
        d = tile.open(g) * adjoint
        if logits.allowed is not None:
            d.masked_fill_(~logits.allowed, 0.0)
        index = [i.reshape((1,) * (5 - i.dim()) + i.shape) for i in index]
        # Added up first along every axis that the indices do not move along.
        still = [a for a in range(5) if all(i.shape[a] == 1 for i in index)]
        if still:
            d = d.sum(still, keepdim=True)
        at = torch.zeros((), dtype=torch.int64, device=d.device)
        for i, size in zip(clamp(table.shape, index), table.shape, strict=True):
            at = at * size + i
        flat, at, d = table.view(-1), at.expand(d.shape).reshape(-1), d.reshape(-1)
        # Each adds in one order only, index_add_ on a CPU and index_put_ on a device.
        if d.device.type == "cpu":
            flat.index_add_(0, at, d)
        else:
            flat.index_put_((at,), d, accumulate=True)
