"""The cases: named, seeded, framework-free questions, and the tiers they belong to.

Sizes are odd, Tq differs from Tk unless the case is about their being equal, and heads are grouped
by default. There is every option alone, every pair of options, every kind of poison, what floats
barely hold (`cases_edges.py`), the shapes of tiles and of real models (`cases_shapes.py`), and each
of the telling ones once more in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from attn_core import masks
from attn_core.config import nearest
from attn_core.conformance import vocabulary
from attn_core.conformance.cases_edges import EDGES
from attn_core.conformance.cases_shapes import CAUSAL, END, SOFTCAP, WINDOW, models, tiles
from attn_core.conformance.questions import (
    Case,
    Change,
    Question,
    Shape,
    biased,
    dropped,
    given,
    masked,
    offset,
    plain,
    poisoned,
    scored,
    strided,
    sunk,
)
from attn_core.language.values import mask

_ALIBI = scored(vocabulary.alibi, slopes=0)
_HOLES = plain(
    lambda: mask(lambda b, h, q, k: (q % 3 != 1) & (k < 5)),
    lambda b, h, q, k, i: q % 3 != 1 and k < 5,
)
_OWN = plain(lambda: masks.window(0, 0), lambda b, h, q, k, i: q == k, window=(0, 0))
_CORNER = plain(
    lambda: mask(lambda b, h, q, k: (q >= k) & (b + h < 1)),
    lambda b, h, q, k, i: q >= k and b + h < 1,
)
_SQUARE = Shape(q_len=7)


def _fill(value: float, *, at: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A bias with that value added everywhere, or put into one query row."""

    def fill(bias: np.ndarray) -> np.ndarray:
        bias = bias.copy()
        if at is None:
            bias[...] = (bias.astype(np.float64) + value).astype(bias.dtype)
        else:
            bias[:, :, at] = value
        return bias

    return fill


def _checkered(bias: np.ndarray) -> np.ndarray:
    bias = bias.copy()
    bias[..., 1::3] = -np.inf
    bias[:, :, 2] = -np.inf
    return bias


def _least(bias: np.ndarray) -> np.ndarray:
    bias = bias.copy()
    bias[:, :, 1] = np.finfo(np.float32).min
    return bias


