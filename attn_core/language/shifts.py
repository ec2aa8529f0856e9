"""A tree under a shift: whether it says the same of (q + d, k + d, row + d) whatever d is.

So it is of causal masks, windows, dilation and all that looks at q - k alone; tiles that stand on
one diagonal then share one evaluation. Each step is read as its slope, what d adds to its value for
every unit of d: 1 for q, k and row, 0 for constants, batch and head, and None where it is not so
plain a function of d.
"""

from __future__ import annotations

from functools import lru_cache

from attn_core.language.tree import COMPARE, Step, Tree


@lru_cache(maxsize=256)
def slides(tree: Tree) -> bool:
    """Whether every result of the tree is the same after a shift along the diagonal.

    False says only that the tree does not show it.
    """
    slopes: list[int | None] = []
    for step in tree.steps:
        slopes.append(_slope(step, [slopes[at] for at in step.args], tree))
    return all(slopes[at] == 0 for at in tree.results)


def _slope(step: Step, args: list[int | None], tree: Tree) -> int | None:
    if step.op == "index":
        return 1 if step.value in ("q", "k", "row") else 0
    if all(slope == 0 for slope in args):
        return 0
    if None in args:
        return None
    first, *rest = [slope or 0 for slope in args]
    if step.op == "add":
        return first + rest[0]
    if step.op == "sub":
        return first - rest[0]
    if step.op == "mul":
        for at, other in zip(step.args, (rest[0], first), strict=True):
            if tree.steps[at].op == "const":
                return other * int(tree.steps[at].value or 0) if step.kind == "int" else None
        return None
    if step.op in COMPARE:
        return 0 if first == rest[0] else None
    if step.op in ("minimum", "maximum"):
        return first if first == rest[0] else None
    if step.op == "where":
        return rest[0] if first == 0 and rest[0] == rest[1] else None
    return None
