"""The language: every operator against Python's own, kinds, and look-ups."""

from __future__ import annotations

import enum
import math

import ml_dtypes
import numpy as np
import pytest
from support import entries, host, scored, seen

import attn_core
from attn_core import mask, masks, operand, score, scores
from attn_core.backends.numpy.arrays import Reading
from attn_core.language.operands import Operand, Table
from attn_core.language.text import text
from attn_core.language.tree import INT_MAX, INT_MIN, axes_along

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


@pytest.mark.parametrize("op", [attn_core.minimum, attn_core.maximum])
def test_nan_on_either_side_of_an_extreme_is_nan(op):
    for x, y, z in float_table_of(op, [math.nan, 0.5], [math.nan, -math.inf, math.inf]):
        assert math.isnan(z) == (math.isnan(x) or math.isnan(y)), (x, y)


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


B, H, Q, K = SHAPE


@pytest.mark.parametrize(
    ("fn", "shapes", "wanted"),
    [
        (lambda t: lambda b, h, q, k: t[b, q] == t[b, k], [(B, 9)], ((0,), (None,))),
        (lambda t: lambda b, h, q, k: t[q, h, b] > k, [(Q, H, B)], ((2,), (1,))),
        (
            lambda t, u: lambda b, h, q, k: (t[h] > k) & (u[b] > q),
            [(H,), (B,)],
            ((None, 0), (0, None)),
        ),
        (lambda t: lambda b, h, q, k: t[b, h, q, k] > 2, [(1, H, Q, K)], ((None,), (1,))),
        (lambda t: lambda b, h, q, k: (q >= k) & (t[q] > 1), [(Q,)], ((None,), (None,))),
        # Read in another way, of another size, or by something else too.
        (lambda t: lambda b, h, q, k: (t[b, q] > 1) & (h < 2), [(B, Q)], ((0,), None)),
        (lambda t: lambda b, h, q, k: t[b + 1, h // 2] > k, [(B, H)], (None, None)),
        (lambda t: lambda b, h, q, k: t[b, h] > k, [(B + 1, H + 4)], (None, None)),
        (lambda t: lambda b, h, q, k: t[b, h] == t[k, h], [(B, H)], (None, (1,))),
        (lambda t: lambda b, h, q, k: t[b, b] > k, [(B, B)], (None, (None,))),
    ],
)
def test_what_is_looked_up_by_an_index_alone_may_be_cut_along_it(fn, shapes, wanted):
    rng = np.random.default_rng(0)
    tables = [rng.integers(0, 5, shape) for shape in shapes]
    tree = mask(fn(*[operand(t) for t in tables])).tree
    assert tuple(axes_along(tree, n, shapes, size) for n, size in (("b", B), ("h", H))) == wanted

    def entry(arrays, b, h):
        at = {"b": b, "h": h, "q": np.arange(Q)[:, None], "k": np.arange(K), "row": 0}
        at = {n: np.asarray(i, np.int32) for n, i in at.items()}
        (found,) = Reading("float64").read(tree, at, host(arrays, "float64"))
        return np.broadcast_to(found, (Q, K)).tolist()

    for n, axes in zip(("b", "h"), wanted, strict=True):
        if axes is None:
            continue
        last = [t if a is None else np.take(t, [-1], a) for t, a in zip(tables, axes, strict=True)]
        for other in range(H if n == "b" else B):
            whole, part = ((B - 1, other), (0, other)) if n == "b" else ((other, H - 1), (other, 0))
            assert entry(last, *part) == entry(tables, *whole)


@pytest.mark.parametrize(
    ("make", "fn", "names", "got"),
    [
        (attn_core.mask, lambda q, k, b, h: q >= k, "b, h, q, k", "q, k, b, h"),
        (attn_core.score, lambda b, h, q, k, s: s * 0.5, "s, b, h, q, k", "b, h, q, k, s"),
    ],
)
def test_indices_in_another_order_are_another_function(make, fn, names, got):
    """They are handed over by place: `q >= k` of the first would have been `b >= h`."""
    with pytest.raises(
        TypeError, match=rf"`fn` must be fn\({names}\), in this order\. Got fn\({got}\)\."
    ):
        make(fn)
    # Names of one's own mean what their places mean.
    assert attn_core.mask(lambda _b, _h, row, key: row >= key) == masks.causal()


def test_powers_are_written_out():
    for fn in (lambda s, b, h, q, k: s**2, lambda s, b, h, q, k: 2.0**s):
        with pytest.raises(TypeError, match=r"`\*\*` is not part of .*`s \* s` for `s \*\* 2`"):
            attn_core.score(fn)


def test_equal_are_those_that_say_the_same_of_numbers_alone():
    """As static arguments of a jit they are compiled once; of arrays the values may change."""
    for make in (
        masks.causal,
        lambda: masks.causal() & masks.window(3),
        lambda: scores.alibi(heads=4),
    ):
        assert make() == make()
        assert len({make(), make()}) == 1
    ids = np.arange(4)
    documents = masks.segments(ids)
    assert documents == documents
    assert documents != masks.segments(ids)
    assert masks.causal() != masks.window(3)
    assert scores.alibi(heads=4) != scores.alibi(heads=8)
    zeros = [operand([x, 1.0]) for x in (0.0, -0.0)]
    one, other = [attn_core.score(lambda s, b, h, q, k, t=t: s + t[h]) for t in zeros]
    assert one != other
    assert scores.softcap(1.0) != masks.causal()
    assert masks.causal() != "mask(q >= k)"


def test_a_method_may_not_take_them_in_another_order_either():
    class Rule:
        def wrong(self, q, k, b, h):
            return q >= k

        def right(self, b, h, q, k):
            return q >= k

    with pytest.raises(TypeError, match=r"in this order\. Got fn\(q, k, b, h\)\."):
        attn_core.mask(Rule().wrong)
    assert attn_core.mask(Rule().right) == masks.causal()