def _cases() -> list[Case]:
    found = [
        Case("plain"),
        Case("plain-square", shape=_SQUARE),
        Case("scale", (given(scale=0.3),)),
        Case("scale-negative", (given(scale=-1.5),)),
        Case("scale-zero", (given(scale=0.0),)),
        Case("scale-negative-causal", (CAUSAL, given(scale=-1.5)), _SQUARE),
        Case("scale-zero-causal", (CAUSAL, given(scale=0.0)), _SQUARE),
        Case("logits-equal", (_equal,), _SQUARE),
        Case("logits-equal-causal", (_equal, CAUSAL), _SQUARE),
        Case("heads-mha", shape=Shape(kv_heads=4)),
        Case("heads-mqa", shape=Shape(kv_heads=1)),
        Case("heads-gqa-6-2", (END, CAUSAL), Shape(heads=6)),
        Case("width-1", shape=Shape(width=1, v_width=1)),
        Case("width-v-wide", shape=Shape(width=3, v_width=11)),
        Case("one-query", (END, CAUSAL), Shape(q_len=1)),
        Case("one-key", (END, CAUSAL), Shape(k_len=1)),
        Case("strided", (strided, END, CAUSAL)),
        Case("layout-bthd", (END, CAUSAL), layout="BTHD"),
        Case("layout-bthd-all", (END, CAUSAL, biased(1, 2, 3), sunk()), layout="BTHD"),
    ]
    wanted: list[tuple[str, tuple[Change, ...]]] = [
        ("causal", (END, CAUSAL)),
        (
            "window-2-1",
            (
                END,
                plain(
                    lambda: masks.window(2, 1),
                    lambda b, h, q, k, i: -1 <= q - k <= 2,
                    window=(2, 1),
                ),
            ),
        ),
        (
            "window-0",
            (
                END,
                plain(lambda: masks.window(0, 0), lambda b, h, q, k, i: q == k, window=(0, 0)),
            ),
        ),
        (
            "window-causal",
            (END, WINDOW),
        ),
        ("prefix", (plain(lambda: masks.prefix(3), lambda b, h, q, k, i: k < 3),)),
        ("prefix-each", (END, masked(vocabulary.prefix_each))),
        ("segments-flat", (END, masked(vocabulary.segments_flat))),
        ("segments", (END, masked(vocabulary.segments))),
        ("segments-apart", (masked(vocabulary.segments_apart),)),
        ("segments-prefix", (END, masked(vocabulary.packed_prefix))),
        ("lengths", (masked(vocabulary.padding),)),
        (
            "dilated",
            (END, plain(lambda: masks.dilated(3), lambda b, h, q, k, i: (q - k) % 3 == 0)),
        ),
        (
            "dilated-span",
            (
                END,
                plain(
                    lambda: masks.dilated(2, left=1, right=2),
                    lambda b, h, q, k, i: (q - k) % 2 == 0 and -4 <= q - k <= 2,
                ),
            ),
        ),
        (
            "global",
            (
                END,
                plain(
                    lambda: masks.causal() & (masks.global_tokens(2) | masks.window(1)),
                    lambda b, h, q, k, i: k <= q and (q < 2 or k < 2 or q - k <= 1),
                ),
            ),
        ),
        ("global-some", (END, masked(vocabulary.global_some))),
        ("chunks", (END, plain(lambda: masks.chunks(3), lambda b, h, q, k, i: q // 3 == k // 3))),
        ("dense-2", (masked(vocabulary.dense_2),)),
        ("dense-4", (END, masked(vocabulary.dense_4))),
        ("array", (masked(vocabulary.boolean_array),)),
        ("blocks", (END, masked(vocabulary.block_table))),
        ("graph", (offset("start"), masked(vocabulary.edges))),
        ("programmed", (END, masked(vocabulary.programmed))),
        ("floors", (offset(-6), masked(vocabulary.floors))),
        ("not-causal", (END, plain(lambda: ~masks.causal(), lambda b, h, q, k, i: k > q))),
        (
            "xor",
            (
                END,
                plain(
                    lambda: masks.causal() ^ masks.chunks(2),
                    lambda b, h, q, k, i: (k <= q) != (q // 2 == k // 2),
                ),
            ),
        ),
    ]
    found += [Case(f"mask-{name}", changes) for name, changes in wanted]
    found += [
        Case("offset-start", (offset("start"), CAUSAL)),
        Case("offset-int", (offset(1), CAUSAL)),
        Case("offset-negative", (offset(-2), CAUSAL)),
        Case("offset-each", (offset([3, -1]), CAUSAL)),
        Case("offset-omitted", (CAUSAL,), shape=_SQUARE),
        Case("offset-end-long-queries", (END, CAUSAL), shape=Shape(q_len=9)),
        Case(
            "offset-end-lengths",
            (offset("end", [7 - 5, 4 - 2]), CAUSAL, given(kv_lengths=[7, 4], q_lengths=[5, 2])),
        ),
        Case("kv-lengths", (given(kv_lengths=[7, 3]),)),
        Case("kv-lengths-zero", (given(kv_lengths=[0, 3]),)),
        Case("kv-lengths-one-for-all", (given(kv_lengths=4),)),
        Case("q-lengths", (given(q_lengths=[5, 3]),)),
        Case("q-lengths-zero", (given(q_lengths=[0, 2]),)),
        Case("lengths-and-mask", (END, CAUSAL, given(kv_lengths=[6, 3], q_lengths=[4, 1]))),
    ]
    makers: list[tuple[str, Any]] = [
        ("softcap-learnt", vocabulary.softcap_learnt),
        ("t5", vocabulary.t5(True)),
        ("t5-backward", vocabulary.t5(False)),
        ("clipped", vocabulary.clipped),
        ("alibi-softcap", vocabulary.alibi_softcap),
        ("free", vocabulary.free),
        ("hiding", vocabulary.hiding),
        ("ties", vocabulary.ties),
    ]
    found += [Case(f"score-{name}", (END, CAUSAL, scored(made))) for name, made in makers]
    found += [
        Case("score-softcap", (END, CAUSAL, SOFTCAP)),
        Case("score-alibi", (END, CAUSAL, _ALIBI)),
    ]
    found.append(Case("score-no-mask", (END, scored(vocabulary.free))))
    for axes in ((2, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3), (0, 3), (1, 2), (1,), ()):
        spans = "".join("bhqk"[i] for i in axes) or "scalar"
        found.append(Case(f"bias-{spans}", (biased(*axes),)))
    found += [
        Case("bias-rank-2", (_rank_2,)),
        Case("bias-hides", (biased(0, 1, 2, 3, fill=_checkered),)),
        Case("bias-huge", (biased(0, 1, 2, 3, fill=lambda x: x * x.dtype.type(1e4)),)),
        Case("bias-shifted-1e4", (biased(1, 2, 3, fill=_fill(1e4)),)),
        Case("bias-shifted--1e4", (biased(1, 2, 3, fill=_fill(-1e4)),)),
        Case("bias-row--1e9", (biased(0, 1, 2, 3, fill=_fill(-1e9, at=1)),)),
        Case("bias-row-least", (biased(0, 1, 2, 3, fill=_least),)),
        Case(
            "bias-mask-lengths",
            (offset("end", [7 - 5, 3 - 5]), CAUSAL, biased(1, 2, 3), given(kv_lengths=[7, 3])),
        ),
        Case("sinks", (sunk(),)),
        Case("sinks-mixed", (sunk([-np.inf, 0.5, -np.inf, 8.0]), _HOLES), shape=_SQUARE),
        # Far above every logit: whoever leaves them out of the maximum overflows.
        Case("sinks-huge", (sunk([150.0, -150.0, 90.0, 400.0]),)),
        Case("sinks-padded", (sunk(), given(kv_lengths=[0, 4], q_lengths=[3, 5]))),
        Case("empty-rows", (_HOLES,), shape=_SQUARE),
        Case("empty-all", (plain(lambda: masks.prefix(0), lambda b, h, q, k, i: False),)),
        Case("empty-all-sinks", (given(kv_lengths=[0, 0]), sunk())),
        Case("dropout", (dropped(0.3, 7),)),
        Case("dropout-one-key-bfloat16", (END, _OWN, dropped(0.3, 7)), dtype="bfloat16"),
        Case("dropout-seed-wide", (dropped(0.5, 2**63 + 2**40 + 5),)),
        Case("dropout-seed-negative", (dropped(0.9, -1),)),
        Case("dropout-offset-negative", (offset([-9, -2]), dropped(0.5, 3))),
        Case("dropout-causal", (offset([-3, 4]), CAUSAL, dropped(0.25, 2**32 - 1))),
        Case("poison-keys", (_HOLES, poisoned("key")), shape=_SQUARE),
        Case("poison-values", (_HOLES, poisoned("value")), shape=_SQUARE),
        Case("poison-queries", (_HOLES, poisoned("query")), shape=_SQUARE),
        Case("poison-upstream", (_HOLES, poisoned("upstream")), shape=_SQUARE),
        Case("poison-bias", (_HOLES, biased(0, 1, 2, 3), poisoned("bias")), shape=_SQUARE),
        Case("poison-lengths", (given(kv_lengths=[0, 4]), poisoned("key", "value", "query"))),
        Case("poison-q-lengths", (given(q_lengths=[0, 2]), sunk(), poisoned("query", "upstream"))),
        Case(
            "poison-bias-hides",
            (biased(0, 3, fill=_checkered_keys), poisoned("key", "value")),
        ),
        Case("poison-operand", (_HOLES, scored(vocabulary.spoilt_table)), shape=_SQUARE),
        Case(
            "poison-score-hides",
            (END, scored(vocabulary.hiding), poisoned("key", "value", "query")),
        ),
        Case("poison-all", (_HOLES, biased(0, 1, 2, 3), _everywhere), shape=_SQUARE),
        Case("none-batch", shape=Shape(batch=0)),
        Case("none-batch-mask", (END, _CORNER), Shape(batch=0, q_len=257, k_len=65)),
        Case("none-queries", (END, CAUSAL), shape=Shape(q_len=0)),
        Case("none-keys", (END, CAUSAL), shape=Shape(k_len=0)),
        Case("none-keys-sinks", (sunk(),), shape=Shape(k_len=0)),
        Case(
            "none-keys-bias", (biased(0, 1, 2, 3), scored(vocabulary.softcap)), shape=Shape(k_len=0)
        ),
    ]
    everything = (
        offset("end", [7 - 5, 6 - 3]),
        masked(vocabulary.packed_prefix),
        given(kv_lengths=[7, 6], q_lengths=[5, 3], scale=0.4),
        scored(vocabulary.alibi_softcap),
        biased(1, 2, 3),
        sunk(),
        dropped(0.2, 11),
    )
    found += [*EDGES, *tiles()]
    found.append(Case("everything", everything))
    found.append(Case("everything-bthd", everything, layout="BTHD"))
    by_name = {case.name: case for case in found}
    # Each of these once more in every other dtype.
    for name in (
        *(
            "plain",
            "heads-gqa-6-2",
            "mask-segments-prefix",
            "score-free",
            "bias-bhqk",
            "bias-hides",
        ),
        *("sinks-mixed", "lengths-and-mask", "dropout", "poison-all", "empty-rows", "everything"),
        *("bias-row--1e9", "bias-huge", "score-t5", "none-keys"),
    ):
        for dtype in ("float64", "bfloat16", "float16"):
            if dtype == "float16" and name == "bias-row--1e9":
                continue  # -1e9 is no float16; it would be the -inf of bias-hides
            found.append(replace(by_name[name], name=f"{name}-{dtype}", dtype=dtype))
    return found + _pairs() + models()


_PARTS: dict[str, tuple[str, tuple[Change, ...]]] = {
    "causal": ("mask", (offset([2, -1]), CAUSAL)),
    "segments": ("mask", (offset([1, 2]), masked(vocabulary.segments))),
    "softcap": ("score", (SOFTCAP,)),
    "alibi": ("score", (offset([2, -1]), _ALIBI)),
    "bias": ("bias", (biased(1, 2, 3),)),
    "bias_hides": ("bias", (biased(0, 1, 2, 3, fill=_checkered),)),
    "sinks": ("sinks", (sunk(),)),
    "kv_lengths": ("kv_lengths", (given(kv_lengths=[6, 3]),)),
    "q_lengths": ("q_lengths", (given(q_lengths=[3, 5]),)),
    "dropout": ("dropout", (dropped(0.3, 12345),)),
    "scale": ("scale", (given(scale=0.7),)),
    "mqa": ("heads", ()),
    "bthd": ("layout", ()),
}
"""Every option once, with the argument it sets: two that set the same one make no pair."""


def _pairs() -> list[Case]:
    """Every two options together."""
    found = []
    for (one, (argument, first)), (two, (other, second)) in combinations(_PARTS.items(), 2):
        if argument == other:
            continue
        changes = (*first, *second)
        if {argument, other} == {"mask", "score"} and two == "alibi":
            changes = (*first, _ALIBI)  # one offset for both
        found.append(
            Case(
                f"pair-{one}-{two}",
                changes,
                Shape(kv_heads=1 if "mqa" in (one, two) else 2),
                layout="BTHD" if "bthd" in (one, two) else "BHTD",
            )
        )
    return found


def _rank_2(x: Question, rng: np.random.Generator, size: Shape) -> None:
    bias = rng.standard_normal((size.q_len, size.k_len)).astype(x.call["query"].dtype)
    x.call["bias"] = x.judge["bias"] = bias


def _equal(x: Question, rng: np.random.Generator, size: Shape) -> None:
    """Logits of 2**20, all equal: of their log-sum-exp float32 forgets how many they are."""
    x.call["query"][...] = 0.0
    x.call["query"][..., 0] = x.call["key"][..., 0] = 2.0**10  # which float16 holds
    # Gradients of query add up the keys, which cancel in the first column alone: beside others of
    # their size what is left of them is rounding, as the tolerance has it.
    x.call["key"][..., 1:] *= 2.0**8
    given(scale=1.0)(x, rng, size)


def _checkered_keys(bias: np.ndarray) -> np.ndarray:
    bias = bias.copy()
    bias[..., 1::3] = -np.inf
    return bias


def _everywhere(x: Question, rng: np.random.Generator, size: Shape) -> None:
    poisoned("key", "value", "query", "bias", "upstream")(x, rng, size)


CASES: tuple[Case, ...] = tuple(_cases())
"""Every case; names are unique."""

SAMPLE: tuple[str, ...] = (
    *("plain", "heads-gqa-6-2", "layout-bthd", "mask-segments-prefix", "mask-programmed"),
    *("offset-each", "lengths-and-mask", "score-free", "score-t5", "bias-bhqk", "bias-hides"),
    *("sinks-mixed", "empty-rows", "dropout", "poison-all", "none-keys", "everything"),
    *("everything-bfloat16", "everything-float16", "plain-float64"),
    *("tiles-64-129", "tiles-130-poison", "tiles-300-packed"),
)
"""The named sample for forms that are slow to compile: inductor, XLA, unknown sizes."""

_TELLING = (
    *("plain-float64", "heads-gqa-6-2-bfloat16", "mask-dense-2"),
    *("pair-softcap-bias", "pair-alibi-sinks", "pair-causal-scale", "bias-bhqk"),
)
_PASSED_OVER = (
    *("pair-", "tiles-2", "tiles-3", "tiles-5", "tiles-6", "width-"),
    *("bias-b", "bias-s", "bias-rank", "mask-d", "mask-l", "mask-xor", "mask-not-causal"),
    *("mask-floors", "mask-segments-flat", "mask-segments-apart", "model-vit"),
    *("model-transformer-cross", "plain-square", "scale-zero", "score-t5-backward"),
    *("everything-bthd", "dropout-seed-wide", "offset-end-lengths", "kv-lengths-one"),
    *("score-alibi-softcap", "dropout-offset", "mask-prefix-each", "poison-score", "bias-hq"),
    *("layout-bthd-all", "score-clipped", "offset-end-long", "poison-operand", "mask-graph"),
)

SMOKE: tuple[str, ...] = tuple(
    case.name
    for case in CASES
    if case.name in _TELLING or (case.dtype == "float32" and not case.name.startswith(_PASSED_OVER))
)
"""The tier for every commit: each option and each decision once, under a minute to a backend."""

TIERS = ("smoke", "full", "exhaustive")


def tier(name: str) -> tuple[Case, ...]:
    """The cases of a tier: "smoke", "full" (CASES), or "exhaustive" (in every dtype).

    Raises:
        ValueError: unknown tier.
    """
    if name == "full":
        return CASES
    if name == "smoke":
        return tuple(case for case in CASES if case.name in SMOKE)
    if name != "exhaustive":
        raise ValueError(
            f"`tier` must be one of {', '.join(TIERS)}. Got {name!r}.{nearest(name, TIERS)}"
        )
    known = {case.name for case in CASES}
    more = [
        replace(case, name=f"{case.name}-{dtype}", dtype=dtype)
        for case in CASES
        if case.dtype == "float32" and "1e9" not in case.name and "least" not in case.name
        for dtype in ("float64", "bfloat16", "float16")
    ]
    return (*CASES, *[case for case in more if case.name not in known])
