"""Masks and scores as dense arrays: read from their trees, and apart from that by plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_core.backends.numpy.arrays import Reading
from attn_core.language.operands import Table
from attn_core.language.values import Mask, Score

Shape = tuple[int, int, int, int]


def host(arrays: tuple[Any, ...], accumulation: str) -> tuple[Any, ...]:
    return tuple(a.numpy(accumulation) if isinstance(a, Table) else a for a in arrays)


def offsets(offset: Any, batch: int) -> list[int]:
    return [int(offset)] * batch if np.ndim(offset) == 0 else [int(x) for x in offset]


def positions(shape: Shape, offset: Any = 0) -> dict[str, np.ndarray]:
    """b, h, q, k and row as int32 arrays that broadcast to (B, Hq, Tq, Tk)."""
    batch, heads, rows, keys = shape
    row = np.arange(rows, dtype=np.int32)[None, None, :, None]
    shift = np.array(offsets(offset, batch), np.int32)[:, None, None, None]
    return {
        "b": np.arange(batch, dtype=np.int32)[:, None, None, None],
        "h": np.arange(heads, dtype=np.int32)[None, :, None, None],
        "q": row + shift,
        "k": np.arange(keys, dtype=np.int32)[None, None, None, :],
        "row": row,
    }


def seen(mask: Mask, shape: Shape, offset: Any = 0) -> np.ndarray:
    """What the mask's tree says, (B, Hq, Tq, Tk)."""
    found = Reading("float32").read(
        mask.tree, positions(shape, offset), host(mask.arrays, "float32")
    )
    assert found[0].dtype == np.bool_
    return np.broadcast_to(found[0], shape)


def scored(score: Score, s: np.ndarray, offset: Any = 0) -> np.ndarray:
    """What the score's tree makes of s, (B, Hq, Tq, Tk)."""
    name = s.dtype.name
    index = {**positions(s.shape, offset), "s": s}
    found = Reading(name).read(score.tree, index, host(score.arrays, name))[0]
    assert found.dtype == s.dtype
    return np.broadcast_to(found, s.shape)


def entries(rule: Callable[..., Any], shape: Shape, offset: Any = 0) -> np.ndarray:
    """rule(b, h, q, k, row) on Python ints, entry by entry."""
    batch, heads, rows, keys = shape
    shift = offsets(offset, batch)
    return np.array(
        [
            rule(b, h, row + shift[b], k, row)
            for b in range(batch)
            for h in range(heads)
            for row in range(rows)
            for k in range(keys)
        ]
    ).reshape(shape)
