"""Masks of every shape for the documents' `scaled_dot_product_attention`, and what float64 says.

Framework-free. The judge knows nothing of how leading dimensions are folded: it takes one matrix
after the other, with the mask written out for it.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_core import masks, reference, scores

TQ, TK, D, DV = 5, 7, 4, 3
LEADS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3), (2, 1), (2, 2, 3), (2, 1, 3))
KINDS = ("boolean", "float")
UNKNOWN: tuple[tuple[int, ...], ...] = (
    *((5, 1), (5, 7), (3, 1, 7), (3, 5, 7)),
    *((2, 1, 1, 7), (1, 1, 5, 7), (1, 3, 1, 7), (2, 3, 5, 7)),
)
"""Of masks beside arrays whose leading dimensions are (2, 3)."""

REACHES: tuple[tuple[Any, ...], ...] = (
    ((), (TK,), (1, 1, 1, TK)),
    ((), (TQ, TK), (1, 1, TQ, TK)),
    ((3,), (TQ, TK), (1, 1, TQ, TK)),
    ((3,), (3, 1, TK), (3, 1, 1, TK)),
    ((2, 3), (), (1, 1, 1, 1)),
    ((2, 3), (TQ, 1), (1, 1, TQ, 1)),
    ((2, 3), (3, 1, TK), (1, 3, 1, TK)),
    ((2, 3), (2, 1, 1, TK), (2, 1, 1, TK)),
    ((2, 3), (1, 1, TQ, TK), (1, 1, TQ, TK)),
    ((2, 2, 3), (2, 1, 1, TK), (4, 1, 1, TK)),
    ((2, 2, 3), (2, 1, 1, 1, TK), (4, 1, 1, TK)),
    ((2, 2, 3), (1, 1, 3, 1, TK), (1, 3, 1, TK)),
    ((2, 2, 3), (1, 1, 1, TQ, TK), (1, 1, TQ, TK)),
    # No heads, or none that `attention` could count, are as many batches.
    ((2, 0), (2, 1, 1, TK), (0, 1, 1, TK)),
    ((2, 0), (1, 1, TQ, TK), (1, 1, TQ, TK)),
)
"""Leading dimensions, a mask, and what `attention` is given for it: nothing is written out."""

MODULE_REACHES: tuple[tuple[Any, ...], ...] = (
    ((), (TQ,), (1, 1, 1, TQ)),
    ((), (4, 1, TQ), (1, 4, 1, TQ)),
    ((3,), (TQ, TQ), (1, 1, TQ, TQ)),
    ((3,), (1, 4, TQ, TQ), (1, 4, TQ, TQ)),
    ((3,), (3, 1, 1, TQ), (3, 1, 1, TQ)),
    ((2, 3), (1, 1, 1, TQ, TQ), (1, 1, TQ, TQ)),
    ((2, 3), (2, 1, 1, 1, TQ), (6, 1, 1, TQ)),
)
"""The same of `attention_module`, of 4 heads."""


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def given(lead: tuple[int, ...]) -> list[np.ndarray]:
    widths = ((TQ, D), (TK, D), (TK, DV))
    return [draw(*lead, *last, seed=n) for n, last in enumerate(widths)]


def mask_of(shape: tuple[int, ...], kind: str) -> np.ndarray:
    drawn = np.asarray(draw(*shape, seed=9))
    return drawn if kind == "float" else drawn > -0.5


def shapes(lead: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every shape that broadcasts to (.., Tq, Tk)."""
    full = (*lead, TQ, TK)
    found = set()
    for rank in range(len(full) + 1):
        last = full[len(full) - rank :]
        for spans in itertools.product((False, True), repeat=rank):
            found.add(tuple([n if wide else 1 for n, wide in zip(last, spans, strict=True)]))
    return sorted(found, key=lambda shape: (len(shape), shape))


