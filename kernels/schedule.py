"""Schedules on the device: the live tiles of each row (or column) of tiles, full ones first.

    facts       lengths clamped to [0, T], and where queries begin, as the kernels read them
    reduced     the least and the greatest entry of a table in every grain of it
    schedule    one program to each row (or column) of tiles, along all of its tiles

A schedule (`attn_core.schedule`) that depends on arrays of the device is made there, in one launch
and without waiting for the host. The interval reading, as a device function (`reach.py`), says
which tiles are live and which are full. The program walks its tiles twice (once if it reads them
all together): it lists the full ones, then those that are live but not full, in ascending order.
"""

from __future__ import annotations

import triton
import triton.language as tl

AT_ONCE = 4096
"""Entries that a program reads together: tiles times the entries in the range of each."""

OF_TABLES = 1024
"""The same for `reduced`, where each entry has an address of its own."""


# The compiler is told nothing of sizes: it would gain nothing, and a cache that grows would wait
# for it whenever 16 divides another one of them.
@triton.jit(do_not_specialize=["count", "apart", "q_len", "k_len", "start"])
def facts(
    kv_lengths,  # integers, as they were given
    q_lengths,
    offsets,
    out,  # int32, three rows: lengths of keys and rows, offsets
    steps,  # from one batch to the next; 0 where one holds for all
    count,
    apart,  # from one row of out to the next
    q_len,
    k_len,
    start,  # where queries begin if no array says so
    FAR: tl.constexpr,  # beyond which no offset means anything
    KV_LENGTHS: tl.constexpr,
    Q_LENGTHS: tl.constexpr,
    OFFSETS: tl.constexpr,
    END: tl.constexpr,  # whether the last row seen stands at the last key seen
    COUNT: tl.constexpr,
):
    """Lengths within [0, T]; offsets that are given, or kv_length - q_length, or `start`."""
    b = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    there = b < count
    keys, rows = tl.zeros((COUNT,), tl.int64) + k_len, tl.zeros((COUNT,), tl.int64) + q_len
    first = tl.zeros((COUNT,), tl.int64) + start
    if KV_LENGTHS:
        found = tl.load(kv_lengths + b * steps[0], mask=there, other=0).to(tl.int64)
        keys = tl.minimum(tl.maximum(found, 0), keys)
    if Q_LENGTHS:
        found = tl.load(q_lengths + b * steps[1], mask=there, other=0).to(tl.int64)
        rows = tl.minimum(tl.maximum(found, 0), rows)
    if OFFSETS:
        found = tl.load(offsets + b * steps[2], mask=there, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(found, -FAR), FAR)
    if END:
        first = keys - rows
    tl.store(out + b, keys.to(tl.int32), mask=there)
    tl.store(out + apart + b, rows.to(tl.int32), mask=there)
    tl.store(out + 2 * apart + b, first.to(tl.int32), mask=there)


@triton.jit
def reduced(
    table,  # contiguous, taken as (outer, tall, middle, wide, inner)
    least,  # contiguous (outer, tall in grains, middle, wide in grains, inner)
    most,
    tall,
    middle,
    wide,
    inner,
    TALL: tl.constexpr,  # entries of a grain, powers of two
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,  # rows of a grain that are read together
):
    """The least and the greatest entry of each grain; a last one that is not whole counts too."""
    pid = tl.program_id(0).to(tl.int64)
    grains_tall, grains_wide = tl.cdiv(tall, TALL), tl.cdiv(wide, WIDE)
    i, rest = pid % inner, pid // inner
    x, rest = rest % grains_wide, rest // grains_wide
    m, rest = rest % middle, rest // middle
    y, o = rest % grains_tall, rest // grains_tall
    column = x * WIDE + tl.arange(0, WIDE)
    low = tl.full((WIDE,), 0, table.dtype.element_ty)
    high = low
    for first in tl.range(0, TALL, AT_ONCE):
        # What lies beyond the ends is the last entry again, which changes no extreme.
        row = tl.minimum(y * TALL + first + tl.arange(0, AT_ONCE), tall - 1)
        at = ((o * tall + row[:, None]) * middle + m) * wide
        at = (at + tl.minimum(column, wide - 1)[None, :]) * inner + i
        found = tl.load(table + at)
        down, up = tl.min(found, 0), tl.max(found, 0)
        low = tl.where(first == 0, down, tl.minimum(low, down)).to(low.dtype)
        high = tl.where(first == 0, up, tl.maximum(high, up)).to(high.dtype)
    tl.store(least + pid, tl.min(low, 0).to(low.dtype))
    tl.store(most + pid, tl.max(high, 0).to(high.dtype))


