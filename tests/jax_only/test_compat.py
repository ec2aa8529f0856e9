"""`attn_core.compat.jax` against jax.nn's own function, option by option and in pairs."""

from __future__ import annotations

import inspect
from typing import Any

import compat_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest

import attn_core
from attn_core import UnsupportedError, compat
from attn_core.compat.jax import dot_product_attention as ours

theirs = jax.nn.dot_product_attention
OPTIONS = (
    *("bias", "mask", "scale", "is_causal", "query_seq_lengths", "key_value_seq_lengths"),
    *("local_window_size", "grouped", "more_queries", "implementation"),
)


def asked(options: tuple[str, ...]) -> tuple[dict[str, Any], cases.Judge]:
    """jax.nn's arguments, as NumPy arrays, and the judge's."""
    rows, keys = (9, 5) if "more_queries" in options else (5, 9)
    kv_heads = 2 if "grouped" in options else 4
    shapes = {
        "query": (2, rows, 4, 8),
        "key": (2, keys, kv_heads, 8),
        "value": (2, keys, kv_heads, 8),
    }
    arrays = {name: cases.draw(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    given: dict[str, Any] = dict(arrays)
    judge: cases.Judge = {**arrays, "layout": "BTHD"}
    seen = np.ones((rows, keys), bool)
    if "mask" in options:
        given["mask"] = seen = np.random.default_rng(7).random((2, 1, rows, keys)) < 0.7
    if "bias" in options:
        given["bias"] = judge["bias"] = cases.draw(8, 1, 4, rows, keys)
    if "is_causal" in options:
        given["is_causal"] = True
        seen = seen & cases.causal(rows, keys)
    if "local_window_size" in options:
        given["local_window_size"] = (2, 1)
        seen = seen & cases.window(rows, keys, 2, 1)
    if "scale" in options:
        given["scale"] = judge["scale"] = -0.7
    if "query_seq_lengths" in options:
        given["query_seq_lengths"] = judge["q_lengths"] = np.array([rows, 2], np.int32)
    if "key_value_seq_lengths" in options:
        given["key_value_seq_lengths"] = judge["kv_lengths"] = np.array([3, keys], np.int32)
    if "implementation" in options:
        given["implementation"] = "xla"
    return given, {**judge, "mask": seen}


def answered(function: Any, given: dict[str, Any], cotangent: np.ndarray) -> dict[str, np.ndarray]:
    given = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    leaves = {n: given.pop(n) for n in ("query", "key", "value", "bias") if n in given}
    out, pull = jax.vjp(lambda leaves: function(**leaves, **given), leaves)
    gradients = pull(jnp.asarray(cotangent))[0]
    found = {"out": np.asarray(out)}
    return found | {f"d_{name}": np.asarray(gradient) for name, gradient in gradients.items()}


@pytest.mark.parametrize("options", cases.singly_and_in_pairs(OPTIONS), ids="+".join)
def test_every_option_alone_and_in_pairs(options):
    given, judge = asked(options)
    cotangent = cases.draw(9, *given["query"].shape)
    mine = cases.shares(judge, cotangent, answered(ours, given, cotangent))
    assert cases.inside(mine), mine
    # Rows that see nothing, where jax.nn takes the mean of the values, are compared with nothing.
    alive = alive_rows(judge)
    its = answered(theirs, given, np.where(alive, cotangent, 0))["out"]
    np.testing.assert_allclose(*[np.where(alive, x, 0) for x in (its, ours_out(given))], atol=5e-6)


def ours_out(given: dict[str, Any]) -> np.ndarray:
    return np.asarray(ours(**given))


def alive_rows(judge: cases.Judge) -> np.ndarray:
    sees = {n: x for n, x in judge.items() if n != "value"}
    seen = attn_core.reference.allowed(**sees).any(-1)
    return np.swapaxes(seen, 1, 2)[..., None]


def test_gradients_agree_where_every_row_sees_a_key():
    given, judge = asked(("bias", "is_causal", "grouped"))
    cotangent = cases.draw(9, *given["query"].shape)
    assert alive_rows(judge).all()
    mine, its = [answered(f, given, cotangent) for f in (ours, theirs)]
    assert cases.inside(cases.shares(judge, cotangent, its))
    for name in its:
        np.testing.assert_allclose(mine[name], its[name], atol=5e-6)


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS if o not in ("grouped", "more_queries", "implementation")]
)
def test_each_option_changes_the_answer(option):
    assert cases.off_and_on(asked((option,))[1], asked(())[1])


