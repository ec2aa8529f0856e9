"""Attention for some query rows, by brute force: the answer and its gradients, head by head.

    s = q k^T * scale, over the keys that the row sees      p = exp(s - max s) / sum
    out = p v        dp = dout v^T        ds = p * (dp - sum p * dp)
    dq = ds k * scale        dk = ds^T q * scale        dv = p^T dout

In float64 this is the judge of a benchmark. With every intermediate rounded to the case's dtype it
is the textbook computation, whose error says what is ordinary there (conformance's tolerance). It
knows four masks and lengths, and shares no line with what is timed; a test holds it against
`attn_core.reference`. In memory are the rows of one head at a time, and of the keys only the
stretch that one of these rows sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attn_core.benchmarks.cases import Case

ROWS = 128
"""Query rows at a time, those of one head: at T 16384 an array of entries is 17 MB of float64. They
are as many as a check asks about, so that the textbook's gradients are one matmul, as in
conformance: sums in smaller pieces are more exact, and by less than that nobody should be judged.
"""

Rounding = Callable[[Any], np.ndarray]


class Answer(NamedTuple):
    """What the judged rows come to.

    Attributes:
        results: "out" and d_"query" of the rows alone, (B, H, rows, D); "key" and "value", the
            gradients that these rows pull back, (B, H, T, D). Gradients by the names of their
            arguments, and only where they were asked for.
        logit: the largest |s|.
    """

    results: dict[str, np.ndarray]
    logit: float


def exact(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def rounded(dtype: np.dtype) -> Rounding:
    """Rounding to the dtype; 16-bit types are computed with in float32, as hardware does."""
    wide = np.float32 if dtype.itemsize < 4 else dtype.type
    return lambda x: np.asarray(x).astype(dtype).astype(wide)


def answer(
    case: Case,
    given: Mapping[str, np.ndarray],
    rows: np.ndarray,
    r: Rounding,
    *,
    out: bool = True,
    gradients: bool = True,
    groups: Sequence[tuple[int, int]] | None = None,
) -> Answer:
    """The rows' answer; `given` is query, key, value and cotangent of out, (B, H, T, D).

    Of these (batch, key head) alone, where `groups` names them: beside them stand zeros.
    """
    q, k, v, upstream = (given[n] for n in ("query", "key", "value", "cotangent"))
    picked = (*q.shape[:2], len(rows), q.shape[3])
    wide = r(q[:0]).dtype
    found = {"out": np.zeros(picked, wide)} if out else {}
    if gradients:
        found |= {"query": np.zeros(picked, wide)}
        found |= {name: np.zeros(k.shape, wide) for name in ("key", "value")}
    scale, largest = r(case.width**-0.5), 0.0
    group = q.shape[1] // k.shape[1]
    pairs = np.ndindex(*k.shape[:2]) if groups is None else groups
    for b, kv, h in [(b, kv, kv * group + n) for b, kv in pairs for n in range(group)]:
        for start in range(0, len(rows), ROWS):
            at = slice(start, start + ROWS)
            first, beyond = case.keys(rows[at], b)
            low, high = int(first.min()), int(beyond.max())
            key = np.arange(low, high)
            sees = (first[:, None] <= key) & (key < beyond[:, None])
            mine, keys, values = r(q[b, h, rows[at]]), r(k[b, kv, low:high]), r(v[b, kv, low:high])
            s = np.where(sees, r(r(mine @ keys.T) * scale), -np.inf)
            largest = max(largest, float(np.abs(s[sees]).max(initial=0.0)))
            # A row that sees nothing has no largest, and a sum of 0: its weights stay 0.
            e = r(np.exp(s - np.maximum(s.max(1, initial=-np.inf, keepdims=True), -1e30)))
            total = r(e.sum(1, keepdims=True))
            p = r(e / np.where(total == 0, 1, total))
            if out:
                found["out"][b, h, at] = r(p @ values)
            if gradients:
                do = r(upstream[b, h, rows[at]])
                dp = r(do @ values.T)
                ds = r(p * r(dp - r((p * dp).sum(1, keepdims=True))))
                found["query"][b, h, at] = r(r(ds @ keys) * scale)
                # Sums over rows are kept wide, and rounded once, when all have been added.
                found["key"][b, kv, low:high] += ds.T @ mine
                found["value"][b, kv, low:high] += p.T @ do
    if gradients:
        found["key"] = r(r(found["key"]) * scale)
        found["value"] = r(found["value"])
    return Answer(found, largest)
