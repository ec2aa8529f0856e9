"""Block grids with JAX arrays under jit, against the host's block map."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tile_cases import CASES, SIZES, TRACED

from attn_core.backends.jax.tiles import Tiles
from attn_core.blocks import block_grid, block_map, block_ranges
from attn_core.language.rules import HOST


def _grid(tree: Any, arrays: Any, lengths: Any) -> tuple[Any, Any]:
    ops = Tiles()
    status = block_grid(ops, tree, arrays, **SIZES, **lengths)
    return status, block_ranges(ops, status)


def _compare(found: Any, name: str, lengths: dict[str, np.ndarray]) -> None:
    status, ranges = found
    host = block_map(CASES[name].tree, CASES[name].arrays, **SIZES, **lengths)
    expected = host.dense()
    assert status.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(status), expected)
    for got, want in zip(ranges, block_ranges(HOST, expected.astype(np.int64)), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("name", CASES)
def test_jit(name: str) -> None:
    tree = CASES[name].tree
    compiled = jax.jit(lambda arrays, lengths: _grid(tree, arrays, lengths))
    _compare(compiled(list(CASES[name].arrays), TRACED), name, TRACED)


@pytest.mark.parametrize("name", ["causal", "segments", "arithmetic"])
def test_eager_under_x64(name: str) -> None:
    with jax.enable_x64(True):
        _compare(_grid(CASES[name].tree, CASES[name].arrays, {}), name, {})
