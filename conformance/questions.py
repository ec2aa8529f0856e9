"""A case and its question: the same thing asked twice, once in the language and once apart from it.

`call` holds the arguments of `attn_core.attention`, with masks and scores in the language. `judge`
holds what the float64 judge is given instead: a dense boolean mask made entry by entry from a plain
Python rule, and a plain NumPy score. Nothing passes from one to the other.

A question starts as plain attention over signed, unsaturated arrays; each option is a change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from attn_core import reference
from attn_core.language.values import Dropout, Mask

Rule = Callable[[int, int, int, int, int], bool]


class Shape(NamedTuple):
    """Sizes of a case; names as in the spec."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 5
    k_len: int = 7
    width: int = 8
    v_width: int = 6


@dataclass
class Question:
    """What a case asks: arrays, the rest of the call, and the judge's own account of it.

    `meaning` says in words what mask and score amount to, where there is a word for it: causal,
    window, softcap, slopes. Subjects that are not ours are asked in these.
    """

    call: dict[str, Any]
    judge: dict[str, Any]
    cotangents: dict[str, np.ndarray]
    size: Shape
    dtype: str
    layout: str
    meaning: dict[str, Any] = field(default_factory=dict)


Change = Callable[[Question, np.random.Generator, Shape], None]


@dataclass(frozen=True)
class Case:
    """A named question. `changes` are applied in order to plain attention of that shape."""

    name: str
    changes: tuple[Change, ...] = ()
    shape: Shape = field(default_factory=Shape)
    dtype: str = "float32"
    layout: str = "BHTD"

    def fitted(self, grouped: bool, widths: bool, dtypes: tuple[str, ...]) -> Case | None:
        """The case for a subject without grouped heads, of one width for keys and values, or
        without float32.

        Sizes that are nobody's point are made equal, and float32 becomes the subject's first
        dtype; None where they are what the case is about.
        """
        dtype = self.dtype
        if dtype not in dtypes:
            if dtype != "float32" or not dtypes or "1e9" in self.name or "least" in self.name:
                return None
            dtype = dtypes[0]
        size, usual = self.shape, Shape()
        if not grouped and size.heads != size.kv_heads:
            if (size.heads, size.kv_heads) != (usual.heads, usual.kv_heads):
                return None
            size = size._replace(kv_heads=size.heads)
        if not widths and size.width != size.v_width:
            if (size.width, size.v_width) != (usual.width, usual.v_width):
                return None
            size = size._replace(v_width=size.width)
        return replace(self, shape=size, dtype=dtype)

    def question(self) -> Question:
        """The question, made anew; equal for equal seeds."""
        seed = np.random.SeedSequence([ord(c) for c in self.name])
        rng = np.random.default_rng(seed)
        size = self.shape
        dtype = numpy_dtype(self.dtype)

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        arrays = {
            "query": draw(size.batch, size.heads, size.q_len, size.width),
            "key": draw(size.batch, size.kv_heads, size.k_len, size.width),
            "value": draw(size.batch, size.kv_heads, size.k_len, size.v_width),
        }
        wide = "float64" if self.dtype == "float64" else "float32"
        rows = (size.batch, size.heads, size.q_len)
        cotangents = {
            "out": draw(*rows, size.v_width),
            "lse": draw(*rows).astype(wide),
            "weights": draw(*rows, size.k_len),
        }
        asked = Question(dict(arrays), dict(arrays), cotangents, size, self.dtype, self.layout)
        for change in self.changes:
            change(asked, rng, size)
        if self.layout == "BTHD":
            for name in arrays:
                asked.call[name] = asked.call[name].swapaxes(1, 2)
                asked.judge[name] = asked.judge[name].swapaxes(1, 2)
            asked.cotangents["out"] = asked.cotangents["out"].swapaxes(1, 2)
        asked.call |= {"layout": self.layout, "return_lse": True, "return_weights": True}
        asked.judge["layout"] = self.layout
        return asked


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of that name; bfloat16 is ml_dtypes'."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def offset(kind: Any, rows: list[int] | None = None) -> Change:
    """query_offset, and per batch the number it must come to (the judge is told the number)."""

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        x.call["query_offset"] = np.asarray(kind) if isinstance(kind, list) else kind
        if rows is not None:
            x.judge["query_offset"] = np.asarray(rows)
        elif kind in ("start", "end"):
            x.judge["query_offset"] = 0 if kind == "start" else size.k_len - size.q_len
        else:
            x.judge["query_offset"] = np.asarray(kind)

    return change


