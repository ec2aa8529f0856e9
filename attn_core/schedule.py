"""Schedules: a block map in the order in which a tile loop goes through it.

For every row of tiles the full ones come first, then the partial ones, so that a loop is two loops,
one without the mask and one with it; empty tiles are not there. A forward pass goes by rows of
tiles, a backward pass by columns. The order within each part is that of the keys, so results do not
depend on the run.

    order[..., :full]        tiles that need no mask
    order[..., full:live]    tiles that do

Where what a row sees lies close together, it may be taken at once: `runs` says from where to where.
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


def runs(found: BlockMap, columns: bool = False) -> tuple[np.ndarray, int]:
    """For every row of a map one run of tiles that holds what is live; all are equally long.

    Row i's run is tiles [starts[i], starts[i] + width), within the grid. Width is what the longest
    needs, and 1 at least; a row in which nothing is live has a run all the same. It takes memory
    for the live tiles, not for the grid.

    Args:
        found: a map that is the same for every batch and head.
        columns: runs of rows, for every column.

    Returns:
        (starts, width), starts int32 (rows,).
    """
    lines, across = found.grid[::-1] if columns else found.grid
    row_start, tiles, _ = found.lists()
    rows = np.repeat(np.arange(found.grid[0]), np.diff(row_start))
    line, at = (tiles, rows) if columns else (rows, tiles)
    first, last = np.full(lines, across), np.zeros(lines, np.int64)
    np.minimum.at(first, line, at)
    np.maximum.at(last, line, at + 1)
    first[last == 0] = 0
    width = max(1, int((last - first).max()))
    return np.minimum(first, across - width).astype(np.int32), width
