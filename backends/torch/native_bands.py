"""Where torch's fused kernel is asked: the live keys of each tile of rows, alike tiles as one.

From the block map, row of tiles by row of tiles, the spans of keys that adjoin. Tiles that see as
many keys and stand evenly apart along a diagonal, as those of a window or of equal documents do,
make a band, which the kernel answers in one call. A turn is what shares all that: all batches and
heads at once where masks do not tell them apart, and where they do but a call costs more than
what sharing one wastes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from attn_core.backends.torch.chunked_parts import Ask, Span, Work, known, tiles_of
from attn_core.backends.torch.native_documents import documents
from attn_core.blocks import EMPTY, FULL, PARTIAL
from attn_core.language.shifts import slides
from attn_core.language.tree import Tree
from attn_core.spec import Operands

Array = Any

ROWS, KEYS = 128, 64
"""Rows of a tile, and keys of a block."""

NARROW = 512
"""Keys up to which a tile of a window is only half as tall: what it wastes is the tile's height."""

JOINED, JOINED_BAND = 1024, 2048
"""Keys up to which a full stretch joins its partial neighbours: one call instead of two."""

SELECTION = 2**21
"""Bytes of selection that are evaluated together."""

BAND = 2**24
"""Bytes of output, or of gradients of keys and values, that one call over many tiles may give."""

_MANY = 2
"""Calls for documents, each cut by itself, against one for every tile of rows."""

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
        alike: whether the selection of a span is the same wherever along the diagonal it stands.
    """

    batch: slice
    keys: slice
    heads: slice
    bands: list[Band]
    alike: bool


def work(ask: Ask, scale: float, x: Operands) -> Work:
    """The call cut into tiles that suit the kernel."""
    axis, first = ask.layout.index("H"), ask.layout == "BHTD"
    heads, kv_heads = x.query.shape[axis], x.key.shape[axis]
    q_len, k_len = x.query.shape[2 if first else 1], x.key.shape[2 if first else 1]
    rows = ROWS
    if not (ask.masks or x.kv_lengths is not None or x.q_lengths is not None):
        rows = rows_of(ask.mask, ask.offset, heads, kv_heads, q_len, k_len)
    return Work(ask, scale, x, rows, KEYS)


@lru_cache(maxsize=256)
def rows_of(
    mask: Tree | None, offset: str, heads: int, kv_heads: int, q_len: int, k_len: int
) -> int:
    """Rows of a tile where the mask has no operands, and nothing has lengths."""
    if mask is None or offset == "given" or heads > kv_heads or not slides(mask):
        return ROWS
    block_q, tall, block_k, _ = tiles_of(1, q_len, k_len, ROWS, KEYS)
    at = k_len - q_len if offset == "end" else 0
    status = known(mask, (q_len, k_len, block_q, block_k), heads, kv_heads, at)
    live = int((status != EMPTY).sum(-1).max(initial=0)) * block_k
    return ROWS // 2 if tall > 1 and live <= NARROW else ROWS


def turns(w: Work) -> list[Turn]:
    """All batches and heads at once where they share one map and one selection.

    Batches that do not share them are taken together all the same where that costs less: what is
    live for one of them is then looked at, and hidden by its selection, in all.
    """
    found = of_documents(w)
    if found is not None:
        return found
    apart = len(w.status) > 1 or _by_batch(w)
    found = _turns(w, w.status, apart)
    selected = w.batch * w.block_q * min(w.k_len, JOINED) * w.query.dtype.itemsize
    if apart and w.batch > 1 and selected <= 2 * SELECTION:
        together = _turns(w, _shared(w.status), apart=False)
        return min(found, together, key=partial(_cost, w))
    return found


def _turns(w: Work, status: Array, apart: bool) -> list[Turn]:
    head_map = status.shape[1]
    alike = slides_along(w)
    lines = _lines(w, status)
    found: list[Turn] = []
    for b in range(w.batch) if apart else (0,):
        for h in range(head_map):
            turn = Turn(
                slice(b, b + 1) if apart else slice(None),
                slice(h, h + 1) if head_map > 1 else slice(None),
                slice(h * w.group, (h + 1) * w.group) if head_map > 1 else slice(None),
                [],
                alike,
            )
            if b > 0 and len(status) == 1:
                bands = found[h].bands
            else:
                bands = _bands(w, turn, zip(w.rows, lines[b][h], strict=True))
            found.append(turn._replace(bands=bands))
    return found


def of_documents(w: Work) -> list[Turn] | None:
    """Turns of documents, cut where those begin; None where the mask says something else.

    A tile then sees its own document alone, and where in that it stands says all of its selection.
    """
    found = documents(w)
    if found is None:
        return None
    turns: list[Turn] = []
    for b, starts in enumerate(found.starts):
        batch = slice(None) if len(found.starts) == 1 else slice(b, b + 1)
        turn = Turn(batch, slice(None), slice(None), [], alike=True)
        row = len(range(w.batch)[batch]) * w.heads * w.value.shape[-1] * w.value.dtype.itemsize
        tiles = list(found.tiles(starts, w.block_q, max(w.block_q, BAND // row)))
        turn = turn._replace(bands=_bands(w, turn, tiles))
        if len(turn.bands) > _MANY * len(w.rows):
            return None
        turns.append(turn)
    return turns


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


def _bands(w: Work, turn: Turn, tiles: Iterable[tuple[slice, list[Span]]]) -> list[Band]:
    """The tiles of rows, alike ones together."""
    alike: dict[Any, list[Band]] = {}
    for rows, spans in tiles:
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
    if turn.alike or all(span.full for span in spans):
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
