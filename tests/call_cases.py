"""What calls of layers are refused for in every framework alike, and which are answered fast."""

from __future__ import annotations

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
