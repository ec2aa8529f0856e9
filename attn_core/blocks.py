"""Block maps: which tiles of queries by keys a mask leaves alive, and which need no mask at all.

A tile is *empty* when the mask allows none of its entries, *full* when it allows every one, and
*partial* otherwise. A tile loop skips the first kind, leaves the mask out of the second and applies
it in the third. What a map says is always safe: a tile with a live entry is never called empty,
one with a dead entry never full. Where docs/SPEC.md promises it ("Block maps") no dead
tile is kept either; elsewhere `live_share` shows what a map costs.

Two doors to the same reading (`attn_core.language.intervals`):

    block_map    on the host, by quadtree: a whole region is decided at once where it can be, so
                 that the cost is the boundary of the mask, not its area
    block_grid   with a framework's arrays, every tile at once, where operands, offsets or lengths
                 are traced

Tiles at the edge are clipped: what lies beyond q_len and k_len counts neither way. What lies beyond
`q_lengths` and `kv_lengths` is not allowed, so a tile that they cut is not full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_core.language.intervals import EVERYTHING, HOST, Intervals
from attn_core.language.operands import Table
from attn_core.language.tree import Tree

__all__ = ["EMPTY", "FULL", "PARTIAL", "BlockMap", "block_grid", "block_map", "block_ranges"]

Array = Any

EMPTY, PARTIAL, FULL = 0, 1, 2

_AT_ONCE = 8192
"""Cells of the quadtree read together: bounds the memory of a map, not its size."""


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The live tiles of a mask, row of tiles by row of tiles.

    Shapes: (Bm, Hm, rows of tiles), where Bm and Hm are 1 if the map is the same for every batch
    or head. Tile j of a row covers keys [j * block_k, (j + 1) * block_k).

    Attributes:
        block_q, block_k: rows and keys of a tile.
        q_len, k_len: rows and keys of the whole.
        batch, heads: Bm and Hm.
        start, stop: int32; tiles [start, stop) of a row are live. None for `kind == "lists"`.
        full_start, full_stop: of those, [full_start, full_stop) are full. Always
            start <= full_start <= full_stop <= stop, and both are stop where none is full.
        row_start: int64 (Bm * Hm * rows + 1,); the tiles of row r, counted through batches and
            heads, are tiles[row_start[r]:row_start[r + 1]]. None for `kind == "ranges"`.
        tiles, full: int32 tile numbers, increasing within a row, and whether each is full.
    """

    block_q: int
    block_k: int
    q_len: int
    k_len: int
    batch: int
    heads: int
    start: Any = None
    stop: Any = None
    full_start: Any = None
    full_stop: Any = None
    row_start: Any = None
    tiles: Any = None
    full: Any = None

    @property
    def kind(self) -> str:
        """ "ranges" where live and full tiles of every row are contiguous, else "lists"."""
        return "lists" if self.start is None else "ranges"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.q_len // self.block_q), -(-self.k_len // self.block_k)

    @property
    def live_count(self) -> int:
        """Live tiles, partial and full, over the map's own batches and heads."""
        if self.tiles is not None:
            return len(self.tiles)
        return int((self.stop - self.start).sum(dtype=np.int64))

    @property
    def full_count(self) -> int:
        """Tiles that need no mask."""
        if self.full is not None:
            return int(self.full.sum(dtype=np.int64))
        return int((self.full_stop - self.full_start).sum(dtype=np.int64))

    @property
    def live_share(self) -> float:
        """Live tiles as a share of all; 0 where there is no tile."""
        rows, columns = self.grid
        return self.live_count / max(1, self.batch * self.heads * rows * columns)

    def row(self, b: int, h: int, i: int) -> list[tuple[int, bool]]:
        """(tile, full) for the live tiles of row i, in order."""
        b, h = (b if self.batch > 1 else 0), (h if self.heads > 1 else 0)
        if self.start is not None:
            at = (b, h, i)
            fulls = range(int(self.full_start[at]), int(self.full_stop[at]))
            return [(j, j in fulls) for j in range(int(self.start[at]), int(self.stop[at]))]
        r = (b * self.heads + h) * self.grid[0] + i
        span = slice(int(self.row_start[r]), int(self.row_start[r + 1]))
        return list(zip(self.tiles[span].tolist(), self.full[span].tolist(), strict=True))

    def rows(self) -> Iterator[tuple[int, int, int, list[tuple[int, bool]]]]:
        """(b, h, i, live tiles) for every row of the map."""
        for b in range(self.batch):
            for h in range(self.heads):
                for i in range(self.grid[0]):
                    yield b, h, i, self.row(b, h, i)

    def lists(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row_start, tiles, full), whatever the kind; as large as the number of live tiles."""
        if self.start is None:
            return self.row_start, self.tiles, self.full
        start, stop = self.start.reshape(-1), self.stop.reshape(-1)
        counts = (stop - start).astype(np.int64)
        row_start = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
        row = np.repeat(np.arange(len(counts)), counts)
        tiles = np.arange(len(row)) - row_start[row] + start[row]
        full = (tiles >= self.full_start.reshape(-1)[row]) & (
            tiles < self.full_stop.reshape(-1)[row]
        )
        return row_start, tiles.astype(np.int32), full

    def dense(self) -> np.ndarray:
        """int8 (Bm, Hm, rows, columns): 0 empty, 1 partial, 2 full. For small maps and pictures."""
        grid = np.zeros((self.batch * self.heads * self.grid[0], self.grid[1]), np.int8)
        row_start, tiles, full = self.lists()
        row = np.repeat(np.arange(len(grid)), np.diff(row_start))
        grid[row, tiles] = np.where(full, FULL, PARTIAL)
        return grid.reshape(self.batch, self.heads, *self.grid)


def _differs(x: Array | None) -> bool:
    """Whether there may be one for each batch; one that holds for all has length 1, or no axis."""
    return x is not None and len(x.shape) > 0 and x.shape[0] != 1


class _Layout:
    """What both doors need: the reading, the extents of the map and the operands of the lengths."""

    def __init__(
        self,
        ops: Any,
        tree: Tree | None,
        arrays: Sequence[Any],
        sizes: tuple[int, int, int, int],
        extents: tuple[int, int],
        offsets: Any,
        kv_lengths: Any,
        q_lengths: Any,
    ) -> None:
        self.ops = ops
        self.q_len, self.k_len, self.block_q, self.block_k = sizes
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(
                f"`block_q` and `block_k` must be at least 1. Got {(self.block_q, self.block_k)}."
            )
        tree = EVERYTHING if tree is None else tree
        self.grid = (-(-self.q_len // self.block_q), -(-self.k_len // self.block_k))
        self.reading = Intervals(ops, tree, arrays, (self.block_q, self.block_k))
        self.offsets = ops.index(offsets) if isinstance(offsets, int) else ops.array(offsets)
        self.kv_lengths = None if kv_lengths is None else ops.array(kv_lengths)
        self.q_lengths = None if q_lengths is None else ops.array(q_lengths)
        shifted = _differs(self.offsets) and tree.reads("q")
        cut = _differs(self.kv_lengths) or _differs(self.q_lengths)
        self.batch = extents[0] if tree.reads("b") or shifted or cut else 1
        self.heads = extents[1] if tree.reads("h") else 1


def block_map(
    tree: Tree | None,
    arrays: Sequence[Any] = (),
    *,
    q_len: int,
    k_len: int,
    block_q: int,
    block_k: int,
    batch: int = 1,
    heads: int = 1,
    offsets: Any = 0,
    kv_lengths: Any = None,
    q_lengths: Any = None,
) -> BlockMap:
    """The block map of a mask, on the host.

    Args:
        tree: the mask's tree; None allows everything.
        arrays: its operands, NumPy arrays or what NumPy reads; tables of nested lists too.
        q_len, k_len: rows of the query array and keys.
        block_q, block_k: rows and keys of a tile.
        batch, heads: B and Hq.
        offsets: query offset, an int or ints (B,): q = row + offset. Negative is legal.
        kv_lengths, q_lengths: ints (B,) or None, 0 up to k_len and q_len.

    Returns:
        A BlockMap whose batch and head axes are 1 wherever nothing depends on them.
    """
    extents, sizes = (batch, heads), (q_len, k_len, block_q, block_k)
    arrays = [a.numpy() if isinstance(a, Table) else a for a in arrays]
    layout = _Layout(HOST, tree, arrays, sizes, extents, offsets, kv_lengths, q_lengths)
    found = list(_descend(layout))
    rows = layout.batch * layout.heads * layout.grid[0]
    ranges = [_row_ranges(layout, found, rows, only_full) for only_full in (False, True)]
    plain = (block_q, block_k, q_len, k_len, layout.batch, layout.heads)
    if all(contiguous for _, _, contiguous in ranges):
        shape = (layout.batch, layout.heads, layout.grid[0])
        (start, stop, _), (full_start, full_stop, _) = ranges
        none = full_start >= full_stop
        full_start, full_stop = np.where(none, stop, full_start), np.where(none, stop, full_stop)
        ends = (start, stop, full_start, full_stop)
        return BlockMap(*plain, *(x.astype(np.int32).reshape(shape) for x in ends))
    row_start, tiles, full = _row_lists(layout, found, rows)
    return BlockMap(*plain, row_start=row_start, tiles=tiles, full=full)


# Cells of one level of the quadtree that are all live: level, status, row of cells (through
# batches and heads), column of cells. A cell of level n is 2**n by 2**n tiles.
_Cells = tuple[int, int, np.ndarray, np.ndarray, np.ndarray]


def _descend(layout: _Layout) -> Iterator[_Cells]:
    """Decide large cells where possible, and split those that are neither empty nor full."""
    tall, wide = layout.grid
    cells = layout.batch * layout.heads if tall and wide else 0
    outer = np.arange(cells, dtype=np.int64)
    i = j = np.zeros(cells, np.int64)
    for level in range((max(tall, wide, 1) - 1).bit_length(), -1, -1):
        pieces = [
            _decide(
                layout,
                level,
                outer[at : at + _AT_ONCE],
                i[at : at + _AT_ONCE],
                j[at : at + _AT_ONCE],
            )
            for at in range(0, len(outer), _AT_ONCE)
        ]
        if not pieces:
            return
        live = np.concatenate([piece[0] for piece in pieces])
        full = np.concatenate([piece[1] for piece in pieces])
        yield level, FULL, outer[full], i[full], j[full]
        live &= ~full
        outer, i, j = outer[live], i[live], j[live]
        if level == 0:
            yield level, PARTIAL, outer, i, j
            return
        outer = np.repeat(outer, 4)
        i = (2 * i[:, None] + np.array([0, 0, 1, 1])).reshape(-1)
        j = (2 * j[:, None] + np.array([0, 1, 0, 1])).reshape(-1)
        inside = (i << (level - 1) < tall) & (j << (level - 1) < wide)
        outer, i, j = outer[inside], i[inside], j[inside]


def _decide(
    layout: _Layout, level: int, outer: np.ndarray, i: np.ndarray, j: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    tall, wide = layout.block_q << level, layout.block_k << level
    b, h = outer // layout.heads, outer % layout.heads
    rows = (i * tall, np.minimum((i + 1) * tall, layout.q_len) - 1)
    keys = (j * wide, np.minimum((j + 1) * wide, layout.k_len) - 1)

    def of_batch(x: Array | None) -> Array | None:
        # Of length 1, or a scalar, it is the same for every batch.
        if x is None or not np.ndim(x):
            return x
        return HOST.index(x[np.minimum(b, len(x) - 1)])

    per_batch = (of_batch(layout.offsets), of_batch(layout.kv_lengths), of_batch(layout.q_lengths))
    size = (min(tall, layout.q_len), min(wide, layout.k_len))
    live, full = layout.reading.status(b, h, rows, keys, per_batch, size)
    return np.broadcast_to(live, i.shape), np.broadcast_to(full, i.shape)


def _row_ranges(
    layout: _Layout, found: Sequence[_Cells], rows: int, only_full: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(start, stop) of each row's tiles, and whether there is no gap in any row."""
    wide = layout.grid[1]
    start, stop = np.full(rows, wide, np.int64), np.zeros(rows, np.int64)
    count = np.zeros(rows, np.int64)
    for level, status, outer, i, j in found:
        if only_full and status != FULL:
            continue
        row, cell = _cell_rows(layout, level, outer, i)
        first = j[cell] << level
        last = np.minimum((j[cell] + 1) << level, wide)
        np.minimum.at(start, row, first)
        np.maximum.at(stop, row, last)
        np.add.at(count, row, last - first)
    start = np.minimum(start, stop)
    return start, stop, bool((count == stop - start).all())


