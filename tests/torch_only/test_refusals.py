"""What torch's layers and models refuse, and that nothing has happened then."""

from __future__ import annotations

import pytest
import torch

import attn_core
from attn_core.backends.torch import Transformer

ENCODER = {"kind": "encoder", "width": 8, "depth": 1, "heads": 2, "vocabulary": 11, "classes": 3}


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
