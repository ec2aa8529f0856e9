"""The weights p of a tile, and their gradient: what the backward kernels have in common.

    p  = exp(s - m) / l                dz = p (dp' - t)     ds = dz (d score / d s)

The logits of a tile come in as plain products of query and key. A tile is one of three kinds:

    FULL       known to be full: no mask is evaluated
    PARTIAL    taken for partial, and everything selected by the mask: where it does not allow a
               pair, p, dz and ds are 0, whatever the operands hold
    EITHER     known only as the kernel runs. A pair that is not allowed has a logit of -inf and a p
               of 0, and nothing more is selected: where the gradient, or the row's statistics, are
               not finite, 0 times that is NaN, and the caller must begin AGAIN, by PARTIAL

EITHER gives nothing else: what PARTIAL makes of the tile AGAIN, bit for bit, or NaN.

    p  = exp2(s log2 e - base)         where base is a number (`statistics.py`): one FMA, of which
                                       the scale is a part if there is neither score nor bias
    p  = exp2(min(s - m, 0) log2 e - log2 l)
                                       where base is NaN, and in float32. Summed in another order
                                       than in forward, a logit of 1e9 may exceed its row's maximum
                                       by tens, and p must not exceed 1
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_core.kernels.statistics import base_of
from attn_core.kernels.tile import LOG2E, allowed_of, judged, kept_of

FULL, PARTIAL, EITHER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def weigh(
    s,  # (M, N): query times key, neither scaled nor scored; TURNED, as all here, (N, M)
    ahead,  # what `ahead_of` has read of the tile
    statistics,  # m, log2 l, base of each row, (M, 1); of EITHER base is read, of others m, log2 l
    place,  # b, h (1, 1), row (M, 1), k (1, N), the first key's position
    facts,  # offset, rows_seen, keys_seen, q_len, k_len
    arrays,  # mask operands, score operands, (bias,), its strides, (seed,)
    numbers,  # scale, threshold, keep_scale
    partial,  # of EITHER alone: whether it is
    M: tl.constexpr,
    N: tl.constexpr,
    MASK: tl.constexpr,
    SCORE: tl.constexpr,  # of a score, its derivative: value, slope, then sites
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    EARLY: tl.constexpr,
    LOOKS: tl.constexpr,
    KIND: tl.constexpr,  # FULL, PARTIAL or EITHER
    AGAIN: tl.constexpr,
    TURNED: tl.constexpr,
):
    """(p, what dropout keeps, where keys are seen, the derivative's results), (M, N).

    Of EITHER where keys are seen is left open.
    """
    TALL: tl.constexpr = N if TURNED else M
    WIDE: tl.constexpr = M if TURNED else N
    b, h, row, k, first = place
    scale, threshold, _ = numbers
    m, log2_l, base = statistics
    SELECTED: tl.constexpr = KIND == PARTIAL or (KIND == FULL and (BIAS or SCORE is not None))
    PLAIN: tl.constexpr = SCORE is None and not BIAS
    product, unit = s, LOG2E
    if PLAIN:
        unit = scale * LOG2E
    if KIND == EITHER and PLAIN:
        # Of the product: what -inf is after the scale, of which 0 makes it NaN.
        allowed, found = tl.full((TALL, WIDE), 1, tl.int1), (s,)
        if EARLY:
            # Below a negative scale it is inf, of which p is, and the caller begins again.
            product = tl.minimum(s, ahead[1])
        elif partial:
            here = allowed_of(b, h, row, k, facts[0], facts[1], facts[2], arrays[0], MASK)
            product = tl.where(here, s, tl.where(scale > 0, float("-inf"), float("inf")))
    elif KIND == EITHER:
        s = s * scale
        if partial:
            s, allowed, found = judged(
                s, ahead, place, facts, arrays, TALL, WIDE, MASK, SCORE, BIAS, EARLY, LOOKS, True
            )
            s = tl.where(allowed, s, float("-inf"))
        else:
            s, allowed, found = judged(
                s, ahead, place, facts, arrays, TALL, WIDE, MASK, SCORE, BIAS, EARLY, LOOKS, False
            )
            s = tl.where(allowed, s, float("-inf"))
    else:
        s = s * scale
        s, allowed, found = judged(
            s, ahead, place, facts, arrays, TALL, WIDE, MASK, SCORE, BIAS, EARLY, LOOKS,
            KIND == PARTIAL,
        )  # fmt: skip
    if not PLAIN:
        product = s
    if SELECTED:
        # Of a product that is -inf, too, where p is 0 as it is: without these words ptxas spills a
        # kilobyte of `d_query` (width 64, causal).
        allowed = allowed & (s != float("-inf"))
    if KIND == EITHER:
        p = tl.exp2(product * unit - base)
    elif AGAIN:
        base = base_of(m, log2_l)
        far = base != base
        if PLAIN:  # a scale near the greatest of float32 may make an infinite unit
            far = far | (tl.abs(tl.zeros((1, 1), tl.float32) + unit) == float("inf"))
        p = tl.exp2(tl.where(far, _log2(s, m, log2_l), product * unit - base))
    else:
        p = tl.exp2(_log2(s, m, log2_l))
    if SELECTED:
        p = tl.where(allowed, p, 0.0)
    keep = allowed
    if DROPOUT:
        q = tl.reshape(row + facts[0], (M,))
        heads = tl.zeros((M,), tl.int32) + tl.reshape(h, (1,))
        keep = kept_of(arrays[4][0], b, heads, q, first, threshold, M, N, TURNED)
    return p, keep, allowed, found


@triton.jit
def _log2(s, m, log2_l):
    """Of exp(s - m) / l, at most 1; NaN stays what it is."""
    gap = tl.minimum(s - m, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return gap * LOG2E - log2_l


@triton.jit
def pull(
    p, keep, allowed, found,  # as `weigh` says them
    dp,  # d_out times value
    t,  # of each row, (M, 1)
    numbers,
    SCORE: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """(dz, ds), (M, N)."""
    SELECTED: tl.constexpr = KIND == PARTIAL or (KIND == FULL and (BIAS or SCORE is not None))
    if DROPOUT:
        dp = tl.where(keep, dp * numbers[2], 0.0)
    dz = p * (dp - t)
    if SELECTED:
        dz = tl.where(allowed, dz, 0.0)
    ds = dz
    if SCORE is not None:
        ds = dz * found[1]
        if SELECTED:
            ds = tl.where(allowed, ds, 0.0)
    return dz, ds


@triton.jit
def seen_of(k, allowed, ROWS: tl.constexpr):
    """The keys of a tile (N, PAD), zeros those that no row sees; ROWS is the axis of the rows."""
    seen = tl.max(allowed.to(tl.int32), ROWS) > 0
    return tl.where(seen[:, None], k, 0.0).to(k.dtype)


@triton.jit
def finite(x):
    """Whether all of its entries are: neither infinite nor NaN."""
    return tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1) == 0