def _cell_rows(
    layout: _Layout, level: int, outer: np.ndarray, i: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every row of tiles in these cells, and the number of the cell that it lies in."""
    row = (i[:, None] << level) + np.arange(1 << level)
    cell, inside = np.nonzero(row < layout.grid[0])
    return outer[cell] * layout.grid[0] + row[cell, inside], cell


def _row_lists(
    layout: _Layout, found: Sequence[_Cells], rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    wide = layout.grid[1]
    keys, fulls = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)]
    for level, status, outer, i, j in found:
        row, cell = _cell_rows(layout, level, outer, i)
        column = (j[cell][:, None] << level) + np.arange(1 << level)
        at, inside = np.nonzero(column < wide)
        keys.append(row[at] * wide + column[at, inside])
        fulls.append(np.full(len(at), status == FULL))
    key, full = np.concatenate(keys), np.concatenate(fulls)
    order = np.argsort(key)
    key = key[order]
    row_start = np.searchsorted(key, np.arange(rows + 1, dtype=np.int64) * wide)
    return row_start.astype(np.int64), (key % max(1, wide)).astype(np.int32), full[order]


def block_grid(
    ops: Any,
    tree: Tree | None,
    arrays: Sequence[Any] = (),
    *,
    q_len: int,
    k_len: int,
    block_q: int,
    block_k: int,
    batch: int = 1,
    heads: int = 1,
    offsets: Any = 0,
    kv_lengths: Any = None,
    q_lengths: Any = None,
) -> Array:
    """The status of every tile, with a framework's arrays: inside jit, tf.function, torch.compile.

    Operands, offsets and lengths may be traced. Their shapes, and every size here, must be static:
    the grid is laid out, and pyramids over the operands are built, while tracing.

    Args:
        ops: a backend's `Tiles`; the rest is as in `block_map`.

    Returns:
        Integers (Bm, Hm, rows of tiles, columns of tiles), int32 but for TensorFlow, whose tiles
        are int64: 0 empty, 1 partial, 2 full.
    """
    extents, sizes = (batch, heads), (q_len, k_len, block_q, block_k)
    layout = _Layout(ops, tree, arrays, sizes, extents, offsets, kv_lengths, q_lengths)
    tall, wide = layout.grid

    def tiles(count: int, block: int, length: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
        first = np.arange(count, dtype=np.int32) * block
        last = np.minimum(np.arange(1, count + 1, dtype=np.int64) * block, length) - 1
        return ops.index(first.reshape(shape)), ops.index(last.reshape(shape))

    def of_batch(x: Array | None) -> Array | None:
        return x if x is None or not len(x.shape) else x[:, None, None, None]

    rows = tiles(tall, block_q, q_len, (1, 1, tall, 1))
    keys = tiles(wide, block_k, k_len, (1, 1, 1, wide))
    b = ops.index(np.arange(layout.batch).reshape(-1, 1, 1, 1))
    h = ops.index(np.arange(layout.heads).reshape(1, -1, 1, 1))
    per_batch = (of_batch(layout.offsets), of_batch(layout.kv_lengths), of_batch(layout.q_lengths))
    size = (max(1, min(block_q, q_len)), max(1, min(block_k, k_len)))
    live, full = layout.reading.status(b, h, rows, keys, per_batch, size)
    # Adding zeros of the whole shape broadcasts alike in every library.
    zero = ops.index(np.zeros((layout.batch, layout.heads, tall, wide), np.int32))
    status = ops.where(full, ops.index(FULL), ops.index(PARTIAL))
    return zero + ops.where(live, status, ops.index(EMPTY))


def block_ranges(ops: Any, status: Array) -> tuple[Array, Array, Array, Array, Array]:
    """(start, stop, full_start, full_stop, contiguous) of each row of a status grid.

    All of shape (Bm, Hm, rows of tiles), the first four int32 as in `BlockMap`. Where `contiguous`
    is False the ranges enclose the live, or the full, tiles and others between them.
    """
    wide = int(status.shape[-1])
    if wide == 0:
        empty = np.zeros(tuple(int(size) for size in status.shape[:-1]), np.int32)
        nothing = ops.index(empty)
        return nothing, nothing, nothing, nothing, nothing >= 0
    column, beyond = ops.index(np.arange(wide)), ops.index(wide)
    zero, one = ops.index(0), ops.index(1)
    contiguous = None
    ends: list[Array] = []
    for least in (PARTIAL, FULL):
        chosen = status >= least
        stop = ops.most(ops.where(chosen, column + 1, zero))
        start = ops.minimum(ops.least(ops.where(chosen, column, beyond)), stop)
        same = ops.total(ops.where(chosen, one, zero)) >= stop - start
        contiguous = same if contiguous is None else contiguous & same
        ends += [start, stop]
    start, stop, full_start, full_stop = ends
    none = full_start >= full_stop
    return (
        start,
        stop,
        ops.where(none, stop, full_start),
        ops.where(none, stop, full_stop),
        contiguous,
    )
