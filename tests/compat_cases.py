"""What the tests of the drop-ins share: inputs, the judge, and how ours and the original are held
to it.

A case names the options of the original that are on. Each test builds the original's arguments
from it, and the judge's from the convention that the original's documentation states: a dense mask
made entry by entry. Ours must answer within the suite's own tolerance, and so must the original,
or else the convention would be misread.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from attn_core import reference
from attn_core.conformance.plain import plain
from attn_core.conformance.tolerance import share

Judge = dict[str, Any]


def singly_and_in_pairs(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [(), *[(name,) for name in names], *combinations(names, 2)]


def draw(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def causal(rows: int, keys: int) -> np.ndarray:
    """Query i sees keys 0 .. i."""
    return np.array([[k <= i for k in range(keys)] for i in range(rows)])


def window(rows: int, keys: int, left: int, right: int) -> np.ndarray:
    """`left` neighbours before the position itself, and `right` after it."""
    return np.array([[i - left <= k <= i + right for k in range(keys)] for i in range(rows)])


def off_and_on(on: Judge, off: Judge) -> bool:
    """Whether the options make any difference to the answer."""
    answers = [reference.attention(**judge).out for judge in (off, on)]
    return not np.allclose(*answers, atol=1e-3)


def shares(
    judge: Judge, cotangent: np.ndarray, got: dict[str, np.ndarray], dtype: str = "float32"
) -> dict[str, float]:
    """Each result's error as a share of what is allowed. `got` holds "out" and "d_<name>"."""
    judged = reference.attention(**judge)
    zeros = {"lse": np.zeros_like(judged.lse), "weights": np.zeros_like(judged.weights)}
    pulled = reference.gradients(**judge, d_out=cotangent)
    textbook = plain({"layout": "BHTD", **judge}, {"out": cotangent, **zeros}, judge["query"].dtype)
    found = {}
    for name, result in got.items():
        if name == "out":
            want, ordinary, way = judged.out, textbook.outputs["out"], "out"
        elif name == "lse":
            want, ordinary, way = judged.lse, textbook.outputs["lse"], "out"
        elif name == "weights":
            want, ordinary, way = judged.weights, textbook.outputs["weights"], "out"
        else:
            what = name.removeprefix("d_")
            want, ordinary, way = pulled[what], textbook.gradients[what], "gradient"
        summed = textbook.summed.get(name.removeprefix("d_"), 0.0)
        found[name] = share(
            result, want, ordinary, dtype, way, textbook.logit, "score" in judge, summed
        )
    return found


def inside(found: dict[str, float]) -> bool:
    return all(used <= 1 for used in found.values())
