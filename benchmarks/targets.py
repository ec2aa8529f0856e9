"""The targets: what is promised of speed and memory, each worked out from a run.

A target is a number that must hold and one that is aimed at, for every case it speaks of: the worst
case decides. What has not been measured is not met.

    speed           time of the base / time of ours, medians of the same turns: above 1 we win
    share of work   the same against our own causal attention, over the ratio of live entries: 1 is
                    time in proportion to what is computed
    linear          time against live blocks: the largest distance from a straight line through the
                    points, as a share of that line; the line minimises the squares of these shares
    growth          temporaries at twice the length over those before: 2 is linear, 4 is quadratic
    overhead        time of ours less that of the bare operation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from attn_core.benchmarks.cases import DENSE, LENGTHS, WINDOWS, causal_floor
from attn_core.benchmarks.results import Results
from attn_core.benchmarks.timing import difference

MASKS = ("full", "causal")
SMALL = 2**20
"""Bytes below which growth of temporaries is the allocator's and not ours."""


class Row(NamedTuple):
    """One case of a target: its value, None where it was not measured, and that of neighbours.

    Attributes:
        low, high, middle: quartiles and median of the value from neighbouring samples; no median
            where the value is that.
    """

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    middle: float | None = None


Rows = Callable[[Results], list[Row]]


class Target(NamedTuple):
    """What is promised: `must` and `aim` are bounds from below where more is better.

    Attributes:
        floors: by the labels of rows, what the bare products of the tiles reach of the same.
        why: what stands in the way where it is missed.
    """

    name: str
    must: float
    aim: float
    unit: str
    more: bool
    rows: Rows
    floors: Callable[[Results], dict[str, float]] | None = None
    why: str = ""

    def holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.more else value <= bound


class Outcome(NamedTuple):
    """A target in the light of a run.

    Attributes:
        verdict: "aim met", "met", "missed", "incomplete" (not all was measured: no word yet about
            the whole, whatever becomes of its cases) or "not measured".
        worst: the value that decides, of those measured.
    """

    target: Target
    rows: list[Row]
    worst: float | None
    verdict: str

    @property
    def missing(self) -> int:
        """Cases that were not measured."""
        return sum(row.value is None for row in self.rows)

    @property
    def misses(self) -> int:
        """Cases that were measured and do not hold."""
        values = [row.value for row in self.rows if row.value is not None]
        return sum(not self.target.holds(value, self.target.must) for value in values)


def evaluate(target: Target, results: Results) -> Outcome:
    """Whether the target holds in this run."""
    rows = target.rows(results)
    values = [row.value for row in rows if row.value is not None]
    if not values:
        return Outcome(target, rows, None, "not measured")
    worst = min(values) if target.more else max(values)
    if len(values) < len(rows):
        verdict = "incomplete"
    elif not target.holds(worst, target.must):
        verdict = "missed"
    else:
        verdict = "aim met" if target.holds(worst, target.aim) else "met"
    return Outcome(target, rows, worst, verdict)


def straightness(x: Sequence[float], y: Sequence[float]) -> float:
    """The largest distance of the points from a straight line, as a share of the line.

    Among all lines this is the one whose squared shares, taken of the points, are the least.
    """
    heights = np.asarray(y, np.float64)
    terms = np.stack([np.ones_like(heights), np.asarray(x, np.float64)], 1)
    found = np.linalg.lstsq(terms / heights[:, None], np.ones_like(heights), rcond=None)[0]
    line = terms @ found
    return float(np.abs(heights / line - 1).max())


def _speed(direction: str, ours: Sequence[str], base: str, dtypes: Sequence[str]) -> Rows:
    """Every dense case of these dtypes."""

    def rows(results: Results) -> list[Row]:
        found = []
        for subject in ours:
            for dtype in dtypes:
                for mask in MASKS:
                    for length, width in DENSE:
                        if base == "jax-nn" and length > 2048:
                            continue
                        case = f"{mask}-T{length}-D{width}-{dtype}"
                        label = case if len(ours) == 1 else f"{subject} {case}"
                        found.append(_ratio(results, label, case, direction, subject, base))
        return found

    return rows


def _ratio(
    results: Results, label: str, case: str, direction: str, subject: str, base: str, per: float = 1
) -> Row:
    found = results.faster(case, direction, subject, base)
    if found is None:
        return Row(label, None)
    value, beside = found
    return Row(label, value / per, beside.low / per, beside.high / per, beside.middle / per)


