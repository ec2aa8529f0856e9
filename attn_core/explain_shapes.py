"""A question from sizes alone, for the command line: outlines of arrays, masks and scores as words.

    causal   window:255   causal & window(255)   (q >= k) & (q - k <= 255)
    softcap:50   alibi   s - 0.5 * float(abs(q - k))

What a mask or a score may say stands in `cli_words`; none looks anything up but numbers in a list.
Several masks all apply; several scores follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from attn_core import registry
from attn_core.cli_words import mask_of, score_of, scores_for
from attn_core.config import nearest
from attn_core.explained import Report, explain
from attn_core.language.values import Dropout
from attn_core.spec import DTYPES


def report(
    backend: str,
    shape: str,
    *,
    kv_heads: int | None = None,
    keys: int | None = None,
    value_width: int | None = None,
    dtype: str = "float32",
    mask: Sequence[str] = (),
    bias: str | None = None,
    score: Sequence[str] = (),
    scale: float | None = None,
    sinks: bool = False,
    kv_lengths: str | None = None,
    q_lengths: str | None = None,
    query_offset: str | None = None,
    dropout: float = 0.0,
    layout: str = "BHTD",
    precision: str | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    return_weights: bool = False,
) -> Report:
    """The report on arrays of the framework of `backend`, of which none is made; `shape` is
    "B,Hq,Tq,D".

    Sizes come in this order in every layout. Bias is a shape, sinks are there or not, dropout is a
    rate; lengths and offset are one int for all batches or one to each.

    Raises:
        TypeError, ValueError, ImportError: as `attn_core.explain`, or for words that say nothing.
    """
    sizes = _ints("shape", shape)
    if len(sizes) != 4 or min(sizes) < 0:
        raise ValueError(f"`shape` must be B,Hq,Tq,D. Got {shape!r}.")
    batch, heads, queries, width = sizes
    key_heads = heads if kv_heads is None else kv_heads
    key_count = queries if keys is None else keys
    library = registry.load(backend)
    if dtype not in DTYPES:
        raise ValueError(
            f"`dtype` must be one of {', '.join(DTYPES)}. Got {dtype!r}.{nearest(dtype, DTYPES)}"
        )

    def rows(count: int, length: int, last: int) -> tuple[int, ...]:
        middle = (count, length) if layout == "BHTD" else (length, count)
        return (batch, *middle, last)

    shapes = {
        "query": rows(heads, queries, width),
        "key": rows(key_heads, key_count, width),
        "value": rows(key_heads, key_count, width if value_width is None else value_width),
    }
    if bias is not None:
        shapes["bias"] = _ints("bias", bias)
    if sinks:
        shapes["sinks"] = (heads,)
    for name, given in shapes.items():
        if not all(0 <= size < 2**31 for size in given) or prod(given) >= 2**60:
            raise ValueError(
                f"`{name}` must have sizes from 0 to 2**31 - 1, as positions have, and fewer than "
                f"2**60 entries. Got {given}."
            )
    options: dict[str, Any] = {
        "mask": mask_of(mask),
        "score": score_of(score, scores_for(heads)),
        "scale": scale,
        "kv_lengths": _each("kv_lengths", kv_lengths),
        "q_lengths": _each("q_lengths", q_lengths),
        "query_offset": _offset(query_offset),
        "dropout": Dropout(dropout, 0) if dropout else None,
        "layout": layout,
        "precision": precision,
        "impl": impl,
        "return_lse": return_lse,
        "return_weights": return_weights,
    }

    def said(*arrays: Any) -> Report:
        return explain(**dict(zip(shapes, arrays, strict=True)), **options)

    try:
        found: Report = library.outline(said, list(shapes.values()), dtype)
    except MemoryError as error:  # of counting tiles, one by one where a mask has no better order
        raise ValueError(
            f"`shape` must be one whose tiles can be counted in this machine's memory. "
            f"Got {shape!r}: {error}."
        ) from error
    return found


def _ints(name: str, words: str, others: str = "") -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise ValueError(
            f"`{name}` must be {others}ints with commas between. Got {words!r}."
        ) from None


def _each(name: str, words: str | None, others: str = "") -> Any:
    """One int for all batches, or an array of one to each."""
    if words is None:
        return None
    found = _ints(name, words, others)
    return found[0] if len(found) == 1 else np.array(found)


def _offset(words: str | None) -> Any:
    return words if words in ("start", "end") else _each("query_offset", words, "start, end or ")
