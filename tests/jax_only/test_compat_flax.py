"""`attn_core.compat.flax` against Flax' own functions and inside Flax' own layers."""

from __future__ import annotations

import inspect
from typing import Any

import compat_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from flax import linen, nnx

from attn_core import UnsupportedError, reference
from attn_core.compat.flax import dot_product_attention as ours

# Flax deprecates sowing outside of nnx.capture, and sows so itself.
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")

OPTIONS = ("bias", "mask", "is_causal", "more_queries", "batches", "precision", "module")
LINEN = linen.dot_product_attention
NNX = nnx.dot_product_attention


def asked(options: tuple[str, ...]) -> tuple[dict[str, Any], cases.Judge]:
    """Flax' arguments, as NumPy arrays, and the judge's."""
    rows, keys = (9, 5) if "more_queries" in options else (5, 9)
    lead = (2, 3) if "batches" in options else (6,)
    shapes = {"query": (rows, 4, 8), "key": (keys, 4, 8), "value": (keys, 4, 8)}
    flat = {name: cases.draw(n, 6, *shape) for n, (name, shape) in enumerate(shapes.items())}
    given: dict[str, Any] = {n: x.reshape(*lead, *x.shape[1:]) for n, x in flat.items()}
    judge: cases.Judge = {**flat, "layout": "BTHD"}
    seen = np.ones((rows, keys), bool)
    if "mask" in options:
        seen = np.random.default_rng(7).random((6, 1, rows, keys)) < 0.7
        seen[..., 0] = True
        given["mask"] = seen.reshape(*lead, 1, rows, keys)
    if "bias" in options:
        bias = cases.draw(8, 6, 4, rows, keys)
        given["bias"], judge["bias"] = bias.reshape(*lead, 4, rows, keys), bias
    if "is_causal" in options:
        given["is_causal"] = True
        seen = seen & cases.causal(rows, keys)
    if "precision" in options:
        given["precision"] = jax.lax.Precision.HIGHEST
    return given, {**judge, "mask": seen}


