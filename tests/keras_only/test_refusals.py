"""What Keras' layers and models refuse, on whichever backend Keras runs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from call_cases import check_a_prompt_is_named, check_lengths_are_named
from keras_support import BACKEND, array, tensor, wide

from attn_core import masks
from attn_core.backends.keras import AdditiveAttention, MultiHeadAttention, Transformer

DECODER = {"kind": "decoder", "width": 8, "depth": 1, "heads": 2, "vocabulary": 11}
PAIR = {**DECODER, "kind": "encoder-decoder"}
PROMPT = [[1, 2, 3, 4], [5, 6, 7, 8]]


def tokens_of(rows: list[list[int]] | list[int]) -> Any:
    return tensor(np.array(rows, np.int32))


def test_generate_refuses_lengths_out_of_reach() -> None:
    model, pair, prompt = Transformer(DECODER), Transformer(PAIR), tokens_of(PROMPT)
    for name, least, wrong in [
        ("lengths", 1, ([5, 2], [-1, 2], [0, 2], np.array([1, 9]), tokens_of([9, 2]), 0)),
        ("source_lengths", 0, ([9, 1], [-1, 1], tokens_of([5, 1]), 5)),
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
            model(tokens_of(tokens), cache=model.make_cache(batch, 4))


def test_positions_beyond_int32_are_refused() -> None:
    layer = MultiHeadAttention(width=8, heads=2, positions="rotary")
    x = tensor(np.ones((1, 3, 8), "float32"))
    least = array(layer(x, positions=[-(2**31), 0, 2**31 - 1]))
    assert np.isfinite(least).all()
    for wrong in ([0, 1, 2**31], np.arange(3) + 2**33, np.arange(3) - 2**33):
        with pytest.raises(ValueError, match="`positions` must be within int32"):
            layer(x, positions=wrong)


def test_a_cache_has_no_negative_size() -> None:
    with pytest.raises(ValueError, match="`length` must be at least 0"):
        Transformer(DECODER).make_cache(2, -1)


@pytest.mark.parametrize(
    "dtype",
    [
        "int32",
        "bool",
        "float8_e4m3fn",
        "complex64",
        "flaot32",
        5,
        [1],
        np.int8,
        np.dtype("complex64"),
    ],
)
def test_a_cache_holds_floats(dtype: Any) -> None:
    words = "`dtype` must be one of float64, float32, bfloat16, float16. Got"
    for layer in (MultiHeadAttention(width=8, heads=2), Transformer(DECODER)):
        with pytest.raises(ValueError, match=words):
            layer.make_cache(2, 4, dtype=dtype)


def test_a_cache_of_every_float() -> None:
    layer, like = MultiHeadAttention(width=8, heads=2), tensor(np.ones(2, "float32"))
    for word in ("float32", "bfloat16", "float16"):
        for given in (word, keras.ops.cast(like, word).dtype):
            made = layer.make_cache(2, 4, dtype=given).key
            assert keras.backend.standardize_dtype(made.dtype) == word
    with wide():
        assert "float64" in str(layer.make_cache(2, 4, dtype="float64").key.dtype)
    if BACKEND == "jax":
        with pytest.raises(ValueError, match='`dtype` must not be "float64" where JAX holds none'):
            layer.make_cache(2, 4, dtype="float64")


def test_lengths_are_named_as_they_were_given() -> None:
    check_lengths_are_named(Transformer(DECODER), Transformer(PAIR), tokens_of(PROMPT))


def test_a_prompt_is_named_as_it_was_given() -> None:
    check_a_prompt_is_named(
        Transformer(DECODER), tokens_of([[1, 11]]), tensor(np.ones((2, 3), "float32"))
    )


def test_a_graph_of_keras_tensors_holds_none_within_a_rule() -> None:
    layer, model = MultiHeadAttention(width=8, heads=2), Transformer(DECODER)
    x, rows, tokens = keras.Input((7, 8)), keras.Input((7,), dtype="int32"), keras.Input((7,))
    tokens = keras.ops.cast(tokens, "int32")
    for call in (
        lambda: layer(x, mask=masks.segments(rows)),
        lambda: AdditiveAttention(width=8)(x, x, mask=masks.segments(rows)),
        lambda: model(tokens, mask=masks.segments(rows)),
    ):
        with pytest.raises(ValueError, match="`mask` must hold arrays that are known when a graph"):
            call()
    for call in (lambda: layer(x, seed=keras.Input(())), lambda: model(tokens, seed=tokens)):
        with pytest.raises(ValueError, match="`seed` must be a number in a graph"):
            call()
    known = masks.segments(tensor(np.array([0, 0, 0, 1, 1, 1, 1], "int32")))
    given = tensor(np.random.default_rng(0).random((2, 7, 8)).astype("float32"))
    found = keras.Model(x, layer(x, mask=known))(given)
    assert np.allclose(array(found), array(layer(given, mask=known)), atol=1e-6)


def test_shapes_of_outputs() -> None:
    layer = MultiHeadAttention(width=8, heads=2, out_width=5)
    assert layer.compute_output_shape((2, None, 8)) == (2, None, 5)
    assert layer.compute_output_shape((2, 3, 8), (2, 4, 8)) == (2, 3, 5)
    assert AdditiveAttention(width=8).compute_output_shape((2, 3, 8), (2, 4, 8)) == (2, 3, 8)
    assert Transformer(DECODER).compute_output_shape((2, 3)) == (2, 3, 11)
    classes = Transformer({**DECODER, "kind": "encoder", "classes": 4})
    assert classes.compute_output_shape((None, 3)) == (None, 4)
