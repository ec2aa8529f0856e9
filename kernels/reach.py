"""The interval reading in Triton: a mask over whole tiles as the source of a device function.

    masks.causal() & masks.segments(ids)   ->   @triton.jit
                                                def function(b, h, row_lo, row_hi, ..., operands):
                                                    c0 = tl.maximum(row_lo.to(...
                                                    ...
                                                    return (possible, certain)

The rules are `attn_core.language.intervals`', step for step, those of lengths among them: here
their arrays are names of Triton values, one entry to each tile, and every
operation on one writes a line. What they say of a tile is therefore what the host says of it.

Only the look-ups are another way. Where the host asks a pyramid for the least and the greatest of a
range, a tile here reads the range, whose length a tile bounds, and reduces it. Where two or more
axes are ranges (a dense table) they are read in grains, as the host reads them, which a kernel of
its own has reduced before. What no tile bounds, an index that was itself looked up, has no such
function.

What tiles read has three axes: (entries / NEAR, tiles, NEAR). Nothing tells Triton along which of
them neighbours lie in memory, so it spreads a warp along the first (3.6) or the last (3.7), and
every thread works out all tiles of an axis that the threads do not share out. With tiles in the
middle they are shared out either way. As (tiles, entries) each thread had all 32 tiles of a step
with 3.7, and spilled 1.4 KB.

    b, h    (1,)      first and last row and key of each tile    (1,) or (tiles,), int32
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from triton import next_power_of_2

from attn_core.kernels.source import Code, jitted
from attn_core.language.intervals import EVERYTHING, Intervals
from attn_core.language.ranges import grains_of
from attn_core.language.tree import INT_MAX, INT_MIN, Tree

ARGUMENTS = (
    *("b", "h", "row_lo", "row_hi", "key_lo", "key_hi"),
    *("offset", "kv_length", "q_length", "operands"),
)

NEAR = 16
"""Neighbouring entries of a range that stand along an axis of their own."""

MOST = 1024
"""Entries of a range that are read for one tile; what needs more has no function."""


class Form(NamedTuple):
    """What is static of an operand.

    Attributes:
        ones: of each axis, whether it has one entry, which is then read for every index.
        boolean: whether it holds bytes that stand for booleans.
    """

    ones: tuple[bool, ...]
    boolean: bool


class Reduced(NamedTuple):
    """A table that is read in grains: operand, and entries of each axis that are one."""

    number: int
    grains: tuple[int, ...]


class Reach(NamedTuple):
    """A device function over tiles.

    Attributes:
        source: what Triton compiles.
        call: the jitted function; it returns (possible, certain), of each tile.
        entries: that it reads of an operand for each tile at most.
        reduced: tables that it reads in grains: they follow the operands, each as the least, the
            greatest, and the sizes.
    """

    source: str
    call: Any
    entries: int
    reduced: tuple[Reduced, ...]


class Unbounded(ValueError):
    """A tile does not bound how much of an operand would have to be read."""


@lru_cache(maxsize=256)
def reach(
    tree: Tree | None,
    operands: tuple[Form, ...],
    tile: tuple[int, int],
    lengths: tuple[bool, bool],
) -> Reach | None:
    """The device function of a mask over tiles of so many rows and keys; None where it has none.

    Args:
        lengths: whether there are lengths of keys, and of rows.
    """
    lines = _Lines()
    ops = _Ops(lines, operands)
    try:
        found = _read(ops, tree, operands, tile, lengths)
    except Unbounded:
        return None
    results = ", ".join(code.name for code in found)
    body = "".join(f"    {line}\n" for line in (*lines, f"return ({results})"))
    source = f"@triton.jit\ndef function({', '.join(ARGUMENTS)}):\n{body}"
    return Reach(source, jitted(source), ops.entries, tuple(ops.reduced))


def _read(
    ops: _Ops,
    tree: Tree | None,
    operands: tuple[Form, ...],
    tile: tuple[int, int],
    lengths: tuple[bool, bool],
) -> tuple[Code, Code]:
    name = {n: _Value(n, ops.lines) for n in ARGUMENTS}
    rows, keys = ((name[f"{n}_lo"], name[f"{n}_hi"]) for n in ("row", "key"))
    per_batch = (
        name["offset"],
        name["kv_length"] if lengths[0] else None,
        name["q_length"] if lengths[1] else None,
    )
    reading = Intervals(ops, EVERYTHING if tree is None else tree, operands, tile)
    return reading.status(name["b"], name["h"], rows, keys, per_batch, tile)


class _Lines(list[str]):
    """Lines, and the value of each by what it says: nothing here is worked out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, _Value] = {}


class _Value(Code):
    """A value of tiles; the same one wherever the same is said of the same."""

    lines: _Lines

    def write(self, text: str) -> _Value:
        if text not in self.lines.known:
            self.lines.known[text] = _Value(super().write(text).name, self.lines)
        return self.lines.known[text]


