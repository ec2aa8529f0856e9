"""Narrow masks: what a row of tiles sees, taken as one span of keys.

Under a window of 256 keys, tiles of 256 by 256 are half empty. Where the mask's map is known when
the call is traced, and every row of tiles sees few tiles that lie close together, these are one
tile, narrower and of any start::

    rows     64 i, ..., 64 i + 63
    keys     64 a, ..., 64 (a + slots) - 1          a = starts[i]

so that softmax has nothing to build up. What a problem must be like is said in one place, `spans`;
every other one is cut into tiles of the grid. `chunked_spans` computes them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf.arrays import Reading
from attn_core.backends.tf.chunked_grid import cut_up
from attn_core.blocks import BlockMap, block_map
from attn_core.language.tree import Tree
from attn_core.spec import Problem

_BLOCK = 64
"""Rows of a tile, and the grain of a span: half of what a window of 128 sees is seen."""
AT_ONCE = 2**22
"""Bytes that the logits of one turn may take: the fewer turns, the less waits for the next one."""
_LEAST = 8
"""The part of that which they must take, or the loop would cost more than half empty tiles do."""
_KEPT = 2**20
"""Entries that the patterns of a mask may have."""
_TOGETHER = 16
"""Tiles whose patterns are found at a time."""
_WORTH = 0.8
"""Entries of spans at most, as a share of those of the tiles that they stand in for."""


class Spans(NamedTuple):
    """The tiles of one key head.

    Attributes:
        mask: whose map they come from.
        offset: of the rows.
        block: rows of a tile; keys of a slot.
        slots: how many slots a span has.
        starts: int32 (turns, height), the first slot of the span of every row of tiles.
        firsts: int32 (turns,), the least start of a turn, or before it.
        reach: slots from that to the end of the turn's last span, at most.
        columns: slots along the keys.
        patterns: bool (P, block, keys), what the mask says of a tile: under a window nearly all
            tiles are alike.
        which: int32 (turns, height), the pattern of every tile.
        places: None where each key is seen by some row; else int32 (turns, height * keys), the keys
            of every tile, and in the place of one that no row sees, of whatever tile, one that is
            seen: nothing is held against the weight 0 then.
    """

    mask: Tree
    offset: int
    block: int
    slots: int
    starts: np.ndarray
    firsts: np.ndarray
    reach: int
    columns: int
    patterns: np.ndarray
    which: np.ndarray
    places: np.ndarray | None

    @property
    def keys(self) -> int:
        """Keys of a span."""
        return self.slots * self.block


def spans(p: Problem) -> Spans | None:
    """The spans of a problem, or None where it is cut into tiles of the grid.

    They need a mask that is alike for all batches and heads and looks nothing up, known sizes that
    are multiples of `_BLOCK`, layout "BHTD", and neither lengths, offsets that are given, scores,
    biases, dropout nor weights. And they must pay: fewer entries than tiles have, not too few in a
    turn, and few patterns.
    """
    mask = p.mask
    if mask is None or mask.reads("b") or mask.reads("h") or p.layout != "BHTD":
        return None
    if any(step.op == "lookup" for step in mask.steps) or p.offset == "given":
        return None
    if p.kv_lengths or p.q_lengths or p.rate or p.return_weights:
        return None
    if p.bias is not None or p.score is not None or p.batch is None:
        return None
    if not p.q_len or not p.k_len or p.q_len % _BLOCK or p.k_len % _BLOCK:
        return None
    g = cut_up(p, p.batch, p.q_len, p.k_len, (False, False))
    offset = p.k_len - p.q_len if p.offset == "end" else 0
    sizes = (p.q_len, p.k_len, p.group)
    return _found(mask, sizes, offset, (g.block_q, g.block_k), (_BLOCK, AT_ONCE, _KEPT, _WORTH))


@lru_cache(maxsize=128)
def _found(
    mask: Tree,
    sizes: tuple[int, int, int],
    offset: int,
    tile: tuple[int, int],
    limits: tuple[int, int, int, float],
) -> Spans | None:
    (q_len, k_len, group), (block, room, kept, worth) = sizes, limits

    def read(block_q: int, block_k: int) -> BlockMap:
        blocks = {"block_q": block_q, "block_k": block_k}
        return block_map(mask, (), q_len=q_len, k_len=k_len, offsets=offset, **blocks)

    instead = read(*tile).live_count * tile[0] * tile[1]
    rows, columns = q_len // block, k_len // block
    if instead == 0 or rows * block * block > worth * instead:
        return None
    first, last = np.full(rows, columns), np.zeros(rows, np.int64)
    row_start, live, _ = read(block, block).lists()
    row = np.repeat(np.arange(rows), np.diff(row_start))
    np.minimum.at(first, row, live)
    np.maximum.at(last, row, live + 1)
    slots = int((last - first).max())
    entries = group * block * slots * block * 4
    if q_len * slots * block > worth * instead or entries > room:
        return None
    starts = np.minimum(first, columns - slots)
    height = max(n for n in range(1, rows + 1) if rows % n == 0 and n * entries <= room)
    if _LEAST * height * entries < room:
        return None
    starts = starts.reshape(-1, height).astype(np.int32)
    firsts = starts.min(1)
    reach = int((starts.max(1) - firsts).max()) + slots
    # So that no turn reaches beyond the end.
    firsts = np.minimum(firsts, columns - reach)
    found = _patterns(mask, offset, (block, slots * block), starts.ravel(), kept)
    if found is None:
        return None
    patterns, which = found
    places = starts.reshape(-1, 1) * block + np.arange(slots * block)
    seen = np.zeros(k_len, bool)
    np.logical_or.at(seen, places, np.asarray(patterns.any(1))[which])
    if not seen.any():
        return None
    instead_of = np.where(seen, np.arange(k_len), seen.argmax())
    return Spans(
        *(mask, offset, block, slots, starts, firsts, reach, columns, patterns),
        which.reshape(starts.shape).astype(np.int32),
        None if seen.all() else instead_of[places].reshape(len(starts), -1).astype(np.int32),
    )


def _patterns(
    mask: Tree, offset: int, tile: tuple[int, int], starts: np.ndarray, kept: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(patterns, the number of each tile's pattern); None where they are too many to keep.

    They are facts of the call, found beside the graph that is traced: a handful of tiles at a time.
    """
    (block, keys), numbers, which = tile, dict[bytes, int](), list[int]()
    with tf.init_scope(), tf.device("CPU:0"):
        if not tf.executing_eagerly():
            return None
        zero = tf.zeros((1, 1, 1), tf.int32)
        for first in range(0, len(starts), _TOGETHER):
            start = tf.constant(starts[first : first + _TOGETHER], tf.int32)
            number = tf.range(first, first + len(start))
            row = number[:, None, None] * block + tf.range(block)[:, None]
            key = start[:, None, None] * block + tf.range(keys)
            index = {"b": zero, "h": zero, "q": row + offset, "k": key, "row": row}
            found = Reading("float32", ()).read(mask, index, ())[0]
            for seen in tf.broadcast_to(found, (len(start), block, keys)).numpy():
                which.append(numbers.setdefault(seen.tobytes(), len(numbers)))
            if len(numbers) * block * keys > kept:
                return None
    tiles = [np.frombuffer(seen, bool).reshape(block, keys) for seen in numbers]
    return np.stack(tiles), np.array(which)
