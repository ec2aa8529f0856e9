"""The documents' `attention_module` of JAX against the judge of layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import module_cases
import numpy as np
import pytest
from flax import nnx
from module_cases import CASES, check, given_of

from attn_core.backends.jax import MultiHeadAttention, attention_module


def made(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def call(case: Any, given: Any = made, held: Any = None) -> Any:
    weights, inputs = given_of(case)
    held = {name: jnp.asarray(w) for name, w in weights.items()} if held is None else held
    options = {"parameters": held, "heads": case.config["heads"], **case.call}
    return attention_module(*map(given, inputs), mask=given(case.mask), **options)


@pytest.mark.parametrize("name", CASES)
def test_a_mapping(name: str) -> None:
    case = CASES[name]
    found = call(case)
    check(found, case, np.asarray)
    host = call(case, lambda x: x)
    assert all(isinstance(x, np.ndarray) for x in host)
    check(host, case, np.asarray)
    for other in module_cases.changed(case):
        assert abs(call(other).out - found.out).max() > 1e-3


def test_a_layer() -> None:
    """The layer's config says what a mapping is called with; both have the same gradients."""
    case = CASES["everything"]
    weights, inputs = given_of(case)
    config = {**case.config, "scale": case.call["scale"]}
    layer = MultiHeadAttention(**config, dropout=case.call["dropout_rate"])
    layer.load_weights(weights)
    given, more = [made(x) for x in inputs], {"mask": made(case.mask), "seed": case.call["seed"]}

    def run(layer: Any) -> Any:
        return attention_module(*given, **more, parameters=layer)

    check(run(layer), case, np.asarray)
    want = nnx.grad(lambda layer: (run(layer).out ** 2).sum())(layer)
    loss = jax.jit(jax.grad(lambda held: (call(case, held=held).out ** 2).sum()))
    for name, x in loss({name: jnp.asarray(w) for name, w in weights.items()}).items():
        part, kind = name.split(".")
        one = want[part][kind][...]
        assert np.allclose(x, one, rtol=1e-4, atol=1e-4 * abs(one).max())


@pytest.mark.parametrize("name", module_cases.REFUSED)
def test_refused(name: str) -> None:
    options, says = module_cases.refused(made, MultiHeadAttention(width=12, heads=4))[name]
    with pytest.raises((TypeError, ValueError), match=says):
        attention_module(**options)
