"""torch's fused CPU kernel over live tiles: each tile of rows asks for the keys it may see.

The kernel gives a row's log-sum-exp beside its output, so that a tile whose live keys lie apart
asks once for each span and merges; and its backward pass, handed the output and log-sum-exp of the
whole row, gives one span's share of each gradient. A span is a slice, nothing is copied, and only
spans that are not full carry a selection. A band of tiles is one call: the kernel reads its batch
by a stride, and a stride from tile to tile is as good.

What the kernel does not know of is done around it: rows that may see no key (it says lse 0 there),
and keys and values that nobody may look at. It hides by adding -inf, so that a hidden logit which
is NaN or +inf makes NaN of its row, and a hidden value which is NaN or infinite of its output;
nothing of that kind stays unseen (a test poisons every place). So it is asked first, and its answer
looked at, which is far less than all keys and values. Where an answer is not finite, or a row's
logits came to nothing, keys and values are looked at, too: those that nobody may see are replaced
by 0 and the kernel is asked again; or its products overflow, and others must answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core.backends.torch.chunked_backward import Saved
from attn_core.backends.torch.chunked_parts import Ask, Span, Work
from attn_core.backends.torch.native_bands import Band, Turn, turns, work
from attn_core.backends.torch.native_selections import Selection, Selections
from attn_core.spec import Operands

Array = Any

_PLAIN = 2.0**32
"""The largest key or value of which it is taken for granted that no product with it overflows."""

_LARGEST = 2.0**100
"""What products may come to at most: far from float32's 2**128, and from nothing that occurs."""

_ALLOWED = {torch.float64: 16, torch.float32: 16, torch.float16: 2, torch.bfloat16: 2}
"""Units in the last place of the dtype by which a weight may be off that one number rebuilds.

The kernel's backward pass makes a row's weights exp(s - lse), and lse is one number of the
accumulation's dtype: its rounding, at most |lse| * u with u = eps(accumulation) / 2, is a factor
of the whole row. What conformance lets pass, 16 units of eps and 2 of what has 16 bits, is kept for

    |lse| <= _ALLOWED[dtype] * eps(dtype) / u       32; 2**15 for float16, 2**18 for bfloat16

and rows beyond that are rebuilt from (m, log l), as `chunked` does. (On cuda nobody looks: that
would wait for the device, and what torch's own backward pass makes of one float32 holds there.)
"""

_WIDE = {
    torch.float64: torch.float64,
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float32),
}

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(ask: Ask, scale: float, x: Operands) -> tuple[Array, ...] | None:
    """out, lse, weights (none), m, log l and alive, as `chunked_forward.forward`.

    None where products of the arrays overflow, so that products of our own must answer.
    """
    if ask.kernel != "tiles":
        q, k, v = (_heads_first(ask, a) for a in x[:3])
        out, lse = _kernel(q, k, v, 0.0, ask.kernel == "causal", scale=scale)
        if ask.lse and not _sound(lse, lse == 0) and not _fits(scale, [(q, k)], finite=True):
            return None
        log_l, alive = torch.zeros_like(lse), torch.ones_like(lse, dtype=torch.bool)
        shown = lse.clone() if ask.lse else lse.new_empty(0)
        out = out if ask.layout == "BHTD" else out.transpose(1, 2)
        return out, shown, x.query.new_empty(0), lse, log_l, alive
    w = work(ask, scale, x)
    clean = _Clean(*(_heads_first(ask, a) for a in (x.key, x.value)))
    out, m, lost = _rows(w, clean)
    if not _sound(out, m.masked_fill(m == -torch.inf, 0.0), lost):
        if not _fits(scale, [(x.query, x.key)]):
            return None
        if clean.look():
            out, m, _ = _rows(w, clean)
    alive = m != -torch.inf
    log_l = torch.zeros_like(m).masked_fill_(~alive, torch.inf)
    shown = m.clone() if ask.lse else m.new_empty(0)
    m = m.masked_fill_(~alive, 0.0)
    return out, shown, x.query.new_empty(0), m, log_l, alive


