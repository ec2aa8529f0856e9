"""Calls of JAX's layers: other libraries' words, lists, padding beside classes, weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from call_cases import FAST, WORDS
from layer_cases import CASES, draw, inputs_of, weights_of
from model_cases import DECODER, ENCODER

from attn_core import masks
from attn_core.backends import jax as backend
from attn_core.backends.jax import AdditiveAttention, MultiHeadAttention, Transformer, linen
from attn_core.compat import from_hf_mask
from attn_core.conformance.tolerance import CAP

X = jnp.asarray(draw(2, 5, 12))
TOKENS = jnp.asarray([[1, 2, 3, 4, 0], [4, 3, 2, 0, 0]])
LAYER = MultiHeadAttention(width=12, heads=4)


@pytest.mark.parametrize("name", WORDS)
def test_other_libraries_words(name: str) -> None:
    with pytest.raises(TypeError, match=WORDS[name]):
        LAYER(*[X] * (name != "inputs_q"), **{name: X})


def test_other_libraries_words_to_other_layers() -> None:
    with pytest.raises(TypeError, match="`lengths=`, where padding stands at the end"):
        Transformer(ENCODER)(TOKENS, key_padding_mask=TOKENS == 0)
    with pytest.raises(TypeError, match="a call of AdditiveAttention must be in the words of"):
        AdditiveAttention(width=12)(X, X, attn_mask=None)
    module = linen.MultiHeadAttention({"width": 12, "heads": 4}, seed=1)
    variables = module.load_weights(LAYER.export_weights())
    with pytest.raises(TypeError, match=WORDS["inputs_q"]):
        module.apply(variables, inputs_q=X)
    assert module.apply(variables, X, deterministic=True).shape == X.shape


LISTS = {
    "a layer": lambda: LAYER(X.tolist()),
    "its key": lambda: LAYER(X, X.tolist()),
    "its memory": lambda: LAYER.memory(X.tolist()),
    "additive attention": lambda: AdditiveAttention(width=12)(X, X.tolist()),
    "a model": lambda: Transformer(DECODER)(TOKENS.tolist()),
    "its prompt": lambda: Transformer(DECODER).generate(TOKENS.tolist(), 2),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str) -> None:
    with pytest.raises(
        TypeError, match=r"must be an array. Got builtins.list: jnp.asarray\(\w+\) ma"
    ):
        LISTS[name]()


SEEN = from_hf_mask(TOKENS)
PADDING = {
    "dense": masks.dense(SEEN),
    "beside others": masks.causal() & masks.dense(SEEN),
    "lengths": masks.lengths(jnp.asarray([4, 3])),
}


def test_padding_beside_classes() -> None:
    model = Transformer({**ENCODER, "classes": 3})
    for mask in PADDING.values():
        with pytest.raises(ValueError, match="`lengths` must say which rows count"):
            model(TOKENS, mask=mask)
    assert model(TOKENS, mask=PADDING["dense"], lengths=jnp.asarray([4, 3])).shape == (2, 3)
    assert model(TOKENS, mask=masks.segments(TOKENS)).shape == (2, 3)


@pytest.mark.parametrize("name", FAST[1::3])
def test_weights_are_answered_fast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is no worse than chunked, and `out` stays what it was."""
    asked = []

    def watched(impl: str, handler: Any) -> Any:
        return lambda *args: asked.append(impl) or handler(*args)

    for impl, handler in list(backend._HANDLERS.items()):
        monkeypatch.setitem(backend._HANDLERS, impl, watched(impl, handler))
    case = CASES[name]
    layer = MultiHeadAttention(**case.config)
    (layer.train if case.training else layer.eval)()
    layer.load_weights(weights_of(layer.plan))
    call = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.call.items()}
    inputs = [jnp.asarray(x) for x in inputs_of(case)]
    alone, found = layer(*inputs, **call), layer(*inputs, **call, return_weights=True)
    assert len(asked) == 2
    assert set(asked) <= {"chunked", "native"}
    assert abs(alone - found.out).max() <= CAP["out"]["float32"] * abs(alone).max()


def test_weights_are_all_that_is_quadratic() -> None:
    """Beside them, what a call reserves grows with the length, not with its square."""
    layer = MultiHeadAttention(width=16, heads=2, causal=True)
    layer.eval()
    call = jax.jit(lambda x: layer(x, return_weights=True))
    beside = []
    for rows in (1024, 2048):
        compiled = call.lower(jnp.zeros((1, rows, 16))).compile()
        beside.append(compiled.memory_analysis().temp_size_in_bytes)
    assert beside[1] < 2.5 * beside[0]  # four times, if it were quadratic
    assert beside[1] < 2 * 2048 * 2048 * 4
