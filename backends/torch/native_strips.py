"""Masks that slide along the diagonal: what one tile of rows sees, all see from where they stand.

So the map of a mask that looks at q - k alone is a line instead of an area: one tile, at position
0, against every key that may lie before or behind it. It costs little, and may be fine where a map
of all tiles may not: keys in blocks of 16, and tiles as low as the kernel takes rows at once. What
a window computes in vain is the tile's height,

    (rows + reach) * reach'   of which   rows * reach   is live,      reach' = reach + rows - 1

and lower tiles pay elsewhere: keys are read, and their gradients added up, by each tile anew, and
the first tiles of all, which see fewer keys, are a call each.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby

from attn_core.backends.torch.chunked_parts import Span, known, tiles_of
from attn_core.blocks import EMPTY, FULL
from attn_core.language.shifts import slides
from attn_core.language.tree import Tree

GRAIN = 16
"""Keys of a block: as many as a vector of float32 has where it is widest."""

HEIGHTS = (128, 64, 32)
"""Rows of a tile; the kernel takes 32 at once of all of these."""

CALL = 2**16
"""Logits that take as long as one call, where tiles share their selection."""

SEEN = {False: 2, True: 12}
"""Rows whose logits take as long as what a tile pays for each key it sees, forward and backward."""

_GAP = 64
"""Keys; shorter stretches that are hidden, or full, are not worth a call of their own."""


def sliding(mask: Tree | None, offset: str) -> bool:
    """Whether tiles of the mask differ only by where they stand, and that is known."""
    if mask is None or offset == "given" or mask.reads("b") or mask.reads("row"):
        return False
    return slides(mask)


def start(offset: str, q_len: int, k_len: int) -> int:
    """The position of the first row."""
    return k_len - q_len if offset == "end" else 0


@lru_cache(maxsize=256)
def strips(
    mask: Tree, offset: str, heads: int, kv_heads: int, q_len: int, k_len: int, rows: int
) -> tuple[tuple[Span, ...], ...]:
    """By key head, or once: the spans that `rows` rows see, counted from the first one's position.

    They go beyond the first and the last key.
    """
    at = start(offset, q_len, k_len)
    before = -(-max(0, q_len + at) // GRAIN) * GRAIN
    after = max(1, k_len - at)
    status = known(mask, (rows, before + after, rows, GRAIN), 1, heads, kv_heads, before)
    return tuple(tuple(_spans(line, before)) for line in status[0, :, 0].tolist())


def _spans(line: list[int], before: int) -> list[Span]:
    runs = [(kind, len(list(same))) for kind, same in groupby(line)]
    spans: list[Span] = []
    at = -before
    for number, (kind, count) in enumerate(runs):
        stop, inside = at + count * GRAIN, 0 < number < len(runs) - 1
        if kind != EMPTY or (inside and stop - at < _GAP):
            full = kind == FULL and (stop - at >= _GAP or not inside)
            last = spans[-1] if spans else None
            if last is not None and last.stop == at and last.full == full:
                spans[-1] = Span(last.start, stop, full)
            else:
                spans.append(Span(at, stop, full))
        at = stop
    return spans


def lines(
    mask: Tree,
    offset: str,
    heads: int,
    kv_heads: int,
    q_len: int,
    k_len: int,
    rows: list[slice],
) -> list[list[list[list[Span]]]]:
    """By batch (one for all), head and tile of rows: the spans of keys that it sees."""
    at = start(offset, q_len, k_len)
    tall = rows[0].stop - rows[0].start
    found = strips(mask, offset, heads, kv_heads, q_len, k_len, tall)
    return [[[_placed(spans, at + tile.start, k_len) for tile in rows] for spans in found]]


def _placed(spans: tuple[Span, ...], by: int, k_len: int) -> list[Span]:
    placed = [Span(max(0, s.start + by), min(k_len, s.stop + by), s.full) for s in spans]
    return [span for span in placed if span.start < span.stop]


@lru_cache(maxsize=256)
def rows_of(
    mask: Tree,
    offset: str,
    extents: tuple[int, int, int],
    q_len: int,
    k_len: int,
    backward: bool,
) -> int:
    """Rows of a tile, in the count of `tiles_of`: what costs least.

    Args:
        extents: batches, heads and key heads.
        backward: of the gradients.
    """
    batch, heads, kv_heads = extents
    group = heads // kv_heads

    def cost(height: int) -> float:
        tall, count, *_ = tiles_of(group, q_len, k_len, _counted(height, group), GRAIN)
        found = strips(mask, offset, heads, kv_heads, q_len, k_len, tall)
        # All heads of a group see what one of them does.
        live = sum(min(k_len, s.stop - s.start) for spans in found for s in spans) / len(found)
        entries = batch * heads * count * (tall + SEEN[backward]) * min(live, k_len)
        calls = len(found) * min(count, -(-min(live, k_len) // tall))
        return entries + calls * CALL

    return _counted(min(HEIGHTS, key=cost), group)


def _counted(height: int, group: int) -> int:
    """What `tiles_of` makes tiles of that height of: it counts all query heads of a group."""
    return height * min(group, 4)
