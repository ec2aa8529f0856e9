"""Schedules: a block map in the order in which a tile loop goes through it.

For every row of tiles the full ones come first, then the partial ones, so that a loop is two loops,
one without the mask and one with it; empty tiles are not there. A forward pass goes by rows of
tiles, a backward pass by columns. The order within each part is that of the keys, so results do not
depend on the run.

    order[..., :full]        tiles that need no mask
    order[..., full:live]    tiles that do
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attn_core.blocks import FULL, PARTIAL, BlockMap

Array = Any


class Schedule(NamedTuple):
    """Live tiles of every row (or column) of tiles, full ones first.

    Attributes:
        order: int32 (Bm, Hm, rows, width), tile numbers; what follows the live ones is any tile.
        full, live: int32 (Bm, Hm, rows), how many are full, and full or partial.
    """

    order: Array
    full: Array
    live: Array


def by_rows(found: BlockMap) -> Schedule:
    """For each row of tiles, its tiles of keys."""
    row_start, tiles, full = found.lists()
    rows = np.repeat(np.arange(len(row_start) - 1), np.diff(row_start))
    shape = (found.batch, found.heads, found.grid[0])
    return _packed(rows, tiles, full, shape)


def by_columns(found: BlockMap) -> Schedule:
    """For each column of tiles, its tiles of rows."""
    row_start, tiles, full = found.lists()
    rows = np.repeat(np.arange(len(row_start) - 1), np.diff(row_start))
    tall, wide = found.grid
    outer, row = np.divmod(rows, max(tall, 1))
    return _packed(outer * wide + tiles, row, full, (found.batch, found.heads, wide))


def _packed(line: Array, tiles: Array, full: Array, shape: tuple[int, int, int]) -> Schedule:
    count = shape[0] * shape[1] * shape[2]
    sorted_by = np.lexsort((tiles, ~full, line))
    line, tiles = line[sorted_by], tiles[sorted_by]
    live = np.bincount(line, minlength=count)
    fulls = np.bincount(line, weights=full[sorted_by], minlength=count)
    first = np.concatenate([np.zeros(1, np.int64), live.cumsum()])
    width = max(1, int(live.max(initial=0)))
    order = np.zeros((count, width), np.int32)
    order[line, np.arange(len(line)) - first[line]] = tiles
    return Schedule(
        order.reshape(*shape, width),
        fulls.astype(np.int32).reshape(shape),
        live.astype(np.int32).reshape(shape),
    )


def of_status(ops: Any, status: Array) -> Schedule:
    """The schedule of a status grid (`block_grid`), traced or not, by its rows.

    For the columns hand over the grid with its last two axes exchanged.
    """
    one, zero = ops.index(1), ops.index(0)
    return Schedule(
        ops.descending(status),
        ops.total(ops.where(status >= FULL, one, zero)),
        ops.total(ops.where(status >= PARTIAL, one, zero)),
    )
