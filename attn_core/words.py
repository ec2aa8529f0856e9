"""Words with which other libraries' functions are called, and ours for them.

A call of `attention`, `weights` or `explain` that names an option of another library is refused in
words that say how it is called here. Nothing is translated silently: the same word means opposite
things in two libraries. `attn_core.model.words` does the same for layers, `in_documents_words` for
the documents' functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn, TypeVar, cast

from attn_core.config import nearest

_CAUSAL = (
    '`mask=attn_core.masks.causal()`; where Tq and Tk differ, with `query_offset="start"` (torch, '
    'jax.nn, Keras) or `"end"` (FlashAttention)'
)
_DROPOUT = "`dropout=attn_core.Dropout(rate, seed)`, with a new seed for each step of training"
_WINDOW = "`mask=attn_core.masks.window(left, right)`, with None for FlashAttention's -1"
_SOFTCAP = "`score=attn_core.scores.softcap({name})`"
_PACKED = "`mask=attn_core.masks.segments(ids)`, where ids say which sequence each token belongs to"
_WEIGHTS = "`return_weights=True`, which gives AttentionOutput(out, lse, weights)"
_LSE = "`return_lse=True`, which gives AttentionOutput(out, lse, weights)"
_FOREIGN: dict[str, str] = {
    **dict.fromkeys(("is_causal", "causal", "use_causal_mask"), _CAUSAL),
    "attn_mask": "`mask=` where it is boolean, True = attend (of nn.MultiheadAttention, where True "
    "hides, `mask=~attn_mask`), and `bias=` where it is added to the scores",
    "attention_mask": "`mask=`, boolean, True = attend; of a tokenizer's (B, Tk), 1 = a token, "
    "`mask=attn_core.compat.from_hf_mask(attention_mask)`, or `kv_lengths=attention_mask.sum(1)` "
    "where padding stands at the end",
    "key_padding_mask": "`kv_lengths=`, where padding stands at the end, else "
    "`mask=~key_padding_mask[:, None, None, :]`: in torch.nn True hides, here True = attend",
    "attn_bias": "`bias=`",
    **dict.fromkeys(("dropout_p", "dropout_rate", "dropout_rng", "seed"), _DROPOUT),
    "training": "nothing: leave `dropout=` out in evaluation",
    "enable_gqa": "nothing: key and value may simply have fewer heads",
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "`scale=`"),
    **dict.fromkeys(("window_size", "local_window_size"), _WINDOW),
    "sliding_window": "`mask=attn_core.masks.causal() & "
    "attn_core.masks.window(left=sliding_window - 1)`",
    **dict.fromkeys(("softcap", "logits_soft_cap", "attn_logits_soft_cap"), _SOFTCAP),
    "alibi_slopes": "`score=attn_core.scores.alibi(alibi_slopes)`",
    "score_mod": "`score=attn_core.score(fn)` of a function fn(s, b, h, q, k)",
    **dict.fromkeys(
        ("mask_mod", "block_mask"),
        "`mask=attn_core.mask(fn)` of the function fn(b, h, q, k) itself: which tiles it leaves is "
        "found from it",
    ),
    **dict.fromkeys(("s_aux", "sink", "learnable_sink"), "`sinks=`, one number for each head"),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "segment_ids"), _PACKED),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), f"nothing; {_PACKED}"),
    "cache_seqlens": "`kv_lengths=`, in which tokens of this call count too",
    "key_value_seq_lengths": "`kv_lengths=`",
    "query_seq_lengths": "`q_lengths=`",
    **dict.fromkeys(
        ("need_weights", "return_attn_probs", "return_attention_scores", "output_attentions"),
        _WEIGHTS,
    ),
    **dict.fromkeys(("return_residual", "return_softmax_lse"), _LSE),
    **dict.fromkeys(("implementation", "flash_attention"), "`impl=`"),
    "backend": "the flag, `with attn_core.use(backend=..):`, and for NumPy arrays only: those of a "
    "framework are computed in it",
}

_ARRAY = "`mask=` takes a triangle as an array, True = attend"
_BOTH: dict[str, str] = {
    "attention_mask": "`mask=`, boolean, True = attend; of a tokenizer's (B, Tk), 1 = a token, "
    "`mask=attention_mask[:, None, None, :] != 0`",
    "key_padding_mask": "`mask=~key_padding_mask[:, None, None, :]`: in torch.nn True hides, here "
    "True = attend",
    **dict.fromkeys(("bias", "attn_bias"), "`mask=`, which is added where it is a float one"),
    **dict.fromkeys(
        ("dropout", "dropout_p", "dropout_rng"),
        "`dropout_rate=` with `seed=`, a new one for each step of training",
    ),
    "training": "nothing: leave `dropout_rate=` out in evaluation",
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "`scale=`"),
}
_DOCUMENTS: dict[str, dict[str, str]] = {
    "scaled_dot_product_attention": {
        **_BOTH,
        **dict.fromkeys(
            ("is_causal", "causal", "use_causal_mask"),
            f"in attn_core.attention, {_CAUSAL}; here {_ARRAY}",
        ),
        "attn_mask": "`mask=`, where True = attend and a float mask is added to the scores, as in "
        "torch.nn.functional",
        "enable_gqa": "attn_core.attention, which takes fewer heads of keys and values as they are",
        **{name: f"`{name[0]}`" for name in ("query", "key", "value")},
    },
    "attention_module": {
        **_BOTH,
        **dict.fromkeys(
            ("is_causal", "causal", "use_causal_mask"),
            f"`causal=True` in the config of a layer; else {_ARRAY}",
        ),
        "attn_mask": "`mask=`, True = attend: in torch.nn True hides, and `mask=~attn_mask`; a "
        "float mask is added to the scores",
        **dict.fromkeys(("num_heads", "nhead", "n_heads"), "`heads=`"),
        **dict.fromkeys(
            ("need_weights", "return_weights", "return_attention_scores", "output_attentions"),
            "nothing: it always returns ModuleOutput(out, weights)",
        ),
        **{name[0]: f"`{name}`" for name in ("query", "key", "value")},
    },
}
_ATTENTION = (
    *("score", "sinks", "kv_lengths", "q_lengths", "query_offset", "layout", "precision", "impl"),
    *("return_lse", "return_weights"),
)
"""Options of `attention` that the documents' functions do not have."""


