"""What a mask says about q, k and q - k: the shape of a tree, before any number is known.

The interval reading looks at one comparison at a time, and `(q >= k) & (q - k <= 255)` is more than
its comparisons one by one: they bound the same difference. So a mask is first written as an OR of
ANDs (disjunctive normal form), and of each AND the comparisons that are *difference constraints*

    q <= c    k <= c    q - k <= c        and the same with the sides exchanged

are set apart. Their conjunction over a tile of q and k is decided exactly by closing three
intervals under q = k + d. Whatever else the AND holds is a literal, read afterwards over the
intervals that the constraints have left.

Everything here depends on the tree alone and is cached with it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from attn_core.language.tree import COMPARE, Step, Tree

TERM_CAP = 16
"""ANDs that a mask is expanded into at most; what would give more stays whole, as a literal."""

_REST_CAP = 8

OFFSET = -1
"""Stands among the steps of a `Linear` for the query offset: row = q - offset."""

_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}

Literal = tuple[int, bool]  # a boolean step, and whether it must hold or must not


class Linear(NamedTuple):
    """q * Q + k * K plus steps, each added (1) or subtracted (-1)."""

    q: int
    k: int
    rest: tuple[tuple[int, int], ...]


class Constraint(NamedTuple):
    """The linear form must be at most 0, or at most -1 where it is strict."""

    form: Linear
    strict: bool


class Term(NamedTuple):
    """One AND: its difference constraints, its other literals and the steps that those read."""

    constraints: tuple[Constraint, ...]
    literals: tuple[Literal, ...]
    needed: tuple[int, ...]


@lru_cache(maxsize=1024)
def varies(tree: Tree) -> tuple[bool, ...]:
    """Whether each step can differ within a tile; b and h are the same all over it."""
    found: list[bool] = []
    for step in tree.steps:
        own = step.op == "index" and step.value not in ("b", "h")
        found.append(own or any(found[a] for a in step.args))
    return tuple(found)


@lru_cache(maxsize=1024)
def widths(tree: Tree, tall: int, wide: int) -> tuple[int | None, ...]:
    """hi - lo of each integer step at most, in a tile of tall + 1 rows and wide + 1 keys."""
    found: list[int | None] = []
    moving = varies(tree)
    for at, step in enumerate(tree.steps):
        args = [found[a] for a in step.args]
        known = [width for width in args if width is not None]
        width: int | None = None
        if not moving[at]:
            width = 0
        elif step.op == "index":
            width = wide if step.value == "k" else tall
        elif step.kind == "int" and len(known) == len(args):
            by = _constant(tree, step.args[-1])
            if step.op in ("add", "sub"):
                width = sum(known)
            elif step.op in ("minimum", "maximum", "abs"):
                width = max(known)
            elif step.op == "floordiv" and by:
                width = known[0] // abs(by) + 1
            elif step.op == "mod" and by:
                width = abs(by) - 1
            elif step.op == "rshift" and by is not None:
                width = known[0]
        found.append(width)
    return tuple(found)


def _constant(tree: Tree, at: int) -> int | None:
    step = tree.steps[at]
    return int(step.value or 0) if step.op == "const" and step.kind == "int" else None


@lru_cache(maxsize=1024)
def linear_forms(tree: Tree) -> tuple[Linear, ...]:
    """Each step as a linear form; one that is no sum of q, k, row and others is its own rest."""
    forms: list[Linear] = []
    for at, step in enumerate(tree.steps):
        form: Linear | None = None
        if step.op == "index" and step.value in ("q", "k", "row"):
            rest = ((OFFSET, -1),) if step.value == "row" else ()
            form = Linear(int(step.value != "k"), int(step.value == "k"), rest)
        elif step.op in ("add", "sub") and step.kind == "int":
            left, right = (forms[a] for a in step.args)
            form = combine(left, right, 1 if step.op == "add" else -1)
        forms.append(Linear(0, 0, ((at, 1),)) if form is None else form)
    return tuple(forms)


def combine(left: Linear, right: Linear, sign: int) -> Linear | None:
    """left + sign * right, where that is a form with coefficients of -1, 0 and 1."""
    rest = dict(left.rest)
    for step, times in right.rest:
        rest[step] = rest.get(step, 0) + sign * times
    kept = tuple((step, times) for step, times in rest.items() if times)
    form = Linear(left.q + sign * right.q, left.k + sign * right.k, kept)
    small = all(abs(times) <= 1 for times in (form.q, form.k, *rest.values()))
    return form if small and len(kept) <= _REST_CAP else None


@lru_cache(maxsize=1024)
def normal_form(tree: Tree) -> tuple[Term, ...]:
    """The mask as an OR of terms."""
    holds: list[list[frozenset[Literal]]] = []
    fails: list[list[frozenset[Literal]]] = []
    for at, step in enumerate(tree.steps):
        yes, no = [frozenset({(at, True)})], [frozenset({(at, False)})]
        if step.kind == "bool":
            yes, no = _expand(tree, at, step, holds, fails)
        holds.append(yes)
        fails.append(no)
    return tuple(_term(tree, literals) for literals in holds[tree.results[0]])


Terms = list[frozenset[Literal]]


def _expand(
    tree: Tree, at: int, step: Step, holds: list[Terms], fails: list[Terms]
) -> tuple[Terms, Terms]:
    """The terms in which the step holds, and those in which it does not."""
    op, args = step.op, step.args
    if op == "const":
        yes: Terms = [frozenset()]
        return (yes, []) if step.value == "True" else ([], yes)
    if op == "not":
        return fails[args[0]], holds[args[0]]

    def side(a: int, holding: bool) -> tuple[Terms, Literal]:
        return (holds if holding else fails)[a], (a, holding)

    if op in ("and", "or"):
        # De Morgan: an AND fails where either side fails, and an OR where both do.
        hold, meet = op == "and", ((args[0], True), (args[1], True))
        if not hold:
            meet = ((args[0], False), (args[1], False))
        joint = _and(side(*meet[0]), side(*meet[1]))
        apart = _or(side(args[0], not meet[0][1]), side(args[1], not meet[1][1]), (at, not hold))
        return (joint, apart) if hold else (apart, joint)
    pairs: dict[bool, list[tuple[Literal, Literal]]] = {}
    if op == "where":
        for holding in (True, False):
            chosen, otherwise = (args[1], holding), (args[2], holding)
            pairs[holding] = [((args[0], True), chosen), ((args[0], False), otherwise)]
    elif op in ("eq", "ne", "xor") and tree.steps[args[0]].kind == "bool":
        for holding in (True, False):
            same = holding == (op == "eq")
            pairs[holding] = [((args[0], x), (args[1], x == same)) for x in (True, False)]
    else:
        return [frozenset({(at, True)})], [frozenset({(at, False)})]
    found = []
    for holding in (True, False):
        terms: Terms = []
        for left, right in pairs[holding]:
            terms += _and(side(*left), side(*right))
        found.append(terms if len(terms) <= TERM_CAP else [frozenset({(at, holding)})])
    return found[0], found[1]


def _and(left: tuple[Terms, Literal], right: tuple[Terms, Literal]) -> Terms:
    (first, first_whole), (second, second_whole) = left, right
    if len(first) * len(second) > TERM_CAP:
        # The side with fewer terms stays whole, so that constraints which every term of a long
        # chain of ANDs has gathered are not given up for those of its last link.
        if len(first) < len(second):
            first = [frozenset({first_whole})]
        else:
            second = [frozenset({second_whole})]
    joint = (a | b for a in first for b in second)
    possible = (t for t in joint if not any((at, not holding) in t for at, holding in t))
    return list(dict.fromkeys(possible))


def _or(left: tuple[Terms, Literal], right: tuple[Terms, Literal], whole: Literal) -> Terms:
    terms = list(dict.fromkeys(left[0] + right[0]))
    return terms if len(terms) <= TERM_CAP else [frozenset({whole})]


def _term(tree: Tree, literals: frozenset[Literal]) -> Term:
    constraints: list[Constraint] = []
    others: list[Literal] = []
    moving = varies(tree)
    for at, holding in sorted(literals):
        step = tree.steps[at]
        found: list[Constraint | None] = [None]
        if step.op in COMPARE and all(tree.steps[a].kind == "int" for a in step.args):
            found = _constraints(tree, step, holding)
        useful = [c for c in found if c is not None and c.form[:2] != (0, 0)]
        constraints += useful
        said = len(useful) == len(found) and not any(
            part >= 0 and moving[part] for c in useful for part, _ in c.form.rest
        )
        if not said:
            others.append((at, holding))
    return Term(tuple(constraints), tuple(others), reached(tree, *[at for at, _ in others]))


def _constraints(tree: Tree, step: Step, holding: bool) -> list[Constraint | None]:
    """The comparison as linear constraints; None stands for a part that is no such thing."""
    op = step.op if holding else _NEGATED[step.op]
    left, right = step.args
    if op == "ne":
        return [None]
    if op == "eq":
        return _at_most(tree, left, right, False) + _at_most(tree, right, left, False)
    if op in ("gt", "ge"):
        left, right = right, left
    return _at_most(tree, left, right, op in ("lt", "gt"))


def _at_most(tree: Tree, small: int, large: int, strict: bool) -> list[Constraint | None]:
    """small <= large; |x| and maximum on the left, minimum on the right, are several at once."""
    forms = linear_forms(tree)
    zero = Linear(0, 0, ())
    uppers: list[Linear | None] = [forms[small]]
    lowers = [forms[large]]
    step = tree.steps[small]
    if step.op == "abs":
        uppers = [forms[step.args[0]], combine(zero, forms[step.args[0]], -1)]
    elif step.op == "maximum":
        uppers = [forms[a] for a in step.args]
    if tree.steps[large].op == "minimum":
        lowers = [forms[a] for a in tree.steps[large].args]
    found: list[Constraint | None] = []
    for upper in uppers:
        for lower in lowers:
            form = None if upper is None else combine(upper, lower, -1)
            unit = form is not None and (form.q, form.k) not in ((1, 1), (-1, -1))
            found.append(Constraint(form, strict) if form is not None and unit else None)
    return found


def reached(tree: Tree, *at: int) -> tuple[int, ...]:
    """The steps that these steps read, themselves included, in order."""
    wanted = set(at)
    for place in range(len(tree.steps) - 1, -1, -1):
        if place in wanted:
            wanted.update(tree.steps[place].args)
    return tuple(sorted(wanted))


def part(tree: Tree, at: int) -> Tree:
    """The sub-expression at a step; operands keep their numbers."""
    kept = reached(tree, at)
    place = {old: new for new, old in enumerate(kept)}
    steps = tuple(
        step._replace(args=tuple(place[a] for a in step.args))
        for step in (tree.steps[old] for old in kept)
    )
    return Tree(steps, (place[at],))
