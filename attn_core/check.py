"""Every argument error, once: below this file nothing validates and nothing reinterprets.

`resolve` turns the user's words into a Problem (static) and Operands (arrays), or raises. It
depends on static facts alone (types, shapes, dtypes, host numbers), so it runs the same in eager
code, under jax.jit, under torch.compile and in a tf.function with unknown dimensions. A dimension
that is not known yet (None) is never taken to differ from another, nor to equal it.

Messages say what must be, what was expected and what came.

    check             the story, shapes and dtypes
    check_arrays      masks, scores, bias and the arrays they look up
    check_positions   lengths, offsets, seeds, and the integer arithmetic they lead to
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from attn_core.check_arrays import (
    as_mask,
    as_score,
    broadcast,
    carried,
    describe,
    fits,
    float_array,
    same_framework,
    show,
    signature,
)
from attn_core.check_positions import dropout_of, lengths, offset_of, ranges, told
from attn_core.language.tree import Tree
from attn_core.language.values import Mask
from attn_core.registry import load
from attn_core.spec import DTYPES, LAYOUTS, PRECISIONS, Facts, Operands, Problem


def resolve(
    backend: Any,
    host: bool,
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any,
    bias: Any,
    score: Any,
    scale: Any,
    sinks: Any,
    kv_lengths: Any,
    q_lengths: Any,
    query_offset: Any,
    dropout: Any,
    layout: Any,
    precision: Any,
    return_lse: bool,
    return_weights: bool,
) -> tuple[Problem, Operands]:
    """The problem and operands that these arguments state. `host`: NumPy is to come back."""
    source = "numpy" if host else backend.NAME
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}. Got {layout!r}.")
    if precision not in PRECISIONS:
        raise ValueError(f'`precision` must be None, "highest" or "fast". Got {precision!r}.')
    tracing = False
    # Whose an array is its class says, and query's owner is known.
    if type(key) is not type(query):
        same_framework("key", key, source)
    if type(value) is not type(query):
        same_framework("value", value, source)
    if not host:
        query, key, value = backend.admit(query, key, value)
        tracing = backend.tracing()
        if tracing:
            mask, score = carried(backend, mask), carried(backend, score)
            kv_lengths, q_lengths = carried(backend, kv_lengths), carried(backend, q_lengths)
            query_offset = carried(backend, query_offset)
    if host:
        q, k = describe(backend, host, "query", query), describe(backend, host, "key", key)
        v = describe(backend, host, "value", value)
    else:
        q, k = backend.describe(query, "`query`"), backend.describe(key, "`key`")
        v = backend.describe(value, "`value`")
    static = (layout, precision, bool(return_lse), bool(return_weights))
    if (
        (mask is None or (type(mask) is Mask and not mask.arrays))
        and (scale is None or type(scale) is float)
        and bias is None
        and score is None
        and sinks is None
        and kv_lengths is None
        and q_lengths is None
        and query_offset is None
        and dropout is None
        and not tracing
    ):
        tree = None if mask is None else mask.tree
        return _known(backend.NAME, host, q, k, v, tree, scale, *static), Operands(
            query, key, value
        )
    problem, rest = _stated(
        backend,
        host,
        (q, k, v),
        *static,
        mask=mask,
        bias=bias,
        score=score,
        scale=scale,
        sinks=sinks,
        kv_lengths=kv_lengths,
        q_lengths=q_lengths,
        query_offset=query_offset,
        dropout=dropout,
    )
    return problem, Operands(query, key, value, bias, sinks, **rest)


@lru_cache(maxsize=512)
def _known(
    name: str,
    host: bool,
    query: Facts,
    key: Facts,
    value: Facts,
    mask: Tree | None,
    scale: float | None,
    *static: Any,
) -> Problem:
    """The problem of a call in which query, key and value are the only arrays.

    What arrays say of themselves is all that the checks look at; equal facts, equal problem.
    """
    options: dict[str, Any] = dict.fromkeys(
        ("bias", "score", "sinks", "kv_lengths", "q_lengths", "query_offset", "dropout")
    )
    given = None if mask is None else Mask(mask, ())
    facts = (query, key, value)
    return _stated(load(name), host, facts, *static, mask=given, scale=scale, **options)[0]


def _stated(
    backend: Any,
    host: bool,
    facts: tuple[Facts, Facts, Facts],
    layout: str,
    precision: str | None,
    return_lse: bool,
    return_weights: bool,
    *,
    mask: Any,
    bias: Any,
    score: Any,
    scale: Any,
    sinks: Any,
    kv_lengths: Any,
    q_lengths: Any,
    query_offset: Any,
    dropout: Any,
) -> tuple[Problem, dict[str, Any]]:
    """The problem, and the operands that are not as they were given."""
    source = "numpy" if host else backend.NAME
    dtype = _dtype(facts)
    batch, heads, kv_heads, q_len, k_len, width, v_width = _shapes(facts, layout)
    accumulation = "float64" if dtype == "float64" else "float32"
    sizes = (q_len, k_len)
    batch, q_len, k_len = [told(backend, size) for size in (batch, *sizes)]
    full = (batch, heads, q_len, k_len)

    mask = as_mask(backend, mask, source, full)
    score = as_score(score)
    mask_operands = signature(backend, host, "mask", mask, source, accumulation, full)
    score_operands = signature(backend, host, "score", score, source, accumulation, full)
    bias_facts = float_array(backend, host, "bias", bias, source, accumulation)
    spans = None
    if bias_facts is not None:
        bias_shape = broadcast("bias", bias_facts.shape, full)
        spans = tuple([told(backend, size) is None or size != 1 for size in bias_shape])
    sinks_facts = float_array(backend, host, "sinks", sinks, source, accumulation)
    if sinks_facts is not None and not fits(sinks_facts.shape, (heads,)):
        raise ValueError(
            f"`sinks` must have shape (Hq,) = ({heads},), one logit for each query head. "
            f"Got {show(sinks_facts.shape)}."
        )
    kv_lengths = lengths(backend, "kv_lengths", kv_lengths, source, batch, "Tk", k_len)
    q_lengths = lengths(backend, "q_lengths", q_lengths, source, batch, "Tq", q_len)
    rate, seed = dropout_of(dropout, source)
    offset, query_offset, span = offset_of(
        backend,
        query_offset,
        source,
        batch,
        sizes,
        mask,
        score,
        rate,
        # As many heads, another number of rows: in the other layout it would be grouped heads.
        # Sizes that come of data are not asked: torch.compile would have to guard on them.
        lambda: "" if heads != kv_heads or None in (q_len, k_len) else _other(facts, layout),
    )
    ranges(mask, score, batch, heads, k_len, q_len, span)

    if scale is None:
        scale = 1.0 / math.sqrt(width)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, np.floating, np.integer)):
        raise TypeError(
            "`scale` must be a host number; a learnt scale multiplies query instead. "
            f"Got {type(scale).__name__}."
        )
    wide = "float64" if dtype == "float64" else "float32"
    if not abs(scale) < (2**1023 if wide == "float64" else 2**127):
        raise ValueError(f"`scale` must be finite in {wide}, in which logits are. Got {scale}.")

    problem = Problem(
        backend=backend.NAME,
        host=host,
        device=facts[0].device,
        dtype=dtype,
        layout=layout,
        batch=batch,
        q_len=q_len,
        k_len=k_len,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        v_width=v_width,
        scale=float(scale),
        mask=None if mask is None else mask.tree,
        mask_operands=mask_operands,
        score=None if score is None else score.tree,
        score_operands=score_operands,
        bias=spans,
        bias_dtype=None if bias_facts is None else bias_facts.dtype,
        sinks_dtype=None if sinks_facts is None else sinks_facts.dtype,
        kv_lengths=kv_lengths is not None,
        q_lengths=q_lengths is not None,
        offset=offset,
        rate=rate,
        precision=precision,
        return_lse=return_lse,
        return_weights=return_weights,
        needs_grad=any(f.needs_grad for f in (*facts, bias_facts, sinks_facts) if f is not None),
        place=facts[0].place,
    )
    return problem, {
        "kv_lengths": kv_lengths,
        "q_lengths": q_lengths,
        "query_offset": query_offset,
        "seed": seed,
        "mask": () if mask is None else mask.arrays,
        "score": () if score is None else score.arrays,
    }


def _dtype(facts: Sequence[Facts]) -> str:
    found = [f.dtype for f in facts]
    if found[0] not in DTYPES:
        raise TypeError(f"`query` must be one of {', '.join(DTYPES)}. Got {found[0]}.")
    if found[1] != found[0] or found[2] != found[0]:
        raise TypeError(
            f"query, key and value must share one dtype. Got {found[0]}, {found[1]} and {found[2]}."
        )
    return found[0]


def _shapes(facts: Sequence[Facts], layout: str) -> tuple[Any, ...]:
    q, k, v = [f.shape for f in facts]
    for name, shape in (("query", q), ("key", k), ("value", v)):
        if len(shape) != 4:
            raise ValueError(
                f"`{name}` must have rank 4, {_axes(layout)}. Got shape {show(shape)}."
            )
    heads_at, time_at = (1, 2) if layout == "BHTD" else (2, 1)
    batch = _agree("B", {"query": q[0], "key": k[0], "value": v[0]}, facts, layout)
    k_len = _agree("Tk", {"key": k[time_at], "value": v[time_at]}, facts, layout)
    kv_heads = _agree("Hk", {"key": k[heads_at], "value": v[heads_at]}, facts, layout)
    width = _agree("D", {"query": q[3], "key": k[3]}, facts, layout)
    heads, q_len, v_width = q[heads_at], q[time_at], v[3]
    for name, size in (("Hq", heads), ("Hk", kv_heads), ("D", width), ("Dv", v_width)):
        if size is None:
            raise ValueError(
                f"{name} must be known when the call is traced; only B, Tq and Tk may be unknown. "
                f"Got query {show(q)}, key {show(k)}, value {show(v)} in layout {layout!r}."
            )
    if width == 0 or heads == 0 or kv_heads == 0:
        raise ValueError(
            "D, Hq and Hk must be at least 1. "
            f"Got query {show(q)} and key {show(k)} in layout {layout!r}."
        )
    if heads % kv_heads != 0:
        raise ValueError(
            f"Hq must be a multiple of Hk: query head h reads key head h // (Hq / Hk). "
            f"Got Hq = {heads} and Hk = {kv_heads} in layout {layout!r}{_other(facts, layout)}."
        )
    return batch, heads, kv_heads, q_len, k_len, width, v_width


def _agree(axis: str, sizes: dict[str, Any], facts: Sequence[Facts], layout: str) -> Any:
    """The common size of an axis, from whoever knows it."""
    known = None
    for name, size in sizes.items():
        if size is None:
            continue
        if known is None:
            known = size
        elif size != known:
            q, k, v = (show(f.shape) for f in facts)
            raise ValueError(
                f"`{name}` must agree on {axis}: query {_axes(layout)} = {q}, key = {k}, "
                f"value = {v}. Got {axis} = {known} and {size}{_other(facts, layout)}."
            )
    return known


def _axes(layout: str) -> str:
    return "(B, H, T, D)" if layout == "BHTD" else "(B, T, H, D)"


def _other(facts: Sequence[Facts], layout: str) -> str:
    """A hint where the same arrays would be legal in the other layout."""
    (qb, q1, q2, qd), (kb, k1, k2, kd), (vb, v1, v2, _) = [f.shape for f in facts]
    if None in (q1, q2, k1, k2):
        return ""
    q_heads, k_heads = (q2 or 0, k2) if layout == "BHTD" else (q1 or 0, k1)
    legal = qb == kb == vb and qd == kd and (k1, k2) == (v1, v2)
    if legal and k_heads and q_heads % k_heads == 0:
        name = "BTHD" if layout == "BHTD" else "BHTD"
        return f"; these shapes are legal as layout={name!r}, {_axes(name)}"
    return ""
