"""The dual reading: the derivatives of a score, as another tree.

    score   s - float0[h] * float(abs(q - k))
    d/ds    1.0
    d/d float0[h]   -float(abs(q - k))

`differentiate` walks the score's steps backwards once and writes the adjoint of each onto the same
tape, so value and derivatives share their common steps. Being a tree again, the derivative can be
read by every other reading: as arrays by a chunked backward pass, as Triton source by a kernel.
Rules at the edges: ties of minimum and maximum share half and half, abs has slope 0 at 0, a
quotient by zero is the constant 0, floors and comparisons are flat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from attn_core.language.tree import Tape, Tree


class Site(NamedTuple):
    """One look-up in a float operand: which operand, and how many indices it was found by."""

    operand: int
    indices: int


class Derivative(NamedTuple):
    """`tree` gives score, d score/d s, then per site d score/d value and the site's indices."""

    tree: Tree
    sites: tuple[Site, ...]


@lru_cache(maxsize=256)
def differentiate(tree: Tree) -> Derivative:
    """Derivatives of a score with respect to s and to every float it looks up."""
    tape = Tape()
    moved: list[int] = []
    for step in tree.steps:
        # Operands keep their numbers: the derivative reads the same arrays as the score.
        moved.append(tape.add(step._replace(args=tuple(moved[a] for a in step.args))))
    score = moved[tree.results[0]]
    adjoint: dict[int, int] = {score: tape.const(1.0)}

    def give(at: int, slope: int) -> None:
        adjoint[at] = tape.apply("add", adjoint[at], slope) if at in adjoint else slope

    for at in reversed(moved):
        if at not in adjoint or tape.steps[at].kind != "float":
            continue
        _spread(tape, at, adjoint[at], give)

    zero = tape.const(0.0)
    results = [score, zero]
    sites = []
    for at in dict.fromkeys(moved):
        step = tape.steps[at]
        if step.op == "index" and step.value == "s":
            results[1] = adjoint.get(at, zero)
        elif step.op == "lookup" and step.kind == "float":
            sites.append(Site(int(step.value or 0), len(step.args)))
            results += [adjoint.get(at, zero), *step.args]
    return Derivative(_ordered(tape, results), tuple(sites))


def _ordered(tape: Tape, results: list[int]) -> Tree:
    """The finished tree with the operands' original numbers."""
    tape.arrays = list(
        range(1 + max((int(s.value or 0) for s in tape.steps if s.op == "lookup"), default=-1))
    )
    finished, numbers = tape.finish(*results)
    steps = tuple(
        step._replace(value=numbers[int(step.value or 0)]) if step.op == "lookup" else step
        for step in finished.steps
    )
    return Tree(steps, finished.results)


def _spread(tape: Tape, at: int, g: int, give: Callable[[int, int], None]) -> None:
    """Hand the adjoint `g` of the step at `at` on to the steps it reads."""
    step = tape.steps[at]
    zero = tape.const(0.0)
    if step.op == "add":
        give(step.args[0], g)
        give(step.args[1], g)
    elif step.op == "sub":
        give(step.args[0], g)
        give(step.args[1], tape.apply("sub", zero, g))
    elif step.op == "mul":
        x, y = step.args
        give(x, tape.apply("mul", g, y))
        give(y, tape.apply("mul", g, x))
    elif step.op == "div":
        x, y = step.args
        slope = tape.apply("div", g, y)
        give(x, slope)
        give(y, tape.apply("sub", zero, tape.apply("mul", slope, at)))
    elif step.op == "mod":
        x, y = step.args
        give(x, tape.apply("where", tape.apply("eq", y, zero), zero, g))
        give(y, tape.apply("sub", zero, tape.apply("mul", g, tape.apply("floordiv", x, y))))
    elif step.op == "abs":
        (x,) = step.args
        falling = tape.apply("where", tape.apply("lt", x, zero), tape.apply("sub", zero, g), zero)
        give(x, tape.apply("where", tape.apply("gt", x, zero), g, falling))
    elif step.op in ("minimum", "maximum"):
        x, y = step.args
        half = tape.apply("mul", g, tape.const(0.5))
        wins = "lt" if step.op == "minimum" else "gt"
        for mine, other in ((x, y), (y, x)):
            tied = tape.apply("where", tape.apply("eq", mine, other), half, zero)
            give(mine, tape.apply("where", tape.apply(wins, mine, other), g, tied))
    elif step.op == "where":
        condition, x, y = step.args
        give(x, tape.apply("where", condition, g, zero))
        give(y, tape.apply("where", condition, zero, g))
    elif step.op == "exp":
        give(step.args[0], tape.apply("mul", g, at))
    elif step.op == "log":
        give(step.args[0], tape.apply("div", g, step.args[0]))
    elif step.op == "tanh":
        slope = tape.apply("sub", tape.const(1.0), tape.apply("mul", at, at))
        give(step.args[0], tape.apply("mul", g, slope))
    # Indices, constants, look-ups, floors and casts of integers end the chain.
