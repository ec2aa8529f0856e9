"""What the backward kernels read of rows: their statistics, and tiles of the rows themselves.

    m          the row maximum of the logits, as forward left it
    log2 l     of the row's sum; +inf where a row may see no key
    t          rowsum(dO * O) - d lse
    base       m log2 e + log2 l: p = exp2(s log2 e - base); NaN where that is FAR from 0

They are stored in lines, one to each head, padded to a multiple of LINE rows: a tile never crosses
the end of a line, so that loads need no bounds check and are as wide as a GPU allows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_core.kernels.tile import LOG2E, taken

LINE = tl.constexpr(256)
"""A head's statistics stand in lines of a multiple of this: the most rows that a tile may have."""

FAR = tl.constexpr(512.0)
"""At this base its rounding, 2^-24 of it, is a sixteenth of what float16 rounds p by."""


@triton.jit
def delta(
    out, d_out, d_lse, alive, m, log_l,
    statistics,  # m, log2 l, t, base: (B, Hq, lines)
    o_strides, g_strides, heads, q_len,
    DV: tl.constexpr, PAD_V: tl.constexpr, M: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """What the other kernels want to know of every row, float32: m; log2 l, +inf where a row may
    see no key, though a sink may have given it a sum; t = rowsum(dO * O) - d lse; and base.

    Behind the last row, to the end of the line, stand rows that see no key.
    """
    pid, tiles = tl.program_id(0), tl.cdiv(q_len, LINE) * (LINE // M)
    tile, bh = pid % tiles, (pid // tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = tile * M + tl.arange(0, M)
    there, at = row < q_len, bh * q_len + row
    o = taken(out, o_strides, b, h, tile * M, q_len, M, DV, PAD_V, False, False).to(tl.float32)
    g = taken(d_out, g_strides, b, h, tile * M, q_len, M, DV, PAD_V, False, False).to(tl.float32)
    live = tl.load(alive + at, mask=there, other=0) != 0
    found = tl.sum(tl.where(live[:, None], o * g, 0.0), 1)
    summed = tl.load(log_l + at, mask=there, other=float("inf"))
    if LSE:
        # Padded rows, and those without keys and sink, hand nothing on.
        handed = tl.load(d_lse + at, mask=there, other=0.0)
        found -= tl.where(summed != float("inf"), handed, 0.0)
    into = bh * (tl.cdiv(q_len, LINE) * LINE) + row
    top = tl.load(m + at, mask=there, other=0.0)
    log2_l = tl.where(live, summed * LOG2E, float("inf"))
    tl.store(statistics[0] + into, top)
    tl.store(statistics[1] + into, log2_l)
    tl.store(statistics[2] + into, found)
    tl.store(statistics[3] + into, base_of(top, log2_l))


@triton.jit
def base_of(m, log2_l):
    """m log2 e + log2 l, or NaN; +inf of a row that sees no key."""
    base = tl.fma(m, LOG2E, log2_l)
    return tl.where((tl.abs(base) < FAR) | (log2_l == float("inf")), base, float("nan"))


@triton.jit
def of_rows(x, b, h, first, heads, q_len, M: tl.constexpr):
    """One of the statistics, (M,); lines of them are so long that no tile goes beyond one."""
    line = tl.cdiv(q_len, LINE) * LINE
    row = first + tl.arange(0, M)
    return tl.load((x + (b.to(tl.int64) * heads + h) * line) + row)


@triton.jit
def rows_of(
    x, log2_l, strides, b, h, first, heads, q_len,
    M: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    RAW: tl.constexpr,  # whether they come as they are, though they may see no key
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of q or dO; rows that are not there are 0, and those that see no key."""
    if RAW and DESCRIPTORS:
        wanted = None  # what lies behind the last row they read as zeros by themselves
    elif RAW:
        wanted = first + tl.arange(0, M) < q_len  # which waits for nothing that is loaded
    else:
        wanted = of_rows(log2_l, b, h, first, heads, q_len, M) != float("inf")
    return taken(x, strides, b, h, first, q_len, M, D, PAD, False, DESCRIPTORS, wanted)
