"""Where torch's fused kernel is asked: the live keys of each tile of rows, alike tiles as one.

From the block map, row of tiles by row of tiles, the spans of keys that adjoin; of documents from
where they begin, and of a mask that slides from one tile (`native_strips`). Tiles that see as many
keys and stand evenly apart along a diagonal, as those of a window or of equal documents do, make a
band, which the kernel answers in one call, or in a few where that would leave the caches. A turn is
what shares all that: all batches and heads at once where masks do not tell them apart, and where
they do but a call costs more than what sharing one wastes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from attn_core.backends.torch import native_strips
from attn_core.backends.torch.chunked_parts import Ask, Span, Work
from attn_core.backends.torch.native_documents import documents
from attn_core.blocks import EMPTY, FULL, PARTIAL
from attn_core.language.shifts import slides
from attn_core.language.tree import Tree
from attn_core.spec import Operands

Array = Any

ROWS, KEYS = 128, 64
"""Rows of a tile, and keys of a block, where nothing else is said of either."""

JOINED, JOINED_BAND = 1024, 2048
"""Keys up to which a full stretch joins its partial neighbours: one call instead of two."""

SELECTION = 2**21
"""Bytes of selection that are evaluated together."""

BAND = 2**23
"""Bytes that one call over many tiles may read anew, or give: what is read again soon, or added to
something, should still be in the caches then."""

_MANY = 2
"""Calls for documents, each cut by itself, against one for every tile of rows."""

_LEAST = 32
"""Rows that the kernel takes at once."""

_READ, _CALL = 16, 2**17
"""Rows whose logits take as long as reading the keys; logits that take as long as one call with a
selection of its own."""


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
        """x += more, where `more` lies as `of_keys` has it.

        Tiles that see some keys in common are added strip by strip, each no wider than a step: of
        one strip no two tiles see the same key.
        """
        width = span.stop - span.start
        step = width if self.many == 1 else min(width, self.step)
        for at in range(0, width, step):
            part = Span(span.start + at, min(span.start + at + step, span.stop), span.full)
            into = self.of_keys(x, batch, heads, part)
            into.add_(more[..., at : at + step, :])


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
        alike: whether the selection of a span is the same wherever along the diagonal it stands.
    """

    batch: slice
    keys: slice
    heads: slice
    bands: list[Band]
    alike: bool


class Sizes(NamedTuple):
    """What the bands of a call depend on beside its map.

    Attributes:
        batch, heads, kv_heads: as in `Problem`.
        entry: bytes of a row of query and output, or of a key and its value.
        itemsize: bytes of a number.
        by_batch, by_head: whether selections may differ from batch to batch, and head to head.
        alike: as in `Turn`.
    """

    batch: int
    heads: int
    kv_heads: int
    entry: int
    itemsize: int
    by_batch: bool
    by_head: bool
    alike: bool


def sizes_of(w: Work) -> Sizes:
    mask, itemsize = w.ask.mask, w.query.dtype.itemsize
    lengths = w.kv_lengths is not None or w.q_lengths is not None
    return Sizes(
        *(w.batch, w.heads, w.kv_heads),
        (w.query.shape[-1] + w.value.shape[-1]) * itemsize,
        itemsize,
        by_batch=lengths or len(w.offset) > 1 or (mask is not None and mask.reads("b")),
        by_head=mask is not None and mask.reads("h"),
        alike=mask is not None and not lengths and slides(mask),
    )


def work(ask: Ask, scale: float, x: Operands, backward: bool = False) -> Work:
    """The call cut into tiles that suit the kernel."""
    axis, first = ask.layout.index("H"), ask.layout == "BHTD"
    heads, kv_heads = x.query.shape[axis], x.key.shape[axis]
    q_len, k_len = x.query.shape[2 if first else 1], x.key.shape[2 if first else 1]
    lengths = x.kv_lengths is not None or x.q_lengths is not None
    rows = ROWS
    if ask.mask is not None and sliding(ask.mask, ask.offset, ask.masks, lengths):
        extents = (x.query.shape[0], heads, kv_heads)
        rows = native_strips.rows_of(ask.mask, ask.offset, extents, q_len, k_len, backward)
    return Work(ask, scale, x, rows, KEYS)


