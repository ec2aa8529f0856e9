"""The tree: what a mask or a score *is*, once its Python function has been run.

A tree is a short straight-line programme. Every step names an operation, the kind of value it
gives and the earlier steps it reads, and the last step is the answer::

    (q >= k) & (q - k <= 255)

    0  index q    int
    1  index k    int
    2  ge         bool   0 1
    3  sub        int    0 1
    4  const 255  int
    5  le         bool   3 4
    6  and        bool   2 5      <- result

It holds no arrays: arrays that the function looks things up in are numbered operands and travel
beside query, key and value. So a tree is an ordinary hashable tuple of strings and integers, equal
to every other tree that means the same programme, and it can be a jit-static argument, a cache key
or the metadata of a pytree in any framework.

Kinds are explicit. Where the user's function mixes kinds, `Tape.apply` writes the cast into the
programme, so that no reading ever has to decide what an int meeting a float means.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

INDICES = ("b", "h", "q", "k", "row")
"""Batch, query head, absolute query position, key position, and the row i of the query array."""

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
"""Positions and integer arithmetic are int32 in every framework."""

COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")
LOGIC = ("and", "or", "xor")
TRANSCENDENTAL = ("exp", "log", "tanh")


class Step(NamedTuple):
    """One operation: `kind` is "bool", "int" or "float"; `args` are positions of earlier steps.

    `value` is the name of an index, the text of a constant (so that 2 and 2.0 and -0.0 and 0.0
    stay apart), or the number of the operand a look-up reads.
    """

    op: str
    kind: str
    args: tuple[int, ...] = ()
    value: str | int | None = None


class Tree(NamedTuple):
    """Steps in an order in which each reads only earlier ones, and the positions of the results."""

    steps: tuple[Step, ...]
    results: tuple[int, ...]

    def reads(self, *names: str) -> bool:
        """Whether any of these indices (or "s") is used."""
        return any(step.op == "index" and step.value in names for step in self.steps)


@lru_cache(maxsize=1024)
def looks_up_entries(tree: Tree | None) -> bool:
    """Whether an array is looked up at every entry: by what differs along rows and keys at once.

    `bool0[b, h, row, k]` is, and so is `float0[h, q - k]`; `int0[b, q] == int0[b, k]` is not.
    """
    return tree is not None and bool(lookups_of_entries(tree))


def lookups_of_entries(tree: Tree) -> tuple[int, ...]:
    """The steps that are such look-ups."""
    steps: list[int] = []
    along: list[frozenset[str]] = []
    for at, step in enumerate(tree.steps):
        found = frozenset[str]().union(*(along[n] for n in step.args))
        if step.op == "index":
            found = _ALONG.get(str(step.value), frozenset())
        if step.op == "lookup" and len(found) > 1:
            steps.append(at)
        along.append(found)
    return tuple(steps)


def axes_along(
    tree: Tree, index: str, shapes: Sequence[Sequence[int | None]], size: int
) -> tuple[int | None, ...] | None:
    """For each operand the axis along which this index, and nothing else, looks it up.

    So cutting these axes as the index is cut, and counting the index from 0 in every part, changes
    nothing. None if it would: where the index is read in another way (`h < 4`, `slopes[h // 2]`),
    or an axis has other than `size` entries, so that the look-up clamps. An axis of size 1, which
    broadcasts, is no axis along it.
    """
    places = {n for n, s in enumerate(tree.steps) if s.op == "index" and s.value == index}
    lookups = [step for step in tree.steps if step.op == "lookup"]
    others = [step for step in tree.steps if step.op != "lookup"]
    if places.intersection(tree.results) or any(places.intersection(s.args) for s in others):
        return None
    found: list[int | None] = []
    for operand, shape in enumerate(shapes):
        along = {
            tuple(at for at, n in enumerate(step.args) if n in places and shape[at] != 1)
            for step in lookups
            if step.value == operand
        }
        if along <= {()}:
            found.append(None)
            continue
        (axes,) = along if len(along) == 1 else ((),)
        if len(axes) != 1 or shape[axes[0]] != size:
            return None
        found.append(axes[0])
    return tuple(found)


_ALONG = {
    "q": frozenset({"rows"}),
    "row": frozenset({"rows"}),
    "k": frozenset({"keys"}),
    "s": frozenset({"rows", "keys"}),
}
"""The axes of a tile along which an index differs."""


class Tape:
    """Steps while they are being written: equal steps are written once, whoever asks."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.arrays: list[Any] = []
        self._known: dict[Step, int] = {}
        # How often `==` and `!=` were asked for, equal ones too (`answered.py`).
        self.compared = {"eq": 0, "ne": 0}

    def add(self, step: Step) -> int:
        """Position of this step, written now unless an equal one stands already."""
        at = self._known.get(step)
        if at is None:
            at = len(self.steps)
            self.steps.append(step)
            self._known[step] = at
        return at

    def index(self, name: str) -> int:
        return self.add(Step("index", "float" if name == "s" else "int", (), name))

    def const(self, value: bool | int | float) -> int:
        """A constant, kept as text: its kind and its every bit are part of the tree."""
        if isinstance(value, bool):
            return self.add(Step("const", "bool", (), str(value)))
        if isinstance(value, int):
            value = index(value)  # torch.compile may hold a symbol here: a constant is a number
            if not INT_MIN <= value <= INT_MAX:
                raise ValueError(f"integer constants must fit int32. Got {value}.")
            return self.add(Step("const", "int", (), str(int(value))))
        # An argument of what torch.compile compiles may be a symbol; a key of a set has its value.
        (number,) = {float(value)}
        return self.add(Step("const", "float", (), repr(number)))

    def operand(self, array: Any) -> int:
        """The number of an operand; the same array keeps its number."""
        for number, known in enumerate(self.arrays):
            if known is array:
                return number
        self.arrays.append(array)
        return len(self.arrays) - 1

    def lookup(self, array: Any, kind: str, at: Sequence[int]) -> int:
        return self.add(Step("lookup", kind, tuple(at), self.operand(array)))

    def kind(self, at: int) -> str:
        return self.steps[at].kind

    def cast(self, at: int, kind: str) -> int:
        """The value at `at` as `kind`; nothing is written where it already is."""
        step = self.steps[at]
        if step.kind == kind:
            return at
        if step.op == "const" and kind == "float":
            return self.const(
                float(int(step.value or 0)) if step.kind == "int" else float(step.value == "True")
            )
        return self.add(Step("cast", kind, (at,)))

    def apply(self, op: str, *at: int) -> int:
        """Write `op` over values of any kinds, with the casts its meaning asks for."""
        kinds = [self.kind(a) for a in at]
        if op in self.compared:
            self.compared[op] += 1
        if op in LOGIC or op == "not":
            return self._logic(op, at, kinds)
        if op in ("rshift",):
            if "float" in kinds:
                raise TypeError("`>>` must be between integers. Got a float.")
            return self.add(Step(op, "int", tuple(self.cast(a, "int") for a in at)))
        if op == "where":
            return self._where(at, kinds)
        if op in TRANSCENDENTAL or op == "div":
            return self.add(Step(op, "float", tuple(self.cast(a, "float") for a in at)))
        if op in ("eq", "ne") and kinds == ["bool", "bool"]:
            return self.add(Step(op, "bool", at))
        common = "float" if "float" in kinds else "int"
        cast = tuple(self.cast(a, common) for a in at)
        return self.add(Step(op, "bool" if op in COMPARE else common, cast))

    def _logic(self, op: str, at: tuple[int, ...], kinds: list[str]) -> int:
        if "float" in kinds:
            spelling = {"and": "&", "or": "|", "xor": "^", "not": "~"}[op]
            raise TypeError(f"`{spelling}` must be between conditions or integers. Got a float.")
        if all(kind == "bool" for kind in kinds):
            return self.add(Step(op, "bool", at))
        if op != "and":
            spelling = {"or": "|", "xor": "^", "not": "~"}[op]
            raise TypeError(
                f"`{spelling}` must be between conditions, such as `q >= k`. Got an integer."
            )
        return self.add(Step(op, "int", tuple(self.cast(a, "int") for a in at)))

    def _where(self, at: tuple[int, ...], kinds: list[str]) -> int:
        if kinds[0] != "bool":
            raise TypeError(f"the first argument of `where` must be a condition. Got {kinds[0]}.")
        common = next(kind for kind in ("float", "int", "bool") if kind in kinds[1:])
        return self.add(
            Step("where", common, (at[0], self.cast(at[1], common), self.cast(at[2], common)))
        )

    def replay(self, tree: Tree, arrays: Sequence[Any], bind: dict[str, int] | None = None) -> int:
        """Write another tree onto this tape; `bind` puts a step in the place of an index."""
        moved: list[int] = []
        for step in tree.steps:
            if bind is not None and step.op == "index" and step.value in bind:
                moved.append(bind[str(step.value)])
                continue
            value = step.value
            if step.op == "lookup":
                value = self.operand(arrays[int(value or 0)])
            moved.append(
                self.add(Step(step.op, step.kind, tuple(moved[a] for a in step.args), value))
            )
        return moved[tree.results[0]]

    def finish(self, *results: int) -> tuple[Tree, tuple[Any, ...]]:
        """The canonical tree: only what the results need, in order of first use.

        The order is that of a depth-first walk from the results, so that it does not depend on
        how the programme came to be written; operands are numbered in the same order.
        """
        order: list[int] = []
        place: dict[int, int] = {}
        for result in results:
            todo = [result]
            while todo:
                at = todo[-1]
                if at in place:
                    todo.pop()
                    continue
                waiting = [a for a in self.steps[at].args if a not in place]
                if waiting:
                    todo.extend(reversed(waiting))
                else:
                    todo.pop()
                    place[at] = len(order)
                    order.append(at)
        numbers: dict[int, int] = {}
        steps: list[Step] = []
        for at in order:
            op, kind, args, value = self.steps[at]
            if op == "lookup":
                value = numbers.setdefault(int(value or 0), len(numbers))
            steps.append(Step(op, kind, tuple(place[a] for a in args), value))
        tree = Tree(tuple(steps), tuple(place[result] for result in results))
        return tree, tuple(self.arrays[number] for number in numbers)
