"""jax.nn.dot_product_attention as an implementation: when it is asked, and when it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_core
from attn_core import UnsupportedError, attention, masks, scores

RNG = np.random.default_rng(5)
B, HQ, HK, T, D = 2, 4, 2, 70, 16


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


Q, K, V = draw(B, HQ, T, D), draw(B, HK, T, D), draw(B, HK, T, D)
WHOLE = {
    "plain": {},
    "causal": {"mask": masks.causal()},
    "a mask that hides nothing": {"mask": masks.window(100, 100)},
    "a scale": {"scale": 0.3},
}


@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
@pytest.mark.parametrize("name", WHOLE)
def test_it_is_what_jax_computes_and_what_we_mean(name, layout, monkeypatch):
    asked = []
    own = jax.nn.dot_product_attention

    def counting(*args, **options):
        asked.append(options["is_causal"])
        return own(*args, **options)

    jax.clear_caches()
    monkeypatch.setattr(jax.nn, "dot_product_attention", counting)
    given = [x if layout == "BHTD" else x.swapaxes(1, 2) for x in (Q, K, V)]

    def call(impl):
        def loss(*x):
            out = attention(*x, impl=impl, layout=layout, **WHOLE[name])
            return jnp.sin(out).sum(), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*given)

    got = call("native")
    assert asked
    assert all(a == (name == "causal") for a in asked)
    jax.tree_util.tree_map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, call("reference")
    )


REFUSED = {
    "score": ({"score": scores.softcap(2.0)}, "`score` must be left out"),
    "bias": ({"bias": draw(T, T)}, "`bias` must be left out"),
    "sinks": ({"sinks": draw(HQ)}, "`sinks` must be left out"),
    "dropout": ({"dropout": attn_core.Dropout(0.1, 3)}, "`dropout` must be left out"),
    "weights": ({"return_weights": True}, "`return_weights` must be left out"),
    "lse": ({"return_lse": True}, "`return_lse` must be left out"),
    "width": ({"value": draw(B, HK, T, 5)}, "Got D = 16 and Dv = 5"),
    "a mask": ({"mask": masks.window(3)}, "must allow everything"),
    "lengths": ({"kv_lengths": [3, 70]}, "must allow everything"),
    "causal further on": ({"mask": masks.causal(), "query_offset": 3}, "must allow everything"),
    "float16": (
        {
            n: x.astype(jnp.float16)
            for n, x in zip(("query", "key", "value"), (Q, K, V), strict=True)
        },
        "float32, bfloat16 on cpu. Got float16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name):
    options, text = REFUSED[name]
    call = {"query": Q, "key": K, "value": V, **options}
    with pytest.raises(UnsupportedError, match=text):
        attention(**call, impl="native")
    attention(**call)  # and "auto" passes it over


def test_it_differentiates_twice_and_forwards():
    """XLA's form is plain operations: nothing there needs a refusal."""
    f = {
        impl: lambda q, i=impl: jnp.sin(attention(q, K, V, mask=masks.causal(), impl=i)).sum()
        for impl in ("native", "reference")
    }
    twice = [jax.grad(lambda q, g=g: jax.grad(g)(q).sum())(Q) for g in f.values()]
    np.testing.assert_allclose(*twice, rtol=1e-4, atol=1e-4)
    forwards = [jax.jvp(g, (Q,), (Q,))[1] for g in f.values()]
    np.testing.assert_allclose(*forwards, rtol=1e-4, atol=1e-4)
