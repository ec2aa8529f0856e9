"""The suite is tested: planted faults must each turn it red, and be named where they have a name.

The correct subject below is written apart from everything it is judged by: einsum and a softmax
over an explicit additive mask of -inf, with the empty rows put right. Every fault is one change of
it, or of the gradients that the numpy backend gives.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from attn_core import attention, registry
from attn_core.conformance import cases, judgement, subject
from attn_core.conformance.subjects import Ours, Subject

NUMPY = registry.load("numpy")


def attend(
    fault: str,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    bias: Any = None,
    scale: Any = None,
    causal: bool = False,
    window: Any = None,
    query_offset: Any = None,
    softcap: Any = None,
    slopes: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    q_lengths: Any = None,
    layout: str = "BHTD",
) -> Any:
    """softmax(scale q k^T ...) v, with one fault or none."""
    dtype = query.dtype
    work = np.float64 if dtype == np.float64 and fault != "float32 inside" else np.float32
    swap = (layout == "BTHD") != (fault == "layout")
    q, k, v = [(x.swapaxes(1, 2) if swap else x).astype(work) for x in (query, key, value)]
    if fault == "tf32":
        q, k = [(x.view(np.uint32) & np.uint32(0xFFFFE000)).view(work) for x in (q, k)]
    group = q.shape[1] // k.shape[1]
    if fault == "heads":
        k, v = [np.tile(x, (1, group, 1, 1)) for x in (k, v)]
    else:
        k, v = [np.repeat(x, group, 1) for x in (k, v)]
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    i, j = np.arange(rows)[:, None], np.arange(keys)
    offset = np.reshape(query_offset, (-1, 1, 1, 1))
    offset = {"top-left": 0 * offset, "bottom-right": 0 * offset + keys - rows}.get(fault, offset)
    offset = -offset if fault == "offset sign" else offset
    away = i + offset - j
    allowed = np.ones((batch, heads, rows, keys), bool)
    if mask is not None and fault != "no mask":
        allowed &= ~mask if fault == "inverted" else mask
    if causal and fault != "no causal":
        allowed &= away >= {"causal far": -1, "causal strict": 1}.get(fault, 0)
    if window is not None and fault != "no window":
        left, right = window[::-1] if fault == "window mirrored" else window
        change = {"window wide": 1, "window narrow": -1}.get(fault, 0)
        allowed &= (away <= left + change) if left is not None else True
        allowed &= (-away <= right + change) if right is not None else True
    if kv_lengths is not None and fault != "no kv lengths":
        more = {"kv long": 1, "kv short": -1}.get(fault, 0)
        allowed &= j < np.reshape(kv_lengths, (-1, 1, 1, 1)) + more
    if q_lengths is not None and fault != "no q lengths":
        allowed &= i < np.reshape(q_lengths, (-1, 1, 1, 1))
    if bias is not None and fault != "no bias":
        allowed &= bias != -np.inf
    scale = {"scale out": 1.0, "scale squared": scale**2}.get(fault, scale)
    clean = fault not in ("poison", "large negative")
    seen = allowed.any(2)[..., None]
    s = scale * (q @ (np.where(seen, k, 0) if clean else k).swapaxes(-1, -2))
    cap = softcap is not None and fault != "no score"
    if cap and fault != "softcap late":
        s = softcap * np.tanh(s / softcap)
    if slopes is not None and fault != "no score":
        tilt = -away if fault == "alibi sign" else -np.abs(away)
        s = s + slopes[:, None, None].astype(work) * tilt
    if bias is not None and fault != "no bias":
        s = s + {"bias sign": -1, "bias scaled": scale}.get(fault, 1) * bias.astype(work)
    if cap and fault == "softcap late":
        s = softcap * np.tanh(s / softcap)
    allowed &= s != -np.inf
    s = np.where(allowed, s, -1e9 if fault == "large negative" else -np.inf)
    sink = np.full((batch, heads, rows), -np.inf)
    if sinks is not None and fault != "no sinks":
        sink += np.inf
        sink = np.broadcast_to(sinks[:, None].astype(work), sink.shape).copy()
        if fault == "sinks scaled":
            sink *= scale
        if q_lengths is not None:
            sink[
                np.broadcast_to(i[:, 0] >= np.reshape(q_lengths, (-1, 1, 1)), sink.shape)
            ] = -np.inf
    m = np.maximum(s.max(-1, initial=-np.inf), sink)
    m = m if fault == "nan rows" else np.where(m == -np.inf, 0, m)
    e = np.exp(s - m[..., None])
    total = e.sum(-1) + np.exp(sink - m)
    w = e / np.where(total == 0, 1, total)[..., None]
    live = allowed.any(-1)[..., None]
    out = w @ (np.where(seen, v, 0) if clean else v)
    if fault == "mean rows":
        out = np.where(live, out, v.mean(2, keepdims=True))
    elif fault not in ("nan rows", "large negative", "poison"):
        out = np.where(live, out, 0)
    lse = np.where(total == 0, -np.inf, m + np.log(np.where(total == 0, 1, total)))
    if fault == "lse base 2":
        lse = lse * np.log2(np.e)
    if fault == "lse no sinks":
        lse = np.log(e.sum(-1)) + m
    if fault == "weights averaged":
        w = np.broadcast_to(w.mean(1, keepdims=True), w.shape)
    if fault == "heads swapped":
        out = out[:, ::-1]
    if fault == "one nan":
        out[..., :1, :1] = np.nan
    out, wide = (out.swapaxes(1, 2) if swap else out).astype(dtype), lse.astype(work)
    if fault == "dtype":
        out = out.astype(np.float16)
    if fault == "shape":
        out = out[..., :-1]
    return out, wide, w.astype(dtype)


def planted(fault: str) -> Subject:
    """The subject above, with that fault in it."""
    return subject("numpy", name=fault or "correct")(partial(attend, fault))


def ask(planted: Subject, names: tuple[str, ...]) -> list[judgement.Verdict]:
    with np.errstate(all="ignore"):
        verdicts = [judgement.judge(name, planted, NUMPY, "eager") for name in names]
    return [v for v in verdicts if not v.missing]


def test_a_correct_subject_written_independently_stays_green() -> None:
    verdicts = ask(planted(""), cases.SMOKE)
    assert [(v.case, v.problem, v.shares) for v in verdicts if not v.passed] == []
    assert len(verdicts) > 0.75 * len(cases.SMOKE)


FAULTS = {
    "scale out": "scale left out",
    "scale squared": "scale squared",
    "inverted": "mask inverted (True = hidden)",
    "no mask": "mask ignored",
    "no causal": "mask ignored",
    "top-left": "aligned top-left (query 0 at key 0)",
    "bottom-right": "aligned bottom-right (last query at last key)",
    "offset sign": "query offset with the wrong sign",
    "causal far": "causal one position too far (k <= q + 1)",
    "causal strict": "causal without the position itself (k < q)",
    "window wide": "window one too wide",
    "window narrow": "window one too narrow",
    "window mirrored": "window mirrored",
    "no window": "window ignored",
    "kv long": "kv_lengths one too long",
    "kv short": "kv_lengths one too short",
    "no kv lengths": "kv_lengths ignored",
    "no q lengths": "q_lengths ignored",
    "softcap late": "score (softcap) applied after the bias",
    "no score": "score ignored",
    "alibi sign": "ALiBi with the sign of k - q",
    "no bias": "bias ignored",
    "bias sign": "bias subtracted",
    "bias scaled": "bias multiplied by the scale",
    "no sinks": "sinks ignored",
    "sinks scaled": "sinks multiplied by the scale",
    "heads": "key heads repeated in the wrong order (h % Hk)",
    "layout": "BHTD read as BTHD",
    "tf32": "rounding of a narrower type (TF32, float16 or bfloat16 inside), or noise of its size",
    "float32 inside": "float64 computed in float32 inside",
    "nan rows": "rows that see no key are NaN instead of 0",
    "mean rows": "rows that see no key are the mean of the values instead of 0",
    "large negative": "rows that see no key are the mean of the values instead of 0",
    "poison": "poison at hidden positions reaches the output",
    "lse base 2": "lse in base 2 instead of natural",
    "lse no sinks": "lse without the sinks",
    "weights averaged": "weights averaged over heads",
}
NAMELESS = ("heads swapped", "one nan", "dtype", "shape")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_the_smoke_tier_red_and_is_named(fault: str) -> None:
    red = [v for v in ask(planted(fault), cases.SMOKE) if not v.passed]
    assert red
    assert FAULTS[fault] in {v.cause for v in red}


@pytest.mark.parametrize("fault", NAMELESS)
def test_a_fault_without_a_name_turns_the_smoke_tier_red(fault: str) -> None:
    assert [v for v in ask(planted(fault), cases.SMOKE) if not v.passed]


GRADIENTS = {
    "zero": (lambda g, scale: 0 * g, "is zero: no gradient arrives"),
    "negated": (lambda g, scale: -g, "has the wrong sign"),
    "unscaled": (lambda g, scale: g / scale, "lacks the factor of the scale"),
    "scaled twice": (lambda g, scale: g * scale, "has the factor of the scale twice"),
    "averaged": (lambda g, scale: g / 2, "is averaged over its query heads instead of summed"),
    "poisoned": (lambda g, scale: np.where(g == g.max(), np.nan, g), "has NaN or Inf"),
}


@pytest.mark.parametrize("fault", GRADIENTS)
def test_a_wrong_gradient_is_seen_and_named(fault: str) -> None:
    wrong, words = GRADIENTS[fault]

    def vjp(arguments: Any, cotangents: Any, form: str, function: Any) -> Any:
        output, found = NUMPY.vjp(arguments, cotangents, form, function)
        return output, found | {"key": wrong(found["key"], 8**-0.5)}

    altered = type(
        "altered",
        (),
        {
            "vjp": staticmethod(vjp),
            "from_numpy": staticmethod(NUMPY.from_numpy),
            "to_numpy": staticmethod(NUMPY.to_numpy),
        },
    )
    verdict = judgement.judge("plain", Ours("numpy", "numpy", attention), altered, "eager")
    assert not verdict.passed
    assert words in verdict.cause
    assert "d_key" in verdict.where


def test_what_a_subject_does_not_offer_is_never_a_pass() -> None:
    @subject("numpy")
    def bare(query: Any, key: Any, value: Any) -> Any:
        return attend("", query, key, value, scale=query.shape[-1] ** -0.5, query_offset=0)[0]

    verdicts = [judgement.judge(name, bare, NUMPY, "eager") for name in cases.SMOKE]
    offered = {v.case for v in verdicts if v.status == "passed"}
    assert {"plain", "heads-mqa"} <= offered
    assert all(v.status in ("passed", "not offered") for v in verdicts)
    by_name = {v.case: v for v in verdicts}
    assert by_name["sinks"].missing == "sinks"
    assert by_name["mask-causal"].missing == "mask"
    assert not by_name["sinks"].passed


def test_a_subject_is_refused_with_the_nearest_word() -> None:
    def misspelt(query: Any, key: Any, value: Any, maks: Any = None) -> Any: ...

    with pytest.raises(TypeError, match="Did you mean 'mask'"):
        subject("numpy")(misspelt)
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        subject("torhc")
    with pytest.raises(TypeError, match="query, key and value"):
        subject("numpy")(lambda q, k, v: q)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda q: "text", "must be float32"),
        (lambda q: (_ for _ in ()).throw(RuntimeError("no kernel")), "RuntimeError: no kernel"),
        (lambda q: q.astype(np.float64), "must be float32. Got float64"),
        (lambda q: q[:1], "must have shape"),
        (lambda q: None, "must return out, or (out, lse, weights). Got no out."),
        (lambda q: (None, None, None), "must return out, or (out, lse, weights). Got no out."),
        (lambda q: q.__imul__(2), "must not write into its inputs. Got a new `query`."),
    ],
)
def test_whatever_a_subject_returns_is_reported(answer: Any, words: str) -> None:
    @subject("numpy")
    def odd(query: Any, key: Any, value: Any) -> Any:
        return answer(query)

    verdict = judgement.judge("plain", odd, NUMPY, "eager")
    assert verdict.status == "error"
    assert words in verdict.problem


def test_a_subject_without_float32_is_asked_in_its_own_dtype() -> None:
    @subject("numpy", dtypes=("float16",), backward=False)
    def half(query: Any, key: Any, value: Any, mask: Any = None, scale: float = 1.0) -> Any:
        with np.errstate(all="ignore"):
            q, k, v = (a.astype(np.float32) for a in (query, key, value))
            out, *_ = attend("", q, k, v, mask=mask, scale=scale, query_offset=0)
            return out.astype(np.float16)

    asked = [judgement.judge(name, half, NUMPY, "eager") for name in cases.SMOKE]
    offered = {v.case for v in asked if v.status == "passed"}
    assert {"plain", "mask-causal", "one-key"} <= offered
    assert [v.case for v in asked if v.status not in ("passed", "not offered")] == []

    @subject("numpy", dtypes=("float16",), backward=False)
    def ignoring(query: Any, key: Any, value: Any, mask: Any = None, scale: float = 1.0) -> Any:
        return half.function(query, key, value, None, scale)

    assert judgement.judge("mask-causal", ignoring, NUMPY, "eager").cause == "mask ignored"


def test_a_subject_that_answers_differently_each_time_is_told_so() -> None:
    rng = np.random.default_rng(0)

    @subject("numpy", backward=False)
    def noisy(query: Any, key: Any, value: Any) -> Any:
        return rng.standard_normal((*query.shape[:3], value.shape[3])).astype(query.dtype)

    verdict = judgement.judge("plain", noisy, NUMPY, "eager")
    assert verdict.cause == "two calls with the same arguments differ"


def test_only_a_case_that_crosses_a_tile_shows_a_fault_beyond_it() -> None:
    @subject("numpy")
    def long(query: Any, key: Any, value: Any, mask: Any = None, scale: float = 1.0) -> Any:
        out, *_ = attend("", query, key, value, mask=mask, scale=scale, query_offset=0)
        out[:, :, 63:] *= np.float32(1.01)
        return out

    red = {n for n in cases.SMOKE if judgement.judge(n, long, NUMPY, "eager").status == "failed"}
    assert "tiles-128-127" in red
    assert all(name.startswith("tiles-") for name in red)


def test_every_option_of_every_case_makes_a_difference() -> None:
    """What matches the judge therefore differs from the same call with the option left out."""
    options = ("mask", "bias", "score", "sinks", "kv_lengths", "q_lengths", "dropout", "scale")
    silent = []
    for case in cases.CASES:
        asked, judged, _, textbook = judgement.expected(case)
        for option in options:
            if option not in asked.call:
                continue
            off = {name: x for name, x in asked.call.items() if name != option}
            with np.errstate(all="ignore"):
                other = attention(**off)
            shares = [
                judgement.share(
                    getattr(other, what),
                    getattr(judged, what),
                    textbook.outputs[what],
                    case.dtype,
                    direction="out",
                    logit=textbook.logit,
                )
                for what in ("out", "lse")
            ]
            if max(shares) <= 1:
                silent.append((case.name, option))
    # The last query sees every key in any case, and sizes of 0 leave nothing to differ.
    known = {("one-query", "mask"), ("model-llama-decode", "mask")}
    assert {s for s in silent if not s[0].startswith("none-")} == known


def test_with_a_single_key_the_alignment_is_named_and_no_empty_row() -> None:
    """Row 0 at key 0 gives every row the one value, which is the mean of all values too."""

    @subject("numpy", backward=False)
    def shifted(query: Any, key: Any, value: Any, causal: bool = False, scale: float = 1.0) -> Any:
        out, *_ = attend("", query, key, value, causal=causal, scale=scale, query_offset=0)
        return out

    assert judgement.judge("one-key", shifted, NUMPY, "eager").cause == FAULTS["top-left"]
