"""Look-ups over ranges of indices: the least and the greatest value an operand has there.

Halving an axis again and again, each time keeping the minimum (or maximum) of two neighbours,
gives a pyramid of twice the operand's size. The range [l, r] is then covered by at most two nodes
of each level, as in a segment tree read from the bottom up::

    level 0   . l x x x x x r .      take l and r, go on with what lies between
    level 1     .   x   x   .        ((l + 1) // 2, (r - 1) // 2), until l > r

Overlaps do no harm to a minimum, so both ends are always taken and no index is ever tested for
being odd. After s steps the ends are ceil(l / 2**s) and floor((r + 1) / 2**s) - 1, so all levels
are read at once, along a new last axis, from one array that holds them end to end. Several range
axes nest. Axes at a point are gathered, as b and h always are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from attn_core.language.tree import INT_MAX, INT_MIN, Tree

Array = Any


class Ranges:
    """The operands of a tree, with the pyramids that its look-ups have asked for so far."""

    def __init__(
        self, ops: Any, tree: Tree, arrays: Sequence[Array], tile: tuple[int, int]
    ) -> None:
        self.ops, self.tree, self.arrays = ops, tree, arrays
        self.tile = tile
        self._made: dict[Any, Array] = {}

    def lookup(
        self, at: int, index: Sequence[Any], widths: Sequence[int | None]
    ) -> tuple[Array, Array]:
        """(lo, hi) of the look-up at this step; `index` holds an interval for each axis."""
        ops, step = self.ops, self.tree.steps[at]
        number = int(step.value or 0)
        if None in tuple(self.arrays[number].shape):
            # An operand of unknown shape (tf.function) may hold anything.
            if step.kind == "int":
                return ops.index(INT_MIN), ops.index(INT_MAX)
            return ops.array(False), ops.array(True)
        shape = tuple(int(size) for size in self.arrays[number].shape)
        if 0 in shape:
            # Nothing can be read there; 0 and False is what a missing entry counts as.
            zero = ops.index(0) if step.kind == "int" else ops.array(False)
            return zero, zero
        zero = ops.index(0)
        ends: list[tuple[Array, Array]] = []
        ranged: list[int] = []
        for axis, (size, (lo, hi)) in enumerate(zip(shape, index, strict=True)):
            if size == 1:
                ends.append((zero, zero))
                continue
            last = ops.index(size - 1)
            first = ops.minimum(ops.maximum(lo, zero), last)
            if lo is hi:
                ends.append((first, first))
            else:
                ends.append((first, ops.minimum(ops.maximum(hi, zero), last)))
                ranged.append(axis)
        grains = grains_of(self.tree, at, len(shape), ranged, self.tile)
        counts = [self._count(at, axis, shape[axis], grains[axis], widths[axis]) for axis in ranged]
        least = self._query(number, False, grains, ends, ranged, counts)
        if not ranged:
            return least, least
        return least, self._query(number, True, grains, ends, ranged, counts)

    def _count(self, at: int, axis: int, size: int, grain: int, width: int | None) -> int:
        """Levels that a range on this axis can reach; `width` is its hi - lo at most."""
        count = (-(-size // grain)).bit_length()
        if width is None:
            return count
        # q may start within a grain; rows and keys of a tile never do.
        index = self.tree.steps[self.tree.steps[at].args[axis]]
        over = 1 if grain > 1 and index.value == "q" else 0
        return min(count, (width // grain + 1 + over).bit_length())

    def _query(
        self,
        number: int,
        most: bool,
        grains: tuple[int, ...],
        ends: Sequence[tuple[Array, Array]],
        ranged: Sequence[int],
        counts: Sequence[int],
    ) -> Array:
        ops = self.ops
        nodes = self._pyramid(number, most, grains, tuple(ranged))
        sizes = [-(-int(n) // g) for n, g in zip(self.arrays[number].shape, grains, strict=True)]
        inside: Array | None = None
        index: list[tuple[Array, ...]] = []
        for axis, grain in enumerate(grains):
            left, right = ends[axis]
            if axis not in ranged:
                index.append((_widen(left, len(ranged)),))
                continue
            if grain > 1:
                by = ops.index(grain)
                left, right = ops.floordiv(left, by), ops.floordiv(right, by)
            # The levels lie along a last axis of their own.
            place = ranged.index(axis)
            shape = (counts[place],) + (1,) * (len(ranged) - 1 - place)
            lengths = [sizes[axis] >> level for level in range(counts[place])]
            start = ops.index(np.cumsum([0, *lengths[:-1]]).reshape(shape))
            last = ops.index(np.array(lengths).reshape(shape) - 1)
            power = ops.index((1 << np.arange(counts[place])).reshape(shape))
            left, right = _widen(left, len(ranged)), _widen(right, len(ranged))
            left = ops.floordiv(left + power - 1, power)
            right = ops.floordiv(right + 1, power) - 1
            holds, zero = left <= right, ops.index(0)
            inside = holds if inside is None else inside & holds
            index.append(
                tuple(start + ops.minimum(ops.maximum(x, zero), last) for x in (left, right))
            )
        found: Array | None = None
        for corner in product(*index):
            flat = corner[0] if corner else ops.index(0)
            for size, at in zip(nodes.shape[1:], corner[1:], strict=True):
                flat = flat * int(size) + at
            value = ops.take(nodes, flat)
            found = value if found is None else self._pick(most, found, value)
        return found if inside is None else self._reduce(most, found, inside, len(ranged))

    def _reduce(self, most: bool, found: Array, inside: Array, axes: int) -> Array:
        """The extreme over the levels of those nodes that lie inside the range."""
        ops = self.ops
        boolean = _is_bool(found)
        if boolean:
            found = ops.where(found, ops.index(1), ops.index(0))
        # The first level's always do; an end of int32 would not do for wider ids.
        found = ops.where(inside, found, found[(..., *[slice(0, 1)] * axes)])
        for _ in range(axes):
            found = ops.most(found) if most else ops.least(found)
        return found > 0 if boolean else found

    def _pick(self, most: bool, x: Array, y: Array) -> Array:
        if _is_bool(x):
            return x | y if most else x & y
        return self.ops.maximum(x, y) if most else self.ops.minimum(x, y)

    def _base(self, number: int, most: bool, grains: tuple[int, ...]) -> Array:
        """The operand reduced to grains; a last grain that is not whole counts too."""
        key = (number, most, grains)
        if all(grain == 1 for grain in grains):
            return self.arrays[number]
        if key not in self._made:
            array = self.arrays[number]
            for axis, grain in enumerate(grains):
                while grain > 1:
                    size = int(array.shape[axis])
                    if size % 2:
                        last = _slice(array, axis, size - 1, size, 1)
                        array = self.ops.concat([array, last], axis)
                    array = self._halve(array, axis, most)
                    grain //= 2
            self._made[key] = array
        return self._made[key]

    def _pyramid(
        self, number: int, most: bool, grains: tuple[int, ...], ranged: tuple[int, ...]
    ) -> Array:
        """All levels of halving, end to end along each of the range axes."""
        array = self._base(number, most, grains)
        key = (number, most, grains, ranged)
        if ranged and key not in self._made:
            for axis in ranged:
                levels = [array]
                while int(levels[-1].shape[axis]) > 1:
                    levels.append(self._halve(levels[-1], axis, most))
                array = self.ops.concat(levels, axis)
            self._made[key] = array
        return self._made[key] if ranged else array

    def _halve(self, array: Array, axis: int, most: bool) -> Array:
        # A last node without a partner is left out: a range that ends on one has taken it.
        even = int(array.shape[axis]) // 2 * 2
        left = _slice(array, axis, 0, even, 2)
        right = _slice(array, axis, 1, even, 2)
        return self._pick(most, left, right)


def grains_of(
    tree: Tree, at: int, axes: int, ranged: Sequence[int], tile: tuple[int, int]
) -> tuple[int, ...]:
    """How many entries of each axis are read as one: those of a tile, for a dense table."""
    grains = [1] * axes
    if len(ranged) > 1:
        for axis in ranged:
            index = tree.steps[tree.steps[at].args[axis]]
            if index.op == "index":
                side = tile[index.value == "k"]
                grains[axis] = side & -side  # the power of two in it
    return tuple(grains)


def _is_bool(x: Array) -> bool:
    return "bool" in str(x.dtype)


def _widen(x: Array, axes: int) -> Array:
    for _ in range(axes):
        x = x[..., None]
    return x


def _slice(array: Array, axis: int, start: int, stop: int, step: int) -> Array:
    where: list[slice] = [slice(None)] * len(array.shape)
    where[axis] = slice(start, stop, step)
    return array[tuple(where)]
