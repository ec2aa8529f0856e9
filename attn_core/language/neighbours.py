"""Whether the full tiles of a row of tiles are neighbours, whatever the operands hold.

Then a loop goes from the first to the last of them and looks no number up. So it is of causal
masks, windows, prefixes, chunks and each ANDed with another; of documents it depends on their ids,
and the answer is no.

It is read off the tree, as the interval reading says `certain`, along an axis on which tiles follow
each other: the keys of a row of tiles, or the rows of a column. An integer's bounds go one way
along it, or are the same all along, or neither. Of a condition two sets of tiles matter, those in
which it is certain and those in which it is impossible: each is one end of the line, a stretch of
it, or neither::

    q - k <= 255        along k the bounds of q - k fall: certain from some tile to the end
    q >= k              they rise the other way: certain from the beginning to some tile
    both                a stretch
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from attn_core.language.tree import COMPARE, Step, Tree

SAME, RISING, FALLING, VALLEY = "same", "rising", "falling", "valley"
"""An integer's bounds along the line. Of a valley it is the upper bound that falls, then rises."""

START, END, STRETCH = "start", "end", "stretch"
"""A set of tiles: the first ones, the last ones, or neighbours anywhere. `SAME` stands for all or
none."""

_TURNED = {SAME: SAME, RISING: FALLING, FALLING: RISING}


class _Sets(NamedTuple):
    """The tiles in which a condition holds everywhere, and nowhere; None for any set."""

    certain: str | None
    impossible: str | None


@lru_cache(maxsize=1024)
def full_tiles_are_neighbours(tree: Tree, *along: str) -> bool:
    """Whether the tiles on which the mask is certain are neighbours, of every line of tiles.

    Args:
        along: the indices that grow along the line: "k", or "q" and "row".

    False says only that the tree does not show it.
    """
    found: list[str | _Sets | None] = []
    for step in tree.steps:
        found.append(_of_step(tree, step, [found[at] for at in step.args], along))
    result = found[tree.results[0]]
    return isinstance(result, _Sets) and result.certain is not None


def _of_step(
    tree: Tree, step: Step, args: list[str | _Sets | None], along: tuple[str, ...]
) -> str | _Sets | None:
    if all(_steady(x) for x in args) and not (step.op == "index" and step.value in along):
        return _Sets(SAME, SAME) if step.kind == "bool" else SAME
    if step.kind != "bool":
        directions = [x if isinstance(x, str) else None for x in args]
        return RISING if step.op == "index" else _direction(tree, step, directions)
    sets = [x if isinstance(x, _Sets) else _Sets(None, None) for x in args]
    if step.op == "not":
        return _Sets(sets[0].impossible, sets[0].certain)
    if step.op in ("and", "or"):
        x, y = sets
        if step.op == "and":
            return _Sets(_both(x.certain, y.certain), _either(x.impossible, y.impossible))
        return _Sets(_either(x.certain, y.certain), _both(x.impossible, y.impossible))
    if step.op == "where" and _steady(args[0]):
        # Of a line it is one side, the other, or what holds on both.
        x, y = sets[1:]
        return _Sets(_both(x.certain, y.certain), _both(x.impossible, y.impossible))
    if step.op in COMPARE and all(isinstance(x, str) for x in args):
        return _comparison(step.op, *(str(x) for x in args))
    return _Sets(None, None)


def _steady(x: str | _Sets | None) -> bool:
    return x in (SAME, _Sets(SAME, SAME))


def _direction(tree: Tree, step: Step, args: list[str | None]) -> str | None:
    """Of an integer's bounds, where an argument's are not the same all along."""
    if step.op == "abs":
        return VALLEY if args[0] in (RISING, FALLING) else None
    if VALLEY in args or None in args:
        return None
    first, second = str(args[0]), str(args[-1])
    if step.op in ("add", "minimum", "maximum"):
        return _together(first, second)
    if step.op == "sub":
        return _together(first, _TURNED[second])
    if step.op in ("floordiv", "rshift") and second == SAME:
        positive = tree.steps[step.args[1]].op == "const"
        positive = positive and int(tree.steps[step.args[1]].value or 0) > 0
        return first if positive or step.op == "rshift" else None
    if step.op == "mul":
        for at, other in zip(step.args, (second, first), strict=True):
            if tree.steps[at].op == "const":
                return other if int(tree.steps[at].value or 0) >= 0 else _TURNED[other]
    return None


def _together(first: str, second: str) -> str | None:
    if SAME in (first, second):
        return second if first == SAME else first
    return first if first == second else None


def _comparison(op: str, x: str, y: str) -> _Sets:
    if op in ("gt", "ge"):
        x, y = y, x
    if op not in ("eq", "ne"):
        if (x, y) == (VALLEY, SAME):
            return _Sets(STRETCH, None)
        if VALLEY in (x, y):
            return _Sets(None, None)
        apart = _together(x, _TURNED[y])  # of x - y
        if apart == FALLING:
            return _Sets(END, START)
        return _Sets(START, END) if apart == RISING else _Sets(None, None)
    # Certainly equal is certainly not greater, and not less.
    meet = VALLEY not in (x, y) and _together(x, _TURNED[y]) is not None
    equal = STRETCH if meet else None
    return _Sets(equal, None) if op == "eq" else _Sets(None, equal)


def _both(x: str | None, y: str | None) -> str | None:
    """What two sets have in common."""
    if None in (x, y):
        return None
    if SAME in (x, y):
        return y if x == SAME else x
    return x if x == y else STRETCH


def _either(x: str | None, y: str | None) -> str | None:
    """Two sets together."""
    if SAME in (x, y):
        return y if x == SAME else x
    return x if x == y and x in (START, END) else None
