"""The gradient of a bias: a tile of it along all that it is the same for.

Everybody is taken for partial: a bias may hide whom it likes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_core.kernels.statistics import of_rows, rows_of
from attn_core.kernels.tile import ahead_of, facts_of, taken
from attn_core.kernels.weights import PARTIAL, pull, weigh


@triton.jit
def d_bias(
    query, key, value, d_out, into, statistics, arrays, numbers, lengths, strides,
    into_strides,  # of the gradient, 0 where the bias does not span an axis
    length_strides, batch, heads, group, q_len, k_len, tall, wide,
    B: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,  # spanned axes
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SCORE: tl.constexpr,
    KV_LENGTHS: tl.constexpr, Q_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    EARLY: tl.constexpr, LOOKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a bias, float32: a program has a tile of it, and goes along the rest."""
    pid = tl.program_id(0)
    i0, j0, b0, h0 = 0, 0, 0, 0
    if KEYS:
        j0, pid = pid % wide, pid // wide
    if ROWS:
        i0, pid = pid % tall, pid // tall
    if H:
        h0, pid = pid % heads, pid // heads
    if B:
        b0 = pid
    acc = tl.zeros((M, N), tl.float32)
    for db in tl.range(0, 1 if B else batch):
        b = b0 + db
        facts = facts_of(b, lengths, length_strides, q_len, k_len, KV_LENGTHS, Q_LENGTHS)
        for dh in tl.range(0, 1 if H else heads):
            head = h0 + dh
            h = tl.zeros((1, 1), tl.int32) + head
            for di in tl.range(0, 1 if ROWS else tall):
                row = (i0 + di) * M + tl.arange(0, M)
                m = of_rows(statistics[0], b, head, (i0 + di) * M, heads, q_len, M)
                log2_l = of_rows(statistics[1], b, head, (i0 + di) * M, heads, q_len, M)
                t = of_rows(statistics[2], b, head, (i0 + di) * M, heads, q_len, M)
                q = rows_of(
                    query, statistics[1], strides[0], b, head, (i0 + di) * M, heads, q_len,
                    M, D, PAD, False, False,
                )  # fmt: skip
                do = rows_of(
                    d_out, statistics[1], strides[1], b, head, (i0 + di) * M, heads, q_len,
                    M, DV, PAD_V, False, False,
                )  # fmt: skip
                count = 1 if KEYS else wide
                if KEYS and q.dtype == tl.float32:
                    # Once; which the compiler must not know. Without a loop it reads whole rows
                    # ahead of these products, and has no registers for them. Of 16 bits it has.
                    count = tl.minimum(wide, 1)
                for dj in tl.range(0, count):
                    first = (j0 + dj) * N
                    k_at = first + tl.arange(0, N)
                    k = taken(
                        key, strides[2], b, head // group, first, k_len, N, D, PAD, False, False
                    )
                    v = taken(
                        value,
                        strides[3],
                        b,
                        head // group,
                        first,
                        k_len,
                        N,
                        DV,
                        PAD_V,
                        False,
                        False,
                    )
                    place = (b, h, row[:, None], k_at[None, :], first)
                    ahead = ahead_of(place, facts, arrays, True, M, N, MASK, True, EARLY, LOOKS)
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32)
                    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=tl.float32)
                    p, keep, allowed, found = weigh(
                        s, ahead, (m[:, None], log2_l[:, None], m[:, None]), place, facts, arrays,
                        numbers, True, M, N, MASK, SCORE, True, DROPOUT, EARLY, LOOKS, PARTIAL,
                        False, False,
                    )  # fmt: skip
                    dz, _ = pull(
                        p, keep, allowed, found, dp, t[:, None], numbers,
                        SCORE, True, DROPOUT, PARTIAL,
                    )  # fmt: skip
                    acc += dz
    row, k_at = i0 * M + tl.arange(0, M), j0 * N + tl.arange(0, N)
    inside = (row[:, None] < q_len) & (k_at[None, :] < k_len)
    if not ROWS:
        acc = tl.sum(acc, 0, keep_dims=True)
        inside = (k_at < k_len)[None, :]
        row = tl.zeros((1,), tl.int32)
    if not KEYS:
        acc = tl.sum(acc, 1, keep_dims=True)
        inside = (row < q_len)[:, None] if ROWS else tl.full((1, 1), 1, tl.int1)
        k_at = tl.zeros((1,), tl.int32)
    b0, h0 = tl.full((1, 1), b0, tl.int64), tl.full((1, 1), h0, tl.int64)
    at = into + b0 * into_strides[0] + h0 * into_strides[1]
    at += row[:, None].to(tl.int64) * into_strides[2] + k_at[None, :].to(tl.int64) * into_strides[3]
    tl.store(at, acc, mask=inside)
