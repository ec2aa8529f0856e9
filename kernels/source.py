"""The Triton reading: a tree as the source of a device function.

    masks.causal() & masks.window(left=255)   ->   @triton.jit
                                                   def function(b, h, q, k, row, operands):
                                                       c0 = q >= k
                                                       ...

The rules are `ArrayReading`'s, step for step: here its arrays are names of Triton values, and every
operation on one writes a line. What Triton spells otherwise, or decides otherwise (its `//` and `%`
truncate, it has no tanh that the interpreter knows), is in `rules.py`.

    b, h    (1, 1)      q, row    (rows, 1)      k    (1, keys)      s    (rows, keys)

all int32 but s, which is float32. Operands are one flat tuple: for each, a pointer and its sizes,
stored row by row. Whoever calls sees to it that none is empty.

What is looked up at every entry of a tile is read before the product of query and key is there
(`tile.ahead_of`): such a mask is evaluated then, and such a score is two functions (`split`).
"""

from __future__ import annotations

import linecache
from collections.abc import Collection, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_core.kernels import rules
from attn_core.language.arrays import ArrayReading
from attn_core.language.tree import Step, Tree, looks_up_entries, lookups_of_entries

INDICES = ("b", "h", "q", "k", "row")

_MILD = 2.0**-64
"""No constant divisor below it, or beyond its inverse, has an inverse to be divided by."""

_TYPES = {"bool": "tl.int1", "int": "tl.int32", "float": "tl.float32"}


class Operand(NamedTuple):
    """Where an operand stands among the arguments.

    Attributes:
        first: number of its pointer; its sizes follow.
        rank: of the array.
        boolean: whether it holds bytes that stand for booleans.
        spans: whether its last axis is as long as the keys are many.
    """

    first: int
    rank: int
    boolean: bool
    spans: bool


class Function(NamedTuple):
    """A device function.

    Attributes:
        source: what Triton compiles.
        call: the jitted function; it returns a tuple of the tree's results.
    """

    source: str
    call: Any


class Split(NamedTuple):
    """A score, or its derivative, in two.

    Attributes:
        looks: what it looks up at every entry of a tile without s; None where that is nothing.
        rest: the tree, whose index "looked[n]" is the n-th of those.
    """

    looks: Tree | None
    rest: Tree


@lru_cache(maxsize=256)
def split(tree: Tree) -> Split:
    """So that what it looks up is on its way before there is an s (`tile.ahead_of`)."""
    found = lookups_of_entries(tree)
    early = {at for at in found if not _pruned(Tree(tree.steps, (at,))).reads("s")}
    steps, met = list(tree.steps), sorted(early & _needed(tree, early))
    if not met:
        return Split(None, tree)
    for number, at in enumerate(met):
        steps[at] = Step("index", steps[at].kind, (), f"looked[{number}]")
    looks = Tree(tree.steps, tuple(met))
    return Split(_pruned(looks), _pruned(Tree(tuple(steps), tree.results)))


def _needed(tree: Tree, leaves: Collection[int] = ()) -> set[int]:
    """The steps that its results take, but those that only the leaves take."""
    found, left = set[int](), list(tree.results)
    while left:
        at = left.pop()
        if at not in found:
            found.add(at)
            left += () if at in leaves else tree.steps[at].args
    return found


def _pruned(tree: Tree) -> Tree:
    """The same, without steps that no result takes."""
    kept = sorted(_needed(tree))
    moved = {at: number for number, at in enumerate(kept)}
    steps = (
        tree.steps[at]._replace(args=tuple(moved[n] for n in tree.steps[at].args)) for at in kept
    )
    return Tree(tuple(steps), tuple(moved[at] for at in tree.results))


Forms = Sequence[tuple[int, bool, bool]]
"""(rank, whether boolean, whether its last axis spans the keys) of each operand."""


def of_mask(tree: Tree | None, operands: Forms) -> dict[str, Any]:
    """What kernels are told of a mask: MASK, and whether it is EARLY (`tile.ahead_of`)."""
    if tree is None:
        return {"MASK": None, "EARLY": False}
    return {"MASK": function(tree, tuple(operands)).call, "EARLY": looks_up_entries(tree)}


