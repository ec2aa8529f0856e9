"""Calls of an attention layer that each framework's tests make, with what the judge says of them.

A case is framework-free: fields of the config, inputs and options as NumPy and host values. Masks
and scores of the language are made by `attn_core`, and told to the judge apart, as Python rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import layer_judge
import numpy as np

from attn_core import masks, scores
from attn_core.conformance import tolerance

B, TQ, TK = 2, 5, 7
SIZES = {"width": 12, "heads": 4}
STEP = 2.0**-12  # of central differences: step**4, and float64's rounding over it, are 2**-41


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        config: fields of the AttentionConfig.
        inputs: shapes of query, and of key and value where they are given.
        call: options of the call; NumPy arrays are to become the framework's.
        judge: options of the judge that differ from the call's.
        training: with dropout.
    """

    config: dict[str, Any]
    inputs: tuple[tuple[int, ...], ...] = ((B, TQ, 12),)
    call: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    training: bool = False


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def weights_of(plan: dict[str, Any], seed: int = 1) -> dict[str, np.ndarray]:
    """Every weight drawn, biases and scales too, so that none of them can be left out unseen."""
    made = {}
    for number, (name, (shape, kind)) in enumerate(plan.items()):
        x = np.random.default_rng([seed, number]).standard_normal(shape)
        wide = {"matrix": shape[0] ** -0.5, "scale": 0.3}.get(kind, 0.5)
        made[name] = (x * wide + (kind == "scale")).astype(np.float32)
    return made


DENSE = np.random.default_rng(5).random((B, 4, TQ, TQ)) < 0.6
DENSE[0, 1, 2] = False  # a row that sees nothing
BIAS = draw(B, 4, TQ, TQ, seed=6)
CROSS = ((B, TQ, 12), (B, TK, 12))
LENGTHS = np.array([5, 3], np.int32)

