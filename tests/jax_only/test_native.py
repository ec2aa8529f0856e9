"""jax.nn.dot_product_attention as an implementation: when it is asked, and when it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_core
from attn_core import UnsupportedError, attention, masks, scores
from attn_core.api import resolve
from attn_core.backends import jax as backend
from attn_core.backends.jax import native

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


# --- Logits near the number that hides. -----------------------------------------------------------

FAR = {
    # query, key: at D = 8 and scale 1 all logits are about 8 * query * key.
    "below the number that hides": (-5.5e18, 5.5e18),
    "near the largest number": (-6.3e18, 6.3e18),
    "all -inf": (-1e20, 1e20),
    "sums that overflow, and a small scale": (-1e20, 1e20),
}


def far(name: str, dtype: Any) -> tuple[dict[str, Any], float]:
    """Rows that all see the same logit, so that their output is the mean of the keys they see."""
    rng = np.random.default_rng(3)
    q, k = (np.full((1, 2, 6, 8), x, np.float32) for x in FAR[name])
    v = rng.standard_normal((1, 2, 6, 8)).astype(np.float32)
    arrays = {"query": q, "key": k, "value": v}
    scale = 1e-3 if name.endswith("scale") else 1.0
    return {n: jnp.asarray(x, dtype) for n, x in arrays.items()}, scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", FAR)
def test_a_causal_row_of_very_negative_logits_sees_its_own_keys_alone(name, dtype):
    x, scale = far(name, dtype)
    v = np.asarray(x["value"], np.float64)
    wanted = np.cumsum(v, 2) / np.arange(1, 7)[:, None]
    if "inf" in name or "overflow" in name:
        wanted = 0 * wanted  # in float32 no key is left
    given = {**x, "scale": scale, "mask": masks.causal(), "impl": "native"}
    output, gradients = backend.vjp(given, {"out": jnp.ones(v.shape, dtype)}, "jit")
    np.testing.assert_allclose(
        np.asarray(output.out, np.float64), wanted, atol=1e-6 if dtype == jnp.float32 else 2e-2
    )
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_of_minus_infinity_is_zero_without_a_mask(dtype):
    x, _ = far("all -inf", dtype)
    output, gradients = backend.vjp(
        {**x, "scale": 1.0, "impl": "native"}, {"out": jnp.ones((1, 2, 6, 8), dtype)}
    )
    assert not np.asarray(output.out, np.float32).any()
    assert not np.asarray(gradients["value"], np.float32).any()


def test_hidden_logits_may_overflow():
    """Of a later key, infinitely far off or NaN: where they are hidden they do not matter."""
    x = {n: jnp.asarray(RNG.standard_normal((1, 2, 6, 8)), jnp.float32) for n in "qkv"}
    loud = {**x, "q": x["q"].at[:, :, 5].set(1e25), "k": x["k"].at[:, :, 5].set(-1e25)}

    def rows(q, k, v, impl):
        return attention(q, k, v, mask=masks.causal(), impl=impl)[:, :, :5]

    for impl in ("native", "chunked", "reference"):
        found = [jax.vjp(lambda *y, i=impl: rows(*y, i), *a.values()) for a in (loud, x)]
        np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
        (*_, far_v), (*_, near_v) = (back(jnp.ones_like(out)) for out, back in found)
        np.testing.assert_allclose(far_v, near_v, rtol=1e-6, atol=1e-6)


def test_under_vmap_each_is_guarded_by_itself():
    """Both branches run there; nothing of the one that is not taken reaches a result."""
    near, _ = far("all -inf", jnp.float32)
    tame = {n: jnp.asarray(RNG.standard_normal(x.shape), jnp.float32) for n, x in near.items()}
    stacked = [jnp.stack([near[n], tame[n]]) for n in near]

    def loss(q, k, v):
        return jnp.sin(attention(q, k, v, scale=1.0, mask=masks.causal(), impl="native")).sum()

    mapped = jax.vmap(jax.grad(loss, (0, 1, 2)))(*stacked)
    whole = jax.grad(lambda *x: jax.vmap(loss)(*x).sum(), (0, 1, 2))(*stacked)
    alone = [jax.grad(loss, (0, 1, 2))(*x.values()) for x in (near, tame)]
    for found in (mapped, whole):
        for got, *wanted in zip(found, *alone, strict=True):
            np.testing.assert_allclose(got, jnp.stack(wanted), rtol=1e-5, atol=1e-6)


# --- On a GPU: what cuDNN takes. No GPU is needed, since nothing is computed. ---------------------


def on_gpu(**changes: Any) -> Any:
    q, k = (jnp.zeros((2, h, 64, 64), jnp.bfloat16) for h in (4, 2))
    _, plan, _ = resolve({"query": q, "key": k, "value": k, "mask": masks.causal()})
    if "width" in changes:
        changes["v_width"] = changes["width"]
    return replace(plan.problem, device="gpu", **changes)


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper that JAX has no objection to; what JAX is asked is recorded."""
    found = SimpleNamespace(capability=(9, 0), message=None, asked=[])
    monkeypatch.setattr(native, "_capability", lambda: found.capability)
    monkeypatch.setattr(native, "_raised", lambda *a: found.asked.append(a) or found.message)
    return found


def test_on_a_gpu_it_takes_what_cudnn_takes(gpu):
    assert native.refusals(on_gpu()) == []
    assert gpu.asked == [("bfloat16", (2, 64, 64, 4, 2, 64), True)]
    assert native.refusals(on_gpu(dtype="float16", width=256, mask=None)) == []


ON_GPU = {
    "narrow": ({"width": 60}, (9, 0), "D must be a multiple of 8 and at most 256 .* Got 60"),
    "wide": ({"width": 264}, (9, 0), "at most 256 .* Got 264"),
    "wide, older": ({"width": 136}, (8, 6), "at most 128 .* Got 136"),
    "too old": ({}, (7, 5), "needs compute capability 8.0 or more. Got 7.5"),
    "no CUDA": ({}, (), "Got a device without CUDA"),
    "float32": ({"dtype": "float32"}, (9, 0), "bfloat16, float16 on gpu. Got float32"),
    "no size": ({"q_len": None, "mask": None}, (9, 0), "Tq must be known"),
    "no scale": ({"scale": 0.0}, (9, 0), "must be a positive normal float32 .* Got 0.0"),
    "scale < 0": ({"scale": -0.1}, (9, 0), "must be a positive normal float32 .* Got -0.1"),
}


@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_it_refuses_what_cudnn_would_raise(gpu, name):
    changes, gpu.capability, text = ON_GPU[name]
    (reason,) = native.refusals(on_gpu(**changes))
    assert re.search(text, reason)
    assert not gpu.asked


def test_on_a_gpu_jax_has_the_last_word(gpu):
    gpu.message = "RuntimeError: cuDNN is not detected."
    (reason,) = native.refusals(on_gpu())
    assert reason.endswith("Got its refusal: RuntimeError: cuDNN is not detected.")
    assert attn_core.registry.choose(backend, on_gpu(), "auto").impl == "chunked"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a machine without a GPU")
def test_a_machine_without_a_gpu_is_refused_and_nothing_is_raised():
    sizes = (2, 64, 64, 4, 2, 64)
    assert native._raised("bfloat16", sizes, True)
    assert native._capability() == ()
    assert native.refusals(on_gpu())
