"""The selections of spans that are not full: 0 or -inf, what torch's fused kernel takes for a mask.

They are evaluated some tiles ahead, since small tiles would pay for every operation of the mask;
of a mask that slides along the diagonal, or of documents, one is as good as all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from attn_core.backends.torch.arrays import Reading
from attn_core.backends.torch.chunked_parts import Span, Work
from attn_core.backends.torch.native_bands import (
    SELECTION,
    Band,
    Turn,
    selection_bytes,
    sizes_of,
)

Array = Any


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


class Selections:
    """A turn's bands with the selections of their spans, None where all of a span may be seen.

    They are evaluated a few tiles ahead, where those are of one size. Where tiles are alike along
    the diagonal the widest is evaluated, once, and those that see a part of it take that.
    """

    def __init__(self, w: Work, turn: Turn) -> None:
        self.w, self.turn, self.sizes = w, turn, sizes_of(w)
        # By rows and keys of a tile: the band's number and the span's, as they will be asked for.
        self._waiting: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._ready: dict[Any, Selection] = {}
        # By rows: tiles that see what others see, too, and what became of those.
        self._wide: dict[int, list[tuple[slice, Span]]] = {}
        self._allowed_there: dict[tuple[int, int], tuple[Array, Array]] = {}
        for n, band in enumerate(turn.bands):
            for number, span in enumerate(band.spans):
                if not span.full:
                    self._waiting.setdefault(_size(band.rows, span), []).append((n, number))
        if turn.alike:
            self._find_wide()

    def __iter__(self) -> Iterator[tuple[Band, list[Selection | None]]]:
        found = self._part if self.turn.alike else self._next
        for n, band in enumerate(self.turn.bands):
            yield (
                band,
                [None if span.full else found(n, number) for number, span in enumerate(band.spans)],
            )

    def _find_wide(self) -> None:
        for size in sorted(self._waiting, key=lambda size: -size[1]):
            for n, number in self._waiting[size]:
                band = self.turn.bands[n]
                rows, span = band.rows, band.spans[number]
                wide = self._wide.setdefault(size[0], [])
                if not any(_within(rows, span, *other) for other in wide):
                    wide.append((rows, span))

    def _part(self, n: int, number: int) -> Selection:
        """The selection of a tile that is alike others."""
        band = self.turn.bands[n]
        rows, span = band.rows, band.spans[number]
        tall, wide = _size(rows, span)
        name = (tall, wide, span.start - rows.start, band.many > 1)
        if name in self._ready:
            return self._ready[name]
        others = self._wide[tall]
        place = next(i for i, other in enumerate(others) if _within(rows, span, *other))
        if (tall, place) not in self._allowed_there:
            allowed = self._allowed([others[place]])
            self._allowed_there[tall, place] = allowed, self._added(allowed)
        at, other = others[place]
        first = (span.start - rows.start) - (other.start - at.start)
        # One tile has the batch before its heads, many tiles stand in its place.
        tile: Any = 0 if band.many == 1 else (slice(None), 0)
        allowed, added = (
            x[tile][..., first : first + wide] for x in self._allowed_there[tall, place]
        )
        count, seen = allowed.sum(-1, dtype=torch.int32), allowed.any(-2)
        every = None if seen.all() else self._by_key_head(seen)
        self._ready[name] = Selection(added, count, not bool(count.all()), every)
        return self._ready[name]

    def _next(self, n: int, number: int) -> Selection:
        if (n, number) not in self._ready:
            band = self.turn.bands[n]
            self._read_ahead(_size(band.rows, band.spans[number]))
        return self._ready.pop((n, number))

    def _read_ahead(self, size: tuple[int, int]) -> None:
        waiting = self._waiting[size]
        ahead = max(1, SELECTION // selection_bytes(self.sizes, self.turn, *size))
        taken: list[tuple[int, int]] = []
        tiles: list[tuple[slice, Span]] = []
        while waiting:
            n, number = waiting[0]
            more = self.turn.bands[n].tiles(number)
            if taken and len(tiles) + len(more) > ahead:
                break
            taken.append(waiting.pop(0))
            tiles += more
        allowed = self._allowed(tiles)
        count, seen = allowed.sum(-1, dtype=torch.int32), allowed.any(-2)
        least = count.flatten(1).amin(1).tolist()
        all_seen = seen.flatten(1).all(1).tolist()
        added = self._added(allowed)
        first = 0
        for place in taken:
            many = self.turn.bands[place[0]].many
            part: Any = first if many == 1 else (slice(first, first + many), 0)
            every = all(all_seen[first : first + many])
            self._ready[place] = Selection(
                added[part],
                count[part],
                0 in least[first : first + many],
                None if every else self._by_key_head(seen[part]),
            )
            first += many

    def _added(self, allowed: Array) -> Array:
        added = torch.zeros(allowed.shape, dtype=self.w.query.dtype, device=self.w.device)
        return added.masked_fill_(~allowed, -torch.inf)

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


def _size(at: slice, span: Span) -> tuple[int, int]:
    return at.stop - at.start, span.stop - span.start


def _within(rows: slice, span: Span, other_rows: slice, other: Span) -> bool:
    """Whether a tile sees, from where it stands, what the other one sees, or a part of it."""
    start, stop = span.start - rows.start, span.stop - rows.start
    return other.start - other_rows.start <= start and stop <= other.stop - other_rows.start