def refuse(
    call: str, known: Iterable[str], given: Iterable[str], foreign: Mapping[str, str]
) -> NoReturn:
    """Say of the first argument that a call does not take what it is called here.

    Raises:
        TypeError: always; with ours for it where another library calls it so.
    """
    name = next(iter(given))
    if name not in foreign:
        raise TypeError(
            f"a call of {call} must have arguments of its own only. Got {name!r}."
            f"{nearest(name, tuple(known))}"
        )
    raise TypeError(
        f"a call of {call} must be in the words of attn_core. Got `{name}`, which is here: "
        f"{foreign[name].format(name=name)}."
    )


def refuse_words(call: Callable[..., Any], given: Iterable[str]) -> NoReturn:
    """The same of a public function and what it does not take by name."""
    taken = inspect.signature(call).parameters.values()
    known = [one.name for one in taken if one.kind is not one.VAR_KEYWORD]
    refuse(f"attn_core.{call.__name__}", known, given, _FOREIGN)


_Call = TypeVar("_Call", bound=Callable[..., Any])


def in_documents_words(call: _Call) -> _Call:
    """One of the documents' functions, which says the same of what it does not take by name.

    Its signature stays that of the documents.
    """
    name = call.__name__
    known = tuple(inspect.signature(call).parameters)
    more = {word: f"in attn_core.attention, {ours}" for word, ours in _FOREIGN.items()}
    more |= {word: f"`{word}=` of attn_core.attention" for word in _ATTENTION}
    words = more | _DOCUMENTS[name]

    @wraps(call)
    def checked(*args: Any, **options: Any) -> Any:
        unknown = [word for word in options if word not in known]
        if unknown:
            refuse(name, known, unknown, words)
        return call(*args, **options)

    return cast(_Call, checked)
