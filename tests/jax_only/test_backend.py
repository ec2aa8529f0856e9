"""The JAX backend against the judge: every option, forward and backward, and JAX's transforms."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import attn_core
from attn_core import masks, reference, registry, scores
from attn_core.backends.jax.philox import keep as jax_keep
from attn_core.backends.jax.philox import multiply
from attn_core.backends.jax.reference import within
from attn_core.language.values import Dropout
from attn_core.registry import UnsupportedError

backend = registry.load("jax")

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 3, 2
FULL = (B, HQ, TQ, TK)
b, h, i, k = np.ogrid[:B, :HQ, :TQ, :TK]
NAN = float("nan")


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(*shape, seed=0, dtype=np.float32):
    return rng(seed).standard_normal(shape).astype(dtype)


def inputs(heads=HQ, kv_heads=HK, q_len=TQ, k_len=TK, batch=B, dtype=np.float32):
    return {
        "query": normal(batch, heads, q_len, D, seed=1, dtype=dtype),
        "key": normal(batch, kv_heads, k_len, D, seed=2, dtype=dtype),
        "value": normal(batch, kv_heads, k_len, DV, seed=3, dtype=dtype),
    }


PLAIN = inputs()


# Cases: a name, what attn_core is given, and what the judge is given instead where they differ ----

IDS = np.array([[0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 1, 1]])
SLOPES = normal(HQ, seed=4)
TABLE = normal(9, HQ, seed=5)
T5 = normal(8, HQ, seed=6)
BIAS = normal(*FULL, seed=7)
SINKS = normal(HQ, seed=8)
DENSE = rng(9).random(FULL) < 0.6
TILES = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], bool)
EDGES = np.array([[0, 1], [0, 6], [2, 2], [4, 0], [4, 5], [4, 6]])
EDGE = np.zeros((TQ, TK), bool)
EDGE[EDGES[:, 0], EDGES[:, 1]] = True
HIDING = np.where(DENSE, BIAS, -np.inf).astype(np.float32)
LARGE = BIAS.copy()
LARGE[..., 0], LARGE[..., 1], LARGE[..., 2] = -1e4, -1e9, np.finfo(np.float32).min
LARGE[:, :, 1], LARGE[:, :, 3, 4] = np.finfo(np.float32).min, 1e4
OFFSETS = np.array([2, -1])
AT_2 = {"query_offset": 2}
EMPTY_ROWS = DENSE.copy()
EMPTY_ROWS[0, 1, 2], EMPTY_ROWS[1, :, 4] = False, False


def t5(distance):
    """T5's buckets written out for 8 buckets, bidirectional, max_distance 5."""
    away = np.abs(distance)
    far = 2 + (np.log(np.maximum(away, 1) / 2) / np.log(5 / 2) * 2).astype(int)
    return np.where(away < 2, away, np.minimum(far, 3)) + np.where(distance > 0, 4, 0)


def case(given, **judged):
    return given, {**{n: x for n, x in given.items() if n not in ("mask", "score")}, **judged}


def q(offset):
    return i + np.reshape(offset, (-1, 1, 1, 1))


def seen(**judged):
    return {"mask": np.broadcast_to(judged["mask"], FULL)}


