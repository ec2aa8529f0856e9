"""First values: a function of (seed, name) alone, the same in every framework and NumPy version.

A matrix is Xavier uniform (Glorot and Bengio 2010), within +-sqrt(6 / (in + out)); a vector the
same with out = 1. A table has variance 1 / width, within +-sqrt(3 / width), so that rows times
sqrt(width), and products of two such rows, have variance 1. Biases are 0 and scales 1.

The numbers are Philox4x64-10's raw words, keyed by the seed and a hash of the name, their top 24
bits as a fraction: raw words are what NumPy promises never to change, and a parameter's values do
not depend on which others there are.
"""

from __future__ import annotations

import math
from hashlib import sha256

import numpy as np

from attn_core.model.parameters import Parameter, Plan


def initial(plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 arrays for every parameter of the plan."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"`seed` must be an int. Got {type(seed).__name__}.")
    return {name: _drawn(name, parameter, int(seed)) for name, parameter in plan.items()}


def _drawn(name: str, parameter: Parameter, seed: int) -> np.ndarray:
    shape, kind = parameter
    if kind in ("bias", "scale"):
        return np.full(shape, 1.0 if kind == "scale" else 0.0, np.float32)
    if kind == "table":
        reach = math.sqrt(3.0 / shape[1])
    else:
        reach = math.sqrt(6.0 / (shape[0] + (shape[1] if kind == "matrix" else 1)))
    key = int.from_bytes(sha256(name.encode()).digest()[:8], "little") << 64 | seed % 2**64
    raw = np.random.Philox(key=key).random_raw(math.prod(shape))
    share = ((raw >> np.uint64(40)).astype(np.float64) + 0.5) / 2**24
    return ((2.0 * share - 1.0) * reach).astype(np.float32).reshape(shape)
