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

from attn_core.blocks import FULL, PARTIAL

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


def runs(live: np.ndarray) -> tuple[np.ndarray, int]:
    """For every row of a grid one run of columns that holds what is live; all are equally long.

    Row i's run is columns [starts[i], starts[i] + width), within the grid. Width is what the
    longest needs, and 1 at least; a row in which nothing is live has a run all the same.

    Args:
        live: boolean (rows, columns), of a host block map; for its columns, turned around.

    Returns:
        (starts, width), starts int32 (rows,).
    """
    columns = live.shape[1]
    some = live.any(1)
    first = np.where(some, live.argmax(1), 0)
    last = np.where(some, columns - live[:, ::-1].argmax(1), 1)
    width = int((last - first).max())
    return np.minimum(first, columns - width).astype(np.int32), width