def _both_ways(forward: Rows, backward: Rows) -> Rows:
    """The cases of two targets as one."""

    def rows(results: Results) -> list[Row]:
        return [
            row._replace(label=f"{row.label} {way}")
            for way, part in (("forward", forward), ("backward", backward))
            for row in part(results)
        ]

    return rows


def _work(name: str) -> Rows:
    """Each framework against its own causal attention; TensorFlow's backward is both."""

    def rows(results: Results) -> list[Row]:
        case = results.cases.get(name)
        found = []
        for framework in ("torch", "jax", "tf"):
            for direction in ("forward", "both" if framework == "tf" else "backward"):
                label, ours = f"{framework} {direction}", f"{framework}:auto"
                if case is None:
                    found.append(Row(label, None))
                    continue
                base = f"{ours}@causal"
                live = case.asked_of(base).entries / case.entries
                found.append(_ratio(results, label, name, direction, ours, base, live))
        return found

    return rows


def _floors(mask: str) -> Callable[[Results], dict[str, float]]:
    """The share of work that the bare products reach, over causal ones as bare."""
    names = {"forward": f"floor-{mask}-", "backward": f"floor-backward-{mask}-"}

    def shares(results: Results) -> dict[str, float]:
        found = dict[str, float]()
        for direction, name in names.items():
            name += "T8192-D64-float32"
            case = results.cases.get(name)
            for framework in ("torch", "jax", "tf") if case else ():
                floor, causal = f"{framework}-floor", causal_floor(framework)
                share = results.faster(name, direction, floor, causal)
                if case is not None and share is not None:
                    live = case.asked_of(causal).entries / case.entries
                    found[f"{framework} {direction}"] = share[0] / live
        return found

    return shares


def _beside_nn(results: Results) -> dict[str, float]:
    """How many times as fast as jax.nn the bare products of our tiles are, by dense case."""
    found = {}
    for name in results.cases:
        if name.startswith("floor-"):
            ratio = results.faster(name, "forward", "jax-floor", "jax-nn")
            if ratio is not None:
                found[name.removeprefix("floor-")] = ratio[0]
    return found


def sweep(results: Results, subject: str) -> list[tuple[int, float]]:
    """(live blocks of all heads, seconds) for every window that was measured."""
    name = "windows-T8192-D64-float32"
    points = []
    for reach in WINDOWS:
        asked = f"{subject}@window-{reach}"
        found = results.find(name, asked, "forward")
        if found is not None:
            case = results.cases[name].asked_of(asked)
            points.append((case.batch * case.heads * case.blocks, found.time.middle))
    return points


def _linear(results: Results) -> list[Row]:
    found = []
    for framework in ("torch", "jax", "tf"):
        points = sweep(results, f"{framework}:auto")
        whole = len(points) == len(WINDOWS)
        found.append(Row(framework, straightness(*zip(*points, strict=True)) if whole else None))
    return found


def _temporaries(backward: bool) -> Rows:
    def rows(results: Results) -> list[Row]:
        found = []
        for mask in MASKS:
            for framework in ("torch", "jax", "tf"):
                direction = _side(framework, backward)
                size = _bytes(results, mask, LENGTHS[-1], framework, direction)
                value = None if size is None else size / 1e6
                found.append(Row(f"{framework} {mask} {direction}", value))
        return found

    return rows


def _growth(results: Results) -> list[Row]:
    found = []
    for mask in MASKS:
        for framework in ("torch", "jax", "tf"):
            for backward in (False, True):
                direction = _side(framework, backward)
                sizes = [_bytes(results, mask, n, framework, direction) for n in LENGTHS]
                known = [max(size, SMALL) for size in sizes if size is not None]
                value = None
                if len(known) == len(LENGTHS):
                    value = max(b / a for a, b in pairwise(known))
                found.append(Row(f"{framework} {mask} {direction}", value))
    return found


def _side(framework: str, backward: bool) -> str:
    if not backward:
        return "forward"
    return "both" if framework == "tf" else "backward"


def _bytes(results: Results, mask: str, length: int, framework: str, side: str) -> int | None:
    """Of TensorFlow that form which takes more: of known or of unknown shapes."""
    sizes = []
    for subject in [f"{framework}:auto", *(["tf-unknown:auto"] if framework == "tf" else [])]:
        found = results.find(f"memory-{mask}-T{length}-D64-float32", subject, side)
        if found is None or found.temporaries is None:
            return None
        sizes.append(found.temporaries)
    return max(sizes)