def of_score(tree: Tree | None, operands: Forms) -> dict[str, Any]:
    """What kernels are told of a score or its derivative: SCORE, and what it LOOKS up before."""
    if tree is None:
        return {"SCORE": None, "LOOKS": None}
    looks, rest = split(tree)
    before = None if looks is None else function(looks, tuple(operands)).call
    return {"SCORE": function(rest, tuple(operands), True).call, "LOOKS": before}


@lru_cache(maxsize=256)
def function(
    tree: Tree, operands: tuple[tuple[int, bool, bool], ...], score: bool = False
) -> Function:
    """The device function of a tree, `function(b, h, q, k, row, [s, [looked,]] operands)`.

    Args:
        score: whether it takes s; and what was looked up before, where it is the rest of a `split`.
    """
    source = written(tree, operands, score)
    # Equal source is the same function, so that Triton's own cache knows it again.
    return Function(source, jitted(source))


def written(tree: Tree, operands: Forms, score: bool = False) -> str:
    """The source alone."""
    lines: list[str] = []
    looked = [str(x.value) for x in tree.steps if x.op == "index" and "[" in str(x.value)]
    takes = (*INDICES, *["s"] * score, *["looked"] * bool(looked), "operands")
    tables, first = [], 0
    for rank, boolean, spans in operands:
        tables.append(Operand(first, rank, boolean, spans))
        first += 1 + rank
    # A derivative (of more results than one) is divided: its straight line, with nothing in it that
    # jumps, has ptxas serialize the products of `d_keys` about it (C7515).
    reading = _Source(lines, corrected=len(tree.results) == 1)
    found = reading.read(tree, {name: Code(name, lines) for name in (*takes, *looked)}, tables)
    # A tuple, of one value too: whoever calls unpacks it.
    results = ", ".join(code.name for code in found) + ","
    body = "".join(f"    {line}\n" for line in (*lines, f"return ({results})"))
    return f"@triton.jit\ndef function({', '.join(takes)}):\n{body}"


@lru_cache(maxsize=256)
def jitted(source: str) -> Any:
    """The device function called `function` in it; its errors quote the source."""
    name = f"<attn_core.kernels {sha256(source.encode()).hexdigest()[:16]}>"
    # Triton asks `inspect` for the source, and errors quote its lines.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, "rules": rules, "__name__": __name__}
    exec(compile(source, name, "exec"), space)
    return space["function"]


