"""Expressions: what a mask or score function sees in place of numbers.

`mask(lambda b, h, q, k: q >= k)` calls the lambda once, with one `Expr` for each index. Operators
on them write steps onto a tape (`tree.Tape`). Whatever Python cannot hand over as an operator
(`and`, `if`, chained comparisons, `bool()`, iteration, indexing a foreign array) raises with the
spelling that works, because the alternative is a mask that silently means something else.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from attn_core.language.tree import INT_MAX, INT_MIN, Tape


class _Tracing(threading.local):
    """The tape being written in this thread; set from the start: torch.compile guards on it."""

    def __init__(self) -> None:
        self.tape: Tape | None = None


_TRACING = _Tracing()


def current_tape() -> Tape:
    """The tape of the function being traced in this thread."""
    tape = _TRACING.tape
    if tape is None:
        raise TypeError(
            "`row` and operands must be used inside a function given to attn_core.mask or "
            "attn_core.score. Got a use outside of one."
        )
    return tape


def set_tape(tape: Tape | None) -> Tape | None:
    """Make `tape` the current one; returns the one it replaces."""
    previous = _TRACING.tape
    _TRACING.tape = tape
    return previous


def array_kind(array: Any) -> str:
    """ "bool", "int" or "float" for an array of any framework, read off its dtype's name."""
    # str() of a NumPy dtype that is not in native byte order is a code such as ">i4".
    name = array.dtype.name if isinstance(array, np.ndarray) else str(array.dtype)
    for kind in ("bool", "uint", "int", "float"):
        if kind in name:
            return "int" if kind == "uint" else kind
    raise TypeError(f"an operand must hold booleans, integers or floats. Got dtype {name}.")


