"""Calls of torch's layers: other libraries' words, lists, padding beside classes, weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from call_cases import FAST, WORDS
from layer_cases import CASES, draw, inputs_of, weights_of
from model_cases import DECODER, ENCODER
from torch_memory import peak

from attn_core import masks
from attn_core.backends import torch as backend
from attn_core.backends.torch import AdditiveAttention, MultiHeadAttention, Transformer
from attn_core.compat import from_hf_mask
from attn_core.conformance.tolerance import CAP

X = torch.as_tensor(draw(2, 5, 12))
TOKENS = torch.as_tensor([[1, 2, 3, 4, 0], [4, 3, 2, 0, 0]])


@pytest.mark.parametrize("name", WORDS)
def test_other_libraries_words(name: str) -> None:
    layer = MultiHeadAttention(width=12, heads=4)
    with pytest.raises(TypeError, match=WORDS[name]):
        layer(*[X] * (name != "inputs_q"), **{name: X})


def test_other_libraries_words_to_other_layers() -> None:
    with pytest.raises(TypeError, match="`lengths=`, where padding stands at the end"):
        Transformer(ENCODER)(TOKENS, key_padding_mask=TOKENS == 0)
    with pytest.raises(TypeError, match="a call of AdditiveAttention must be in the words of"):
        AdditiveAttention(width=12)(X, X, attn_mask=None)


LISTS = {
    "a layer": lambda: MultiHeadAttention(width=12, heads=4)(X.tolist()),
    "its key": lambda: MultiHeadAttention(width=12, heads=4)(X, X.tolist()),
    "its memory": lambda: MultiHeadAttention(width=12, heads=4).memory(X.tolist()),
    "additive attention": lambda: AdditiveAttention(width=12)(X, X.tolist()),
    "a model": lambda: Transformer(DECODER)(TOKENS.tolist()),
    "its prompt": lambda: Transformer(DECODER).generate(TOKENS.tolist(), 2),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str) -> None:
    with pytest.raises(TypeError, match=r"must be a torch.Tensor. Got builtins.list: torch.as_ten"):
        LISTS[name]()


def test_additive_attention_says_which_dtype() -> None:
    layer = AdditiveAttention(width=12)
    for given in ((X.double(), X), (X, X.double())):
        with pytest.raises(TypeError, match=r"of the layer's dtype, float32\. Got float64"):
            layer(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(X, X).isfinite().all()


SEEN = from_hf_mask(TOKENS)
PADDING = {
    "dense": masks.dense(SEEN),
    "dense, one row": masks.dense(SEEN[0, 0]),
    "beside others": masks.causal() & masks.dense(SEEN),
    "lengths": masks.lengths(torch.as_tensor([4, 3])),
}


@pytest.mark.parametrize("name", PADDING)
def test_padding_beside_classes(name: str) -> None:
    model = Transformer({**ENCODER, "classes": 3})
    with pytest.raises(ValueError, match="`lengths` must say which rows count"):
        model(TOKENS, mask=PADDING[name])
    assert model(TOKENS, mask=PADDING[name], lengths=[4, 3]).shape == (2, 3)


def test_masks_beside_classes_that_are_no_padding() -> None:
    model = Transformer({**ENCODER, "classes": 3})
    by_row = masks.dense(SEEN.expand(2, 1, 5, 5))
    for mask in (masks.causal(), masks.segments(TOKENS), by_row, masks.global_tokens(1)):
        assert model(TOKENS, mask=mask).shape == (2, 3)


@pytest.mark.parametrize("name", FAST)
def test_weights_are_answered_fast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is no worse than chunked, and `out` stays what it was."""
    asked = []

    def watched(impl: str, handler: Any) -> Any:
        return lambda *args: asked.append(impl) or handler(*args)

    for impl, handler in list(backend._HANDLERS.items()):
        monkeypatch.setitem(backend._HANDLERS, impl, watched(impl, handler))
    case = CASES[name]
    layer = MultiHeadAttention(**case.config).train(case.training)
    layer.load_weights(weights_of(layer.plan))
    call = {n: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for n, x in case.call.items()}
    inputs = [torch.as_tensor(x) for x in inputs_of(case)]
    alone, found = layer(*inputs, **call), layer(*inputs, **call, return_weights=True)
    assert len(asked) == 2
    assert set(asked) <= {"chunked", "native", "triton"}
    gap = (alone - found.out).abs().max() / alone.abs().max()
    assert gap <= CAP["out"]["float32"]


def test_weights_are_all_that_is_quadratic() -> None:
    """Beside them, what a call holds grows with the length, not with its square."""
    layer = MultiHeadAttention(width=16, heads=2, causal=True).eval()
    beside = []
    for rows in (512, 1024, 2048):
        x = torch.as_tensor(draw(1, rows, 16))
        with torch.no_grad():
            most = peak(lambda x=x: layer(x, return_weights=True))
        beside.append(most - 2 * rows * rows * 4)
        assert most > 2 * rows * rows * 4
    assert beside[2] < 2.5 * beside[1]  # four times, if it were quadratic
    assert beside[1] < 2.5 * beside[0]
    assert beside[2] < 2048 * 2048  # an eighth of what the weights of one head are, and less