CASES = {
    "scale": case({"scale": 0.7}),
    "scale zero": case({"scale": 0}),
    "causal start": case(
        {"mask": masks.causal(), "query_offset": "start"}, query_offset="start", mask=(i >= k)[0, 0]
    ),
    "causal end": case(
        {"mask": masks.causal(), "query_offset": "end"}, mask=(i + TK - TQ >= k)[0, 0]
    ),
    "causal int": case({"mask": masks.causal(), "query_offset": -2}, mask=(i - 2 >= k)[0, 0]),
    "causal array": case(
        {"mask": masks.causal(), "query_offset": OFFSETS},
        mask=np.broadcast_to(q(OFFSETS) >= k, (B, 1, TQ, TK)),
    ),
    "end with lengths": case(
        {
            "mask": masks.causal(),
            "query_offset": "end",
            "kv_lengths": np.array([6, 3]),
            "q_lengths": np.array([2, 5]),
        },
        mask=np.broadcast_to(q([4, -2]) >= k, (B, 1, TQ, TK)),
    ),
    "window": case(
        {"mask": masks.window(2, 1), **AT_2}, mask=((i + 2 - k <= 2) & (k - i - 2 <= 1))[0, 0]
    ),
    "prefix": case(
        {"mask": masks.causal() | masks.prefix(np.array([3, 5])), "query_offset": 0},
        mask=np.broadcast_to((i >= k) | (k < np.reshape([3, 5], (B, 1, 1, 1))), (B, 1, TQ, TK)),
    ),
    "segments": case(
        {"mask": masks.segments(IDS), **AT_2},
        mask=IDS[:, None, 2 : 2 + TQ, None] == IDS[:, None, None],
    ),
    "segments apart": case(
        {"mask": masks.segments(IDS[:, :TQ], IDS)},
        mask=IDS[:, None, :TQ, None] == IDS[:, None, None],
    ),
    "lengths mask": case(
        {"mask": masks.lengths([4, 7], [5, 2])},
        mask=np.broadcast_to(
            (k < np.reshape([4, 7], (B, 1, 1, 1))) & (i < np.reshape([5, 2], (B, 1, 1, 1))),
            (B, 1, TQ, TK),
        ),
    ),
    "dilated": case({"mask": masks.dilated(3), **AT_2}, mask=((i + 2 - k) % 3 == 0)[0, 0]),
    "global": case(
        {"mask": masks.global_tokens(IDS[0] == 1) | masks.window(0, 0), **AT_2},
        mask=(np.isin(i + 2, (2, 3)) | np.isin(k, (2, 3)) | (i + 2 == k))[0, 0],
    ),
    "chunks": case({"mask": masks.chunks(3), **AT_2}, mask=((i + 2) // 3 == k // 3)[0, 0]),
    "chunks before zero": case(
        {"mask": masks.chunks(3), "query_offset": -3}, mask=((i - 3) // 3 == k // 3)[0, 0]
    ),
    "dense": case({"mask": masks.dense(DENSE[0, 0])}, mask=DENSE[0, 0]),
    "boolean": case({"mask": DENSE}, mask=DENSE),
    "empty rows": case({"mask": EMPTY_ROWS}, mask=EMPTY_ROWS),
    "nothing seen": case({"mask": np.zeros((TQ, TK), bool)}, mask=np.zeros((TQ, TK), bool)),
    "blocks": case(
        {"mask": masks.blocks(TILES, 2), "query_offset": 0}, mask=TILES[i // 2, k // 2][0, 0]
    ),
    "graph": case({"mask": masks.graph(EDGES, (TQ, TK)), "query_offset": 0}, mask=EDGE),
    "arithmetic": case(
        {
            "mask": attn_core.mask(
                lambda b, h, q, k: (
                    (((q - k) % -3 == -1) ^ ((q * k) // (h - 1) > 2))
                    | (attn_core.minimum(q, k) == attn_core.row - b)
                )
            ),
            "query_offset": 0,
        },
        mask=(
            ((i - k) % -3 == -1) ^ (np.where(h == 1, 0, (i * k) // np.where(h == 1, 1, h - 1)) > 2)
        )
        | (np.minimum(i, k) == i - b),
    ),
    "bias": case({"bias": BIAS}),
    "bias rank 2": case({"bias": BIAS[0, 0]}),
    "bias by key": case({"bias": BIAS[:, :1, :1]}),
    "bias by row": case({"bias": BIAS[:1, :, :, :1]}),
    "bias hides": case({"bias": HIDING}),
    "bias large": case({"bias": LARGE}),
    "softcap": case(
        {"score": scores.softcap(0.8)}, score=lambda s, b, h, q, k: 0.8 * np.tanh(s / 0.8)
    ),
    "alibi": case(
        {"score": scores.alibi(SLOPES), **AT_2},
        score=lambda s, b, h, q, k, t: s - t[h] * abs(q - k),
        operands=(SLOPES,),
    ),
    "alibi of the paper": case(
        {"score": scores.alibi(heads=HQ), **AT_2},
        score=lambda s, b, h, q, k, t: s - t[h] * abs(q - k),
        operands=(2.0 ** (-2.0 * np.arange(1, 5)),),
    ),
    "clipped": case(
        {"score": scores.relative_bias(TABLE, buckets="clipped"), **AT_2},
        score=lambda s, b, h, q, k, t: s + t[np.clip(k - q, -4, 4) + 4, h],
        operands=(TABLE,),
    ),
    "t5": case(
        {"score": scores.relative_bias(T5, max_distance=5), **AT_2},
        score=lambda s, b, h, q, k, t: s + t[t5(k - q), h],
        operands=(T5,),
    ),
    "then": case(
        {"score": scores.alibi(SLOPES).then(scores.softcap(1.5)), **AT_2},
        score=lambda s, b, h, q, k, t: 1.5 * np.tanh((s - t[h] * abs(q - k)) / 1.5),
        operands=(SLOPES,),
    ),
    "score of everything": case(
        {
            "score": attn_core.score(
                lambda s, b, h, q, k: attn_core.where(
                    (q + k) % 5 == 4,
                    -np.inf,
                    attn_core.exp(attn_core.minimum(s, 0.5)) * attn_core.log(1.0 + abs(s) + b)
                    + s / (h + 1),
                )
            ),
            **AT_2,
        },
        score=lambda s, b, h, q, k: np.where(
            (q + k) % 5 == 4,
            -np.inf,
            np.exp(np.minimum(s, 0.5)) * np.log(1.0 + abs(s) + b) + s / (h + 1),
        ),
    ),
    "sinks": case({"sinks": SINKS}),
    "sinks of none": case(
        {"sinks": np.where(SINKS < 0, -np.inf, SINKS).astype(np.float32), "mask": EMPTY_ROWS},
        mask=EMPTY_ROWS,
    ),
    "kv_lengths": case({"kv_lengths": np.array([0, 5])}),
    "kv_lengths for all": case({"kv_lengths": 3}),
    "q_lengths": case({"q_lengths": np.array([0, 3])}),
    "padding with sinks": case(
        {"sinks": SINKS, "kv_lengths": np.array([0, 5]), "q_lengths": np.array([5, 3])}
    ),
    "dropout": case({"dropout": Dropout(0.4, 2**40 + 7)}, dropout=(0.4, 2**40 + 7)),
    "dropout behind": case(
        {"dropout": Dropout(0.4, -3), "query_offset": np.array([-9, 4])}, dropout=(0.4, -3)
    ),
    "all at once": case(
        {
            "mask": masks.window(4) & masks.segments(IDS),
            "bias": BIAS[:1, :, :, :],
            "score": scores.alibi(SLOPES),
            "scale": 0.6,
            "sinks": SINKS,
            "kv_lengths": np.array([6, 7]),
            "q_lengths": np.array([5, 4]),
            "query_offset": np.array([1, 2]),
            "dropout": Dropout(0.3, (5, 6)),
        },
        mask=np.stack(
            [
                (i + o - k <= 4)[0, 0] & (IDS[n, o : o + TQ, None] == IDS[n, None, :])
                for n, o in enumerate((1, 2))
            ]
        )[:, None],
        score=lambda s, b, h, q, k, t: s - t[h] * abs(q - k),
        operands=(SLOPES,),
        dropout=(0.3, 5 + 6 * 2**32),
    ),
}

ODD_SHAPES = {
    "one key head": inputs(3, 1),
    "as many key heads": inputs(3, 3),
    "no batch": inputs(batch=0),
    "no queries": inputs(q_len=0),
    "no keys": inputs(k_len=0),
    "nothing at all": inputs(q_len=0, k_len=0, batch=0),
}


# Comparing ----------------------------------------------------------------------------------------


def arrays(given, dtype=np.float32):
    """Query, key, value, bias and sinks as JAX arrays, and the rest as it is."""
    named = ("query", "key", "value", "bias", "sinks")
    return {n: backend.from_numpy(x.astype(dtype)) if n in named else x for n, x in given.items()}


def cotangents(shapes, dtype=np.float32, seed=20):
    made = {n: normal(*s, seed=seed + j) for j, (n, s) in enumerate(sorted(shapes.items()))}
    wide = np.float64 if dtype == np.float64 else np.float32
    return {n: x.astype(wide if n == "lse" else dtype) for n, x in made.items()}


def judge(given, cotangent, **options):
    output = reference.attention(**given, **options)
    pulled = {f"d_{n}": x.astype(np.float64) for n, x in cotangent.items()}
    return output, reference.gradients(**given, **options, **pulled)


def close(name, found, wanted, tolerance=2e-5, rounding=0.0):
    found = np.asarray(found)
    assert found.shape == wanted.shape, name
    found = found.astype(np.float64)
    infinite = np.isneginf(wanted)
    assert np.array_equal(np.isneginf(found), infinite), name
    found, wanted = np.where(infinite, 0, found), np.where(infinite, 0, wanted)
    allowed = tolerance * max(1.0, np.abs(wanted).max(initial=0.0)) + rounding * np.abs(wanted)
    # Written so that a NaN fails.
    assert (np.abs(found - wanted) <= allowed).all(), (name, np.abs(found - wanted).max())


def agree(output, gradients, judged, judged_gradients, **tolerance):
    for name in ("out", "lse", "weights"):
        close(name, getattr(output, name), getattr(judged, name), **tolerance)
    for name, gradient in gradients.items():
        if name != "score":
            close("d " + name, gradient, judged_gradients[name], **tolerance)
            continue
        assert len(gradient) == len(judged_gradients["operands"])
        for found, wanted in zip(gradient, judged_gradients["operands"], strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                close("d operand", found, wanted, **tolerance)


EXTRAS = {"return_lse": True, "return_weights": True}


def shapes_of(given, layout="BHTD"):
    """Shapes of out, lse and weights of inputs in layout BHTD."""
    batch, heads, rows, _ = given["query"].shape
    keys, width = given["value"].shape[2:]
    out = (batch, heads, rows, width) if layout == "BHTD" else (batch, rows, heads, width)
    return {"out": out, "lse": (batch, heads, rows), "weights": (batch, heads, rows, keys)}


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

ALL, ALL_JUDGED = CASES["all at once"]
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
CAUSAL = (i >= k)[0, 0]


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


# The verbs ----------------------------------------------------------------------------------------


def test_describe():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert backend.owns(x)
    assert not backend.owns(np.ones(3))
    assert backend.describe(x) == ((2, 3), "bfloat16", jax.devices()[0].platform, False)
    seen = []
    jax.jit(lambda x: seen.append((backend.owns(x), backend.describe(x))))(x)
    assert seen == [(True, ((2, 3), "bfloat16", jax.default_backend(), False))]
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


# The documents' function --------------------------------------------------------------------------


def listing(query, key, value, bias, scale):
    """The documents' listing, written out: softmax(q kᵀ · scale + mask) v."""
    s = np.einsum("...qd,...kd->...qk", query, key) * scale + bias
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("...qk,...kv->...qv", p / p.sum(-1, keepdims=True), value)


LEADS = [(), (3,), (2, 3), (2, 1, 3)]


DOCUMENTS = [("numpy", lead, None) for lead in LEADS]
DOCUMENTS += [(form, (2, 3), scale) for form in ("eager", "jit") for scale in (None, 1.0)]


@pytest.mark.parametrize("kind", ["none", "float", "boolean", "zero is hidden"])
@pytest.mark.parametrize(("form", "lead", "scale"), [*DOCUMENTS, ("numpy", (2, 3), 1.0)])
def test_documents(lead, scale, kind, form):
    query, key = normal(*lead, TQ, D, seed=90), normal(*lead, TK, D, seed=91)
    value = normal(*lead, TK, DV, seed=92)
    visible = rng(93).random((*lead[-1:], TQ, TK)) < 0.7
    visible[..., 0] = True
    bias = normal(TQ, TK, seed=94)
    mask = {"none": None, "float": bias, "boolean": visible, "zero is hidden": visible * 2}[kind]
    added = {"none": 0.0, "float": bias}.get(kind, np.where(visible, 0.0, -np.inf))
    wanted = listing(query, key, value, added, 1 / np.sqrt(D) if scale is None else scale)
    if kind == "zero is hidden":
        mask = mask != 0
    call = partial(backend.scaled_dot_product_attention, scale=scale)
    given = (query, key, value) if mask is None else (query, key, value, mask)
    if form != "numpy":
        given = [jnp.asarray(a) for a in given]
    found = jax.jit(call)(*given) if form == "jit" else call(*given)
    assert type(found) is np.ndarray if form == "numpy" else backend.owns(found)
    close("documents", found, wanted, 5e-6)


def test_documents_dropout_and_errors():
    query, key, value = (normal(3, n, w, seed=95) for n, w in ((TQ, D), (TK, D), (TK, DV)))
    call = backend.scaled_dot_product_attention
    kept = reference.keep(0.4, 5, range(3), [0], np.arange(TQ)[None], np.arange(TK))
    s = np.einsum("bqd,bkd->bqk", query, key) / np.sqrt(D)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    wanted = (p * np.broadcast_to(kept, (3, 1, TQ, TK))[:, 0] / 0.6) @ value
    close("dropout", call(query, key, value, dropout_rate=0.4, seed=5), wanted)
    assert np.array_equal(
        call(query, key, value, mask=np.zeros((TQ, TK), bool)), np.zeros((3, TQ, DV))
    )
    x = jnp.asarray(query)
    with pytest.raises(TypeError, match="`seed` must be given"):
        call(query, key, value, dropout_rate=0.4)
    with pytest.raises(TypeError, match="must not be wider"):
        call(x, jnp.asarray(key), jnp.asarray(value), np.zeros((TQ, TK)))
    with pytest.raises(TypeError, match="`mask` must be boolean"):
        call(query, key, value, np.ones((TQ, TK), int))
    with pytest.raises(ValueError, match="leading dimensions of `q`"):
        call(query, key[:2], value)
    with pytest.raises(TypeError, match="must be an array of JAX, or all of them NumPy"):
        call(query, jnp.asarray(key), value)


def test_no_setting_was_touched():
    assert not jax.config.jax_enable_x64
    assert jax.config.jax_default_matmul_precision is None


def test_a_float_table_keeps_its_digits_across_jit():
    score = attn_core.scores.alibi(heads=3)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 3, 4, 5)))
        want = attn_core.attention(x, x, x, score=score)
        got = jax.jit(lambda x, s: attn_core.attention(x, x, x, score=s))(x, score)
        np.testing.assert_allclose(got, want, rtol=1e-14)
