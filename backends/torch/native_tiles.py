"""torch's fused CPU kernel over live tiles: each tile of rows asks for the keys it may see.

The kernel gives a row's log-sum-exp beside its output, so that a tile whose live keys lie apart
asks once for each span and merges; and its backward pass, handed the output and log-sum-exp of the
whole row, gives one span's share of each gradient. A span is a slice, nothing is copied, and only
spans that are not full carry a selection, 0 or -inf, evaluated for several tiles at a time.

What the kernel does not know of is done around it: rows that may see no key (it says lse 0 there),
and keys, values and rows that nobody may look at, which are replaced by 0 where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from attn_core.backends.torch.arrays import Reading
from attn_core.backends.torch.chunked_backward import Saved
from attn_core.backends.torch.chunked_parts import Ask, Span, Work
from attn_core.blocks import EMPTY, FULL
from attn_core.spec import Operands

Array = Any

_ROWS, _KEYS = 128, 64
"""Rows of a tile, and keys of a block: fine enough for a narrow window to be mostly live."""

_JOINED = 1024
"""Keys up to which a full stretch joins its partial neighbours: one call instead of two."""

_SELECTION = 2**20
"""Bytes of selection that are evaluated together."""

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Selection(NamedTuple):
    """What one span lets through.

    Attributes:
        added: 0 or -inf, dtype of query, (1 or B', 1 or H', rows, keys).
        count: (..., rows), the keys of the span that the row may see.
        empty: whether some row may see none.
        seen: (..., keys), some row may see the key; None where every key is seen.
    """

    added: Array
    count: Array
    empty: bool
    seen: Array | None


class Turn(NamedTuple):
    """Batches and key heads that share one map.

    Attributes:
        batch, keys, heads: slices of B, Hk and Hq.
        lines: for each tile of rows, its spans.
    """

    batch: slice
    keys: slice
    heads: slice
    lines: list[list[Span]]


def forward(ask: Ask, scale: float, x: Operands) -> tuple[Array, ...]:
    """out, lse, weights (none), m, log l and alive, as `chunked_forward.forward`."""
    if ask.kernel != "tiles":
        q, k, v = (_heads_first(ask, a) for a in x[:3])
        out, lse = _kernel(q, k, v, 0.0, ask.kernel == "causal", scale=scale)
        log_l, alive = torch.zeros_like(lse), torch.ones_like(lse, dtype=torch.bool)
        shown = lse.clone() if ask.lse else lse.new_empty(0)
        return _laid_out(ask, out), shown, x.query.new_empty(0), lse, log_l, alive
    w = Work(ask, scale, x, _ROWS, _KEYS)
    query, key, value = (_heads_first(ask, a) for a in x[:3])
    out = x.query.new_empty(x.query.shape)
    into = w.heads_first(out)
    m = torch.empty((w.batch, w.heads, w.q_len), dtype=w.dtype, device=w.device)
    for turn in _turns(w):
        selections = Selections(w, turn)
        for at, spans in zip(w.rows, turn.lines, strict=True):
            rows = (turn.batch, turn.heads, at)
            found, lse = _row(query[rows], key, value, turn, at, spans, selections, scale)
            into[rows], m[rows] = found, lse
    alive = m != -torch.inf
    log_l = torch.where(alive, 0.0, torch.inf)
    shown = m.clone() if ask.lse else m.new_empty(0)
    m = m.masked_fill_(~alive, 0.0)
    return out, shown, x.query.new_empty(0), m, log_l, alive


def _row(
    q: Array,
    key: Array,
    value: Array,
    turn: Turn,
    at: slice,
    spans: Sequence[Span],
    selections: Selections,
    scale: float,
) -> tuple[Array, Array]:
    """(out, lse) of a tile of rows; 0 and -inf where a row may see no key."""
    found = lse = None
    for span in spans:
        chosen = selections.of(at, span)
        keys = (turn.batch, turn.keys, slice(span.start, span.stop))
        k, v = _only(key[keys], chosen), _only(value[keys], chosen)
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
        return [_laid_out(ask, g) for g, yes in zip(found, wanted, strict=False) if yes]
    w = Work(ask, scale, x, _ROWS, _KEYS)
    lse = saved.m + saved.log_l
    grads = [torch.zeros(a.shape, dtype=w.dtype, device=w.device) for a in x[:3]]
    d_query, d_key, d_value = (w.heads_first(g) for g in grads)
    for turn in _turns(w):
        selections = Selections(w, turn)
        for at, spans in zip(w.rows, turn.lines, strict=True):
            rows = (turn.batch, turn.heads, at)
            chosen = [selections.of(at, span) for span in spans]
            row = _selected([a[rows] for a in (d_out, q, out, lse)], saved.alive[rows])
            lone = _lone(spans, chosen)
            if lone is not None:
                row[1] = torch.where(lone[..., None], 0.0, row[1])
                row[3] = torch.where(lone, 0.0, row[3])
            for span, each in zip(spans, chosen, strict=True):
                keys = (turn.batch, turn.keys, slice(span.start, span.stop))
                found = list(
                    _kernel_backward(
                        *(row[0], row[1], _only(k[keys], each), _only(v[keys], each), row[2]),
                        *(row[3], 0.0, False),
                        attn_mask=each and each.added,
                        scale=scale,
                    )
                )
                if lone is not None:
                    found[0] = torch.where(lone[..., None], 0.0, found[0])
                for d, place, g in zip(
                    (d_query, d_key, d_value), (rows, keys, keys), found, strict=True
                ):
                    d[place] += g
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


class Selections:
    """The selections of a turn's spans, evaluated a few tiles ahead where they are alike."""

    def __init__(self, w: Work, turn: Turn) -> None:
        self.w, self.turn = w, turn
        # Tiles of as many rows and keys, in the order in which they will be asked for.
        self._alike: dict[tuple[int, int], list[tuple[slice, Span]]] = {}
        self._ready: dict[tuple[int, int], Selection] = {}
        for at, spans in zip(w.rows, turn.lines, strict=True):
            for span in spans:
                if not span.full:
                    self._alike.setdefault(_size(at, span), []).append((at, span))

    def of(self, at: slice, span: Span) -> Selection | None:
        """The selection of a span, asked for once; None where all of it may be seen."""
        if span.full:
            return None
        place = (at.start, span.start)
        if place not in self._ready:
            self._read_ahead(_size(at, span))
        return self._ready.pop(place)

    def _read_ahead(self, size: tuple[int, int]) -> None:
        w, waiting = self.w, self._alike[size]
        rows, keys = size
        heads = len(range(w.heads)[self.turn.heads])
        batches = len(range(w.batch)[self.turn.batch])
        widest = rows * keys * heads * batches * w.query.dtype.itemsize
        # Most masks read no head, and need a fraction of that.
        if w.ask.mask is None or not w.ask.mask.reads("h"):
            widest //= heads
        ahead = max(1, _SELECTION // widest)
        taken, self._alike[size] = waiting[:ahead], waiting[ahead:]
        allowed = self._allowed(taken)
        count, seen = allowed.sum(-1, dtype=torch.int32), allowed.any(-2)
        least = count.flatten(1).amin(1).tolist()
        all_seen = seen.flatten(1).all(1).tolist()
        added = torch.zeros(allowed.shape, dtype=w.query.dtype, device=w.device)
        added.masked_fill_(~allowed, -torch.inf)
        for n, (at, span) in enumerate(taken):
            self._ready[at.start, span.start] = Selection(
                added[n],
                count[n],
                least[n] == 0,
                None if all_seen[n] else self._by_key_head(seen[n]),
            )

    def _allowed(self, tiles: Sequence[tuple[slice, Span]]) -> Array:
        """(tiles, B' or 1, H' or 1, rows, keys), whether row may see key."""
        w, turn = self.w, self.turn
        ints = {"dtype": torch.int32, "device": w.device}

        def along(starts: list[int], size: int, axis: int) -> Array:
            shape = [len(starts), 1, 1, 1, 1, 1]
            first = torch.tensor(starts, **ints).view(shape)
            shape[0], shape[axis] = 1, size
            return first + torch.arange(size, **ints).view(shape)

        at, span = tiles[0]
        row = along([at.start for at, _ in tiles], at.stop - at.start, 4)
        k = along([span.start for _, span in tiles], span.stop - span.start, 5)
        offset = w.offset if len(w.offset) == 1 else w.offset[turn.batch]
        heads = torch.arange(w.heads, **ints).view(1, 1, w.kv_heads, w.group, 1, 1)
        index = {
            "b": torch.arange(w.batch, **ints)[turn.batch].view(1, -1, 1, 1, 1, 1),
            "h": heads[:, :, turn.keys],
            "q": row + offset[None],
            "k": k,
            "row": row,
        }
        found = [torch.ones((), dtype=torch.bool, device=w.device)]
        if w.ask.mask is not None:
            found += Reading(w.accumulation, w.x.mask, w.device).read(w.ask.mask, index, w.x.mask)
        for lengths, name in ((w.kv_lengths, "k"), (w.q_lengths, "row")):
            if lengths is not None:
                length = lengths if len(lengths) == 1 else lengths[turn.batch]
                found.append(index[name] < length[None])
        allowed = found[0]
        for more in found[1:]:
            allowed = allowed & more
        allowed = allowed.view((1,) * (6 - allowed.dim()) + allowed.shape)
        size = (len(tiles), *allowed.shape[1:4], at.stop - at.start, span.stop - span.start)
        if size[2] * size[3] > 1:
            size = (*size[:2], heads[:, :, turn.keys].shape[2], w.group, *size[4:])
        return allowed.expand(size).flatten(2, 3)

    def _by_key_head(self, seen: Array) -> Array:
        """(B', H' or 1, keys) over the heads of a group."""
        if seen.shape[1] == 1 or self.w.group == 1:
            return seen
        return seen.unflatten(1, (-1, self.w.group)).any(2)


def _turns(w: Work) -> Iterator[Turn]:
    """All batches and heads at once where they share one map and one selection."""
    batch_map, head_map = w.status.shape[:2]
    apart = (
        batch_map > 1
        or len(w.offset) > 1
        or w.kv_lengths is not None
        or w.q_lengths is not None
        or (w.ask.mask is not None and w.ask.mask.reads("b"))
    )
    lines: dict[tuple[int, int], list[list[Span]]] = {}
    for b in range(w.batch) if apart else (0,):
        for h in range(head_map):
            place = (b if batch_map > 1 else 0, h)
            if place not in lines:
                lines = {place: [_spans(w, line) for line in w.status[place].tolist()]}
            yield Turn(
                slice(b, b + 1) if apart else slice(None),
                slice(h, h + 1) if head_map > 1 else slice(None),
                slice(h * w.group, (h + 1) * w.group) if head_map > 1 else slice(None),
                lines[place],
            )


def _spans(w: Work, line: list[int]) -> list[Span]:
    """Spans of a row of blocks: what is live and adjoining, full apart from partial if long."""
    spans: list[Span] = []
    for j, status in enumerate(line):
        if status == EMPTY:
            continue
        start, stop = j * w.block_k, min((j + 1) * w.block_k, w.k_len)
        full = status == FULL
        if spans and spans[-1].stop == start and spans[-1].full == full:
            start = spans.pop().start
        spans.append(Span(start, stop, full))
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].stop == span.start and span.stop - joined[-1].start <= _JOINED:
            span = Span(joined.pop().start, span.stop, False)
        joined.append(span)
    return joined


def _only(x: Array, chosen: Selection | None) -> Array:
    """Keys or values that no row of the tile may see replaced by 0."""
    if chosen is None or chosen.seen is None:
        return x
    return torch.where(chosen.seen[..., None], x, 0.0)


def _size(at: slice, span: Span) -> tuple[int, int]:
    return at.stop - at.start, span.stop - span.start


def _heads_first(ask: Ask, x: Array) -> Array:
    """(B, H, T, D), neighbours of the last axis side by side: the kernel takes that for granted."""
    x = x if ask.layout == "BHTD" else x.transpose(1, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _laid_out(ask: Ask, x: Array) -> Array:
    """In the layout asked for, and in memory as it reads: a compiler was promised that."""
    return (x if ask.layout == "BHTD" else x.transpose(1, 2)).contiguous()
