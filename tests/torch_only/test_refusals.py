"""What torch's layers and models refuse, and that nothing has happened then."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attn_core
from attn_core.backends.torch import MultiHeadAttention, Transformer

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
