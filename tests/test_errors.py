"""Every misuse of `attention` gets one clear error, before any work."""

from __future__ import annotations

import functools
import math
import re
import time
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import attn_core
from attn_core import Dropout, masks, operand, registry, scores, words

B, HQ, HK, T, D = 2, 4, 2, 10**7, 8
"""So large that any work on the arrays themselves runs out of memory, or of time."""


def virtual(*shape, dtype: Any = "float32"):
    """An array of that shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class Tensor:
    """An array of another framework."""

    shape = (B, HK, T, D)
    dtype = "fake.float32"


class FakeTorch:
    NAME = "torch"

    @staticmethod
    def owns(x):
        return isinstance(x, Tensor)

    @staticmethod
    def tracing():
        return False


@pytest.fixture(autouse=True)
def other_framework(monkeypatch):
    monkeypatch.setitem(registry._loaded, "torch", FakeTorch)


def call(**changes):
    arguments = {
        "query": virtual(B, HQ, T, D),
        "key": virtual(B, HK, T, D),
        "value": virtual(B, HK, T, D + 1),
        **changes,
    }
    return attn_core.attention(**arguments)


def short(**changes):
    """One query against many keys, as in decoding."""
    return call(query=virtual(B, HQ, 1, D), **changes)


FULL = f"(B, Hq, Tq, Tk) = ({B}, {HQ}, {T}, {T})"
causal = masks.causal()
table = operand(np.zeros(T, np.int32))
wide_float = np.zeros(3, "float64")

CASES: dict[str, tuple[Any, type[Exception], list[str]]] = {
    # query, key and value
    "query list": (
        lambda: call(query=[[1.0]]),
        TypeError,
        ["`query` must be an array", "Got builtins.list"],
    ),
    "query none": (
        lambda: call(query=None),
        TypeError,
        ["`query` must be an array of NumPy, torch"],
    ),
    "query scalar": (
        lambda: call(query=np.float32(1)),
        TypeError,
        ["`query` must be", "numpy.float32"],
    ),
    "key list": (
        lambda: call(key=[1.0]),
        TypeError,
        ["`key` must be an array of numpy", "Got builtins.list"],
    ),
    "value none": (
        lambda: call(value=None),
        TypeError,
        ["`value` must be an array of numpy", "NoneType"],
    ),
    "mixed frameworks": (
        lambda: call(key=Tensor()),
        TypeError,
        ["`key` must be an array of numpy", "one of torch"],
    ),
    "mixed value": (
        lambda: call(value=Tensor()),
        TypeError,
        ["`value` must", "frameworks are not mixed"],
    ),
    "mixed bias": (lambda: call(bias=Tensor()), TypeError, ["`bias` must", "one of torch"]),
    "mixed sinks": (lambda: call(sinks=Tensor()), TypeError, ["`sinks` must", "one of torch"]),
    "mixed mask": (lambda: call(mask=Tensor()), TypeError, ["`mask` must", "one of torch"]),
    "mixed operand": (
        lambda: call(score=scores.alibi(_slopes_of(Tensor()))),
        TypeError,
        ["operand 0 of `score`", "one of torch"],
    ),
    "rank 3": (
        lambda: call(query=virtual(B, T, D)),
        ValueError,
        ["`query` must have rank 4, (B, H, T, D)", f"({B}, {T}, {D})"],
    ),
    "key rank 5": (
        lambda: call(key=virtual(1, B, HK, T, D)),
        ValueError,
        ["`key` must have rank 4"],
    ),
    "value rank 0": (
        lambda: call(value=np.zeros((), "float32")),
        ValueError,
        ["`value` must have rank 4", "()"],
    ),
    "rank 4 named by layout": (
        lambda: call(query=virtual(B, T, D), layout="BTHD"),
        ValueError,
        ["`query` must have rank 4, (B, T, H, D)"],
    ),
    "mixed dtypes": (
        lambda: call(key=virtual(B, HK, T, D, dtype="float64")),
        TypeError,
        ["must share one dtype", "float32, float64 and float32"],
    ),
    "mixed half": (
        lambda: call(value=virtual(B, HK, T, D, dtype=ml_dtypes.bfloat16)),
        TypeError,
        ["must share one dtype", "bfloat16"],
    ),
    "integer dtype": (
        lambda: call(query=virtual(B, HQ, T, D, dtype="int32")),
        TypeError,
        ["`query` must be one of float64, float32, bfloat16, float16. Got int32"],
    ),
    "boolean dtype": (
        lambda: call(query=virtual(B, HQ, T, D, dtype=bool)),
        TypeError,
        ["`query` must", "Got bool"],
    ),
    "complex dtype": (
        lambda: call(query=virtual(B, HQ, T, D, dtype="complex64")),
        TypeError,
        ["Got complex64"],
    ),
    "long double": (
        lambda: call(query=virtual(B, HQ, T, D, dtype=np.longdouble)),
        TypeError,
        ["`query` must be one of"],
    ),
    "float8": (
        lambda: call(query=virtual(B, HQ, T, D, dtype=ml_dtypes.float8_e4m3fn)),
        TypeError,
        ["`query` must be one of", "Got float8_e4m3fn"],
    ),
    "batch of key": (
        lambda: call(key=virtual(3, HK, T, D), value=virtual(3, HK, T, D)),
        ValueError,
        ["`key` must agree on B", "Got B = 2 and 3"],
    ),
    "batch of value": (
        lambda: call(value=virtual(3, HK, T, D)),
        ValueError,
        ["`value` must agree on B"],
    ),
    "Tk": (
        lambda: call(value=virtual(B, HK, 5, D)),
        ValueError,
        ["`value` must agree on Tk", f"Got Tk = {T} and 5"],
    ),
    "Hk": (
        lambda: call(value=virtual(B, HQ, T, D)),
        ValueError,
        ["`value` must agree on Hk", "Got Hk = 2 and 4"],
    ),
    "D": (
        lambda: call(key=virtual(B, HK, T, 9)),
        ValueError,
        ["`key` must agree on D", "Got D = 8 and 9"],
    ),
    "heads": (
        lambda: call(query=virtual(B, 5, T, D)),
        ValueError,
        ["Hq must be a multiple of Hk", "Got Hq = 5 and Hk = 2"],
    ),
    "fewer heads than keys have": (
        lambda: call(query=virtual(B, 1, T, D)),
        ValueError,
        ["Hq must be a multiple of Hk", "Got Hq = 1 and Hk = 2"],
    ),
    "layout mixed up": (
        lambda: call(
            query=virtual(B, 5, HQ, D), key=virtual(B, 7, HK, D), value=virtual(B, 7, HK, D)
        ),
        ValueError,
        ["Hq must be a multiple of Hk", "legal as layout='BTHD'", "(B, T, H, D)"],
    ),
    "layout mixed up the other way": (
        lambda: call(
            query=virtual(B, HQ, 5, D),
            key=virtual(B, HK, 7, D),
            value=virtual(B, HK, 7, D),
            layout="BTHD",
        ),
        ValueError,
        ["Hq must be a multiple of Hk", "legal as layout='BHTD'", "(B, H, T, D)"],
    ),
    "D zero": (
        lambda: call(query=virtual(B, HQ, T, 0), key=virtual(B, HK, T, 0)),
        ValueError,
        ["D, Hq and Hk must be at least 1", f"({B}, {HQ}, {T}, 0)"],
    ),
    "no heads": (
        lambda: call(query=virtual(B, 0, T, D), key=virtual(B, 0, T, D), value=virtual(B, 0, T, D)),
        ValueError,
        ["D, Hq and Hk must be at least 1"],
    ),
    "layout unknown": (
        lambda: call(layout="BSHD"),
        ValueError,
        ["`layout` must be one of BHTD, BTHD. Got 'BSHD'"],
    ),
    "layout lower case": (lambda: call(layout="bhtd"), ValueError, ["`layout` must be", "'bhtd'"]),
    "layout none": (lambda: call(layout=None), ValueError, ["`layout` must be", "None"]),
    "layout mixed up, grouped heads": (
        lambda: call(
            query=virtual(B, 6, HQ, D),
            key=virtual(B, 6, HK, D),
            value=virtual(B, 6, HK, D),
            mask=causal,
        ),
        ValueError,
        [f"Got Tq = {HQ} and Tk = {HK}; these shapes are legal as layout='BTHD', (B, T, H, D)."],
    ),
    # mask
    "mask a word": (
        lambda: call(mask="causal"),
        TypeError,
        ["must be a Mask or a boolean array. Got str 'causal': write attn_core.masks.causal(..)"],
    ),
    "mask of keys, as of a tokenizer": (
        lambda: call(mask=virtual(B, T, dtype=bool)),
        ValueError,
        [f"Got ({B}, {T}): write `[:, None, None, :]` after it if it says which keys count"],
    ),
    "mask float": (
        lambda: call(mask=virtual(T, T)),
        TypeError,
        ["`mask` must be boolean, True = attend. Got float32", "is `bias=`"],
    ),
    "mask int": (
        lambda: call(mask=virtual(T, T, dtype="int64")),
        TypeError,
        ["`mask` must be boolean", "Got int64", "`mask != 0`"],
    ),
    "mask uint8": (
        lambda: call(mask=virtual(T, T, dtype="uint8")),
        TypeError,
        ["`mask` must be boolean", "Got uint8"],
    ),
    "mask rank 3": (
        lambda: call(mask=virtual(B, T, T, dtype=bool)),
        ValueError,
        ["`mask` must have rank 2 (Tq, Tk) or 4", "`[:, None]`", "`[None]`", "Got rank 3"],
    ),
    "mask rank 1": (
        lambda: call(mask=virtual(T, dtype=bool)),
        ValueError,
        ["`mask` must have rank 2", "Got rank 1"],
    ),
    "mask rank 5": (
        lambda: call(mask=virtual(1, 1, 1, T, T, dtype=bool)),
        ValueError,
        ["Got rank 5"],
    ),
    "mask broadcast": (
        lambda: call(mask=virtual(B, 1, 5, T, dtype=bool)),
        ValueError,
        [f"`mask` must broadcast to {FULL}. Got ({B}, 1, 5, {T})"],
    ),
    "mask by key heads": (
        lambda: call(mask=virtual(1, HK, T, T, dtype=bool)),
        ValueError,
        ["`mask` must broadcast"],
    ),
    "dense too small": (
        lambda: call(mask=masks.dense(virtual(5, T, dtype=bool))),
        ValueError,
        ["operand 0 of `mask` must broadcast to", f"Got (5, {T})"],
    ),
    "dense inside": (
        lambda: call(mask=causal & masks.dense(virtual(1, 3, T, T, dtype=bool))),
        ValueError,
        ["operand 0 of `mask` must broadcast to"],
    ),
    "dense rank 3": (
        lambda: call(mask=masks.dense(virtual(B, T, T, dtype=bool))),
        ValueError,
        ["`array` must have rank 2 (Tq, Tk) or 4", "`array[:, None]`", "`array[None]`"],
    ),
    "mask list": (
        lambda: call(mask=[[True]]),
        TypeError,
        ["`mask` must be a Mask or a boolean array", "Got list"],
    ),
    "mask string": (lambda: call(mask="causal"), TypeError, ["`mask` must be a Mask", "Got str"]),
    "mask True": (lambda: call(mask=True), TypeError, ["`mask` must be a Mask", "Got bool"]),
    "mask function": (
        lambda: call(mask=lambda b, h, q, k: q >= k),
        TypeError,
        ["`mask` must be a Mask or a boolean array", "attn_core.mask(fn)"],
    ),
    "mask not called": (
        lambda: call(mask=masks.causal),
        TypeError,
        ["attn_core.mask(fn)", "call it"],
    ),
    "mask is a score": (
        lambda: call(mask=scores.softcap(5.0)),
        TypeError,
        ["`mask` must be a mask. Got a score", "`score=`"],
    ),
    "mask is dropout": (
        lambda: call(mask=Dropout(0.5, 1)),
        TypeError,
        ["`mask` must be", "Got Dropout"],
    ),
    "window of nothing": (
        lambda: call(mask=masks.window(None, None)),
        TypeError,
        ["`left` or `right` must be given"],
    ),
    "empty operand": (
        lambda: call(mask=masks.prefix(np.zeros(0, int))),
        ValueError,
        ["operand 0 of `mask` must hold at least one value. Got (0,)"],
    ),
    "ids beyond int32": (
        lambda: call(mask=masks.segments(np.array([0, 2**33]))),
        ValueError,
        ["operand 0 of `mask` must fit int32", "from 0 to 8589934592"],
    ),
    "ids below int32": (
        lambda: call(mask=masks.segments(np.array([-(2**31) - 1, 0]))),
        ValueError,
        ["operand 0 of `mask` must fit int32"],
    ),
    "ids uint32": (
        lambda: call(mask=masks.segments(np.array([0, 2**31], "uint32"))),
        ValueError,
        ["must fit int32", "2147483648"],
    ),
    "arithmetic beyond int32": (
        lambda: call(mask=attn_core.mask(lambda b, h, q, k: q * 1000 > k)),
        ValueError,
        ["`mask` must", "int32", "q * 1000"],
    ),
    "arithmetic on ids beyond int32": (
        lambda: call(mask=attn_core.mask(lambda b, h, q, k: table[q] - table[k] > 3)),
        ValueError,
        ["`mask` must", "int32", "int0[q] - int0[k]", "bounds="],
    ),
    "score arithmetic beyond int32": (
        lambda: call(score=attn_core.score(lambda s, b, h, q, k: s + (q * q))),
        ValueError,
        ["`score` must", "int32", "q * q"],
    ),
    # bias
    "bias int": (
        lambda: call(bias=virtual(T, T, dtype="int32")),
        TypeError,
        ["`bias` must be floating point. Got int32"],
    ),
    "bias bool": (
        lambda: call(bias=virtual(T, T, dtype=bool)),
        TypeError,
        ["`bias` must be floating point. Got bool", "is `mask=`"],
    ),
    "bias rank 3": (
        lambda: call(bias=virtual(B, T, T)),
        ValueError,
        ["`bias` must have rank 2 (Tq, Tk) or 4", "`[:, None]`", "`[None]`"],
    ),
    "bias broadcast": (
        lambda: call(bias=virtual(B, 1, T, 6)),
        ValueError,
        [f"`bias` must broadcast to {FULL}. Got ({B}, 1, {T}, 6)"],
    ),
    "bias empty axis": (
        lambda: call(bias=virtual(B, 0, T, T)),
        ValueError,
        ["`bias` must broadcast"],
    ),
    "bias list": (
        lambda: call(bias=[[0.0]]),
        TypeError,
        ["`bias` must be an array of numpy", "Got builtins.list"],
    ),
    "bias number": (
        lambda: call(bias=0.5),
        TypeError,
        ["`bias` must be an array of numpy", "Got builtins.float"],
    ),
    "bias is a mask": (
        lambda: call(bias=causal),
        TypeError,
        ["`bias` must be an array", "values.Mask"],
    ),
    "bias wider": (
        lambda: call(bias=virtual(T, T, dtype="float64")),
        TypeError,
        ["`bias` must not be wider than the accumulation dtype float32. Got float64"],
    ),
    "bias wider than half": (
        lambda: call(
            query=virtual(B, HQ, T, D, dtype="float16"),
            key=virtual(B, HK, T, D, dtype="float16"),
            value=virtual(B, HK, T, D, dtype="float16"),
            bias=virtual(T, T, dtype="float64"),
        ),
        TypeError,
        ["`bias` must not be wider than the accumulation dtype float32"],
    ),
    # score
    "score function": (
        lambda: call(score=lambda s, b, h, q, k: s),
        TypeError,
        ["`score` must be a Score", "attn_core.score(fn)"],
    ),
    "score is a mask": (
        lambda: call(score=causal),
        TypeError,
        ["`score` must be a score. Got a mask", "`mask=`"],
    ),
    "score float": (lambda: call(score=50.0), TypeError, ["`score` must be a Score", "Got float"]),
    "score operand wider": (
        lambda: call(score=scores.alibi(np.zeros(HQ, "float64"))),
        TypeError,
        ["operand 0 of `score` must not be wider than the accumulation dtype float32. Got float64"],
    ),
    "score operand float8": (
        lambda: call(score=scores.alibi(np.zeros(HQ, ml_dtypes.float8_e4m3fn))),
        TypeError,
        ["operand 0 of `score` must be one of"],
    ),
    # scale
    "scale nan": (
        lambda: call(scale=math.nan),
        ValueError,
        ["`scale` must be finite in float32, in which logits are. Got nan"],
    ),
    "scale infinite": (
        lambda: call(scale=-math.inf),
        ValueError,
        ["`scale` must be finite in float32", "Got -inf"],
    ),
    "scale array": (
        lambda: call(scale=np.ones(1)),
        TypeError,
        ["`scale` must be a host number", "Got ndarray"],
    ),
    "scale scalar array": (
        lambda: call(scale=np.array(1.0)),
        TypeError,
        ["`scale` must be a host number"],
    ),
    "scale bool": (
        lambda: call(scale=True),
        TypeError,
        ["`scale` must be a host number", "Got bool"],
    ),
    "scale string": (
        lambda: call(scale="1"),
        TypeError,
        ["`scale` must be a host number", "Got str"],
    ),
    "scale complex": (
        lambda: call(scale=1j),
        TypeError,
        ["`scale` must be a host number", "Got complex"],
    ),
    "scale too large": (lambda: call(scale=10**400), ValueError, ["`scale` must be finite"]),
    "scale too large for its numbers": (
        lambda: call(scale=1e39),
        ValueError,
        ["`scale` must be finite in float32, in which logits are. Got 1e+39."],
    ),
    # sinks
    "sinks shape": (
        lambda: call(sinks=np.zeros(HK, "float32")),
        ValueError,
        [f"`sinks` must have shape (Hq,) = ({HQ},)", f"Got ({HK},)"],
    ),
    "sinks rank": (
        lambda: call(sinks=np.zeros((1, HQ), "float32")),
        ValueError,
        ["`sinks` must have shape (Hq,)"],
    ),
    "sinks int": (
        lambda: call(sinks=np.zeros(HQ, int)),
        TypeError,
        ["`sinks` must be floating point. Got int64"],
    ),
    "sinks wider": (
        lambda: call(sinks=np.zeros(HQ)),
        TypeError,
        ["`sinks` must not be wider", "Got float64"],
    ),
    "sinks number": (
        lambda: call(sinks=0.0),
        TypeError,
        ["`sinks` must be an array of numpy", "Got builtins.float"],
    ),
    # lengths
    "kv_lengths negative": (
        lambda: call(kv_lengths=-1),
        ValueError,
        ["`kv_lengths` must not be negative. Got -1"],
    ),
    "kv_lengths one negative": (
        lambda: call(kv_lengths=[3, -2]),
        ValueError,
        ["`kv_lengths` must not be negative. Got -2"],
    ),
    "kv_lengths large": (
        lambda: call(kv_lengths=T + 1),
        ValueError,
        [f"`kv_lengths` must be at most Tk = {T}. Got {T + 1}"],
    ),
    "kv_lengths one large": (
        lambda: call(kv_lengths=np.array([0, 2**40])),
        ValueError,
        ["`kv_lengths` must be at most Tk"],
    ),
    "kv_lengths uint64": (
        lambda: call(kv_lengths=np.array([0, 2**64 - 1], "uint64")),
        ValueError,
        ["at most Tk"],
    ),
    "kv_lengths float": (
        lambda: call(kv_lengths=3.0),
        TypeError,
        ["`kv_lengths` must be integers. Got float"],
    ),
    "kv_lengths floats": (
        lambda: call(kv_lengths=np.ones(B)),
        TypeError,
        ["`kv_lengths` must be integers. Got float64"],
    ),
    "kv_lengths bool": (
        lambda: call(kv_lengths=True),
        TypeError,
        ["`kv_lengths` must be integers. Got bool"],
    ),
    "kv_lengths bools": (
        lambda: call(kv_lengths=virtual(B, dtype=bool)),
        TypeError,
        ["`kv_lengths` must be integers. Got bool"],
    ),
    "kv_lengths list of bools": (
        lambda: call(kv_lengths=[True, 1]),
        TypeError,
        ["`kv_lengths` must be integers. Got bool"],
    ),
    "kv_lengths numpy float": (
        lambda: call(kv_lengths=np.float32(3)),
        TypeError,
        ["must be integers. Got float32"],
    ),
    "kv_lengths shape": (
        lambda: call(kv_lengths=[1, 2, 3]),
        ValueError,
        [f"`kv_lengths` must be an int or have shape (B,) = ({B},). Got (3,)"],
    ),
    "kv_lengths rank": (
        lambda: call(kv_lengths=np.ones((B, 1), int)),
        ValueError,
        [f"`kv_lengths` must be an int or have shape (B,) = ({B},). Got ({B}, 1)"],
    ),
    "kv_lengths huge": (
        lambda: call(kv_lengths=virtual(10**12, dtype=int)),
        ValueError,
        ["`kv_lengths` must", "(1000000000000,)"],
    ),
    "kv_lengths string": (
        lambda: call(kv_lengths="3"),
        TypeError,
        ["`kv_lengths` must be an int or an integer array (B,). Got str"],
    ),
    "kv_lengths is a mask": (
        lambda: call(kv_lengths=causal),
        TypeError,
        ["`kv_lengths` must", "Got Mask"],
    ),
    "q_lengths negative": (
        lambda: call(q_lengths=-1),
        ValueError,
        ["`q_lengths` must not be negative. Got -1"],
    ),
    "q_lengths large": (
        lambda: short(q_lengths=2),
        ValueError,
        ["`q_lengths` must be at most Tq = 1. Got 2"],
    ),
    "q_lengths float": (
        lambda: call(q_lengths=[1.0, 2.0]),
        TypeError,
        ["`q_lengths` must be integers. Got float"],
    ),
    "q_lengths bool": (
        lambda: call(q_lengths=False),
        TypeError,
        ["`q_lengths` must be integers. Got bool"],
    ),
    "q_lengths shape": (
        lambda: call(q_lengths=np.ones(3, int)),
        ValueError,
        ["`q_lengths` must be an int or have shape (B,)"],
    ),
    # query_offset
    "offset needed": (
        lambda: short(mask=causal),
        ValueError,
        [
            "`query_offset` must be given",
            '"start"',
            '"end"',
            "the mask reads",
            f"Got Tq = 1 and Tk = {T}",
        ],
    ),
    "offset needed by a score": (
        lambda: short(mask=masks.prefix(3), score=scores.alibi(heads=HQ)),
        ValueError,
        ["`query_offset` must be given", '"start"', '"end"', "the score reads"],
    ),
    "offset word": (
        lambda: call(query_offset="End"),
        ValueError,
        ["`query_offset` must be", '"start"', '"end"', "Got 'End'"],
    ),
    "offset float": (
        lambda: call(query_offset=1.0),
        TypeError,
        ["`query_offset` must be integers. Got float"],
    ),
    "offset bool": (
        lambda: call(query_offset=True),
        TypeError,
        ["`query_offset` must be integers. Got bool"],
    ),
    "offset floats": (
        lambda: call(query_offset=np.zeros(B)),
        TypeError,
        ["`query_offset` must be integers. Got float64"],
    ),
    "offset shape": (
        lambda: call(query_offset=[1, 2, 3]),
        ValueError,
        ["`query_offset` must be an int or have shape (B,)"],
    ),
    "offset far": (
        lambda: call(query_offset=2**28 + 1),
        ValueError,
        ["`query_offset` must lie within"],
    ),
    "offset far back": (
        lambda: call(query_offset=[0, -(2**40)]),
        ValueError,
        ["`query_offset` must lie within"],
    ),
    # dropout
    "dropout float": (
        lambda: call(dropout=0.1),
        TypeError,
        ["`dropout` must be attn_core.Dropout(rate, seed)", "Got float"],
    ),
    "dropout zero": (
        lambda: call(dropout=0.0),
        TypeError,
        ["`dropout` must be attn_core.Dropout(rate, seed)"],
    ),
    "dropout class": (
        lambda: call(dropout=Dropout),
        TypeError,
        ["`dropout` must be attn_core.Dropout(rate, seed)"],
    ),
    "dropout seed in another framework": (
        lambda: call(dropout=Dropout(0.5, _seed_of(Tensor()))),
        TypeError,
        ["`dropout.seed` must be", "one of torch"],
    ),
    "dropout no seed": (
        lambda: call(dropout=Dropout(0.1)),
        TypeError,
        ["`seed` must be given", "Dropout(rate, seed)"],
    ),
    "rate one": (
        lambda: call(dropout=Dropout(1.0, 3)),
        ValueError,
        ["`rate` must be at least 0 and below 1. Got 1.0"],
    ),
    "rate above": (
        lambda: call(dropout=Dropout(2, 3)),
        ValueError,
        ["`rate` must be at least 0 and below 1. Got 2"],
    ),
    "rate negative": (
        lambda: call(dropout=Dropout(-0.1, 3)),
        ValueError,
        ["`rate` must be at least 0 and below 1. Got -0.1"],
    ),
    "rate nan": (
        lambda: call(dropout=Dropout(math.nan, 3)),
        ValueError,
        ["`rate` must be at least 0 and below 1"],
    ),
    "rate bool": (
        lambda: call(dropout=Dropout(False, 3)),
        TypeError,
        ["`rate` must be a host float. Got bool"],
    ),
    "rate array": (
        lambda: call(dropout=Dropout(np.array(0.5), 3)),
        TypeError,
        ["`rate` must be a host float. Got ndarray"],
    ),
    "rate string": (
        lambda: call(dropout=Dropout("0.5", 3)),
        TypeError,
        ["`rate` must be a host float. Got str"],
    ),
    "seed float": (
        lambda: call(dropout=Dropout(0.5, 3.0)),
        TypeError,
        ["`seed` must be an int", "Got float"],
    ),
    "seed bool": (
        lambda: call(dropout=Dropout(0.5, True)),
        TypeError,
        ["`seed` must be an integer. Got a bool"],
    ),
    "seed float array": (
        lambda: call(dropout=Dropout(0.5, np.ones(2))),
        TypeError,
        ["`seed` must hold integers. Got dtype float64"],
    ),
    "seed shape": (
        lambda: call(dropout=Dropout(0.5, np.ones(3, "uint32"))),
        ValueError,
        ["`seed` must be a scalar or a pair", "(3,)"],
    ),
    "seed rank": (
        lambda: call(dropout=Dropout(0.5, np.ones((2, 1), "uint32"))),
        ValueError,
        ["`seed` must be a scalar or a pair"],
    ),
    "seed int64 pair": (
        lambda: call(dropout=Dropout(0.5, np.ones(2, "int64"))),
        TypeError,
        ["`seed` pair must be uint32"],
    ),
    "seed triple": (
        lambda: call(dropout=Dropout(0.5, (1, 2, 3))),
        TypeError,
        ["`seed` pair must be two integers"],
    ),
    "seed pair negative": (
        lambda: call(dropout=Dropout(0.5, (1, -2))),
        ValueError,
        ["`seed` pair must be uint32"],
    ),
    "seed pair wide": (
        lambda: call(dropout=Dropout(0.5, (1, 2**32))),
        ValueError,
        ["`seed` pair must be uint32"],
    ),
    "seed pair of floats": (
        lambda: call(dropout=Dropout(0.5, (1.0, 2.0))),
        TypeError,
        ["`seed` pair must be two integers"],
    ),
    # precision, impl
    "precision unknown": (
        lambda: call(precision="high"),
        ValueError,
        ['`precision` must be None, "highest" or "fast"', "'high'"],
    ),
    "precision number": (
        lambda: call(precision=32),
        ValueError,
        ["`precision` must be None", "Got 32"],
    ),
    "impl unknown": (
        lambda: call(impl="chunk"),
        ValueError,
        ["`impl` must be one of auto, ", "Got 'chunk'", "Did you mean 'chunked'?"],
    ),
    "impl unlike any": (
        lambda: call(impl="zzz"),
        ValueError,
        ["`impl` must be one of auto, ", "Got 'zzz'"],
    ),
    "impl none": (lambda: call(impl=None), ValueError, ["`impl` must be one of", "Got None"]),
    "impl absent": (
        lambda: call(impl="triton"),
        attn_core.UnsupportedError,
        ["impl='triton'", "backend 'numpy'", "  triton: ", "  reference: would answer"],
    ),
    "unknown argument": (lambda: call(is_causal=True), TypeError, ["is_causal"]),
}


class _Labelled(Tensor):
    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype


def _slopes_of(_):
    return _Labelled((HQ,), "fake.float32")


def _seed_of(_):
    return _Labelled((), "fake.int32")


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    make, error, words = CASES[name]
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(error) as caught:
            make()
        took, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert type(caught.value) is error, message
    missing = [word for word in words if word not in message]
    assert not missing, message
    # The form of a message: what must be, what was expected, what came.
    if name not in ("unknown argument", "impl absent"):
        assert "must" in message
        assert "Got" in message or "both" in message
    assert took < 1, took
    assert peak < 10_000_000, peak


# What is legal, so that the table above does not refuse too much --------------------------------

Q, K, V = (np.ones(shape, "float32") for shape in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)))
LEGAL: dict[str, dict[str, Any]] = {
    "no offset, nothing reads q": {"mask": masks.prefix(3)},
    "no offset, row and k": {"mask": masks.dense(np.ones((5, 7), bool))},
    "no offset, rows and segments": {"mask": masks.segments(np.zeros(5, int), np.zeros(7, int))},
    "no offset, dropout": {"dropout": Dropout(0.5, 3)},
    "no offset, bias": {"bias": np.zeros((5, 7), "float32")},
    "no offset, lengths": {"kv_lengths": 3, "q_lengths": [1, 2]},
    "start": {"mask": causal, "query_offset": "start"},
    "end": {"mask": causal, "query_offset": "end"},
    "int": {"mask": causal, "query_offset": 2},
    "negative": {"mask": causal, "query_offset": np.int8(-2)},
    "per batch": {"mask": causal, "query_offset": np.array([2, -1])},
    "scale int": {"scale": 1},
    "scale zero": {"scale": 0.0},
    "scale negative": {"scale": np.float32(-2)},
    "bias half": {"bias": np.zeros((1, 1, 1, 1), "float16")},
    "sinks bfloat16": {"sinks": np.zeros(4, ml_dtypes.bfloat16)},
    "sinks minus infinity": {"sinks": np.full(4, -np.inf, "float32")},
    "lengths zero": {"kv_lengths": 0, "q_lengths": 0},
    "lengths full": {"kv_lengths": np.array([7, 7]), "q_lengths": (5, 5)},
    "lengths scalar array": {"kv_lengths": np.array(3), "q_lengths": np.int64(2)},
    "float table in float32": {
        "score": scores.softcap(5.0).then(scores.relative_bias([[0.1] * 4] * 3, buckets="clipped")),
        "query_offset": 0,
    },
    "dropout nothing": {"dropout": Dropout(0.0, 3)},
    "dropout seeds": {"dropout": Dropout(np.float32(0.5), np.uint64(2**63))},
    "dropout negative seed": {"dropout": Dropout(0.5, -1)},
    "dropout pair": {"dropout": Dropout(0.5, np.array([1, 2], "uint32"))},
    "impl": {"impl": "reference"},
    "fast": {"precision": "fast"},
    "highest": {"precision": "highest"},
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal(name):
    out = attn_core.attention(Q, K, V, **LEGAL[name])
    assert out.shape == (2, 4, 5, 6)
    assert np.isfinite(out).all()


def test_equal_lengths_need_no_offset_whatever_the_padding():
    square = np.ones((2, 2, 5, 8), "float32")
    attn_core.attention(square, square, square, mask=causal, kv_lengths=[1, 3])


@pytest.mark.parametrize("axis", [0, 2])
def test_empty_batches_and_sequences_are_legal(axis):
    for empty in ("query", "key", "both"):
        q_shape, k_shape = [2, 4, 3, 8], [2, 2, 3, 8]
        if empty in ("query", "both") or axis == 0:
            q_shape[axis] = 0
        if empty in ("key", "both") or axis == 0:
            k_shape[axis] = 0
        q, k = np.ones(q_shape, "float32"), np.ones(k_shape, "float32")
        got = attn_core.attention(
            q, k, k, mask=causal, query_offset="start", return_lse=True, return_weights=True
        )
        assert got.out.shape == tuple(q_shape)
        assert (got.out == 0).all() or k_shape[2]
        assert got.weights.shape == (*q_shape[:3], k_shape[2])


def test_the_same_mistake_is_found_with_lists_for_operands():
    with pytest.raises(ValueError, match="int32"):
        operand([0, 2**31])


def test_what_came_is_not_changed():
    q, k, v = (x.copy() for x in (Q, K, V))
    for x in (q, k, v):
        x.flags.writeable = False
    attn_core.attention(q, k, v, mask=causal, query_offset="end", dropout=Dropout(0.5, 1))
    assert (q == Q).all()


# --- Words of other libraries. --------------------------------------------------------------------

FOREIGN = sorted(words._FOREIGN)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("function", [attn_core.attention, attn_core.explain])
def test_an_option_of_another_library_is_told_how_it_is_called_here(function, name) -> None:
    x = np.zeros((1, 1, 2, 4))
    with pytest.raises(TypeError, match=f"Got `{name}`, which is here: ") as caught:
        function(x, x, x, **{name: None})
    _, _, ours = str(caught.value).partition("which is here: ")
    # What it is told exists: options of the call, and names of the package.
    options = {*attn_core.attention.__kwdefaults__, "backend", "left"}
    assert set(re.findall(r"[`(](\w+)=", ours)) <= options
    for path in re.findall(r"attn_core\.([\w.]*\w)", ours):
        functools.reduce(getattr, path.split("."), attn_core)


def test_an_option_that_is_misspelt_is_told_the_nearest() -> None:
    x = np.zeros((1, 1, 2, 4))
    with pytest.raises(TypeError, match=r"its own only\. Got 'maks'\. Did you mean 'mask'\?"):
        attn_core.attention(x, x, x, maks=None)
    with pytest.raises(TypeError, match=r"call of attn_core\.weights .* Got 'dropout'"):
        attn_core.weights(x, x, dropout=Dropout(0.1, 0))