def _rows(w: Work, clean: _Clean) -> tuple[Array, Array, Array]:
    """out, in the layout asked for, lse (B, Hq, Tq), and whether some row's logits were lost."""
    query, key, value = (_heads_first(w.ask, a) for a in w.x[:3])
    out = query.new_empty(w.x.query.shape)
    into = w.heads_first(out)
    m = torch.empty((w.batch, w.heads, w.q_len), dtype=w.dtype, device=w.device)
    lost: list[Array] = []
    for turn in turns(w):
        for band, chosen in Selections(w, turn):
            for batch in _batches(w, turn, band):
                rows, keys = (batch, turn.heads), (batch, turn.keys)
                q = band.of_rows(query, *rows)
                found, lse = _row(q, key, value, band, keys, chosen, w.scale, clean, lost)
                band.of_rows(into, *rows)[...] = found
                band.of_rows(m, *rows)[...] = lse
                del found, lse  # what the next call gives may take their place, still in the caches
    return out, m, torch.stack(lost) if lost else m.new_zeros(1)


def _sound(*arrays: Array) -> bool:
    """Whether all of these are finite, and those of booleans hold nothing true.

    A sum may overflow where no entry does; then there is one look too many.
    """
    sums = [x.any() if x.dtype == torch.bool else x.sum(dtype=_WIDE[x.dtype]) for x in arrays]
    return all(torch.isfinite(x) if x.is_floating_point() else not x for x in sums)


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
    lost: list[Array],
) -> tuple[Array, Array]:
    """(out, lse) of a band; 0 and -inf where a row may see no key.

    `lost` is told whether a row that sees keys has lse 0: its logits may all have been -inf.
    """
    found = lse = None
    for span, chosen in zip(band.spans, selections, strict=True):
        k, v = (_only(band.of_keys(x, *at, span), chosen, clean) for x in (key, value))
        out, new = _asked(q, k, v, chosen and chosen.added, scale, band.many > 1)
        nothing = new == 0
        if chosen is not None and chosen.empty:
            alive = chosen.count > 0
            nothing &= alive
            new = torch.where(alive, new, -torch.inf)
            out = torch.where(alive[..., None], out, 0.0)
        lost.append(nothing.any())
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


def _asked(
    q: Array, k: Array, v: Array, added: Array | None, scale: float, many: bool
) -> tuple[Array, Array]:
    """(out, lse) of the kernel, which goes through its heads faster than through its batch.

    Tiles next to each other see mostly the same keys, which are then still in the caches: so heads
    stand in the place of the batch, and tiles in theirs. Heads of a group cannot, they have fewer
    keys.
    """
    if not many or q.shape[1] != k.shape[1]:
        return _kernel(q, k, v, 0.0, False, attn_mask=added, scale=scale)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    added = added if added is None else added.transpose(0, 1)
    out, lse = _kernel(q, k, v, 0.0, False, attn_mask=added, scale=scale)
    return out.transpose(0, 1), lse.transpose(0, 1)


def backward(
    ask: Ask, scale: float, x: Operands, saved: Saved, up: Array, wanted: Sequence[bool]
) -> list[Array] | None:
    """Gradients of query, key and value, those wanted; nothing else has any here.

    None where products overflow, as in `forward`.
    """
    q, k, v, out, d_out = (_heads_first(ask, a) for a in (*x[:3], saved.out, up))
    if ask.kernel != "tiles":
        causal = ask.kernel == "causal"
        lse = saved.m + saved.log_l
        found = _kernel_backward(d_out, q, k, v, out, lse, 0.0, causal, scale=scale)
        found = [g if ask.layout == "BHTD" else g.transpose(1, 2) for g in found]
        return [g for g, yes in zip(found, wanted, strict=False) if yes]
    w = work(ask, scale, x, backward=True)
    clean = _Clean(k, v)

    def asked() -> list[Array]:
        grads = _gradients(w, [d_out, q, k, v, out], saved, clean)
        return [g for g, yes in zip(grads, wanted, strict=False) if yes]

    found = asked()
    if not _sound(*found):
        if not _fits(scale, [(q, k), (d_out, v)]):
            return None
        if clean.look():
            found = asked()
    types = [a.dtype for a, yes in zip(x[:3], wanted, strict=False) if yes]
    return [g.to(dtype) for g, dtype in zip(found, types, strict=True)]