def _overhead(results: Results) -> list[Row]:
    pair = [
        results.find("tiny-T4-D8-float32", name, "forward") for name in ("torch:auto", "torch-sdpa")
    ]
    if pair[0] is None or pair[1] is None:
        return [Row("torch eager", None)]
    low, middle, high = (1e6 * x for x in difference(pair[1].series, pair[0].series))
    return [Row("torch eager", middle, low, high)]


def _first(results: Results) -> list[Row]:
    found = []
    for mask in MASKS:
        for direction in ("forward", "both"):
            each = results.find(f"first-{mask}-T4096-D64-float32", "jax:auto", direction)
            found.append(Row(f"{mask} {direction}", None if each is None else each.first))
    return found


_F32, _BF16 = ("float32",), ("bfloat16",)
_JAX, _TORCH, _TF = ("jax:auto",), ("torch:auto",), ("tf:auto", "tf-unknown:auto")
_FLASH, _SDPA, _EACH = "torch-sdpa-flash", "torch-sdpa", (*_F32, *_BF16)

_SMALL_PRODUCTS = (
    "What is live here lies in small tiles, and causal attention, which it is measured against, "
    "in large ones. A tile with less hidden is a smaller product, which runs at a lower rate: "
    "torch's kernel splits short tiles into 32 rows instead of 256; XLA runs a product of fewer "
    "than about 256 x 256 on one core, whatever the batch, unless one fusion has it and a "
    "reduction, which a window's forward pass is made of in float32, while a backward pass and "
    "documents, which are not known when the call is traced, keep tiles of which half is hidden; "
    "TensorFlow's products, mask and softmax are operations of their own, each of which reads and "
    "writes the logits of a turn. A backward pass has five products of each tile in place of two."
)

TARGETS: tuple[Target, ...] = (
    Target(
        "JAX forward against torch flash, float32",
        *(0.9, 1.0, "x", True, _speed("forward", _JAX, _FLASH, _F32)),
    ),
    Target(
        "JAX forward against torch flash, bfloat16",
        *(1.3, 1.5, "x", True, _speed("forward", _JAX, _FLASH, _BF16)),
    ),
    Target(
        "JAX forward against jax.nn",
        *(5.0, 6.0, "x", True, _speed("forward", _JAX, "jax-nn", _EACH)),
        floors=_beside_nn,
        why="jax.nn makes the same two products, in one piece each, so what is gained is what it "
        "spends beside them and, of causal attention, the half that it need not make. The wider "
        "the heads, the more of all time is products.",
    ),
    Target(
        "JAX backward against torch flash, float32",
        *(0.65, 0.9, "x", True, _speed("backward", _JAX, _FLASH, _F32)),
    ),
    Target(
        "JAX backward against torch flash, bfloat16",
        *(0.6, 0.8, "x", True, _speed("backward", _JAX, _FLASH, _BF16)),
    ),
    Target(
        "TensorFlow forward against torch SDPA, float32",
        *(0.8, 1.0, "x", True, _speed("forward", _TF, _SDPA, _F32)),
    ),
    Target(
        "TensorFlow forward and backward against torch SDPA, float32",
        *(0.8, 1.0, "x", True, _speed("both", _TF, _SDPA, _F32)),
    ),
    Target(
        "torch auto against SDPA called directly",
        *(0.97, 1.0, "x", True),
        _both_ways(
            _speed("forward", _TORCH, _SDPA, _EACH), _speed("backward", _TORCH, _SDPA, _EACH)
        ),
    ),
    Target(
        "window of 256 at T 8192, share of work",
        *(0.6, 0.8, "x", True, _work("window-256-T8192-D64-float32")),
        floors=_floors("window"),
        why=_SMALL_PRODUCTS,
    ),
    Target(
        "16 packed documents of 512, share of work",
        *(0.6, 0.8, "x", True, _work("documents-16x512-T8192-D64-float32")),
        floors=_floors("documents"),
        why=_SMALL_PRODUCTS,
    ),
    Target(
        "time against live blocks, windows 128 to 4096, linear", 0.25, 0.10, "of it", False, _linear
    ),
    Target("temporaries at T 16384, forward", 32, 16, "MB", False, _temporaries(False)),
    Target("temporaries at T 16384, backward", 96, 48, "MB", False, _temporaries(True)),
    Target("temporaries at twice the length, growth", 2.5, 2.2, "x", False, _growth),
    Target("overhead on tiny tensors", 40, 15, "us", False, _overhead),
    Target("JAX's first call at T 4096", 5, 2, "s", False, _first),
)
