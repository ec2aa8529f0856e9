"""torch's fused CPU kernel over live tiles: each tile of rows asks for the keys it may see.

The kernel gives a row's log-sum-exp beside its output, so that a tile whose live keys lie apart
asks once for each span and merges; and its backward pass, handed the output and log-sum-exp of the
whole row, gives one span's share of each gradient. A span is a slice, nothing is copied, and only
spans that are not full carry a selection, 0 or -inf, evaluated for several tiles at a time.

Tiles that see as many keys and stand evenly apart, as those of a window or of equal documents do,
are one call: the kernel reads its batch by a stride, and a stride from tile to tile is as good.

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
from attn_core.language.shifts import slides
from attn_core.spec import Operands

Array = Any

_ROWS, _KEYS = 128, 64
"""Rows of a tile, and keys of a block: fine enough for a narrow window to be mostly live."""

_JOINED, _JOINED_BAND = 1024, 2048
"""Keys up to which a full stretch joins its partial neighbours: one call instead of two."""

_SELECTION = 2**21
"""Bytes of selection that are evaluated together."""

_BAND = 2**24
"""Bytes of output, or of gradients of keys and values, that one call over many tiles may give."""

_PLAIN = 2.0**32
"""The largest key or value of which it is taken for granted that no product with it overflows."""

_LARGEST = 2.0**100
"""What products may come to at most: far from float32's 2**128, and from nothing that occurs."""

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


class Band(NamedTuple):
    """Tiles that are alike along a diagonal, evenly apart; often a single one.

    Attributes:
        rows: of the first tile.
        spans: what its rows see.
        many: tiles.
        step: rows, and keys, from one tile to the next.
    """

    rows: slice
    spans: list[Span]
    many: int = 1
    step: int = 0

    def tiles(self, number: int) -> list[tuple[slice, Span]]:
        """Every tile's rows, and its span of that number."""
        rows, span = self.rows, self.spans[number]
        found = []
        for n in range(self.many):
            by = n * self.step
            at = slice(rows.start + by, rows.stop + by)
            found.append((at, Span(span.start + by, span.stop + by, span.full)))
        return found

    def of_rows(self, x: Array, batch: int | slice, heads: slice) -> Array:
        """The tiles of x (B, Hq, Tq, ...), first axis the tiles where they are many: a view."""
        return _strided(x, batch, heads, self.rows, self.many, self.step)

    def of_keys(self, x: Array, batch: int | slice, heads: slice, span: Span) -> Array:
        """The same of x (B, Hk, Tk, ...) and a span; what several tiles see is in each."""
        return _strided(x, batch, heads, slice(span.start, span.stop), self.many, self.step)

    def add(self, x: Array, more: Array, batch: int | slice, heads: slice, span: Span) -> None:
        """x += more, where `more` lies as `of_keys` has it."""
        if self.many == 1 or self.step >= span.stop - span.start:
            self.of_keys(x, batch, heads, span).add_(more)
            return
        for n, part in enumerate(more):
            start = span.start + n * self.step
            x[batch, heads, start : start + part.shape[1]] += part


def _strided(
    x: Array, batch: int | slice, heads: slice, first: slice, count: int, step: int
) -> Array:
    if count == 1:
        return x[batch, heads, first]
    x = x[batch, heads, first.start :]
    size = (count, x.shape[0], first.stop - first.start, *x.shape[2:])
    return x.as_strided(size, (step * x.stride(1), *x.stride()))


class Turn(NamedTuple):
    """Batches and key heads that share one map.

    Attributes:
        batch, keys, heads: slices of B, Hk and Hq.
        bands: all tiles of rows.
    """

    batch: slice
    keys: slice
    heads: slice
    bands: list[Band]


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
    clean = _Clean(key, value)
    for turn in _turns(w):
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
    w = Work(ask, scale, x, _ROWS, _KEYS)
    lse, clean = saved.m + saved.log_l, _Clean(k, v)
    grads = [torch.zeros(a.shape, dtype=w.dtype, device=w.device) for a in x[:3]]
    d_query, d_key, d_value = (w.heads_first(g) for g in grads)
    for turn in _turns(w):
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