@triton.jit(
    do_not_specialize=["maps", "group", "lines", "width", "q_len", "k_len", "ends_q", "ends_k"]
)
def schedule(
    order,  # int32 (Bm, Hm, lines, width), and twice (Bm, Hm, lines)
    full,
    live,
    operands,  # of the mask, then what is reduced of them: pointers and sizes
    lengths,  # kv_lengths, q_lengths, offsets: int32
    length_strides,  # 0 or 1 for each
    maps,  # Hm
    group,  # heads that share a line
    lines,
    width,
    q_len,
    k_len,
    ends_q,  # 1 where the tiles in which rows end are partial, else 0; and keys
    ends_k,
    REACH: tl.constexpr,  # `reach.reach`
    M: tl.constexpr,  # rows and keys of a tile
    N: tl.constexpr,
    COUNT: tl.constexpr,  # tiles of a line that are read together
    ONCE: tl.constexpr,  # whether those are all of them
    COLUMNS: tl.constexpr,  # whether lines are columns of tiles
    KV_LENGTHS: tl.constexpr,
    Q_LENGTHS: tl.constexpr,
):
    """A line: numbers of its full tiles, then of those that are live and not full."""
    pid = tl.program_id(0)
    line, rest = pid % lines, pid // lines
    b, h = rest // maps, rest % maps
    one = tl.zeros((1,), tl.int32)
    kv_length, q_length = one + k_len, one + q_len
    if KV_LENGTHS:
        kv_length = one + tl.load(lengths[0] + b * length_strides[0])
    if Q_LENGTHS:
        q_length = one + tl.load(lengths[1] + b * length_strides[1])
    offset = one + tl.load(lengths[2] + b * length_strides[2])
    at = order + pid.to(tl.int64) * width
    facts = (offset, kv_length, q_length, q_len, k_len, ends_q, ends_k)
    if ONCE:
        tile = tl.arange(0, COUNT)
        some, every = status_of(
            tile, line, width, b, h, group, facts, operands,
            REACH, M, N, COLUMNS,
        )  # fmt: skip
        wholes = listed(at, 0, tile, every)
        count = listed(at, wholes, tile, some & ~every)
    else:
        chunks = tl.cdiv(width, COUNT)
        count, wholes = 0, 0
        for step in tl.range(0, 2 * chunks):
            second = step >= chunks
            tile = step % chunks * COUNT + tl.arange(0, COUNT)
            some, every = status_of(
                tile, line, width, b, h, group, facts, operands,
                REACH, M, N, COLUMNS,
            )  # fmt: skip
            count = listed(at, count, tile, tl.where(second, some & ~every, every))
            wholes = tl.where(second, wholes, count)
    tl.store(full + pid, wholes)
    tl.store(live + pid, count)


@triton.jit
def status_of(
    tile, line, width, b, h, group, facts, operands,
    REACH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(live, full) of these tiles of a line; of those beyond its end neither."""
    offset, kv_length, q_length, q_len, k_len, ends_q, ends_k = facts
    one = tl.zeros((1,), tl.int32)
    there = tile < width
    tile = tl.minimum(tile, width - 1)
    row, key = one + line, tile
    if COLUMNS:
        row, key = tile, one + line
    row_lo, key_lo = row * M, key * N
    row_hi, key_hi = tl.minimum(row_lo + M, q_len) - 1, tl.minimum(key_lo + N, k_len) - 1
    some, every = tile < 0, there
    for g in tl.range(0, group):
        possible, certain = REACH(
            one + b, one + h * group + g, row_lo, row_hi, key_lo, key_hi,
            offset, kv_length, q_length, operands,
        )  # fmt: skip
        some, every = some | possible, every & certain
    every = every & ((ends_q == 0) | (row_lo + M < q_len))
    every = every & ((ends_k == 0) | (key_lo + N < k_len))
    return some & there, every


@triton.jit
def listed(at, count, tile, chosen):
    """Writes the chosen tiles from place `count` on; the place behind them."""
    ones = chosen.to(tl.int32)
    tl.store(at + count + tl.cumsum(ones, 0) - 1, tile, mask=chosen)
    return count + tl.sum(ones, 0)
