"""Layers within Keras' functional and Sequential models: masks of padding, masks of the call.

Keras writes down how a layer was called and calls it so again, on tensors: what it adds to the
call the second time must mean what it meant the first. B is T here, where a mask of padding (B, T)
also has the shape of a mask array.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras_support import array, tensor
from layer_cases import draw

from attn_core import masks
from attn_core.backends.keras import AdditiveAttention, MultiHeadAttention, Transformer

# Keras asks NumPy for copies of torch's tensors in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = 5
LENGTHS = np.array([3, 5, 2, 4, 1], np.int32)
ENDS = np.arange(SIZE) < LENGTHS[:, None]
X = draw(SIZE, SIZE, 8)
X[~ENDS] = 0  # which keras.layers.Masking takes for padding
TOKENS = np.where(ENDS, np.arange(1, 26).reshape(SIZE, SIZE) % 8 + 1, 0).astype(np.int32)
OWN = {
    "none": None,
    "a mask of the language": masks.causal(),
    "an array": np.random.default_rng(2).random((SIZE, SIZE)) < 0.6,
}


def functional(layer: Any, mask: Any) -> Any:
    x = keras.Input((SIZE, 8))
    return keras.Model(x, layer(keras.layers.Masking()(x), mask=mask))


def unknown(layer: Any, mask: Any) -> Any:
    x = keras.Input((None, 8))
    return keras.Model(x, layer(keras.layers.Masking()(x), mask=mask))


def sequential(layer: Any, mask: Any) -> Any:
    del mask
    return keras.Sequential([keras.layers.Masking(), layer])


def built(layer: Any, mask: Any) -> Any:
    del mask
    return keras.Sequential([keras.Input((SIZE, 8)), keras.layers.Masking(), layer])


# A Sequential hands on no arguments.
FORMS = [(form, name) for form in (functional, unknown) for name in OWN]
FORMS += [(sequential, "none"), (built, "none")]


def check(model: Any, given: Any, want: Any) -> None:
    """Called and asked to predict, the same as without Keras' masks."""
    assert np.allclose(array(model(tensor(given))), want, rtol=0, atol=1e-6)
    found = model.predict(given, batch_size=SIZE, verbose=0)
    assert np.allclose(found, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_padding_in_a_graph(form: Any, name: str) -> None:
    """It holds together with the mask of the call, as lengths do, and takes the place of none."""
    layer = MultiHeadAttention(width=8, heads=2)
    options = {"mask": OWN[name], "query_offset": 0}
    want = array(layer(tensor(X), kv_lengths=LENGTHS, q_lengths=LENGTHS, **options))
    assert abs(want - array(layer(tensor(X), **options))).max() > 1e-2
    check(form(layer, OWN[name]), X, want)
    check(form(layer, OWN[name]), X[:2], want[:2])


def test_padding_of_an_embedding() -> None:
    """`mask_zero`, and on through two layers."""
    table = keras.layers.Embedding(9, 8, mask_zero=True)
    one, two = MultiHeadAttention(width=8, heads=2), MultiHeadAttention(width=8, heads=2, seed=1)
    told = {"kv_lengths": LENGTHS, "q_lengths": LENGTHS, "query_offset": 0}
    vectors = tensor(array(table(tensor(TOKENS))))
    want = array(two(one(vectors, **told), **told))
    x = keras.Input((SIZE,), dtype="int32")
    check(keras.Model(x, two(one(table(x)))), TOKENS, want)
    check(keras.Sequential([table, one, two]), TOKENS, want)


def test_padding_of_both_sides_in_a_graph() -> None:
    """Two inputs: the mask of each is its own, in attention across and in additive attention."""
    x = keras.Input((SIZE, 8))
    padded = keras.layers.Masking()(x)
    cross, added = MultiHeadAttention(width=8, heads=2), AdditiveAttention(width=8)
    given = tensor(X)
    want = array(cross(given, given, kv_lengths=LENGTHS))
    check(keras.Model(x, cross(x, padded)), X, want)
    told = {"kv_lengths": LENGTHS, "q_lengths": LENGTHS, "mask": masks.causal(), "query_offset": 0}
    want = array(added(given, given, **told))
    check(keras.Model(x, added(padded, padded, mask=masks.causal())), X, want)


def test_a_model_refuses_padding_in_a_graph() -> None:
    """A Transformer has `lengths` for it, and says so whether the model is one graph or a chain."""
    model = Transformer(kind="encoder", width=8, depth=1, heads=2, inputs=8)
    x = keras.Input((SIZE, 8))
    with pytest.raises(ValueError, match="padding mask of Keras must be left out: `lengths`"):
        model(keras.layers.Masking()(x))
    with pytest.raises(ValueError, match="padding mask of Keras must be left out: `lengths`"):
        keras.Sequential([keras.layers.Masking(), model])(tensor(X))
    # Beside another tensor, where Keras names the masks of all.
    with pytest.raises(ValueError, match="padding mask of Keras must be left out: `lengths`"):
        model(keras.layers.Masking()(tensor(X)), lengths=tensor(LENGTHS))


LAYER = MultiHeadAttention(width=8, heads=2)
ADDED = AdditiveAttention(width=8)
MODEL = Transformer(kind="encoder", width=8, depth=1, heads=2, inputs=8)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, **told: LAYER(x, **told),
        lambda x, **told: ADDED(x, x, **told),
        lambda x, **told: MODEL(x, **told),
    ],
    ids=["layer", "additive", "model"],
)
def test_one_mask_under_both_names_is_refused(call: Any) -> None:
    seen, x = np.tri(SIZE, dtype=bool), tensor(X)
    with pytest.raises(ValueError, match="`mask` and `attention_mask` must not both be given"):
        call(x, mask=seen, attention_mask=~seen)
    # Under either it is the same, and it is read.
    one, two = array(call(x, mask=seen)), array(call(x, attention_mask=seen))
    assert np.array_equal(one, two)
    assert abs(one - array(call(x))).max() > 1e-3


def test_a_mask_of_the_call_is_saved_with_the_graph(tmp_path: Any) -> None:
    x = keras.Input((SIZE, 8))
    model = keras.Model(x, LAYER(x, mask=masks.causal() & masks.window(left=1)))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    want = array(model(tensor(X)))
    assert np.array_equal(array(loaded(tensor(X))), want)
    assert abs(want - array(LAYER(tensor(X)))).max() > 1e-3
    held = keras.Model(x, LAYER(x, mask=masks.dense(np.tri(SIZE, dtype=bool)[None, None])))
    with pytest.raises(ValueError, match="a graph that is saved must hold no score and no mask"):
        held.save(tmp_path / "n.keras")
