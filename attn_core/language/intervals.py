"""The interval reading: a mask over a whole tile at once, without looking at its entries.

Over a tile of rows and keys every integer of the tree becomes an interval [lo, hi] that holds all
its values there, and every condition a pair: `possible`, it may hold somewhere in the tile, and
`certain`, it holds everywhere. A tile whose mask is not possible is empty, one whose mask is
certain is full, and both are known for all tiles of a map in a few array operations::

    q in [256, 383], k in [0, 127]     q - k in [129, 383]     q - k <= 255: possible, not certain

`possible` is sharpened term by term (`zones`): the difference constraints of an AND narrow q, k
and q - k first, and what is left of the AND is read over what is left of the tile. That makes it
exact, no dead tile is kept, for any AND of difference constraints and for the vocabulary that
docs/SPEC.md lists. It is never False for a tile with a live entry, whatever the mask.

Look-ups over a range of indices take the range's minimum and maximum from a pyramid of halvings,
built in one pass over the operand. Where two or more axes are ranges (a dense table), the operand
is first reduced to the tile size as far as that is a power of two, so those ranges are rounded
outwards; rounding loses nothing for a table that is read by row and key of the tile.

The same code runs on the host and inside a compiled function. It asks an array library for the
names of `rules.Host` and uses Python's `+ - * < <= & | ~` and indexing; indices are int64 on the
host and int32 elsewhere, where `check_range` has made sure that nothing overflows. Positions and
their differences q - k are taken to lie within int32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from attn_core.language.arrays import constant
from attn_core.language.ranges import Ranges
from attn_core.language.rules import HOST, Bool, Host, Int, Rules
from attn_core.language.text import text
from attn_core.language.tree import INT_MAX, INT_MIN, Step, Tree
from attn_core.language.zones import (
    OFFSET,
    Constraint,
    Linear,
    Term,
    linear_forms,
    normal_form,
    part,
    varies,
    widths,
)

__all__ = ["EVERYTHING", "HOST", "Bool", "Host", "Int", "Intervals", "check_range"]

Array = Any

EVERYTHING = Tree((Step("const", "bool", (), "True"),), (0,))
"""The mask that hides nothing."""


class Intervals:
    """Reads one mask over tiles; operands are prepared once, whatever tiles are asked for.

    Args:
        ops: the array library, `Host` or a backend's `Tiles`.
        tree: the mask's tree.
        arrays: its operands; host arrays, or the library's, traced or not.
        tile: rows and keys of the smallest tiles that will be asked for.
    """

    def __init__(
        self, ops: Any, tree: Tree, arrays: Sequence[Any], tile: tuple[int, int] = (1, 1)
    ) -> None:
        self.ops, self.tree = ops, tree
        self.rules = Rules(ops)
        made = getattr(ops, "ranges", None) or partial(Ranges, ops)
        self.ranges = made(tree, [ops.array(x) for x in arrays], tile)

    def read(
        self,
        b: Array,
        h: Array,
        rows: tuple[Array, Array],
        keys: tuple[Array, Array],
        offset: Array,
        size: tuple[int, int],
    ) -> Bool:
        """The mask over tiles given as arrays that broadcast against each other.

        Args:
            b, h: batch and head of each tile.
            rows, keys: first and last row and key of each tile, both inclusive, none empty.
            offset: query offset, q = row + offset.
            size: rows and keys that any of these tiles has at most.
        """
        self._offset = Int(offset, offset)
        self._widths = widths(self.tree, size[0] - 1, size[1] - 1)
        rules = self.rules
        rules.begin()
        q = Int(rules.plus(rows[0], offset), rules.plus(rows[1], offset))
        k = Int(*keys)
        gap = Int(rules.minus(q.lo, k.hi), rules.minus(q.hi, k.lo))
        indices = {"b": Int(b, b), "h": Int(h, h), "row": Int(*rows), "q": q, "k": k}
        base: dict[int, Any] = {}
        self._run(range(len(self.tree.steps)), indices, gap, base)
        whole: Bool = base[self.tree.results[0]]
        possible = None
        for term in normal_form(self.tree):
            found = self._term(term, indices, gap, base)
            if found is None:  # the term adds nothing to the plain reading
                return whole
            possible = found if possible is None else possible | found
        if possible is None:  # no term at all: the mask contradicts itself
            nothing = self.ops.array(False)
            return Bool(nothing, nothing)
        return Bool(whole.possible & possible, whole.certain)

    def status(
        self,
        b: Array,
        h: Array,
        rows: tuple[Array, Array],
        keys: tuple[Array, Array],
        per_batch: tuple[Array, Array | None, Array | None],
        size: tuple[int, int],
    ) -> tuple[Array, Array]:
        """(live, full) of tiles: what the mask says of them, and what lengths do.

        Args:
            per_batch: query offset, kv_length and q_length of each tile's batch; None for none.
            b, h, rows, keys, size: as in `read`.
        """
        ops = self.ops
        offset, kv_length, q_length = per_batch
        live = whole = None
        spans = []
        for (first, last), length in ((rows, q_length), (keys, kv_length)):
            if length is not None:
                cut = ops.minimum(last, length - 1)
                some, every = first <= cut, cut >= last
                live = some if live is None else live & some
                whole = every if whole is None else whole & every
                last = ops.maximum(cut, first)
            spans.append((first, last))
        found = self.read(b, h, spans[0], spans[1], offset, size)
        full = found.certain if whole is None else whole & found.certain
        possible = found.possible if live is None else live & found.possible
        return possible, full & possible

    def _term(
        self, term: Term, indices: Mapping[str, Int], gap: Int, base: dict[int, Any]
    ) -> Array | None:
        if not term.constraints:
            values = base
            live = None
        else:
            live, q, k, d = self._narrow(term.constraints, indices, gap, base)
            if term.literals:
                lo, hi = (self.rules.minus(x, self._offset.lo) for x in q)
                narrowed = {**indices, "q": q, "k": k, "row": Int(lo, hi)}
                moving = varies(self.tree)
                values = {at: value for at, value in base.items() if not moving[at]}
                self._run(term.needed, narrowed, d, values)
        for at, holding in term.literals:
            found = values[at].possible if holding else ~values[at].certain
            live = found if live is None else live & found
        return live

    def _narrow(
        self,
        constraints: Sequence[Constraint],
        indices: Mapping[str, Int],
        gap: Int,
        base: Mapping[int, Any],
    ) -> tuple[Array, Int, Int, Int]:
        """What the constraints leave of q, k and q - k, and whether they leave anything."""
        ops, rules = self.ops, self.rules
        low = {"q": indices["q"].lo, "k": indices["k"].lo, "d": gap.lo}
        high = {"q": indices["q"].hi, "k": indices["k"].hi, "d": gap.hi}
        for (cq, ck, rest), strict in constraints:
            bound = rules.number(-1 if strict else 0)
            for at, times in rest:
                part = self._offset if at == OFFSET else base[at]
                bound = rules.minus(bound, part.lo) if times > 0 else rules.plus(bound, part.hi)
            name = "d" if cq and ck else "q" if cq else "k"
            if (cq or ck) > 0:
                high[name] = rules.least(high[name], bound)
            else:
                low[name] = rules.most(low[name], rules.minus(rules.number(0), bound))
        # One round closes q = k + d: with three variables there is no longer way around.
        low["d"] = rules.most(low["d"], rules.minus(low["q"], high["k"]))
        high["d"] = rules.least(high["d"], rules.minus(high["q"], low["k"]))
        live = (low["q"] <= high["q"]) & (low["k"] <= high["k"]) & (low["d"] <= high["d"])
        low["q"] = rules.most(low["q"], rules.plus(low["k"], low["d"]))
        high["q"] = rules.least(high["q"], rules.plus(high["k"], high["d"]))
        low["k"] = rules.most(low["k"], rules.minus(low["q"], high["d"]))
        high["k"] = rules.least(high["k"], rules.minus(high["q"], low["d"]))

        # An empty zone is read over the whole tile instead, and not used.
        def chosen(new: Array, old: Array) -> Array:
            return old if new is old else ops.where(live, new, old)

        found = [
            Int(chosen(low[name], old.lo), chosen(high[name], old.hi))
            for name, old in (("q", indices["q"]), ("k", indices["k"]), ("d", gap))
        ]
        return live, found[0], found[1], found[2]

    def _run(
        self, needed: Sequence[int], indices: Mapping[str, Int], gap: Int, values: dict[int, Any]
    ) -> None:
        """Add the values of the needed steps to those that are known."""
        steps, forms, moving = self.tree.steps, linear_forms(self.tree), varies(self.tree)
        for at in needed:
            if at in values:
                continue
            step = steps[at]
            args = [values[a] for a in step.args]
            if step.op == "index":
                values[at] = indices[str(step.value)]
            elif step.op == "lookup":
                reach = [self._widths[a] for a in step.args]
                found = self.ranges.lookup(at, args, reach)
                values[at] = Int(*found) if step.kind == "int" else Bool(found[1], found[0])
            else:
                values[at] = self.rules.apply(step, args, _divisor(self.tree, step))
                if step.op in ("add", "sub") and moving[at]:
                    values[at] = self._sharpen(values[at], forms[at], at, gap, values)

    def _sharpen(
        self, value: Int, form: Linear, at: int, gap: Int, values: Mapping[int, Any]
    ) -> Int:
        """A sum in which q, k or row cancel, or meet as q - k, is known better than its parts."""
        if form.rest == ((at, 1),) or (form.q, form.k) not in ((1, -1), (-1, 1), (0, 0)):
            return value
        rules = self.rules
        lo = hi = rules.number(0)
        if form.q:
            lo, hi = gap
            if form.q < 0:
                lo, hi = (rules.minus(rules.number(0), x) for x in (hi, lo))
        for step, times in form.rest:
            part = self._offset if step == OFFSET else values[step]
            if times > 0:
                lo, hi = rules.plus(lo, part.lo), rules.plus(hi, part.hi)
            else:
                lo, hi = rules.minus(lo, part.hi), rules.minus(hi, part.lo)
        return Int(rules.most(value.lo, lo), rules.least(value.hi, hi))


def _divisor(tree: Tree, step: Step) -> int | None:
    second = tree.steps[step.args[1]] if len(step.args) == 2 else None
    return int(constant(second)) if second is not None and second.op == "const" else None


def check_range(tree: Tree, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a mask or score whose integer arithmetic could leave int32.

    Args:
        tree: of a mask or a score; its floats are passed over.
        bounds: for each index, the first and last value it takes, both inclusive. Values that are
            looked up may be any int32, unless the tree clamps them (as `bounds=` of an operand
            does).

    Raises:
        ValueError: naming the sub-expression and what it can reach.
    """
    names = tuple(sorted((name, int(lo), int(hi)) for name, (lo, hi) in bounds.items()))
    problem = _out_of_range(tree, names)
    if problem is not None:
        raise ValueError(problem)


