"""`jax.nn.dot_product_attention`, where it means what the spec means: XLA's, or cuDNN's on a GPU.

Whatever is masked it answers in its own way (an empty row averages all values), so it is asked for
whole problems only. XLA's form holds all logits: on a CPU `chunked` is several times as fast, and
"auto" goes there first.
"""

from __future__ import annotations

import jax

from attn_core.spec import AttentionOutput, Operands, Problem
from attn_core.whole import beside, whole

_NAME = "jax.nn.dot_product_attention"
_DTYPES = {"cpu": ("float32", "bfloat16"), "gpu": ("bfloat16", "float16")}
"""XLA's form computes float64 in float32, and takes no float16 on a CPU; cuDNN takes 16 bits."""


def refusals(p: Problem) -> list[str]:
    reasons = beside(p, _NAME)
    if p.return_lse:
        reasons.append(f"`return_lse` must be left out for {_NAME}. Got True.")
    if 0 not in (p.batch, p.q_len, p.k_len) and whole(p) is None:
        reasons.append(
            "the mask must allow everything, or be causal() with Tq = Tk, and no lengths. "
            "Got another mask, or lengths."
        )
    known = _DTYPES.get(p.device, ())
    if p.dtype not in known:
        names = ", ".join(known) or "no dtype"
        reasons.append(f"{_NAME} means what we mean in {names} on {p.device}. Got {p.dtype}.")
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
