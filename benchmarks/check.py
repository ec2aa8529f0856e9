"""Check, then time: a subject's answer at full size against the float64 judge.

The judge (`judge.py`) is brute force in float64 and would take far longer over all T x T entries
than what it judges, so it is asked about some query rows, and about nothing but those:

- out: the sampled rows, each against all of its keys. The first and last row, those beside the
  edges of common tiles, and one drawn at random from each of as many equal stretches of the others
  as there are rows left: any T / 50 rows in succession hold one of them.
- gradients: the cotangent is zeroed outside the sampled rows. What those rows pull back is then
  *all* there is, so the whole of d_key and d_value, and d_query in every row (exactly zero outside
  the sample), are compared, at full size and through the very function that is timed.

Where time is short (a GPU that is lent for minutes, and this judge on its host's processor), it is
asked about some of the heads only, `groups`.

How much error passes is conformance's rule (`attn_core.conformance.tolerance`): twice the error of
the textbook computation in the same dtype, plus a floor, below a cap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from attn_core.benchmarks.cases import Case
from attn_core.benchmarks.judge import Answer, answer, exact, rounded
from attn_core.conformance.questions import numpy_dtype
from attn_core.conformance.tolerance import share

ROWS = 128
"""Rows of each head that the judge is asked about."""

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
    """Which query rows the judge is asked: sorted, ROWS of them where there are so many."""
    last = case.rows - 1
    # Each once: a row asked twice would pull its gradient back twice.
    edges = sorted({row for row in (*_EDGES, last) if row <= last})
    others = np.setdiff1d(np.arange(case.rows), edges)
    rng = np.random.default_rng(case.rows)
    stretches = np.array_split(others, min(ROWS - len(edges), len(others)) or 1)
    drawn = [rng.choice(stretch) for stretch in stretches if len(stretch)]
    return np.sort(np.array([*edges, *drawn], np.int64))


def groups(case: Case, most: int = 0) -> tuple[tuple[int, int], ...]:
    """(batch, key head) that the judge is asked about: first, last and some between; 0 is all."""
    batch, heads = case.sizes("key")[:2]
    every = list(np.ndindex(batch, heads))
    if not most or len(every) <= most:
        return tuple(every)
    at = np.linspace(0, len(every) - 1, most).round().astype(int)
    return tuple(every[n] for n in sorted(set(at.tolist())))


def shares(
    case: Case, direction: str, got: Mapping[str, np.ndarray], most: int = 0
) -> dict[str, float]:
    """Each result's error as a share of what is allowed: at most 1 passes.

    Args:
        case: what was asked, with the arrays of `asked`.
        direction: one of cases.DIRECTIONS.
        got: "out", and "query", "key" and "value" for their gradients, as the direction has them.
        most: key heads that are judged, 0 for all (`groups`).

    Raises:
        ValueError: a result is missing, or of another shape or dtype.
    """
    names = expected_names(direction)
    if set(got) != set(names):
        raise ValueError(f"a {direction} call must give {', '.join(names)}. Got {', '.join(got)}.")
    rows, some = sampled(case), groups(case, most)
    textbook, judged = _judged(case, direction == "forward", some)
    found = {}
    for name in names:
        array, full = got[name], case.sizes(name)
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
        found[_shown(name)] = share(
            _of(case, name, array, some),
            _of(case, name, judged.results[name], some),
            _of(case, name, textbook.results[name], some),
            case.dtype,
            "out" if name == "out" else "gradient",
            textbook.logit,
        )
    return found


def error(case: Case, direction: str, out: np.ndarray, most: int = 0) -> float:
    """Root mean square of what `out` is off by, over what `shares` judges."""
    some = groups(case, most)
    _, judged = _judged(case, direction == "forward", some)
    wanted = _of(case, "out", judged.results["out"], some)
    got = _of(case, "out", np.asarray(out[:, :, sampled(case)], np.float64), some)
    return float(np.sqrt(np.mean((got - wanted) ** 2)))


def _of(case: Case, name: str, x: np.ndarray, some: Sequence[tuple[int, int]]) -> np.ndarray:
    """(heads, rows, columns) of a result (B, H, rows, columns), those of these groups."""
    batch, heads = case.sizes("key")[:2]
    if len(some) == batch * heads:
        return x
    each = x.shape[1] // heads
    at = [(b, kv * each + n) for b, kv in some for n in range(each)]
    return x[tuple(np.array(at).T)]


def expected_names(direction: str) -> tuple[str, ...]:
    """The results that a call in this direction gives."""
    gradients = ("query", "key", "value")
    return {"forward": ("out",), "backward": gradients, "both": ("out", *gradients)}[direction]


def _shown(name: str) -> str:
    return name if name == "out" else f"d_{name}"


# A sweep asks about as many masks as this. What a forward pass needs is a fraction of the work.
@lru_cache(maxsize=8)
def _judged(case: Case, forward: bool, some: tuple[tuple[int, int], ...]) -> tuple[Answer, Answer]:
    """The textbook's account of the sampled rows, and the judge's."""
    given, rows = case.arrays(), sampled(case)
    textbook, judged = (
        answer(case, given, rows, r, gradients=not forward, groups=some)
        for r in (rounded(numpy_dtype(case.dtype)), exact)
    )
    return textbook, judged