@lru_cache(maxsize=1024)
def _out_of_range(tree: Tree, bounds: tuple[tuple[str, int, int], ...]) -> str | None:
    rules = Rules(HOST)
    extent = {name: (lo, hi) for name, lo, hi in bounds}
    anything = Int(np.int64(INT_MIN), np.int64(INT_MAX))
    undecided = Bool(np.True_, np.False_)
    values: list[Any] = []
    for at, step in enumerate(tree.steps):
        args = [values[a] for a in step.args]
        value: Any
        if step.kind == "float":
            value = None
        elif step.op == "index":
            # Empty axes give empty ranges, over which nothing is ever computed.
            lo, hi = extent[str(step.value)]
            value = Int(np.int64(lo), np.int64(max(lo, hi)))
        elif step.op == "lookup" or any(arg is None for arg in args):
            value = anything if step.kind == "int" else undecided
        else:
            value = rules.apply(step, args, _divisor(tree, step))
        if step.kind == "int":
            lo, hi = int(value.lo), int(value.hi)
            if lo < INT_MIN or hi > INT_MAX:
                return _message(tree, at, lo if lo < INT_MIN else hi)
        values.append(value)
    return None


def _message(tree: Tree, at: int, value: int) -> str:
    what = "mask" if tree.steps[tree.results[0]].kind == "bool" else "score"
    looks_up = any(step.op == "lookup" for step in part(tree, at).steps)
    cure = (
        "Declare what the array holds with attn_core.operand(array, bounds=(low, high)), or "
        if looks_up
        else "Positions include the query offset; "
    )
    return (
        f"`{what}` must keep its integer arithmetic within int32 ({INT_MIN} to {INT_MAX}). Got "
        f"`{text(part(tree, at))}`, which can reach {value}. {cure}clamp with attn_core.minimum "
        "and maximum."
    )
