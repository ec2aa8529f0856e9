"""Interval arithmetic: what one operation makes of intervals, in any array library.

An integer is `Int(lo, hi)`, the values it takes within a tile at least and at most; a condition is
`Bool(possible, certain)`. Every rule encloses what the operation can give, and those of `//`, `%`,
shifts and division by zero are the ones of docs/SPEC.md. Read over a part of the tile, a rule
never gives more than over the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attn_core.language.arrays import constant
from attn_core.language.tree import INT_MAX, INT_MIN, Step

Array = Any


class Host:
    """What the interval reading asks of an array library; this one is NumPy's.

    `index` makes positions and constants (int64 here, the library's own integer elsewhere),
    `array` makes operands and lengths (int32, wider where they are, or bool), `take` reads the
    flattened array and gives positions' dtype or bool, `floordiv` never sees a divisor of 0, and
    `least`, `most` and `total` reduce the last axis, and `descending` gives the order that sorts
    it, largest first and equal ones as they stand. A library whose integers are cheap to widen may
    have `plus` and `minus` of its own, held within int32 as those of `Rules` are.
    """

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return np.where(condition, x, y)

    def minimum(self, x: Array, y: Array) -> Array:
        return np.minimum(x, y)

    def maximum(self, x: Array, y: Array) -> Array:
        return np.maximum(x, y)

    def floordiv(self, x: Array, y: Array) -> Array:
        return np.floor_divide(x, y)

    def rshift(self, x: Array, count: Array) -> Array:
        return np.right_shift(x, count)

    def take(self, x: Array, index: Array) -> Array:
        found = np.take(x.reshape(-1), index)
        return found if found.dtype == np.bool_ else found.astype(np.int64)

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        return np.concatenate(parts, axis)

    def index(self, x: Any) -> Array:
        return np.asarray(x, np.int64) if np.ndim(x) else np.int64(x)

    def array(self, x: Any) -> Array:
        x = np.asarray(x, order="C")
        if x.dtype == np.bool_ or (x.size and (x.min() < INT_MIN or x.max() > INT_MAX)):
            return x  # ids wider than int32 keep their width
        return x.astype(np.int32, copy=False)

    def least(self, x: Array) -> Array:
        return x.min(-1)

    def most(self, x: Array) -> Array:
        return x.max(-1)

    def total(self, x: Array) -> Array:
        return x.sum(-1)

    def descending(self, x: Array) -> Array:
        return np.argsort(-x, -1, kind="stable").astype(np.int32)


HOST = Host()


class Int(NamedTuple):
    """lo <= value <= hi all over the tile; a point (`lo is hi`) is the same all over it."""

    lo: Array
    hi: Array


class Bool(NamedTuple):
    """Whether a condition may hold somewhere in the tile, and whether it holds everywhere."""

    possible: Array
    certain: Array


class Rules:
    """One operation on intervals: what each step of a tree makes of what its arguments are."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops
        self._numbers: dict[int, Array] = {}
        self._known: dict[int, int] = {}
        self._made: dict[tuple[str, int, int], tuple[Array, Array, Array]] = {}

    def begin(self) -> None:
        """Forget what was made of the last tiles' arrays."""
        self._made.clear()

    def number(self, value: int) -> Array:
        if value not in self._numbers:
            self._numbers[value] = self.ops.index(value)
            self._known[id(self._numbers[value])] = value
        return self._numbers[value]

    def least(self, x: Array, y: Array) -> Array:
        """The smaller one; of an array and itself that array."""
        return x if x is y else self.ops.minimum(x, y)

    def most(self, x: Array, y: Array) -> Array:
        """The larger one."""
        return x if x is y else self.ops.maximum(x, y)

    def plus(self, x: Array, y: Array) -> Array:
        """x + y, held within int32: for bounds, where a bound out of range is no bound.

        On a GPU every operation is a launch: numbers are added here, and what has been added
        before, to these very arrays, is not added again.
        """
        return self._once("plus", x, y)

    def minus(self, x: Array, y: Array) -> Array:
        """x - y, held within int32."""
        return self._once("minus", x, y)

    def _once(self, what: str, x: Array, y: Array) -> Array:
        numbers = self._known.get(id(x)), self._known.get(id(y))
        if numbers[1] == 0:
            return x
        if what == "plus" and numbers[0] == 0:
            return y
        if numbers[0] is not None and numbers[1] is not None:
            found = numbers[0] + numbers[1] if what == "plus" else numbers[0] - numbers[1]
            return self.number(max(INT_MIN, min(INT_MAX, found)))
        key = what, id(x), id(y)
        if key not in self._made:
            own = getattr(self.ops, what, None) or getattr(self, f"_{what}")
            self._made[key] = own(x, y), x, y  # held, so that no other array gets their ids
        return self._made[key][0]

    def _plus(self, x: Array, y: Array) -> Array:
        zero, ops = self.number(0), self.ops
        up, down = ops.maximum(y, zero), ops.minimum(y, zero)
        return ops.maximum(ops.minimum(x, INT_MAX - up) + up, INT_MIN - down) + down

    def _minus(self, x: Array, y: Array) -> Array:
        zero, ops = self.number(0), self.ops
        up, down = ops.maximum(y, zero), ops.minimum(y, zero)
        return ops.minimum(ops.maximum(x, INT_MIN + up) - up, INT_MAX + down) - down

    def apply(self, step: Step, args: Sequence[Any], divisor: int | None = None) -> Int | Bool:
        """`divisor` is the second argument where it is a constant."""
        if step.op == "const":
            value = constant(step)
            made = self.ops.array(value) if step.kind == "bool" else self.number(int(value))
            return Bool(made, made) if step.kind == "bool" else Int(made, made)
        if step.op == "cast":
            one, zero = self.number(1), self.number(0)
            lo, hi = (self.ops.where(c, one, zero) for c in (args[0].certain, args[0].possible))
            return Int(lo, lo if args[0].possible is args[0].certain else hi)
        if step.kind == "int":
            found = self._integer(step.op, args, divisor)
            # Points stay points, so that a look-up at one is a plain gather.
            points = all(x[0] is x[1] for x in args)
            return Int(found.lo, found.lo) if points else found
        condition = self._condition(step.op, args)
        points = all(x[0] is x[1] for x in args)
        return Bool(condition.possible, condition.possible) if points else condition

    def _condition(self, op: str, args: Sequence[Any]) -> Bool:
        x = args[0]
        if op == "not":
            return Bool(~x.certain, ~x.possible)
        if op == "where":
            (may, must), y, z = x, args[1], args[2]
            possible = (may & y.possible) | (~must & z.possible)
            certain = (must & y.certain) | (~may & z.certain) | (y.certain & z.certain)
            return Bool(possible, certain)
        y = args[1]
        if op == "and":
            return Bool(x.possible & y.possible, x.certain & y.certain)
        if op == "or":
            return Bool(x.possible | y.possible, x.certain | y.certain)
        if isinstance(x, Bool):
            possible = (x.possible & ~y.certain) | (y.possible & ~x.certain)
            certain = (x.certain & ~y.possible) | (y.certain & ~x.possible)
            return Bool(~certain, ~possible) if op == "eq" else Bool(possible, certain)
        if op in ("gt", "ge"):
            x, y = y, x
        if op in ("lt", "gt"):
            return Bool(x.lo < y.hi, x.hi < y.lo)
        if op in ("le", "ge"):
            return Bool(x.lo <= y.hi, x.hi <= y.lo)
        meet = (x.lo <= y.hi) & (y.lo <= x.hi)
        same = (x.hi <= y.lo) & (y.hi <= x.lo)
        return Bool(meet, same) if op == "eq" else Bool(~same, ~meet)

    def _integer(self, op: str, args: Sequence[Any], divisor: int | None) -> Int:
        ops, x = self.ops, args[0]
        zero = self.number(0)
        if op == "abs":
            apart = ops.maximum(x.lo, 0 - x.hi)
            return Int(ops.maximum(apart, zero), ops.maximum(x.hi, 0 - x.lo))
        if op == "where":
            (may, must), y, z = x, args[1], args[2]
            lo = ops.where(may, ops.minimum(y.lo, z.lo), z.lo)
            hi = ops.where(may, ops.maximum(y.hi, z.hi), z.hi)
            return Int(ops.where(must, y.lo, lo), ops.where(must, y.hi, hi))
        y = args[1]
        if op == "add":
            return Int(x.lo + y.lo, x.hi + y.hi)
        if op == "sub":
            return Int(x.lo - y.hi, x.hi - y.lo)
        if op == "minimum":
            return Int(ops.minimum(x.lo, y.lo), ops.minimum(x.hi, y.hi))
        if op == "maximum":
            return Int(ops.maximum(x.lo, y.lo), ops.maximum(x.hi, y.hi))
        if op == "mul":
            return self._corners(lambda a, c: a * c, x, y)
        if op == "rshift":
            most = self.number(31)
            lo, hi = (ops.minimum(ops.maximum(c, zero), most) for c in y)
            return self._corners(ops.rshift, x, Int(lo, hi))
        if op == "floordiv":
            if divisor is not None and divisor > 0:
                return Int(ops.floordiv(x.lo, y.lo), ops.floordiv(x.hi, y.lo))
            return self._floordiv(x, y)
        if op == "mod":
            return self._mod(x, y)
        if divisor is not None and 0 <= divisor < INT_MAX and divisor & (divisor + 1) == 0:
            low_bits = self.number(divisor + 1)
            return self._mod(x, Int(low_bits, low_bits))
        return self._bits(x, y)

    def _corners(self, fn: Any, x: Int, y: Int) -> Int:
        """A function monotone in each argument takes its extremes at the corners."""
        corners = [fn(a, c) for a in _ends(x) for c in _ends(y)]
        lo = hi = corners[0]
        for corner in corners[1:]:
            lo, hi = self.ops.minimum(lo, corner), self.ops.maximum(hi, corner)
        return Int(lo, hi)

    def _floordiv(self, x: Int, y: Int) -> Int:
        """By an interval: its positive part, its negative part, and 0 where 0 is in it."""
        ops = self.ops
        zero, one, lone = self.number(0), self.number(1), self.number(-1)
        up, down = y.hi > 0, y.lo < 0
        over = self._corners(ops.floordiv, x, Int(ops.maximum(y.lo, one), ops.maximum(y.hi, one)))
        # Where there is no negative part -2 stands for it: INT_MIN // -1 traps on CPUs.
        two = self.number(-2)
        least, most = (ops.where(down, ops.minimum(c, lone), two) for c in y)
        under = self._corners(ops.floordiv, x, Int(least, most))
        naught = (y.lo <= 0) & (y.hi >= 0)
        lo = hi = None
        for holds, lo_part, hi_part in (
            (up, over.lo, over.hi),
            (down, under.lo, under.hi),
            (naught, zero, zero),
        ):
            lo_part = ops.where(holds, lo_part, self.number(INT_MAX))
            hi_part = ops.where(holds, hi_part, self.number(INT_MIN))
            lo = lo_part if lo is None else ops.minimum(lo, lo_part)
            hi = hi_part if hi is None else ops.maximum(hi, hi_part)
        return Int(lo, hi)

    def _mod(self, x: Int, y: Int) -> Int:
        """Exact for a divisor that is a point, while x stays within one quotient."""
        ops = self.ops
        one, lone = self.number(1), self.number(-1)
        lo, hi = ops.minimum(y.lo, lone) + 1, ops.maximum(y.hi, one) - 1
        if y.lo is y.hi:
            # x % -1 and x % 0 are 0 as x % 1 is, and INT_MIN // -1 traps on CPUs.
            safe = ops.where((y.lo <= 0) & (y.lo >= -1), one, y.lo)
            first, last = ops.floordiv(x.lo, safe), ops.floordiv(x.hi, safe)
            same = (last <= first) & (first <= last)
            lo = ops.where(same, x.lo - safe * first, lo)
            return Int(lo, ops.where(same, x.hi - safe * last, hi))
        small = (x.lo >= 0) & (x.hi < y.lo)
        hi = ops.where((x.lo >= 0) & (y.lo > 0), ops.minimum(hi, x.hi), hi)
        return Int(ops.where(small, x.lo, lo), ops.where(small, x.hi, hi))

    def _bits(self, x: Int, y: Int) -> Int:
        """x & y: what is not negative bounds it, and two points give it."""
        ops = self.ops
        zero, least = self.number(0), self.number(INT_MIN)
        plain = (x.lo >= 0) | (y.lo >= 0)
        lo = ops.where(plain, zero, least)
        hi = ops.where(x.lo >= 0, x.hi, ops.maximum(x.hi, y.hi))
        hi = ops.where(y.lo >= 0, ops.where(x.lo >= 0, ops.minimum(x.hi, y.hi), y.hi), hi)
        points = (x.hi <= x.lo) & (y.hi <= y.lo)
        both = x.lo & y.lo
        return Int(ops.where(points, both, lo), ops.where(points, both, hi))


def _ends(x: Int) -> tuple[Array, ...]:
    return (x.lo,) if x.lo is x.hi else (x.lo, x.hi)
