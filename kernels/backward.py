"""The backward kernels: each tile is recomputed from the statistics (m, log l) of its rows.

    p  = exp(s - m) / l                dV = p'^T dO         p' = p, dropped and rescaled as it was
    dp = dO V^T                        dz = p (dp' - t)     t = rowsum(dO * O) - d lse
    dQ = scale ds K                    dK = scale ds^T Q    ds = dz (d score / d s)

Every gradient has a kernel that walks whatever it is a sum over, so that each number is added up by
one program in one order: no atomics, and every run gives the same bits.

    d_keys      a tile of keys along its live tiles of rows, for every head of its group
    d_query     a tile of rows along its live tiles of keys
    d_bias      (`bias.py`) a tile of the bias along all that it is broadcast over

That costs two products more. So `d_keys` can do the work of `d_query` too (FUSED): it has ds at
hand, and adds every tile's share of dQ by atomics, in float32 and in an order that differs from run
to run. `d_tables`, the gradients of arrays that a score looks up, always adds by atomics, since any
tile may look up any entry.

Full and partial tiles share one loop, as in the forward pass, and at first it does not ask whether
a row sees a key or a key is seen by a row: what is there is multiplied by a p of 0. Where the sums
are not finite then, they are made again (AGAIN), by a loop that takes every tile for partial and
reads zeros for rows that see no key and for keys that no row sees. The result is the same whatever
hidden entries hold, and takes longer where that is NaN or infinite.

What is added by atomics cannot be taken back, and in float32 asking costs little beside the
products: there two loops ask at once, one along full tiles and one along partial ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl

from attn_core.kernels.statistics import of_rows, rows_of
from attn_core.kernels.tile import add, ahead_of, facts_of, line_of, put, taken
from attn_core.kernels.weights import EITHER, FULL, PARTIAL, finite, pull, seen_of, weigh


@triton.jit
def d_keys(
    query, key, value, d_out, d_key, d_value,
    d_query,  # where FUSED, float32 zeros (B, Hq, Tq, D) that dQ is added to; else nothing
    statistics,  # as `delta` has left them
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
    EARLY: tl.constexpr, LOOKS: tl.constexpr,  # as forward has them
    SITES: tl.constexpr,  # what `sites_of` says; none but where FUSED
    KEY: tl.constexpr, VALUE: tl.constexpr,  # which of dK and dV it makes
    FUSED: tl.constexpr,  # whether it does what `d_query` does, too; it then makes both
    ALONE: tl.constexpr,  # whether each query head has keys of its own: a group is 1
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
    k = taken(key, strides[2], b, kv_head, tile * N, k_len, N, D, PAD, False, DESCRIPTORS)
    v = k  # which stands for what nobody reads
    if KEY:
        v = taken(value, strides[3], b, kv_head, tile * N, k_len, N, DV, PAD_V, False, DESCRIPTORS)
    facts = facts_of(b, lengths, length_strides, q_len, k_len, KV_LENGTHS, Q_LENGTHS)
    order, stop_full, stop = line_of(schedule, map_strides, b, kv_head, tile, width)
    start = tl.load(order)
    dk, dv = _nothing(N, PAD, KEY), _nothing(N, PAD_V, VALUE)
    told = (
        k, v, query, d_out, d_query, statistics, arrays, numbers, strides, tables,
        (b, kv_head, tile), facts, (order, start), heads, group, q_len,
    )  # fmt: skip
    AT_ONCE: tl.constexpr = FUSED or k.dtype == tl.float32
    if AT_ONCE:
        dk, dv = _along_rows(
            dk, dv, *told, 0, stop_full, stop_full,
            D, DV, PAD, PAD_V, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, SITES, KEY, VALUE,
            FUSED, ALONE, RUN, DESCRIPTORS, PRECISION, FULL, False,
        )  # fmt: skip
        dk, dv = _along_rows(
            dk, dv, *told, stop_full, stop_full, stop,
            D, DV, PAD, PAD_V, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, SITES, KEY, VALUE,
            FUSED, ALONE, RUN, DESCRIPTORS, PRECISION, PARTIAL, False,
        )  # fmt: skip
    else:
        dk, dv = _along_rows(
            dk, dv, *told, 0, stop_full, stop,
            D, DV, PAD, PAD_V, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, SITES, KEY, VALUE,
            FUSED, ALONE, RUN, DESCRIPTORS, PRECISION, EITHER, False,
        )  # fmt: skip
        good = True
        if KEY:
            good = good & finite(dk)
        if VALUE:
            good = good & finite(dv)
        if not good:
            dk, dv = _nothing(N, PAD, KEY), _nothing(N, PAD_V, VALUE)
            dk, dv = _along_rows(
                dk, dv, *told, 0, 0, stop,
                D, DV, PAD, PAD_V, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, SITES, KEY,
                VALUE, FUSED, ALONE, RUN, DESCRIPTORS, PRECISION, PARTIAL, True,
            )  # fmt: skip
    # The same tile, worked out anew, so that no compiler knows it for the same: where it begins, in
    # every form in which that is asked for, would else wait in registers while the loops run.
    first, rest = (pid + tiles) % tiles * N, (pid + tiles) // tiles - 1
    kv_heads = (heads + group) // group - 1
    b, kv_head = rest // kv_heads, rest % kv_heads
    if KEY:
        put(dk * numbers[0], d_key, strides[4], b, kv_head, first, k_len, N, D, PAD)
    if VALUE:
        if DROPOUT:
            dv = dv * numbers[2]
        put(dv, d_value, strides[5], b, kv_head, first, k_len, N, DV, PAD_V)


@triton.jit
def _nothing(N: tl.constexpr, PAD: tl.constexpr, MADE: tl.constexpr):
    """What has been added up of a tile of keys before anything has; of what is not made one 0."""
    return tl.zeros((N, PAD), tl.float32) if MADE else tl.zeros((1, 1), tl.float32)


@triton.jit
def _along_rows(
    dk, dv,  # what has been added up
    k, v,
    query, d_out, d_query, statistics, arrays, numbers, strides, tables,  # as d_keys has them
    place,  # b, key head, tile
    facts,
    line,  # where the numbers of its tiles stand, and the first of them
    heads, group, q_len,
    begin, stop_full, stop,  # of its tiles, of all that are full, and of these
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    EARLY: tl.constexpr, LOOKS: tl.constexpr,
    SITES: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, FUSED: tl.constexpr,
    ALONE: tl.constexpr, RUN: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr,  # of these tiles
    AGAIN: tl.constexpr,  # whether it is done again, with care
):  # fmt: skip
    """(dK, dV) of a tile of keys along tiles of rows."""
    b, kv_head, tile = place
    order, start = line
    k_at = tile * N + tl.arange(0, N)
    # One loop for all heads of the group: two, one in the other, would fill their pipeline anew
    # for each head, and have the sums in registers while they do.
    turn = tl.zeros((), tl.int32) + begin
    STAGES: tl.constexpr = 1 if AGAIN else None  # it is rare, and must not take registers
    # Read by descriptors, tiles of 64 x 64 have no register left: nothing is moved out of the loop,
    # where it would wait in one, and a turn is counted though it need not be, which takes fewer.
    TIGHT: tl.constexpr = DESCRIPTORS
    for n in tl.range(begin * group, stop * group, num_stages=STAGES, disable_licm=AGAIN or TIGHT):
        if ALONE and not TIGHT:
            i, head = n, kv_head
        else:
            i, head = turn, (kv_head - turn) * group + n
            # Counted: of a group that is not known, a division takes 40 instructions.
            turn += (n + 1 == (turn + 1) * group).to(tl.int32)
        h = tl.zeros((1, 1), tl.int32) + head
        j = _tile_of(order, start, i, stop_full, RUN, KIND)
        row = j * M + tl.arange(0, M)
        RAW: tl.constexpr = KIND == EITHER or (KIND == FULL and SCORE is None and not BIAS)
        q = rows_of(
            query, statistics[1], strides[0], b, head, j * M, heads, q_len,
            M, D, PAD, RAW, DESCRIPTORS,
        )  # fmt: skip
        if not AGAIN:
            do = rows_of(
                d_out, statistics[1], strides[1], b, head, j * M, heads, q_len,
                M, DV, PAD_V, RAW, DESCRIPTORS,
            )  # fmt: skip
        # Turned over, so that p and ds are first operands as they come out of products. What is
        # known of rows is then spread over all threads, and read no sooner than it is needed.
        at = (b, h, row[None, :], k_at[:, None], tile * N)
        partial = KIND == PARTIAL or (KIND == EITHER and i >= stop_full)
        ahead = ahead_of(at, facts, arrays, partial, N, M, MASK, BIAS, EARLY, LOOKS)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=tl.float32)
        known = _known_of(statistics, b, head, j * M, heads, q_len, M, KIND)
        p, keep, allowed, found = weigh(
            s, ahead, (known[0][None, :], known[1][None, :], known[2][None, :]), at, facts, arrays,
            numbers, partial, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, KIND, AGAIN, True,
        )  # fmt: skip
        if AGAIN:  # late: with nothing on its way, it would wait in registers
            do = rows_of(
                d_out, statistics[1], strides[1], b, head, j * M, heads, q_len,
                M, DV, PAD_V, RAW, DESCRIPTORS,
            )  # fmt: skip
        if VALUE:
            kept = tl.where(keep, p, 0.0) if DROPOUT else p
            dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
        if KEY:
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=tl.float32)
            t = of_rows(statistics[2], b, head, j * M, heads, q_len, M)
            dz, ds = pull(
                p, keep, allowed, found, dp, t[None, :], numbers, SCORE, BIAS, DROPOUT, KIND
            )
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if FUSED:
            seen = k
            if KIND == PARTIAL or BIAS or SCORE is not None:
                seen = seen_of(k, allowed, 1)
            dq = tl.dot(tl.trans(ds.to(k.dtype)), seen, input_precision=PRECISION)
            add(dq * numbers[0], d_query, strides[6], b, head, j * M, q_len, M, D, PAD, DESCRIPTORS)
            if len(SITES):
                d_tables(dz, allowed, found, tables, SITES)
    return dk, dv


@triton.jit
def _known_of(statistics, b, head, first, heads, q_len, M: tl.constexpr, KIND: tl.constexpr):
    """m, log2 l and base of a tile's rows, as far as `weigh` wants to know; of what it does not
    another one stands there."""
    if KIND == EITHER:
        base = of_rows(statistics[3], b, head, first, heads, q_len, M)
        return base, base, base
    else:
        m = of_rows(statistics[0], b, head, first, heads, q_len, M)
        log2_l = of_rows(statistics[1], b, head, first, heads, q_len, M)
        return m, log2_l, m


@triton.jit
def _tile_of(order, start, i, stop_full, RUN: tl.constexpr, KIND: tl.constexpr):
    """The number of the tile at place i of its line; RUN: full ones are neighbours."""
    if not RUN or KIND == PARTIAL:
        return tl.load(order + i)
    elif KIND == FULL:
        return start + i
    else:
        return tl.load(order + i, mask=i >= stop_full, other=start + i)


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
    EARLY: tl.constexpr, LOOKS: tl.constexpr,  # as forward has them
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
    t = of_rows(statistics[2], b, head, tile * M, heads, q_len, M)
    facts = facts_of(b, lengths, length_strides, q_len, k_len, KV_LENGTHS, Q_LENGTHS)
    order, stop_full, stop = line_of(schedule, map_strides, b, kv_head, tile, width)
    start = tl.load(order)
    told = (
        key, value, t, arrays, numbers, strides, tables,
        (b, kv_head, h, row), facts, (order, start), k_len,
    )  # fmt: skip
    AT_ONCE: tl.constexpr = len(SITES) > 0 or query.dtype.element_ty == tl.float32  # as of d_keys
    q = rows_of(
        query, statistics[1], strides[0], b, head, tile * M, heads, q_len,
        M, D, PAD, not AT_ONCE, False,
    )  # fmt: skip
    do = rows_of(
        d_out, statistics[1], strides[1], b, head, tile * M, heads, q_len,
        M, DV, PAD_V, not AT_ONCE, False,
    )  # fmt: skip
    dq = tl.zeros((M, PAD), tl.float32)
    if AT_ONCE:
        known = _known_of(statistics, b, head, tile * M, heads, q_len, M, PARTIAL)
        dq = _along_keys(
            dq, q, do, known, *told, 0, stop_full, stop_full,
            D, DV, PAD, PAD_V, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, SITES, RUN,
            DESCRIPTORS, PRECISION, FULL, False,
        )  # fmt: skip
        dq = _along_keys(
            dq, q, do, known, *told, stop_full, stop_full, stop,
            D, DV, PAD, PAD_V, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, SITES, RUN,
            DESCRIPTORS, PRECISION, PARTIAL, False,
        )  # fmt: skip
    else:
        known = _known_of(statistics, b, head, tile * M, heads, q_len, M, EITHER)
        dq = _along_keys(
            dq, q, do, known, *told, 0, stop_full, stop,
            D, DV, PAD, PAD_V, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, SITES, RUN,
            DESCRIPTORS, PRECISION, EITHER, False,
        )  # fmt: skip
        if not finite(dq):
            first, b, head = _anew(pid, tiles, heads, M, 2)
            q = rows_of(
                query, statistics[1], strides[0], b, head, first, heads, q_len,
                M, D, PAD, False, False,
            )  # fmt: skip
            do = rows_of(
                d_out, statistics[1], strides[1], b, head, first, heads, q_len,
                M, DV, PAD_V, False, False,
            )  # fmt: skip
            known = _known_of(statistics, b, head, first, heads, q_len, M, PARTIAL)
            dq = _along_keys(
                tl.zeros((M, PAD), tl.float32), q, do, known, *told, 0, 0, stop,
                D, DV, PAD, PAD_V, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, SITES, RUN,
                DESCRIPTORS, PRECISION, PARTIAL, True,
            )  # fmt: skip
    first, b, head = _anew(pid, tiles, heads, M, 1)
    put(dq * numbers[0], d_query, strides[4], b, head, first, q_len, M, D, PAD)


@triton.jit
def _anew(pid, tiles, heads, M: tl.constexpr, TURNS: tl.constexpr):
    """(first row, b, head) of a program of d_query, as no compiler knows them from before: as in
    d_keys, or addresses would wait in registers for the second time that they are asked for."""
    at, rest = (pid + TURNS * tiles) % tiles, (pid + TURNS * tiles) // tiles - TURNS
    return (tiles - 1 - at) * M, rest // heads, rest % heads


@triton.jit
def _along_keys(
    dq,  # what has been added up
    q, do,
    known,  # of the tile's rows, as `weigh` wants it
    key, value, t,
    arrays, numbers, strides, tables,  # as d_query has them
    place,  # b, key head, query head (1, 1), row (M,)
    facts,
    line,  # as of _along_rows, and so on
    k_len,
    begin, stop_full, stop,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    EARLY: tl.constexpr, LOOKS: tl.constexpr,
    SITES: tl.constexpr, RUN: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of rows along tiles of keys."""
    b, kv_head, h, row = place
    order, start = line
    WHOLE: tl.constexpr = KIND == FULL
    STAGES: tl.constexpr = 1 if AGAIN else None
    for i in tl.range(begin, stop, num_stages=STAGES, disable_licm=AGAIN):
        j = _tile_of(order, start, i, stop_full, RUN, KIND)
        k_at = j * N + tl.arange(0, N)
        k = taken(key, strides[2], b, kv_head, j * N, k_len, N, D, PAD, WHOLE, DESCRIPTORS)
        v = taken(value, strides[3], b, kv_head, j * N, k_len, N, DV, PAD_V, WHOLE, DESCRIPTORS)
        at = (b, h, row[:, None], k_at[None, :], j * N)
        partial = KIND == PARTIAL or (KIND == EITHER and i >= stop_full)
        ahead = ahead_of(at, facts, arrays, partial, M, N, MASK, BIAS, EARLY, LOOKS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=tl.float32)
        p, keep, allowed, found = weigh(
            s, ahead, (known[0][:, None], known[1][:, None], known[2][:, None]), at, facts, arrays,
            numbers, partial, M, N, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, KIND, AGAIN, False,
        )  # fmt: skip
        dz, ds = pull(p, keep, allowed, found, dp, t[:, None], numbers, SCORE, BIAS, DROPOUT, KIND)
        if KIND == PARTIAL or (KIND == FULL and (BIAS or SCORE is not None)):
            k = seen_of(k, allowed, 0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        if len(SITES):
            d_tables(dz, allowed, found, tables, SITES)
    return dq


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
        _d_table(dz, allowed, found, tables, SITES[n][0], SITES[n][1], SITES[n][2])


# A function of its own: Triton gives a constant no second value, in a loop that is unrolled either.
@triton.jit
def _d_table(
    dz, allowed, found, tables,
    RESULT: tl.constexpr, ARGUMENT: tl.constexpr, INDICES: tl.constexpr,
):  # fmt: skip
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
