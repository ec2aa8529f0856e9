"""The documents' `attention_module` of Keras' backend, with Keras' layers too."""

from __future__ import annotations

from typing import Any

import module_cases
import numpy as np
import pytest
from keras_support import BACKEND, array, tensor
from module_cases import CASES, check, given_of

from attn_core.backends.keras import MultiHeadAttention
from attn_core.backends.keras.tensors import room

attention_module = room().attention_module
tf_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="the others' own tests ask it")


def call(case: Any, given: Any = tensor, held: Any = None) -> Any:
    weights, inputs = given_of(case)
    held = {name: tensor(w) for name, w in weights.items()} if held is None else held
    options = {"parameters": held, "heads": case.config["heads"], **case.call}
    return attention_module(*map(given, inputs), mask=given(case.mask), **options)


@tf_only
@pytest.mark.parametrize("name", CASES)
def test_a_mapping(name: str) -> None:
    case = CASES[name]
    found = call(case)
    check(found, case, array)
    host = call(case, lambda x: x)
    assert all(isinstance(x, np.ndarray) for x in host)
    check(host, case, np.asarray)
    for other in module_cases.changed(case):
        assert abs(array(call(other).out) - array(found.out)).max() > 1e-3


def test_a_layer() -> None:
    """Of Keras, on each of its backends."""
    case = CASES["two leading dimensions"]
    weights, inputs = given_of(case)
    layer = MultiHeadAttention(**case.config)
    layer.load_weights(weights)
    given = [tensor(x) for x in inputs]
    check(attention_module(*given, mask=tensor(case.mask), parameters=layer), case, array)
    # A value alone, which the layer itself refuses, since Keras' own takes it for the key.
    query, value = given[0], given[0] + 1.0
    alone = attention_module(query, value=value, parameters=layer)
    named = attention_module(query, query, value, parameters=layer)
    assert np.array_equal(array(alone.out), array(named.out))


@tf_only
def test_gradients_and_unknown_sizes() -> None:
    """Those of a layer, eager and in a tf.function that knows no size."""
    import tensorflow as tf

    case = CASES["self"]
    weights, (x,) = given_of(case)
    layer = MultiHeadAttention(**case.config)
    layer.load_weights(weights)
    held = {name: tf.Variable(w) for name, w in weights.items()}

    def run(x: Any, parameters: Any, **more: Any) -> Any:
        with tf.GradientTape() as tape:
            found = attention_module(x, parameters=parameters, **more)
            loss = tf.reduce_sum(found.out**2)
        to = list(held.values()) if more else [layer.get_parameter(n).value for n in held]
        return found, tape.gradient(loss, to)

    spec = tf.TensorSpec([None, None, 12])
    known = tf.function(lambda x: run(x, held, heads=4), input_signature=[spec])
    for found, slopes in (run(tf.constant(x), held, heads=4), known(tf.constant(x))):
        check(found, case, array)
        wanted = run(tf.constant(x), layer)[1]
        most = max(np.abs(other).max() for other in wanted)
        for one, other in zip(slopes, wanted, strict=True):
            assert np.allclose(one, other, rtol=1e-4, atol=1e-6 * most)


@tf_only
@pytest.mark.parametrize("name", module_cases.REFUSED)
def test_refused(name: str) -> None:
    options, says = module_cases.refused(tensor, MultiHeadAttention(width=12, heads=4))[name]
    with pytest.raises((TypeError, ValueError), match=says):
        attention_module(**options)
