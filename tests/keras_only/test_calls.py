"""Calls of Keras' layers: other libraries' words, lists, padding beside classes, weights, steps."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from call_cases import FAST, WORDS
from keras_support import BACKEND, array, tensor, tensors
from layer_cases import CASES, draw, inputs_of, weights_of
from model_cases import DECODER, ENCODER

from attn_core import masks
from attn_core.backends.keras import AdditiveAttention, MultiHeadAttention, Steps, Transformer
from attn_core.backends.keras.tensors import room
from attn_core.conformance.tolerance import CAP

ops = keras.ops
X = tensor(draw(2, 5, 12))
TOKENS = tensor(np.array([[1, 2, 3, 4, 0], [4, 3, 2, 0, 0]], np.int32))
LAYER = MultiHeadAttention(width=12, heads=4)
# These are of Keras, and said alike here and there.
OURS = ("attention_mask", "training")


@pytest.mark.parametrize("name", [name for name in WORDS if name not in OURS])
def test_other_libraries_words(name: str) -> None:
    with pytest.raises(TypeError, match=WORDS[name]):
        LAYER(*[X] * (name != "inputs_q"), **{name: X})


def test_other_libraries_words_to_other_layers() -> None:
    with pytest.raises(TypeError, match="`lengths=`, where padding stands at the end"):
        Transformer(ENCODER)(TOKENS, key_padding_mask=TOKENS)
    with pytest.raises(TypeError, match="a call of AdditiveAttention must be in the words of"):
        AdditiveAttention(width=12)(X, X, attn_mask=None)


LISTS = {
    "a layer": lambda: LAYER([[[0.0] * 12]]),
    "its key": lambda: LAYER(X, [[[0.0] * 12]]),
    "its memory": lambda: LAYER.memory([[[0.0] * 12]]),
    "additive attention": lambda: AdditiveAttention(width=12)(X, [[[0.0] * 12]]),
    "a model": lambda: Transformer(DECODER)([[1, 2]]),
    "its prompt": lambda: Transformer(DECODER).generate([[1, 2]], 2),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str) -> None:
    with pytest.raises(TypeError, match=r"must be an array. Got builtins.list: keras.ops.conv"):
        LISTS[name]()


SEEN = np.array(array(TOKENS) != 0)[:, None, None]
PADDING = {
    "dense": masks.dense(SEEN),
    "beside others": masks.causal() & masks.dense(SEEN),
    "lengths": masks.lengths(np.array([4, 3])),
}


def test_padding_beside_classes() -> None:
    """Called, and in a graph of KerasTensors."""
    model = Transformer({**ENCODER, "classes": 3})
    symbol = keras.Input((5,), dtype="int32")
    for mask in (*PADDING.values(), SEEN):
        for given in (TOKENS, symbol):
            with pytest.raises(ValueError, match="`lengths` must say which rows count"):
                model(given, mask=mask)
    assert model(TOKENS, mask=PADDING["dense"], lengths=np.array([4, 3])).shape == (2, 3)
    assert model(TOKENS, mask=masks.causal()).shape == (2, 3)
    assert model(symbol, mask=masks.causal()).shape == (None, 3)


@pytest.mark.parametrize("name", FAST if BACKEND == "tensorflow" else ["everything"])
def test_weights_are_answered_fast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is no worse than chunked, and `out` stays what it was."""
    asked, backend = [], room()

    def watched(impl: str, handler: Any) -> Any:
        return lambda *args: asked.append(impl) or handler(*args)

    for impl, handler in list(backend._HANDLERS.items()):
        monkeypatch.setitem(backend._HANDLERS, impl, watched(impl, handler))
    case = CASES[name]
    layer = MultiHeadAttention(**case.config)
    layer.load_weights(weights_of(layer.plan))
    call = {"training": case.training, **tensors(case.call)}
    inputs = [tensor(x) for x in inputs_of(case)]
    alone, found = layer(*inputs, **call), layer(*inputs, **call, return_weights=True)
    assert len(asked) == 2
    assert set(asked) <= {"chunked", "native", "triton"}
    alone, out = array(alone), array(found.out)
    assert abs(alone - out).max() <= CAP["out"]["float32"] * abs(alone).max()


# Keras asks NumPy for copies of variables in a way that NumPy deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_steps_within_fit(tmp_path: Any) -> None:
    """Step n of `fit` drops what `seed=n` drops; a model that is loaded goes on counting."""

    class Model(keras.Model):
        def __init__(self, start: int = 0) -> None:
            super().__init__()
            self.steps = Steps(start)
            self.attend = MultiHeadAttention(width=12, heads=4, dropout=0.5)

        def call(self, x: Any, training: bool = False) -> Any:
            return self.attend(x, seed=self.steps.next() if training else None, training=training)

    model, x = Model(), draw(2, 5, 12)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    told = {"batch_size": 2, "shuffle": False, "verbose": 0}
    losses = model.fit(x, x, epochs=3, **told).history["loss"]
    model.evaluate(x, x, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other = Model()
    other.compile(keras.optimizers.SGD(0.0), "mse")
    other(tensor(x))
    other.load_weights(tmp_path / "model.weights.h5")
    losses += other.fit(x, x, epochs=2, **told).history["loss"]
    for step, loss in enumerate(losses):
        out = array(model.attend(tensor(x), seed=step, training=True))
        assert np.isclose(((out - x) ** 2).mean(), loss, rtol=1e-5)
    assert len(set(losses)) == 5
    assert int(array(other.steps.count.value)) == 5
    again = Steps.from_config(Steps(7, name="count").get_config())
    assert (int(array(again.next())), int(array(again.next())), again.name) == (7, 8, "count")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_optimizers_count() -> None:
    """A seed where Keras gives a model its value; where it does not, on JAX, we say what does."""

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.attend = MultiHeadAttention(width=12, heads=4, dropout=0.5)

        def call(self, x: Any, training: bool = False) -> Any:
            seed = self.optimizer.iterations if training else None
            return self.attend(x, seed=seed, training=training)

    model, x = Model(), draw(2, 5, 12)
    model.compile(keras.optimizers.SGD(0.0), "mse")

    def run() -> Any:
        return model.fit(x, x, epochs=2, batch_size=2, verbose=0, shuffle=False).history["loss"]

    if BACKEND == "jax":
        with pytest.raises(ValueError, match=r"count steps with attn_core.backends.keras.Steps"):
            run()
        return
    for step, loss in enumerate(run()):
        out = array(model.attend(tensor(x), seed=step, training=True))
        assert np.isclose(((out - x) ** 2).mean(), loss, rtol=1e-5)
