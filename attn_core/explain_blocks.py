"""Live blocks of a question: how much of Tq x Tk its mask and lengths leave to be computed.

Counted on the host from the same interval reading that the tile loops go by, for each batch and
head whose map differs. A block map may keep a dead block (docs/SPEC.md, "Block maps"); where the
whole question is small enough, the mask itself is read entry by entry and what the map keeps in
excess is counted too. Neither computes a logit.

Values that nobody has yet (inside jax.jit or a tf.function) leave nothing to count: `UNKNOWN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from attn_core import registry
from attn_core.blocks import EMPTY, block_map
from attn_core.language.operands import Table
from attn_core.spec import FAR, Operands, Problem

UNKNOWN = "known when it runs"
NOMINAL = (128, 128)
"""Rows and keys of a block where the implementation has no tiles of its own."""

_ENTRIES = 2**22
"""Entries of the mask beyond which they are not read one by one."""


@dataclass(frozen=True)
class Blocks:
    """Counts over the maps that differ: `batches` times `heads` of them.

    Attributes:
        block_q, block_k: rows and keys of a block.
        rows, columns: blocks of one map, along queries and keys.
        batches, heads: how many batches and heads have a map of their own; 1 if all are alike.
        total, full, partial, empty: blocks; full ones need no mask, empty ones hold nothing.
        excess: partial blocks in which nothing is allowed after all; None if not counted.
        allowed_share: allowed entries as a share of those in live blocks; None if not counted.
    """

    block_q: int
    block_k: int
    rows: int
    columns: int
    batches: int
    heads: int
    total: int
    full: int
    partial: int
    empty: int
    excess: int | None
    allowed_share: float | None

    @property
    def live_share(self) -> float:
        """Full and partial blocks as a share of all; 0 where there is none."""
        return (self.full + self.partial) / max(1, self.total)


def count(
    backend: Any, problem: Problem, operands: Operands, tile: tuple[int, int]
) -> Blocks | None:
    """The blocks of this size, or None where they are known only when it runs."""
    p = problem
    if p.batch is None or p.q_len is None or p.k_len is None:
        return None
    given = (operands.kv_lengths, operands.q_lengths, operands.query_offset, *operands.mask)
    found = [_values(backend, x) for x in given]
    if any(x is None and y is not None for x, y in zip(found, given, strict=True)):
        return None
    kv, rows, offset, *arrays = found
    kv, rows = _clipped(kv, 0, p.k_len), _clipped(rows, 0, p.q_len)
    offset = _clipped(offset, -FAR, FAR)
    question: dict[str, Any] = {
        "q_len": p.q_len,
        "k_len": p.k_len,
        "batch": p.batch,
        "heads": p.heads,
        "offsets": _offsets(p, (p.q_len, p.k_len), kv, rows, offset),
        "kv_lengths": kv,
        "q_lengths": rows,
    }
    tree, (block_q, block_k) = p.mask, tile
    if p.batch == 0:
        # Nothing in the batch, and so no map of anything.
        tree, arrays, question = None, [], {"q_len": 0, "k_len": 0}
    blocks = block_map(tree, arrays, block_q=block_q, block_k=block_k, **question)
    total = blocks.batch * blocks.heads * blocks.grid[0] * blocks.grid[1]
    full, live = blocks.full_count, blocks.live_count
    excess = share = None
    extent = (blocks.batch, blocks.heads, blocks.q_len, blocks.k_len)
    if total and prod(extent) <= _ENTRIES:
        known = operands._replace(
            kv_lengths=kv, q_lengths=rows, query_offset=offset, mask=tuple(arrays)
        )
        entries = registry.load("numpy").allowed(p, known, extent)
        excess, share = _excess(entries, blocks.dense() != EMPTY, tile)
    return Blocks(
        block_q,
        block_k,
        *blocks.grid,
        blocks.batch,
        blocks.heads,
        total,
        full,
        live - full,
        total - live,
        excess,
        share,
    )


def _values(backend: Any, x: Any) -> Any:
    """What is on the host, or can be had; None for what is only being traced, and for None."""
    if x is None or isinstance(x, np.ndarray):
        return x
    if isinstance(x, (tuple, list)):
        return np.array(x, np.int64)
    if isinstance(x, Table):
        return x.numpy()
    try:
        return backend.to_numpy(x)
    except (TypeError, AttributeError, NotImplementedError, RuntimeError):
        # Every framework has an error of its own for asking a tracer, a symbolic tensor or a
        # tensor without memory for its values, and these are what they derive from.
        return None


def _clipped(given: Any, least: int, most: int) -> Any:
    """(B or 1,) within these, as what is traced is clamped where it is read."""
    return None if given is None else np.clip(given.astype(np.int64).reshape(-1), least, most)


def _offsets(p: Problem, size: tuple[int, int], kv: Any, rows: Any, given: Any) -> Any:
    """An int, or ints (B,)."""
    if p.offset == "zero":
        return 0
    if p.offset == "given":
        found = given
    else:
        found = np.reshape(
            (size[1] if kv is None else kv) - (size[0] if rows is None else rows), -1
        )
    return int(found[0]) if len(found) == 1 else found


def _excess(entries: np.ndarray, live: np.ndarray, tile: tuple[int, int]) -> tuple[int, float]:
    """(live blocks in which nothing is allowed, allowed entries as a share of the live blocks')."""
    allowed, sizes = entries.astype(np.int32), np.ones(entries.shape[2:], np.int32)
    for axis, block in ((2, tile[0]), (3, tile[1])):
        at = np.arange(0, entries.shape[axis], block)
        allowed = np.add.reduceat(allowed, at, axis)
        sizes = np.add.reduceat(sizes, at, axis - 2)
    held = int((live * sizes).sum())
    return int((live & (allowed == 0)).sum()), int(allowed.sum()) / max(1, held)
