"""Schedules on the host: runs against a search through every start."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from attn_core import masks
from attn_core.blocks import BlockMap, block_map
from attn_core.schedule import runs


def listed(live: np.ndarray) -> BlockMap:
    """The map in which exactly these tiles are live."""
    counts = live.sum(1)
    row_start = np.concatenate([[0], counts.cumsum()])
    tiles = np.nonzero(live)[1].astype(np.int32)
    lists = {"row_start": row_start, "tiles": tiles, "full": np.zeros(len(tiles), bool)}
    return BlockMap(4, 4, 4 * live.shape[0], 4 * live.shape[1], 1, 1, **lists)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_runs_hold_what_is_live_and_are_no_longer_than_the_longest_needs(
    seed: int, columns: bool
) -> None:
    rng = np.random.default_rng(seed)
    live = rng.random((int(rng.integers(1, 9)), int(rng.integers(1, 12)))) < rng.random()
    starts, width = runs(listed(live), columns)
    live = live.T if columns else live
    assert starts.dtype == np.int32
    assert starts.shape == live.shape[:1]
    needed = 1
    for row, start in zip(live, starts, strict=True):
        assert 0 <= start <= len(row) - width
        at = np.flatnonzero(row)
        if len(at):
            assert start <= at[0]
            assert at[-1] < start + width
            needed = max(needed, int(at[-1] - at[0]) + 1)
    assert width == needed


def test_an_empty_grid_has_runs() -> None:
    starts, width = runs(listed(np.zeros((3, 4), bool)))
    assert (starts.tolist(), width) == ([0, 0, 0], 1)


@pytest.mark.parametrize("columns", [False, True])
def test_runs_take_memory_for_what_is_live(columns: bool) -> None:
    """A window over a million tokens: 16384 x 16384 tiles, of which 5 in a row are live."""
    mask = (masks.causal() & masks.window(left=255)).tree
    found = block_map(mask, q_len=2**20, k_len=2**20, block_q=64, block_k=64)
    tracemalloc.start()
    begun = time.perf_counter()
    starts, width = runs(found, columns)
    took, peak = time.perf_counter() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(starts), width) == (2**14, 5)
    assert peak < 64 * found.live_count
    assert took < 5
