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
    got, plain = got.astype(np.float64), plain.astype(np.float64)
    if got.shape != want.shape:
        return float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite]):
        return float("inf")
    if not finite.any():
        return 0.0
    got, want, plain = got[finite], want[finite], plain[finite]
    if not np.isfinite(got).all():
        return float("inf")
    spread = float(np.abs(want).max())
    error = float(np.abs(got - want).max())
    if spread == 0.0:
        # The judge says exactly zero, and so must everybody.
        return 0.0 if error == 0.0 else float("inf")
    spread = max(spread, summed)
    reach = np.abs(plain - want)
    naive = float(reach[np.isfinite(reach)].max()) if np.isfinite(reach).any() else 0.0
    cap = CAP[direction][dtype] * spread * max(1.0, logit)
    doubt = JUDGE * spread if through_score else 0.0
    return error / (min(2 * naive + FLOOR[dtype] * spread, cap) + doubt)