class Expr:
    """A value in a mask or score: an index, or something computed from indices."""

    __slots__ = ("_at", "_tape")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # numpy hands `array * expr` to us instead of looping over it
    __array_priority__ = 1e6

    def __init__(self, tape: Tape | None, at: int) -> None:
        self._tape = tape
        self._at = at

    # Arithmetic.
    def __add__(self, other: Any) -> Expr:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Expr:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Expr:
        return apply("sub", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return apply("sub", other, self)

    def __mul__(self, other: Any) -> Expr:
        return apply("mul", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return apply("mul", other, self)

    def __truediv__(self, other: Any) -> Expr:
        return apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return apply("div", other, self)

    def __floordiv__(self, other: Any) -> Expr:
        return apply("floordiv", self, other)

    def __rfloordiv__(self, other: Any) -> Expr:
        return apply("floordiv", other, self)

    def __mod__(self, other: Any) -> Expr:
        return apply("mod", self, other)

    def __rmod__(self, other: Any) -> Expr:
        return apply("mod", other, self)

    def __rshift__(self, other: Any) -> Expr:
        return apply("rshift", self, other)

    def __rrshift__(self, other: Any) -> Expr:
        return apply("rshift", other, self)

    def __neg__(self) -> Expr:
        return apply("sub", 0, self)

    def __pos__(self) -> Expr:
        return self

    def __abs__(self) -> Expr:
        return apply("abs", self)

    # Comparisons.
    def __lt__(self, other: Any) -> Expr:
        return apply("lt", self, other)

    def __le__(self, other: Any) -> Expr:
        return apply("le", self, other)

    def __gt__(self, other: Any) -> Expr:
        return apply("gt", self, other)

    def __ge__(self, other: Any) -> Expr:
        return apply("ge", self, other)

    def __eq__(self, other: Any) -> Expr:  # type: ignore[override]
        return apply("eq", self, other)

    def __ne__(self, other: Any) -> Expr:  # type: ignore[override]
        return apply("ne", self, other)

    # Logic.
    def __and__(self, other: Any) -> Expr:
        return apply("and", self, other)

    def __rand__(self, other: Any) -> Expr:
        return apply("and", other, self)

    def __or__(self, other: Any) -> Expr:
        return apply("or", self, other)

    def __ror__(self, other: Any) -> Expr:
        return apply("or", other, self)

    def __xor__(self, other: Any) -> Expr:
        return apply("xor", self, other)

    def __rxor__(self, other: Any) -> Expr:
        return apply("xor", other, self)

    def __invert__(self) -> Expr:
        return apply("not", self)

    # What Python would decide at once, and must not.
    def __bool__(self) -> bool:
        raise TypeError(
            "an expression has no truth value while a mask or score is being traced. Write `a & b` "
            "for `a and b`, `a | b` for `a or b`, `~a` for `not a`, `(a < b) & (b < c)` for "
            "`a < b < c`, `attn_core.where(c, x, y)` for `x if c else y`, and attn_core.minimum or "
            "maximum for min or max."
        )

    def __index__(self) -> int:
        raise TypeError(
            "an expression cannot index a foreign array or list. Wrap it outside the function, "
            "`table = attn_core.operand(array)`, and look it up as `table[q]`."
        )

    def __float__(self) -> float:
        raise TypeError(
            "an expression must not be turned into a Python number. Write "
            "attn_core.cast(x, float), and attn_core.exp, log or tanh for those of the math module."
        )

    def __int__(self) -> int:
        raise TypeError(
            "an expression must not be turned into a Python number. Write attn_core.cast(x, int)."
        )

    def __iter__(self) -> Any:
        raise TypeError("an expression must not be iterated over or unpacked: it is one value.")

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "an expression must not be indexed. Only an operand can be: "
            "`table = attn_core.operand(array)`, then `table[q]`."
        )

    def __contains__(self, item: Any) -> bool:
        raise TypeError("`in` must not be used on an expression: it is one value.")

    def __len__(self) -> int:
        raise TypeError("an expression has no length: it is one value.")

    def __repr__(self) -> str:
        from attn_core.language.text import text

        if self._tape is None:
            return "row"
        tree, _ = self._tape.finish(self._at)
        return text(tree)


row = Expr(None, 0)
"""The row i of the query array, where q is the absolute position i + query_offset[b]."""


def position(tape: Tape, x: Any) -> int:
    """Where `x` stands on the tape, written there first when it is a number or scalar array."""
    if isinstance(x, Expr):
        if x._tape is None:
            return tape.index("row")
        if x._tape is not tape:
            raise TypeError(
                "an expression must be used inside the function that made it. Got one that "
                "belongs to another mask or score."
            )
        return x._at
    if isinstance(x, (bool, int, float)):
        return tape.const(x)
    if isinstance(x, np.generic):
        return tape.const(x.item())
    if isinstance(x, Operand):
        raise TypeError(
            f"an operand must be looked up before it is used, for instance `table[q]`. Got one of "
            f"shape {x.shape} as it is."
        )
    shape = getattr(x, "shape", None)
    if shape is not None and hasattr(x, "dtype"):
        if len(shape) == 0:
            # A scalar array or tracer: its value may change from call to call, so it travels as
            # an operand instead of being frozen into the tree.
            return tape.lookup(x, array_kind(x), ())
        raise TypeError(
            f"an array of shape {tuple(shape)} must be wrapped before a mask or score uses it: "
            "`table = attn_core.operand(array)`, then `table[q]`."
        )
    raise TypeError(
        f"a mask or score must compute with expressions, numbers and operands. "
        f"Got {type(x).__name__}."
    )


def apply(op: str, *xs: Any) -> Expr:
    """`op` over expressions and numbers, on the tape that the expressions belong to."""
    tape = None
    for x in xs:
        if isinstance(x, Expr) and x._tape is not None:
            tape = x._tape
            break
    if tape is None:
        tape = current_tape()
    return Expr(tape, tape.apply(op, *[position(tape, x) for x in xs]))


def minimum(x: Any, y: Any) -> Expr:
    """The smaller of two values; at a tie the gradient goes half and half."""
    return apply("minimum", x, y)


def maximum(x: Any, y: Any) -> Expr:
    """The larger of two values; at a tie the gradient goes half and half."""
    return apply("maximum", x, y)


def where(condition: Any, x: Any, y: Any) -> Expr:
    """`x` where the condition holds, `y` elsewhere."""
    return apply("where", condition, x, y)


def exp(x: Any) -> Expr:
    """e to the x. Scores only: masks hold integer and boolean arithmetic."""
    return apply("exp", x)


def log(x: Any) -> Expr:
    """Natural logarithm. Scores only: masks hold integer and boolean arithmetic."""
    return apply("log", x)


def tanh(x: Any) -> Expr:
    """Hyperbolic tangent. Scores only: masks hold integer and boolean arithmetic."""
    return apply("tanh", x)


def cast(x: Any, kind: type | str) -> Expr:
    """`x` as int (truncated, saturated at int32, NaN to 0), float (accumulation dtype) or bool."""
    names: dict[Any, str] = {int: "int", float: "float", bool: "bool"}
    name = names.get(kind, kind)
    if name not in ("int", "float", "bool"):
        raise TypeError(f"`kind` must be int, float or bool. Got {kind!r}.")
    if name == "bool":
        return apply("ne", x, 0)
    tape = x._tape if isinstance(x, Expr) and x._tape is not None else current_tape()
    return Expr(tape, tape.cast(position(tape, x), name))


class Table:
    """Host numbers as an operand: nested lists, kept as Python numbers until a backend reads them.

    A float table has no dtype of its own: like any Python number it takes the accumulation dtype.
    Being made of Python numbers, it can be made inside torch.compile, where NumPy arrays cannot.
    """

    __slots__ = ("kind", "shape", "values")

    def __init__(self, values: tuple[Any, ...], shape: tuple[int, ...], kind: str) -> None:
        self.values = values
        self.shape = shape
        self.kind = kind

    @property
    def dtype(self) -> str:
        return {"bool": "bool", "int": "int32", "float": "float64"}[self.kind]

    def numpy(self, accumulation: str = "float32") -> np.ndarray:
        """The numbers as an array: bool, int32 or the accumulation dtype."""
        dtype = accumulation if self.kind == "float" else self.dtype
        return np.array(self.values, dtype).reshape(self.shape)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Table) and (self.kind, self.shape, self.values) == (
            other.kind,
            other.shape,
            other.values,
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.shape, self.values))

    def __repr__(self) -> str:
        return f"table({self.kind}, shape={self.shape})"


