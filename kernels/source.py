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
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_core.kernels import rules
from attn_core.language.arrays import ArrayReading
from attn_core.language.tree import Tree

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
    """

    first: int
    rank: int
    boolean: bool


class Function(NamedTuple):
    """A device function.

    Attributes:
        source: what Triton compiles.
        call: the jitted function; it returns a tuple of the tree's results.
    """

    source: str
    call: Any


@lru_cache(maxsize=256)
def function(tree: Tree, operands: tuple[tuple[int, bool], ...], score: bool = False) -> Function:
    """The device function of a tree, `function(b, h, q, k, row, [s,] operands)`.

    Args:
        operands: (rank, whether boolean) of each.
        score: whether it takes s.
    """
    source = written(tree, operands, score)
    # Equal source is the same function, so that Triton's own cache knows it again.
    return Function(source, jitted(source))


def written(tree: Tree, operands: Sequence[tuple[int, bool]], score: bool = False) -> str:
    """The source alone."""
    lines: list[str] = []
    names = (*INDICES, "s") if score else INDICES
    tables, first = [], 0
    for rank, boolean in operands:
        tables.append(Operand(first, rank, boolean))
        first += 1 + rank
    # A derivative (of more results than one) is divided: its straight line, with nothing in it that
    # jumps, has ptxas serialize the products of `d_keys` about it (C7515).
    reading = _Source(lines, corrected=len(tree.results) == 1)
    found = reading.read(tree, {name: Code(name, lines) for name in names}, tables)
    # A tuple, of one value too: whoever calls unpacks it.
    results = ", ".join(code.name for code in found) + ","
    head = f"def function({', '.join(names)}, operands):"
    body = "".join(f"    {line}\n" for line in (*lines, f"return ({results})"))
    return f"@triton.jit\n{head}\n{body}"


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
        place = "0"
        for axis, at in enumerate(index):
            size = f"operands[{table.first + 1 + axis}]"
            held = self._line(f"tl.minimum(tl.maximum({at.name}, 0), {size} - 1).to(tl.int64)")
            place = held.name if axis == 0 else f"({place}) * {size} + {held.name}"
        # Of rank 0 it is one value, and a value has two axes here.
        where = self._line(place if index else "tl.zeros((1, 1), tl.int64)")
        value = self._line(f"tl.load(operands[{table.first}] + {where.name})")
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
