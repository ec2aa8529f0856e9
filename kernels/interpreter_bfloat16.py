"""bfloat16 in Triton's interpreter, which takes its 16 bits for an integer.

It cuts off what should be rounded, and multiplies and adds the bits. Here they are told apart:

conversions   from and to float32, rounded to the nearest, ties to even; NaN stays NaN
products      `tl.dot` of what the bits stand for: exact in float32, and added up in it
all else      arithmetic, comparisons, sums, maxima, other conversions: refused, since the bits
              would be taken for a number again. Kernels widen first; choosing and moving are fine.

These are functions within Triton, which other versions may have otherwise: where one is missing
nothing is replaced, and `RIGHT` is False.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

_BUILDER = interpreter.InterpreterBuilder
_NEEDED = ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_fma", "create_dot")
_PLAIN = {name: getattr(_BUILDER, name, None) for name in _NEEDED}
_reduced = getattr(interpreter.ReduceOps, "apply_impl", None)

RIGHT = all((*_PLAIN.values(), _reduced))
"""Whether kernels may be given bfloat16 here, once `replace` has been called."""


def widened(bits: Any) -> Any:
    """float32 of bfloat16's bits, which are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(numbers: Any) -> Any:
    """bfloat16's bits of float32: the nearest, of two the even one."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    # Half a unit, less one bit where the unit's own bit is 0. It carries into the exponent.
    nearest = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    quiet = bits | 0x400000  # NaN, whose payload might carry away
    return (np.where(np.isnan(numbers), quiet, nearest) >> 16).astype(np.uint16)


def _is(*values: Any) -> bool:
    return any(x.dtype.scalar is tl.bfloat16 for x in values)


def _refused(what: str) -> NotImplementedError:
    return NotImplementedError(
        "bfloat16 must be float32 before anything but tl.dot, tl.where, loads and stores in "
        f"Triton's interpreter. Got {what}."
    )


def _converted(src: Any, dst_type: Any, rounding: Any = None) -> Any:
    old, new = src.dtype.scalar, dst_type.scalar
    if old is new:
        return src
    if (old, new) == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(widened(src.data), new)
    if (old, new) == (tl.float32, tl.bfloat16) and rounding in (None, ir.ROUNDING_MODE.RTNE):
        return interpreter.TensorHandle(narrowed(src.data), new)
    raise _refused(f"a conversion from {old} to {new}, {rounding or 'rounded to the nearest'}")


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return _converted(src, dst_type)
    return _PLAIN["cast_impl"](self, src, dst_type)  # type: ignore[misc]


def _rounded(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return _converted(src, dst_type, rounding)
    return _PLAIN["create_fp_to_fp"](self, src, dst_type, rounding)  # type: ignore[misc]


def _binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    if _is(lhs, rhs):
        raise _refused(op.__name__)
    return _PLAIN["binary_op"](self, lhs, rhs, op)  # type: ignore[misc]


def _unary(self: Any, arg: Any, op: Any) -> Any:
    if _is(arg):
        raise _refused(op.__name__)
    return _PLAIN["unary_op"](self, arg, op)  # type: ignore[misc]


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if _is(x, y, z):
        raise _refused("fma")
    return _PLAIN["create_fma"](self, x, y, z)  # type: ignore[misc]


def _dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    if _is(d):
        raise _refused("a product added up in bfloat16")
    a, b = (interpreter.TensorHandle(widened(x.data), tl.float32) if _is(x) else x for x in (a, b))
    return _PLAIN["create_dot"](self, a, b, d, *precision)  # type: ignore[misc]


def _reduce(self: Any, input: Any) -> Any:
    if any(x.dtype.scalar is tl.bfloat16 for x in input):
        raise _refused("a reduction")
    return _reduced(self, input)  # type: ignore[misc]


def replace() -> None:
    """Once, where kernels are interpreted."""
    if not RIGHT:
        return
    for name, new in zip(_NEEDED, (_cast, _rounded, _binary, _unary, _fma, _dot), strict=True):
        setattr(_BUILDER, name, new)
    interpreter.ReduceOps.apply_impl = _reduce
