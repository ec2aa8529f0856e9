"""The floor under a benchmark goes through the tiles that hold a live entry, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from attn_core.benchmarks.calls import tiling
from attn_core.benchmarks.cases import CASES, Case


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name.startswith("floor-")], ids=lambda c: c.name
)
def test_tiles_are_those_that_are_live(case: Case) -> None:
    found = tiling(case, "jax")
    rows = np.arange(case.length)
    first, beyond = case.keys(rows)
    starts = np.arange(0, case.length, found.rows)
    low = np.minimum.reduceat(first, starts) // found.keys
    high = -(-np.maximum.reduceat(beyond, starts) // found.keys)
    assert found.live == (high - low).sum()
