"""`jax.nn.dot_product_attention`, where it means what the spec means: XLA's, or cuDNN's on a GPU.

Whatever is masked it answers in its own way (an empty row averages all values), so it is asked for
whole problems only. XLA's form holds all logits: on a CPU `chunked` is several times as fast, and
"auto" goes there first.
"""

from __future__ import annotations

import jax

from attn_core.spec import AttentionOutput, Operands, Problem
from attn_core.whole import whole

_DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16", "float16")}
"""XLA's form computes float64 in float32, and takes no float16 on a CPU; cuDNN takes 16 bits."""


def refusals(p: Problem) -> list[str]:
    reasons = [
        f"`{name}` must be left out for jax.nn.dot_product_attention. Got one."
        for name, given in (
            ("score", p.score),
            ("bias", p.bias),
            ("sinks", p.sinks_dtype),
            ("dropout", p.rate),
            ("return_weights", p.return_weights),
            ("return_lse", p.return_lse),
        )
        if given
    ]
    if p.width != p.v_width:
        reasons.append(
            "value must be as wide as query and key for jax.nn.dot_product_attention. "
            f"Got D = {p.width} and Dv = {p.v_width}."
        )
    if 0 in (p.batch, p.q_len, p.k_len):
        reasons.append(f"B, Tq and Tk must be at least 1. Got {p.batch}, {p.q_len}, {p.k_len}.")
    elif whole(p) is None:
        reasons.append(
            "the mask must allow everything, or be causal() with Tq = Tk, and no lengths. "
            "Got another mask, or lengths."
        )
    known = _DTYPES.get(p.device, ())
    if p.dtype not in known:
        names = ", ".join(known) or "no dtype"
        reasons.append(
            f"jax.nn.dot_product_attention means what we mean in {names} on {p.device}. "
            f"Got {p.dtype}."
        )
    return reasons


def attend(p: Problem, x: Operands) -> AttentionOutput:
    q, k, v = (a if p.layout == "BTHD" else a.swapaxes(1, 2) for a in x[:3])
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=p.scale,
        is_causal=whole(p) == "causal",
        implementation="cudnn" if p.device == "gpu" else "xla",
    )
    return AttentionOutput(out if p.layout == "BTHD" else out.swapaxes(1, 2))
