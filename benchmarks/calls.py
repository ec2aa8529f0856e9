"""A subject as something that can be timed.

Every framework's `*_calls` module has `FUNCTIONS`, a table of subjects: what is given a case and
returns `attend(query, key, value)` in the framework's arrays, or refuses; and `prepared`, which
differentiates such a function in the framework's own way and hands back a Call. What is timed and
what is checked is then one and the same compiled or eager function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import attn_core
from attn_core import registry
from attn_core.benchmarks.cases import Case
from attn_core.benchmarks.check import expected_names

Attend = Callable[[Any, Any, Any], Any]
Made = Callable[[Case], Attend]


class Refused(Exception):
    """The subject is not for this case, or not here; the message is the reason."""


class Call(NamedTuple):
    """A subject, a case and a direction, ready to go.

    Attributes:
        run: makes the call once, on the case's own arrays, and returns its results when they are
            there.
        answer: makes the same call on these arrays ("query", "key", "value", "cotangent") and
            returns its results in NumPy, by the names of `expected_names`.
        planned: tells the bytes of temporaries by the framework's own account, where it keeps one.
        warm: makes a small call that stands for a first one, where the framework keeps what a call
            of full size frees, out of everybody's sight.
    """

    run: Callable[[], Any]
    answer: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    planned: Callable[[], int] | None = None
    warm: Callable[[], Any] | None = None


class Tiling(NamedTuple):
    """What a tile loop goes through for a case: tiles of rows x keys, so many of them live.

    Attributes:
        span: whether a row of tiles is one tile of all that it sees.
        heads: query heads, of all batches that go together, whose tiles are one product; None
            where the implementation does not say.
    """

    rows: int
    keys: int
    live: int
    span: bool
    heads: int | None


def tiling(case: Case, backend: str) -> Tiling:
    """The tiles of `chunked` in that framework, as `explain` tells them."""
    x = registry.load(backend).from_numpy(case.arrays()["query"])
    said = attn_core.explain(x, x, x, mask=case.language(), impl="chunked")
    if said.tiles is None:
        raise Refused(f"{backend} cuts no tiles here.")
    live = 1
    if said.blocks is not None:
        live = (said.blocks.full + said.blocks.partial) // (said.blocks.batches * said.blocks.heads)
    rows, keys = said.tiles
    heads = None if said.turn is None else math.prod(said.turn)
    if said.together > 1:
        live = -(-case.length // rows)  # a span to each row of tiles
    return Tiling(rows, keys * said.together, live, said.together > 1, heads)


def ours(backend: str, impl: str, case: Case, **options: Any) -> Attend:
    """attn_core.attention with that implementation, asked the case in its own words.

    Lengths are an array of the framework, as they are where they change from call to call.
    """
    library = registry.load(backend)
    known = ("auto", *library.IMPLEMENTATIONS)
    if impl not in known:
        raise Refused(f"{backend} has no implementation {impl!r}; it has {', '.join(known)}.")
    given: dict[str, Any] = {"mask": case.language(), "impl": impl, **options}
    if case.kv_lengths:
        given["kv_lengths"] = library.from_numpy(np.array(case.kv_lengths, np.int32))

    def attend(query: Any, key: Any, value: Any) -> Any:
        return attn_core.attention(query, key, value, **given)

    return attend


def results_bytes(case: Case, direction: str) -> int:
    """What a call's results take: they are no temporaries."""
    size = {"float32": 4, "bfloat16": 2}[case.dtype]
    return size * sum(math.prod(case.sizes(name)) for name in expected_names(direction))


def forward_only(name: str, direction: str) -> None:
    """Refuse every other direction."""
    if direction != "forward":
        raise Refused(f"{name} has no backward pass here.")


def in_words(name: str, case: Case, *words: str, lengths: bool = False) -> None:
    """Refuse masks other than these: they would have to be made dense, T x T."""
    if case.kv_lengths and not lengths:
        raise Refused(f"{name} has no word for lengths here.")
    if case.mask not in words:
        raise Refused(f"{name} has no word for {case.mask}; it would need a mask of T x T entries.")
