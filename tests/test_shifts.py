"""Whether a mask says the same all along a diagonal: against evaluating it there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import positions, seen

import attn_core
from attn_core import masks
from attn_core.language.shifts import slides

TABLE = attn_core.operand(np.arange(64))

SLIDES: dict[str, Any] = {
    "causal": masks.causal(),
    "window": masks.window(5, 3),
    "dilated": masks.dilated(3, 9) & masks.causal(),
    "by head": attn_core.mask(lambda b, h, q, k: q - k < 3 + 2 * h),
    "twice": attn_core.mask(lambda b, h, q, k: 2 * q - k <= q + 4),
    "the nearer": attn_core.mask(lambda b, h, q, k: attn_core.minimum(q, attn_core.row) >= k),
    "by a table of heads": attn_core.mask(lambda b, h, q, k: q - k < TABLE[h]),
    "chosen": attn_core.mask(lambda b, h, q, k: attn_core.where(h == 0, q, q - 3) >= k),
}
DOES_NOT: dict[str, Any] = {
    "prefix": masks.prefix(5),
    "chunks": masks.chunks(4),
    "segments": masks.segments(np.arange(64) // 7),
    "twice": attn_core.mask(lambda b, h, q, k: 2 * q - k <= 4),
    "product": attn_core.mask(lambda b, h, q, k: q * k < 90),
    "chosen": attn_core.mask(lambda b, h, q, k: attn_core.where(q < 9, q, q - 3) >= k),
    "the nearer": attn_core.mask(lambda b, h, q, k: attn_core.minimum(q, 9) >= k),
    "a table of keys": attn_core.mask(lambda b, h, q, k: TABLE[k] > 12),
}


def diagonals(mask: Any) -> bool:
    """Whether every diagonal of the dense mask, over 32 rows and keys, is of one value."""
    dense = seen(mask, (1, 2, 32, 32))[0]
    return all(
        len(set(np.diagonal(head, shift))) <= 1 for head in dense for shift in range(-31, 32)
    )


@pytest.mark.parametrize("name", SLIDES)
def test_it_slides(name: str) -> None:
    assert slides(SLIDES[name].tree)
    assert diagonals(SLIDES[name])


@pytest.mark.parametrize("name", DOES_NOT)
def test_it_does_not(name: str) -> None:
    assert not slides(DOES_NOT[name].tree)
    assert not diagonals(DOES_NOT[name])


def test_positions_of_the_helper_are_those_of_the_language() -> None:
    assert positions((1, 1, 3, 2), 4)["q"].ravel().tolist() == [4, 5, 6]
