"""Programmes become trees: equal ones, deep ones, traced once; and what Python would decide."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import entries, scored, seen

import attn_core
from attn_core import mask, operand, row, score
from attn_core.language.duals import differentiate
from attn_core.language.text import text

SHAPE = (2, 3, 4, 5)


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


def test_a_trace_inside_a_trace_has_a_row_of_its_own():
    def fn(b, h, q, k):
        inner = mask(lambda b, h, q, k: row + 1 > k)
        assert text(inner.tree) == "row + 1 > k"
        return (row - 1 < k) & (q >= k)

    assert text(mask(fn).tree) == "(row - 1 < k) & (q >= k)"


@pytest.mark.parametrize(
    ("calls", "body"), [(1, lambda q, k: (q >= k) & (k <= row)), (2, lambda q, k: row + 1 >= k)]
)
def test_a_function_runs_once_or_where_the_thread_is_to_be_told_twice(calls, body):
    ran = []
    mask(lambda b, h, q, k: ran.append(0) or body(q, k))
    assert len(ran) == calls


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
    "power": (lambda s, q, k: s**2, "Write `s * s` for `s ** 2`"),
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


@pytest.mark.parametrize(
    ("make", "fn", "words"),
    [
        (mask, lambda q, k: q >= k, "fn(b, h, q, k). Got `<lambda>`: "),
        (score, lambda q, k: q >= k, "fn(s, b, h, q, k). Got `<lambda>`: "),
        (mask, 3, "fn(b, h, q, k). Got int."),
        (mask, np.ones((2, 2), bool), "wrapped by attn_core.masks.dense(array)"),
        (mask, attn_core.masks.causal(), "Got Mask, which needs no wrapping"),
    ],
    ids=["mask", "score", "number", "array", "made"],
)
def test_what_cannot_be_called_is_told_what_can(make, fn, words):
    with pytest.raises(TypeError, match="`fn` must be a function") as caught:
        make(fn)
    assert words in str(caught.value)


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


def test_a_function_is_not_taken_for_a_tree():
    with pytest.raises(TypeError, match=r"write attn_core\.mask\(fn\)"):
        attn_core.Mask(lambda b, h, q, k: q >= k)
    with pytest.raises(TypeError, match=r"write attn_core\.score\(fn\)"):
        attn_core.Score(lambda s, b, h, q, k: s)
    with pytest.raises(TypeError, match=r"`other` must be a score.*attn_core\.score\(fn\)"):
        attn_core.scores.softcap(2.0).then(lambda s, b, h, q, k: s)
