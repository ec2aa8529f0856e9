"""The masks and sizes that every framework's traced block grid is compared on."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_core import masks
from attn_core.language import expr
from attn_core.language.operands import operand
from attn_core.language.values import Mask, mask

_RNG = np.random.default_rng(11)
_IDS = np.sort(_RNG.integers(0, 5, (2, 40)), axis=1).astype(np.int32)
_FLAGS = _RNG.random(40) < 0.1
_DENSE = _RNG.random((1, 2, 30, 40)) < 0.05
_EDGES = _RNG.integers(0, 40, (30, 2))
_SHIFTS = operand(_RNG.integers(-9, 9, (2, 3)).astype(np.int32), bounds=(-9, 9))


def _arithmetic(b: Any, h: Any, q: Any, k: Any) -> Any:
    shift = _SHIFTS[b, q % 3]
    odd = (q * 3 - k) % (shift + 2) == 1
    near = abs(q - k) < expr.where(k // 5 > 2, 7, 3)
    return (odd | near) ^ ((q + shift) // (h - 1) > (k >> (h + 1))) & ((k & 5) != 4)


CASES: dict[str, Mask] = {
    "causal": masks.causal(),
    "window": masks.window(5, 2),
    "causal_window": masks.causal() & masks.window(9),
    "prefix_lm": masks.causal() | masks.prefix(np.array([3, 17], np.int32)),
    "segments": masks.segments(_IDS) & masks.causal(),
    "segments_apart": masks.segments(_IDS[:, :30], _IDS),
    "chunks": masks.chunks(7) & masks.causal(),
    "dilated": masks.dilated(9, 2, 0),
    "global": masks.global_tokens(3) | masks.window(4, 4),
    "global_flags": masks.global_tokens(_FLAGS) & masks.causal(),
    "dense": masks.dense(_DENSE),
    "graph": masks.graph(_EDGES, 40),
    "lengths": masks.lengths(np.array([11, 33], np.int32), q=np.array([30, 5], np.int32)),
    "not": ~(masks.chunks(6) | masks.window(3)),
    "arithmetic": mask(_arithmetic),
}

SIZES: dict[str, Any] = {
    "q_len": 30,
    "k_len": 40,
    "block_q": 4,
    "block_k": 8,
    "batch": 2,
    "heads": 2,
}

# Arrays that a compiled function receives as arguments, so that they are traced.
TRACED: dict[str, np.ndarray] = {
    "offsets": np.array([-3, 10], np.int32),
    "kv_lengths": np.array([40, 21], np.int32),
    "q_lengths": np.array([30, 17], np.int32),
}