def table(nested: Any) -> Table:
    """A Table of a number or of nested lists of them.

    Raises:
        TypeError: it holds anything but numbers, or its lists are of unequal lengths.
        ValueError: an integer does not fit int32.
    """
    rows, shape = [nested], []
    while isinstance(rows[0], (list, tuple)):
        size = len(rows[0])
        if not all(isinstance(r, (list, tuple)) and len(r) == size for r in rows):
            raise TypeError("a nested list must have lists of equal lengths at every level.")
        shape.append(size)
        rows = [x for r in rows for x in r]
        if not rows:
            return Table((), tuple(shape), "float")
    rows = [x.item() if isinstance(x, np.generic) else x for x in rows]
    if all(isinstance(x, bool) for x in rows):
        return Table(tuple(rows), tuple(shape), "bool")
    for x in rows:
        if not isinstance(x, (int, float)):
            raise TypeError(f"a list must hold numbers to be an operand. Got {type(x).__name__}.")
        if isinstance(x, int) and not INT_MIN <= x <= INT_MAX:
            raise ValueError(f"integers must fit int32. Got {x}.")
    if any(isinstance(x, float) for x in rows):
        return Table(tuple([float(x) for x in rows]), tuple(shape), "float")
    return Table(tuple([int(x) for x in rows]), tuple(shape), "int")


