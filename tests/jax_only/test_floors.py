"""The floor under a benchmark goes through the tiles that hold a live entry, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from attn_core.backends.jax import chunked_spans
from attn_core.benchmarks import jax_floors
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
    low, high = np.minimum.reduceat(first, starts), np.maximum.reduceat(beyond, starts)
    if case.mask == "window":
        # A span to each row of tiles, and no longer than the longest needs.
        assert found.live == len(starts)
        assert (high - low).max() <= found.keys < (high - low).max() + 256
    else:
        assert found.live == (-(-high // found.keys) - low // found.keys).sum()
    # Unmasked tiles of float32 are large, and of one head; all others of every head.
    alone = case.mask == "full" and case.dtype == "float32"
    assert found.heads == (1 if alone else case.heads)


def test_short_lines_are_those_of_the_backend() -> None:
    assert (jax_floors.SHORT, jax_floors.BESIDE) == (chunked_spans._LINE, chunked_spans._PRODUCTS)
