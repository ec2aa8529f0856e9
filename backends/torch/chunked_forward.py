"""The forward pass: for every tile of rows, softmax built up over its spans of keys.

The running maximum m and sum l of a row are those of the keys seen so far; a new span rescales what
is there. Rows end as (out, m, log l): with a single number, m + log l, a row of large biases could
not be rebuilt. Where l is 0, log l is +inf instead, so that exp((z - m) - log l) is 0 there
without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core.backends.torch.chunked_parts import Span, Work
from attn_core.backends.torch.chunked_tile import Tile, exponential, hide, seen

Array = Any


def forward(w: Work) -> tuple[Array, ...]:
    """out, lse, weights, m, log l and whether the row may see a key.

    out is in the layout and dtype of query; m, log l, lse and alive are (B, Hq, Tq), in the
    accumulation dtype, and boolean; lse and weights are empty where they are not asked for.
    """
    ask, x = w.ask, w.x
    kinds = {"dtype": w.dtype, "device": w.device}
    rows = (w.batch, w.heads, w.q_len)
    out = x.query.new_empty(*x.query.shape[:3], x.value.shape[3])
    m, log_l = torch.empty(rows, **kinds), torch.empty(rows, **kinds)
    alive = torch.empty(rows, dtype=torch.bool, device=w.device)
    weights = x.query.new_zeros((*rows, w.k_len) if ask.weights else 0)
    into = [w.grouped(out), *[w.grouped_rows(a) for a in (m, log_l, alive)]]
    for part in w.parts():
        for at, spans in zip(w.rows, part.spans, strict=True):
            tile = Tile(w, part, at)
            q = tile.folded(w.query).to(w.dtype)
            found = _row(tile, q, spans)
            for a, b in zip(found, into, strict=True):
                tile.put(a, b)
            if ask.weights:
                _weights(tile, q, spans, found[1], found[2], w.grouped_rows(weights))
    lse = torch.where(log_l == torch.inf, -torch.inf, m + log_l) if ask.lse else m.new_empty(0)
    return out, lse, weights, m, log_l, alive


def _row(tile: Tile, q: Array, spans: Sequence[Span]) -> tuple[Array, ...]:
    """(out, m, log l, alive) of a tile of rows, (n, M, Dv) and (n, M, 1)."""
    w, value = tile.w, tile.part.value
    m = q.new_full((*q.shape[:2], 1), -torch.inf)
    total = torch.zeros_like(m)
    acc = q.new_zeros(*q.shape[:2], value.shape[2])
    for span in spans:
        z, allowed, *_ = tile.logits(q, span)
        # Rows whose maximum is NaN or +inf keep NaN here where nothing is allowed: theirs is NaN
        # anyway. All others get exp(-inf) = 0.
        hide(z, allowed, tile, -torch.inf)
        highest = torch.maximum(m, z.amax(-1, keepdim=True))
        base = _finite(highest)
        exponential(z.sub_(base))
        fade = torch.exp(m - base)
        total.mul_(fade).add_(z.sum(-1, keepdim=True))
        if w.ask.rate:
            hide(z, tile.kept(span), tile, 0.0)
        acc.mul_(fade).baddbmm_(z, seen(value[:, span.start : span.stop], allowed, tile))
        m = highest
    alive = total != 0
    if w.x.sinks is not None:
        sinks = tile.sinks()
        highest = torch.maximum(m, sinks)
        base = _finite(highest)
        fade = torch.exp(m - base)
        total.mul_(fade).add_(torch.exp(sinks - base))
        acc.mul_(fade)
        m = highest
    if w.ask.rate:
        acc.mul_(1 / (1 - w.ask.rate))
    out = acc.div_(total).masked_fill_(~alive, 0.0)
    log_l = torch.log(total).masked_fill_(total == 0, torch.inf)
    return out, _finite(m), log_l, alive


def _weights(
    tile: Tile, q: Array, spans: Sequence[Span], m: Array, log_l: Array, into: Array
) -> None:
    """The weights of a tile of rows, once its (m, log l) are known."""
    for span in spans:
        z, allowed, *_ = tile.logits(q, span)
        exponential(z.sub_(m).sub_(log_l))
        hide(z, allowed, tile, 0.0)
        tile.put(z, into[..., span.start : span.stop])


def _finite(m: Array) -> Array:
    """A row's maximum, 0 where it is -inf: nothing is seen there yet."""
    return m.masked_fill(m == -torch.inf, 0.0)