class Selections:
    """A turn's bands with the selections of their spans, None where all of a span may be seen.

    They are evaluated a few tiles ahead, where those are alike, and of a band that slides along a
    diagonal once for all of its tiles.
    """

    def __init__(self, w: Work, turn: Turn) -> None:
        self.w, self.turn = w, turn
        self._slides = _slides(w)
        # By rows and keys of a tile: the band's number and the span's, as they will be asked for.
        self._alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._ready: dict[tuple[int, int], Selection] = {}
        for n, band in enumerate(turn.bands):
            for number, span in enumerate(band.spans):
                if not span.full:
                    self._alike.setdefault(_size(band.rows, span), []).append((n, number))

    def __iter__(self) -> Iterator[tuple[Band, list[Selection | None]]]:
        for n, band in enumerate(self.turn.bands):
            chosen: list[Selection | None] = [None] * len(band.spans)
            for number, span in enumerate(band.spans):
                if not span.full:
                    if (n, number) not in self._ready:
                        self._read_ahead(_size(band.rows, span))
                    chosen[number] = self._ready.pop((n, number))
            yield band, chosen

    def _read_ahead(self, size: tuple[int, int]) -> None:
        waiting = self._alike[size]
        ahead = max(1, _SELECTION // _selection_bytes(self.w, self.turn, *size))
        taken: list[tuple[int, int]] = []
        tiles: list[tuple[slice, Span]] = []
        while waiting:
            n, number = waiting[0]
            more = self.turn.bands[n].tiles(number)[: self._evaluated(n)]
            if taken and len(tiles) + len(more) > ahead:
                break
            taken.append(waiting.pop(0))
            tiles += more
        allowed = self._allowed(tiles)
        count, seen = allowed.sum(-1, dtype=torch.int32), allowed.any(-2)
        least = count.flatten(1).amin(1).tolist()
        all_seen = seen.flatten(1).all(1).tolist()
        added = torch.zeros(allowed.shape, dtype=self.w.query.dtype, device=self.w.device)
        added.masked_fill_(~allowed, -torch.inf)
        first = 0
        for place in taken:
            many = self._evaluated(place[0])
            # One tile has the batch before its heads, many tiles stand in its place.
            single = self.turn.bands[place[0]].many == 1
            part: Any = first if single else (slice(first, first + many), 0)
            every = all(all_seen[first : first + many])
            self._ready[place] = Selection(
                added[part],
                count[part],
                0 in least[first : first + many],
                None if every else self._by_key_head(seen[part]),
            )
            first += many

    def _evaluated(self, n: int) -> int:
        """How many tiles of a band are evaluated."""
        band = self.turn.bands[n]
        return 1 if self._slides else band.many

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
    found: dict[tuple[int, int], list[Band]] = {}
    for b in range(w.batch) if apart else (0,):
        for h in range(head_map):
            place = (b if batch_map > 1 else 0, h)
            turn = Turn(
                slice(b, b + 1) if apart else slice(None),
                slice(h, h + 1) if head_map > 1 else slice(None),
                slice(h * w.group, (h + 1) * w.group) if head_map > 1 else slice(None),
                [],
            )
            if place not in found:
                found = {place: _bands(w, turn, w.status[place].tolist())}
            yield turn._replace(bands=found[place])


def _bands(w: Work, turn: Turn, lines: list[list[int]]) -> list[Band]:
    """The tiles of rows, alike ones together."""
    alike: dict[Any, list[Band]] = {}
    for rows, line in zip(w.rows, lines, strict=True):
        spans = _spans(w, line)
        here = rows.start
        form = tuple((span.start - here, span.stop - here, span.full) for span in spans)
        series = alike.setdefault((rows.stop - here, form), [])
        if series and spans:
            last = series[-1]
            step = here - last.rows.start - (last.many - 1) * last.step
            most = _most(w, turn, rows, spans)
            if last.many < most and (last.many == 1 or step == last.step):
                series[-1] = Band(last.rows, last.spans, last.many + 1, step)
                continue
        series.append(Band(rows, spans))
    bands = sorted((band for series in alike.values() for band in series), key=_first_row)
    return [
        band._replace(spans=_joined(band.spans, _JOINED if band.many == 1 else _JOINED_BAND))
        for band in bands
    ]


def _first_row(band: Band) -> int:
    return band.rows.start


def _most(w: Work, turn: Turn, rows: slice, spans: Sequence[Span]) -> int:
    """Tiles that one call may be over."""
    size, width = rows.stop - rows.start, spans[-1].stop - spans[0].start
    heads, keys = len(range(w.heads)[turn.heads]), len(range(w.kv_heads)[turn.keys])
    row = size * heads * (w.query.shape[-1] + w.value.shape[-1])
    column = width * keys * (w.query.shape[-1] + w.value.shape[-1])
    given = max(row, column) * w.query.dtype.itemsize
    if _slides(w) or all(span.full for span in spans):
        return max(1, _BAND // given)
    return max(1, min(_BAND // given, _SELECTION // _selection_bytes(w, turn, size, width)))


def _slides(w: Work) -> bool:
    """Whether a selection is the same all along a diagonal."""
    if w.ask.mask is None or w.kv_lengths is not None or w.q_lengths is not None:
        return False
    return slides(w.ask.mask)


def _selection_bytes(w: Work, turn: Turn, rows: int, keys: int) -> int:
    """Bytes of one tile's selection; most masks read no head, and need a fraction of that."""
    heads = len(range(w.heads)[turn.heads])
    if w.ask.mask is None or not w.ask.mask.reads("h"):
        heads = 1
    return rows * keys * heads * w.query.dtype.itemsize


def _spans(w: Work, line: list[int]) -> list[Span]:
    """Spans of a row of blocks: what is live and adjoining, full apart from partial."""
    spans: list[Span] = []
    for j, status in enumerate(line):
        if status == EMPTY:
            continue
        start, stop = j * w.block_k, min((j + 1) * w.block_k, w.k_len)
        full = status == FULL
        if spans and spans[-1].stop == start and spans[-1].full == full:
            start = spans.pop().start
        spans.append(Span(start, stop, full))
    return spans


def _joined(spans: Sequence[Span], most: int) -> list[Span]:
    """Neighbours as one partial span where that has at most so many keys."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].stop == span.start and span.stop - joined[-1].start <= most:
            span = Span(joined.pop().start, span.stop, False)
        joined.append(span)
    return joined


def fits(scale: float, pairs: Sequence[tuple[Array, Array]]) -> bool:
    """Whether no product of these rows can overflow, where they are finite at all.

    The kernel hides by adding -inf, so that a hidden logit of +inf would be NaN, and says lse 0 of
    a row whose logits are all -inf. Such numbers are left to products and selections of our own;
    NaN and infinity are not, since they are replaced where nobody may see them, and data elsewhere.
    """
    for x, y in pairs:
        ends = torch.stack([end.double() for a in (x, y) for end in torch.aminmax(a)]).abs()
        low, high, other_low, other_high = ends.tolist()
        most = max(low, high) * max(other_low, other_high) * x.shape[-1] * max(1.0, abs(scale))
        if _LARGEST <= most < float("inf"):
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


def _size(at: slice, span: Span) -> tuple[int, int]:
    return at.stop - at.start, span.stop - span.start


def _heads_first(ask: Ask, x: Array) -> Array:
    """(B, H, T, D), neighbours of the last axis side by side: the kernel takes that for granted."""
    x = x if ask.layout == "BHTD" else x.transpose(1, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _laid_out(ask: Ask, x: Array) -> Array:
    """In the layout asked for, and in memory as it reads: a compiler was promised that."""
    return (x if ask.layout == "BHTD" else x.transpose(1, 2)).contiguous()
