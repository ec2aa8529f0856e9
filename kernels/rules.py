"""What the language means where Triton means something else, as device functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floordiv(x, y):
    """Floor of the quotient; Triton's own `//` truncates. y is never 0."""
    quotient = x // y
    rest = x - quotient * y
    return quotient - ((rest != 0) & ((rest < 0) != (y < 0))).to(x.dtype)


@triton.jit
def mod(x, y):
    """x minus y times that floor."""
    return x - y * floordiv(x, y)


@triton.jit
def divide(x, y):
    """Rounded as IEEE says; Triton's own `/` of float32 is 2 units off."""
    return tl.div_rn(x, y)


@triton.jit
def over(x, y, inverse):
    """The same by a constant whose inverse is known and neither is extreme: no division at all.

    What the first quotient leaves of x, exact as it is, corrects it.
    """
    quotient = x * inverse
    rest = tl.fma(-y, quotient, x)
    # Infinity less infinity is no rest.
    return tl.where(tl.abs(quotient) < float("inf"), tl.fma(rest, inverse, quotient), quotient)


@triton.jit
def tanh(x):
    """To a few units in the last place, at small x too, without a library of the device's."""
    size = tl.abs(x)
    squared = x * x
    # The series where 1 - exp(-2x) would cancel; its next term is below 9e-9 there.
    series = 62.0 / 2835.0 * squared - 17.0 / 315.0
    series = series * squared + 2.0 / 15.0
    series = series * squared - 1.0 / 3.0
    small = size + size * squared * series
    e = tl.exp2(size * -2.8853900817779268)
    # A root and its square are half of what a division takes.
    root = tl.rsqrt(1.0 + e)
    large = (1.0 - e) * (root * root)
    found = tl.where(size < 0.25, small, large)
    return tl.where(x < 0, -found, found)


@triton.jit
def widened(x):
    """A value of a table: floats as float32, integers as they are, at least int32."""
    # One way out: what stands behind a return is compiled as well, and must be of its type.
    if x.dtype.is_floating():
        found = x.to(tl.float32)
    elif x.dtype.primitive_bitwidth < 32:
        found = x.to(tl.int32)
    else:
        found = x
    return found


@triton.jit
def least(x):
    """Of what each tile reads, (entries, tiles, entries): (tiles,)."""
    return tl.min(side_by_side(x), 1)


@triton.jit
def greatest(x):
    """As `least`."""
    return tl.max(side_by_side(x), 1)


@triton.jit
def side_by_side(x):
    """(entries, tiles, entries) as (tiles, entries): where each stands stays as it is."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (x.shape[1], x.shape[0] * x.shape[2]))
