"""torch's own fused kernel, `scaled_dot_product_attention`, where it means what the spec means.

That is so where nothing acts on a logit but scale and a mask, and a mask it is given either as
nothing at all, as its own top-left causal where queries and keys are as many, or, on a CPU, as
slices of keys: for every tile of rows the live keys of the block map, with a selection over the
partial ones. Empty rows and poison are the spec's there, and cost what they touch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from attn_core.backends.torch import chunked, flops
from attn_core.backends.torch.arrays import tracing
from attn_core.spec import WIDTH, AttentionOutput, Operands, Problem
from attn_core.whole import beside, whole

_LEAST = 2.0**-126
"""The least scale of the kernel's own causal. It hides by -inf before it scales, which is NaN by a
scale of 0, or of what float32 may round to 0, and shows what is hidden by one below."""

_GROUPS = torch.__version__ >= (2, 9)
"""Whether the CPU kernel knows of grouped heads. Before 2.9 it reads as many heads of keys as of
queries, past the end of the array: too old for us (pyproject.toml), but nothing keeps it away."""

_DTYPES = {
    "cpu": ("float64", "float32", "bfloat16", "float16"),
    "cuda": ("bfloat16", "float16"),
}


def refusals(p: Problem) -> list[str]:
    if p.device not in _DTYPES:
        return [f"the device must be one of {', '.join(_DTYPES)}. Got {p.device}."]
    reasons = beside(p, "torch's fused attention")
    if p.dtype not in _DTYPES[p.device]:
        names = ", ".join(_DTYPES[p.device])
        reasons.append(f"the dtype must be one of {names} on {p.device}. Got {p.dtype}.")
    if p.device == "cpu" and p.group > 1 and not _GROUPS:
        reasons.append(
            f"key must have as many heads as query before torch 2.9. Got Hq = {p.heads} and "
            f"Hk = {p.kv_heads} in torch {torch.__version__}."
        )
    if p.device == "cpu" and p.return_lse and WIDTH[p.dtype] < 32:
        reasons.append(
            f"`return_lse` must be left out for {p.dtype}: the kernel has 14 bits of it. Got True."
        )
    if p.device != "cpu":
        if p.return_lse:
            reasons.append("`return_lse` must be left out on cuda. Got True.")
        if _kind(p) == "tiles":
            reasons.append(
                "on cuda the mask must allow everything, or be causal() with Tq = Tk and a scale "
                "above 0. Got another mask, or lengths, or a scale that is not."
            )
    reasons += chunked.transformed()
    unexported = chunked.exported()
    return reasons + unexported if unexported and _bound(p, _kind(p)) else reasons


def attend(p: Problem, x: Operands) -> AttentionOutput:
    kind = _kind(p)
    if _bound(p, kind):
        return chunked.attend(p, x, kind)
    q, k, v = _heads_first(p, x.query), _heads_first(p, x.key), _heads_first(p, x.value)
    causal = kind == "causal"
    # A symbol of torch.compile is no bool, but a branch on it is.
    options = {"enable_gqa": True} if p.group > 1 else {}
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=p.scale, **options)
    return AttentionOutput(out if p.layout == "BHTD" else out.transpose(1, 2))


def _bound(p: Problem, kind: str) -> bool:
    """Whether the kernels are called by the operators of `chunked`, which refuse derivatives of
    derivatives, and jvp, by name."""
    compiling = torch.compiler.is_compiling()
    # Of sizes that nobody knows yet, torch's own operator wants to hear that they are not 0.
    unknown = None in (p.batch, p.q_len, p.k_len)
    recorded = p.device == "cpu" and (_recorded(p, compiling) or _counted(compiling))
    return kind == "tiles" or p.return_lse or unknown or recorded


def _heads_first(p: Problem, x: Any) -> Any:
    """(B, H, T, D); with entries apart, torch would take its quadratic formula."""
    x = x if p.layout == "BHTD" else x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _recorded(p: Problem, compiling: bool) -> bool:
    """Whether derivatives may be asked for: torch's own trust one log-sum-exp however large."""
    if p.needs_grad or (not compiling and forward_ad._current_level >= 0):
        return True
    return not compiling and torch._C._are_functorch_transforms_active()


def _counted(compiling: bool) -> bool:
    """Whether flops are counted: of torch's own kernel on a CPU torch counts none."""
    return not compiling and flops.counted()


def _kind(p: Problem) -> str:
    """As `Ask.kernel`; torch.compile, which would trace it, looks through no mask."""
    kind = whole(p, look=not tracing()) or "tiles"
    return "tiles" if kind == "causal" and p.scale < _LEAST else kind