class Sower(nnx.Module):
    """Calls a function that sows into it, and keeps what was sown."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, **given: Any) -> tuple[Any, Any]:
        out = self.function(**given, module=self)
        return out, nnx.pop(self, nnx.Intermediate)["attention_weights"].get_value()[0]


def answered(function: Any, given: dict[str, Any], cotangent: np.ndarray) -> dict[str, np.ndarray]:
    given = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    leaves = {n: given.pop(n) for n in ("query", "key", "value", "bias") if n in given}
    out, pull = jax.vjp(lambda leaves: function(**leaves, **given), leaves)
    found = {"out": out}
    found |= {f"d_{name}": g for name, g in pull(jnp.asarray(cotangent))[0].items()}
    return {n: np.asarray(x).reshape(6, *x.shape[-3:]) for n, x in found.items()}


@pytest.mark.parametrize("options", cases.singly_and_in_pairs(OPTIONS), ids="+".join)
def test_every_option_alone_and_in_pairs(options):
    given, judge = asked(options)
    cotangent = cases.draw(9, *given["query"].shape)
    flat = cotangent.reshape(6, *cotangent.shape[-3:])
    for function in (ours, NNX, LINEN):
        if function is LINEN and "is_causal" in options:
            continue  # which linen does not have
        found = cases.shares(judge, flat, answered(function, given, cotangent))
        assert cases.inside(found), (function, found)
    if "module" in options:
        (_, mine), (_, its) = [Sower(f)(**given) for f in (ours, NNX)]
        assert mine.shape == its.shape
        np.testing.assert_allclose(mine, its, atol=5e-6)


@pytest.mark.parametrize("option", ["bias", "mask", "is_causal"])
def test_each_option_changes_the_answer(option):
    assert cases.off_and_on(asked((option,))[1], asked(())[1])


@pytest.mark.parametrize("theirs", [LINEN, NNX])
def test_every_argument_of_flax_is_known(theirs):
    mine, its = [inspect.signature(f).parameters for f in (ours, theirs)]
    assert set(its) <= set(mine)
    assert list(mine)[:12] == list(its)[:12]  # what may be given by position
    for name in its:
        if name != "promote_dtype":
            assert mine[name].default == its[name].default


def test_dtypes_are_promoted_or_cast():
    q, k, v = [cases.draw(n, 2, 5, 4, 8) for n in range(3)]
    mixed = (q.astype(jnp.bfloat16), k, v)
    assert ours(*mixed).dtype == LINEN(*mixed).dtype == jnp.float32
    assert ours(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert ours(*mixed, promote_dtype=nnx.nn.dtypes.promote_dtype).dtype == jnp.float32
    cast = lambda arrays, dtype: tuple(x.astype(jnp.float16) for x in arrays)  # noqa: E731
    assert ours(q, k, v, promote_dtype=cast).dtype == NNX(q, k, v, promote_dtype=cast).dtype


def test_a_mask_of_numbers_and_no_batch():
    q, k, v = [cases.draw(n, t, 4, 8) for n, t in enumerate((5, 9, 9))]
    mask = (cases.draw(3, 4, 5, 9) > 0).astype(np.float32)
    mask[..., 0] = 1
    np.testing.assert_allclose(ours(q, k, v, mask=mask), LINEN(q, k, v, mask=mask), atol=5e-6)


def test_a_row_that_sees_nothing_is_zero_here_and_the_mean_in_flax():
    given, _ = asked(("mask",))
    given["mask"][0, 0, 2] = False
    assert not ours(**given)[0, 2].any()
    np.testing.assert_allclose(LINEN(**given)[0, 2], given["value"][0].mean(0), atol=1e-6)


def test_dropout_of_each_element():
    q, k, v = [cases.draw(n, 2, 40, 4, 8) for n in range(3)]
    key = jax.random.key(3)
    low, high = [int(x) for x in jax.random.bits(key, (2,), jnp.uint32)]
    out = ours(q, k, v, dropout_rng=key, dropout_rate=0.3, broadcast_dropout=False)
    want = reference.attention(q, k, v, layout="BTHD", dropout=(0.3, low + (high << 32))).out
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_broadcast_dropout_is_one_mask_for_batch_and_heads(kv_heads):
    q = cases.draw(0, 2, 40, 4, 8)
    k, v = [cases.draw(n, 2, 40, kv_heads, 8) for n in (1, 2)]
    bias, mask = cases.draw(3, 4, 40, 40), cases.draw(4, 2, 1, 40, 40) > -1
    key = jax.random.key(3)
    low, high = [int(x) for x in jax.random.bits(key, (2,), jnp.uint32)]
    out = ours(q, k, v, bias, mask, dropout_rng=key, dropout_rate=0.3)
    for b in range(2):
        for h in range(4):
            g = h * kv_heads // 4
            one = [q[b : b + 1, :, h : h + 1], *[x[b : b + 1, :, g : g + 1] for x in (k, v)]]
            want = reference.attention(
                *one,
                layout="BTHD",
                bias=bias[None, h : h + 1],
                mask=mask[b : b + 1],
                dropout=(0.3, low + (high << 32)),
            ).out
            np.testing.assert_allclose(out[b, :, h], want[0, :, 0], atol=1e-5)
    gradient = jax.grad(lambda q: ours(q, k, v, dropout_rng=key, dropout_rate=0.3).sum())(q)
    assert jnp.isfinite(gradient).all()


def test_weights_are_sown_before_dropout():
    q, k, v = [cases.draw(n, 2, 5, 4, 8) for n in range(3)]
    given = {"query": q, "key": k, "value": v}
    _, plain = Sower(ours)(**given)
    _, dropped = Sower(ours)(**given, dropout_rng=jax.random.key(0), dropout_rate=0.5)
    np.testing.assert_allclose(dropped, plain, atol=1e-6)


# Inside Flax' layers ----------------------------------------------------------------------------


def linen_layer(function: Any, **options: Any) -> Any:
    return linen.MultiHeadDotProductAttention(4, qkv_features=32, attention_fn=function, **options)


X, Y = cases.draw(0, 2, 5, 16), cases.draw(1, 2, 9, 16)
SEEN = np.array(cases.draw(2, 2, 1, 5, 9) > -0.5)
SEEN[..., 0] = True


@pytest.mark.parametrize("options", [{}, {"normalize_qk": True}, {"dtype": jnp.bfloat16}])
def test_linen(options):
    its, mine = [linen_layer(f, **options) for f in (LINEN, ours)]
    variables = its.init(jax.random.key(0), X, Y)
    found, want = [layer.apply(variables, X, Y, mask=SEEN) for layer in (mine, its)]
    np.testing.assert_allclose(
        *[np.asarray(x, np.float32) for x in (found, want)],
        atol=2e-2 if "dtype" in options else 5e-6,
    )
    for layer in (mine, its):
        _, state = layer.apply(
            variables, X, Y, mask=SEEN, sow_weights=True, mutable=["intermediates"]
        )
        (weights,) = state["intermediates"]["attention_weights"]
        np.testing.assert_allclose(np.asarray(weights, np.float32).sum(-1), 1, atol=2e-2)
        assert weights.shape == (2, 4, 5, 9)


def test_linen_dropout_and_training():
    layer = linen_layer(ours, dropout_rate=0.5)
    variables = layer.init(jax.random.key(0), X, deterministic=True)

    def call(key, **options):
        return layer.apply(variables, X, rngs={"dropout": jax.random.key(key)}, **options)

    still = call(0, deterministic=True)
    np.testing.assert_array_equal(still, linen_layer(ours).apply(variables, X))
    one, again, other = [call(key, deterministic=False) for key in (1, 1, 2)]
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    assert not np.allclose(one, still)


def test_linen_decodes_as_flax_does():
    layers = [linen_layer(f, decode=True) for f in (ours, LINEN)]
    variables = layers[1].init(jax.random.key(0), X)
    caches = [variables["cache"]] * 2
    for step in range(5):
        outs = []
        for n, layer in enumerate(layers):
            out, state = layer.apply(
                {"params": variables["params"], "cache": caches[n]},
                X[:, step : step + 1],
                mutable=["cache"],
            )
            caches[n] = state["cache"]
            outs.append(out)
        np.testing.assert_allclose(*outs, atol=5e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx(kv_heads, is_causal):
    if "is_causal" not in inspect.signature(nnx.MultiHeadAttention.__call__).parameters:
        pytest.skip("the layer of Flax before 0.12.7 takes no is_causal")
    its, mine = [
        nnx.MultiHeadAttention(
            *(4, 16, 32),
            num_kv_heads=kv_heads,
            decode=False,
            rngs=nnx.Rngs(0),
            attention_fn=function,
        )
        for function in (NNX, ours)
    ]
    found, want = [layer(X, Y, mask=SEEN, is_causal=is_causal) for layer in (mine, its)]
    np.testing.assert_allclose(found, want, atol=5e-6)


def test_nnx_dropout_and_sown_weights():
    layer = nnx.MultiHeadAttention(
        *(4, 16, 32), decode=False, dropout_rate=0.5, rngs=nnx.Rngs(0), attention_fn=ours
    )
    one, other = layer(X, deterministic=False), layer(X, deterministic=False)
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(*[layer(X, deterministic=True) for _ in range(2)])
    layer(X, deterministic=True, sow_weights=True)
    (weights,) = nnx.pop(layer, nnx.Intermediate)["attention_weights"].get_value()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


Q = jnp.zeros((2, 5, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"query": Q[0, 0]}, ValueError, "`query` must have rank 3 or more"),
        ({"key": Q[:1]}, ValueError, "`key` must have the batch dimensions of query"),
        ({"mask": Q[:, :, 0]}, ValueError, "`mask` must broadcast to"),
        ({"dropout_rate": 0.5}, ValueError, "`dropout_rng` must be given"),
        ({"precision": "exactly"}, UnsupportedError, "`precision` must be None"),
        ({"qk_attn_weights_einsum": jnp.einsum}, UnsupportedError, "`qk_attn_weights_einsum`"),
        ({"attn_weights_value_einsum": jnp.einsum}, UnsupportedError, "must be None"),
        ({"einsum_dot_general": jax.lax.dot_general}, UnsupportedError, "`einsum_dot_general`"),
    ],
)
def test_errors_are_in_our_words(arguments, error, words):
    with pytest.raises(error, match=words):
        ours(**{"query": Q, "key": Q, "value": Q, **arguments})


def test_the_page_as_written():
    for code in pages.blocks("COMPAT.md", "flax"):
        held: dict[str, Any] = {}
        exec(code, held)
        assert held["layer"].attention_fn is held["module"].attention_fn is ours