def masked(made: Callable[[np.random.Generator, Shape], tuple[Any, Rule]]) -> Change:
    """A mask, and the plain rule it must agree with at every (b, h, q, k, i)."""

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        given, rule = made(rng, size)
        x.call["mask"] = given
        offsets = np.broadcast_to(np.asarray(x.judge.get("query_offset", 0)), (size.batch,))
        dense = np.zeros((size.batch, size.heads, size.q_len, size.k_len), bool)
        for b, h, i, k in np.ndindex(*dense.shape):
            dense[b, h, i, k] = rule(b, h, i + int(offsets[b]), k, i)
        x.judge["mask"] = dense

    return change


def plain(given: Callable[[], Mask], rule: Rule, **meaning: Any) -> Change:
    """A mask without arrays, and the words for it."""
    drawn = masked(lambda rng, size: (given(), rule))

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        drawn(x, rng, size)
        x.meaning |= meaning

    return change


def scored(
    made: Callable[[np.random.Generator, Shape, np.dtype], tuple[Any, ...]], **meaning: Any
) -> Change:
    """A score, the NumPy function it must agree with, and the operands that function takes.

    `meaning` is the words for it; `slopes=0` says that operand 0 holds them.
    """

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        dtype = x.call["query"].dtype
        wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        given, function, *operands = made(rng, size, wide)
        x.call["score"] = given
        x.judge["score"], x.judge["operands"] = function, tuple(operands)
        x.meaning |= meaning
        if "slopes" in meaning:
            x.meaning["slopes"] = operands[meaning["slopes"]]

    return change


def biased(*axes: int, fill: Callable[[np.ndarray], np.ndarray] | None = None) -> Change:
    """A bias spanning these axes of (B, Hq, Tq, Tk), 1 along the others."""

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        full = (size.batch, size.heads, size.q_len, size.k_len)
        shape = tuple(n if i in axes else 1 for i, n in enumerate(full))
        bias = rng.standard_normal(shape).astype(x.call["query"].dtype)
        x.call["bias"] = x.judge["bias"] = bias if fill is None else fill(bias)

    return change


def given(**options: Any) -> Change:
    """Options that the judge takes by the same name and in the same form."""

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        x.call |= options
        x.judge |= options

    return change


def sunk(fill: list[float] | None = None) -> Change:
    """Sinks, one logit to a head."""

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        dtype = x.call["query"].dtype
        drawn = rng.standard_normal(size.heads) if fill is None else np.array(fill)
        x.call["sinks"] = x.judge["sinks"] = drawn.astype(dtype)

    return change


def dropped(rate: float, seed: int) -> Change:
    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        x.call["dropout"] = Dropout(rate, seed)
        x.judge["dropout"] = (rate, seed)

    return change


def poisoned(*what: str) -> Change:
    """NaN and Inf wherever the judge's mask says that nobody may look."""

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        sees = {name: given for name, given in x.judge.items() if name in _SEES}
        allowed = np.asarray(reference.allowed(**sees))
        batch, _, rows, keys = allowed.shape
        seen: Any = allowed.reshape(batch, size.kv_heads, -1, keys).any(2)
        live: Any = allowed.any(-1)
        bad = np.array([np.nan, np.inf, -np.inf])

        def spoil(array: np.ndarray, where: np.ndarray) -> np.ndarray:
            spoilt = array.copy()
            spoilt[where] = rng.choice(bad, spoilt[where].shape)
            return spoilt

        for name in ("key", "value"):
            if name in what:
                assert not seen.all(), "the case hides no key"
                x.call[name] = x.judge[name] = spoil(x.call[name], ~seen)
        if "query" in what:
            assert not live.all(), "the case has no empty row"
            x.call["query"] = x.judge["query"] = spoil(x.call["query"], ~live)
        if "upstream" in what:
            x.cotangents["out"] = spoil(x.cotangents["out"], ~live)
            x.cotangents["weights"] = spoil(x.cotangents["weights"], ~allowed)
            # With a sink an empty row's lse is that sink, and its cotangent is data.
            padded = np.arange(rows) >= np.reshape(x.judge.get("q_lengths") or rows, (-1, 1, 1))
            dead = ~live & (padded if "sinks" in x.call else True)
            x.cotangents["lse"] = spoil(x.cotangents["lse"], dead)
        if "bias" in what:
            x.call["bias"] = x.judge["bias"] = spoil(x.call["bias"], ~allowed)

    return change


_SEES = (
    *("query", "key", "mask", "bias", "score", "operands", "scale"),
    *("kv_lengths", "q_lengths", "query_offset"),
)


def strided(x: Question, rng: np.random.Generator, size: Shape) -> None:
    """Views with odd strides in place of contiguous arrays, of the same values."""
    for name in ("query", "key", "value"):
        array = x.call[name]
        wide = np.zeros((*array.shape[:3], array.shape[3] * 2 + 1), array.dtype)
        wide[..., 1::2] = array
        x.call[name] = wide[..., 1::2]
