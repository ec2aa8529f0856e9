"""What JAX's layers and models refuse, and that nothing has happened then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from call_cases import check_a_prompt_is_named, check_lengths_are_named
from flax import nnx

import attn_core
from attn_core import AttentionConfig
from attn_core.backends.jax import MultiHeadAttention, Transformer, linen
from attn_core.backends.jax.arrays import DTYPES
from attn_core.backends.jax.layer_parts import Linear

ENCODER = {"kind": "encoder", "width": 8, "depth": 1, "heads": 2, "vocabulary": 11, "classes": 3}
DECODER = {"kind": "decoder", "width": 8, "depth": 1, "heads": 2, "vocabulary": 11}
PAIR = {**DECODER, "kind": "encoder-decoder"}
PROMPT = [[1, 2, 3, 4], [5, 6, 7, 8]]


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


def test_generate_refuses_lengths_out_of_reach() -> None:
    model, pair, prompt = Transformer(DECODER), Transformer(PAIR), jnp.array(PROMPT)
    for name, least, wrong in [
        ("lengths", 1, ([5, 2], [-1, 2], [0, 2], np.array([1, 9]), jnp.array([9, 2]), 0)),
        ("source_lengths", 0, ([9, 1], [-1, 1], jnp.array([5, 1]), 5)),
    ]:
        for lengths in wrong:
            more = {"source": prompt} if name == "source_lengths" else {}
            with pytest.raises(ValueError, match=rf"`{name}` must be within \[{least}, 4\]"):
                (pair if more else model).generate(prompt, 3, **{name: lengths}, **more)
    with pytest.raises(ValueError, match="`lengths` must be an int or have shape"):
        model.generate(prompt, 3, lengths=[1, 2, 3])
    assert pair.generate(prompt, 2, source=prompt, source_lengths=[0, 4]).shape == (2, 2)


def test_a_cache_of_another_batch_is_refused() -> None:
    model = Transformer(DECODER)
    for tokens, batch in (([[1, 2]], 3), (PROMPT, 1)):
        with pytest.raises(ValueError, match=f"`cache` must be one of this batch.*Got {batch}"):
            model(jnp.array(tokens), cache=model.make_cache(batch, 4))


def test_positions_beyond_int32_are_refused() -> None:
    layer = MultiHeadAttention(width=8, heads=2, positions="rotary")
    x = jnp.array(np.ones((1, 3, 8), "float32"))
    least = np.asarray(layer(x, positions=[-(2**31), 0, 2**31 - 1]))
    assert np.isfinite(least).all()
    for wrong in ([0, 1, 2**31], np.arange(3) + 2**33, np.arange(3) - 2**33):
        with pytest.raises(ValueError, match="`positions` must be within int32"):
            layer(x, positions=wrong)


def test_lengths_that_are_traced_answer_from_their_own_row() -> None:
    model, prompt = Transformer(DECODER), jnp.array(PROMPT)
    model.eval()
    found = jax.jit(lambda n: model.generate(prompt, 3, lengths=n))(jnp.array([9, 2]))
    assert np.array_equal(found, model.generate(prompt, 3, lengths=[4, 2]))


def test_a_linen_module_says_how_its_weights_are_saved(tmp_path: Path) -> None:
    module = linen.MultiHeadAttention(AttentionConfig(8, 2), seed=1)
    with pytest.raises(TypeError, match=r"module.export_weights\(variables\), module.settings"):
        attn_core.save_weights(tmp_path / "w", module)
    variables = module.init(jax.random.key(0), jnp.ones((1, 2, 8)))
    attn_core.save_weights(tmp_path / "w", module.export_weights(variables), module.settings)


def test_a_cache_has_no_negative_size() -> None:
    with pytest.raises(ValueError, match="`length` must be at least 0"):
        Transformer(DECODER).make_cache(2, -1)


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


@pytest.mark.parametrize(
    "dtype",
    [
        "int32",
        "bool",
        "float8_e4m3fn",
        "complex64",
        "flaot32",
        5,
        float,
        [1],
        jnp.int8,
        jnp.float8_e4m3fn,
        np.dtype("complex64"),
    ],
)
def test_a_cache_holds_floats(dtype: Any) -> None:
    words = "`dtype` must be one of float64, float32, bfloat16, float16. Got"
    for layer in (
        MultiHeadAttention(width=8, heads=2),
        Transformer(DECODER),
        linen.Transformer(DECODER),
    ):
        with pytest.raises(ValueError, match=words):
            layer.make_cache(2, 4, dtype=dtype)


def test_a_cache_of_every_float() -> None:
    layer = MultiHeadAttention(width=8, heads=2)
    for word, dtype in DTYPES.items():
        for given in (word, dtype):
            assert layer.make_cache(2, 4, dtype=given).key.dtype == dtype


def test_lengths_are_named_as_they_were_given() -> None:
    check_lengths_are_named(Transformer(DECODER), Transformer(PAIR), jnp.array(PROMPT))


def test_a_prompt_is_named_as_it_was_given() -> None:
    check_a_prompt_is_named(Transformer(DECODER), jnp.array([[1, 11]]), jnp.ones((2, 3)))
