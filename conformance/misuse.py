"""Calls that must be refused, each with the class and the whole text of its error.

A clear error is part of the meaning: what one framework refuses and another accepts is a model
that runs on one machine only. Each misuse changes a good call, framework-free like a case, and is
asked of our own backends in eager form; nothing may be computed. The texts are written out here,
apart from the code that makes them, with {framework} where a backend names itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_core import masks, scores


def _zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


@dataclass(frozen=True)
class Misuse:
    """A bad call: `change` makes the bad arguments, which must raise `error` with this text."""

    name: str
    error: type[Exception]
    text: str
    change: Callable[[], dict[str, Any]]

    def call(self) -> dict[str, Any]:
        """(B, Hq, Tq, D) = (2, 4, 5, 8), two key heads, seven keys, Dv = 6; and the change."""
        good = {"query": _zeros(2, 4, 5, 8), "key": _zeros(2, 2, 7, 8), "value": _zeros(2, 2, 7, 6)}
        return {**good, **self.change()}


_SHAPES = "query (B, H, T, D) = {}, key = {}, value = {}"
_QUERY, _KEY, _VALUE = "(2, 4, 5, 8)", "(2, 2, 7, 8)", "(2, 2, 7, 6)"
_FULL = "(B, Hq, Tq, Tk) = (2, 4, 5, 7)"
_GROUPS = "Hq must be a multiple of Hk: query head h reads key head h // (Hq / Hk). Got "
_OFFSET = (
    "`query_offset` must be given where Tq and Tk are not known to be equal and the {} reads the "
    'query position: "start" puts query 0 at position 0 (torch, jax.nn, Keras), "end" puts the '
    "last query at the last key (FlashAttention, KV caches), an int or int array (B,) says it "
    "outright. Got Tq = 5 and Tk = 7."
)
_AXES = "write `[:, None]` after it if its first axis is the batch, `[None]` if it is the heads."

MISUSES: tuple[Misuse, ...] = (
    Misuse(
        "refused-query-list",
        TypeError,
        "`query` must be an array of NumPy, torch, TensorFlow or JAX. Got builtins.list.",
        lambda: {"query": [[1.0]]},
    ),
    Misuse(
        "refused-query-none",
        TypeError,
        "`query` must be an array of NumPy, torch, TensorFlow or JAX. Got builtins.NoneType.",
        lambda: {"query": None},
    ),
    Misuse(
        "refused-query-rank",
        ValueError,
        "`query` must have rank 4, (B, H, T, D). Got shape (2, 5, 8).",
        lambda: {"query": _zeros(2, 5, 8)},
    ),
    Misuse(
        "refused-query-rank-bthd",
        ValueError,
        "`query` must have rank 4, (B, T, H, D). Got shape (2, 5, 8).",
        lambda: {"query": _zeros(2, 5, 8), "layout": "BTHD"},
    ),
    Misuse(
        "refused-query-integers",
        TypeError,
        "`query` must be one of float64, float32, bfloat16, float16. Got int32.",
        lambda: {"query": _zeros(2, 4, 5, 8, dtype="int32")},
    ),
    Misuse(
        "refused-key-list",
        TypeError,
        "`key` must be an array of {framework}, as query is. Got builtins.list.",
        lambda: {"key": [[1.0]]},
    ),
    Misuse(
        "refused-key-rank",
        ValueError,
        "`key` must have rank 4, (B, H, T, D). Got shape (1, 2, 2, 7, 8).",
        lambda: {"key": _zeros(1, 2, 2, 7, 8)},
    ),
    Misuse(
        "refused-key-batch",
        ValueError,
        f"`key` must agree on B: {_SHAPES.format(_QUERY, '(3, 2, 7, 8)', _VALUE)}. "
        "Got B = 2 and 3.",
        lambda: {"key": _zeros(3, 2, 7, 8)},
    ),
    Misuse(
        "refused-key-width",
        ValueError,
        f"`key` must agree on D: {_SHAPES.format(_QUERY, '(2, 2, 7, 9)', _VALUE)}. "
        "Got D = 8 and 9.",
        lambda: {"key": _zeros(2, 2, 7, 9)},
    ),
    Misuse(
        "refused-value-none",
        TypeError,
        "`value` must be an array of {framework}, as query is. Got builtins.NoneType.",
        lambda: {"value": None},
    ),
    Misuse(
        "refused-value-keys",
        ValueError,
        f"`value` must agree on Tk: {_SHAPES.format(_QUERY, _KEY, '(2, 2, 8, 6)')}. "
        "Got Tk = 7 and 8.",
        lambda: {"value": _zeros(2, 2, 8, 6)},
    ),
    Misuse(
        "refused-value-heads",
        ValueError,
        f"`value` must agree on Hk: {_SHAPES.format(_QUERY, _KEY, '(2, 4, 7, 6)')}. "
        "Got Hk = 2 and 4.",
        lambda: {"value": _zeros(2, 4, 7, 6)},
    ),
    Misuse(
        "refused-value-dtype",
        TypeError,
        "query, key and value must share one dtype. Got float32, float32 and float16.",
        lambda: {"value": _zeros(2, 2, 7, 6, dtype="float16")},
    ),
    Misuse(
        "refused-heads-group",
        ValueError,
        f"{_GROUPS}Hq = 5 and Hk = 2 in layout 'BHTD'.",
        lambda: {"query": _zeros(2, 5, 5, 8)},
    ),
    Misuse(
        "refused-heads-none",
        ValueError,
        "D, Hq and Hk must be at least 1. Got query (2, 0, 5, 8) and key (2, 2, 7, 8) in layout "
        "'BHTD'.",
        lambda: {"query": _zeros(2, 0, 5, 8)},
    ),
    Misuse(
        "refused-layout-mixed-up",
        ValueError,
        f"{_GROUPS}Hq = 5 and Hk = 7 in layout 'BHTD'; these shapes are legal as layout='BTHD', "
        "(B, T, H, D).",
        lambda: {
            "query": _zeros(2, 5, 4, 8),
            "key": _zeros(2, 7, 2, 8),
            "value": _zeros(2, 7, 2, 6),
        },
    ),
    Misuse(
        "refused-layout-unknown",
        ValueError,
        "`layout` must be one of BHTD, BTHD. Got 'BSHD'.",
        lambda: {"layout": "BSHD"},
    ),
    Misuse(
        "refused-mask-floats",
        TypeError,
        "`mask` must be boolean, True = attend. Got float32; a float mask that is added to the "
        "scores is `bias=`.",
        lambda: {"mask": _zeros(5, 7)},
    ),
    Misuse(
        "refused-mask-integers",
        TypeError,
        "`mask` must be boolean, True = attend. Got int32; compare it first, for instance "
        "`mask != 0`.",
        lambda: {"mask": _zeros(5, 7, dtype="int32")},
    ),
    Misuse(
        "refused-mask-rank",
        ValueError,
        f"`mask` must have rank 2 (Tq, Tk) or 4 (B, Hq, Tq, Tk). Got rank 3, (2, 5, 7): {_AXES}",
        lambda: {"mask": _zeros(2, 5, 7, dtype="bool")},
    ),
    Misuse(
        "refused-mask-shape",
        ValueError,
        f"`mask` must broadcast to {_FULL}. Got (2, 1, 7, 5).",
        lambda: {"mask": _zeros(2, 1, 7, 5, dtype="bool")},
    ),
    Misuse(
        "refused-mask-function",
        TypeError,
        "`mask` must be a Mask or a boolean array. Got a function: write attn_core.mask(fn), or "
        "call it if it makes a mask.",
        lambda: {"mask": masks.causal},
    ),
    Misuse(
        "refused-mask-word",
        TypeError,
        "`mask` must be a Mask or a boolean array. Got str 'causal': write "
        "attn_core.masks.causal(..).",
        lambda: {"mask": "causal"},
    ),
    Misuse(
        "refused-mask-score",
        TypeError,
        "`mask` must be a mask. Got a score: pass it as `score=`.",
        lambda: {"mask": scores.softcap(5.0)},
    ),
    Misuse(
        "refused-mask-dense-shape",
        ValueError,
        f"operand 0 of `mask` must broadcast to {_FULL}. Got (5, 6).",
        lambda: {"mask": masks.dense(_zeros(5, 6, dtype="bool"))},
    ),
    Misuse(
        "refused-score-function",
        TypeError,
        "`score` must be a Score; write attn_core.score(fn) for a function. Got function.",
        lambda: {"score": lambda s, b, h, q, k: s},
    ),
    Misuse(
        "refused-score-mask",
        TypeError,
        "`score` must be a score. Got a mask: pass it as `mask=`.",
        lambda: {"score": masks.causal()},
    ),
    Misuse(
        "refused-score-slopes",
        ValueError,
        "operand 0 of `score` is looked up at [h] on axis 0, which must have Hq = 4 entries, or "
        "1. Got shape (3,).",
        lambda: {"score": scores.alibi(_zeros(3)), "query_offset": "end"},
    ),
    Misuse(
        "refused-bias-integers",
        TypeError,
        "`bias` must be floating point. Got int32.",
        lambda: {"bias": _zeros(5, 7, dtype="int32")},
    ),
    Misuse(
        "refused-bias-booleans",
        TypeError,
        "`bias` must be floating point. Got bool; a boolean mask is `mask=`.",
        lambda: {"bias": _zeros(5, 7, dtype="bool")},
    ),
    Misuse(
        "refused-bias-rank",
        ValueError,
        f"`bias` must have rank 2 (Tq, Tk) or 4 (B, Hq, Tq, Tk). Got rank 3, (4, 5, 7): {_AXES}",
        lambda: {"bias": _zeros(4, 5, 7)},
    ),
    Misuse(
        "refused-bias-shape",
        ValueError,
        f"`bias` must broadcast to {_FULL}. Got (2, 1, 5, 6).",
        lambda: {"bias": _zeros(2, 1, 5, 6)},
    ),
    Misuse(
        "refused-bias-number",
        TypeError,
        "`bias` must be an array of {framework}, as query is. Got builtins.float.",
        lambda: {"bias": 0.5},
    ),
    Misuse(
        "refused-scale-nan",
        ValueError,
        "`scale` must be finite in float32, in which logits are. Got nan.",
        lambda: {"scale": math.nan},
    ),
    Misuse(
        "refused-scale-boolean",
        TypeError,
        "`scale` must be a host number; a learnt scale multiplies query instead. Got bool.",
        lambda: {"scale": True},
    ),
    Misuse(
        "refused-sinks-shape",
        ValueError,
        "`sinks` must have shape (Hq,) = (4,), one logit for each query head. Got (2,).",
        lambda: {"sinks": _zeros(2)},
    ),
    Misuse(
        "refused-sinks-integers",
        TypeError,
        "`sinks` must be floating point. Got int32.",
        lambda: {"sinks": _zeros(4, dtype="int32")},
    ),
    Misuse(
        "refused-kv-lengths-negative",
        ValueError,
        "`kv_lengths` must not be negative. Got -1.",
        lambda: {"kv_lengths": -1},
    ),
    Misuse(
        "refused-kv-lengths-long",
        ValueError,
        "`kv_lengths` must be at most Tk = 7. Got 8.",
        lambda: {"kv_lengths": [3, 8]},
    ),
    Misuse(
        "refused-kv-lengths-shape",
        ValueError,
        "`kv_lengths` must be an int or have shape (B,) = (2,). Got (3,).",
        lambda: {"kv_lengths": [1, 2, 3]},
    ),
    Misuse(
        "refused-q-lengths-long",
        ValueError,
        "`q_lengths` must be at most Tq = 5. Got 6.",
        lambda: {"q_lengths": 6},
    ),
    Misuse(
        "refused-q-lengths-booleans",
        TypeError,
        "`q_lengths` must be integers. Got bool.",
        lambda: {"q_lengths": [True, False]},
    ),
    Misuse(
        "refused-offset-omitted",
        ValueError,
        _OFFSET.format("mask"),
        lambda: {"mask": masks.causal()},
    ),
    Misuse(
        "refused-offset-omitted-score",
        ValueError,
        _OFFSET.format("score"),
        lambda: {"score": scores.alibi(heads=4)},
    ),
    Misuse(
        "refused-offset-word",
        ValueError,
        '`query_offset` must be an int, an int array (B,), "start" or "end". Got \'bottom-right\'.',
        lambda: {"query_offset": "bottom-right"},
    ),
    Misuse(
        "refused-offset-float",
        TypeError,
        "`query_offset` must be integers. Got float.",
        lambda: {"query_offset": 1.0},
    ),
    Misuse(
        "refused-offset-far",
        ValueError,
        "`query_offset` must lie within +-268435456. Got 268435457.",
        lambda: {"query_offset": 2**28 + 1},
    ),
    Misuse(
        "refused-dropout-float",
        TypeError,
        "`dropout` must be attn_core.Dropout(rate, seed): a rate alone names no mask, and nothing "
        "here draws from a global generator. Got float.",
        lambda: {"dropout": 0.1},
    ),
    Misuse(
        "refused-precision-unknown",
        ValueError,
        '`precision` must be None, "highest" or "fast". Got \'high\'.',
        lambda: {"precision": "high"},
    ),
    Misuse(
        "refused-impl-unknown",
        ValueError,
        "`impl` must be one of auto, reference, chunked, native, triton. Got 'flash'.",
        lambda: {"impl": "flash"},
    ),
)
"""Every misuse; names are unique, and none is a case's."""
