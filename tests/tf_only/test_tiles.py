"""Block grids with TensorFlow tensors in tf.function, with and without XLA, against the host's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tile_cases import CASES, SIZES, TRACED

from attn_core.backends.tf.tiles import Tiles
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
    assert status.dtype == tf.int64
    np.testing.assert_array_equal(status.numpy(), expected)
    for got, want in zip(ranges, block_ranges(HOST, expected.astype(np.int64)), strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("name", CASES)
def test_graph(name: str) -> None:
    tree = CASES[name].tree
    compiled = tf.function(lambda arrays, lengths: _grid(tree, arrays, lengths))
    arrays = [tf.constant(x) for x in CASES[name].arrays]
    lengths = {key: tf.constant(x) for key, x in TRACED.items()}
    _compare(compiled(arrays, lengths), name, TRACED)


@pytest.mark.parametrize("name", ["causal", "segments", "arithmetic"])
@pytest.mark.parametrize("xla", [None, True])
def test_eager_and_xla(name: str, xla: bool | None) -> None:
    tree = CASES[name].tree
    arrays = [tf.constant(x) for x in CASES[name].arrays]
    if xla is None:
        _compare(_grid(tree, arrays, {}), name, {})
        return
    compiled = tf.function(lambda arrays: _grid(tree, arrays, {}), jit_compile=True)
    _compare(compiled(arrays), name, {})
