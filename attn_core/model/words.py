"""Words with which other libraries' layers are called, and ours for them.

A call that names an argument of torch.nn, Keras, Flax or transformers is refused in words that say
what it is called here, with the polarity where that differs. Nothing is translated silently: the
same word means opposite things in two libraries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from attn_core.words import refuse

_TORCH_MASK = (
    "`mask=` where True = attend, the other way round than in torch.nn, where True hides: "
    "`mask=~{name}`; a float mask is `bias=`. attn_core.compat.from_torch_mha_mask turns both"
)
_TORCH_PADDING = (
    "`{lengths}=`, where padding stands at the end, else `mask=~{name}[:, None, None, :]`: in "
    "torch.nn True hides, here True = attend"
)
_CAUSAL = "`causal=True` in the config, or `mask=attn_core.masks.causal()` in the call"
_WEIGHTS = "`return_weights=True`, which gives LayerOutput(out, weights, cache), weights by head"
_TRAINING = (
    "the layer's own state: `.train()` and `.eval()`, of torch and flax.nnx alike; Keras has "
    "`training=`, and flax.linen `deterministic=`"
)
_CACHE = "`cache=layer.make_cache(batch, length)`, and in each later call the cache returned"
_SEED = "`seed=`, a number for each step of training"
_FOREIGN: dict[str, str] = {
    # torch.nn.MultiheadAttention, torch.nn.Transformer and its layers
    **dict.fromkeys(("attn_mask", "src_mask", "tgt_mask", "memory_mask"), _TORCH_MASK),
    **dict.fromkeys(
        ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask"), _TORCH_PADDING
    ),
    **dict.fromkeys(("is_causal", "tgt_is_causal", "use_causal_mask"), _CAUSAL),
    **dict.fromkeys(("need_weights", "return_attention_scores", "output_attentions"), _WEIGHTS),
    "sow_weights": _WEIGHTS,
    "average_attn_weights": "`return_weights=True`, whose weights are by head: their mean over "
    "axis 1 is torch's average",
    # keras.layers.MultiHeadAttention, and Keras' names of masks
    "attention_mask": "`mask=`, boolean, True = attend as in Keras, with an axis for the heads: "
    "`mask=attention_mask[:, None]`; of transformers' (B, Tk), 1 = a token, "
    "`mask=attn_core.compat.from_hf_mask(attention_mask)`",
    "padding_mask": "`{lengths}=`, where padding stands at the end, else "
    "`mask=padding_mask[:, None, None, :]`, True = attend as in Keras",
    "flash_attention": "`impl=` in the config: a named implementation runs or raises",
    "training": _TRAINING,
    # flax.linen and flax.nnx
    "deterministic": _TRAINING,
    "inputs_q": "`query`",
    "inputs_k": "`key`",
    "inputs_v": "`value`",
    "inputs_kv": "`key`, whose values are its own where `value` is left out",
    "decode": _CACHE,
    **dict.fromkeys(("rngs", "dropout_rng", "generator"), _SEED),
    # transformers
    "hidden_states": "`query`",
    "position_ids": "`positions=`, of a layer with rotary positions",
    **dict.fromkeys(("past_key_value", "past_key_values", "layer_past", "use_cache"), _CACHE),
    "input_ids": "the first argument, `given`",
    "token_type_ids": "`types=`",
}


def check_words(layer: str, known: tuple[str, ...], given: Iterable[str]) -> None:
    """Arguments of a call are those of this layer.

    Raises:
        TypeError: one is not, with ours for it where another library calls it so.
    """
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    lengths = "kv_lengths" if "kv_lengths" in known else "lengths"
    words = {name: ours.replace("{lengths}", lengths) for name, ours in _FOREIGN.items()}
    refuse(layer, known, unknown, words)


def arguments(call: Callable[..., Any]) -> tuple[str, ...]:
    """The names by which a method takes arguments, but for `self`."""
    found = inspect.signature(call).parameters.values()
    return tuple([x.name for x in found if x.kind in (x.KEYWORD_ONLY, x.POSITIONAL_OR_KEYWORD)])[1:]


def in_our_words(call: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's method, which says of what it does not take how that is called here."""
    known = arguments(call)

    @wraps(call)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        check_words(type(self).__name__, known, options)
        return call(self, *args, **options)

    return checked
