"""weights() on TensorFlow tensors."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

import attn_core
from attn_core import masks


def test_weights_of_chosen_heads_and_rows():
    rng = np.random.default_rng(0)
    query, key = (tf.constant(rng.standard_normal((2, 4, 30, 8)), tf.float32) for _ in range(2))
    options = {"mask": masks.causal(), "kv_lengths": [30, 21], "q_lengths": [30, 9]}
    every = attn_core.attention(query, key, key, return_weights=True, **options).weights.numpy()
    found = attn_core.weights(query, key, heads=[3, 0], queries=[29, 4], **options)
    np.testing.assert_allclose(found, every[:, [3, 0]][:, :, [29, 4]], rtol=1e-5, atol=1e-7)


def test_weights_of_sizes_that_nobody_knows_yet():
    rng = np.random.default_rng(1)
    query, key = (tf.constant(rng.standard_normal((2, 4, n, 8)), tf.float32) for n in (20, 30))
    every = attn_core.attention(
        query, key, key, mask=masks.causal(), query_offset="end", return_weights=True
    ).weights.numpy()
    unknown = tf.TensorSpec((None, 4, None, 8), tf.float32)

    @tf.function(input_signature=[unknown, unknown])
    def of_heads(query, key):
        return attn_core.weights(query, key, heads=[2], mask=masks.causal(), query_offset="end")

    @tf.function(input_signature=[unknown, unknown])
    def of_rows(query, key):
        return attn_core.weights(query, key, queries=[3, 19], mask=masks.causal(), query_offset=10)

    np.testing.assert_allclose(of_heads(query, key), every[:, [2]], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(of_rows(query, key), every[:, :, [3, 19]], rtol=1e-5, atol=1e-7)
