"""The language: every operator against Python's own, kinds, trees, and what is refused how."""

from __future__ import annotations

import enum
import gc
import math
import threading
import time
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import entries, host, scored, seen

import attn_core
from attn_core import mask, operand, row, score
from attn_core.backends.numpy.arrays import Reading
from attn_core.language.duals import differentiate
from attn_core.language.operands import Operand, Table
from attn_core.language.text import text
from attn_core.language.tree import INT_MAX, INT_MIN

INTS = [-9, -8, -7, -3, -2, -1, 0, 1, 2, 3, 5, 7, 8, 64]
FLOATS = [-7.5, -3.0, -2.0, -0.5, -0.0, 0.0, 0.25, 0.5, 2.0, 3.0, 7.75]
SHAPE = (2, 3, 4, 5)


def table_of(fn, xs, ys, out=np.int64):
    """fn over every pair, from the numpy reading: q runs over xs and k over ys."""
    q, k = (a.ravel() for a in np.meshgrid(np.array(xs, np.int32), np.array(ys, np.int32)))
    made = score(lambda s, b, h, q, k: fn(q, k))
    (found,) = Reading("float64").read(made.tree, {"q": q, "k": k}, host(made.arrays, "float64"))
    found = np.broadcast_to(found, q.shape)
    return list(zip(q.tolist(), k.tolist(), found.astype(out).tolist(), strict=True))


def float_table_of(fn, xs, ys=(0.0,), dtype="float64"):
    """fn(s, t) over every pair of floats: s is the score, t is looked up by k."""
    s, t = (a.ravel() for a in np.meshgrid(np.array(xs, dtype), np.array(ys, dtype)))
    held = operand(t)
    made = score(lambda s, b, h, q, k: fn(s, held[k]))
    index = {"s": s, "k": np.arange(len(t), dtype=np.int32)}
    with np.errstate(all="ignore"):
        (found,) = Reading(dtype).read(made.tree, index, host(made.arrays, dtype))
    found = np.broadcast_to(found, s.shape)
    assert found.dtype == np.dtype(dtype)
    return list(zip(s.tolist(), t.tolist(), found.tolist(), strict=True))


def same(x, y):
    return (math.isnan(x) and math.isnan(y)) or x == y


# Integers --------------------------------------------------------------------------------------

