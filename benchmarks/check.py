"""Check, then time: a subject's answer at full size against the float64 judge.

The judge is brute force in float64 (`attn_core.reference`) and cannot hold T x T entries, so it is
asked about some query rows, and about nothing but those:

- out: the sampled rows, each against all of its keys. The first and last row, those beside the
  edges of common tiles, and others drawn at random are among them.
- gradients: the cotangent is zeroed outside the sampled rows. What those rows pull back is then
  *all* there is, so the whole of d_key and d_value, and d_query in every row (exactly zero outside
  the sample), are compared, at full size and through the very function that is timed.

How much error passes is conformance's rule (`attn_core.conformance.tolerance`): twice the error of
the textbook computation in the same dtype, plus a floor, below a cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from attn_core import reference
from attn_core.benchmarks.cases import Case
from attn_core.conformance.plain import Textbook, plain
from attn_core.conformance.questions import numpy_dtype
from attn_core.conformance.tolerance import share

ENTRIES = 1 << 22
"""Entries of a sampled problem, over all heads: a few hundred megabytes of float64 on the way."""

_EDGES = (0, 63, 64, 127, 128, 255, 256, 511, 512)


class Asked(NamedTuple):
    """What a checked call is given, and which rows the judge answers for."""

    arrays: dict[str, np.ndarray]
    rows: np.ndarray


def asked(case: Case) -> Asked:
    """The case's own arrays, with a cotangent that is zero outside the sampled rows."""
    arrays, rows = case.arrays(), sampled(case)
    cotangent = np.zeros_like(arrays["cotangent"])
    cotangent[:, :, rows] = arrays["cotangent"][:, :, rows]
    return Asked({**arrays, "cotangent": cotangent}, rows)


def sampled(case: Case) -> np.ndarray:
    """Which query rows the judge is asked: sorted, 16 to 64 of them where there are so many."""
    count = ENTRIES // (case.batch * case.heads * case.length)
    count = min(max(count, 16), 64, case.length)
    # Each once: a row asked twice would pull its gradient back twice.
    edges = sorted({row for row in (*_EDGES, case.length - 1) if row < case.length})
    rng = np.random.default_rng(case.length)
    rest = rng.permutation(np.setdiff1d(np.arange(case.length), edges))
    return np.sort(np.array([*edges, *rest][:count], np.int64))


def shares(case: Case, direction: str, got: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Each result's error as a share of what is allowed: at most 1 passes.

    Args:
        case: what was asked, with the arrays of `asked`.
        direction: one of cases.DIRECTIONS.
        got: "out", and "query", "key" and "value" for their gradients, as the direction has them.

    Raises:
        ValueError: a result is missing, or of another shape or dtype.
    """
    names = expected_names(direction)
    if set(got) != set(names):
        raise ValueError(f"a {direction} call must give {', '.join(names)}. Got {', '.join(got)}.")
    rows, textbook, judged = _judged(case)
    found = {}
    for name in names:
        array, full = got[name], (case.batch, case.heads, case.length, case.width)
        if array.shape != full or array.dtype != numpy_dtype(case.dtype):
            raise ValueError(
                f"{_shown(name)} must be {case.dtype} {full}. Got {array.dtype} {array.shape}."
            )
        if name in ("out", "query"):
            beside = np.delete(array, rows, axis=2)
            if name == "query" and np.any(beside.astype(np.float32)):
                # No upstream gradient reaches these rows; the smallest number there is a mistake.
                found[_shown(name)] = float("inf")
                continue
            array = array[:, :, rows]
        ordinary = textbook.outputs[name] if name == "out" else textbook.gradients[name]
        found[_shown(name)] = share(
            array,
            judged[name],
            ordinary,
            case.dtype,
            "out" if name == "out" else "gradient",
            textbook.logit,
        )
    return found


def expected_names(direction: str) -> tuple[str, ...]:
    """The results that a call in this direction gives."""
    gradients = ("query", "key", "value")
    return {"forward": ("out",), "backward": gradients, "both": ("out", *gradients)}[direction]


def _shown(name: str) -> str:
    return name if name == "out" else f"d_{name}"


# The judge is slower than most subjects. A sweep asks about as many masks as this.
@lru_cache(maxsize=8)
def _judged(case: Case) -> tuple[np.ndarray, Textbook, dict[str, np.ndarray]]:
    """The sampled rows, the textbook's account of them and the judge's."""
    given, rows = asked(case)
    cotangent = given["cotangent"][:, :, rows]
    question: dict[str, Any] = {
        "query": given["query"][:, :, rows],
        "key": given["key"],
        "value": given["value"],
        "mask": case.dense(rows)[None, None],
        "layout": "BHTD",
    }
    none = np.zeros((), np.float32)
    textbook = plain(
        question, {"out": cotangent, "lse": none, "weights": none}, numpy_dtype(case.dtype)
    )
    judged = reference.gradients(**question, d_out=cotangent)
    judged["out"] = reference.attention(**question).out
    return rows, textbook, judged
