"""A question from sizes alone, for the command line: arrays of zeros, masks and scores as words.

    causal   window:255   prefix:16   (q >= k) & (q - k <= 255)
    softcap:50   alibi   s - 0.5 * float(abs(q - k))

A mask or a score is a name of the vocabulary with its numbers behind a colon, or text of the
language that looks nothing up. Several masks all apply; several scores follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attn_core import masks, registry, scores
from attn_core.config import nearest
from attn_core.explained import Report, explain
from attn_core.language.text import parse
from attn_core.language.tree import Tree
from attn_core.language.values import Dropout, Mask, Score
from attn_core.spec import DTYPES

NAMED: dict[str, Callable[..., Mask]] = {
    "causal": masks.causal,
    "window": masks.window,
    "prefix": masks.prefix,
    "dilated": masks.dilated,
    "global_tokens": masks.global_tokens,
    "chunks": masks.chunks,
}
SCORES: dict[str, Callable[..., Score]] = {"softcap": scores.softcap, "alibi": scores.alibi}


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
    """The report on arrays of zeros in the framework of `backend`; `shape` is "B,Hq,Tq,D".

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

    def zeros(*shape: int) -> Any:
        # One zero, seen everywhere; a framework may still write each of them down.
        return library.from_numpy(np.broadcast_to(_zero(dtype), shape))

    def rows(count: int, length: int, last: int) -> Any:
        middle = (count, length) if layout == "BHTD" else (length, count)
        return zeros(batch, *middle, last)

    return explain(
        rows(heads, queries, width),
        rows(key_heads, key_count, width),
        rows(key_heads, key_count, width if value_width is None else value_width),
        mask=_mask(mask),
        bias=None if bias is None else zeros(*_ints("bias", bias)),
        score=_score(score, heads),
        scale=scale,
        sinks=zeros(heads) if sinks else None,
        kv_lengths=_each("kv_lengths", kv_lengths),
        q_lengths=_each("q_lengths", q_lengths),
        query_offset=_offset(query_offset),
        dropout=Dropout(dropout, 0) if dropout else None,
        layout=layout,
        precision=precision,
        impl=impl,
        return_lse=return_lse,
        return_weights=return_weights,
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


def _mask(words: Sequence[str]) -> Mask | None:
    found = None
    for said in words:
        name, numbers = _named("mask", said, NAMED)
        if name:
            made = NAMED[name](*_ints("mask", numbers)) if numbers else NAMED[name]()
        else:
            tree = _text("mask", said)
            floats = any(step.kind == "float" for step in tree.steps)
            if floats or _kinds(tree) != ["bool"]:
                raise ValueError(
                    f"`mask` must be a condition on b, h, q and k, in ints. Got {said!r}."
                )
            made = Mask(tree)
        found = made if found is None else found & made
    return found


def _score(words: Sequence[str], heads: int) -> Score | None:
    found = None
    for said in words:
        name, numbers = _named("score", said, SCORES)
        if name == "alibi":
            # The paper's slopes for so many heads: the only ones that sizes alone decide.
            if numbers:
                raise ValueError(f"`score` alibi must come without numbers. Got {said!r}.")
            made = scores.alibi(heads=heads)
        elif name:
            made = SCORES[name](_float("score", numbers))
        else:
            tree = _text("score", said)
            if _kinds(tree) != ["float"]:
                raise ValueError(
                    f"`score` must be a float made of s, b, h, q and k. Got {said!r}, "
                    f"which is {', '.join(_kinds(tree))}."
                )
            made = Score(tree)
        found = made if found is None else found.then(made)
    return found


def _float(name: str, words: str) -> float:
    try:
        return float(words)
    except ValueError:
        raise ValueError(f"`{name}` must have a number behind its colon. Got {words!r}.") from None


def _named(what: str, said: str, vocabulary: Mapping[str, object]) -> tuple[str, str]:
    """The name and what stands behind its colon; no name where `said` is text of the language."""
    name, _, numbers = said.partition(":")
    if not name.isidentifier() or said == "s":
        return "", ""
    if name not in vocabulary:
        known = tuple(vocabulary)
        raise ValueError(
            f"`{what}` must be text of the language, or start with one of {', '.join(known)}. "
            f"Got {said!r}.{nearest(name, known)}"
        )
    return name, numbers


_EXAMPLES = {"mask": "(q >= k) & (q - k < 256)", "score": "s * 0.5"}


def _text(what: str, said: str) -> Tree:
    try:
        tree = parse(said, exact=False)
    except ValueError as error:
        raise ValueError(
            f"`{what}` must be an expression of the language, such as {_EXAMPLES[what]!r}. "
            f"Got {said!r}: {error.__cause__ or error}"
        ) from None
    if any(step.op == "lookup" for step in tree.steps):
        raise ValueError(f"`{what}` must look no array up: there is none here. Got {said!r}.")
    return tree


def _kinds(tree: Tree) -> list[str]:
    return [tree.steps[at].kind for at in tree.results]
