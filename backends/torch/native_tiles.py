"""torch's fused CPU kernel over live tiles: each tile of rows asks for the keys it may see.

The kernel gives a row's log-sum-exp beside its output, so that a tile whose live keys lie apart
asks once for each span and merges; and its backward pass, handed the output and log-sum-exp of the
whole row, gives one span's share of each gradient. A span is a slice, nothing is copied, and only
spans that are not full carry a selection. A band of tiles is one call: the kernel reads its batch
by a stride, and a stride from tile to tile is as good.

What the kernel does not know of is done around it: rows that may see no key (it says lse 0 there),
and keys, values and rows that nobody may look at, which are replaced by 0 where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core.backends.torch.chunked_backward import Saved
from attn_core.backends.torch.chunked_parts import Ask, Span, Work
from attn_core.backends.torch.native_bands import KEYS, ROWS, Band, Turn, turns
from attn_core.backends.torch.native_selections import Selection, Selections
from attn_core.spec import Operands

Array = Any

_PLAIN = 2.0**32
"""The largest key or value of which it is taken for granted that no product with it overflows."""

_LARGEST = 2.0**100
"""What products may come to at most: far from float32's 2**128, and from nothing that occurs."""

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(ask: Ask, scale: float, x: Operands) -> tuple[Array, ...]:
    """out, lse, weights (none), m, log l and alive, as `chunked_forward.forward`."""
    if ask.kernel != "tiles":
        q, k, v = (_heads_first(ask, a) for a in x[:3])
        out, lse = _kernel(q, k, v, 0.0, ask.kernel == "causal", scale=scale)
        log_l, alive = torch.zeros_like(lse), torch.ones_like(lse, dtype=torch.bool)
        shown = lse.clone() if ask.lse else lse.new_empty(0)
        return _laid_out(ask, out), shown, x.query.new_empty(0), lse, log_l, alive
    w = Work(ask, scale, x, ROWS, KEYS)
    query, key, value = (_heads_first(ask, a) for a in x[:3])
    out = x.query.new_empty(x.query.shape)
    into = w.heads_first(out)
    m = torch.empty((w.batch, w.heads, w.q_len), dtype=w.dtype, device=w.device)
    clean = _Clean(key, value)
    for turn in turns(w):
        for band, chosen in Selections(w, turn):
            for batch in _batches(w, turn, band):
                rows = (batch, turn.heads)
                q = band.of_rows(query, *rows)
                found, lse = _row(q, key, value, band, (batch, turn.keys), chosen, scale, clean)
                band.of_rows(into, *rows)[...] = found
                band.of_rows(m, *rows)[...] = lse
    alive = m != -torch.inf
    log_l = torch.where(alive, 0.0, torch.inf)
    shown = m.clone() if ask.lse else m.new_empty(0)
    m = m.masked_fill_(~alive, 0.0)
    return out, shown, x.query.new_empty(0), m, log_l, alive


def _batches(w: Work, turn: Turn, band: Band) -> Sequence[int | slice]:
    """Where tiles stand in the place of the batch, one entry after the other."""
    return (turn.batch,) if band.many == 1 else range(w.batch)[turn.batch]


def _row(
    q: Array,
    key: Array,
    value: Array,
    band: Band,
    at: tuple[int | slice, slice],
    selections: Sequence[Selection | None],
    scale: float,
    clean: _Clean,
) -> tuple[Array, Array]:
    """(out, lse) of a band; 0 and -inf where a row may see no key."""
    found = lse = None
    for span, chosen in zip(band.spans, selections, strict=True):
        k, v = (_only(band.of_keys(x, *at, span), chosen, clean) for x in (key, value))
        out, new = _kernel(q, k, v, 0.0, False, attn_mask=chosen and chosen.added, scale=scale)
        if chosen is not None and chosen.empty:
            alive = chosen.count > 0
            new = torch.where(alive, new, -torch.inf)
            out = torch.where(alive[..., None], out, 0.0)
        if found is None:
            found, lse = out, new
            continue
        total = torch.logaddexp(lse, new)
        base = total.masked_fill(total == -torch.inf, 0.0)
        before, more = (torch.exp(a - base)[..., None] for a in (lse, new))
        found, lse = found * before + out * more, total
    if found is None:
        return q.new_zeros(()), q.new_full((), -torch.inf)
    return found, lse


