"""weights() of JAX arrays: under jit, and its gradient."""

from __future__ import annotations

import jax
import numpy as np

import attn_core
from attn_core import masks

RNG = np.random.default_rng(0)
QUERY, KEY = (RNG.standard_normal((2, 4, 30, 8)).astype(np.float32) for _ in range(2))
OPTIONS = {"mask": masks.causal(), "kv_lengths": [30, 21], "q_lengths": [30, 9]}


def test_weights_of_chosen_heads_and_rows() -> None:
    query, key = jax.numpy.asarray(QUERY), jax.numpy.asarray(KEY)
    whole = attn_core.attention(query, key, key, return_weights=True, **OPTIONS).weights
    every = np.asarray(whole)[:, [3, 0]]

    def call(query: jax.Array, key: jax.Array) -> jax.Array:
        return attn_core.weights(query, key, heads=[3, 0], queries=[29, 4], **OPTIONS)

    for form in (call, jax.jit(call)):
        np.testing.assert_allclose(form(query, key), every[:, :, [29, 4]], rtol=1e-5, atol=1e-7)
    of_heads = jax.jit(lambda q, k: attn_core.weights(q, k, heads=[3, 0], **OPTIONS))
    np.testing.assert_allclose(of_heads(query, key), every, rtol=1e-5, atol=1e-7)


def test_they_are_differentiable() -> None:
    up = RNG.standard_normal((2, 1, 2, 30)).astype(np.float32)

    def some(query: jax.Array) -> jax.Array:
        return (attn_core.weights(query, keys, heads=1, queries=[3, 7], **OPTIONS) * up).sum()

    def whole(query: jax.Array) -> jax.Array:
        found = attn_core.attention(query, keys, keys, return_weights=True, **OPTIONS).weights
        return (found[:, [1]][:, :, np.array([3, 7])] * up).sum()

    keys = jax.numpy.asarray(KEY)
    got, want = (np.asarray(jax.grad(f)(jax.numpy.asarray(QUERY))) for f in (some, whole))
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
