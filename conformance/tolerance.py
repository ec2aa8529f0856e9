"""The tolerance: one rule, one table.

A result passes when its error against the float64 judge is at most twice the error of a plain
computation in the same dtype, plus a floor, and below an absolute cap:

    error  = max |result - judge|
    spread = max |judge|, of that result; for a gradient that sums over entries, the sum of their
             absolute values where that is larger
    allowed = min(2 * error of the plain computation + FLOOR[dtype] * spread,
                  CAP[dtype] * spread * max(1, largest |logit|))
              + JUDGE * spread, for gradients that pass through a score

Where the floor comes from: an impartial implementation may sum in another order than the plain
one, which moves a result by a few roundings of its largest terms; 16 units in the last place
cover the sums of this suite's sizes (at most 11 terms forward, 56 backward). Where the cap comes
from: exp(s) turns the rounding of a logit, |s| * eps, into a relative error of the weight, so a
few hundred eps, times the largest logit, bounds any sound computation. JUDGE is the judge's own
doubt: it differentiates a score by central differences, and 2**-52 over a step of about 1e-6
leaves 2**-32. Only float64 notices. Nothing loosens any of them.

The plain computation is the textbook one, every intermediate rounded to the dtype: it knows no
poison, so it is given what the judge's own mask lets through.
"""

from __future__ import annotations

import numpy as np

EPS = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
FLOOR = {dtype: 16 * eps for dtype, eps in EPS.items()} | {
    # 16-bit results are computed in float32 and rounded once.
    "float16": 2 * EPS["float16"],
    "bfloat16": 2 * EPS["bfloat16"],
}
CAP = {
    "out": {"float64": 512 * EPS["float64"], "float32": 512 * EPS["float32"]}
    | {"float16": 8 * EPS["float16"], "bfloat16": 8 * EPS["bfloat16"]},
    "gradient": {"float64": 4096 * EPS["float64"], "float32": 4096 * EPS["float32"]}
    | {"float16": 32 * EPS["float16"], "bfloat16": 32 * EPS["bfloat16"]},
}

JUDGE = 2.0**-32


def share(
    got: np.ndarray,
    want: np.ndarray,
    plain: np.ndarray,
    dtype: str,
    direction: str,
    logit: float,
    through_score: bool = False,
    summed: float = 0.0,
) -> float:
    """The error as a share of what is allowed: at most 1 passes; inf for a wrong NaN or infinity.

    Args:
        got: the subject's result, any dtype.
        want: the judge's, float64.
        plain: the plain computation's.
        dtype: in which the result is held to account.
        direction: "out" or "gradient".
        logit: the largest finite |logit| of the case.
        through_score: a gradient of a case with a score.
        summed: the largest sum of absolute values that the result adds up.
    """
    error, spread = measured(want, plain, summed)
    return used(got, want, allowance(error, spread, dtype, direction, logit, through_score))


def measured(want: np.ndarray, plain: np.ndarray, summed: float = 0.0) -> tuple[float, float]:
    """The plain computation's largest error, and the spread."""
    finite = np.isfinite(want)
    spread = float(np.abs(want[finite]).max(initial=0.0))
    if spread == 0.0:
        return 0.0, 0.0
    reach = np.abs(plain.astype(np.float64)[finite] - want[finite])
    return float(reach[np.isfinite(reach)].max(initial=0.0)), max(spread, summed)


def allowance(
    error: float, spread: float, dtype: str, direction: str, logit: float, through_score: bool
) -> float:
    """The largest absolute error that passes; `error` is the plain computation's."""
    if spread == 0.0:
        return 0.0  # the judge says exactly zero, and so must everybody
    cap = CAP[direction][dtype] * spread * max(1.0, logit)
    doubt = JUDGE * spread if through_score else 0.0
    return float(min(2 * error + FLOOR[dtype] * spread, cap) + doubt)


def used(got: np.ndarray, want: np.ndarray, allowed: float) -> float:
    """The error as a share of `allowed`; inf for another shape, a wrong infinity or any NaN."""
    if got.shape != want.shape:
        return float("inf")
    got, finite = got.astype(np.float64), np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite]) or not np.isfinite(got[finite]).all():
        return float("inf")
    error = float(np.abs(got[finite] - want[finite]).max(initial=0.0))
    if error == 0.0:
        return 0.0
    return error / allowed if allowed else float("inf")
