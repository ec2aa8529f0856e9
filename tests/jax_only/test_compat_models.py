"""Whole models of transformers in JAX, held to the plain float64 one; torch is not needed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers_cases as cases
from flax import nnx
from transformers_cases import CONFIGS, LENGTHS, inside, padding, shares, tokens, types

import attn_core
from attn_core import compat


def ours(name: str) -> Any:
    found = compat.from_transformers(CONFIGS[name], cases.weights(CONFIGS[name]), backend="jax")
    model = attn_core.build(found.config)
    model.load_weights(found.weights)
    model.eval()
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs(name: str) -> None:
    model, run = ours(name), nnx.jit(lambda model, given, call: model(given, **call))
    assert type(model).__module__ == "attn_core.backends.jax.models"
    told = types(CONFIGS[name]) if name == "bert" else None
    more = {} if told is None else {"types": jnp.asarray(told)}
    for side in ("right", "left"):
        call = {"lengths": LENGTHS} if side == "right" else {}
        if side == "left":
            call = {"mask": compat.from_hf_mask(padding(side))}
        call = {n: jnp.asarray(x) for n, x in call.items()}
        mine = run(model, jnp.asarray(tokens()), {**call, **more})
        used = shares(
            *(CONFIGS[name], cases.weights(CONFIGS[name]), padding(side), {side: mine}, told)
        )
        assert inside(used), used


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_generation(name: str) -> None:
    prompt = tokens()[:, :4]
    want = cases.greedy(CONFIGS[name], cases.weights(CONFIGS[name]), prompt, 6)
    assert np.array_equal(ours(name).generate(jnp.asarray(prompt), 6), want)
