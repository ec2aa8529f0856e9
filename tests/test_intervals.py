"""The interval reading: each rule against enumeration, the normal form, and the int32 check."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from attn_core import masks
from attn_core.language import expr
from attn_core.language.intervals import HOST, Intervals, check_range
from attn_core.language.operands import operand
from attn_core.language.ranges import Ranges
from attn_core.language.rules import Bool, Int, Rules
from attn_core.language.tree import INT_MAX, INT_MIN, Step
from attn_core.language.values import mask, score
from attn_core.language.zones import TERM_CAP, normal_form

_RULES = Rules(HOST)


def _plain(op: str, x: int, y: int) -> int | bool:
    """Python's integers, which floor as the language does."""
    table: dict[str, Any] = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "floordiv": lambda: x // y if y else 0,
        "mod": lambda: x % y if y else 0,
        "minimum": lambda: min(x, y),
        "maximum": lambda: max(x, y),
        "rshift": lambda: x >> min(max(y, 0), 31),
        "and": lambda: x & y,
        "lt": lambda: x < y,
        "le": lambda: x <= y,
        "gt": lambda: x > y,
        "ge": lambda: x >= y,
        "eq": lambda: x == y,
        "ne": lambda: x != y,
    }
    return table[op]()


def _ordered(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    bound = st.integers(least, most)
    return st.tuples(bound, bound).map(lambda pair: (min(pair), max(pair)))


def _int(lo: int, hi: int) -> Int:
    value = np.int64(lo)
    return Int(value, value if lo == hi else np.int64(hi))


_OPS = ["add", "sub", "mul", "floordiv", "mod", "minimum", "maximum", "rshift", "and"]
_TIGHT = {"add", "sub", "mul", "floordiv", "minimum", "maximum", "rshift"}


@pytest.mark.parametrize("op", _OPS)
@given(_ordered(-12, 12), _ordered(-7, 7))
@settings(max_examples=200, deadline=None)
def test_integer_rules_enclose(op: str, x: tuple[int, int], y: tuple[int, int]) -> None:
    found = _RULES.apply(Step(op, "int", (0, 1)), [_int(*x), _int(*y)])
    assert isinstance(found, Int)
    pairs = itertools.product(range(x[0], x[1] + 1), range(y[0], y[1] + 1))
    values = [_plain(op, a, c) for a, c in pairs]
    assert found.lo <= min(values)
    assert max(values) <= found.hi
    point = x[0] == x[1] and y[0] == y[1]
    one_quotient = op == "mod" and y[0] == y[1] != 0 and x[0] // y[0] == x[1] // y[1]
    if op in _TIGHT or point or one_quotient:
        assert (int(found.lo), int(found.hi)) == (min(values), max(values))
    if op == "and" and y[0] == y[1] >= 0:
        assert found.lo >= 0
        assert found.hi <= y[1]


@pytest.mark.parametrize("op", ["lt", "le", "gt", "ge", "eq", "ne"])
@given(_ordered(-5, 5), _ordered(-5, 5))
@settings(max_examples=150, deadline=None)
def test_comparisons_are_exact_on_apart_intervals(op: str, x: Any, y: Any) -> None:
    found = _RULES.apply(Step(op, "bool", (0, 1)), [_int(*x), _int(*y)])
    assert isinstance(found, Bool)
    pairs = itertools.product(range(x[0], x[1] + 1), range(y[0], y[1] + 1))
    values = [_plain(op, a, c) for a, c in pairs]
    assert (bool(found.possible), bool(found.certain)) == (any(values), all(values))


@pytest.mark.parametrize("y", [INT_MIN, INT_MIN + 1, -1, 0, 1, INT_MAX - 1, INT_MAX])
@pytest.mark.parametrize("x", [INT_MIN, -1, 0, 1, INT_MAX])
def test_bounds_saturate(x: int, y: int) -> None:
    total = _RULES.plus(np.int64(x), np.int64(y))
    apart = _RULES.minus(np.int64(x), np.int64(y))
    assert int(total) == min(max(x + y, INT_MIN), INT_MAX)
    assert int(apart) == min(max(x - y, INT_MIN), INT_MAX)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_look_ups_over_ranges_are_exact(data: Any) -> None:
    size = data.draw(st.integers(1, 40))
    table = np.random.default_rng(size).integers(-99, 99, (3, size))
    tree = mask(lambda b, h, q, k: operand(table)[b, k] > 0).tree
    at = next(at for at, step in enumerate(tree.steps) if step.op == "lookup")
    lo, hi = data.draw(_ordered(-5, 45))
    b = data.draw(st.integers(0, 2))
    ranges = Ranges(HOST, tree, [HOST.array(table)], (1, 1))
    width = data.draw(st.sampled_from([None, hi - lo, hi - lo + 3]))
    point = np.array([b])
    found = ranges.lookup(at, [Int(point, point), Int(np.array([lo]), np.array([hi]))], [0, width])
    seen = table[b, np.clip(np.arange(lo, hi + 1), 0, size - 1)]
    assert (int(found[0][0]), int(found[1][0])) == (seen.min(), seen.max())
    # Twice the operand, for each of minimum and maximum.
    assert all(made.size <= 2 * table.size for made in ranges._made.values())


@given(_ordered(0, 11), _ordered(0, 12))
@settings(max_examples=100, deadline=None)
def test_look_ups_over_two_ranges_enclose(rows: Any, keys: Any) -> None:
    table = np.random.default_rng(5).integers(-99, 99, (12, 13))
    tree = mask(lambda b, h, q, k: operand(table)[expr.row, k] > 0).tree
    at = next(at for at, step in enumerate(tree.steps) if step.op == "lookup")
    seen = table[rows[0] : rows[1] + 1, keys[0] : keys[1] + 1]
    index = [Int(np.array([lo]), np.array([hi])) for lo, hi in (rows, keys)]
    exact = Ranges(HOST, tree, [HOST.array(table)], (3, 5)).lookup(at, index, [None, None])
    assert (int(exact[0][0]), int(exact[1][0])) == (seen.min(), seen.max())
    rough = Ranges(HOST, tree, [HOST.array(table)], (4, 2)).lookup(at, index, [11, 12])
    assert rough[0][0] <= seen.min()
    assert rough[1][0] >= seen.max()


def _read(built: Any, rows: tuple[int, int], keys: tuple[int, int], offset: int = 0) -> Any:
    reading = Intervals(HOST, built.tree, built.arrays)
    zero = np.int64(0)
    ends = [tuple(np.array([x]) for x in pair) for pair in (rows, keys)]
    size = (rows[1] - rows[0] + 1, keys[1] - keys[0] + 1)
    found = reading.read(zero, zero, ends[0], ends[1], np.int64(offset), size)
    return bool(np.all(found.possible)), bool(np.all(found.certain))


def test_conjunctions_see_more_than_their_parts() -> None:
    # Each side is possible somewhere in this tile, and never both at once.
    band = mask(lambda b, h, q, k: (q - k <= 3) & (q - k >= 6 - k % 1))
    assert not _read(band, (0, 9), (0, 9))[0]
    apart = masks.causal() & ~masks.causal()
    assert not _read(apart, (0, 9), (0, 9))[0]
    rows = mask(lambda b, h, q, k: (expr.row >= k) & (q - expr.row < 3))
    assert not _read(rows, (0, 3), (0, 3), offset=3)[0]
    assert _read(rows, (5, 9), (0, 3), offset=2) == (True, True)
    absolute = mask(lambda b, h, q, k: (abs(q - k) <= 4) & (k - q >= 5))
    assert not _read(absolute, (0, 9), (0, 9))[0]
    starts = operand(np.array([0, 0, 2, 2, 4, 4]))
    ragged = mask(lambda b, h, q, k: (k >= starts[q]) & (q >= k))
    assert not _read(ragged, (4, 5), (0, 3))[0]
    assert _read(ragged, (4, 5), (4, 4)) == (True, True)


def test_the_normal_form_is_capped() -> None:
    many = masks.causal()
    for n in range(8):
        many = many & mask(lambda b, h, q, k, n=n: (k < 3 + n) | (q % (n + 2) == 0))
    terms = normal_form(many.tree)
    assert 1 < len(terms) <= TERM_CAP
    # The constraint of the first conjunct is still in every term.
    assert all(any(c.form[:2] == (-1, 1) for c in term.constraints) for term in terms)
    wide = masks.prefix(1)
    for n in range(30):
        wide = wide | masks.prefix(n) & masks.window(n)
    assert len(normal_form(wide.tree)) <= TERM_CAP


_BOUNDS = {"b": (0, 3), "h": (0, 7), "q": (-100, 10**6), "k": (0, 10**6), "row": (0, 10**6)}
_IDS = np.arange(10, dtype=np.int32)


@pytest.mark.parametrize(
    "built",
    [
        masks.causal() & masks.window(1023),
        masks.segments(_IDS),
        masks.dilated(7, 3, 0),
        masks.graph(np.array([[0, 1]]), 10),
        mask(lambda b, h, q, k: q * 2000 > k * 2000 // 3),
        mask(lambda b, h, q, k: operand(_IDS, bounds=(-5, 100))[q] * 7 > k),
        mask(lambda b, h, q, k: expr.maximum(operand(_IDS)[q], -50) - 2 > k),
        mask(lambda b, h, q, k: expr.cast(operand(_IDS > 3)[q], int) * 1000 > k),
        score(lambda s, b, h, q, k: s * operand(np.ones(10))[q] - abs(q - k) * 0.5),
        score(lambda s, b, h, q, k: s + expr.cast(expr.cast(s, int), float)),
    ],
    ids=str,
)
def test_arithmetic_within_int32_is_accepted(built: Any) -> None:
    check_range(built.tree, _BOUNDS)


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (
            mask(lambda b, h, q, k: operand(_IDS)[q] * 4 > k),
            (
                r"^`mask` must keep its integer arithmetic within int32 .* Got `int0\[q\] \* 4`, "
                r"which can reach -?8589934\d+\. .*core\.operand\(array, bounds=\(low, high\)\)"
            ),
        ),
        (mask(lambda b, h, q, k: q * q > k), r"Got `q \* q`, which can reach 1000000000000\. "),
        (
            mask(lambda b, h, q, k: operand(_IDS)[k] + 1 > q),
            r"Got `int0\[k\] \+ 1`, which can",
        ),
        (mask(lambda b, h, q, k: abs(operand(_IDS)[k]) > q), r"Got `abs\(int0\[k\]\)`"),
        (
            mask(lambda b, h, q, k: operand(_IDS)[k] // (q - k) > q),
            r"Got `int0\[k\] // \(q - k\)`, which can reach 2147483648\. ",
        ),
        (
            score(lambda s, b, h, q, k: s + (q - k) * 5000),
            r"^`score` must keep .* Got `\(q - k\) \* 5000`, which can reach",
        ),
        (mask(lambda b, h, q, k: q * 3000 > k), r"Positions include the query offset"),
    ],
    ids=str,
)
def test_arithmetic_that_can_leave_int32_is_refused(built: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_range(built.tree, _BOUNDS)


def test_empty_axes_are_no_overflow() -> None:
    check_range(masks.causal().tree, {**_BOUNDS, "k": (0, -1)})
