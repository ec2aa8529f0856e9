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

    They are evaluated a few tiles ahead, where those are of one size, and of a band whose tiles are
    alike once for all of them.
    """

    def __init__(self, w: Work, turn: Turn) -> None:
        self.w, self.turn = w, turn
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
        ahead = max(1, SELECTION // selection_bytes(self.w, self.turn, *size))
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
        return 1 if self.turn.alike else band.many

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
