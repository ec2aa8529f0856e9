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

from attn_core.language.tree import Tape


class Outside(TypeError):
    """`row` or an operand has been used where no expression says which tape is written."""


class _Tracing(threading.local):
    """The tape being written in this thread; set from the start: torch.compile guards on it."""

    def __init__(self) -> None:
        self.tape: Tape | None = None


_TRACING = _Tracing()


def current_tape() -> Tape:
    """The tape of the function being traced in this thread."""
    tape = _TRACING.tape
    if tape is None:
        raise Outside(
            "`row` and operands must be used inside a function given to attn_core.mask or "
            "attn_core.score. Got a use outside of one."
        )
    return tape


def tape_is_set() -> bool:
    return _TRACING.tape is not None


def set_tape(tape: Tape | None) -> Tape | None:
    """Make `tape` the current one; returns the one it replaces."""
    previous = _TRACING.tape
    _TRACING.tape = tape
    return previous


def array_kind(array: Any) -> str:
    """ "bool", "int" or "float" for an array of any framework, read off its dtype's name."""
    # str() of a NumPy dtype that is not in native byte order is a code such as ">i4".
    name = array.dtype.name if isinstance(array, np.ndarray) else str(array.dtype)
    for kind in ("bool", "int", "float"):
        if kind in name:
            return kind
    raise TypeError(f"an operand must hold booleans, integers or floats. Got dtype {name}.")


class Traced:
    """What a function that is traced may hold: an expression, or an operand to look up."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # numpy hands `array * expr` to us instead of looping over it

    def _position(self, tape: Tape, /) -> int:
        """Where it stands on the tape, or the error that says why it cannot."""
        raise NotImplementedError


class Expr(Traced):
    """A value in a mask or score: an index, or something computed from indices."""

    __slots__ = ("_at", "_tape")
    __array_priority__ = 1e6  # what TensorFlow asks instead, in its NumPy mode

    def __init__(self, tape: Tape | None, at: int) -> None:
        self._tape = tape
        self._at = at

    def _position(self, tape: Tape, /) -> int:
        if self._tape is None:
            return tape.index("row")
        if self._tape is not tape:
            raise TypeError(
                "an expression must be used inside the function that made it. Got one that "
                "belongs to another mask or score."
            )
        return self._at

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

    def __pow__(self, other: Any) -> Expr:
        raise TypeError(
            "`**` is not part of the language, since frameworks round powers in different ways. "
            "Write `s * s` for `s ** 2`, and in a score `attn_core.exp(n * attn_core.log(x))` for "
            "`x ** n` of an x above 0."
        )

    __rpow__ = __pow__

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
        # torch asks for the length of whatever indexes a tensor.
        raise TypeError(
            "an expression has no length: it is one value. If it is to index a tensor, wrap that "
            "outside the function, `table = attn_core.operand(array)`, and look it up as "
            "`table[q]`."
        )

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
    if isinstance(x, Traced):
        return x._position(tape)
    if isinstance(x, (bool, int, float)):
        return tape.const(x)
    if isinstance(x, np.generic):
        return tape.const(x.item())
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
    # An integer that is no int, such as torch's SymInt while torch.export traces: a constant has
    # one value, and who would export for all sizes must not lose them without a word.
    hint = ": take its value outside, operator.index(x)" if hasattr(x, "__index__") else ""
    raise TypeError(
        f"a mask or score must compute with expressions, numbers and operands. "
        f"Got {type(x).__name__}{hint}."
    )


def tape_of(*xs: Any) -> Tape:
    """The tape of the first expression that has one; `row` and numbers take the current one."""
    for x in xs:
        if isinstance(x, Expr) and x._tape is not None:
            return x._tape
    return current_tape()


def apply(op: str, *xs: Any) -> Expr:
    """`op` over expressions and numbers, on the tape that the expressions belong to."""
    tape = tape_of(*xs)
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
    """`x` as int (truncated, saturated at int32, NaN to 0), float (accumulation dtype) or bool.

    Raises:
        TypeError: `kind` is none of these.
    """
    names: dict[Any, str] = {int: "int", float: "float", bool: "bool"}
    name = names.get(kind, kind)
    if name not in ("int", "float", "bool"):
        raise TypeError(f"`kind` must be int, float or bool. Got {kind!r}.")
    if name == "bool":
        return apply("ne", x, 0)
    tape = tape_of(x)
    return Expr(tape, tape.cast(position(tape, x), name))
