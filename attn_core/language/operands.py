"""Operands: the arrays and host numbers that a mask or score looks values up in.

`slopes = attn_core.operand(array)` stands outside the function, `slopes[h]` within it writes a
look-up onto the tape. The tree keeps the operand's number alone; the array travels beside query,
key and value, so another array of the same kind needs no new trace.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_core.language.expr import Expr, Traced, array_kind, position, tape_of
from attn_core.language.tree import INT_MAX, INT_MIN, Tape


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


class Operand(Traced):
    """An array that masks and scores look values up in, `table[b, q]`.

    Every look-up names one index for each axis. Indices are clamped to [0, size - 1], so a
    negative one reads the first entry, and an axis of size 1 broadcasts.
    """

    __slots__ = ("_bounds", "array", "kind")

    def __init__(self, array: Any, bounds: tuple[int, int] | None = None) -> None:
        if isinstance(array, (list, tuple, int, float)):
            array = table(array)
        elif isinstance(array, np.generic):
            array = np.asarray(array)
        if getattr(array, "is_nested", False):  # torch's have no one shape, and some raise at it
            raise TypeError(
                "`array` must be of one shape. Got a nested tensor: pad it, with "
                "torch.nested.to_padded_tensor(array, 0)."
            )
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
        return self.looked_up(tape_of(*given), given)

    def looked_up(self, tape: Tape, given: Any) -> Expr:
        """The look-up on this tape, of one index for each axis."""
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

    __eq__ = __ne__ = __bool__ = _position = _unread

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

    Raises:
        TypeError: it is no array of booleans, integers or floats, or `bounds` are given of floats.
        ValueError: a value on the host is out of `bounds`.

    Example::

        slopes = attn_core.operand(array)
        attn_core.score(lambda s, b, h, q, k: s - slopes[h] * abs(q - k))
    """
    return Operand(array, bounds)