CASES: dict[str, Case] = {
    "self": Case(SIZES),
    "cross": Case(SIZES, CROSS),
    "cross of other widths": Case(
        {**SIZES, "key_input": 6, "value_input": 9, "value_width": 5, "out_width": 8},
        ((B, TQ, 12), (B, TK, 6), (B, TK, 9)),
    ),
    "value of the key": Case({**SIZES, "key_input": 6}, ((B, TQ, 12), (B, TK, 6))),
    "grouped heads": Case({**SIZES, "kv_heads": 2, "head_width": 6}),
    "one key head": Case({**SIZES, "kv_heads": 1}),
    "no biases": Case({**SIZES, "bias": False, "out_bias": False}),
    "bias of the output alone": Case({**SIZES, "bias": False}),
    "qk_norm": Case({**SIZES, "qk_norm": "rms", "norm_epsilon": 1e-2, "kv_heads": 2}),
    "gate": Case({**SIZES, "gate": True, "value_width": 5}),
    "causal": Case({**SIZES, "causal": True}),
    "window": Case({**SIZES, "causal": True, "window": 1}),
    "softcap": Case({**SIZES, "softcap": 0.5}),
    "scale": Case({**SIZES, "scale": 1.5}),
    "mask of the config": Case(
        {**SIZES, "mask": "(q - k <= 1) | (k < 1)"},
        judge={"sees": lambda b, h, q, k: q - k <= 1 or k < 1},
    ),
    "rotary": Case({**SIZES, "head_width": 6, "positions": "rotary", "causal": True}),
    "rotary interleaved": Case(
        {**SIZES, "head_width": 6, "positions": "rotary", "rotary_pairs": "interleaved"}
    ),
    "rotary in part": Case(
        {
            **SIZES,
            "head_width": 8,
            "positions": "rotary",
            "rotary_fraction": 0.5,
            "rotary_base": 100.0,
            "kv_heads": 2,
        }
    ),
    "rotary at positions": Case(
        {**SIZES, "head_width": 6, "positions": "rotary"},
        call={"positions": np.array([[0, 3, 4, 9, 70000], [2, 1, 0, 5, 6]], np.int32)},
    ),
    "rotary across": Case(
        {**SIZES, "head_width": 6, "positions": "rotary"},
        CROSS,
        call={"query_offset": np.array([2, -1], np.int32)},
        judge={"offset": [2, -1]},
    ),
    "rotary to the end": Case(
        {**SIZES, "head_width": 6, "positions": "rotary", "causal": True},
        CROSS,
        call={"query_offset": "end", "kv_lengths": np.array([7, 4], np.int32)},
        judge={"offset": [2, -1]},
    ),
    "alibi": Case({**SIZES, "heads": 3, "positions": "alibi", "causal": True}),
    "a mask array": Case(
        {**SIZES, "causal": True},
        call={"mask": DENSE},
        judge={"sees": lambda b, h, q, k: DENSE[b, h, q, k]},
    ),
    "a mask of the language": Case(
        {**SIZES, "window": 1},
        call={"mask": masks.chunks(3)},
        judge={"sees": lambda b, h, q, k: q // 3 == k // 3},
    ),
    "bias": Case(SIZES, call={"bias": BIAS}),
    "scores in order": Case(
        {**SIZES, "positions": "alibi", "softcap": 2.0},
        call={"score": scores.softcap(1.0)},
        judge={"score": lambda s, q, k: np.tanh(s)},
    ),
    "lengths": Case(SIZES, call={"kv_lengths": LENGTHS, "q_lengths": np.array([4, 5], np.int32)}),
    "an offset": Case(
        {**SIZES, "causal": True}, CROSS, call={"query_offset": 2}, judge={"offset": 2}
    ),
    "dropout": Case({**SIZES, "dropout": 0.3}, call={"seed": 2**32 + 11}, training=True),
    "dropout in evaluation": Case({**SIZES, "dropout": 0.3}, call={"seed": 11}),
    "everything": Case(
        {
            **SIZES,
            "kv_heads": 2,
            "head_width": 6,
            "value_width": 5,
            "qk_norm": "rms",
            "positions": "rotary",
            "gate": True,
            "causal": True,
            "window": 3,
            "softcap": 3.0,
            "dropout": 0.2,
            "mask": "k != 2",
        },
        call={"bias": BIAS, "kv_lengths": LENGTHS, "q_lengths": LENGTHS[::-1].copy(), "seed": 7},
        judge={"sees": lambda b, h, q, k: k != 2},
        training=True,
    ),
}


ALONG = {
    "positions": ("rotary_base", "rotary_fraction", "rotary_pairs", "max_length"),
    "qk_norm": ("norm_epsilon",),
    "window": ("window_blocks",),
    "token_types": ("types",),
}
"""What an option of a layer or a model alone reads."""


def without(case: Any, option: str) -> Any:
    """A case, of layers or of models, with an option left out, and what goes with it."""
    gone = (option, *ALONG.get(option, ()))
    config, call = [
        {name: x for name, x in held.items() if name not in gone}
        for held in (case.config, case.call)
    ]
    return replace(case, config=config, call=call)


def inputs_of(case: Case) -> list[np.ndarray]:
    return [draw(*shape, seed=number) for number, shape in enumerate(case.inputs)]


def judged(
    case: Case, weights: dict[str, Any], inputs: list[Any], dtype: Any = np.float64, site: int = 0
) -> layer_judge.Judged:
    """The judge's answer to a case, or the textbook's in float32."""
    options = {**case.call, **case.judge}
    for name in ("seed", "mask", "query_offset"):
        options.pop(name, None)
    if not callable(options.get("score")):
        options.pop("score", None)
    rate = case.config.get("dropout", 0.0) if case.training else 0.0
    if rate:
        shape = (inputs[0].shape[0], case.config["heads"])
        at = np.broadcast_to(np.arange(inputs[0].shape[1]), inputs[0].shape[:2])
        keys = inputs[-1].shape[1]
        options["keep"] = layer_judge.kept(rate, case.call["seed"], site, *shape, at, keys)
    return layer_judge.layer(case.config, weights, *inputs, dtype=dtype, **options)


def share(got: Any, case: Case, weights: Any, inputs: Any, what: str = "out") -> float:
    """The error of a float32 answer as a share of what is allowed; at most 1 passes."""
    want = judged(case, weights, inputs)
    plain = judged(case, weights, inputs, np.float32)
    args = (getattr(want, what), getattr(plain, what), "float32", "out", want.logit)
    return tolerance.share(np.asarray(got), *args)


def slope(
    case: Case, weights: dict[str, Any], inputs: list[Any], pull: np.ndarray, way: dict[Any, Any]
) -> float:
    """d/dt of sum(pull * out) where weights and inputs move by t * way.

    Central differences of two steps, combined so that what is left is of order step**4. `way` maps
    names of weights, and numbers of inputs, to arrays of float64.
    """

    def loss(t: float) -> float:
        moved = {n: w.astype(np.float64) + t * way.get(n, 0.0) for n, w in weights.items()}
        placed = [x.astype(np.float64) + t * way.get(n, 0.0) for n, x in enumerate(inputs)]
        return float((pull * judged(case, moved, placed).out).sum())

    def central(step: float) -> float:
        return (loss(step) - loss(-step)) / (2 * step)

    return (4 * central(STEP / 2) - central(STEP)) / 3
