"""Our own kernels, in Triton: any mask and score of the language compiled in, forward and backward.

    out, m, log l = one kernel        dK and dV, dQ, dbias = one kernel each

They are bound as `chunked` is: the same operators, opaque to torch.compile, hand the work to
kernels instead of a loop in Python. Where B, Tq or Tk is 0 nothing is launched: the loop, which has
nothing to go over then but rows without keys, answers. This module loads no triton; `probe` says
whether it may be loaded and whether kernels run here.
"""

from __future__ import annotations

from attn_core.backends.torch import chunked, probe
from attn_core.spec import AttentionOutput, Operands, Problem

WIDEST = 256
"""Columns of query, key or value: a tile of more has no room in a multiprocessor."""

FEW = 16
"""Queries of a step of decoding at most: heads of a group are packed, and keys shared out."""

_DTYPES = ("float32", "bfloat16", "float16")


def refusals(p: Problem) -> list[str]:
    reasons = []
    wrong = probe.problem(p.device, p.place)
    if not wrong:
        # One of two, decided here: torch.compile wants numbers that it knows.
        wide = WIDEST if max(p.width, p.v_width) > WIDEST // 2 else WIDEST // 4
        wrong = probe.narrower(p.device, p.dtype, wide, p.place)
    if wrong:
        reasons.append(wrong)
    if p.dtype not in _DTYPES:
        reasons.append(f"the dtype must be one of {', '.join(_DTYPES)}. Got {p.dtype}.")
    if p.width > WIDEST or p.v_width > WIDEST:
        reasons.append(f"D and Dv must be at most {WIDEST}. Got {p.width} and {p.v_width}.")
    if p.return_weights:
        reasons.append("`return_weights` must be left out: kernels keep no weights. Got True.")
    return reasons + chunked.refusals(p)


def attend(p: Problem, x: Operands, falls: bool = False) -> AttentionOutput:
    """`falls` as in `chunked_parts.Ask`."""
    return chunked.attend(p, x, "triton", p.precision == "fast", falls)
