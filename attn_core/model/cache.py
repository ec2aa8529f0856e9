"""Keys and values that are kept from call to call, and the arithmetic of filling them.

A Cache holds S slots for each row of the batch, `lengths[b]` of them filled. A call with n[b] new
rows (all T, or `q_lengths`) writes row i into slot lengths[b] + i, stands at those positions, and
attends to the lengths[b] + n[b] slots that are filled then:

    slot t of b takes new row t - lengths[b], where that is in [0, n[b]), else stays as it was
    query_offset = lengths,   kv_lengths = lengths + n,   the new Cache's lengths = lengths + n

so that steps give what the same rows give in one call if the config (`causal`, or its `mask`) or
every call's own mask hides from each row those after it. Where nothing hides them, a row sees what
is filled when its call ends: all rows of its own call, later ones too, and none of a later call.
That is a prefix read both ways and then tokens one by one, and not what one call gives. Where
lengths + n exceeds S there is no room: with known numbers that is a ValueError before anything is
computed; where they are traced, every row of that batch entry answers NaN, and so does every later
call with that cache.

A Memory is the same for cross-attention: keys and values of a source, projected once.

All are NamedTuples of arrays, and so pytrees in every framework. The functions take and give
arrays of any framework: they use operators alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Cache(NamedTuple):
    """What self-attention keeps: key (B, S, Hk, D), value (B, S, Hk, Dv), lengths int32 (B,)."""

    key: Any
    value: Any
    lengths: Any


class Memory(NamedTuple):
    """A source projected once, for cross-attention: like a Cache; lengths may be None."""

    key: Any
    value: Any
    lengths: Any = None


class ModelCache(NamedTuple):
    """What a decoder keeps: a Cache for each block, and a Memory where it attends to an encoder."""

    blocks: tuple[Cache, ...]
    memories: tuple[Memory, ...] = ()


class BlockWeights(NamedTuple):
    """The weights of one block, (B, Hq, Tq, Tk) each; cross is None without an encoder."""

    attention: Any
    cross: Any = None


class ModelOutput(NamedTuple):
    """What a model returns when an extra is asked for; what was not asked for is None.

    Attributes:
        out: logits (B, T, vocabulary) or (B, classes), or an encoder's vectors (B, T, width).
        weights: {"encoder": (BlockWeights, ..), "decoder": (BlockWeights, ..)}, of what was run.
        cache: the ModelCache to pass to the next call.
    """

    out: Any
    weights: Any = None
    cache: Any = None


class LayerOutput(NamedTuple):
    """What a layer returns when an extra is asked for; what was not asked for is None.

    Attributes:
        out: (B, Tq, out).
        weights: (B, Hq, Tq, Tk), after softmax and before dropout; Tk is S with a cache.
        cache: the Cache to pass to the next call.
    """

    out: Any
    weights: Any = None
    cache: Any = None


class Filling(NamedTuple):
    """What a call does to a cache of S slots, for T new rows.

    Attributes:
        positions: (B, T), where the new rows stand.
        source: (B, S), the new row that a slot takes, within [0, T) only where `written`.
        written: (B, S), whether a slot takes one.
        lengths: (B,), afterwards.
        full: (B,), there is no room.
    """

    positions: Any
    source: Any
    written: Any
    lengths: Any
    full: Any


def filling(lengths: Any, counts: Any, rows: Any, slots: Any, size: int) -> Filling:
    """The arithmetic above, in int32.

    lengths and counts are (B,), rows 0 .. T - 1, slots 0 .. S - 1.
    """
    source = slots[None, :] - lengths[:, None]
    after = lengths + counts
    return Filling(
        positions=lengths[:, None] + rows[None, :],
        source=source,
        written=(source >= 0) & (source < counts[:, None]),
        lengths=after,
        full=after > size,
    )


def check_room(lengths: np.ndarray, counts: np.ndarray, size: int) -> None:
    """Refuse a call that a cache has no room for, from numbers on the host."""
    after = np.asarray(lengths, np.int64) + np.asarray(counts, np.int64)
    over = np.nonzero(after > size)[0]
    if len(over):
        b = int(over[0])
        raise ValueError(
            f"`cache` must have room for the new rows. Got {int(np.asarray(counts)[b])} for row "
            f"{b} of the batch, in which {int(np.asarray(lengths)[b])} of {size} slots are filled."
        )
