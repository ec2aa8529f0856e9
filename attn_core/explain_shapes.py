"""A question from sizes alone, for the command line: arrays of zeros, and masks as words.

    causal   window:255   prefix:16   (q >= k) & (q - k <= 255)

A mask is a name of the vocabulary with its numbers behind a colon, or text of the language that
looks nothing up. Several of them all apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attn_core import masks, registry
from attn_core.config import nearest
from attn_core.explained import Report, explain
from attn_core.language.text import parse
from attn_core.language.values import Mask
from attn_core.spec import DTYPES

NAMED: dict[str, Callable[..., Mask]] = {
    "causal": masks.causal,
    "window": masks.window,
    "prefix": masks.prefix,
    "dilated": masks.dilated,
    "global_tokens": masks.global_tokens,
    "chunks": masks.chunks,
}


def report(
    backend: str,
    shape: str,
    *,
    kv_heads: int | None = None,
    keys: int | None = None,
    value_width: int | None = None,
    dtype: str = "float32",
    mask: Sequence[str] = (),
    kv_lengths: str | None = None,
    query_offset: str | None = None,
    layout: str = "BHTD",
    precision: str | None = None,
    impl: str = "auto",
) -> Report:
    """The report on arrays of zeros in the framework of `backend`; `shape` is "B,Hq,Tq,D".

    Sizes come in this order in every layout.

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

    def zeros(count: int, length: int, last: int) -> Any:
        middle = (count, length) if layout == "BHTD" else (length, count)
        # One zero, seen everywhere; a framework may still write each of them down.
        return library.from_numpy(np.broadcast_to(_zero(dtype), (batch, *middle, last)))

    query, key = zeros(heads, queries, width), zeros(key_heads, key_count, width)
    value = zeros(key_heads, key_count, width if value_width is None else value_width)
    return explain(
        query,
        key,
        value,
        mask=_mask(mask),
        kv_lengths=None if kv_lengths is None else list(_ints("kv_lengths", kv_lengths)),
        query_offset=_offset(query_offset),
        layout=layout,
        precision=precision,
        impl=impl,
    )


def _zero(dtype: str) -> Any:
    if dtype not in DTYPES:
        raise ValueError(
            f"`dtype` must be one of {', '.join(DTYPES)}. Got {dtype!r}.{nearest(dtype, DTYPES)}"
        )
    if dtype == "bfloat16":
        import ml_dtypes

        return np.zeros((), ml_dtypes.bfloat16)
    return np.zeros((), dtype)


def _ints(name: str, words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise ValueError(f"`{name}` must be ints with commas between. Got {words!r}.") from None


def _offset(words: str | None) -> Any:
    if words is None or words in ("start", "end"):
        return words
    return _ints("query_offset", words)[0]


def _mask(words: Sequence[str]) -> Mask | None:
    found = None
    for said in words:
        made = _one(said)
        found = made if found is None else found & made
    return found


def _one(said: str) -> Mask:
    name, _, numbers = said.partition(":")
    if name.isidentifier():
        if name not in NAMED:
            known = tuple(NAMED)
            raise ValueError(
                f"`mask` must be text of the language, or start with one of {', '.join(known)}. "
                f"Got {said!r}.{nearest(name, known)}"
            )
        return NAMED[name](*_ints("mask", numbers)) if numbers else NAMED[name]()
    tree = parse(said)
    if any(step.op == "lookup" for step in tree.steps):
        raise ValueError(f"`mask` must look no array up: there is none here. Got {said!r}.")
    floats = any(step.kind == "float" for step in tree.steps)
    if floats or [tree.steps[at].kind for at in tree.results] != ["bool"]:
        raise ValueError(f"`mask` must be a condition on b, h, q and k, in ints. Got {said!r}.")
    return Mask(tree)
