"""Diagnosis: which known mistake explains a failed case?

Each cause changes what the judge is told, as somebody who made that mistake would have meant it.
Where the subject's wrong output is the right answer to the changed question, within the same
allowance as ever, the cause is named. Causes of wrong gradients, lse or weights compare those with
what the mistake makes of the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from attn_core import reference
from attn_core.conformance.plain import Textbook
from attn_core.conformance.questions import Question
from attn_core.conformance.tolerance import share

Array = np.ndarray
Judge = dict[str, Any]


_NOT_ZERO = "rows that see no key are not 0"


def diagnose(
    asked: Question,
    judged: reference.Judged,
    pulled: dict[str, Any],
    textbook: Textbook,
    got: dict[str, Array],
    failed: list[str],
) -> str:
    """The name of the mistake that explains these failed results; empty where none does.

    `got` maps result names ("out", "lse", "d_query", ...) to the subject's arrays.
    """
    if "out" in failed:
        return _of_output(asked, judged, textbook, got["out"])
    for name in failed:
        want = _wanted(name, judged, pulled)
        cause = _of_part(name, asked, judged, want, got[name]) if want is not None else ""
        if cause:
            return cause
    return ""


def _of_output(asked: Question, judged: reference.Judged, textbook: Textbook, out: Array) -> str:
    want = judged.out
    finite = np.isfinite(want)
    poisoned = any(
        isinstance(x, np.ndarray) and x.dtype.kind not in "iub" and np.isnan(x).any()
        for x in asked.call.values()
    )
    if poisoned and not np.isfinite(out.astype(np.float64)[finite]).all():
        return "poison at hidden positions reaches the output"
    # Where rows that see keys are right and the others are a known wrong thing, that is the cause,
    # whatever other mistake would look the same here.
    cause = _of_empty_rows(asked, judged, textbook, out)
    if cause not in ("", _NOT_ZERO) and np.any(_allowed(asked.judge), -1).any():
        return cause
    ordinary = textbook.outputs["out"].astype(np.float64) - want
    for name, changed in _mistakes(asked):
        with np.errstate(all="ignore"):
            other = reference.attention(**changed).out
        if name == "dropout without its 1 / (1 - rate)":
            other = other * (1 - asked.judge["dropout"][0])
        if other.shape != out.shape:
            continue
        # What a row gives that the mistake leaves without a key is another question.
        live = _rows(changed)
        wrong, right, textbooks = other[live], want[live], (other + ordinary)[live]
        way = (asked.dtype, "out", textbook.logit)
        if not live.any() or share(right, wrong, textbooks, *way) <= 1:
            continue  # here the mistake makes no difference
        if share(out[live], wrong, textbooks, *way) <= 1:
            return name
    if cause:
        return cause
    spread = np.abs(want[finite]).max(initial=0.0)
    error = np.abs(out.astype(np.float64) - want)[finite].max(initial=0.0)
    if asked.dtype == "float64" and 2.0**-32 < error / (spread or 1) < 2.0**-16:
        return "float64 computed in float32 inside"
    if asked.dtype in ("float32", "float64") and 2.0**-15 < error / (spread or 1) < 2.0**-6:
        return (
            "rounding of a narrower type (TF32, float16 or bfloat16 inside), or noise of its size"
        )
    return ""


def _of_empty_rows(
    asked: Question, judged: reference.Judged, textbook: Textbook, out: Array
) -> str:
    """Rows that may see no key are the only ones that differ: what are they instead of 0?"""
    live: Array = np.any(_allowed(asked.judge), -1)
    if live.all() or not asked.size.k_len:
        return ""
    swap = asked.layout == "BTHD"
    got, want, ordinary = [
        (x.swapaxes(1, 2) if swap else x).astype(np.float64)
        for x in (out, judged.out, textbook.outputs["out"])
    ]
    if live.any():
        rest = share(got[live], want[live], ordinary[live], asked.dtype, "out", textbook.logit)
        if rest > 1:
            return ""
    rows = got[~live]
    if np.isnan(rows).all():
        return "rows that see no key are NaN instead of 0"
    value = asked.judge["value"].astype(np.float64)
    value = value.swapaxes(1, 2) if swap else value
    value = np.repeat(value, asked.size.heads // asked.size.kv_heads, 1)
    mean = np.broadcast_to(value.mean(2, keepdims=True), got.shape)[~live]
    # Of a single key the mean is what every row that sees it gives: another alignment, for one.
    if asked.size.k_len > 1 and np.allclose(rows, mean, rtol=1e-2, atol=1e-2):
        return "rows that see no key are the mean of the values instead of 0"
    return _NOT_ZERO


def _allowed(judge: Judge) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(reference.allowed(**_without(judge, "value", "sinks", "dropout")))


def _rows(judge: Judge) -> Array:
    """Rows that see a key, indexed as the output is before its last axis."""
    live: Array = np.any(_allowed(judge), -1)
    return live if judge["layout"] == "BHTD" else live.swapaxes(1, 2)


def _mistakes(asked: Question) -> Iterator[tuple[str, Judge]]:
    """Every known mistake that this question leaves room for, as a question to the judge."""
    judge, size, meaning = asked.judge, asked.size, asked.meaning
    scale = judge.get("scale", size.width**-0.5)
    yield "scale left out", {**judge, "scale": 1.0}
    yield "scale squared", {**judge, "scale": scale * scale}
    yield "1 / sqrt(D) in place of the scale asked for", {**judge, "scale": size.width**-0.5}
    yield "scale applied twice over by its root", {**judge, "scale": float(np.sqrt(abs(scale)))}
    yield from _alignments(asked)
    if "mask" in judge:
        yield "mask inverted (True = hidden)", {**judge, "mask": ~judge["mask"]}
        structure = judge["mask"] & _inside(asked)
        without = _without(judge, "kv_lengths", "q_lengths")
        yield "mask inverted (True = hidden)", {**without, "mask": ~structure}
        yield "mask ignored", _without(judge, "mask")
    elif "kv_lengths" in judge or "q_lengths" in judge:
        without = _without(judge, "kv_lengths", "q_lengths")
        yield "mask inverted (True = hidden)", {**without, "mask": ~_inside(asked)}
    for name in ("bias", "sinks", "kv_lengths", "q_lengths", "dropout"):
        if name in judge:
            yield f"{name} ignored", _without(judge, name)
    for name, most in (("kv_lengths", size.k_len), ("q_lengths", size.q_len)):
        if name in judge:
            more = np.minimum(np.asarray(judge[name]) + 1, most)
            yield f"{name} one too long", {**judge, name: more}
            less = np.maximum(np.asarray(judge[name]) - 1, 0)
            yield f"{name} one too short", {**judge, name: less}
    if "bias" in judge:
        yield "bias multiplied by the scale", {**judge, "bias": judge["bias"] * scale}
        yield "bias subtracted", {**judge, "bias": -judge["bias"]}
    if "score" in judge:
        yield "score ignored", _without(judge, "score", "operands")
        if "bias" in judge:
            yield "score (softcap) applied after the bias", _score_last(judge)
        yield "score sees the unscaled product", _score_unscaled(judge, scale)
    if "sinks" in judge:
        yield "sinks multiplied by the scale", {**judge, "sinks": judge["sinks"] * scale}
    if "dropout" in judge:
        rate, seed = judge["dropout"]
        yield "dropout without its 1 / (1 - rate)", judge
        yield "dropout keeps what it should drop", {**judge, "dropout": (1 - rate, seed)}
    if size.kv_heads not in (1, size.heads):
        yield "key heads repeated in the wrong order (h % Hk)", _tiled(asked)
    yield from _other_layout(asked)
    if "slopes" in meaning:
        yield "ALiBi with the sign of k - q", _signed_alibi(judge)


def _alignments(asked: Question) -> Iterator[tuple[str, Judge]]:
    """Causal and window masks as they come out under other conventions."""
    judge, size, meaning = asked.judge, asked.size, asked.meaning
    if not {"causal", "window"} & set(meaning):
        return
    stated = np.broadcast_to(np.asarray(judge.get("query_offset", 0)), (size.batch,))
    row, k = np.arange(size.q_len)[:, None], np.arange(size.k_len)
    left, right = meaning.get("window", (None, None))

    def mask(offset: Any, left: Any, right: Any, causal: bool) -> Judge:
        away = row + np.asarray(offset).reshape(-1, 1, 1, 1) - k
        allowed = away >= 0 if causal else np.ones(away.shape, bool)
        if left is not None:
            allowed = allowed & (away <= left)
        if right is not None:
            allowed = allowed & (-away <= right)
        return {**judge, "mask": np.broadcast_to(allowed, (size.batch, 1, size.q_len, size.k_len))}

    causal = "causal" in meaning
    end = size.k_len - size.q_len
    yield "aligned top-left (query 0 at key 0)", mask(0 * stated, left, right, causal)
    yield (
        "aligned bottom-right (last query at last key)",
        mask(0 * stated + end, left, right, causal),
    )
    yield "query offset with the wrong sign", mask(-stated, left, right, causal)
    if causal:
        yield "causal one position too far (k <= q + 1)", mask(stated + 1, left, right, causal)
        yield "causal without the position itself (k < q)", mask(stated - 1, left, right, causal)
    if "window" in meaning:
        for name, change in (("one too wide", 1), ("one too narrow", -1)):
            wide, long = [None if side is None else side + change for side in (left, right)]
            yield f"window {name}", mask(stated, wide, long, causal)
            yield f"window {name}", mask(stated, wide, right, causal)
        yield "window ignored", mask(stated, None, None, causal)
        yield "window mirrored", mask(stated, right, left, causal)
        if causal:
            yield "causal ignored", mask(stated, left, right, False)


def _inside(asked: Question) -> Array:
    judge, size = asked.judge, asked.size
    keys = np.reshape(judge.get("kv_lengths", size.k_len), (-1, 1, 1, 1))
    rows = np.reshape(judge.get("q_lengths", size.q_len), (-1, 1, 1, 1))
    return (np.arange(size.k_len) < keys) & (np.arange(size.q_len)[:, None] < rows)


def _without(judge: Judge, *names: str) -> Judge:
    return {name: x for name, x in judge.items() if name not in names}


def _score_last(judge: Judge) -> Judge:
    score, bias = judge["score"], judge["bias"].astype(np.float64)

    def after(s: Array, *rest: Any) -> Array:
        changed: Array = score(s + bias, *rest)
        return changed

    return {**_without(judge, "bias"), "score": after}


def _score_unscaled(judge: Judge, scale: float) -> Judge:
    score: Callable[..., Any] = judge["score"]
    return {**judge, "score": lambda s, *rest: score(s / scale, *rest) * scale}


def _signed_alibi(judge: Judge) -> Judge:
    return {**judge, "score": lambda s, b, h, q, k, m: s + m[h] * (k - q)}


def _tiled(asked: Question) -> Judge:
    judge, times = asked.judge, asked.size.heads // asked.size.kv_heads
    axis = 1 if asked.layout == "BHTD" else 2
    reps = [times if i == axis else 1 for i in range(4)]
    return {**judge, "key": np.tile(judge["key"], reps), "value": np.tile(judge["value"], reps)}


def _other_layout(asked: Question) -> Iterator[tuple[str, Judge]]:
    """The same arrays read in the other layout, where they are legal in it."""
    judge, size = asked.judge, asked.size
    if size.q_len % (size.k_len or 1) == 0 and size.heads == size.kv_heads and size.k_len:
        other = "BTHD" if asked.layout == "BHTD" else "BHTD"
        plain = _without(judge, "mask", "bias", "score", "operands", "sinks", "dropout")
        plain = _without(plain, "kv_lengths", "q_lengths", "query_offset")
        yield f"{asked.layout} read as {other}", {**plain, "layout": other}


def _wanted(name: str, judged: reference.Judged, pulled: dict[str, Any]) -> Array | None:
    if name in ("lse", "weights"):
        found: Array = getattr(judged, name)
        return found
    return pulled.get(name.removeprefix("d_"))


def _of_part(name: str, asked: Question, judged: reference.Judged, want: Array, got: Array) -> str:
    """What is wrong with an lse, weights or gradient while the output is right."""
    found = got.astype(np.float64)

    def same(other: Any) -> bool:
        return bool(np.allclose(found, other, rtol=1e-3, atol=1e-3 * np.abs(want).max(initial=0)))

    finite = np.isfinite(want)
    with np.errstate(all="ignore"):
        if not np.isfinite(found[finite]).all():
            return f"{name} has NaN or Inf where it must be finite"
        if name == "lse":
            if same(np.where(finite, want * np.log2(np.e), want)):
                return "lse in base 2 instead of natural"
            if "sinks" in asked.judge:
                without = reference.attention(**_without(asked.judge, "sinks")).lse
                if same(without):
                    return "lse without the sinks"
            if np.array_equal(np.isfinite(found), finite):
                return ""
            return "lse of rows that see no key is not -inf (or their sink)"
        if name == "weights":
            if "dropout" in asked.judge:
                return "weights after dropout instead of before"
            if same(np.broadcast_to(want.mean(1, keepdims=True), want.shape)):
                return "weights averaged over heads"
            return ""
        scale = asked.judge.get("scale", asked.size.width**-0.5)
        if not found.any():
            return f"{name} is zero: no gradient arrives"
        if same(-want):
            return f"{name} has the wrong sign"
        if same(want / scale):
            return f"{name} lacks the factor of the scale"
        if same(want * scale):
            return f"{name} has the factor of the scale twice"
        if name in ("d_key", "d_value") and asked.size.heads != asked.size.kv_heads:
            group = asked.size.heads // asked.size.kv_heads
            if same(want / group):
                return f"{name} is averaged over its query heads instead of summed"
    return ""
