"""Runs: what they answer, what no poison reaches, and which problems keep to the grid."""

import numpy as np
import pytest
import tensorflow as tf
from tf_tiles import DV, HQ, answers, draw, inputs, traced

import attn_core
from attn_core import Dropout, masks, reference, scores
from attn_core.backends import tf as backend
from attn_core.backends.tf import chunked_runs
from attn_core.registry import UnsupportedError


@pytest.fixture
def taken(monkeypatch):
    """Blocks of 8, some at a time; every answer to whether runs pay, in order of the calls."""
    monkeypatch.setattr(chunked_runs, "BLOCK", 8)
    monkeypatch.setattr(chunked_runs, "AT_ONCE", 2**14)
    monkeypatch.setattr(chunked_runs, "ALONE", 2**14)
    asked, found = [], chunked_runs._found

    def spied(*given):
        runs = found(*given)
        tf.py_function(lambda pay: asked.append(bool(pay)), [runs.pay], [])
        return runs

    monkeypatch.setattr(chunked_runs, "_found", spied)
    backend.chunked._compiled.cache_clear()
    yield asked
    backend.chunked._compiled.cache_clear()


UNEVEN = np.repeat(np.arange(6), [5, 16, 1, 7, 30, 5])
# Mask, the same as NumPy (Tq, Tk), Tq, Tk, more of the call.
SHORT = {
    "documents": (masks.segments(np.arange(64) // 16), None, 64, 64, {}),
    "uneven": (masks.segments(UNEVEN), None, 64, 64, {}),
    "causal": (
        masks.segments(UNEVEN) & masks.causal(),
        (UNEVEN[:, None] == UNEVEN) & np.tri(64, dtype=bool),
        64,
        64,
        {},
    ),
    "cross": (
        masks.segments(np.arange(32) // 8, np.arange(48) // 16 + 1),
        np.arange(32)[:, None] // 8 == np.arange(48) // 16 + 1,
        32,
        48,
        {"query_offset": "start"},
    ),
    "end": (
        masks.segments(UNEVEN) & masks.causal(),
        ((UNEVEN[:, None] == UNEVEN) & np.tri(64, dtype=bool))[32:],
        32,
        64,
        {"query_offset": "end"},
    ),
}


def dense(name):
    _, found, tq, _, _ = SHORT[name]
    if found is not None:
        return found
    ids = np.arange(64) // 16 if name == "documents" else UNEVEN
    return ids[:tq, None] == ids


@pytest.mark.parametrize("form", ["function", "eager", "xla"])
@pytest.mark.parametrize("lse", [True, False])
@pytest.mark.parametrize("name", SHORT)
def test_runs_answer_as_the_judge(name, lse, form, taken, monkeypatch):
    mask, _, tq, tk, more = SHORT[name]
    call = inputs(2, tq, tk) | more | {"mask": mask}
    if form == "xla":
        # Compiled, it is the grid that answers: its graph has no place for what runs ask.
        monkeypatch.undo()
        monkeypatch.setattr(chunked_runs, "BLOCK", 8)
    found = answers(call, form, lse)
    if form != "xla":
        assert taken == [True, True]
    given = {n: call[n] for n in ("query", "key", "value")}
    given["mask"] = np.broadcast_to(dense(name), (2, HQ, tq, tk))
    judged = reference.attention(**given)
    np.testing.assert_allclose(found["out"], judged.out, rtol=1e-9, atol=1e-9)
    up = {"d_out": draw(2, HQ, tq, DV, seed=4)}
    if lse:
        np.testing.assert_allclose(found["lse"], judged.lse, rtol=1e-9, atol=1e-9)
        up["d_lse"] = draw(2, HQ, tq, seed=5)
    for key, x in reference.gradients(**given, **up).items():
        if key in found:
            np.testing.assert_allclose(found[key], x, rtol=1e-9, atol=1e-9, err_msg=key)


def test_one_document_moves_no_other_and_runs_are_one_bit_for_bit(taken):
    call = inputs(2, 64, 64, dtype=np.float32) | {"mask": SHORT["causal"][0]}
    first, run = answers(call), traced(call)
    for _ in range(5):
        for n, x in run(call).items():
            np.testing.assert_array_equal(x, first[n])
    place = UNEVEN == 4
    moved = dict(call)
    for n in ("query", "key", "value"):
        moved[n] = call[n].copy()
        moved[n][:, :, place] += 1
    for n, x in run(moved).items():
        np.testing.assert_array_equal(x[:, :, ~place], first[n][:, :, ~place])
        assert (x[:, :, place] != first[n][:, :, place]).any()
    assert all(taken)


@pytest.mark.parametrize("lse", [True, False])
def test_poison_that_no_row_sees(lse, taken):
    """Padding of a number that no other position has; rows there see nothing at all."""
    rows, keys = np.arange(64) // 16, np.arange(64) // 16
    rows, keys = np.where(np.arange(64) < 50, rows, 8), np.where(np.arange(64) < 53, keys, 9)
    call = inputs(1, 64, 64) | {"mask": masks.segments(rows, keys)}
    up = draw(1, HQ, 64, DV, seed=4)
    spoilt = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in call.items()}
    spoilt["query"][:, :, 50:], spoilt["key"][:, :, 53:] = np.nan, np.inf
    spoilt["value"][:, :, 53:] = np.nan
    poison = up.copy()
    poison[:, :, 50:] = np.nan
    run = traced(call, lse=lse)
    want, found = run(call, up), run(spoilt, poison)
    for n, x in want.items():
        # The lse of a row without keys is -inf.
        assert n == "lse" or np.isfinite(x).all()
        np.testing.assert_array_equal(found[n], x, err_msg=n)
    assert not found["out"][:, :, 50:].any()
    assert taken == [True] * 4


def test_gradients_asked_of_xla_after_a_forward_pass_outside_it(taken):
    """Runs keep no sums of the rows, which tiles of the grid are computed again from."""
    call = inputs(2, 64, 64)
    up = tf.constant(draw(2, HQ, 64, DV, seed=4))
    want = answers(call | {"mask": SHORT["causal"][0]}, lse=False)
    arrays = {n: tf.constant(x) for n, x in call.items()}
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(arrays)
        out = attn_core.attention(**arrays, mask=SHORT["causal"][0], impl="chunked")
    found = tf.function(lambda: tape.gradient(out, arrays, up), jit_compile=True)()
    assert taken == [True] * 3
    for n, x in found.items():
        np.testing.assert_allclose(x, want[n], rtol=1e-9, atol=1e-9, err_msg=n)


@pytest.mark.parametrize("lse", [True, False])
def test_poison_in_tiles_that_see_nothing(lse, taken):
    """They are given the first keys, which here nobody sees."""
    rows, keys = np.where(np.arange(64) < 44, UNEVEN, 8), np.where(np.arange(64) < 8, 9, UNEVEN)
    call = inputs(1, 64, 64) | {"mask": masks.segments(rows, keys)}
    up = draw(1, HQ, 64, DV, seed=4)
    dead = ~(rows[:, None] == keys).any(1)
    assert dead[48:].all()
    spoilt = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in call.items()}
    spoilt["key"][:, :, :8], spoilt["value"][:, :, :8] = np.nan, np.inf
    spoilt["query"][:, :, dead] = np.inf
    poison = up.copy()
    poison[:, :, dead] = np.nan
    run = traced(call, lse=lse)
    want, found = run(call, up), run(spoilt, poison)
    for n, x in want.items():
        np.testing.assert_array_equal(found[n], x, err_msg=n)
        assert n == "lse" or np.isfinite(x).all()
    assert taken == [True] * 4


@pytest.mark.parametrize("lse", [True, False])
def test_rows_whose_logits_are_all_minus_infinity_or_not_a_number(lse, taken):
    """Document by document: ordinary, overflowing to -inf, with a NaN, with +inf."""
    ids = np.arange(64) // 16
    call = inputs(1, 64, 64)
    call["query"][..., 0] = 1
    call["query"][:, :, 16:32], call["key"][:, :, 16:32] = 1e200, -1e200
    call["key"][:, :, 33, 0], call["key"][:, :, 50, 0] = np.nan, np.inf
    up = draw(1, HQ, 64, DV, seed=4)
    found = answers(call | {"mask": masks.segments(ids)}, lse=lse, up=up)
    assert taken == [True, True]
    given = call | {"mask": np.broadcast_to(ids[:, None] == ids, (1, HQ, 64, 64))}
    judged = reference.attention(**given)
    pulled = {"d_out": up} | ({"d_lse": draw(1, HQ, 64, seed=5)} if lse else {})
    wanted = {"out": judged.out, "lse": judged.lse} | reference.gradients(**given, **pulled)
    for n, x in found.items():
        np.testing.assert_allclose(x, wanted[n], rtol=1e-9, atol=1e-9, err_msg=n)
        assert n == "lse" or not x[:, :, 16:32].any()
        assert np.isfinite(x[:, :, :16]).all()
        assert np.isnan(x[:, :, 32:]).any()


def test_no_weight_beside_an_infinite_gradient_is_data(taken):
    """0 times it is NaN where the key may be seen, and nothing where it may not."""
    ids = np.arange(64) // 12
    call, up = inputs(1, 64, 64), draw(1, HQ, 64, DV, seed=4)
    call["query"][..., 0], call["key"][:, :, 14] = 1, [-1e5, 0, 0]
    run = traced(call | {"mask": masks.segments(ids)}, lse=False)
    spoilt, poison = call | {"value": call["value"].copy()}, up.copy()
    spoilt["value"][:, :, 14, 1] = poison[:, :, 15, 2] = np.inf
    for given, pulled in ((spoilt, up), (call, poison)):
        _poisoned(run, ids, given, pulled)
    assert taken == [True] * 4


def _poisoned(run, ids, call, up):
    found = run(call | {"mask": masks.segments(ids)}, up)
    mask = np.broadcast_to(ids[:, None] == ids, (1, HQ, 64, 64))
    wanted = reference.gradients(**call, mask=mask, d_out=up)
    for n in ("query", "key", "value"):
        np.testing.assert_array_equal(np.isnan(found["key"][:, :, 14]), True)
        kept = np.isfinite(wanted[n])
        assert not kept.all() or n == "value"
        assert not np.isfinite(found[n][~kept]).any()
        # Rows of the same tile may share it; those of others do not.
        np.testing.assert_allclose(found[n][:, :, 24:], wanted[n][:, :, 24:], 1e-9, 1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_dtypes_are_summed_in_float32(dtype, taken):
    call = {n: tf.cast(x, dtype) for n, x in inputs(2, 64, 64).items()}
    up = tf.cast(draw(2, HQ, 64, DV, seed=4), dtype)
    given = call | {"mask": SHORT["causal"][0], "impl": "chunked"}
    output, found = backend.vjp(given, {"out": up}, "function")
    assert taken == [True, True]
    wide = {n: tf.cast(x, tf.float64).numpy() for n, x in call.items()}
    wide["mask"] = np.broadcast_to(dense("causal"), (2, HQ, 64, 64))
    judged = reference.gradients(**wide, d_out=tf.cast(up, tf.float64).numpy())
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-19}[dtype]
    judged["out"] = reference.attention(**wide).out
    for n, x in (found | {"out": output.out}).items():
        assert x.dtype == tf.as_dtype(dtype)
        # One rounding of the result, and of the output that delta is summed from.
        x = tf.cast(x, tf.float64).numpy()
        np.testing.assert_allclose(x, judged[n], rtol=2 * step, atol=4 * step, err_msg=n)


def test_two_tapes_in_a_graph_ask_first_derivatives(taken):
    """As a generator and its judge do: no tape differentiates the loops of the other's."""
    call = {n: tf.constant(x) for n, x in inputs(1, 64, 64).items()}
    call |= {"mask": SHORT["causal"][0]}

    def both(impl):
        query, value = call["query"], call["value"]
        with tf.GradientTape() as first, tf.GradientTape() as second:
            first.watch(query)
            second.watch(value)
            out = tf.reduce_sum(attn_core.attention(**call, impl=impl) ** 2)
        return first.gradient(out, query), second.gradient(out, value)

    found = tf.function(both, autograph=False)("chunked")
    for one, want in zip(found, both("reference"), strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-9, atol=1e-12)


def test_what_a_graph_cannot_differentiate_is_refused_by_name(taken):
    """As it is where the grid answers; nobody gets zeros."""
    call = {n: tf.constant(x) for n, x in inputs(1, 64, 64).items()}
    query, more = call.pop("query"), {"mask": SHORT["causal"][0], "impl": "chunked"}

    @tf.function(autograph=False)
    def second(query):
        with tf.GradientTape() as outer:
            outer.watch(query)
            with tf.GradientTape() as inner:
                inner.watch(query)
                out = attn_core.attention(query, **call, **more)
            slope = inner.gradient(out, query)
        return outer.gradient(slope, query)

    with pytest.raises(UnsupportedError, match='impl="reference"'):
        second(query)

    with (
        pytest.raises(UnsupportedError, match='impl="reference"'),
        tf.autodiff.ForwardAccumulator(query, tf.ones_like(query)) as forward,
    ):
        forward.jvp(attn_core.attention(query, **call, **more))


def test_long_runs_are_left_to_the_grid(taken, monkeypatch):
    """Where a turn has no room for the longest run, or runs hold more than the grid's tiles do."""
    monkeypatch.setattr(chunked_runs, "SHORT", 1)
    one, apart = np.zeros(64, int), np.arange(64) // 8 % 4
    for ids, room, pay in ((one, 2**12, False), (one, 2**13, True), (apart, 2**14, False)):
        # A row of tiles by itself may take more than a turn of several.
        monkeypatch.setattr(chunked_runs, "AT_ONCE", room // 2)
        monkeypatch.setattr(chunked_runs, "ALONE", room)
        call = inputs(1, 64, 64) | {"mask": masks.segments(ids)}
        found = answers(call)
        assert taken[-2:] == [pay, pay]
        want = answers(call | {"impl": "reference"}, "eager")
        for n, x in want.items():
            np.testing.assert_allclose(found[n], x, rtol=1e-9, atol=1e-9, err_msg=n)


OTHER = {
    "not_looked_up": {"mask": masks.causal()},
    "lengths": {"kv_lengths": np.array([60, 9])},
    "row_lengths": {"q_lengths": np.array([60, 9])},
    "offset": {"query_offset": np.array([3, -2])},
    "bias": {"bias": draw(1, HQ, 64, 64)},
    "sinks": {"sinks": draw(HQ, seed=6)},
    "score": {"score": scores.softcap(2.0)},
    "dropout": {"dropout": Dropout(0.3, 5)},
    "by_batch": {"mask": masks.segments(np.stack([UNEVEN, UNEVEN[::-1]]))},
}


@pytest.mark.parametrize("name", OTHER)
def test_what_runs_do_not_serve_is_cut_into_tiles(name, taken):
    call = inputs(2, 64, 64) | {"mask": masks.segments(UNEVEN)} | OTHER[name]
    found = answers(call)
    assert not taken
    want = answers(call | {"impl": "reference"}, "eager")
    for key, x in want.items():
        np.testing.assert_allclose(found[key], x, rtol=1e-9, atol=1e-9, err_msg=key)


def test_lengths_that_are_no_multiple_and_the_other_layout(taken):
    for size in (63, 72):
        answers(inputs(1, size, size) | {"mask": masks.segments(np.arange(size) // 9)})
    moved = {n: tf.constant(np.swapaxes(x, 1, 2)) for n, x in inputs(1, 64, 64).items()}
    attn_core.attention(**moved, mask=masks.segments(UNEVEN), layout="BTHD", impl="chunked")
    assert not taken
