"""The dual reading: derivatives of scores against central differences of their values."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from support import host, positions

from attn_core import cast, exp, log, maximum, minimum, operand, score, scores, tanh, where
from attn_core.backends.numpy.arrays import Reading
from attn_core.language.duals import differentiate
from attn_core.language.values import Score

SHAPE = (2, 3, 4, 5)
STEP = 1e-6


def value(made: Score, s: np.ndarray, arrays: tuple[Any, ...]) -> np.ndarray:
    index = {**positions(s.shape, 1), "s": s}
    return np.broadcast_to(Reading("float64").read(made.tree, index, arrays)[0], s.shape)


def slopes(made: Score, s: np.ndarray, arrays: tuple[Any, ...], up: np.ndarray):
    """up * d/ds, and the gradient of sum(up * score) for each float operand."""
    dual = differentiate(made.tree)
    index = {**positions(s.shape, 1), "s": s}
    found = [np.broadcast_to(x, s.shape) for x in Reading("float64").read(dual.tree, index, arrays)]
    assert np.array_equal(found[0], value(made, s, arrays), equal_nan=True)
    gradients = {n: np.zeros(a.shape) for n, a in enumerate(arrays) if a.dtype.kind == "f"}
    at = 2
    for site in dual.sites:
        place = tuple(
            np.clip(i, 0, size - 1)
            for i, size in zip(
                found[at + 1 : at + 1 + site.indices], arrays[site.operand].shape, strict=True
            )
        )
        given = up * found[at]
        np.add.at(gradients[site.operand], place, given if place else given.sum())
        at += 1 + site.indices
    assert at == len(found)
    return up * found[1], gradients


def differences(made: Score, s: np.ndarray, arrays: tuple[Any, ...], up: np.ndarray):
    d_s = up * (value(made, s + STEP, arrays) - value(made, s - STEP, arrays)) / (2 * STEP)
    gradients = {}
    for n, array in enumerate(arrays):
        if array.dtype.kind != "f":
            continue
        gradients[n] = np.zeros(array.shape)
        for at in np.ndindex(*array.shape):
            ends = []
            for step in (STEP, -STEP):
                moved = array.copy()
                moved[at] += step
                changed = (*arrays[:n], moved, *arrays[n + 1 :])
                ends.append((up * value(made, s, changed)).sum())
            gradients[n][at] = (ends[0] - ends[1]) / (2 * STEP)
    return d_s, gradients


def agree(made: Score, seed: int = 0, close: float = 1e-7) -> None:
    rng = np.random.default_rng(seed)
    s, up = rng.standard_normal((2, *SHAPE))
    arrays = tuple(
        np.asarray(a, float) if a.dtype.kind == "f" else a for a in host(made.arrays, "float64")
    )
    d_s, gradients = slopes(made, s, arrays, up)
    n_s, numeric = differences(made, s, arrays, up)
    scale = 1 + np.abs(n_s).max()
    np.testing.assert_allclose(d_s, n_s, atol=close * scale, rtol=1e-6)
    assert gradients.keys() == numeric.keys()
    for n, wanted in numeric.items():
        size = 1 + np.abs(wanted).max()
        np.testing.assert_allclose(gradients[n], wanted, atol=close * size * 10, rtol=1e-6)


# Smooth scores of every make -------------------------------------------------------------------

SMOOTH = (
    "add",
    "sub",
    "mul",
    "div",
    "tanh",
    "exp",
    "log",
    "neg",
    "abs",
    "where",
    "minimum",
    "maximum",
    "mod",
    "h",
    "bk",
    "clamped",
    "index",
    "number",
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(SMOOTH), st.integers(0, 99), st.integers(0, 99), st.floats(-2, 2)
        ),
        min_size=1,
        max_size=14,
    ),
    st.integers(0, 5),
)
def test_random_scores(programme, seed):
    rng = np.random.default_rng(seed + 100)
    one, two = operand(rng.standard_normal(3)), operand(rng.standard_normal((2, 4)))

    def combined(op, x, y, number, h, b, q, k):
        return {
            "add": lambda: x + y,
            "sub": lambda: x - y * 0.5,
            "mul": lambda: tanh(x) * y,
            "div": lambda: x / (2.0 + tanh(y)),
            "tanh": lambda: tanh(x),
            "exp": lambda: exp(tanh(x)),
            "log": lambda: log(2.0 + x * tanh(x)),
            "neg": lambda: -x,
            # Corners are moved to where no sample falls.
            "abs": lambda: abs(x + 40.0) + abs(y - 70.0),
            "where": lambda: where(q > k, x, y * 0.5),
            "minimum": lambda: minimum(tanh(x), y * y + 1.5),
            "maximum": lambda: maximum(tanh(x), y * y + 1.5),
            "mod": lambda: (tanh(x) * 0.25 + 0.5) % 3.0 + y,
            "h": lambda: x * one[h],
            "bk": lambda: x + two[b, k],
            "clamped": lambda: x * 0.5 + two[h - 1, q - 2],
            "index": lambda: x + (q - k) * 0.25 * y,
            "number": lambda: x * number,
        }[op]()

    def fn(s, b, h, q, k):
        values = [s]
        for op, x, y, number in programme:
            x, y = values[-1 - x % min(4, len(values))], values[-1 - y % min(4, len(values))]
            values.append(combined(op, x, y, number, h, b, q, k))
        return values[-1] + tanh(s)

    made = score(fn)
    s = np.random.default_rng(seed).standard_normal(SHAPE)
    with np.errstate(all="ignore"):
        found = value(made, s, host(made.arrays, "float64"))
    if np.abs(found).max() < 1e3:
        agree(made, seed, close=1e-6)


VOCABULARY = {
    "softcap": lambda rng: scores.softcap(1.5),
    "softcap learnt": lambda rng: scores.softcap(np.array(1.5)),
    "alibi": lambda rng: scores.alibi(rng.standard_normal(3)),
    "alibi heads": lambda rng: scores.alibi(heads=3),
    "t5": lambda rng: scores.relative_bias(rng.standard_normal((8, 3)), max_distance=20),
    "t5 causal": lambda rng: scores.relative_bias(
        rng.standard_normal((6, 3)), bidirectional=False, max_distance=16
    ),
    "clipped": lambda rng: scores.relative_bias(rng.standard_normal((5, 3)), buckets="clipped"),
    "then": lambda rng: scores.alibi(rng.standard_normal(3)).then(scores.softcap(np.array(2.0))),
    "all": lambda rng: (
        scores.relative_bias(rng.standard_normal((8, 3)), max_distance=20)
        .then(scores.softcap(2.0))
        .then(scores.alibi(rng.standard_normal(3)))
        .then(score(lambda s, b, h, q, k: s * s))
    ),
}


@pytest.mark.parametrize("name", VOCABULARY)
def test_the_vocabulary(name):
    agree(VOCABULARY[name](np.random.default_rng(3)))


def test_one_array_looked_up_twice_gets_both_gradients():
    table = operand(np.array([0.5, -0.25, 0.75]))
    agree(score(lambda s, b, h, q, k: s * table[h] + tanh(table[h]) * table[k // 2] + table[q]))


def test_integers_and_booleans_have_no_gradient():
    ids, flags, floats = operand(np.arange(5)), operand(np.arange(5) > 2), operand([0.5, 2.0])
    made = score(lambda s, b, h, q, k: s * ids[k] + where(flags[k], s, floats[b]))
    dual = differentiate(made.tree)
    assert [made.arrays[site.operand] is floats.array for site in dual.sites] == [True]
    agree(made)


def test_a_score_without_s():
    table = operand(np.array([0.5, -0.25, 0.75]))
    agree(score(lambda s, b, h, q, k: table[h] * (q - k)))
    agree(score(lambda s, b, h, q, k: 0))


def test_a_lookup_chosen_by_a_float_lookup_passes_nothing_through_the_index():
    inner, outer = operand(np.array([0.5, 1.5, 2.5, 3.5])), operand(np.array([1.0, 2.0, 4.0, 8.0]))
    agree(score(lambda s, b, h, q, k: s + outer[cast(inner[k], int)] * inner[q]))


# Edges -----------------------------------------------------------------------------------------


def slope_at(fn, *points):
    """d fn(s)/ds at each point."""
    made = score(lambda s, b, h, q, k: fn(s))
    dual = differentiate(made.tree)
    s = np.array(points, "float64")
    index = {"s": s, "q": np.zeros_like(s, np.int32), "k": np.zeros_like(s, np.int32)}
    with np.errstate(all="ignore"):
        found = Reading("float64").read(dual.tree, index, host(made.arrays, "float64"))[1]
    return np.broadcast_to(found, s.shape).tolist()


@pytest.mark.parametrize(
    ("fn", "points", "wanted"),
    [
        (lambda s: minimum(s, 1.0), (0.0, 1.0, 2.0), [1.0, 0.5, 0.0]),
        (lambda s: minimum(1.0, s), (0.0, 1.0, 2.0), [1.0, 0.5, 0.0]),
        (lambda s: maximum(s, 1.0), (0.0, 1.0, 2.0), [0.0, 0.5, 1.0]),
        (lambda s: maximum(1.0, s), (0.0, 1.0, 2.0), [0.0, 0.5, 1.0]),
        (lambda s: minimum(s, s), (0.0, 3.0), [1.0, 1.0]),
        (lambda s: maximum(s * 3.0, s * 1.0), (0.0, 1.0, -1.0), [2.0, 3.0, 1.0]),
        (lambda s: maximum(s, -0.0), (0.0, -0.0), [0.5, 0.5]),
        (lambda s: minimum(maximum(s, 0.0), 1.0), (0.0, 0.5, 1.0), [0.5, 1.0, 0.5]),
        (lambda s: abs(s), (-2.0, -0.0, 0.0, 2.0), [-1.0, 0.0, 0.0, 1.0]),
        (lambda s: abs(abs(s)), (-2.0, 0.0, 2.0), [-1.0, 0.0, 1.0]),
        (lambda s: s / 0.0, (-1.0, 0.0, 1.0), [0.0, 0.0, 0.0]),
        (lambda s: 1.0 / s, (0.0, 2.0), [0.0, -0.25]),
        (lambda s: s / s, (0.0, 2.0), [0.0, 0.0]),
        (lambda s: s % 2.0, (-3.0, 0.5, 5.5), [1.0, 1.0, 1.0]),
        (lambda s: s % 0.0, (-3.0, 0.5), [0.0, 0.0]),
        (lambda s: 7.5 % s, (2.0, -2.0, 0.0), [-3.0, 4.0, 0.0]),
        (lambda s: s // 2.0, (-3.0, 0.5), [0.0, 0.0]),
        (lambda s: s + 3 * cast(s, int), (1.5, -1.5), [1.0, 1.0]),
        (lambda s: where(s > 0, s * s, -3.0 * s), (2.0, -2.0, 0.0), [4.0, -3.0, -3.0]),
        (lambda s: where(s > 0, 1.0, 0.0), (2.0, 0.0), [0.0, 0.0]),
        (lambda s: cast(s > 0, float) * s, (2.0, -2.0), [1.0, 0.0]),
        (lambda s: -s, (2.0,), [-1.0]),
        (lambda s: 3.0 - s, (2.0,), [-1.0]),
        (lambda s: exp(s), (0.0, -math.inf), [1.0, 0.0]),
        (lambda s: log(s), (2.0, 0.5), [0.5, 2.0]),
        (lambda s: tanh(s), (0.0, math.inf, -math.inf), [1.0, 0.0, 0.0]),
    ],
)
def test_edges(fn, points, wanted):
    assert slope_at(fn, *points) == pytest.approx(wanted, abs=0)


def test_where_keeps_the_other_branch_from_poisoning_the_slope():
    fn = lambda s: where(s > 0, log(s), 0.0)  # noqa: E731
    found = slope_at(fn, -1.0, 0.0, 2.0)
    assert found == [0.0, 0.0, 0.5]


def test_derivatives_share_their_steps_with_the_score():
    made = score(lambda s, b, h, q, k: tanh(s * 0.5 + (q - k)))
    ops = [step.op for step in differentiate(made.tree).tree.steps]
    assert ops.count("tanh") == 1
    assert differentiate(made.tree) is differentiate(
        score(lambda s, b, h, q, k: tanh(s * 0.5 + (q - k))).tree
    )


def test_deep_and_shared_scores_differentiate_in_linear_steps():
    def fn(s, b, h, q, k):
        for _ in range(5_000):
            s = s + tanh(s) * 0.001
        return s

    made = score(fn)
    assert len(differentiate(made.tree).tree.steps) < 20 * len(made.tree.steps)
