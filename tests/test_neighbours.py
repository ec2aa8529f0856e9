"""Whether full tiles are neighbours is told of the tree; that it is so is seen in block maps.

Random masks are in tests/test_blocks.py: whatever is promised of one holds of its map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_core
from attn_core import masks
from attn_core.blocks import FULL, block_map
from attn_core.language.neighbours import full_tiles_are_neighbours

TABLE = attn_core.operand(np.arange(64) % 7)
IDS = np.repeat([0, 1, 0, 2, 0, 0, 1, 1], 8)

PROMISED: dict[str, Any] = {
    "causal": masks.causal(),
    "window": masks.window(20, 13),
    "one side": masks.window(None, 9),
    "prefix": masks.prefix(40),
    "prefixes": masks.prefix(np.int32([40, 12])) & masks.causal(),
    "lengths": masks.lengths(kv=[50, 31], q=[64, 20]),
    "chunks": masks.chunks(24),
    "a distance": attn_core.mask(lambda b, h, q, k: abs(q - k) <= 21),
    "causal or prefix": masks.causal() | masks.prefix(30),
    "not the future": ~attn_core.mask(lambda b, h, q, k: q < k),
    "by head": attn_core.mask(lambda b, h, q, k: q - k < 30 + 2 * TABLE[h]),
    "chosen by head": attn_core.mask(
        lambda b, h, q, k: attn_core.where(h == 0, q >= k, k - q <= 31) & (k // 4 < 13)
    ),
    "clamped": attn_core.mask(lambda b, h, q, k: attn_core.minimum(k, q + 9) <= 44),
}
NOT: dict[str, Any] = {
    "documents": masks.segments(IDS),
    "sinks and window": masks.window(24) | masks.prefix(16),
    "global": masks.global_tokens(np.arange(64) // 8 % 2 == 0),
    "not a stretch": attn_core.mask(lambda b, h, q, k: (k // 16) != 1),
    "remainder": attn_core.mask(lambda b, h, q, k: k % 32 < 16),
    "far": attn_core.mask(lambda b, h, q, k: abs(32 - k) >= 10),
    "dense": masks.dense(np.repeat(np.repeat(IDS[None, :] == 0, 64, 0), 1, 1)),
}


def gaps(mask: Any, along_keys: bool) -> bool:
    """Whether full tiles of 8 by 8 leave gaps between them."""
    found = block_map(
        mask.tree, mask.arrays, q_len=64, k_len=64, block_q=8, block_k=8, batch=2, heads=2
    )
    full = found.dense() == FULL
    full = full if along_keys else full.swapaxes(2, 3)
    assert full.any()
    for line in full.reshape(-1, 8):
        (at,) = np.nonzero(line)
        if len(at) and at[-1] - at[0] >= len(at):
            return True
    return False


@pytest.mark.parametrize("name", PROMISED)
def test_neighbours(name: str) -> None:
    made = PROMISED[name]
    assert full_tiles_are_neighbours(made.tree, "k")
    assert not gaps(made, True)
    assert full_tiles_are_neighbours(made.tree, "q", "row")
    assert not gaps(made, False)


@pytest.mark.parametrize("name", NOT)
def test_gaps(name: str) -> None:
    made = NOT[name]
    assert not full_tiles_are_neighbours(made.tree, "k")
    assert gaps(made, True)


def test_one_axis_alone() -> None:
    """Documents of queries against a half-line of keys: every row is a stretch, no column is."""
    made = attn_core.mask(lambda b, h, q, k: (TABLE[q] >= 0) & (k < 9 * TABLE[q]))
    assert full_tiles_are_neighbours(made.tree, "k")
    assert not full_tiles_are_neighbours(made.tree, "q", "row")
