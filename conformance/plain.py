"""The textbook computation in one dtype, every intermediate rounded to it: how good is ordinary?

Its error against the judge is what an implementation's error is measured by (`tolerance.py`). It
is given inputs that the judge's own mask has cleaned, heads repeated, everything dense. It is no
judge: nothing is expected to equal it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_core import reference

Array = np.ndarray


class Textbook(NamedTuple):
    """Outputs, gradients, and how large the numbers on the way were.

    `summed` is, for gradients that are sums over many entries, the largest sum of their absolute
    values: terms that cancel leave their rounding behind.
    """

    outputs: dict[str, Array]
    gradients: dict[str, Any]
    logit: float
    summed: dict[str, float]


def plain(judge: dict[str, Any], cotangents: dict[str, Array], dtype: np.dtype) -> Textbook:
    """What the textbook computation gives in `dtype`, by the names of the spec."""
    work = dtype if dtype in (np.float32, np.float64) else np.dtype(np.float32)

    def r(x: Any) -> Array:
        # 16-bit types are computed in float32 and rounded, as hardware does.
        return np.asarray(x).astype(dtype).astype(work)

    with np.errstate(all="ignore"):
        return _plain(judge, cotangents, r)


def _plain(
    judge: dict[str, Any], cotangents: dict[str, Array], r: Callable[[Any], Array]
) -> Textbook:
    sees = {name: x for name, x in judge.items() if name not in ("value", "sinks", "dropout")}
    allowed = np.asarray(reference.allowed(**sees))
    swap = judge["layout"] == "BTHD"
    q, k, v = [
        r(judge[name].swapaxes(1, 2) if swap else judge[name]) for name in ("query", "key", "value")
    ]
    batch, heads, rows, width = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    seen: Array = np.any(allowed.reshape(batch, kv_heads, group * rows, keys), 2)
    live: Array = np.any(allowed, -1)
    q = np.where(live[..., None], q, 0)
    k, v = [np.repeat(np.where(seen[..., None], x, 0), group, 1) for x in (k, v)]
    scale = r(judge.get("scale", width**-0.5))

    s = r(r(q @ k.swapaxes(-1, -2)) * scale)
    z, slopes = s, None
    tables: list[Any] = []
    if "score" in judge:
        s = np.where(allowed, s, 0)
        z, slopes, tables = _score(judge, s, allowed, r)
    if "bias" in judge:
        z = r(z + np.where(allowed, r(judge["bias"]), 0))
    hidden = np.where(allowed, z, -np.inf)
    m = hidden.max(-1, initial=-np.inf)
    sinks = None
    if "sinks" in judge:
        sinks = np.broadcast_to(r(judge["sinks"])[:, None], m.shape)
        if "q_lengths" in judge:
            valid = np.arange(rows) < np.reshape(judge["q_lengths"], (-1, 1, 1))
            sinks = np.where(valid, sinks, -np.inf)
        m = np.maximum(m, sinks)
    m = np.where(m == -np.inf, 0, m)
    e = r(np.where(allowed, np.exp(hidden - m[..., None]), 0))
    sink = 0 if sinks is None else r(np.exp(sinks - m))
    total = r(e.sum(-1) + sink)
    alive = total != 0
    total = np.where(alive, total, 1)
    w = r(e / total[..., None])
    lse = np.where(alive, r(m + np.log(total)), -np.inf)
    factor: Any = 1.0
    if "dropout" in judge:
        rate, seed = judge["dropout"]
        at = np.arange(rows) + np.reshape(judge.get("query_offset", 0), (-1, 1))
        at = np.broadcast_to(at, (batch, rows))
        kept = reference.keep(rate, seed, np.arange(batch), np.arange(heads), at, np.arange(keys))
        factor = r(kept / (1 - rate))
    p = r(w * factor)
    out = np.where(live[..., None], r(p @ v), 0)

    d_out = cotangents["out"].swapaxes(1, 2) if swap else cotangents["out"]
    d_out = np.where(live[..., None], r(d_out), 0)
    d_lse = np.where(alive, cotangents["lse"], 0)
    d_w = np.where(allowed, r(cotangents["weights"]), 0)
    d_p = r(r(d_out @ v.swapaxes(-1, -2)) * factor + d_w)
    carried = r((w * d_p).sum(-1))
    d_z = r(r(w * (d_p - carried[..., None])) + r(w * d_lse[..., None]))
    d_z = np.where(allowed, d_z, 0)
    d_s = d_z if slopes is None else r(d_z * slopes)

    def summed(x: Array) -> Array:
        return r(x.reshape(batch, kv_heads, group, keys, x.shape[-1]).sum(2))

    gradients: dict[str, Any] = {
        "query": r(r(d_s @ k) * scale),
        "key": summed(r(r(d_s.swapaxes(-1, -2) @ q) * scale)),
        "value": summed(r(p.swapaxes(-1, -2) @ d_out)),
    }
    if swap:
        gradients = {name: g.swapaxes(1, 2) for name, g in gradients.items()}
        out = out.swapaxes(1, 2)
    sizes: dict[str, float] = {}
    if "bias" in judge:
        shape = judge["bias"].shape
        rank4 = (1,) * (4 - len(shape)) + shape
        axes = tuple(i for i in range(4) if rank4[i] == 1 and d_z.shape[i] != 1)
        sizes["bias"] = float(np.abs(d_z).sum(axes).max(initial=0.0))
        gradients["bias"] = r(d_z.sum(axes, keepdims=True)).reshape(shape)
    if "sinks" in judge:
        sink_share = np.asarray(sink) / total
        terms = sink_share * (d_lse - carried)
        sizes["sinks"] = float(np.abs(terms).sum((0, 2)).max(initial=0.0))
        gradients["sinks"] = r(terms.sum((0, 2)))
    if "score" in judge:
        gradients["score"] = tuple(
            None if table is None else r([(d_z * t).sum() for t in table[1]]).reshape(table[0])
            for table in tables
        )
        for number, table in enumerate(tables):
            if table is not None:
                sums = [float(np.abs(d_z * t).sum()) for t in table[1]]
                sizes[f"score{number}"] = max(sums, default=0.0)
    logit = float(np.abs(hidden[np.isfinite(hidden)]).max(initial=0.0))
    return Textbook({"out": out, "lse": lse, "weights": w}, gradients, logit, sizes)


def _score(
    judge: dict[str, Any], s: Array, allowed: Array, r: Callable[[Any], Array]
) -> tuple[Array, Array, list[Any]]:
    """The case's own score, its slope in s and in each operand entry, by central differences."""
    function = judge["score"]
    batch, heads, rows, keys = s.shape
    index = np.indices((batch, heads, rows, keys), sparse=True)
    b, h, i, k = index
    q = i + np.reshape(judge.get("query_offset", 0), (-1, 1, 1, 1))
    operands = [np.asarray(x, np.float64) for x in judge.get("operands", ())]
    exact = s.astype(np.float64)

    def call(s: Array, given: list[Array]) -> Array:
        return np.broadcast_to(function(s, b, h, q, k, *given), allowed.shape)

    step = 1e-6 * np.maximum(1, np.abs(exact))
    slope = (call(exact + step, operands) - call(exact - step, operands)) / (2 * step)
    tables: list[Any] = []
    for number, table in enumerate(operands):
        if judge["operands"][number].dtype.kind in "iub":
            tables.append(None)
            continue
        slopes = []
        for at in np.ndindex(table.shape):
            small = 1e-6 * max(1.0, abs(float(np.nan_to_num(table[at]))))
            up, down = table.copy(), table.copy()
            up[at] += small
            down[at] -= small
            moved = [
                call(exact, [*operands[:number], t, *operands[number + 1 :]]) for t in (up, down)
            ]
            slopes.append(r(np.where(allowed, (moved[0] - moved[1]) / (2 * small), 0)))
        tables.append((table.shape, slopes))
    z = r(np.where(allowed, call(s, [x.astype(s.dtype) for x in operands]), 0))
    return z, r(np.where(allowed, slope, 0)), tables