class Code:
    """A value that stands in a line of its own; what is done to it writes the next line."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, name: str, lines: list[str], value: float | None = None) -> None:
        self.name, self.lines = name, lines
        self.value = value
        """Of a float that is known, else None."""

    def write(self, text: str) -> Code:
        name = f"c{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return Code(name, self.lines)

    def _with(self, op: str, other: Any, turned: bool = False) -> Code:
        sides = (self.name, _spelled(other))
        first, second = reversed(sides) if turned else sides
        return self.write(f"{first} {op} {second}")

    def __add__(self, other: Any) -> Code:
        return self._with("+", other)

    def __radd__(self, other: Any) -> Code:
        return self._with("+", other, True)

    def __sub__(self, other: Any) -> Code:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Code:
        return self._with("-", other, True)

    def __mul__(self, other: Any) -> Code:
        return self._with("*", other)

    def __rmul__(self, other: Any) -> Code:
        return self._with("*", other, True)

    def __truediv__(self, other: Any) -> Code:
        return self.write(f"rules.divide({self.name}, {_spelled(other)})")

    def __and__(self, other: Any) -> Code:
        return self._with("&", other)

    def __or__(self, other: Any) -> Code:
        return self._with("|", other)

    def __xor__(self, other: Any) -> Code:
        return self._with("^", other)

    def __invert__(self) -> Code:
        return self.write(f"~{self.name}")

    def __lt__(self, other: Any) -> Code:
        return self._with("<", other)

    def __le__(self, other: Any) -> Code:
        return self._with("<=", other)

    def __gt__(self, other: Any) -> Code:
        return self._with(">", other)

    def __ge__(self, other: Any) -> Code:
        return self._with(">=", other)

    def __eq__(self, other: Any) -> Any:
        return self._with("==", other)

    def __ne__(self, other: Any) -> Any:
        return self._with("!=", other)


def _spelled(x: Any) -> str:
    if isinstance(x, Code):
        return x.name
    return _number(x) if isinstance(x, float) else repr(x)


def _number(x: float) -> str:
    return repr(x) if abs(x) < float("inf") else f'float("{x}")'


class _Source(ArrayReading):
    """Reads trees as lines of Triton."""

    def __init__(self, lines: list[str], corrected: bool) -> None:
        super().__init__()
        self.lines, self.corrected = lines, corrected

    def _line(self, text: str) -> Code:
        return Code("", self.lines).write(text)

    def const(self, kind: str, value: Any) -> Code:
        text = _number(value) if kind == "float" else str(int(value))
        made = self._line(f"tl.full((1, 1), {text}, {_TYPES[kind]})")
        return Code(made.name, self.lines, float(value)) if kind == "float" else made

    def float_op(self, op: str, args: list[Code]) -> Code:
        by = args[1].value if op == "div" and self.corrected else None
        if by is not None and _MILD <= abs(by) <= 1 / _MILD:
            inverse = 1 / by
            return self._line(f"rules.over({args[0].name}, {args[1].name}, {inverse!r})")
        return super().float_op(op, args)

    def lookup(self, table: Operand, index: Sequence[Code]) -> Code:
        place, there = "0", ""
        names = [at.name for at in index]
        # Of rows and keys: read as it lies, side by side. Beyond the last key nobody looks.
        beside = table.spans and names[-1:] == ["k"] and names[-2:-1] in (["row"], ["q"])
        for axis, name in enumerate(names):
            size = f"operands[{table.first + 1 + axis}]"
            if beside and axis == len(names) - 1:
                held, there = f"{name}.to(tl.int64)", f", mask={name} < {size}, other=0"
            else:
                held = f"tl.minimum(tl.maximum({name}, 0), {size} - 1).to(tl.int64)"
            held = self._line(held).name
            place = held if axis == 0 else f"({place}) * {size} + {held}"
        # Of rank 0 it is one value, and a value has two axes here.
        where = self._line(place if index else "tl.zeros((1, 1), tl.int64)")
        value = self._line(f"tl.load(operands[{table.first}] + {where.name}{there})")
        if table.boolean:
            return value != 0
        return self._line(f"rules.widened({value.name})")

    def where(self, condition: Code, x: Code, y: Code) -> Code:
        return self._line(f"tl.where({condition.name}, {x.name}, {y.name})")

    def zeros_like(self, x: Code) -> Code:
        return self._line(f"tl.zeros_like({x.name})")

    def equal(self, x: Code, y: Code) -> Code:
        return self._line(f"{x.name} == {y.name}")

    def not_equal(self, x: Code, y: Code) -> Code:
        return self._line(f"{x.name} != {y.name}")

    def int_floordiv(self, x: Code, y: Code) -> Code:
        return self._line(f"rules.floordiv({x.name}, {y.name})")

    def int_mod(self, x: Code, y: Code) -> Code:
        return self._line(f"rules.mod({x.name}, {y.name})")

    def int_rshift(self, x: Code, count: Code) -> Code:
        return self._line(f"{x.name} >> {count.name}")

    def absolute(self, x: Code) -> Code:
        return self._line(f"tl.abs({x.name})")

    def exp(self, x: Code) -> Code:
        return self._line(f"tl.exp({x.name})")

    def log(self, x: Code) -> Code:
        return self._line(f"tl.log({x.name})")

    def tanh(self, x: Code) -> Code:
        return self._line(f"rules.tanh({x.name})")

    def floor(self, x: Code) -> Code:
        return self._line(f"tl.floor({x.name})")

    def truncate(self, x: Code) -> Code:
        return self._line(f"tl.where({x.name} < 0, tl.ceil({x.name}), tl.floor({x.name}))")

    def stop_gradient(self, x: Code) -> Code:
        return x

    def as_int(self, x: Code) -> Code:
        return self._line(f"{x.name}.to(tl.int32)")

    def as_float(self, x: Code) -> Code:
        return self._line(f"{x.name}.to(tl.float32)")