def judged(x: list[np.ndarray], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out, and the gradient of the sum of its squares for a float mask, by the formula."""
    q, k, v = [np.asarray(one, np.float64) for one in x]
    lead = q.shape[:-2]
    out = np.zeros((*lead, q.shape[-2], v.shape[-1]))
    slope = np.zeros((*lead, q.shape[-2], k.shape[-2]))
    whole = np.broadcast_to(mask, slope.shape)
    for at in np.ndindex(*lead):
        s = q[at] @ k[at].T / math.sqrt(q.shape[-1])
        s = np.where(whole[at], s, -np.inf) if whole.dtype == bool else s + whole[at]
        for row in range(len(s)):
            if np.isneginf(s[row]).all():
                continue
            p = np.exp(s[row] - s[row].max())
            p /= p.sum()
            out[*at, row] = p @ v[at]
            back = v[at] @ (2 * out[*at, row])
            slope[*at, row] = p * (back - p @ back)
    missing = slope.ndim - mask.ndim
    slope = slope.sum(tuple(range(missing)))
    wide = tuple([axis for axis, n in enumerate(mask.shape) if n == 1])
    return out, slope.sum(wide, keepdims=True)


def dropped(x: list[np.ndarray], rate: float, seed: int) -> np.ndarray:
    """By the judge: the last of two or more leading dimensions are heads, the others batches."""
    lead = x[0].shape[:-2]
    heads = lead[-1] if len(lead) > 1 else 1
    folded = [one.reshape(-1, heads, *one.shape[-2:]) for one in x]
    out = reference.attention(*folded, dropout=(rate, seed)).out
    return np.asarray(out).reshape(*lead, *out.shape[-2:])


def refused(call: Callable[..., Any], make: Callable[[Any], Any]) -> dict[str, tuple[Any, str]]:
    """Name -> a call of `scaled_dot_product_attention` that is refused, and what is said."""
    q, few, one = [
        make(np.zeros(shape, np.float32)) for shape in ((2, 8, 5, 4), (2, 2, 5, 4), (2, 5))
    ]
    three, some = make(np.zeros((2, 5, 4), np.float32)), make(np.zeros((2, 5), bool))
    array = "TypeError: `mask` must be an array, boolean .* floating point .*"
    word = "TypeError: a call of scaled_dot_product_attention must be in the words of attn_core.* "
    broadcast = r"ValueError: `mask` must broadcast to \(..., Tq, Tk\) = "
    given = {
        "a Mask": (
            masks.causal(),
            array + r"Got Mask; it is for attn_core\.attention, over \(B, H",
        ),
        "a Score": (scores.softcap(3.0), array + r"Got Score; it is for attn_core\.attention"),
        "a function": (
            lambda b, h, q, k: q >= k,
            array + r"Got function; .* attn_core\.mask\(fn\)",
        ),
        "a word": ("causal", array + "Got str"),
        "a thing": (object(), array + "Got object"),
        "keys that count": (
            some,
            broadcast
            + r"\(2, 8, 5, 5\)\. Got \(2, 5\): write `\[:, None, None, :\]` after it if it "
            r"says which keys count, \(B, Tk\)\.",
        ),
        "added to keys": (
            one,
            broadcast + r".* Got \(2, 5\): write `\[:, None, None, :\]` after it",
        ),
        "the batch first": (
            make(np.zeros((2, 5, 5), bool)),
            broadcast
            + r".* Got \(2, 5, 5\): write `\[:, None\]` after it if its first axis is the",
        ),
        "no hint": (make(np.zeros((3, 5), bool)), broadcast + r".* Got \(3, 5\)\.$"),
    }
    found = {name: (lambda m=mask: call(q, q, q, m), says) for name, (mask, says) in given.items()}
    found["keys that count, no heads"] = (
        lambda: call(three, three, three, some),
        broadcast + r"\(2, 5, 5\)\. Got \(2, 5\): write `\[:, None, :\]` after it",
    )
    found["fewer heads of keys"] = (
        lambda: call(q, few, few),
        r"ValueError: `k` .* leading dim.* of `q`, \(2, 8\)\. Got \(2, 2\); attn_core\.attention",
    )
    found["query="] = (lambda: call(query=q, key=q, value=q), word + "Got `query`, .*: `q`")
    found["a slip"] = (
        lambda: call(q, q, q, sclae=1.0),
        r"TypeError: .* arguments of its own only\. Got 'sclae'\. Did you mean 'scale'\?",
    )
    for name, says in {
        "is_causal": r"in attn_core\.attention, `mask=attn_core\.masks\.causal\(\)`.* a triangle",
        "attn_mask": "`mask=`, where True = attend and a float mask is added",
        "dropout_p": "`dropout_rate=` with `seed=`",
        "enable_gqa": r"attn_core\.attention",
        "window_size": r"in attn_core\.attention, `mask=attn_core\.masks\.window",
        "kv_lengths": r"`kv_lengths=` of attn_core\.attention",
    }.items():
        found[f"{name}="] = (
            lambda name=name: call(q, q, q, **{name: True}),
            word + f"Got `{name}`, which is here: {says}",
        )
    return found


def check_refused(call: Callable[..., Any], make: Callable[[Any], Any]) -> None:
    """Each in our words, and with the signature that the documents' function has."""
    for name, (made, says) in refused(call, make).items():
        try:
            made()
        except (TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            assert re.match(says, said), (name, said)
        else:
            raise AssertionError(f"{name} is not refused")
    kinds = [(one.name, one.kind.name) for one in inspect.signature(call).parameters.values()]
    assert kinds == [
        *((name, "POSITIONAL_OR_KEYWORD") for name in ("q", "k", "v", "mask", "dropout_rate")),
        *((name, "KEYWORD_ONLY") for name in ("scale", "seed")),
    ]
