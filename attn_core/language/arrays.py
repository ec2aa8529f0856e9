"""The array reading: a tree as values over a tile of indices, in any array library.

`ArrayReading` holds what every library spells alike (Python's own operators) and the rules that
must not differ between them: `//` and `%` floor, division by zero gives 0, look-ups clamp, casts
truncate and saturate. A backend subclasses it in its `arrays.py` with the dozen functions that
libraries name differently.

A score is read under a guard, the boolean array of allowed positions. Where a position is not
allowed, the arguments of every operation with a derivative of its own are replaced by a harmless
constant, so that NaN or Inf there (poison) reaches neither the value nor, through 0 * NaN, a
gradient, in any order of differentiation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attn_core.language.tree import INT_MAX, INT_MIN, Step, Tree

Array = Any

# One more than int32's maximum, which is no float32 itself.
_TOO_LARGE = 2147483648.0


class ArrayReading:
    """Reads trees with one library's arrays; subclasses give the functions marked below."""

    def __init__(self, guard: Array | None = None) -> None:
        self.guard = guard

    def read(
        self, tree: Tree, indices: Mapping[str, Array], operands: Sequence[Array]
    ) -> list[Array]:
        """Values of the tree's results; `indices` maps b, h, q, k, row (and s) to arrays."""
        values: list[Array] = []
        for step in tree.steps:
            args = [values[a] for a in step.args]
            if step.op == "index":
                values.append(indices[str(step.value)])
            elif step.op == "const":
                values.append(self.const(step.kind, constant(step)))
            elif step.op == "lookup":
                values.append(self.lookup(operands[int(step.value or 0)], args))
            elif step.op == "cast":
                values.append(self.cast(args[0], tree.steps[step.args[0]].kind, step.kind))
            elif step.kind == "float":
                values.append(self.float_op(step.op, args))
            else:
                values.append(self.exact_op(step.op, args))
        return [values[at] for at in tree.results]

    def exact_op(self, op: str, args: list[Array]) -> Array:
        """Integers and booleans."""
        x = args[0]
        if op == "abs":
            return self.absolute(x)
        if op == "not":
            return ~x
        if op == "where":
            return self.where(x, args[1], args[2])
        y = args[1]
        if op == "add":
            return x + y
        if op == "sub":
            return x - y
        if op == "mul":
            return x * y
        if op in ("floordiv", "mod"):
            zero = y == 0
            divide = self.int_floordiv if op == "floordiv" else self.int_mod
            return self.where(zero, self.zeros_like(x * y), divide(x, self.where(zero, y + 1, y)))
        if op == "minimum":
            return self.where(y < x, y, x)
        if op == "maximum":
            return self.where(y > x, y, x)
        if op == "and":
            return x & y
        if op == "or":
            return x | y
        if op == "xor":
            return x ^ y
        if op == "rshift":
            count = self.where(y < 0, self.zeros_like(y), self.where(y > 31, 0 * y + 31, y))
            return self.int_rshift(x, count)
        return self.compare(op, x, y)

    def compare(self, op: str, x: Array, y: Array) -> Array:
        if op == "lt":
            return x < y
        if op == "le":
            return x <= y
        if op == "gt":
            return x > y
        if op == "ge":
            return x >= y
        return self.equal(x, y) if op == "eq" else self.not_equal(x, y)

    def float_op(self, op: str, args: list[Array]) -> Array:
        """Floats, in the accumulation dtype."""
        x = args[0]
        if op == "where":
            return self.where(x, args[1], args[2])
        if op == "add":
            return x + args[1]
        if op == "sub":
            return x - args[1]
        x = self.safe(x)
        if op == "abs":
            return self.absolute(x)
        if op == "exp":
            return self.exp(x)
        if op == "log":
            return self.log(self.safe(x, 1.0))
        if op == "tanh":
            return self.tanh(x)
        y = self.safe(args[1])
        if op == "mul":
            return x * y
        if op in ("minimum", "maximum"):
            # At a tie each side must get half of the gradient, in every framework; NaN is neither
            # less nor more, and x + y hands it on.
            first, second = (x, y) if op == "minimum" else (y, x)
            tie = self.where(x == y, 0.5 * x + 0.5 * y, x + y)
            return self.where(x < y, first, self.where(x > y, second, tie))
        zero = y == 0
        divisor = self.where(zero, 0 * y + 1, y)
        if op == "div":
            return self.where(zero, self.zeros_like(x * y), x / divisor)
        floor = self.floor(x / divisor)
        whole = floor if op == "floordiv" else x - divisor * floor
        return self.where(zero, self.zeros_like(x * y), whole)

    def safe(self, x: Array, fill: float = 0.0) -> Array:
        """`x` where the guard allows it, `fill` elsewhere."""
        if self.guard is None:
            return x
        other = self.zeros_like(x)
        return self.where(self.guard, x, other + fill if fill else other)

    def cast(self, x: Array, source: str, kind: str) -> Array:
        if source == "float" and kind == "int":
            x = self.stop_gradient(x)
            whole = self.truncate(self.where(x != x, self.zeros_like(x), x))
            least = self.zeros_like(whole) + float(INT_MIN)
            low = self.where(whole < float(INT_MIN), least, whole)
            inside = self.where(low >= _TOO_LARGE, self.zeros_like(low), low)
            cast = self.as_int(inside)
            return self.where(low >= _TOO_LARGE, 0 * cast + INT_MAX, cast)
        return self.as_float(x) if kind == "float" else self.as_int(x)

    # The functions that libraries name differently.

    def const(self, kind: str, value: Any) -> Array:
        """A constant as an array of that kind."""
        raise NotImplementedError

    def lookup(self, table: Array, index: Sequence[Array]) -> Array:
        """The table's values at these indices, clamped to [0, size - 1]."""
        raise NotImplementedError

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """X where the condition holds, y elsewhere."""
        raise NotImplementedError

    def zeros_like(self, x: Array) -> Array:
        """Zeros of the shape and dtype of x."""
        raise NotImplementedError

    def equal(self, x: Array, y: Array) -> Array:
        """Entrywise."""
        raise NotImplementedError

    def not_equal(self, x: Array, y: Array) -> Array:
        """Entrywise."""
        raise NotImplementedError

    def int_floordiv(self, x: Array, y: Array) -> Array:
        """Floor of the quotient; y is never 0."""
        raise NotImplementedError

    def int_mod(self, x: Array, y: Array) -> Array:
        """X minus y times that floor; y is never 0."""
        raise NotImplementedError

    def int_rshift(self, x: Array, count: Array) -> Array:
        """Arithmetic shift; 0 <= count <= 31."""
        raise NotImplementedError

    def absolute(self, x: Array) -> Array:
        """Slope 0 at 0."""
        raise NotImplementedError

    def exp(self, x: Array) -> Array:
        raise NotImplementedError

    def log(self, x: Array) -> Array:
        """Natural."""
        raise NotImplementedError

    def tanh(self, x: Array) -> Array:
        raise NotImplementedError

    def floor(self, x: Array) -> Array:
        raise NotImplementedError

    def truncate(self, x: Array) -> Array:
        """Towards zero."""
        raise NotImplementedError

    def stop_gradient(self, x: Array) -> Array:
        """X, constant under differentiation."""
        raise NotImplementedError

    def as_int(self, x: Array) -> Array:
        """Int32, or the reading's wider integer."""
        raise NotImplementedError

    def as_float(self, x: Array) -> Array:
        """The accumulation dtype."""
        raise NotImplementedError


def constant(step: Step) -> bool | int | float:
    """The Python number that a constant step holds as text."""
    if step.kind == "bool":
        return step.value == "True"
    return int(step.value or 0) if step.kind == "int" else float(step.value or 0)
