"""Whole models of transformers in our terms: a TransformerConfig, and weights under our names.

    config, weights = from_transformers("config.json", "model.safetensors")
    model = attn_core.build(config, backend="jax")
    model.load_weights(weights)

No framework is needed to read one, and transformers itself is not either: a model is what its
config.json says and what its arrays are called; `families.py` says what each family is in our
words. Where ours has a bias and the original none, it is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attn_core.compat.families import FAMILIES
from attn_core.compat.original import UNLEARNT, Original
from attn_core.compat.weights import with_changes
from attn_core.config import nearest, read
from attn_core.model.parameters import parameters
from attn_core.model.transformer import TransformerConfig
from attn_core.model.weights import checked, read_arrays


class ConvertedModel(NamedTuple):
    """A model in our terms.

    Attributes:
        config: what the model computes.
        weights: name -> NumPy array, copies, for `load_weights` and `save_weights`.
    """

    config: TransformerConfig
    weights: dict[str, np.ndarray]


def from_transformers(config: Any, weights: Any, **changes: Any) -> ConvertedModel:
    """A model of transformers as (TransformerConfig, weights).

    Args:
        config: its config: the path of config.json, the mapping that it holds, or the object.
        weights: its state dict: names of transformers -> NumPy arrays, with the prefix of the base
            model ("model.", "transformer.", "bert.") or without; or the path of a safetensors file
            of them, or of the index of several, model.safetensors.index.json.
        changes: fields of our config that do not change what weights mean, such as dropout=0.0,
            impl="chunked" or backend="jax".

    Of GPT-2, Llama, Mistral and Gemma 2 the model with its head is meant, which gives logits; of
    BERT the encoder alone, which gives the last hidden state. Padding goes with the call: `lengths`
    where it stands at the end, else `mask=from_hf_mask(attention_mask)`.

    Raises:
        ValueError: another family; a field of its config that says what none of ours can; a change
            that gainsays it; a weight that is missing, of another shape, or read by nobody.
        TypeError: a weight is no NumPy array, or they do not share one dtype; a config that is
            none.
    """
    told = _told(config)
    family = told.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"`model_type` must be one of {', '.join(FAMILIES)}. "
            f"Got {family!r}.{nearest(family, tuple(FAMILIES))}"
        )
    prefix, convert = FAMILIES[family]
    if isinstance(weights, (str, PathLike)):
        weights = read_arrays(weights, UNLEARNT)
    original = Original(family, told, weights, prefix, "dropout" in changes)
    fields = convert(original)
    original.check_read()
    ours = with_changes(TransformerConfig, {"dtype": original.dtype, **fields}, changes)
    plan = parameters(ours)
    arrays = original.made
    for name, parameter in plan.items():
        if parameter.kind == "bias" and name not in arrays:
            arrays[name] = np.zeros(parameter.shape, original.kind)
    held = {name: np.array(x, order="C") for name, x in arrays.items()}
    return ConvertedModel(ours, checked(plan, held, dict.fromkeys(plan, ours.dtype)))


def _told(config: Any) -> Mapping[str, Any]:
    """What config.json holds."""
    if isinstance(config, Mapping):
        return config
    if isinstance(config, (str, PathLike)):
        return read(Path(config))
    if hasattr(config, "to_dict"):
        found: Mapping[str, Any] = config.to_dict()
        return found
    raise TypeError(
        "`config` must be the path of a config.json, the mapping that it holds, or a config of "
        f"transformers. Got {type(config).__name__}."
    )