def test_the_signature_is_jaxs():
    mine, its = [inspect.signature(f).parameters for f in (ours, theirs)]
    assert [(p.name, p.kind) for p in mine.values()] == [(p.name, p.kind) for p in its.values()]
    assert [p.default for p in mine.values()] == [p.default for p in its.values()]


def test_a_row_that_sees_nothing_is_zero_here_and_the_mean_in_jax():
    given, _ = asked(("mask",))
    given["mask"][0, 0, 2] = False
    mean = given["value"][0].mean(0)
    np.testing.assert_allclose(theirs(**given)[0, 2], mean, atol=1e-6)
    out, residual = ours(**given, return_residual=True)
    assert not out[0, 2].any()
    assert (residual[0, 2] == -np.inf).all()


@pytest.mark.parametrize("options", [(), ("bias", "grouped"), ("is_causal", "mask")], ids="+".join)
def test_the_residual(options):
    given, judge = asked(options)
    (out, residual), (_, its) = [f(**given, return_residual=True) for f in (ours, theirs)]
    alive = alive_rows(judge)[..., 0]
    np.testing.assert_allclose(*[np.where(alive, x, 0) for x in (residual, its)], atol=5e-6)
    assert residual.dtype == its.dtype
    assert residual.shape == its.shape
    lse = np.swapaxes(np.asarray(residual), 1, 2)
    assert cases.inside(cases.shares(judge, np.asarray(out), {"lse": lse}))


def test_the_residual_has_no_gradient():
    given, _ = asked(("bias",))

    def total(f, query):
        return f(**{**given, "query": query}, return_residual=True)[1].sum()

    for f in (ours, theirs):
        assert not jax.grad(lambda q, f=f: total(f, q))(jnp.asarray(given["query"])).any()


def test_without_a_batch_and_masks_of_lower_rank():
    q, k, v = [cases.draw(n, t, 4, 8) for n, t in enumerate((5, 9, 9))]
    for mask in (
        cases.draw(3, 5, 9) > 0,
        cases.draw(3, 4, 5, 9) > 0,
        cases.draw(3, 1, 4, 1, 9) > 0,
    ):
        mask[..., 0] = True
        options = {"mask": mask, "bias": cases.draw(4, 4, 1, 9), "is_causal": True}
        np.testing.assert_allclose(ours(q, k, v, **options), theirs(q, k, v, **options), atol=5e-6)


@pytest.mark.parametrize("window", [0, 3, (0, 0), (1, 8), (8, 0), (-1, 2)])
def test_windows(window):
    q, k, v = [cases.draw(n, 2, 8, 4, 8) for n in range(3)]
    mine, its = [f(q, k, v, local_window_size=window) for f in (ours, theirs)]
    last = -1 if window == (-1, 2) else None  # nothing lies after the last position
    np.testing.assert_allclose(mine[:, :last], its[:, :last], atol=5e-6)
    given = attn_core.attention(
        *[jnp.asarray(x) for x in (q, k, v)], layout="BTHD", mask=compat.from_jax_window(window)
    )
    np.testing.assert_allclose(mine, given, atol=1e-6)


def test_lengths_beyond_the_arrays_are_clamped():
    q, k, v = [cases.draw(n, 2, 8, 4, 8) for n in range(3)]
    lengths = np.array([99, 3], np.int32)
    mine, its = [f(q, k, v, key_value_seq_lengths=lengths) for f in (ours, theirs)]
    np.testing.assert_allclose(mine, its, atol=5e-6)


def test_a_learnt_scale_receives_its_gradient():
    q, k, v = [cases.draw(n, 2, 8, 4, 8) for n in range(3)]

    def total(f, scale):
        return (f(q, k, v, scale=scale) ** 2).sum()

    mine, its = [
        jax.jit(jax.value_and_grad(lambda s, f=f: total(f, s)))(0.4) for f in (ours, theirs)
    ]
    np.testing.assert_allclose(mine[0], its[0], rtol=1e-5)
    np.testing.assert_allclose(mine[1], its[1], rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.int32, jnp.bfloat16, np.float16, np.float64])