class Operand:
    """An array that masks and scores look values up in, `table[b, q]`.

    Every look-up names one index for each axis. Indices are clamped to [0, size - 1], so a
    negative one reads the first entry, and an axis of size 1 broadcasts.
    """

    __slots__ = ("_bounds", "array", "kind")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None

    def __init__(self, array: Any, bounds: tuple[int, int] | None = None) -> None:
        if isinstance(array, (list, tuple, int, float)):
            array = table(array)
        elif isinstance(array, np.generic):
            array = np.asarray(array)
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise TypeError(
                f"`array` must be a list, a NumPy array or a framework's array. "
                f"Got {type(array).__name__}."
            )
        self.array = array
        self.kind = array_kind(array)
        self._bounds = None if bounds is None else self._checked(bounds)

    def _checked(self, bounds: tuple[int, int]) -> tuple[int, int]:
        if self.kind != "int":
            raise TypeError(f"`bounds` must go with an integer array. Got {self.kind}s.")
        low, high = int(bounds[0]), int(bounds[1])
        if not INT_MIN <= low <= high <= INT_MAX:
            raise ValueError(f"`bounds` must be (low, high) within int32. Got {bounds}.")
        host = self.array.numpy() if isinstance(self.array, Table) else self.array
        if isinstance(host, np.ndarray) and host.size:
            least, most = int(host.min()), int(host.max())
            if least < low or most > high:
                raise ValueError(
                    f"`array` must stay within its bounds ({low}, {high}). Got values from "
                    f"{least} to {most}."
                )
        return low, high

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.array.shape)

    def __getitem__(self, index: Any) -> Expr:
        given = index if isinstance(index, tuple) else (index,)
        axes = len(self.array.shape)
        if len(given) != axes:
            raise TypeError(
                f"an operand of shape {self.shape} must be looked up with {axes} indices, one for "
                f"each axis. Got {len(given)}."
            )
        tape = current_tape()
        at = [self._index(tape, i) for i in given]
        found = tape.lookup(self.array, self.kind, at)
        if self._bounds is not None:
            found = tape.apply("maximum", found, tape.const(self._bounds[0]))
            found = tape.apply("minimum", found, tape.const(self._bounds[1]))
        return Expr(tape, found)

    @staticmethod
    def _index(tape: Tape, index: Any) -> int:
        if isinstance(index, (slice, type(None), type(...))):
            raise TypeError(f"an operand must be indexed with expressions. Got {index!r}.")
        at = position(tape, index)
        step = tape.steps[at]
        if step.kind != "int":
            raise TypeError(f"an operand must be indexed with integers. Got a {step.kind}.")
        if step.op == "const" and int(step.value or 0) < 0:
            raise TypeError(
                f"a constant index must not be negative: look-ups do not wrap. Got {step.value}."
            )
        return at

    def __iter__(self) -> Any:
        raise TypeError("an operand must be looked up with expressions, not iterated over.")

    def _unread(self, other: Any = None) -> Any:
        """Python would compare identities, or take any object for true, without a word."""
        raise TypeError(
            "an operand must be looked up before it is used, for instance `table[q]`. Got one of "
            f"shape {self.shape} as it is."
        )

    __eq__ = __ne__ = __bool__ = _unread

    def __repr__(self) -> str:
        return f"operand({self.kind}, shape={self.shape})"


def operand(array: Any, bounds: tuple[int, int] | None = None) -> Operand:
    """Wrap an array so that a mask or score can look values up in it.

    Args:
        array: list, NumPy array or array of the framework in use; booleans, integers or floats,
            any rank. It may be traced, and a float one receives a gradient from a score.
        bounds: (low, high) of an integer array, both inclusive. Arithmetic on looked-up integers
            must provably stay within int32, and this is how you say that it does. Values on the
            host are checked against it, traced ones are clamped to it.

    Example::

        slopes = attn_core.operand(array)
        attn_core.score(lambda s, b, h, q, k: s - slopes[h] * abs(q - k))
    """
    return Operand(array, bounds)