class _Ops:
    """What the interval reading asks of an array library, in Triton's words.

    The names and their order are those of `attn_core.language.rules.Host`.
    """

    def __init__(self, lines: _Lines, forms: Sequence[Form]) -> None:
        self.lines, self.forms = lines, forms
        self.first: list[int] = []
        self.end = 0
        for form in forms:
            self.first.append(self.end)
            self.end += 1 + len(form.ones)
        self.entries = 1
        self.reduced: dict[Reduced, int] = {}

    def line(self, text: str) -> Code:
        return _Value("", self.lines).write(text)

    def plus(self, x: Code, y: Code) -> Code:
        return self._held(f"{x.name}.to(tl.int64) + {y.name}")

    def minus(self, x: Code, y: Code) -> Code:
        return self._held(f"{x.name}.to(tl.int64) - {y.name}")

    def _held(self, wide: str) -> Code:
        """Of 64 bits what int32 holds, at its ends what lies beyond them."""
        lower = self.line(f"tl.maximum({wide}, {INT_MIN})")
        return self.line(f"tl.minimum({lower.name}, {INT_MAX}).to(tl.int32)")

    def where(self, condition: Code, x: Code, y: Code) -> Code:
        return self.line(f"tl.where({condition.name}, {x.name}, {y.name})")

    def minimum(self, x: Code, y: Code) -> Code:
        return self.line(f"tl.minimum({x.name}, {y.name})")

    def maximum(self, x: Code, y: Code) -> Code:
        return self.line(f"tl.maximum({x.name}, {y.name})")

    def floordiv(self, x: Code, y: Code) -> Code:
        return self.line(f"rules.floordiv({x.name}, {y.name})")

    def rshift(self, x: Code, count: Code) -> Code:
        return self.line(f"{x.name} >> {count.name}")

    def index(self, x: Any) -> Code:
        return x if isinstance(x, Code) else self.line(f"tl.full((1,), {int(x)}, tl.int32)")

    def array(self, x: Any) -> Any:
        return self.line(f"tl.full((1,), {int(x)}, tl.int1)") if isinstance(x, bool) else x

    def ranges(self, tree: Tree, operands: Sequence[Form], tile: tuple[int, int]) -> _Ranges:
        return _Ranges(self, tree, operands, tile)

    def place(self, reduced: Reduced) -> int:
        """Where a reduced table stands among the arguments."""
        if reduced not in self.reduced:
            self.reduced[reduced] = self.end
            self.end += 2 + len(reduced.grains)
        return self.reduced[reduced]


class _Ranges:
    """Look-ups over ranges, read from the operands themselves."""

    def __init__(
        self, ops: _Ops, tree: Tree, operands: Sequence[Form], tile: tuple[int, int]
    ) -> None:
        self.ops, self.tree, self.operands, self.tile = ops, tree, operands, tile

    def lookup(
        self, at: int, index: Sequence[Any], widths: Sequence[int | None]
    ) -> tuple[Code, Code]:
        """(lo, hi) of the look-up at this step; `index` holds an interval for each axis."""
        ops, number = self.ops, int(self.tree.steps[at].value or 0)
        form, first = self.operands[number], ops.first[number]
        ends: list[tuple[Code, Code] | None] = []
        ranged: list[int] = []
        zero = ops.index(0)
        for axis, (one, (lo, hi)) in enumerate(zip(form.ones, index, strict=True)):
            if one:
                ends.append(None)
                continue
            last = ops.line(f"operands[{first + 1 + axis}] - 1")
            least = ops.minimum(ops.maximum(lo, zero), last)
            most = least if lo is hi else ops.minimum(ops.maximum(hi, zero), last)
            ends.append((least, most))
            if lo is not hi:
                ranged.append(axis)
        grains = grains_of(self.tree, at, len(form.ones), ranged, self.tile)
        tables, sizes = (first, first), first + 1
        coarse = sum(grain > 1 for grain in grains)
        if coarse > 2:
            raise Unbounded
        if coarse:
            place = ops.place(Reduced(number, grains))
            tables, sizes = (place, place + 1), place + 2
        counts = [_count(widths[axis], grains[axis]) for axis in ranged]
        if prod(counts) > MOST:
            raise Unbounded
        ops.entries = max(ops.entries, prod(counts))
        where = self._places(ends, ranged, grains, counts, sizes).name
        loads = [f"tl.load(operands[{table}] + {where})" for table in dict.fromkeys(tables)]
        # Booleans are numbers until they are reduced.
        found = [ops.line(f"rules.widened({load})") for load in loads]
        if not ranged:
            value = found[0] != 0 if form.boolean else found[0]
            return value, value
        least, most = (
            ops.line(f"rules.{which}({value.name})")
            for which, value in (("least", found[0]), ("greatest", found[-1]))
        )
        return (least != 0, most != 0) if form.boolean else (least, most)

    def _places(
        self,
        ends: Sequence[tuple[Code, Code] | None],
        ranged: Sequence[int],
        grains: Sequence[int],
        counts: Sequence[int],
        sizes: int,
    ) -> Code:
        """Where each entry of each range stands: (tiles,) or (entries / NEAR, tiles, NEAR).

        The ranges of several axes lie one within the other, along one axis of lanes. A lane beyond
        a range reads its last entry again, which changes no extreme.
        """
        ops, step, wide = self.ops, prod(counts), "[None, :, None]" if ranged else ""
        place = ops.line(f"tl.zeros({'(1, 1, 1)' if ranged else '(1,)'}, tl.int64)")
        near = min(NEAR, step)
        lanes = f"tl.arange(0, {step // near})[:, None, None] * {near}"
        lanes = f"({lanes} + tl.arange(0, {near})[None, None, :])"
        for axis, pair in enumerate(ends):
            if pair is None:
                continue
            left, right = pair
            if grains[axis] > 1:
                by = ops.index(grains[axis])
                left, right = ops.floordiv(left, by), ops.floordiv(right, by)
            at = ops.line(f"{left.name}{wide}")
            if axis in ranged:
                count = counts[ranged.index(axis)]
                step //= count
                lane = ops.line(f"{lanes} // {step} % {count}")
                at = ops.line(f"tl.minimum({at.name} + {lane.name}, {right.name}{wide})")
            place = ops.line(f"{place.name} * operands[{sizes + axis}] + {at.name}")
        return place


def _count(width: int | None, grain: int) -> int:
    """Entries that a range reaches at most, as a power of two; `width` is its hi - lo at most."""
    if width is None:
        raise Unbounded
    # A range may begin within a grain.
    return int(next_power_of_2(width + 1 if grain == 1 else width // grain + 2))
