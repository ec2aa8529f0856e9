"""Block grids with torch tensors, eager and compiled, against the host's block map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tile_cases import CASES, SIZES, TRACED

from attn_core.backends.torch.tiles import Tiles
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
    assert status.dtype == torch.int32
    np.testing.assert_array_equal(status.numpy(), expected)
    for got, want in zip(ranges, block_ranges(HOST, expected.astype(np.int64)), strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("name", CASES)
def test_eager(name: str) -> None:
    arrays = [torch.as_tensor(x) for x in CASES[name].arrays]
    lengths = {key: torch.as_tensor(x) for key, x in TRACED.items()}
    _compare(_grid(CASES[name].tree, arrays, lengths), name, TRACED)
    _compare(_grid(CASES[name].tree, arrays, {}), name, {})


# The readings' caches hold what the tree alone decides, so tracing past them changes nothing.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", ["causal", "segments"])
def test_compiled(name: str) -> None:
    arrays = [torch.as_tensor(x) for x in CASES[name].arrays]
    lengths = {key: torch.as_tensor(x) for key, x in TRACED.items()}
    tree = CASES[name].tree
    compiled = torch.compile(
        lambda arrays, lengths: _grid(tree, arrays, lengths), fullgraph=True, backend="eager"
    )
    _compare(compiled(arrays, lengths), name, TRACED)
