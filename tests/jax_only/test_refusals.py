"""What JAX's layers and models refuse, and that nothing has happened then."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_core.backends.jax import Transformer
from attn_core.backends.jax.layer_parts import Linear

ENCODER = {"kind": "encoder", "width": 8, "depth": 1, "heads": 2, "vocabulary": 11, "classes": 3}


def test_a_part_that_was_replaced_is_named_before_anything_is_set() -> None:
    weights = Transformer(ENCODER, seed=5).export_weights()
    for part, words in (
        (nnx.Linear(8, 20, rngs=nnx.Rngs(0)), "`head.weight` must be a parameter.*Got none"),
        (Linear(8, 20, True, "float32"), r"`head.weight` must be .*\(8, 3\).*Got \(8, 20\)"),
    ):
        model = Transformer(ENCODER, seed=1)
        model.head = part
        before = jax.tree.leaves(nnx.state(model))
        with pytest.raises(ValueError, match=words):
            model.load_weights(weights)
        assert all(map(np.array_equal, before, jax.tree.leaves(nnx.state(model))))


@pytest.mark.parametrize("stop", [[1, 2], 1.5, 99])
def test_a_stop_is_one_token(stop: object) -> None:
    model = Transformer(kind="decoder", width=8, depth=1, heads=2, vocabulary=11)
    with pytest.raises((TypeError, ValueError), match="`stop` must be"):
        model.generate(np.ones((2, 3), np.int32), 2, stop=stop)


@pytest.mark.parametrize("token", [-1, 11])
def test_a_token_beyond_the_vocabulary_is_named(token: int) -> None:
    model = Transformer(kind="encoder-decoder", width=8, depth=1, heads=2, vocabulary=11)
    good, bad = jnp.array([[1, 10]]), jnp.array([[1, token]])
    words = "must be within the vocabulary, from 0 to 10. Got "
    with pytest.raises(ValueError, match=f"`given` {words}{token}"):
        model(bad, good)
    with pytest.raises(ValueError, match=f"`source` {words}{token}"):
        model.generate(good, 2, source=bad)
    with pytest.raises(ValueError, match=f"`prompt` {words}{token}"):
        model.generate(bad, 2, source=good)
    typed = Transformer({**ENCODER, "token_types": 2})
    with pytest.raises(ValueError, match="`types` must be within `token_types`, from 0 to 1"):
        typed(good, types=bad)
    assert jnp.isfinite(model(good, good)).all()
    # Traced, nobody can be told when.
    assert jnp.isnan(nnx.jit(lambda model, x: model(x, good))(model, bad)).any()