def sliding(mask: Tree | None, offset: str, masks: int, lengths: bool) -> bool:
    """Whether strips say it all: nothing is looked up, and nothing has lengths."""
    return not masks and not lengths and native_strips.sliding(mask, offset)


def turns(w: Work, backward: bool = False) -> list[Turn]:
    """All batches and heads at once where they share one map and one selection.

    Batches that do not share them are taken together all the same where that costs less: what is
    live for one of them is then looked at, and hidden by its selection, in all.
    """
    found = of_documents(w, backward)
    if found is not None:
        return found
    sizes, mask = sizes_of(w), w.ask.mask
    lengths = w.kv_lengths is not None or w.q_lengths is not None
    if mask is not None and sliding(mask, w.ask.offset, w.ask.masks, lengths):
        return _slid(mask, w.ask.offset, sizes, (w.q_len, w.k_len), w.block_q, backward)
    apart = len(w.status) > 1 or sizes.by_batch
    found = _turns(sizes, w.rows, _lines(w, w.status), apart, backward)
    selected = w.batch * w.block_q * min(w.k_len, JOINED) * w.query.dtype.itemsize
    if apart and w.batch > 1 and selected <= 2 * SELECTION:
        together = _turns(sizes, w.rows, _lines(w, _shared(w.status)), False, backward)
        return min(found, together, key=partial(_cost, sizes, _READ, _CALL))
    return found


@lru_cache(maxsize=64)
def _slid(
    mask: Tree, offset: str, sizes: Sizes, lengths: tuple[int, int], tall: int, backward: bool
) -> list[Turn]:
    """Turns of a mask that slides, in tiles of so many rows; whoever asks must not change them."""
    q_len = lengths[0]
    rows = [slice(at, min(at + tall, q_len)) for at in range(0, q_len, tall)]
    heads = (sizes.heads, sizes.kv_heads)
    lines = native_strips.lines(mask, offset, *heads, *lengths, rows)
    return _turns(sizes, rows, lines, apart=False, backward=backward)


def _turns(
    sizes: Sizes,
    rows: Sequence[slice],
    lines: list[list[list[list[Span]]]],
    apart: bool,
    backward: bool,
) -> list[Turn]:
    head_map, group = len(lines[0]), sizes.heads // sizes.kv_heads
    found: list[Turn] = []
    for b in range(sizes.batch) if apart else (0,):
        for h in range(head_map):
            turn = Turn(
                slice(b, b + 1) if apart else slice(None),
                slice(h, h + 1) if head_map > 1 else slice(None),
                slice(h * group, (h + 1) * group) if head_map > 1 else slice(None),
                [],
                sizes.alike,
            )
            if b > 0 and len(lines) == 1:
                bands = found[h].bands
            else:
                bands = _bands(sizes, turn, zip(rows, lines[b][h], strict=True), backward)
            found.append(turn._replace(bands=bands))
    return found