def test_a_bias_of_any_number_type(dtype):
    q, k, v = [cases.draw(n, 2, 8, 4, 8) for n in range(3)]
    bias = (3 * cases.draw(3, 1, 4, 8, 8)).astype(dtype)
    mine, its = [f(q, k, v, bias=bias) for f in (ours, theirs)]
    np.testing.assert_allclose(mine, its, atol=5e-6)


def test_sixteen_bits():
    q, k, v = [cases.draw(n, 2, 8, 4, 8).astype(jnp.bfloat16) for n in range(3)]
    out, its = [f(q, k, v, is_causal=True) for f in (ours, theirs)]
    assert out.dtype == its.dtype == jnp.bfloat16
    judge = {"query": q, "key": k, "value": v, "mask": cases.causal(8, 8), "layout": "BTHD"}
    assert cases.inside(
        cases.shares(judge, q.astype(np.float32), {"out": np.asarray(out)}, "bfloat16")
    )


def test_float64_is_computed_in_float64():
    q, k, v = [cases.draw(n, 2, 8, 4, 8, dtype=np.float64) for n in range(3)]
    judge = {"query": q, "key": k, "value": v, "layout": "BTHD"}
    with jax.enable_x64(True):
        mine, its = [np.asarray(f(q, k, v)) for f in (ours, theirs)]
    assert cases.inside(cases.shares(judge, q, {"out": mine}, "float64"))
    assert not cases.inside(cases.shares(judge, q, {"out": its}, "float64"))
    assert ours(q, k, v).dtype == theirs(q, k, v).dtype == jnp.float32  # as JAX narrows without x64


def test_jit_vmap_and_lists():
    q, k, v = [jnp.asarray(cases.draw(n, 3, 2, 8, 4, 8)) for n in range(3)]
    lengths = jnp.array([[8, 3], [1, 2], [5, 8]], jnp.int32)

    def call(f):
        def one(q, k, v, n):
            return f(q, k, v, key_value_seq_lengths=n, is_causal=True)

        return jax.jit(jax.vmap(one))(q, k, v, lengths)

    np.testing.assert_allclose(call(ours), call(theirs), atol=5e-6)
    nested = [[[[1.0, 2.0]], [[3.0, 4.0]]]]
    np.testing.assert_allclose(
        ours(nested, nested, nested), theirs(nested, nested, nested), atol=1e-6
    )


X = jnp.zeros((2, 8, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"mask": jnp.zeros((8, 8))}, TypeError, "an additive mask is `bias=`"),
        ({"bias": jnp.zeros((8, 8), bool)}, TypeError, "that is `mask=`"),
        ({"bias": jnp.zeros((8, 7))}, ValueError, "`bias` must broadcast"),
        ({"key": X.astype(jnp.bfloat16)}, TypeError, "must share one dtype"),
        ({"key": jnp.zeros((2, 8, 3, 8))}, ValueError, "must agree on Hk"),
        ({"query": X[None]}, ValueError, "`query` must have rank 4"),
        ({"implementation": "cudnn"}, UnsupportedError, "needs arrays on a GPU"),
        ({"implementation": "flash"}, ValueError, 'must be None, "xla" or "cudnn"'),
        (
            {"query_seq_lengths": jnp.zeros(3, jnp.int32)},
            ValueError,
            "`query_seq_lengths` must have",
        ),
        ({"query_seq_lengths": jnp.zeros(2)}, TypeError, "`query_seq_lengths` must be integers"),
        ({"local_window_size": 1.5}, TypeError, "`local_window_size` must be an integer"),
        ({"scale": jnp.ones(3)}, ValueError, "`scale` must be a number or a scalar array"),
    ],
)
def test_errors_are_in_our_words(arguments, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        ours(**{"query": X, "key": X, "value": X, **arguments})


def test_the_page_as_written():
    for code in pages.blocks("COMPAT.md", "jax"):
        held: dict[str, Any] = {}
        exec(code, held)
        assert held["out"].shape == (2, 5, 4, 8)