def coarse(x: Operands, saved: Saved) -> Array | None:
    """Rows whose log-sum-exp is too large to rebuild their weights from, if any: see `_ALLOWED`.

    Infinite ones are of rows without a sum, and NaN is data.
    """
    lse, dtype = saved.m, x.query.dtype
    if not lse.numel():
        return None
    most = _ALLOWED[dtype] * torch.finfo(dtype).eps / (torch.finfo(lse.dtype).eps / 2)
    low, high = torch.stack(torch.aminmax(lse)).tolist()
    if -most <= low and high <= most:
        return None
    found = (lse.abs() > most) & lse.isfinite()
    return found if found.any() else None


def _gradients(w: Work, arrays: Sequence[Array], saved: Saved, clean: _Clean) -> list[Array]:
    """Of query, key and value, in their layout and the accumulation dtype.

    `arrays` are the gradient of out, query, key, value and out, heads first.
    """
    (d_out, q, k, v, out), x, scale = arrays, w.x, w.scale
    lse = saved.m + saved.log_l
    # Every row is in one tile, and overwritten; keys are added to.
    made = (torch.empty, torch.zeros, torch.zeros)
    grads = [
        make(a.shape, dtype=w.dtype, device=w.device) for make, a in zip(made, x[:3], strict=True)
    ]
    d_query, d_key, d_value = (w.heads_first(g) for g in grads)
    for turn in turns(w, backward=True):
        for band, chosen in Selections(w, turn):
            lone = _lone(band.spans, chosen)
            for batch in _batches(w, turn, band):
                rows, keys = (batch, turn.heads), (batch, turn.keys)
                row = [band.of_rows(a, *rows) for a in (d_out, q, out, lse)]
                row = _selected(row, band.of_rows(saved.alive, *rows))
                if lone is not None:
                    row[1] = torch.where(lone[..., None], 0.0, row[1])
                    row[3] = torch.where(lone, 0.0, row[3])
                into = band.of_rows(d_query, *rows)
                if not band.spans:
                    into.zero_()
                for number, (span, each) in enumerate(zip(band.spans, chosen, strict=True)):
                    seen = [_only(band.of_keys(a, *keys, span), each, clean) for a in (k, v)]
                    dq, dk, dv = _kernel_backward(
                        *(*row[:2], *seen, *row[2:], 0.0, False),
                        attn_mask=each and each.added,
                        scale=scale,
                    )
                    if lone is not None:
                        dq = torch.where(lone[..., None], 0.0, dq)
                    into = into.add_(dq) if number else into.copy_(dq)
                    band.add(d_key, dk, *keys, span)
                    band.add(d_value, dv, *keys, span)
                    del dq, dk, dv  # as in `_rows`
    return grads


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


def _fits(scale: float, pairs: Sequence[tuple[Array, Array]], finite: bool = False) -> bool:
    """Whether no product of these rows can overflow, where they are finite at all.

    A hidden logit of +inf would be NaN, and of a row whose logits are all -inf the kernel says
    lse 0. Such numbers are left to products and selections of our own;
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
    """Whether nothing in keys and values could spoil a product with 0; at first they are trusted.

    Attributes:
        trusted: whether anybody has asked.
    """

    def __init__(self, *arrays: Array) -> None:
        self._arrays, self._known, self.trusted = arrays, True, False

    def __bool__(self) -> bool:
        self.trusted = True
        return self._known

    def look(self) -> bool:
        """Whether they were trusted wrongly; from now on that is known."""
        if not self.trusted:
            return False
        ends = [end for x in self._arrays for end in torch.aminmax(x)]
        # NaN is in no range.
        self._known = all(-_PLAIN <= end <= _PLAIN for end in torch.stack(ends).tolist())
        return not self._known


def _only(x: Array, chosen: Selection | None, clean: _Clean) -> Array:
    """Keys or values that no row of the tile may see replaced by 0, unless they are harmless."""
    if chosen is None or chosen.seen is None or clean:
        return x
    return torch.where(chosen.seen[..., None], x, 0.0)


def _heads_first(ask: Ask, x: Array) -> Array:
    """(B, H, T, D), neighbours of the last axis side by side: the kernel takes that for granted."""
    x = x if ask.layout == "BHTD" else x.transpose(1, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
