"""Schedules on the host: runs against a search through every start."""

from __future__ import annotations

import numpy as np
import pytest

from attn_core.schedule import runs


@pytest.mark.parametrize("seed", range(20))
def test_runs_hold_what_is_live_and_are_no_longer_than_the_longest_needs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    live = rng.random((int(rng.integers(1, 9)), int(rng.integers(1, 12)))) < rng.random()
    starts, width = runs(live)
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
    starts, width = runs(np.zeros((3, 4), bool))
    assert (starts.tolist(), width) == ([0, 0, 0], 1)
