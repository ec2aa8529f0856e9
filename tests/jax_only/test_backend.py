"""The JAX backend against the judge: every option, forward and backward, numbers and verbs."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax_cases import (
    ALL,
    ALL_JUDGED,
    BIAS,
    CASES,
    CAUSAL,
    DV,
    EXTRAS,
    FULL,
    HQ,
    IDS,
    NAN,
    ODD_SHAPES,
    PLAIN,
    SINKS,
    SLOPES,
    TK,
    TQ,
    B,
    agree,
    arrays,
    backend,
    close,
    cotangents,
    i,
    inputs,
    judge,
    normal,
    rng,
    shapes_of,
)

import attn_core
from attn_core import masks, reference, scores
from attn_core.backends.jax.philox import keep as jax_keep
from attn_core.backends.jax.philox import multiply
from attn_core.backends.jax.reference import within
from attn_core.language.values import Dropout
from attn_core.registry import UnsupportedError
from attn_core.spec import Facts

# Under jit the conformance suite asks every option against the same judge, alone and in pairs (its
# form jit, which make test runs): here those questions that it has not.
COMPILED = ("arithmetic", "then", "score of everything", "all at once")


@pytest.mark.parametrize(
    ("name", "form"),
    [(n, f) for n in CASES for f in backend.FORMS if f == "eager" or n in COMPILED],
)
def test_agrees_with_the_judge(name, form):
    given, judged = CASES[name]
    pulled = cotangents(shapes_of(PLAIN))
    output, gradients = backend.vjp({**arrays({**PLAIN, **given}), **EXTRAS}, pulled, form)
    wanted = judge({**PLAIN, **judged}, pulled)
    agree(output, gradients, *wanted)
    asked = {"query", "key", "value"} | {n for n in ("bias", "sinks", "score") if n in given}
    assert set(gradients) == asked
    assert output.out.dtype == output.weights.dtype == output.lse.dtype == jnp.float32


@pytest.mark.parametrize("name", CASES)
def test_the_judge_sees_the_option(name):
    """Were the option ignored, the test above would fail."""
    judged = CASES[name][1]
    off = reference.attention(**PLAIN)
    on = reference.attention(**{**PLAIN, **judged})
    same = [np.allclose(x, y, atol=1e-3, rtol=0) for x, y in zip(on, off, strict=True)]
    assert not all(same)


@pytest.mark.parametrize("form", backend.FORMS)
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_shapes(name, form):
    given = ODD_SHAPES[name]
    sinks = SINKS[: given["query"].shape[1]]
    pulled = cotangents(shapes_of(given))
    call = {**given, "sinks": sinks, "mask": masks.causal(), "query_offset": "end"}
    call["score"] = scores.alibi(SLOPES[: len(sinks)])
    output, gradients = backend.vjp({**arrays(call), **EXTRAS}, pulled, form)
    rows, keys = given["query"].shape[2], given["key"].shape[2]
    mask = np.arange(rows)[:, None] + keys - rows >= np.arange(keys)
    judged = {**given, "sinks": sinks, "mask": mask, "query_offset": "end"}
    judged["score"] = lambda s, b, h, q, k, t: s - t[h] * abs(q - k)
    agree(output, gradients, *judge({**judged, "operands": (SLOPES[: len(sinks)],)}, pulled))


@pytest.mark.parametrize("form", backend.FORMS)
def test_layout(form):
    given = {n: np.ascontiguousarray(x.swapaxes(1, 2)) for n, x in PLAIN.items()}
    options = {"layout": "BTHD", "sinks": SINKS, "bias": BIAS}
    pulled = cotangents(shapes_of(PLAIN, "BTHD"))
    output, gradients = backend.vjp({**arrays({**given, **options}), **EXTRAS}, pulled, form)
    agree(output, gradients, *judge({**given, **options}, pulled))


# Numbers ------------------------------------------------------------------------------------------

EPS = {np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8}


@pytest.mark.parametrize("form", backend.FORMS)
@pytest.mark.parametrize("dtype", EPS)
def test_half(dtype, form):
    """Computed in float32 and rounded once: one rounding of the output is all that may differ."""
    given = {n: x.astype(dtype) for n, x in PLAIN.items()}
    pulled = cotangents(shapes_of(PLAIN), dtype)
    output, gradients = backend.vjp(
        {
            **arrays({**given, **ALL}, dtype),
            **EXTRAS,
            "score": scores.alibi(SLOPES),
            "impl": "reference",
        },
        pulled,
        form,
    )
    judged = {**given, **ALL_JUDGED}
    judged["bias"], judged["sinks"] = ALL["bias"].astype(dtype), SINKS.astype(dtype)
    agree(output, gradients, *judge(judged, pulled), rounding=EPS[dtype])
    assert output.out.dtype == output.weights.dtype == dtype
    assert output.lse.dtype == jnp.float32
    dtypes = {n: g.dtype for n, g in gradients.items() if n != "score"}
    assert set(dtypes.values()) == {np.dtype(dtype)}
    assert gradients["score"][0].dtype == jnp.float32


@pytest.mark.parametrize("form", backend.FORMS)
def test_float64_arrays_without_x64(form):
    given = {n: x.astype(np.float64) / 3 for n, x in PLAIN.items()}
    options = {**ALL, "bias": BIAS[:1].astype(np.float64) / 3, "sinks": SINKS / np.float64(3)}
    pulled = cotangents(shapes_of(PLAIN), np.float64)
    output, gradients = backend.vjp(
        {**arrays({**given, **options}, np.float64), **EXTRAS}, pulled, form
    )
    judged = {**given, **ALL_JUDGED, "bias": options["bias"], "sinks": options["sinks"]}
    # The slopes are float32, and so is their gradient; the judge's is a central difference.
    agree(output, gradients, *judge(judged, pulled), tolerance=1e-9, rounding=2.0**-24)
    close("out", output.out, reference.attention(**judged).out, 1e-14)
    assert {str(g.dtype) for g in jax.tree.leaves(gradients)} == {"float32", "float64"}
    assert not jax.config.jax_enable_x64

    wide = {n: backend.from_numpy(x) for n, x in given.items()}
    out = attn_core.attention(**wide)
    assert out.dtype == np.float64
    close("out", out, reference.attention(**given).out, 1e-14)
    assert jax.jit(attn_core.attention)(*wide.values()).dtype == np.float64
    plain = partial(attn_core.attention, impl="reference")
    assert jax.jvp(plain, *[tuple(wide.values())] * 2)[1].dtype == np.float64


def test_numpy_in_numpy_out():
    given = {n: x.astype(np.float64) for n, x in PLAIN.items()}
    with attn_core.use(backend="jax"):
        output = attn_core.attention(**given, **{**ALL, "dropout": None}, **EXTRAS)
        narrow = attn_core.attention(**PLAIN)
        half = attn_core.attention(**{n: x.astype(ml_dtypes.bfloat16) for n, x in PLAIN.items()})
    wanted = reference.attention(**given, **{**ALL_JUDGED, "dropout": None})
    for found, judged in zip(output, wanted, strict=True):
        assert type(found) is np.ndarray
        assert found.dtype == np.float64
        assert found.flags.writeable
        close("numpy", found, judged, 1e-13)
    assert type(narrow) is np.ndarray
    assert narrow.dtype == np.float32
    assert half.dtype == ml_dtypes.bfloat16
    assert not jax.config.jax_enable_x64


def test_numpy_under_a_trace_is_computed_at_once():
    given = {n: x.astype(np.float64) for n, x in PLAIN.items()}
    wanted = reference.attention(**given).out
    found = []

    def f(x):
        with attn_core.use(backend="jax"):
            found.append(attn_core.attention(**given, mask=masks.dense(np.ones((TQ, TK), bool))))
        return x * found[-1].sum().astype(np.float32)

    x = jnp.ones(3)
    for result in (jax.jit(f)(x), jax.vmap(f)(x), jax.grad(lambda x: f(x).sum())(x)):
        close("product", result, np.full(3, wanted.sum()), 1e-5)
    assert len(found) == 3
    for out in found:
        assert type(out) is np.ndarray
        close("out", out, wanted, 1e-14)


def test_precision():
    x = arrays(PLAIN)

    def programme(precision):
        return str(jax.make_jaxpr(partial(attn_core.attention, precision=precision))(*x.values()))

    for precision in (None, "highest"):
        assert "Precision.HIGHEST" in programme(precision)
        assert "Precision.DEFAULT" not in programme(precision)
    assert "HIGHEST" not in programme("fast")
    close("fast", attn_core.attention(**x, precision="fast"), reference.attention(**PLAIN).out)


def test_keys_and_values_are_never_expanded():
    given = {
        "query": jnp.ones((B, 6, 5, 3)),
        "key": jnp.ones((B, 2, 11, 3)),
        "value": jnp.ones((B, 2, 11, 13)),
    }
    programme = jax.make_jaxpr(jax.grad(lambda x: attn_core.attention(**x).sum()))(given)

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.shape for v in equation.outvars)
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
            ):
                if hasattr(inner, "jaxpr"):
                    yield from shapes(inner.jaxpr)

    made = set(shapes(programme.jaxpr))
    assert (B, 2, 3 * 5, 11) in made
    # Width of a key or value beside all of the keys: only with two heads, never six or 2 x 3.
    rows = [s for s in made if sorted(s[-2:]) in ([3, 11], [11, 13])]
    assert rows
    assert all(np.prod(s) <= B * 2 * 11 * 13 for s in rows), rows


# Poison: nothing that is not allowed reaches an output or a gradient ------------------------------

POISON = [("eager", NAN), ("eager", np.inf), ("eager", -np.inf), ("jit", NAN)]


def poisoned(x, where, value):
    return np.where(where, np.asarray(value, x.dtype), x)


@pytest.mark.parametrize(("form", "value"), POISON)
@pytest.mark.parametrize("how", ["mask", "kv_lengths", "bias", "score", "score and bias"])
def test_poison_in_unseen_keys(how, value, form):
    """Keys 5 and 6 are hidden from all, by each of the ways there are."""
    hidden = (np.arange(TK) >= 5)[:, None]
    dirty = {
        "query": PLAIN["query"],
        "key": poisoned(PLAIN["key"], hidden, value),
        "value": poisoned(PLAIN["value"], hidden, value),
    }
    bias = np.where(np.arange(TK) >= 5, -np.inf, BIAS).astype(np.float32)
    hide = attn_core.score(lambda s, b, h, q, k: attn_core.where(k >= 5, -np.inf, s + 0.5 * h))
    given = {
        "mask": {"mask": masks.prefix(5)},
        "kv_lengths": {"kv_lengths": 5},
        "bias": {"bias": bias},
        "score": {"score": hide},
        "score and bias": {
            "score": hide,
            "bias": poisoned(BIAS, np.arange(TK) >= 5, value),
        },
    }[how]
    judged = {"mask": np.broadcast_to(np.arange(TK) < 5, (TQ, TK))}
    if "bias" in given:
        judged["bias"] = BIAS
    if "score" in given:
        judged["score"] = lambda s, b, h, q, k: s + 0.5 * h
    pulled = cotangents(shapes_of(PLAIN))
    wanted = judge({**PLAIN, **judged}, pulled)
    pulled["weights"] = poisoned(pulled["weights"], np.arange(TK) >= 5, value)
    output, gradients = backend.vjp({**arrays({**dirty, **given}), **EXTRAS}, pulled, form)
    agree(output, gradients, *wanted)


@pytest.mark.parametrize(("form", "value"), POISON)
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
def test_poison_in_rows_that_see_nothing(sinks, value, form):
    """Row 0 sees no key and row 4 is padding; so is what flows back into them."""
    see = np.ones((TQ, TK), bool)
    see[0] = False
    rows = np.isin(np.arange(TQ), (0, 4))
    given = {"mask": see, "q_lengths": 4}
    if sinks is not None:
        given["sinks"] = sinks
    pulled = cotangents(shapes_of(PLAIN))
    wanted = judge({**PLAIN, **given}, pulled)
    pulled["out"] = poisoned(pulled["out"], rows[:, None], value)
    pulled["weights"] = poisoned(pulled["weights"], rows[:, None], value)
    # The lse of row 0 is its sink where there is one, and then its cotangent is data.
    lost = rows if sinks is None else np.arange(TQ) == 4
    pulled["lse"] = poisoned(pulled["lse"], lost, value)
    dirty = {**PLAIN, "query": poisoned(PLAIN["query"], rows[:, None], value)}
    output, gradients = backend.vjp({**arrays({**dirty, **given}), **EXTRAS}, pulled, form)
    agree(output, gradients, *wanted)
    if sinks is not None:
        assert np.asarray(output.lse)[:, :, 0] == pytest.approx(np.broadcast_to(sinks, (B, HQ)))


@pytest.mark.parametrize(("form", "value"), POISON)
def test_poison_in_bias_and_operands(value, form):
    """A dense table of the score and a bias, poisoned wherever the mask hides."""
    table = normal(TQ, TK, seed=30)
    other = normal(TQ, TK, seed=31)
    tables = [attn_core.operand(poisoned(t, ~CAUSAL, value)) for t in (table, other)]

    def fn(s, b, h, q, k):
        return _wild(s, *(t[attn_core.row, k] for t in tables), attn_core)

    judged = {
        "mask": CAUSAL,
        "bias": BIAS,
        "score": lambda s, b, h, q, k, t, o: _wild(s, t, o, np),
        "operands": (table, other),
    }
    given = {
        "mask": masks.causal(),
        "query_offset": 0,
        "bias": poisoned(BIAS, ~CAUSAL, value),
        "score": attn_core.score(fn),
    }
    pulled = cotangents(shapes_of(PLAIN))
    output, gradients = backend.vjp({**arrays({**PLAIN, **given}), **EXTRAS}, pulled, form)
    agree(output, gradients, *judge({**PLAIN, **judged}, pulled), tolerance=1e-4)


def _wild(s, t, o, lib):
    return s * t + lib.exp(0.3 * t) / (1.0 + o * o) + lib.tanh(o) * lib.maximum(s, t) - abs(t)


def test_a_nan_that_is_seen_is_data():
    x = arrays({**PLAIN, "key": poisoned(PLAIN["key"], (np.arange(TK) == 2)[:, None], NAN)})
    out = np.asarray(attn_core.attention(**x, mask=masks.causal(), query_offset=0))
    assert np.isnan(out[:, :, 2:]).all()
    assert np.isfinite(out[:, :, :2]).all()


def test_rows_of_large_bias_sum_to_one():
    """One float32 lse could not rebuild the weights of a row of -1e9."""
    for value in (-1e9, 1e4, float(np.finfo(np.float32).min)):
        output = attn_core.attention(**arrays(PLAIN), bias=jnp.full(FULL, value), **EXTRAS)
        assert np.asarray(output.weights).sum(-1) == pytest.approx(1.0, abs=1e-6)
    given = {n: x.astype(np.float64) for n, x in PLAIN.items()}
    given["bias"] = np.where(i == 1, -1e9, np.where(i == 2, 1e4, BIAS.astype(np.float64)))
    with attn_core.use(backend="jax"):
        weights = attn_core.attention(**given, **EXTRAS).weights
    close("weights", weights, reference.attention(**given).weights, 1e-6)


# Dropout ------------------------------------------------------------------------------------------

SEEDS = {
    "host": (2**40 + 7, lambda: Dropout(0.3, 2**40 + 7).seed),
    "negative": (-5, lambda: jnp.int32(-5)),
    "short": (-5, lambda: jnp.int8(-5)),
    "unsigned": (2**32 - 3, lambda: jnp.uint32(2**32 - 3)),
    "unsigned short": (200, lambda: jnp.uint8(200)),
    "pair": (3 + 2**63, lambda: jnp.array([3, 2**31], jnp.uint32)),
    "numpy pair": (3 + 2**63, lambda: np.array([3, 2**31], np.uint32)),
}


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("rate", [0.3, 1e-12, 1 - 1e-12])
def test_keep_is_the_definition(name, rate):
    number, seed = SEEDS[name]
    places = np.array([[-3, -1, 0, 1, 2**30]], np.int32)
    wanted = reference.keep(rate, number, range(3), range(2), places, np.arange(9))
    threshold = Dropout(rate, 0).threshold
    for keep in (jax_keep, jax.jit(jax_keep, static_argnums=(0, 2, 3, 5))):
        found = keep(threshold, seed(), 3, 2, jnp.asarray(places), 9)
        assert np.array_equal(found, np.broadcast_to(wanted, (3, 2, 5, 9)))


@pytest.mark.parametrize("number", [-7, 2**40 + 7, -(2**45)])
def test_seed_of_64_bits(number):
    x = arrays(PLAIN)
    wanted = attn_core.attention(**x, dropout=Dropout(0.5, number))
    with jax.enable_x64(True):
        seeds = [jnp.int64(number), jnp.uint64(number % 2**64)]
    for seed in seeds:
        assert np.array_equal(attn_core.attention(**x, dropout=Dropout(0.5, seed)), wanted)
    assert not np.array_equal(attn_core.attention(**x, dropout=Dropout(0.5, 1)), wanted)


def test_products_of_words_are_exact():
    words = np.concatenate([rng().integers(0, 2**32, 200), [0, 1, 0xFFFF, 0x10000, 2**32 - 1]])
    for by in (0xD2511F53, 0xCD9E8D57, 0xFFFFFFFF):
        upper, lower = multiply(jnp.asarray(words.astype(np.uint32)), by)
        for x, u, l in zip(words.tolist(), np.asarray(upper), np.asarray(lower), strict=True):
            assert (int(u) << 32) + int(l) == x * by


# What is traced -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "uint32", "int64", "uint64"])
def test_traced_lengths_and_offsets(dtype):
    """Any integer dtype; out of range is clamped, since a traced value cannot raise."""
    x = arrays({n: np.concatenate([a] * 40, 2) for n, a in PLAIN.items()})  # Tk = 280 > int8
    wide = "64" in dtype
    unsigned = dtype.startswith("u")
    with jax.enable_x64(wide):
        kv = jnp.array([100, 3 if unsigned else -3], dtype)
        rows = jnp.array([120, 1 if unsigned else -9], dtype)
        offset = jnp.array([7, 0 if unsigned else -100], dtype)
        f = jax.jit(
            lambda kv, rows, offset: attn_core.attention(
                **x, mask=masks.causal(), kv_lengths=kv, q_lengths=rows, query_offset=offset
            )
        )
        found = f(kv, rows, offset)
    host = attn_core.attention(
        **x,
        mask=masks.causal(),
        kv_lengths=[100, 3 if unsigned else 0],
        q_lengths=[120, 1 if unsigned else 0],
        query_offset=[7, 0 if unsigned else -100],
    )
    assert np.array_equal(found, host)
    assert np.abs(np.asarray(found)).max() > 0.1


def test_traced_values_are_clamped():
    x = arrays(PLAIN)

    @jax.jit
    def f(kv, offset):
        return attn_core.attention(**x, mask=masks.causal(), kv_lengths=kv, query_offset=offset)

    everything = attn_core.attention(**x)
    close("far", f(jnp.array([2**31 - 1, 7]), jnp.array(2**31 - 1)), np.asarray(everything))
    assert np.array_equal(f(jnp.array([7, 7]), jnp.array(-(2**31))), np.zeros((B, HQ, TQ, DV)))
    assert np.array_equal(f(jnp.array(-1), jnp.array(7)), np.zeros((B, HQ, TQ, DV)))
    assert int(within(jnp.uint32(2**32 - 1), 0, 7)) == 7
    assert int(within(jnp.int32(-(2**31)), -(2**30), 2**30)) == -(2**30)


def test_lookups_clamp_and_empty_tables():
    table = jnp.array([1, 0, 1], bool)
    x = arrays(PLAIN)

    @jax.jit
    def f(table):
        held = attn_core.operand(table)
        return attn_core.attention(**x, mask=attn_core.mask(lambda b, h, q, k: held[k - 2]))

    mask = np.broadcast_to(np.asarray(table)[np.clip(np.arange(TK) - 2, 0, 2)], (TQ, TK))
    close("clamped", f(table), reference.attention(**PLAIN, mask=mask).out)
    nothing = arrays(inputs(k_len=0))
    out = attn_core.attention(**nothing, mask=jnp.zeros((TQ, 0), bool), bias=jnp.zeros((TQ, 0)))
    assert np.array_equal(out, np.zeros((B, HQ, TQ, DV)))


def test_ids_of_64_bits():
    x = arrays(PLAIN)
    ids = np.array([0, 0, 1, 1, 2**33, 2**33, 2**33 + 1])
    with jax.enable_x64(True):
        wide = jnp.asarray(ids)
    mask = ids[:TQ, None] == ids
    found = attn_core.attention(**x, mask=masks.segments(wide), query_offset=0)
    close("wide", found, reference.attention(**PLAIN, mask=mask).out)
    with pytest.raises(ValueError, match="must fit int32"):
        attn_core.attention(**x, mask=masks.segments(ids), query_offset=0)
    with pytest.raises(ValueError, match="must fit int32"):
        jax.jit(lambda m: attn_core.attention(**x, mask=m, query_offset=0))(masks.segments(ids))


# The verbs ----------------------------------------------------------------------------------------


def test_describe():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert backend.owns(x)
    assert not backend.owns(np.ones(3))
    assert backend.describe(x) == Facts((2, 3), "bfloat16", jax.devices()[0].platform)
    seen = []
    jax.jit(lambda x: seen.append((backend.owns(x), backend.describe(x))))(x)
    assert seen == [(True, Facts((2, 3), "bfloat16", jax.default_backend()))]
    assert not backend.tracing()


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint32", "bool"]
)
def test_from_and_to_numpy(dtype):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x = (normal(4, 6, dtype=np.float64) * 100).astype(dtype)[::-1, 1::2]
    there = backend.from_numpy(x)
    assert backend.owns(there)
    assert there.dtype == x.dtype
    back = backend.to_numpy(there)
    assert back.dtype == x.dtype
    assert np.array_equal(back, x)
    flat = np.ones(64, dtype)
    there = backend.from_numpy(flat)
    flat[:] = 0
    assert np.asarray(there).all()  # a copy: what happens to the host array later is not seen


def test_vjp_takes_what_is_asked():
    x = arrays(PLAIN)
    output, gradients = backend.vjp(x, {"out": np.ones((B, HQ, TQ, DV), np.float32)})
    assert output.lse is None
    assert output.weights is None
    assert set(gradients) == {"query", "key", "value"}
    wanted = reference.gradients(**PLAIN, d_out=np.ones((B, HQ, TQ, DV)))
    close("d v", gradients["value"], wanted["value"])
    table = attn_core.operand(IDS[0])
    score = attn_core.score(lambda s, b, h, q, k: s * table[k])
    for form in backend.FORMS:
        _, gradients = backend.vjp({**x, "score": score}, {"out": output.out}, form)
        assert gradients["score"] == (None,)


def test_refusals():
    x = arrays(PLAIN)
    for impl, reason in (("native", "as wide as query"), ("triton", "Got triton")):
        with pytest.raises(UnsupportedError, match=reason):
            attn_core.attention(**x, impl=impl)
    assert attn_core.attention(**x, impl="reference").shape == (B, HQ, TQ, DV)
    with pytest.raises(TypeError, match="frameworks are not mixed"):
        attn_core.attention(x["query"], PLAIN["key"], x["value"])
    with pytest.raises(TypeError, match="must not be wider"):
        attn_core.attention(**x, bias=backend.from_numpy(BIAS.astype(np.float64)))
    with pytest.raises(TypeError, match=r"attn_core\.operand"):
        attn_core.mask(lambda b, h, q, k: jnp.asarray(IDS)[b, k] == 0)


def test_strict_promotion():
    """Nothing here leans on JAX's implicit conversions."""
    with jax.numpy_dtype_promotion("strict"):
        given, judged = CASES["all at once"]
        found = attn_core.attention(**arrays({**PLAIN, **given}))
    close("strict", found, reference.attention(**PLAIN, **judged).out)


def test_no_setting_was_touched():
    assert not jax.config.jax_enable_x64
    assert jax.config.jax_default_matmul_precision is None
