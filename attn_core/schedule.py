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
