"""Spans: what they cover, what they answer, and which problems are cut into tiles instead."""

import numpy as np
import pytest
import tensorflow as tf
from tf_tiles import DV, HK, HQ, answers, draw, inputs, traced

import attn_core
from attn_core import Dropout, masks, reference, scores
from attn_core.backends import tf as backend
from attn_core.backends.tf import chunked_grid, chunked_narrow, chunked_slots

WINDOW = masks.causal() & masks.window(left=9)


@pytest.fixture
def taken(monkeypatch):
    """Slots of 8 keys, and two rows of tiles at a time; every plan that was asked for, in order."""
    monkeypatch.setattr(chunked_narrow, "_BLOCK", 8)
    monkeypatch.setattr(chunked_narrow, "AT_ONCE", 4096)
    # Most of these are too short for spans to pay.
    monkeypatch.setattr(chunked_narrow, "_WORTH", 9.0)
    asked, plan = [], chunked_narrow.spans

    def spans(p):
        asked.append((p, plan(p)))
        return asked[-1][1]

    monkeypatch.setattr(chunked_narrow, "spans", spans)
    backend.chunked._compiled.cache_clear()
    yield asked
    backend.chunked._compiled.cache_clear()


def window(q, k):
    return (k <= q) & (q - k <= 9)


# Mask, the same in NumPy's words, Tq, Tk, more of the call. Most with spans that overlap.
NARROW = {
    "window": (WINDOW, window, 64, 64, {}),
    "both_ways": (masks.window(5, 6), lambda q, k: (q - k <= 5) & (k - q <= 6), 96, 96, {}),
    "documents": (
        masks.chunks(16) & masks.causal(),
        lambda q, k: (k <= q) & (q // 16 == k // 16),
        128,
        128,
        {},
    ),
    "sinks": (WINDOW, window, 64, 64, {"sinks": draw(HQ, seed=6)}),
    "end": (WINDOW, window, 32, 80, {"query_offset": "end"}),
    "rows_without_keys": (WINDOW, window, 80, 32, {"query_offset": "start"}),
    "only_a_sink": (WINDOW, window, 80, 32, {"query_offset": "end", "sinks": draw(HQ, seed=6)}),
    "gap": (
        masks.window(9, 0) & ~masks.window(3, 3),
        lambda q, k: window(q, k) & (q - k > 3),
        64,
        64,
        {},
    ),
    "a_corner": (
        masks.prefix(8) & masks.window(7, 0),
        lambda q, k: (k < 8) & (k <= q) & (q - k <= 7),
        64,
        64,
        {},
    ),
}


def dense(name):
    """The mask entry by entry, (Tq, Tk)."""
    _, rule, tq, tk, more = NARROW[name]
    offset = tk - tq if more.get("query_offset") == "end" else 0
    return rule(np.arange(tq)[:, None] + offset, np.arange(tk))


def small_tiles(monkeypatch):
    """Tiles of the grid of 16 by 16, which a window of 10 fills worse than spans do."""
    for name in ("_ROWS", "_KEYS", "_KEYS_MASKED", "_LONGEST"):
        monkeypatch.setattr(chunked_grid, name, 16)


@pytest.mark.parametrize("name", NARROW)
def test_every_allowed_key_lies_in_its_row_s_span(name, taken, monkeypatch):
    small_tiles(monkeypatch)
    mask, _, tq, tk, more = NARROW[name]
    answers(inputs(1, tq, tk) | more | {"mask": mask})
    s = taken[0][1]
    assert s is not None
    starts = s.starts.reshape(-1)
    assert len(starts) == tq // 8
    held = np.zeros((tq, tk), bool)
    for i, start in enumerate(starts):
        assert 0 <= start <= tk // 8 - s.slots
        held[i * 8 : i * 8 + 8, start * 8 : (start + s.slots) * 8] = True
    assert (held >= dense(name)).all()
    for first, row in zip(s.firsts, s.starts, strict=True):
        assert (row >= first).all()
        assert (row + s.slots <= first + s.reach).all()


@pytest.mark.parametrize("form", ["function", "eager", "xla"])
@pytest.mark.parametrize("name", NARROW)
def test_spans_answer_as_the_judge_and_as_tiles(name, form, taken, monkeypatch):
    small_tiles(monkeypatch)
    mask, _, tq, tk, more = NARROW[name]
    call = inputs(2, tq, tk) | more | {"mask": mask}
    found = answers(call, form)
    assert taken
    assert all(s is not None for _, s in taken)
    monkeypatch.setattr(chunked_narrow, "spans", lambda p: None)
    backend.chunked._compiled.cache_clear()
    tiled = answers(call, form)
    assert found.keys() == tiled.keys()
    for key, x in tiled.items():
        np.testing.assert_allclose(found[key], x, rtol=1e-9, atol=1e-12, err_msg=key)
    given = {n: x for n, x in call.items() if n not in ("mask", "query_offset")}
    given["mask"] = np.broadcast_to(dense(name), (2, HQ, tq, tk))
    judged = reference.attention(**given)
    np.testing.assert_allclose(found["out"], judged.out, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found["lse"], judged.lse, rtol=1e-9, atol=1e-9)
    up = {"d_out": draw(2, HQ, tq, DV, seed=4), "d_lse": draw(2, HQ, tq, seed=5)}
    for key, x in reference.gradients(**given, **up).items():
        if key in found:
            np.testing.assert_allclose(found[key], x, rtol=1e-9, atol=1e-9, err_msg=key)


def test_one_query_head_for_each_key_head(taken, monkeypatch):
    """Selects are then of equal shapes; and without a gradient of lse lone keys are settled."""
    small_tiles(monkeypatch)
    call = inputs(2, 64, 64, hq=HK) | {"mask": WINDOW}
    found = answers(call, lse=False)
    assert all(s is not None for _, s in taken)
    call["mask"] = np.broadcast_to(dense("window"), (2, HK, 64, 64))
    judged = reference.gradients(**call, d_out=draw(2, HK, 64, DV, seed=4))
    for key in ("query", "key", "value"):
        np.testing.assert_allclose(found[key], judged[key], rtol=1e-9, atol=1e-9, err_msg=key)
    # The first row sees one key, whose weight is 1 whatever the query.
    assert not found["query"][:, :, 0].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_summed_in_float32(dtype, taken, monkeypatch):
    small_tiles(monkeypatch)
    call = {n: tf.cast(x, dtype) for n, x in inputs(1, 64, 64).items()} | {"mask": WINDOW}
    up = tf.cast(draw(1, HQ, 64, DV, seed=4), dtype)
    output, found = backend.vjp(call | {"impl": "chunked"}, {"out": up}, "function")
    assert all(s is not None for _, s in taken)
    names = ("query", "key", "value")
    wide = {n: tf.cast(call[n], tf.float64).numpy() for n in names}
    wide["mask"] = np.broadcast_to(dense("window"), (1, HQ, 64, 64))
    judged = reference.attention(**wide).out
    given = reference.gradients(**wide, d_out=tf.cast(up, tf.float64).numpy())
    step = float(np.finfo(np.float16).eps) if dtype == "float16" else 2.0**-7
    for x, y in ((output.out, judged), *[(found[n], given[n]) for n in names]):
        assert x.dtype == tf.as_dtype(dtype)
        x = tf.cast(x, tf.float64).numpy()
        # One rounding of the result, and of the output that delta is summed from.
        np.testing.assert_allclose(x, y, rtol=2 * step, atol=4 * step)


def test_poison_that_no_row_sees(taken, monkeypatch):
    """Keys beyond the last row, and rows that see no key with what flows back into them."""
    small_tiles(monkeypatch)
    far = attn_core.mask(lambda b, h, q, k: (q - k >= 30) & (q - k < 38))
    for mask, tq, tk, sight, dead in (
        (WINDOW, 64, 96, slice(64, None), slice(0, 0)),
        (WINDOW, 96, 64, slice(0, 0), slice(73, None)),
        # Whole tiles of rows see nothing, and their spans lie where nobody looks.
        (far, 96, 96, slice(66, None), slice(0, 30)),
    ):
        call = inputs(1, tq, tk) | {"mask": mask, "query_offset": "start"}
        spoilt = dict(call)
        for n in ("key", "value"):
            spoilt[n] = call[n].copy()
            spoilt[n][:, :, sight] = np.nan
        spoilt["query"] = call["query"].copy()
        spoilt["query"][:, :, dead] = np.nan
        poison = draw(1, HQ, tq, DV, seed=4)
        poison[:, :, dead] = np.inf
        run = traced(call, lse=False)
        found = run(spoilt, poison)
        for n, x in run(call).items():
            assert np.isfinite(x).all()
            np.testing.assert_array_equal(found[n], x, err_msg=n)
    assert all(s is not None for _, s in taken)


OTHER = {
    "wide": {"mask": masks.causal()},
    "prefix": {"mask": masks.causal() | masks.prefix(9)},
    "looked_up": {"mask": masks.segments(np.arange(64) // 16) & masks.causal()},
    "by_head": {"mask": attn_core.mask(lambda b, h, q, k: (q >= k) & (q - k < h + 2))},
    "lengths": {"mask": WINDOW, "kv_lengths": np.array([60, 9])},
    "row_lengths": {"mask": WINDOW, "q_lengths": np.array([60, 9])},
    "offset": {"mask": WINDOW, "query_offset": np.array([3, -2])},
    "bias": {"mask": WINDOW, "bias": draw(1, HQ, 64, 64)},
    "score": {"mask": WINDOW, "score": scores.softcap(2.0)},
    "dropout": {"mask": WINDOW, "dropout": Dropout(0.3, 5)},
    "weights": {"mask": WINDOW, "return_weights": True},
}


@pytest.mark.parametrize("name", OTHER)
def test_what_spans_do_not_serve_is_cut_into_tiles(name, taken, monkeypatch):
    small_tiles(monkeypatch)
    monkeypatch.setattr(chunked_narrow, "_WORTH", 1.0)
    call = inputs(2, 64, 64) | OTHER[name]
    found = answers(call)
    assert taken
    assert all(s is None for _, s in taken)
    want = answers(call, "eager", impl="reference")
    for key, x in want.items():
        np.testing.assert_allclose(found[key], x, rtol=1e-9, atol=1e-9, err_msg=key)


def test_lengths_that_are_no_multiple_and_the_other_layout(taken, monkeypatch):
    small_tiles(monkeypatch)
    for size in (63, 65):
        answers(inputs(1, size, size) | {"mask": WINDOW})
    moved = {n: tf.constant(np.swapaxes(x, 1, 2)) for n, x in inputs(1, 64, 64).items()}
    attn_core.attention(**moved, mask=WINDOW, layout="BTHD", impl="chunked")
    assert taken
    assert all(s is None for _, s in taken)


def test_patterns_are_few_or_there_are_no_spans(taken, monkeypatch):
    call = inputs(1, 64, 64)
    answers(call, mask=WINDOW)
    found = taken[0][1]
    assert found.which.size == 8
    tiles = zip(found.which.ravel(), found.starts.ravel(), strict=True)
    for i, (number, start) in enumerate(tiles):
        row, key = 8 * i + np.arange(8)[:, None], 8 * start + np.arange(found.keys)
        assert (found.patterns[number] == ((key <= row) & (row - key < 10))).all()
    assert len(found.patterns) < 8
    monkeypatch.setattr(chunked_narrow, "_KEPT", found.patterns.size - 1)
    answers(call, mask=WINDOW)
    assert taken[-1][1] is None


def test_runs_are_one_bit_for_bit(taken, monkeypatch):
    small_tiles(monkeypatch)
    call = inputs(2, 128, 128, dtype=np.float32) | {"mask": WINDOW}
    first, run = answers(call), traced(call)
    for _ in range(5):
        for n, x in run(call).items():
            np.testing.assert_array_equal(x, first[n])


@pytest.mark.parametrize("compiled", [False, True])
def test_slots_are_summed_where_they_belong(compiled):
    places = np.array([[[0, 1], [1, 2]], [[3, 4], [0, 3]]])
    slots = draw(4, 3, seed=8, dtype=np.float32)
    sums = chunked_slots.Sums.of(places, 6)
    run = tf.function(lambda x, turn: sums.over(x, turn), jit_compile=compiled)
    for turn in range(2):
        want = np.zeros((6, 3), np.float32)
        np.add.at(want, places[turn].ravel(), slots)
        np.testing.assert_array_equal(run(tf.constant(slots), tf.constant(turn)), want)


def test_explain_tells_the_slots():
    x = tf.zeros((1, 2, 8192, 64))
    window = masks.causal() & masks.window(left=255)
    said = attn_core.explain(x, x, x, mask=window, impl="chunked")
    assert (said.tiles, said.together) == ((64, 64), 5)
    assert "5 of a row at a time" in str(said)
    # Five slots for every row of tiles, but for the first four rows.
    assert said.blocks.full + said.blocks.partial == 5 * 128 - 10
    assert said.forward < 32e6
    wide = attn_core.explain(x, x, x, mask=masks.causal(), impl="chunked")
    assert (wide.tiles, wide.together) == ((256, 512), 1)


def test_what_a_weight_of_0_is_held_against_shows_where_it_may_be_seen(taken, monkeypatch):
    """A key that is seen is data, also one that gets no weight: where the judge has NaN, NaN is.

    Once it is a key's doing that it gets none, and once its row's, whose sink takes all of it.
    """
    small_tiles(monkeypatch)
    call = inputs(1, 64, 64, hq=HK)
    call["query"][..., 0], call["key"][:, :, 20] = 1.0, (-1e6, 0, 0)
    mask = np.broadcast_to(dense("window"), (1, HK, 64, 64))
    up = draw(1, HK, 64, DV, seed=4)
    for place, more in ((20, {}), (30, {"sinks": np.full(HK, 1e6)})):
        given = call | {"value": call["value"].copy()} | more
        given["value"][:, :, place] = np.nan
        found = answers(given | {"mask": WINDOW}, lse=False)
        judged = reference.gradients(**given, mask=mask, d_out=up)
        judged["out"] = reference.attention(**given, mask=mask).out
        assert np.isnan(judged["out"]).any()
        assert np.isnan(judged["key"][:, :, place]).all()
        for key in ("out", "query", "key", "value"):
            assert np.isnan(found[key][np.isnan(judged[key])]).all(), key
            fine = ~np.isnan(found[key])
            np.testing.assert_allclose(found[key][fine], judged[key][fine], rtol=1e-9, atol=1e-9)
    assert all(s is not None for _, s in taken)


def test_a_key_with_all_the_weight_is_settled_among_others(taken, monkeypatch):
    """By what the shares come to, where more than one key is seen: exactly no gradient."""
    small_tiles(monkeypatch)
    call = inputs(1, 64, 64, hq=HK, dtype=np.float32)
    call["query"][..., 0], call["key"][:, :, 20] = 1.0, (1e6, 0, 0)
    found = answers(call | {"mask": WINDOW}, lse=False)
    assert all(s is not None for _, s in taken)
    assert not found["query"][:, :, 20:30].any()
    assert found["query"][:, :, 30:].all()
    assert found["query"][:, :, 1:20].all()
