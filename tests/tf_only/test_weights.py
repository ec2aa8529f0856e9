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
