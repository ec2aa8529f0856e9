"""Whole models of transformers in Keras, held to the plain float64 one; they do not run here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers_cases as cases
from keras_support import BACKEND, array, tensor, tensors
from transformers_cases import CONFIGS, LENGTHS, inside, padding, shares, tokens, types

from attn_core import compat
from attn_core.backends.keras import Transformer

# As for models: all of them on TensorFlow, whose models these are.
EACH = list(CONFIGS) if BACKEND == "tensorflow" else ["gpt2", "gemma2", "bert"]


def ours(name: str) -> Any:
    found = compat.from_transformers(CONFIGS[name], cases.weights(CONFIGS[name]))
    model = Transformer(found.config)
    model.load_weights(found.weights)
    return model


@pytest.mark.parametrize("name", EACH)
def test_outputs(name: str) -> None:
    model = ours(name)
    told = types(CONFIGS[name]) if name == "bert" else None
    more = {} if told is None else {"types": tensor(told)}
    for side in ("right", "left"):
        call = {"lengths": LENGTHS} if side == "right" else {}
        if side == "left":
            call = {"mask": compat.from_hf_mask(padding(side))}
        mine = array(model(tensor(tokens()), **tensors(call), **more))
        used = shares(
            *(CONFIGS[name], cases.weights(CONFIGS[name]), padding(side), {side: mine}, told)
        )
        assert inside(used), used


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_generation(name: str) -> None:
    prompt = tokens()[:, :4]
    want = cases.greedy(CONFIGS[name], cases.weights(CONFIGS[name]), prompt, 6)
    assert np.array_equal(array(ours(name).generate(tensor(prompt), 6)), want)
