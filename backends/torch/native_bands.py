"""Where torch's fused kernel is asked: the live keys of each tile of rows, alike tiles as one.

From the block map, row of tiles by row of tiles, the spans of keys that adjoin. Tiles that see as
many keys and stand evenly apart along a diagonal, as those of a window or of equal documents do,
make a band, which the kernel answers in one call. A turn is what shares all that: all batches and
heads at once where masks do not tell them apart, and where they do but a call costs more than
what sharing one wastes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from attn_core.backends.torch.chunked_parts import Span, Work
from attn_core.blocks import EMPTY, FULL, PARTIAL
from attn_core.language.shifts import slides

Array = Any

ROWS, KEYS = 128, 64
"""Rows of a tile, and keys of a block: fine enough for a narrow window to be mostly live."""

JOINED, JOINED_BAND = 1024, 2048
"""Keys up to which a full stretch joins its partial neighbours: one call instead of two."""

SELECTION = 2**21
"""Bytes of selection that are evaluated together."""

BAND = 2**24
"""Bytes of output, or of gradients of keys and values, that one call over many tiles may give."""

_READ, _CALL = 16, 2**17
"""Rows whose logits take as long as reading the keys; logits that take as long as one call."""


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


def turns(w: Work) -> list[Turn]:
    """All batches and heads at once where they share one map and one selection.

    Batches that do not share them are taken together all the same where that costs less: what is
    live for one of them is then looked at, and hidden by its selection, in all.
    """
    apart = len(w.status) > 1 or _by_batch(w)
    found = _turns(w, w.status, apart)
    selected = w.batch * w.block_q * min(w.k_len, JOINED) * w.query.dtype.itemsize
    if apart and w.batch > 1 and selected <= 2 * SELECTION:
        together = _turns(w, _shared(w.status), apart=False)
        return min(found, together, key=partial(_cost, w))
    return found


def _turns(w: Work, status: Array, apart: bool) -> list[Turn]:
    head_map = status.shape[1]
    found: list[Turn] = []
    for b in range(w.batch) if apart else (0,):
        for h in range(head_map):
            turn = Turn(
                slice(b, b + 1) if apart else slice(None),
                slice(h, h + 1) if head_map > 1 else slice(None),
                slice(h * w.group, (h + 1) * w.group) if head_map > 1 else slice(None),
                [],
            )
            alike = b > 0 and len(status) == 1
            bands = found[h].bands if alike else _bands(w, turn, status[b, h].tolist())
            found.append(turn._replace(bands=bands))
    return found


def _by_batch(w: Work) -> bool:
    """Whether selections may differ from batch to batch."""
    moved = len(w.offset) > 1 or w.kv_lengths is not None or w.q_lengths is not None
    return moved or (w.ask.mask is not None and w.ask.mask.reads("b"))


def _shared(status: Array) -> Array:
    """One map for all batches: (1, H, tiles of rows, tiles of keys)."""
    full, live = (status == FULL).all(0), (status != EMPTY).any(0)
    return np.where(full, FULL, np.where(live, PARTIAL, EMPTY)).astype(status.dtype)[None]


def _cost(w: Work, turns: Sequence[Turn]) -> int:
    """In entries of logits; reading a key takes as long as some of them, a call as long as many."""
    cost = 0
    for turn in turns:
        batches, heads = len(range(w.batch)[turn.batch]), len(range(w.kv_heads)[turn.keys])
        for band in turn.bands:
            rows = (band.rows.stop - band.rows.start) * w.group + _READ
            wide = sum(span.stop - span.start for span in band.spans)
            calls = len(band.spans) * (1 if band.many == 1 else batches)
            cost += band.many * batches * heads * rows * wide + calls * _CALL
    return cost


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
        band._replace(spans=_joined(band.spans, JOINED if band.many == 1 else JOINED_BAND))
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
    if slides_along(w) or all(span.full for span in spans):
        return max(1, BAND // given)
    if _by_batch(w) and len(range(w.batch)[turn.batch]) > 1:
        return 1  # tiles would stand where batches with selections of their own do
    return max(1, min(BAND // given, SELECTION // selection_bytes(w, turn, size, width)))


def slides_along(w: Work) -> bool:
    """Whether a selection is the same all along a diagonal."""
    if w.ask.mask is None or w.kv_lengths is not None or w.q_lengths is not None:
        return False
    return slides(w.ask.mask)


def selection_bytes(w: Work, turn: Turn, rows: int, keys: int) -> int:
    """Bytes of one tile's selection; most masks read no head, and need a fraction of that."""
    heads = len(range(w.heads)[turn.heads])
    if w.ask.mask is None or not w.ask.mask.reads("h"):
        heads = 1
    batches = len(range(w.batch)[turn.batch]) if _by_batch(w) else 1
    return rows * keys * heads * batches * w.query.dtype.itemsize


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
