"""What calls of layers are refused for in every framework alike, and which are answered fast."""

from __future__ import annotations

from typing import Any

import pytest

WORDS = {
    "attn_mask": r"`mask=` where True = attend, the other way round .* `mask=~attn_mask`",
    "key_padding_mask": r"`kv_lengths=`.* `mask=~key_padding_mask\[:, None, None, :\]`.* True h",
    "is_causal": r"`causal=True` in the config, or `mask=attn_core.masks.causal\(\)`",
    "use_causal_mask": r"`causal=True` in the config, or `mask=attn_core.masks.causal\(\)`",
    "need_weights": "`return_weights=True`",
    "average_attn_weights": "their mean over axis 1",
    "return_attention_scores": "`return_weights=True`",
    "attention_mask": r"`mask=`, boolean, True = attend.* `mask=attention_mask\[:, None\]",
    "padding_mask": r"`kv_lengths=`.* `mask=padding_mask\[:, None, None, :\]`, True = attend",
    "inputs_q": "here: `query`",
    "inputs_kv": "here: `key`",
    "decode": r"`cache=layer.make_cache\(batch, length\)`",
    "deterministic": r"`.train\(\)` and `.eval\(\)`",
    "training": "Keras has `training=`",
    "rngs": "`seed=`, a number for each step",
    "past_key_values": r"`cache=layer.make_cache\(batch, length\)`",
    "kv_length": r"Got 'kv_length'\. Did you mean 'kv_lengths'\?",
}
"""Other libraries' words in a call -> what our message says."""

FAST = [
    *("self", "everything", "cross", "causal", "a mask array", "softcap", "alibi", "bias"),
    *("a mask of the language", "rotary", "dropout", "lengths", "grouped heads"),
]
"""Cases of `layer_cases` that are asked for their weights: none may be left to `reference`."""


def check_lengths_are_named(model: Any, pair: Any, read: Any) -> None:
    """Of a decoder and an encoder-decoder, both asked with tokens (2, 4)."""
    for wrong, error, words in (
        ([7, 3], ValueError, r"within \[0, 4\] for every row of the batch. Got 7"),
        ([-1, 3], ValueError, r"within \[0, 4\] for every row of the batch. Got -1"),
        (5, ValueError, r"within \[0, 4\]"),
        ([1, 2, 3], ValueError, r"an int or have shape \(B,\) = \(2,\). Got \(3,\)"),
        ([1.5, 2.0], TypeError, "integers. Got float64"),
    ):
        with pytest.raises(error, match=f"`lengths` must be {words}"):
            model(read, lengths=wrong)
        with pytest.raises(error, match=f"`lengths` must be {words}"):
            model(read, lengths=wrong, cache=model.make_cache(2, 9))
        with pytest.raises(error, match=f"`source_lengths` must be {words}"):
            pair(read, read, source_lengths=wrong)
        with pytest.raises(error, match=f"`source_lengths` must be {words}"):
            pair.make_cache(2, 9, source=read, source_lengths=wrong)


def check_a_prompt_is_named(model: Any, high: Any, floats: Any) -> None:
    """Of a decoder of 11 tokens: a prompt that holds 11, and one of floats (2, 3)."""
    with pytest.raises(ValueError, match=r"`prompt` must be within the vocabulary, .*Got 11"):
        model.generate(high, 2)
    with pytest.raises(ValueError, match=r"`prompt` must be int tokens .*Got \(2, 3\) of float32"):
        model.generate(floats, 2)
