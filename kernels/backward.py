"""The backward kernels: each tile is computed again from the statistics (m, log l) of its rows.

    p  = exp(s - m) / l                dV = p'^T dO         p' = p, dropped and rescaled as it was
    dp = dO V^T                        dz = p (dp' - t)     t = rowsum(dO * O) - d lse
    dQ = scale ds K                    dK = scale ds^T Q    ds = dz (d score / d s)

Every gradient has a kernel that goes along whatever it is a sum over, so that each number is added
up by one program in one order: no atomics, and a run like any other.

    d_keys      a tile of keys along its live tiles of rows, for every head of its group
    d_query     a tile of rows along its live tiles of keys
    d_bias      a tile of the bias along the batches, heads, rows or keys that it is the same for

What that costs is two products more, so that `d_keys` can do the work of `d_query` too (FUSED): it
has ds at hand, and adds every tile's share of dQ by atomics, in float32 and in an order that no two
runs share. `d_tables`, the gradients of arrays that a score looks up, where a place may be found
from anywhere, adds so wherever it is called.

Rows that may see no key come in as zeros, whatever stands there, and so does what flows into them.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

from attn_core.kernels.tile import LOG2E, add, facts_of, judged, kept_of, line_of, put, taken


@triton.jit
def weigh(
    s,  # (M, N): query times key, neither scaled nor scored; TURNED, as all here, (N, M)
    m,  # of each row, (M, 1)
    log2_l,
    place,  # b, h (1, 1), row (M, 1), k (1, N), the first key's position
    facts,  # offset, rows_seen, keys_seen, q_len, k_len
    arrays,  # mask operands, score operands, (bias,), its strides, (seed,)
    numbers,  # scale, threshold, keep_scale
    M: tl.constexpr,
    N: tl.constexpr,
    MASK: tl.constexpr,
    SCORE: tl.constexpr,  # of a score, its derivative: value, slope, then sites
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASKED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """(p, what dropout keeps, where keys are seen, the derivative's results), (M, N)."""
    TALL: tl.constexpr = N if TURNED else M
    WIDE: tl.constexpr = M if TURNED else N
    b, h, row, k, first = place
    scale, threshold, _ = numbers
    SELECTED: tl.constexpr = MASKED or BIAS or SCORE is not None
    s = s * scale
    found = (s,)
    allowed = tl.full((TALL, WIDE), 1, tl.int1)
    if SELECTED:
        s, allowed, found = judged(
            s, (b, h, row, k), facts, arrays, TALL, WIDE, MASK, SCORE, BIAS, MASKED
        )
        # Of a product that is -inf, too, where p is 0 as it is: without these words ptxas spills a
        # kilobyte of `d_query` (width 64, causal).
        allowed = allowed & (s != float("-inf"))
    # Added up in another order than forward, a logit of 1e9 may exceed its row's maximum by tens,
    # and p must not exceed 1. NaN stays what it is.
    gap = tl.minimum(s - m, 0.0, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(gap * LOG2E - log2_l)
    if SELECTED:
        p = tl.where(allowed, p, 0.0)
    keep = allowed
    if DROPOUT:
        q = tl.reshape(row + facts[0], (M,))
        heads = tl.zeros((M,), tl.int32) + tl.reshape(h, (1,))
        keep = kept_of(arrays[4][0], b, heads, q, first, threshold, M, N)
        if TURNED:
            keep = tl.trans(keep)
    return p, keep, allowed, found


@triton.jit
def pull(
    p, keep, allowed, found,  # as `weigh` says them
    dp,  # d_out times value
    t,  # of each row, (M, 1)
    numbers,
    SCORE: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(dz, ds), (M, N)."""
    SELECTED: tl.constexpr = MASKED or BIAS or SCORE is not None
    if DROPOUT:
        dp = tl.where(keep, dp * numbers[2], 0.0)
    dz = p * (dp - t)
    if SELECTED:
        dz = tl.where(allowed, dz, 0.0)
    ds = dz
    if SCORE is not None:
        ds = tl.where(allowed, dz * found[1], 0.0)
    return dz, ds


@triton.jit
def _rows_of(
    query, d_out, log2_l, strides, b, h, first, heads, q_len, M: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    SEEING: tl.constexpr,  # whether every row that is there sees a key
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(q, dO) of a tile of rows; those that may see no key are 0."""
    if SEEING and DESCRIPTORS:
        wanted = None  # what lies behind the last row they read as zeros by themselves
    elif SEEING:
        wanted = first + tl.arange(0, M) < q_len  # which waits for nothing that is loaded
    else:
        wanted = _of_rows(log2_l, b, h, first, heads, q_len, float("inf"), M) != float("inf")
    q = taken(query, strides[0], b, h, first, q_len, M, D, PAD, False, DESCRIPTORS, wanted)
    g = taken(d_out, strides[1], b, h, first, q_len, M, DV, PAD_V, False, DESCRIPTORS, wanted)
    return q, g


@triton.jit
def _of_rows(x, b, h, first, heads, q_len, other, M: tl.constexpr):
    """One of the statistics, (M,); `other` behind the last row."""
    row = first + tl.arange(0, M)
    at = (b.to(tl.int64) * heads + h) * q_len + row
    return tl.load(x + at, mask=row < q_len, other=other)


@triton.jit
def seen_of(k, allowed, ROWS: tl.constexpr):
    """The keys of a tile (N, PAD), zeros those that no row sees; ROWS is the axis of the rows."""
    seen = tl.max(allowed.to(tl.int32), ROWS) > 0
    return tl.where(seen[:, None], k, 0.0).to(k.dtype)


@triton.jit
def delta(
    out, d_out, d_lse, alive, log_l, t, log2_l, o_strides, g_strides, heads, q_len, tiles,
    DV: tl.constexpr, PAD_V: tl.constexpr, M: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """t = rowsum(dO * O) - d lse of every row, float32 (B, Hq, Tq); and log2 l, as kernels want it:
    +inf where a row may see no key, though a sink may have given it a sum."""
    pid = tl.program_id(0)
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
    tl.store(t + at, found, mask=there)
    tl.store(log2_l + at, tl.where(live, summed * LOG2E, float("inf")), mask=there)


@triton.jit
def d_keys(
    query, key, value, d_out, d_key, d_value,
    d_query,  # where FUSED, float32 zeros (B, Hq, Tq, D) that dQ is added to; else nothing
    statistics,  # m, log2 l, t: (B, Hq, Tq); of rows that may see no key log2 l is +inf
    arrays,  # mask operands, score operands, (bias,), its strides, (seed,)
    numbers,  # scale, threshold, keep_scale
    lengths,  # kv_lengths, q_lengths, offsets
    schedule,  # order, full, live: of the columns of tiles
    strides,  # of query, d_out, key, value, d_key, d_value; of d_query where FUSED
    tables,  # where FUSED, as of d_query
    length_strides, map_strides, heads, group, q_len, k_len, tiles, width,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr,
    KV_LENGTHS: tl.constexpr, Q_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    SITES: tl.constexpr,  # what `sites_of` says; none but where FUSED
    KEY: tl.constexpr, VALUE: tl.constexpr,  # which of dK and dV it makes
    FUSED: tl.constexpr,  # whether it does what `d_query` does, too; it then makes both
    RUN: tl.constexpr,  # whether full tiles are neighbours, so that they need not be looked up
    DESCRIPTORS: tl.constexpr,  # whether query, d_out, key, value, d_query are tensor descriptors
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, or one of them; where FUSED its share of dQ, too, and of the
    gradients of a score's arrays."""
    pid = tl.program_id(0)
    tile, rest = pid % tiles, pid // tiles
    kv_heads = heads // group
    b, kv_head = rest // kv_heads, rest % kv_heads
    k_at = tile * N + tl.arange(0, N)
    k = taken(key, strides[2], b, kv_head, tile * N, k_len, N, D, PAD, False, DESCRIPTORS)
    if KEY:
        v = taken(value, strides[3], b, kv_head, tile * N, k_len, N, DV, PAD_V, False, DESCRIPTORS)
    facts = facts_of(b, lengths, length_strides, q_len, k_len, KV_LENGTHS, Q_LENGTHS)
    order, stop_full, stop = line_of(schedule, map_strides, b, kv_head, tile, width)
    start = tl.load(order)
    if KEY:
        dk = tl.zeros((N, PAD), tl.float32)
    if VALUE:
        dv = tl.zeros((N, PAD_V), tl.float32)
    for MASKED in tl.static_range(2):
        begin, end = 0, stop_full
        if MASKED:
            begin, end = stop_full, stop
        # One loop for all heads of the group: two, one in the other, would fill their pipeline anew
        # for each head, and have the sums in registers while they do.
        for n in tl.range(0, (end - begin) * group):
            i = begin + n // group
            head = kv_head * group + n % group
            h = tl.zeros((1, 1), tl.int32) + head
            j = start + i
            if MASKED or not RUN:
                j = tl.load(order + i)
            row = j * M + tl.arange(0, M)
            q, do = _rows_of(
                query, d_out, statistics[1], strides, b, head, j * M, heads, q_len,
                M, D, DV, PAD, PAD_V, MASKED == 0 and SCORE is None and not BIAS, DESCRIPTORS,
            )  # fmt: skip
            # Turned over, so that p and ds are first operands as they come out of products. What is
            # known of rows is then spread over all threads, and read no sooner than it is needed.
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=tl.float32)
            m = _of_rows(statistics[0], b, head, j * M, heads, q_len, 0.0, M)
            log2_l = _of_rows(statistics[1], b, head, j * M, heads, q_len, float("inf"), M)
            place = (b, h, row[None, :], k_at[:, None], tile * N)
            p, keep, allowed, found = weigh(
                s, m[None, :], log2_l[None, :], place, facts, arrays, numbers,
                M, N, MASK, SCORE, BIAS, DROPOUT, MASKED == 1, True,
            )  # fmt: skip
            if VALUE:
                kept = tl.where(keep, p, 0.0) if DROPOUT else p
                dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
            if KEY:
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=tl.float32)
                t = _of_rows(statistics[2], b, head, j * M, heads, q_len, 0.0, M)
                dz, ds = pull(
                    p, keep, allowed, found, dp, t[None, :], numbers,
                    SCORE, BIAS, DROPOUT, MASKED == 1,
                )  # fmt: skip
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            if FUSED:
                known = k
                if MASKED == 1 or BIAS or SCORE is not None:
                    known = seen_of(k, allowed, 1)
                dq = tl.dot(tl.trans(ds.to(k.dtype)), known, input_precision=PRECISION)
                add(
                    dq * numbers[0], d_query, strides[6], b, head, j * M, q_len,
                    M, D, PAD, DESCRIPTORS,
                )  # fmt: skip
                if len(SITES):
                    d_tables(dz, allowed, found, tables, SITES)
    # The same tile, worked out anew, so that no compiler knows it for the same: where it begins, in
    # every form in which that is asked for, would else wait in registers while the loops run.
    first = (pid + tiles) % tiles * N
    if KEY:
        put(dk * numbers[0], d_key, strides[4], b, kv_head, first, k_len, N, D, PAD)
    if VALUE:
        if DROPOUT:
            dv = dv * numbers[2]
        put(dv, d_value, strides[5], b, kv_head, first, k_len, N, DV, PAD_V)


@triton.jit
def d_query(
    query, key, value, d_out, d_query, statistics, arrays, numbers, lengths,
    schedule,  # of the rows of tiles
    strides,  # of query, d_out, key, value, d_query
    tables,  # for each site of the score: where its gradient is added, the sizes of the operand
    length_strides, map_strides, heads, group, q_len, k_len, tiles, width,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr,
    KV_LENGTHS: tl.constexpr, Q_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr,
    SITES: tl.constexpr,  # what `sites_of` says
    RUN: tl.constexpr,  # as of d_keys
    DESCRIPTORS: tl.constexpr,  # whether key and value are
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of rows, and its share of the gradients of a score's arrays."""
    pid = tl.program_id(0)
    tile, rest = tiles - 1 - pid % tiles, pid // tiles
    b, head = rest // heads, rest % heads
    kv_head = head // group
    h = tl.zeros((1, 1), tl.int32) + head
    row = tile * M + tl.arange(0, M)
    m = _of_rows(statistics[0], b, head, tile * M, heads, q_len, 0.0, M)
    log2_l = _of_rows(statistics[1], b, head, tile * M, heads, q_len, float("inf"), M)
    t = _of_rows(statistics[2], b, head, tile * M, heads, q_len, 0.0, M)
    q, do = _rows_of(
        query, d_out, statistics[1], strides, b, head, tile * M, heads, q_len,
        M, D, DV, PAD, PAD_V, False, False,
    )  # fmt: skip
    facts = facts_of(b, lengths, length_strides, q_len, k_len, KV_LENGTHS, Q_LENGTHS)
    order, stop_full, stop = line_of(schedule, map_strides, b, kv_head, tile, width)
    start = tl.load(order)
    dq = tl.zeros((M, PAD), tl.float32)
    for MASKED in tl.static_range(2):
        begin, end = 0, stop_full
        if MASKED:
            begin, end = stop_full, stop
        for i in tl.range(begin, end):
            j = start + i
            if MASKED or not RUN:
                j = tl.load(order + i)
            k_at = j * N + tl.arange(0, N)
            k = taken(
                key, strides[2], b, kv_head, j * N, k_len, N, D, PAD, MASKED == 0, DESCRIPTORS
            )
            v = taken(
                value, strides[3], b, kv_head, j * N, k_len, N, DV, PAD_V, MASKED == 0, DESCRIPTORS
            )
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=tl.float32)
            place = (b, h, row[:, None], k_at[None, :], j * N)
            p, keep, allowed, found = weigh(
                s, m[:, None], log2_l[:, None], place, facts, arrays, numbers,
                M, N, MASK, SCORE, BIAS, DROPOUT, MASKED == 1, False,
            )  # fmt: skip
            dz, ds = pull(
                p, keep, allowed, found, dp, t[:, None], numbers,
                SCORE, BIAS, DROPOUT, MASKED == 1,
            )  # fmt: skip
            if MASKED == 1 or BIAS or SCORE is not None:
                k = seen_of(k, allowed, 0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if len(SITES):
                d_tables(dz, allowed, found, tables, SITES)
    first = (tiles - 1 - (pid + tiles) % tiles) * M  # the same tile, as in d_keys
    put(dq * numbers[0], d_query, strides[4], b, head, first, q_len, M, D, PAD)


def sites_of(indices: Iterable[int]) -> tuple[tuple[int, int, int], ...]:
    """Of each look-up of a score (result, argument, indices): where what belongs to it begins.

    Among the results of the derivative that is its slope, which its indices follow; among the
    `tables` the pointer, which the sizes follow.

    Args:
        indices: of each look-up how many.
    """
    found, result, argument = [], 2, 0
    for count in indices:
        found.append((result, argument, count))
        result, argument = result + 1 + count, argument + 1 + count
    return tuple(found)


@triton.jit
def d_tables(dz, allowed, found, tables, SITES: tl.constexpr):
    """Adds a tile's share of every look-up of a score where its indices point, turned or not."""
    for n in tl.static_range(len(SITES)):
        RESULT: tl.constexpr = SITES[n][0]
        ARGUMENT: tl.constexpr = SITES[n][1]
        INDICES: tl.constexpr = SITES[n][2]
        moved = tl.where(allowed, dz * found[RESULT], 0.0)
        at = tl.zeros((1, 1), tl.int64)
        for axis in tl.static_range(INDICES):
            size = tables[ARGUMENT + 1 + axis]
            index = found[RESULT + 1 + axis]
            at = at * size + tl.minimum(tl.maximum(index, 0), size - 1).to(tl.int64)
        # Added up first along every axis that the place does not move along.
        if at.shape[1] == 1:
            moved = tl.sum(moved, 1, keep_dims=True)
        if at.shape[0] == 1:
            moved = tl.sum(moved, 0, keep_dims=True)
        tl.atomic_add(tables[ARGUMENT] + at, moved, sem="relaxed")


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
                m = _of_rows(statistics[0], b, head, (i0 + di) * M, heads, q_len, 0.0, M)
                log2_l = _of_rows(
                    statistics[1], b, head, (i0 + di) * M, heads, q_len, float("inf"), M
                )
                t = _of_rows(statistics[2], b, head, (i0 + di) * M, heads, q_len, 0.0, M)
                q, do = _rows_of(
                    query, d_out, statistics[1], strides, b, head, (i0 + di) * M, heads, q_len,
                    M, D, DV, PAD, PAD_V, False, False,
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
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32)
                    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=tl.float32)
                    place = (b, h, row[:, None], k_at[None, :], first)
                    p, keep, allowed, found = weigh(
                        s, m[:, None], log2_l[:, None], place, facts, arrays, numbers,
                        M, N, MASK, SCORE, True, DROPOUT, True, False,
                    )  # fmt: skip
                    dz, _ = pull(
                        p, keep, allowed, found, dp, t[:, None], numbers,
                        SCORE, True, DROPOUT, True,
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
