"""What torch's layers and models refuse, and that nothing has happened then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from call_cases import check_a_prompt_is_named, check_lengths_are_named

import attn_core
from attn_core.backends.torch import MultiHeadAttention, Transformer
from attn_core.backends.torch.arrays import DTYPES

ENCODER = {"kind": "encoder", "width": 8, "depth": 1, "heads": 2, "vocabulary": 11, "classes": 3}
DECODER = {"kind": "decoder", "width": 8, "depth": 1, "heads": 2, "vocabulary": 11}
PAIR = {**DECODER, "kind": "encoder-decoder"}
PROMPT = [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_part_that_was_replaced_is_named_before_anything_is_set() -> None:
    weights = Transformer(ENCODER, seed=5).export_weights()
    for part, words in (
        (torch.nn.Linear(8, 20), r"`head.weight` must be .*\(8, 3\).*Got \(8, 20\)"),
        (torch.nn.Linear(8, 3, bias=False), r"`head.bias` must be a parameter.*Got none"),
    ):
        model = Transformer(ENCODER, seed=1)
        model.head = part
        before = [x.detach().clone() for x in model.parameters()]
        with pytest.raises(ValueError, match=words):
            model.load_weights(weights)
        assert all(map(torch.equal, before, model.parameters()))


def test_no_weights_are_loaded_onto_meta() -> None:
    weights = Transformer(ENCODER, seed=5).export_weights()
    model = attn_core.build(ENCODER, backend="torch", device="meta")
    with pytest.raises(ValueError, match="must be on a device that holds values"):
        model.load_weights(weights)


def test_generate_refuses_lengths_out_of_reach() -> None:
    model, pair, prompt = Transformer(DECODER), Transformer(PAIR), torch.tensor(PROMPT)
    for name, least, wrong in [
        ("lengths", 1, ([5, 2], [-1, 2], [0, 2], np.array([1, 9]), torch.tensor([9, 2]), 0)),
        ("source_lengths", 0, ([9, 1], [-1, 1], torch.tensor([5, 1]), 5)),
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
            model(torch.tensor(tokens), cache=model.make_cache(batch, 4))


def test_positions_beyond_int32_are_refused() -> None:
    layer = MultiHeadAttention(width=8, heads=2, positions="rotary")
    x = torch.tensor(np.ones((1, 3, 8), "float32"))
    least = layer(x, positions=[-(2**31), 0, 2**31 - 1]).detach()
    assert least.isfinite().all()
    for wrong in (
        [0, 1, 2**31],
        np.arange(3) + 2**33,
        np.arange(3) - 2**33,
        torch.arange(3) + 2**33,
    ):
        with pytest.raises(ValueError, match="`positions` must be within int32"):
            layer(x, positions=wrong)


def test_lengths_that_cannot_be_read_answer_from_their_own_row() -> None:
    """Within vmap nobody reads numbers: what lies beyond the prompt is held at its end."""
    model, prompt = Transformer(DECODER), torch.tensor(PROMPT)
    model.eval()
    own = model.generate(prompt, 1, lengths=[4, 1])
    found = torch.func.vmap(lambda n: model.generate(prompt, 1, lengths=n), randomness="error")(
        torch.tensor([[9, 0]])
    )
    assert torch.equal(found[0, :1], own[:1])


def test_what_is_no_tensor_or_of_another_dtype_is_named() -> None:
    layer, model = MultiHeadAttention(width=8, heads=2), Transformer(DECODER)
    x, tokens = torch.ones(1, 3, 8), torch.tensor([[1, 2]])
    for call, words in (
        (lambda: layer(x.numpy()), "`query` must be a torch.Tensor. Got numpy.ndarray"),
        (lambda: layer(x, x.tolist()), "`key` must be a torch.Tensor. Got builtins.list"),
        (lambda: model(tokens.numpy()), "`given` must be a torch.Tensor. Got numpy.ndarray"),
        (lambda: model.generate([[1, 2]], 2), "`prompt` must be a torch.Tensor. Got builtins.list"),
        (lambda: layer(x.double()), "`query` must be of the layer's dtype, float32. Got float64"),
        (lambda: layer(x, x.half()), "`key` must be of the layer's dtype, float32. Got float16"),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).isfinite().all()
    for narrow in (torch.uint8, torch.int16):
        with pytest.raises(ValueError, match=r"`given` must be int tokens .* int32 or int64. Got"):
            model(tokens.to(narrow))


def test_a_cache_has_no_negative_size() -> None:
    for batch, length in ((2, -1), (-1, 2)):
        with pytest.raises(ValueError, match=r"must be at least 0. Got -1"):
            MultiHeadAttention(width=8, heads=2).make_cache(batch, length)
    with pytest.raises(ValueError, match="`length` must be at least 0"):
        Transformer(DECODER).make_cache(2, -1)


@pytest.mark.parametrize("stop", [[1, 2], 1.5, 99])
def test_a_stop_is_one_token(stop: object) -> None:
    model = Transformer(kind="decoder", width=8, depth=1, heads=2, vocabulary=11)
    with pytest.raises((TypeError, ValueError), match="`stop` must be"):
        model.generate(torch.ones(2, 3, dtype=torch.int64), 2, stop=stop)


@pytest.mark.parametrize("token", [-1, 11])
def test_a_token_beyond_the_vocabulary_is_named(token: int) -> None:
    model = Transformer(kind="encoder-decoder", width=8, depth=1, heads=2, vocabulary=11)
    good, bad = torch.tensor([[1, 10]]), torch.tensor([[1, token]])
    words = "must be within the vocabulary, from 0 to 10. Got "
    with pytest.raises(ValueError, match=f"`given` {words}{token}"):
        model(bad, good)
    with pytest.raises(ValueError, match=f"`source` {words}{token}"):
        model.generate(good, 2, source=bad)
    typed = Transformer({**ENCODER, "token_types": 2})
    with pytest.raises(ValueError, match="`types` must be within `token_types`, from 0 to 1"):
        typed(good, types=bad)
    assert model(good, good).isfinite().all()


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
        torch.int8,
        torch.float8_e4m3fn,
        torch.ones(2),
    ],
)
def test_a_cache_holds_floats(dtype: Any) -> None:
    words = "`dtype` must be one of float64, float32, bfloat16, float16. Got"
    for layer in (MultiHeadAttention(width=8, heads=2), Transformer(DECODER)):
        with pytest.raises(ValueError, match=words):
            layer.make_cache(2, 4, dtype=dtype)


def test_a_cache_of_every_float() -> None:
    layer = MultiHeadAttention(width=8, heads=2)
    for word, dtype in DTYPES.items():
        for given in (word, dtype):
            assert layer.make_cache(2, 4, dtype=given).key.dtype == dtype


def test_lengths_are_named_as_they_were_given() -> None:
    check_lengths_are_named(Transformer(DECODER), Transformer(PAIR), torch.tensor(PROMPT))


def test_a_prompt_is_named_as_it_was_given() -> None:
    check_a_prompt_is_named(Transformer(DECODER), torch.tensor([[1, 11]]), torch.ones(2, 3))


def test_a_part_that_was_changed_is_named_as_it_is_exported() -> None:
    normed = MultiHeadAttention(width=8, heads=2)
    torch.nn.utils.parametrizations.weight_norm(normed.query)
    whole = MultiHeadAttention(width=8, heads=2)
    whole.out = torch.nn.Linear(8, 9)
    for layer, words in (
        (normed, r"`query.weight` must be a parameter of shape \(8, 8\).* Got none"),
        (whole, r"`out.weight` must be a parameter of shape \(8, 8\).* Got \(8, 9\)"),
    ):
        with pytest.raises(ValueError, match=words):
            layer.export_weights()
