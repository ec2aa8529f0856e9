"""JAX's transforms: jvp, second derivatives, vmap, checkpoint; and what crosses jit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_cases import (
    ALL_JUDGED,
    CASES,
    CAUSAL,
    DV,
    EMPTY_ROWS,
    EXTRAS,
    FULL,
    HK,
    HQ,
    IDS,
    PLAIN,
    SINKS,
    SLOPES,
    TK,
    TQ,
    B,
    D,
    arrays,
    close,
    cotangents,
    normal,
    rng,
    shapes_of,
)

import attn_core
from attn_core import masks, reference, scores
from attn_core.language.values import Dropout

# Transforms ---------------------------------------------------------------------------------------


def smooth(x, impl="reference"):
    """Every option, as a function of all that is differentiable."""
    return attn_core.attention(
        x["query"],
        x["key"],
        x["value"],
        bias=x["bias"],
        sinks=x["sinks"],
        score=scores.alibi(x["slopes"]).then(scores.softcap(3.0)),
        mask=masks.window(4) & masks.segments(IDS),
        kv_lengths=np.array([6, 7]),
        q_lengths=np.array([5, 4]),
        query_offset=np.array([1, 2]),
        dropout=Dropout(0.3, 11),
        impl=impl,
        **EXTRAS,
    )


def smooth_judge(x):
    return {
        "query": x["query"],
        "key": x["key"],
        "value": x["value"],
        "bias": x["bias"],
        "sinks": x["sinks"],
        "score": lambda s, b, h, q, k, t: 3.0 * np.tanh((s - t[h] * abs(q - k)) / 3.0),
        "operands": (x["slopes"],),
        "mask": ALL_JUDGED["mask"],
        "kv_lengths": np.array([6, 7]),
        "q_lengths": np.array([5, 4]),
        "query_offset": np.array([1, 2]),
        "dropout": (0.3, 11),
    }


def point(seed):
    shapes = {"query": (B, HQ, TQ, D), "key": (B, HK, TK, D), "value": (B, HK, TK, DV)}
    shapes |= {"bias": (B, 1, TQ, TK), "sinks": (HQ,), "slopes": (HQ,)}
    return {
        n: normal(*s, seed=seed + j, dtype=np.float64) for j, (n, s) in enumerate(shapes.items())
    }


def moved(x, t, step):
    return {n: x[n] + step * t[n] for n in x}


def finite(lse):
    """The lse without its -inf, of which there is no difference."""
    return np.where(np.isneginf(lse), 0.0, lse)


@pytest.mark.parametrize("jit", [False, True])
def test_jvp_against_differences(jit):
    x, t, step = point(40), point(50), 1e-5
    with jax.enable_x64(True):
        push = partial(jax.jvp, smooth)
        push = jax.jit(push) if jit else push
        _, tangent = push((jax.tree.map(jnp.asarray, x),), (jax.tree.map(jnp.asarray, t),))
    above = reference.attention(**smooth_judge(moved(x, t, step)))
    below = reference.attention(**smooth_judge(moved(x, t, -step)))
    for name in ("out", "lse", "weights"):
        wanted = (finite(getattr(above, name)) - finite(getattr(below, name))) / (2 * step)
        close(name, getattr(tangent, name), wanted, 1e-8)
        assert np.abs(wanted).max() > 0.1


def test_second_derivatives_against_differences():
    """Both orders of differentiation, of a loss that reads out, lse and weights."""
    x, t, step = point(40), point(50), 1e-5
    pulled = cotangents(shapes_of(PLAIN), np.float64)

    def loss(x):
        y = smooth(x)
        # lse is -inf in padded rows: selected away, as anyone has to who sums it.
        lse = jnp.where(jnp.isneginf(y.lse), 0.0, y.lse)
        return sum((g * v).sum() for g, v in zip(weights, (y.out, lse, y.weights), strict=True))

    def gradient(step):
        given = smooth_judge(moved(x, t, step))
        found = reference.gradients(**given, **{f"d_{n}": g for n, g in pulled.items()})
        return {**found, "slopes": found["operands"][0]}

    above, below = gradient(step), gradient(-step)
    with jax.enable_x64(True):
        weights = [jnp.asarray(pulled[n]) for n in ("out", "lse", "weights")]
        at, along = jax.tree.map(jnp.asarray, x), jax.tree.map(jnp.asarray, t)
        _, forward = jax.jit(lambda: jax.jvp(jax.grad(loss), (at,), (along,)))()
        reverse = jax.jit(
            jax.grad(lambda x: sum((jax.grad(loss)(x)[n] * along[n]).sum() for n in x))
        )(at)
    for name in x:
        wanted = (above[name] - below[name]) / (2 * step)
        # A difference of the judge's own differences.
        close(name, forward[name], wanted, 2e-6)
        close(name, reverse[name], np.asarray(forward[name]), 1e-12)
        assert np.abs(wanted).max() > 1e-2


def test_hessian_with_rows_that_see_nothing():
    x = arrays(PLAIN)

    def loss(query):
        given = {**x, "query": query, "sinks": jnp.asarray(SINKS)}
        out = attn_core.attention(**given, mask=EMPTY_ROWS, q_lengths=4, impl="reference")
        return (out**2).sum()

    hessian = np.asarray(jax.jit(jax.hessian(loss))(x["query"]))
    assert np.isfinite(hessian).all()
    assert np.abs(hessian[0, 0, 0, :, 0, 0, 0]).max() > 1e-4
    for at in ((0, 1, 2), (1, 0, 4)):  # sees nothing, is padding
        assert not hessian[at].any()
    # Against differences of the gradient, in one direction.
    t, step = normal(*x["query"].shape, seed=60), 1e-2
    gradient = jax.jit(jax.grad(loss))
    wanted = (gradient(x["query"] + step * t) - gradient(x["query"] - step * t)) / (2 * step)
    close("hessian", np.tensordot(hessian, t, 4), np.asarray(wanted), 2e-3)


def test_vmap():
    """Over a new axis of every operand: arrays, lengths, offset, mask, score and seed."""
    n = 3
    x = {name: normal(n, *a.shape, seed=70 + j) for j, (name, a) in enumerate(PLAIN.items())}
    ids = rng(80).integers(0, 3, (n, TK)).astype(np.int32)
    slopes = normal(n, HQ, seed=81)
    bias = normal(n, TQ, TK, seed=82)
    sinks = normal(n, HQ, seed=83)
    kv = rng(84).integers(0, TK + 1, (n, B)).astype(np.int32)
    rows = rng(85).integers(0, TQ + 1, (n, B)).astype(np.int32)
    offset = np.array([0, 1, 2], np.int32)
    seed = np.array([1, -2, 3], np.int32)

    def f(x, ids, slopes, bias, sinks, kv, rows, offset, seed):
        return attn_core.attention(
            **x,
            mask=masks.segments(ids),
            score=scores.alibi(slopes),
            bias=bias,
            sinks=sinks,
            kv_lengths=kv,
            q_lengths=rows,
            query_offset=offset,
            dropout=Dropout(0.3, seed),
            **EXTRAS,
        )

    rest = (ids, slopes, bias, sinks, kv, rows, offset, seed)
    given = jax.tree.map(jnp.asarray, (x, *rest))
    together = jax.jit(jax.vmap(f))(*given)
    for at in range(n):
        alone = f(*jax.tree.map(lambda a, at=at: a[at], given))
        for one, all_ in zip(alone, together, strict=True):
            close("vmap", all_[at], np.asarray(one, np.float64))
    # And over the batch itself, mapped from the key alone.
    spread = jax.vmap(
        lambda key: attn_core.attention(given[0]["query"][0], key, given[0]["value"][0])
    )(given[0]["key"])
    one = attn_core.attention(
        *(given[0][m][j] for m, j in (("query", 0), ("key", 2), ("value", 0)))
    )
    close("key", spread[2], np.asarray(one, np.float64))


def test_vmapped_gradients():
    x = {name: jnp.asarray(normal(3, *a.shape, seed=70)) for name, a in PLAIN.items()}
    f = jax.grad(
        lambda x: (attn_core.attention(**x, mask=masks.causal(), query_offset=1) ** 2).sum()
    )
    together = jax.vmap(f)(x)
    for at in range(3):
        alone = f(jax.tree.map(lambda a, at=at: a[at], x))
        for name in x:
            close(name, together[name][at], np.asarray(alone[name], np.float64))


def test_checkpoint():
    x = arrays(PLAIN)

    def loss(x):
        return (attn_core.attention(**x, dropout=Dropout(0.5, 3), mask=masks.prefix(5)) ** 2).sum()

    plain, saved = jax.jit(jax.grad(loss))(x), jax.grad(jax.checkpoint(loss))(x)
    for name in x:
        close(name, saved[name], np.asarray(plain[name], np.float64), 1e-6)
        assert np.abs(plain[name]).max() > 0.01


def test_eval_shape():
    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    found = jax.eval_shape(
        partial(attn_core.attention, mask=masks.causal(), query_offset="end", **EXTRAS),
        *(struct(B, HQ, TQ, D), struct(B, HK, TK, D), struct(B, HK, TK, DV)),
    )
    assert found.out.shape == (B, HQ, TQ, DV)
    assert found.lse.shape == (B, HQ, TQ)
    assert found.weights.shape == FULL
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    with pytest.raises(ValueError, match="Hq must be a multiple of Hk"):
        jax.eval_shape(
            attn_core.attention, struct(B, 3, TQ, D), struct(B, 2, TK, D), struct(B, 2, TK, DV)
        )


# Masks, scores and dropout cross jit --------------------------------------------------------------


def test_one_trace_for_equal_masks():
    traces = []

    @jax.jit
    def f(x, mask, score, dropout):
        traces.append(1)
        return attn_core.attention(**x, mask=mask, score=score, dropout=dropout, query_offset=0)

    x = arrays(PLAIN)

    def check(ids, slopes, seed):
        found = f(x, masks.segments(ids) & masks.causal(), scores.alibi(slopes), Dropout(0.3, seed))
        judged = {
            "mask": (ids[:TQ, None] == ids) & CAUSAL,
            "score": lambda s, b, h, q, k, t: s - t[h] * abs(q - k),
            "operands": (slopes,),
            "dropout": (0.3, seed),
        }
        close("jit", found, reference.attention(**PLAIN, **judged).out)

    for ids, slopes, seed in (
        (IDS[0], SLOPES, 1),
        (IDS[1], SLOPES, 2),
        (IDS[0], 2 * SLOPES, 2**50),
    ):
        check(ids, slopes, seed)
    assert len(traces) == 1
    f(x, masks.segments(IDS[0]), scores.alibi(SLOPES), Dropout(0.3, 1))
    assert len(traces) == 2  # another tree
    f(x, masks.segments(IDS[0]), scores.alibi(SLOPES), Dropout(0.4, 1))
    assert len(traces) == 3  # another rate
    f(x, masks.segments(list(map(int, IDS[0]))), scores.alibi(SLOPES), Dropout(0.4, 9))
    f(x, masks.segments(list(map(int, IDS[1]))), scores.alibi(SLOPES), Dropout(0.4, 8))
    assert len(traces) <= 4  # a list is int32 where NumPy was int64


def test_pytrees():
    mask = masks.segments(IDS) & masks.causal()
    score, dropout = scores.alibi(SLOPES), Dropout(0.25, 2**33 + 1)
    leaves, structure = jax.tree.flatten((mask, score, dropout))
    assert [leaf.shape for leaf in leaves] == [IDS.shape, SLOPES.shape, (2,)]
    again, score_again, dropout_again = jax.tree.unflatten(structure, leaves)
    assert (again.tree, score_again.tree) == (mask.tree, score.tree)
    assert dropout_again.rate == 0.25
    x = arrays(PLAIN)
    options = {"query_offset": 0}
    assert np.array_equal(
        attn_core.attention(**x, mask=again, score=score_again, dropout=dropout_again, **options),
        attn_core.attention(**x, mask=mask, score=score, dropout=dropout, **options),
    )
    other = jax.tree.structure((masks.segments(IDS), score, dropout))
    assert structure != other
    assert structure == jax.tree.structure(
        (masks.segments(IDS + 1) & masks.causal(), scores.alibi(2 * SLOPES), Dropout(0.25, 1))
    )


def test_a_score_is_differentiated_as_a_pytree():
    x = arrays(PLAIN)
    score = scores.alibi(jnp.asarray(SLOPES))
    found = jax.grad(lambda s: attn_core.attention(**x, score=s, query_offset=2).sum())(score)
    judged = CASES["alibi"][1]
    ones = np.ones((B, HQ, TQ, DV))
    wanted = reference.gradients(**PLAIN, **judged, d_out=ones)["operands"][0]
    close("slopes", found.arrays[0], wanted)
    assert np.abs(wanted).max() > 0.1


def test_a_captured_tracer_is_an_operand():
    x = arrays(PLAIN)

    def f(c):
        return attn_core.attention(**x, score=attn_core.score(lambda s, b, h, q, k: s * c)).sum()

    # s * c is what the scale does.
    wanted = (
        reference.attention(**PLAIN, scale=0.5001).out.sum()
        - reference.attention(**PLAIN, scale=0.4999).out.sum()
    ) / (0.0002 * D**0.5)
    assert float(jax.jit(jax.grad(f))(0.5 * D**0.5)) == pytest.approx(wanted, abs=1e-3)
    assert abs(wanted) > 0.01


def test_a_float_table_keeps_its_digits_across_jit():
    score = attn_core.scores.alibi(heads=3)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 3, 4, 5)))
        want = attn_core.attention(x, x, x, score=score)
        got = jax.jit(lambda x, s: attn_core.attention(x, x, x, score=s))(x, score)
        np.testing.assert_allclose(got, want, rtol=1e-14)