def backward(
    ask: Ask, scale: float, x: Operands, saved: Saved, up: Array, wanted: Sequence[bool]
) -> list[Array]:
    """Gradients of query, key and value, those wanted; nothing else has any here."""
    q, k, v, out, d_out = (_heads_first(ask, a) for a in (*x[:3], saved.out, up))
    if ask.kernel != "tiles":
        causal = ask.kernel == "causal"
        found = _kernel_backward(d_out, q, k, v, out, saved.m, 0.0, causal, scale=scale)
        found = [g if ask.layout == "BHTD" else g.transpose(1, 2) for g in found]
        return [g for g, yes in zip(found, wanted, strict=False) if yes]
    w = Work(ask, scale, x, ROWS, KEYS)
    lse, clean = saved.m + saved.log_l, _Clean(k, v)
    grads = [torch.zeros(a.shape, dtype=w.dtype, device=w.device) for a in x[:3]]
    d_query, d_key, d_value = (w.heads_first(g) for g in grads)
    for turn in turns(w):
        for band, chosen in Selections(w, turn):
            lone = _lone(band.spans, chosen)
            for batch in _batches(w, turn, band):
                rows, keys = (batch, turn.heads), (batch, turn.keys)
                row = [band.of_rows(a, *rows) for a in (d_out, q, out, lse)]
                row = _selected(row, band.of_rows(saved.alive, *rows))
                if lone is not None:
                    row[1] = torch.where(lone[..., None], 0.0, row[1])
                    row[3] = torch.where(lone, 0.0, row[3])
                for span, each in zip(band.spans, chosen, strict=True):
                    seen = [_only(band.of_keys(a, *keys, span), each, clean) for a in (k, v)]
                    dq, dk, dv = _kernel_backward(
                        *(*row[:2], *seen, *row[2:], 0.0, False),
                        attn_mask=each and each.added,
                        scale=scale,
                    )
                    if lone is not None:
                        dq = torch.where(lone[..., None], 0.0, dq)
                    band.of_rows(d_query, *rows).add_(dq)
                    band.add(d_key, dk, *keys, span)
                    band.add(d_value, dv, *keys, span)
    pairs = zip(grads, x[:3], wanted, strict=False)
    return [g.to(a.dtype) for g, a, yes in pairs if yes]


def _selected(row: list[Array], alive: Array) -> list[Array]:
    """d_out, query, out and lse of a tile of rows: of those that may see no key, 0 and +inf."""
    if alive.all():
        return row
    return [*[torch.where(alive[..., None], a, 0.0) for a in row[:3]], row[3]]


def _lone(spans: Sequence[Span], chosen: Sequence[Selection | None]) -> Array | None:
    """Which rows may see one key only, if any do: their weight is 1 whatever the logit.

    So the logit's gradient is 0, of which the kernel leaves a rounding: it takes the difference of
    two equal sums. A row of zeros, of lse 0, gives that weight and hands nothing on to the key.
    """
    masked = [each.count for each in chosen if each is not None]
    whole = sum(span.stop - span.start for span in spans if span.full)
    if not masked or whole > 1:
        return None
    lone = sum(masked[1:], masked[0]) + whole == 1
    return lone if lone.any() else None


def fits(scale: float, pairs: Sequence[tuple[Array, Array]], finite: bool = False) -> bool:
    """Whether no product of these rows can overflow, where they are finite at all.

    The kernel hides by adding -inf, so that a hidden logit of +inf would be NaN, and says lse 0 of
    a row whose logits are all -inf. Such numbers are left to products and selections of our own;
    NaN and infinity are not, since they are replaced where nobody may see them, and data elsewhere.
    With `finite` they are left to our own as well: where nothing is hidden and lse is asked for.
    """
    for x, y in pairs:
        ends = torch.stack([end.double() for a in (x, y) for end in torch.aminmax(a)]).abs()
        low, high, other_low, other_high = ends.tolist()
        most = max(low, high) * max(other_low, other_high) * x.shape[-1] * max(1.0, abs(scale))
        # NaN is neither below nor above.
        if not most < _LARGEST and (finite or _LARGEST <= most < float("inf")):
            return False
    return True


class _Clean:
    """Whether nothing in an array could spoil a product with 0; found out when first asked."""

    def __init__(self, *arrays: Array) -> None:
        self._arrays, self._known = arrays, False

    def __bool__(self) -> bool:
        if self._arrays:
            ends = [end for x in self._arrays for end in torch.aminmax(x)]
            # NaN is in no range.
            self._known = all(-_PLAIN <= end <= _PLAIN for end in torch.stack(ends).tolist())
            self._arrays = ()
        return self._known


def _only(x: Array, chosen: Selection | None, clean: _Clean) -> Array:
    """Keys or values that no row of the tile may see replaced by 0, unless they are harmless."""
    if chosen is None or chosen.seen is None or clean:
        return x
    return torch.where(chosen.seen[..., None], x, 0.0)


def _heads_first(ask: Ask, x: Array) -> Array:
    """(B, H, T, D), neighbours of the last axis side by side: the kernel takes that for granted."""
    x = x if ask.layout == "BHTD" else x.transpose(1, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _laid_out(ask: Ask, x: Array) -> Array:
    """In the layout asked for, and in memory as it reads: a compiler was promised that."""
    return (x if ask.layout == "BHTD" else x.transpose(1, 2)).contiguous()