def of_documents(w: Work, backward: bool = False) -> list[Turn] | None:
    """Turns of documents, cut where those begin; None where the mask says something else.

    A tile then sees its own document alone, and where in that it stands says all of its selection.
    Half as tall, tiles hide less; documents of one length do not pay for that in calls.
    """
    found = documents(w)
    if found is None:
        return None
    turns: list[Turn] = []
    sizes = sizes_of(w)
    for b, starts in enumerate(found.starts):
        batch = slice(None) if len(found.starts) == 1 else slice(b, b + 1)
        turn = Turn(batch, slice(None), slice(None), [], alike=True)
        row = len(range(w.batch)[batch]) * w.heads * w.value.shape[-1] * w.value.dtype.itemsize
        heights = (w.block_q, max(_LEAST, w.block_q // 2)) if found.causal else (w.block_q,)
        cut = []
        for height in heights:
            tiles = found.tiles(starts, height, max(w.block_q, BAND // row))
            cut.append([turn._replace(bands=_bands(sizes, turn, tiles, backward))])
        read, call = native_strips.SEEN[backward], native_strips.CALL
        best = min(cut, key=partial(_cost, sizes, read, call))
        if len(best[0].bands) > _MANY * len(w.rows):
            return None
        turns += best
    return turns


def _shared(status: Array) -> Array:
    """One map for all batches: (1, H, tiles of rows, tiles of keys)."""
    full, live = (status == FULL).all(0), (status != EMPTY).any(0)
    return np.where(full, FULL, np.where(live, PARTIAL, EMPTY)).astype(status.dtype)[None]


def _cost(sizes: Sizes, read: int, call: int, turns: Sequence[Turn]) -> int:
    """In entries of logits, of which a key that is read and a call take as long as so many."""
    cost, group = 0, sizes.heads // sizes.kv_heads
    for turn in turns:
        batches = len(range(sizes.batch)[turn.batch])
        heads = len(range(sizes.kv_heads)[turn.keys])
        for band in turn.bands:
            rows = (band.rows.stop - band.rows.start) * group + read
            wide = sum(span.stop - span.start for span in band.spans)
            calls = len(band.spans) * (1 if band.many == 1 else batches)
            cost += band.many * batches * heads * rows * wide + calls * call
    return cost


def _bands(
    sizes: Sizes, turn: Turn, tiles: Iterable[tuple[slice, list[Span]]], backward: bool
) -> list[Band]:
    """The tiles of rows, alike ones together."""
    alike: dict[Any, list[Band]] = {}
    for rows, spans in tiles:
        here = rows.start
        form = tuple((span.start - here, span.stop - here, span.full) for span in spans)
        series = alike.setdefault((rows.stop - here, form), [])
        if series and spans:
            last = series[-1]
            step = here - last.rows.start - (last.many - 1) * last.step
            most = _most(sizes, turn, rows, spans, step, backward)
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


def _most(
    sizes: Sizes, turn: Turn, rows: slice, spans: Sequence[Span], step: int, backward: bool
) -> int:
    """Tiles that one call may be over, when they stand so far apart."""
    size, width = rows.stop - rows.start, spans[-1].stop - spans[0].start
    heads, keys = len(range(sizes.heads)[turn.heads]), len(range(sizes.kv_heads)[turn.keys])
    # Keys that several tiles see are read once, but each tile has gradients of its own.
    given = max(size * heads, (max(width, step) if backward else step) * keys) * sizes.entry
    if all(span.full for span in spans):
        return max(1, BAND // given)
    if sizes.by_batch and len(range(sizes.batch)[turn.batch]) > 1:
        return 1  # tiles would stand where batches with selections of their own do
    if turn.alike:
        return max(1, BAND // given)
    return max(1, min(BAND // given, SELECTION // selection_bytes(sizes, turn, size, width)))


def selection_bytes(sizes: Sizes, turn: Turn, rows: int, keys: int) -> int:
    """Bytes of one tile's selection; most masks read no head, and need a fraction of that."""
    heads = len(range(sizes.heads)[turn.heads]) if sizes.by_head else 1
    batches = len(range(sizes.batch)[turn.batch]) if sizes.by_batch else 1
    return rows * keys * heads * batches * sizes.itemsize


def _lines(w: Work, status: Array) -> list[list[list[list[Span]]]]:
    """By batch, head and row of blocks: what is live and adjoining, full apart from partial."""
    lines: list[list[list[list[Span]]]] = [
        [[[] for _ in range(status.shape[2])] for _ in range(status.shape[1])] for _ in status
    ]
    edges = np.ones(status.shape, bool)
    edges[..., 1:] = status[..., 1:] != status[..., :-1]
    places = np.argwhere(edges)
    kinds = status[edges].tolist()
    # Runs follow each other: one ends where the next begins, or with its row.
    starts = places[:, 3]
    stops = np.append(starts[1:], 0)
    stops[stops == 0] = status.shape[3]
    stops = np.minimum(stops * w.block_k, w.k_len)
    for (b, h, row, start), stop, kind in zip(places.tolist(), stops.tolist(), kinds, strict=True):
        if kind != EMPTY:
            lines[b][h][row].append(Span(start * w.block_k, stop, kind == FULL))
    return lines


def _joined(spans: Sequence[Span], most: int) -> list[Span]:
    """Neighbours as one partial span where that has at most so many keys."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].stop == span.start and span.stop - joined[-1].start <= most:
            span = Span(joined.pop().start, span.stop, False)
        joined.append(span)
    return joined
