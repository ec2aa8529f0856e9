"""An attention function for transformers: `attn_implementation="attn_core"`, once registered.

    from attn_core.compat.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="attn_core")

transformers' conventions, where they differ from ours, and how each is kept:

| transformers | here |
|---|---|
| query (B, H, T, D) goes in, (B, T, H, D) comes out, and the weights or None | so |
| the mask is boolean, True = attend, or a float one that is added | `mask`, `bias` |
| no mask and a causal module: causal from the first key; a single query sees all | so |
| `sliding_window` is the total width, the position itself included | `window(left=W - 1)` |
| `softcap` before the mask; `s_aux`, a logit for each head; `position_bias` is added | so |
| `dropout` only while the module is in training | a seed from torch's generator |
| padding that hides nothing gives no mask, which takes a look at its values | never looked at |
| other masks are arrays (B, 1, Tq, Tk) | rules of our language: compat_transformers_masks.py |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import output_capturing

from attn_core import masks, scores
from attn_core.api import attention
from attn_core.backends.torch.compat import drawn_seed
from attn_core.backends.torch.compat_transformers_masks import Rule, attention_mask
from attn_core.compat.conventions import from_hf_window
from attn_core.language.values import Dropout, Mask
from attn_core.registry import UnsupportedError
from attn_core.spec import as_output

NAME = "attn_core"

# What would change the answer and is not taken: better an error than another answer.
_REFUSED = ("head_mask", "relative_position_bias", "layer_head_mask", "cache")


def register(name: str = NAME, *, return_weights: bool = False) -> str:
    """Make `attn_implementation=name` known to transformers, and its masks.

    Args:
        name: under which it is known; "eager", "sdpa" and others are transformers' own.
        return_weights: always return the weights, (B, Hq, Tq, Tk) for each layer. Without it they
            are returned where the call says `output_attentions=True`.

    Returns:
        `name`. Registering twice changes nothing.
    """
    known = AttentionInterface().get(name)
    theirs = known is not None and getattr(known, "func", known) is not attention_forward
    if not isinstance(name, str) or name == "eager" or "|" in name or theirs:
        raise ValueError(
            f"`name` must be a name that transformers does not use itself. Got {name!r}."
        )
    function = partial(attention_forward, return_weights=True) if return_weights else None
    AttentionInterface.register(name, function or attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
    return name


def attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Any | None = None,
    position_bias: Any | None = None,
    return_weights: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """The function that transformers calls for each layer.

        query (B, Hq, Tq, D), key (B, Hk, Tk, D), value (B, Hk, Tk, Dv)
        -> out (B, Tq, Hq, Dv), weights (B, Hq, Tq, Tk) or None

    Args:
        module: the attention layer: its `is_causal` where the argument is None, its `training`.
        attention_mask: what `attention_mask` of compat_transformers_masks made; or the caller's
            own, boolean or float, broadcasting to (B, Hq, Tq, Tk).
        scaling: 1 / sqrt(D) where None.
        dropout: the share of weights that is dropped in training.
        softcap, s_aux, position_bias: tanh cap, sinks (Hq,), bias that is added.
        sliding_window: read where there is no mask; a mask holds it already.
        kwargs: `output_attentions` asks for weights; a paged cache or a head mask is refused;
            everything else concerns other implementations.

    A row that may see no key gives 0: of a sequence that is padded on the left, the padding's own
    rows. transformers' eager form gives a mean of values there.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"`{name}` must be None under attn_implementation={NAME!r}. "
                f"Got {type(kwargs[name]).__name__}; use transformers' own for it."
            )
    options: dict[str, Any] = {"scale": scaling}
    rows, keys = query.shape[2], key.shape[2]
    if isinstance(attention_mask, Rule):
        options.update(mask=attention_mask.rule, query_offset=attention_mask.offset)
    elif attention_mask is not None:
        options["mask" if attention_mask.dtype == torch.bool else "bias"] = attention_mask
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and rows > 1:
            seen: Mask = masks.causal()
            if sliding_window is not None:
                seen = seen & from_hf_window(sliding_window)
            options.update(mask=seen, query_offset="start")
        elif causal and sliding_window is not None and keys > sliding_window:
            options.update(mask=from_hf_window(sliding_window), query_offset="end")
    if position_bias is not None:
        bias = options.get("bias")
        options["bias"] = position_bias if bias is None else position_bias + bias
    if softcap is not None:
        options["score"] = scores.softcap(softcap)
    if s_aux is not None:
        options["sinks"] = s_aux
    if dropout and getattr(module, "training", False):
        options["dropout"] = Dropout(dropout, drawn_seed(query.device))
    wanted = return_weights or bool(kwargs.get("output_attentions")) or _recorded()
    output = as_output(attention(query, key, value, return_weights=wanted, **options))
    return output.out.transpose(1, 2).contiguous(), output.weights


def _recorded() -> bool:
    """Whether transformers is recording the attention of this call.

    Some models take `output_attentions` from the arguments before their layers see it (GPT-2);
    what they record is then known only here.
    """
    if torch.compiler.is_compiling():
        return False
    collector: Any = getattr(output_capturing, "_active_collector", None)
    collected: Callable[[], Any] | None = getattr(collector, "get", None)
    names = (collected() if collected is not None else None) or {}
    return any("attentions" in name for name in names)