INTEGER = {
    "+": (lambda x, y: x + y, lambda x, y: x + y),
    "-": (lambda x, y: x - y, lambda x, y: x - y),
    "*": (lambda x, y: x * y, lambda x, y: x * y),
    "//": (lambda x, y: x // y, lambda x, y: x // y if y else 0),
    "%": (lambda x, y: x % y, lambda x, y: x % y if y else 0),
    "&": (lambda x, y: x & y, lambda x, y: x & y),
    "min": (attn_core.minimum, min),
    "max": (attn_core.maximum, max),
    "abs": (lambda x, y: abs(x), lambda x, y: abs(x)),
    "neg": (lambda x, y: -x, lambda x, y: -x),
    "pos": (lambda x, y: +x, lambda x, y: x),
    "where": (
        lambda x, y: attn_core.where(x > y, x, y * 2),
        lambda x, y: x if x > y else y * 2,
    ),
    "<": (lambda x, y: attn_core.cast(x < y, int), lambda x, y: int(x < y)),
    "<=": (lambda x, y: attn_core.cast(x <= y, int), lambda x, y: int(x <= y)),
    ">": (lambda x, y: attn_core.cast(x > y, int), lambda x, y: int(x > y)),
    ">=": (lambda x, y: attn_core.cast(x >= y, int), lambda x, y: int(x >= y)),
    "==": (lambda x, y: attn_core.cast(x == y, int), lambda x, y: int(x == y)),
    "!=": (lambda x, y: attn_core.cast(x != y, int), lambda x, y: int(x != y)),
    "bool": (lambda x, y: attn_core.cast(attn_core.cast(x, bool), int), lambda x, y: int(bool(x))),
    "int of int": (lambda x, y: attn_core.cast(x, int), lambda x, y: x),
}


@pytest.mark.parametrize("name", INTEGER)
def test_integers_as_python_has_them(name):
    ours, python = INTEGER[name]
    wrong = [(x, y, z) for x, y, z in table_of(ours, INTS, INTS) if z != python(x, y)]
    assert not wrong


@pytest.mark.parametrize("name", ["+", "-", "*", "//", "%", "&", "<", ">=", "==", "min"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("constant", [-7, -1, 0, 3])
def test_integers_with_a_python_number_on_either_side(name, left, constant):
    ours, python = INTEGER[name]
    if left:
        found = table_of(lambda q, k: ours(constant, q), INTS, [0])
        assert [z for _, _, z in found] == [python(constant, x) for x in INTS]
    else:
        found = table_of(lambda q, k: ours(q, constant), INTS, [0])
        assert [z for _, _, z in found] == [python(x, constant) for x in INTS]


def test_division_and_remainder_belong_together():
    for x, y, z in table_of(lambda q, k: (q // k) * k + q % k, INTS, [y for y in INTS if y]):
        assert z == x, (x, y)


def test_shifts_are_arithmetic_and_their_count_is_held_within_0_and_31():
    xs = [INT_MIN, INT_MAX, -1, -100, 0, 1, 100]
    for x, n, z in table_of(lambda q, k: q >> k, xs, [-5, -1, 0, 1, 5, 30, 31, 32, 40, 1000]):
        assert z == x >> min(max(n, 0), 31), (x, n)
    assert [z for _, _, z in table_of(lambda q, k: 100 >> q, [0, 1, 3], [0])] == [100, 50, 12]


def test_the_ends_of_int32_survive():
    for x, y, z in table_of(attn_core.minimum, [INT_MIN, INT_MAX, 0], [INT_MIN, INT_MAX, 0]):
        assert z == min(x, y)
    for x, y, z in table_of(lambda q, k: attn_core.cast(q < k, int), [INT_MIN, INT_MAX], [0]):
        assert z == int(x < y)


# Conditions ------------------------------------------------------------------------------------

LOGIC = {
    "&": (lambda x, y: x & y, lambda x, y: x and y),
    "|": (lambda x, y: x | y, lambda x, y: x or y),
    "^": (lambda x, y: x ^ y, lambda x, y: x != y),
    "~": (lambda x, y: ~x, lambda x, y: not x),
    "==": (lambda x, y: x == y, lambda x, y: x == y),
    "!=": (lambda x, y: x != y, lambda x, y: x != y),
    "where": (lambda x, y: attn_core.where(x, y, ~y), lambda x, y: y if x else not y),
}


@pytest.mark.parametrize("name", LOGIC)
def test_conditions_as_python_has_them(name):
    ours, python = LOGIC[name]
    made = mask(lambda b, h, q, k: ours(q > 1, k > 2))
    plain = entries(lambda b, h, q, k, row: bool(python(q > 1, k > 2)), SHAPE)
    assert (seen(made, SHAPE) == plain).all()
    assert plain.any() or name == "&"
    assert not plain.all()


@pytest.mark.parametrize("constant", [True, False])
def test_conditions_with_python_booleans(constant):
    for ours, python in (
        (lambda q: (q > 1) & constant, lambda q: q > 1 and constant),
        (lambda q: constant & (q > 1), lambda q: q > 1 and constant),
        (lambda q: constant | (q > 1), lambda q: q > 1 or constant),
        (lambda q: constant ^ (q > 1), lambda q: (q > 1) != constant),
        (lambda q: attn_core.where(q > 1, constant, False), lambda q: constant if q > 1 else False),
        (lambda q: constant, lambda q: constant),
    ):
        made = mask(lambda b, h, q, k, ours=ours: ours(q))
        plain = entries(lambda b, h, q, k, row, python=python: bool(python(q)), SHAPE)
        assert (seen(made, SHAPE) == plain).all()


def test_conditions_count_as_0_and_1():
    for x, y, z in table_of(lambda q, k: (q > 0) + (k > 0) * 2 - (q == k), INTS, INTS):
        assert z == (x > 0) + (y > 0) * 2 - (x == y)
    for x, y, z in table_of(lambda q, k: (q > 0) & k, INTS, INTS):
        assert z == (x > 0) & y
    for x, y, z in table_of(lambda q, k: attn_core.cast((q > 0) < (k > 0), int), INTS, INTS):
        assert z == ((x > 0) < (y > 0))


# Floats ----------------------------------------------------------------------------------------

FLOAT = {
    "+": (lambda x, y: x + y, lambda x, y: x + y),
    "-": (lambda x, y: x - y, lambda x, y: x - y),
    "neg": (lambda x, y: -x, lambda x, y: 0.0 - x),
    "*": (lambda x, y: x * y, lambda x, y: x * y),
    "/": (lambda x, y: x / y, lambda x, y: x / y if y else 0.0),
    "//": (lambda x, y: x // y, lambda x, y: x // y if y else 0.0),
    "%": (lambda x, y: x % y, lambda x, y: x % y if y else 0.0),
    "min": (attn_core.minimum, min),
    "max": (attn_core.maximum, max),
    "abs": (lambda x, y: abs(x), lambda x, y: abs(x)),
    "<": (lambda x, y: x < y, lambda x, y: float(x < y)),
    "==": (lambda x, y: x == y, lambda x, y: float(x == y)),
    "!=": (lambda x, y: x != y, lambda x, y: float(x != y)),
    "where": (lambda x, y: attn_core.where(x >= y, x, y), lambda x, y: x if x >= y else y),
    "cast int": (lambda x, y: attn_core.cast(x, int), lambda x, y: float(int(x))),
    "exp": (lambda x, y: attn_core.exp(x), lambda x, y: math.exp(x)),
    "tanh": (lambda x, y: attn_core.tanh(x), lambda x, y: math.tanh(x)),
    "log": (lambda x, y: attn_core.log(abs(x) + 1), lambda x, y: math.log(abs(x) + 1)),
}


@pytest.mark.parametrize("name", FLOAT)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_floats_as_python_has_them(name, dtype):
    ours, python = FLOAT[name]
    if name in ("<", "==", "!="):
        compared = ours
        ours = lambda x, y: attn_core.cast(compared(x, y), float)  # noqa: E731
    close = 1e-15 if dtype == "float64" else 1e-6
    for x, y, z in float_table_of(ours, FLOATS, FLOATS, dtype):
        assert z == pytest.approx(python(x, y), rel=close, abs=0), (x, y)


def test_log_at_and_below_zero():
    with np.errstate(all="ignore"):
        for x, _, z in float_table_of(lambda s, t: attn_core.log(s), [0.0, -1.0, math.inf]):
            assert same(z, {0.0: -math.inf, -1.0: math.nan, math.inf: math.inf}[x])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_division_by_zero_gives_zero_even_of_infinity(dtype):
    xs = [-math.inf, -1.0, 0.0, 1.0, math.inf, math.nan]
    for op in (lambda s, t: s / t, lambda s, t: s // t, lambda s, t: s % t):
        for x, y, z in float_table_of(op, xs, [0.0, -0.0], dtype):
            assert z == 0.0, (x, y)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_casts_to_int_truncate_saturate_and_take_nan_to_0(dtype):
    xs = [-math.inf, -1e30, -2147483904.0, -2147483648.0, -2147483520.0, -1.9, -0.0, 0.9, 1.9]
    xs += [16777217.0, 2147483520.0, 2147483648.0, 1e30, math.inf, math.nan]
    if dtype == "float64":
        xs += [2147483521.5, 2147483646.9, 2147483647.0, 2147483647.5, -2147483648.9]
    made = score(lambda s, b, h, q, k: attn_core.cast(attn_core.cast(s, int) // 1, float))
    s = np.array(xs, dtype)
    # Out of range and NaN must be taken care of before the hardware's own cast sees them.
    with np.errstate(invalid="raise"):
        (found,) = Reading(dtype).read(made.tree, {"s": s}, ())
    for x, z in zip(s.tolist(), found.tolist(), strict=True):
        whole = 0 if math.isnan(x) else int(max(min(x, 1e12), -1e12))
        assert z == np.dtype(dtype).type(max(min(whole, INT_MAX), INT_MIN)), x


def test_infinite_and_huge_floats_at_ties():
    top = float(np.finfo("float64").max)
    for x, y, z in float_table_of(
        attn_core.maximum, [top, math.inf, -math.inf, 1.0], [top, math.inf]
    ):
        assert z == max(x, y)


# Kinds -----------------------------------------------------------------------------------------


def kind_of(fn):
    """The kind that fn(s, q) is given, read off its step."""
    from attn_core.language.values import SCORE_INDICES, trace

    tape, at = trace(lambda s, b, h, q, k: fn(s, q), SCORE_INDICES)
    return tape.kind(at)


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (lambda s, q: q + 2, "int"),
        (lambda s, q: q + 2.0, "float"),
        (lambda s, q: q // 2, "int"),
        (lambda s, q: q // 2.0, "float"),
        (lambda s, q: q % 2.0, "float"),
        (lambda s, q: q / 2, "float"),
        (lambda s, q: q * True, "int"),
        (lambda s, q: (q > 1) + (q > 2), "int"),
        (lambda s, q: -(q > 1), "int"),
        (lambda s, q: abs(q > 1), "int"),
        (lambda s, q: q > 1.5, "bool"),
        (lambda s, q: s + q, "float"),
        (lambda s, q: s > q, "bool"),
        (lambda s, q: attn_core.minimum(q, 1), "int"),
        (lambda s, q: attn_core.minimum(q, 1.0), "float"),
        (lambda s, q: attn_core.where(q > 1, q, 1.0), "float"),
        (lambda s, q: attn_core.where(q > 1, True, q), "int"),
        (lambda s, q: attn_core.where(q > 1, q > 2, q > 3), "bool"),
        (lambda s, q: attn_core.cast(s, int), "int"),
        (lambda s, q: attn_core.cast(s, "int"), "int"),
        (lambda s, q: attn_core.cast(q, float), "float"),
        (lambda s, q: attn_core.cast(q, bool), "bool"),
        (lambda s, q: attn_core.exp(q), "float"),
        (lambda s, q: q & 3, "int"),
        (lambda s, q: q >> 3, "int"),
        (lambda s, q: (q > 1) & (q > 2), "bool"),
        (lambda s, q: np.float32(2) * q, "float"),
        (lambda s, q: np.int8(2) * q, "int"),
        (lambda s, q: np.bool_(True) & (q > 1), "bool"),
        (lambda s, q: ml_dtypes.bfloat16(0.5) * q, "float"),
    ],
)
def test_kinds(fn, kind):
    assert kind_of(fn) == kind


def trees(*fns):
    return [score(fn).tree for fn in fns]


@pytest.mark.parametrize(
    ("x", "y"),
    [(2, 2.0), (0.0, -0.0), (1, True), (0, False), (0, -0.0), (0.1, np.float32(0.1)), (1, -1)],
)
def test_constants_carry_kind_and_bits(x, y):
    one, other = trees(
        lambda s, b, h, q, k: attn_core.where(q == k, s, s * 3) + q // 1 * x,
        lambda s, b, h, q, k: attn_core.where(q == k, s, s * 3) + q // 1 * y,
    )
    if type(x) is type(y) or not isinstance(y, bool):
        assert one != other
    assert text(one) != text(other)


def test_q_over_2_and_over_2_0_do_not_share_a_tree():
    one, other = trees(lambda s, b, h, q, k: s + q // 2, lambda s, b, h, q, k: s + q // 2.0)
    assert one != other
    assert text(one) != text(other)


def test_constants_are_python_numbers_whatever_they_came_as():
    class Size(int, enum.Enum):
        small = 3

    wanted = mask(lambda b, h, q, k: q - k < 3).tree
    for three in (np.int64(3), np.uint8(3), Size.small):
        assert mask(lambda b, h, q, k, three=three: q - k < three).tree == wanted
    nan = trees(lambda s, b, h, q, k: s + math.nan, lambda s, b, h, q, k: s + float("-nan"))
    assert nan[0] == nan[1]


# Trees -----------------------------------------------------------------------------------------


def test_equal_programmes_have_equal_trees_in_whatever_order_they_were_written():
    left, right = operand(np.arange(4)), operand(np.arange(5))

    def forwards(b, h, q, k):
        x = left[q]
        y = right[k]
        unused = q * 77  # noqa: F841
        return (x > y) & (q - k < 3)

    def backwards(b, h, q, k):
        near = q - k < 3
        y = right[k]
        again = left[q]
        x = left[q]
        del again
        return (x > y) & near

    one, other = mask(forwards), mask(backwards)
    assert one.tree == other.tree
    assert hash(one.tree) == hash(other.tree)
    assert one.arrays[0] is left.array
    assert other.arrays[0] is left.array
    assert other.arrays[1] is right.array


def test_a_tree_does_not_depend_on_what_the_arrays_hold():
    def made(array):
        table = operand(array)
        return mask(lambda b, h, q, k: table[q] == table[k])

    assert made(np.arange(4)).tree == made(np.arange(9)).tree
    # A float table instead is another programme, and as a mask none at all.
    with pytest.raises(TypeError, match="float"):
        made(np.arange(4.0))


def test_composition_gives_the_tree_of_the_whole():
    whole = mask(lambda b, h, q, k: (q >= k) & (q - k <= 5) | ~(k < 2))
    parts = attn_core.masks.causal() & attn_core.masks.window(left=5) | ~attn_core.masks.prefix(2)
    assert whole.tree == parts.tree


def test_composition_keeps_one_operand_for_one_array():
    ids = np.array([0, 0, 1])
    segments = attn_core.masks.segments(ids)
    both = segments & (segments | attn_core.masks.segments(ids))
    assert len(both.arrays) == 1
    two = segments & attn_core.masks.segments(ids.copy())
    assert len(two.arrays) == 2


def test_unused_operands_are_dropped_and_the_rest_renumbered():
    first, second = operand(np.arange(3)), operand(np.arange(3, 6))
    made = mask(lambda b, h, q, k: (first[q] > 0, second[q] > 4)[1])
    assert len(made.arrays) == 1
    assert made.arrays[0] is second.array
    assert len(made.arrays) == 1


def test_expr_has_neither_hash_nor_ufuncs():
    seen_by = []
    mask(lambda b, h, q, k: seen_by.append(q) or q >= k)
    assert seen_by[0].__hash__ is None
    assert seen_by[0].__array_ufunc__ is None
    with pytest.raises(TypeError, match="unhashable"):
        {seen_by[0]: 1}


def test_repr_is_the_text():
    shown = []
    mask(lambda b, h, q, k: shown.append(repr((q - k) * 2)) or q >= k)
    assert shown == ["(q - k) * 2"]
    assert repr(row) == "row"
    assert repr(attn_core.masks.causal()) == "mask(q >= k)"
    assert repr(attn_core.score(lambda s, b, h, q, k: s * 2)) == "score(s * 2.0)"


def deep_chain(steps):
    def fn(s, b, h, q, k):
        x = s
        for i in range(steps // 2):
            x = (x + float(i % 7)) * 0.5
        return x

    return fn


def test_deep_trees_are_fast_and_do_not_recurse():
    steps = 20_000
    start = time.process_time()
    made = score(deep_chain(steps))
    again = score(deep_chain(steps))
    assert len(made.tree.steps) > steps
    assert made.tree == again.tree
    assert hash(made.tree) == hash(again.tree)
    printed = text(made.tree)
    derivative = differentiate(made.tree)
    assert len(derivative.tree.steps) < 5 * steps
    s = np.ones((1, 1, 1, 1))
    found = scored(made, s)
    expected = 1.0
    for i in range(steps // 2):
        expected = (expected + float(i % 7)) * 0.5
    assert found.item() == pytest.approx(expected)
    made.then(made)
    took = time.process_time() - start
    assert len(printed) < 100 * steps
    assert took < 4, took


def test_deep_masks_through_attention():
    def fn(b, h, q, k):
        x = q >= k
        for i in range(10_000):
            x = x & (q - k != i + 5)
        return x

    x = np.ones((1, 1, 3, 2), "float32")
    start = time.process_time()
    out = attn_core.attention(x, x, x, mask=mask(fn), return_weights=True)
    assert time.process_time() - start < 6
    assert (out.weights[0, 0] > 0).tolist() == np.tril(np.ones((3, 3), bool)).tolist()


def test_widely_shared_trees_stay_small():
    def fn(s, b, h, q, k):
        x = s
        for _ in range(2_000):
            x = x * 0.5 + x * 0.25
        return x

    start = time.process_time()
    made = score(fn)
    assert len(made.tree.steps) < 6_010
    assert len(text(made.tree)) < 500_000
    assert len(differentiate(made.tree).tree.steps) < 30_000
    assert scored(made, np.ones((1, 1, 1, 1))).item() == pytest.approx(0.75**2000)
    assert time.process_time() - start < 3


def test_shared_steps_are_written_once():
    def fn(b, h, q, k):
        return ((q - k) // 3 == (q - k) % 3) & ((q - k) // 3 >= 0)

    ops = [step.op for step in mask(fn).tree.steps]
    assert ops.count("sub") == 1
    assert ops.count("floordiv") == 1


# Tracing ---------------------------------------------------------------------------------------


def test_tracing_runs_once_and_at_the_call():
    calls = []
    made = mask(lambda b, h, q, k: calls.append(1) or q >= k)
    assert calls == [1]
    for _ in range(3):
        seen(made, SHAPE)
    x = np.ones((1, 1, 3, 2), "float32")
    attn_core.attention(x, x, x, mask=made)
    assert calls == [1]


def test_later_changes_of_a_closure_are_not_seen():
    n = 2
    made = mask(lambda b, h, q, k: k < n)
    n = 4
    assert seen(made, (1, 1, 1, 5)).ravel().tolist() == [True, True, False, False, False]


def test_captured_scalar_arrays_become_operands():
    gain = np.array(2.0)
    made = score(lambda s, b, h, q, k: s * gain)
    assert len(made.arrays) == 1
    assert made.arrays[0] is gain
    assert made.tree == score(lambda s, b, h, q, k: s * np.array(7.0)).tree
    s = np.ones((1, 1, 1, 2))
    assert scored(made, s).ravel().tolist() == [2.0, 2.0]
    gain[...] = 5.0
    assert scored(made, s).ravel().tolist() == [5.0, 5.0]
    limit = np.array(1)
    assert len(mask(lambda b, h, q, k: q - k <= limit).arrays) == 1
    assert len(mask(lambda b, h, q, k: limit + q >= k).arrays) == 1


def test_captured_scalars_keep_their_kind():
    for made, kind in (
        (score(lambda s, b, h, q, k: s * np.array(2)), "int"),
        (score(lambda s, b, h, q, k: attn_core.where(np.array(True), s, 0.0)), "bool"),
        (score(lambda s, b, h, q, k: s * np.array(2, ml_dtypes.bfloat16)), "float"),
    ):
        assert [s.kind for s in made.tree.steps if s.op == "lookup"] == [kind]


def test_row_is_the_row_and_q_the_position():
    made = mask(lambda b, h, q, k: row == q - 3)
    assert seen(made, SHAPE, 3).all()
    assert not seen(made, SHAPE, 2).any()
    assert made.tree.reads("row")
    assert not attn_core.masks.causal().tree.reads("row")


@pytest.mark.parametrize(
    "use",
    [
        lambda: row >= 3,
        lambda: row + 1,
        lambda: abs(row),
        lambda: operand([1, 2])[row],
        lambda: operand([1, 2])[0],
        lambda: attn_core.exp(3.0),
        lambda: attn_core.cast(3.0, int),
        lambda: attn_core.minimum(row, 3),
    ],
)
def test_row_and_operands_outside_of_a_trace(use):
    with pytest.raises(TypeError, match=r"must be used inside a function given to attn_core\.mask"):
        use()


def test_expressions_of_another_trace():
    leaked = []
    mask(lambda b, h, q, k: leaked.append(q) or q >= k)
    old = leaked[0]
    table = operand([1, 2, 3])
    for fn in (
        lambda b, h, q, k: q >= old,
        lambda b, h, q, k: old >= q,
        lambda b, h, q, k: old >= 3,
        lambda b, h, q, k: table[old] > 1,
        lambda b, h, q, k: (row == old) & (q >= k),
        lambda b, h, q, k: attn_core.where(q >= k, q, old) > 0,
    ):
        with pytest.raises(TypeError, match="belongs to another mask or score"):
            mask(fn)


def test_a_trace_inside_a_trace_does_not_disturb_the_outer_one():
    table = operand([3, 1, 2])

    def fn(b, h, q, k):
        inner = attn_core.masks.causal()
        assert isinstance(inner, attn_core.Mask)
        with pytest.raises(TypeError):
            mask(lambda b, h, q, k: q)
        return table[q] > row

    plain = entries(lambda b, h, q, k, row: [3, 1, 2][min(q, 2)] > row, SHAPE)
    assert (seen(mask(fn), SHAPE) == plain).all()


def test_a_failed_trace_leaves_nothing_behind():
    with pytest.raises(TypeError):
        mask(lambda b, h, q, k: bool(q))
    with pytest.raises(TypeError, match="outside of one"):
        row + 1


def test_threads_trace_apart():
    table, errors = operand(np.arange(50)), []

    def work(n):
        try:
            for i in range(60):
                made = mask(lambda b, h, q, k, i=i: (table[q] + (n * 100 + i) > k) & (row >= 0))
                assert f"{n * 100 + i}" in text(made.tree)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_a_mask_keeps_only_the_arrays_it_reads():
    def made():
        array = np.arange(1000)
        table = operand(array)
        return mask(lambda b, h, q, k: (table[q] > 0, q >= k)[1]), weakref.ref(array)

    kept, alive = made()
    gc.collect()
    assert alive() is None
    assert kept.arrays == ()


# Look-ups --------------------------------------------------------------------------------------


def test_lookups_clamp_and_never_wrap():
    array = np.array([10, 20, 30])
    table = operand(array)
    for x, _, z in table_of(lambda q, k: table[q], [INT_MIN, -3, -1, 0, 1, 2, 3, 99, INT_MAX], [0]):
        assert z == array[min(max(x, 0), 2)]


def test_lookups_of_rank_two_and_three():
    rng = np.random.default_rng(0)
    two, three = rng.integers(-9, 9, (2, 4)), rng.integers(-9, 9, (2, 3, 4))
    table, deep = operand(two), operand(three)
    made = mask(lambda b, h, q, k: table[b, q - 1] < deep[b, h, k])
    plain = entries(
        lambda b, h, q, k, row: two[b, min(max(q - 1, 0), 3)] < three[b, h, min(k, 3)], SHAPE
    )
    assert (seen(made, SHAPE) == plain).all()
    assert plain.any()
    assert not plain.all()


def test_axes_of_size_one_broadcast():
    array = np.array([[4, 1, 3, 2, 0]])
    table = operand(array)
    made = mask(lambda b, h, q, k: table[b, k] > q)
    assert (seen(made, SHAPE) == entries(lambda b, h, q, k, row: array[0, k] > q, SHAPE)).all()


def test_lookups_of_lookups():
    outer, inner = operand(np.array([5, 6, 7, 8])), operand(np.array([3, -1, 9, 0]))
    for x, _, z in table_of(lambda q, k: outer[inner[q]], range(4), [0]):
        assert z == [5, 6, 7, 8][min(max([3, -1, 9, 0][x], 0), 3)]


@pytest.mark.parametrize(
    "array",
    [
        [1, 2, 3],
        (1, 2, 3),
        np.array([1, 2, 3], np.int8),
        np.array([1, 2, 3], np.uint16),
        np.array([1, 2, 3], np.int64),
        np.array([0, 1, 0, 2, 0, 3])[1::2],
        np.array([1, 2, 3], ">i4"),
    ],
)
def test_integer_operands_of_every_make(array):
    table = operand(array)
    assert table.kind == "int"
    assert table.shape == (3,)
    assert [z for _, _, z in table_of(lambda q, k: table[q], range(3), [0])] == [1, 2, 3]


def test_float_operands_take_the_accumulation_dtype():
    for array in ([0.1, 0.2], np.array([0.1, 0.2], "float32"), np.array([0.1, 0.2], "float16")):
        table = operand(array)
        made = score(lambda s, b, h, q, k, table=table: s + table[k])
        found = scored(made, np.zeros((1, 1, 1, 2), "float32"))
        assert found.dtype == np.float32
    made = score(lambda s, b, h, q, k: s + operand([0.1, 0.2])[k])
    assert scored(made, np.zeros((1, 1, 1, 2), "float64")).ravel().tolist() == [0.1, 0.2]
    narrow = operand(np.array([0.5, 2], ml_dtypes.bfloat16))
    made = score(lambda s, b, h, q, k: s + narrow[k])
    assert scored(made, np.zeros((1, 1, 1, 2), "float32")).ravel().tolist() == [0.5, 2.0]


def test_tables_are_plain_numbers_and_equal_by_value():
    one, other = operand([[1, 2], [3, 4]]).array, operand(((1, 2), (3, 4))).array
    assert isinstance(one, Table)
    assert one == other
    assert hash(one) == hash(other)
    assert one != operand([[1.0, 2], [3, 4]]).array
    assert operand([True, False]).kind == "bool"
    assert operand([True, 2]).kind == "int"
    assert operand([1, 2.0]).kind == "float"
    assert operand(3).shape == ()
    assert operand([np.int64(3), np.int64(4)]).kind == "int"


def test_scalar_operands_are_looked_up_without_an_index():
    for three in (3, np.array(3), np.int32(3)):
        held = operand(three)
        made = mask(lambda b, h, q, k, held=held: k < held[()])
        x = np.ones((1, 1, 1, 2), "float32")
        k = np.ones((1, 1, 5, 2), "float32")
        out = attn_core.attention(x, k, k, mask=made, return_weights=True)
        assert (out.weights.ravel() > 0).tolist() == [True, True, True, False, False]


def test_bounds_are_checked_on_the_host_and_clamp():
    table = operand(np.array([3, 9, 5]), bounds=(3, 9))
    assert text(mask(lambda b, h, q, k: table[q] > 4).tree) == (
        "minimum(maximum(int0[q], 3), 9) > 4"
    )
    with pytest.raises(ValueError, match=r"must stay within its bounds \(3, 8\)"):
        operand(np.array([3, 9, 5]), bounds=(3, 8))
    with pytest.raises(ValueError, match="bounds"):
        operand([3, 9], bounds=(4, 3))
    with pytest.raises(TypeError, match="bounds"):
        operand([3.0, 9.0], bounds=(0, 9))


OPERANDS = {
    "ragged list": (lambda: operand([[1], [1, 2]]), TypeError, "equal lengths"),
    "list of strings": (lambda: operand(["a"]), TypeError, "must hold numbers"),
    "none": (lambda: operand(None), TypeError, "must be a list, a NumPy array"),
    "string": (lambda: operand("abc"), TypeError, "must be a list, a NumPy array"),
    "complex": (lambda: operand(np.ones(2, complex)), TypeError, "complex128"),
    "object": (lambda: operand(np.array([None])), TypeError, "object"),
    "wide integer": (lambda: operand([2**31]), ValueError, "int32"),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_what_is_no_operand(name):
    make, error, words = OPERANDS[name]
    with pytest.raises(error, match=words):
        make()


def test_operands_are_not_compared_by_identity():
    table = operand([1, 2, 3])
    for use in (
        lambda q: table == 3,
        lambda q: table != q,
        lambda q: table and q > 0,
        lambda q: q > 0 if table else q > 1,
        lambda q: table in [table, 3][1:],
    ):
        with pytest.raises(TypeError, match=r"must be looked up before it is used.*`table\[q\]`"):
            mask(lambda b, h, q, k, use=use: use(q))
    assert isinstance(table, Operand)


# What Python would decide by itself ------------------------------------------------------------

LIST, ARRAY, ARRAY2 = [1, 2, 3], np.arange(5), np.ones((3, 4))
TABLE = operand([1, 2, 3])

REFUSED: dict[str, tuple[Any, str]] = {
    "and": (lambda s, q, k: (q > k) and (k > 1), "`a & b` for `a and b`"),
    "or": (lambda s, q, k: (q > k) or (k > 1), "`a | b` for `a or b`"),
    "not": (lambda s, q, k: not (q > k), "`~a` for `not a`"),
    "chained": (lambda s, q, k: 0 < q < k, "`(a < b) & (b < c)`"),
    "if": (lambda s, q, k: 1 if q > k else 0, "attn_core.where(c, x, y)"),
    "bool": (lambda s, q, k: bool(q), "`a & b`"),
    "min": (lambda s, q, k: min(q, k), "attn_core.minimum"),
    "max": (lambda s, q, k: max(q, k), "attn_core.minimum or maximum"),
    "assert": (lambda s, q, k: [None for _ in "a" if q == k], "has no truth value"),
    "in list": (lambda s, q, k: q in [1, 2], "no truth value"),
    "in expr": (lambda s, q, k: 2 in q, "`in` must not be used"),
    "iterate": (lambda s, q, k: list(q), "must not be iterated"),
    "unpack": (lambda s, q, k: [*q], "must not be iterated"),
    "len": (lambda s, q, k: len(q), "has no length"),
    "float": (lambda s, q, k: float(s), "attn_core.cast(x, float)"),
    "int": (lambda s, q, k: int(s), "attn_core.cast(x, int)"),
    "math.exp": (lambda s, q, k: math.exp(s), "attn_core.exp"),
    "math.tanh": (lambda s, q, k: math.tanh(s), "attn_core.exp, log or tanh"),
    "math.floor": (lambda s, q, k: math.floor(s), "attn_core.cast"),
    "np.exp": (lambda s, q, k: np.exp(s), "attn_core.exp"),
    "np.tanh": (lambda s, q, k: np.tanh(s), "attn_core.exp, log and tanh"),
    "np.minimum": (lambda s, q, k: np.minimum(q, k), "attn_core.minimum"),
    "np.abs": (lambda s, q, k: np.abs(q), "are abs"),
    "np.where": (lambda s, q, k: np.where(q > k, 1, 2), "where"),
    "list index": (lambda s, q, k: LIST[q], "attn_core.operand(array)"),
    "tuple index": (lambda s, q, k: (1, 2)[q], "attn_core.operand(array)"),
    "array index": (lambda s, q, k: ARRAY[q], "attn_core.operand(array)"),
    "array two indices": (lambda s, q, k: ARRAY2[q, k], "attn_core.operand(array)"),
    "array mixed index": (lambda s, q, k: ARRAY2[0, k], "attn_core.operand(array)"),
    "array bool index": (lambda s, q, k: ARRAY[q > k], "attn_core.operand(array)"),
    "dict index": (lambda s, q, k: {1: 2}[q], "attn_core.operand(array)"),
    "array times": (lambda s, q, k: ARRAY * q, "attn_core.operand(array)"),
    "times array": (lambda s, q, k: q * ARRAY, "attn_core.operand(array)"),
    "array compared": (lambda s, q, k: q < ARRAY, "attn_core.operand(array)"),
    "range": (lambda s, q, k: list(range(q)), "cannot index"),
    "operand unread": (lambda s, q, k: s * TABLE, "`table[q]`"),
    "operand first": (lambda s, q, k: TABLE * 2, "attn_core.operand(array)"),
    "operand few indices": (lambda s, q, k: TABLE[q, k], "with 1 indices"),
    "operand slice": (lambda s, q, k: TABLE[1:], "slice"),
    "operand ellipsis": (lambda s, q, k: TABLE[...], "Ellipsis"),
    "operand float index": (lambda s, q, k: TABLE[s], "indexed with integers. Got a float"),
    "operand bool index": (lambda s, q, k: TABLE[q > k], "indexed with integers. Got a bool"),
    "operand negative index": (lambda s, q, k: TABLE[-1], "must not be negative"),
    "operand iterated": (lambda s, q, k: sum(TABLE), "not iterated over"),
    "expr indexed": (lambda s, q, k: q[k], "attn_core.operand(array)"),
    "method": (lambda s, q, k: q.astype(int), "attn_core.minimum, maximum, where and cast"),
    "power": (lambda s, q, k: s**2, "abs, attn_core.minimum"),
    "matmul": (lambda s, q, k: s @ s, "failed"),
    "round": (lambda s, q, k: round(s), "cast"),
    "complex": (lambda s, q, k: s * 1j, "Got complex"),
    "string": (lambda s, q, k: s + "x", "Got str"),
    "nothing": (lambda s, q, k: None, "Got NoneType"),
    "condition": (lambda s, q, k: q > k, "did you mean a mask?"),
    "mask inside": (lambda s, q, k: (q > k) & attn_core.masks.causal(), "Got Mask"),
    "int or": (lambda s, q, k: q | k, "`|` must be between conditions"),
    "int not": (lambda s, q, k: ~q, "`~` must be between conditions"),
    "float and": (lambda s, q, k: s & 3, "`&` must be between conditions or integers. Got a float"),
    "float shift": (lambda s, q, k: s >> 3, "`>>` must be between integers"),
    "where of int": (lambda s, q, k: attn_core.where(q, 1, 2), "must be a condition. Got int"),
    "cast to str": (lambda s, q, k: attn_core.cast(q, str), "`kind` must be int, float or bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_spelling_that_works(name):
    fn, words = REFUSED[name]
    with pytest.raises(TypeError) as caught:
        score(lambda s, b, h, q, k: fn(s, q, k))
    assert words in str(caught.value)


def test_errors_of_frameworks_are_worded_anew_and_kept():
    """Whatever words a framework has for it, `must ` among them, the operand is named."""

    class Foreign:
        def __getitem__(self, index):
            raise IndexError("indexer must be an integer, got an expression")

    with pytest.raises(TypeError, match=r"attn_core\.operand\(array\)") as caught:
        mask(lambda b, h, q, k: Foreign()[q] > 0)
    assert isinstance(caught.value.__cause__, IndexError)


def test_other_errors_of_the_function_pass_unchanged():
    with pytest.raises(KeyError, match="gone"):
        mask(lambda b, h, q, k: {}["gone"])


def test_a_function_of_the_wrong_arity_is_told_the_right_one():
    with pytest.raises(TypeError, match=r"fn\(b, h, q, k\)"):
        mask(lambda q, k: q >= k)
    with pytest.raises(TypeError, match=r"fn\(s, b, h, q, k\)"):
        score(lambda q, k: q >= k)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda q, k: q / 2 > k, "floats round differently"),
        (lambda q, k: q * 0.5 > k, "Got"),
        (lambda q, k: q > 1.5, "float"),
        (lambda q, k: attn_core.exp(q) > k, "float"),
        (lambda q, k: attn_core.log(q) > k, "float"),
        (lambda q, k: attn_core.tanh(q) > k, "float"),
        (lambda q, k: attn_core.cast(attn_core.cast(q, float), int) > k, "float"),
        (lambda q, k: operand([0.5])[q] > k, "float"),
        (lambda q, k: np.array(0.5) > k, "float"),
    ],
)
def test_masks_hold_no_floats(fn, words):
    with pytest.raises(TypeError, match=words) as caught:
        mask(lambda b, h, q, k: fn(q, k))
    assert "integer and boolean arithmetic only" in str(caught.value)


@pytest.mark.parametrize("fn", [lambda b, h, q, k: q, lambda b, h, q, k: 1, lambda *a: a[2] - 1])
def test_a_mask_returns_a_condition(fn):
    with pytest.raises(TypeError, match="a mask must return a condition"):
        mask(fn)


@pytest.mark.parametrize("constant", [2**31, -(2**31) - 1, 2**63, np.int64(2**40)])
def test_constants_beyond_int32(constant):
    with pytest.raises(ValueError, match="int32"):
        mask(lambda b, h, q, k: q > constant)


def test_masks_and_scores_are_combined_with_their_own_kind():
    causal, cap = attn_core.masks.causal(), attn_core.scores.softcap(5.0)
    for use in (
        lambda: causal & True,
        lambda: np.ones((2, 2), bool) & causal,
        lambda: causal | cap,
        lambda: causal & np.ones((2, 2), bool),
    ):
        with pytest.raises(TypeError, match=r"masks\.dense|unsupported operand"):
            use()
    with pytest.raises(TypeError, match="must be a score"):
        cap.then(causal)
    with pytest.raises(TypeError, match="no truth value"):
        bool(causal)
    with pytest.raises(TypeError, match="no truth value"):
        _ = causal and causal
