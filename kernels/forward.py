"""The forward kernel: a tile of query rows walks its live tiles of keys.

One program has one tile of rows. It reads from the schedule (`attn_core.schedule`) which tiles of
keys are full (no mask is evaluated) and which are partial, and keeps for each row the maximum m of
its logits, the sum l of exp(s - m), and the weighted sum of values:

    m' = max(m, max s)     l' = l exp(m - m') + sum exp(s - m')     acc' = acc exp(m - m') + P V

exp(x) is exp2(x log2 e); product and difference are one FMA if m is kept in units of log 2:

    m' = max(m, log2 e max s)     P = exp2(s log2 e - m')

P is rounded to the 16 bits of V before they are multiplied, which is half of the error that there
is; but a weight of 1 needs no rounding. So it is not measured from m' but, as far as that is in
REACH, from the maximum of its own tile, whose weight is among the greatest:

    t = max(log2 e max s, m' - REACH)     P = exp2(s log2 e - t)

The sums follow t, up and down, and are worth at the end what they are at m. A tile further below
its row's m has too little weight for that to matter, and the sums would outgrow float32. So would
those of bfloat16's greatest values at m - REACH, where they are 8 times what they end as: bfloat16,
to whose weights a power of 2 more or less is nothing, has both terms greater by REACH, so that t is
m at least. (float16 has no such values, but weights that would be subnormal.)

An FMA does not round that product, and t may be any number, so that its rounding cancels in P / l.
But for a logit of 1e9 it is tens: P would exceed 1, and the backward pass takes m at its word. So a
row whose t becomes HIGH or DEEP gets a sum of NaN, and its tile of rows runs once more, `exact`:
there the product comes after the difference, which is of m'. (With ALiBi's distances a row
may begin at -1e4, and end near 0.) Without a score or a bias a positive scale is part of that
product.

Full and partial tiles share one loop, the partial ones behind a branch: two loops would fill and
drain their pipeline twice, a good part of the time if a window or a document has few tiles.

Masks select, they never add. And 0 times NaN is NaN: the value of a key that no row of the tile may
see must be read as 0. Finding those keys takes longer than the products, so at first none is looked
for; if a sum is not finite then, the rows walk `along` their keys once more, CAREFUL this time. The
result is the same, bit for bit, whatever hidden values are, and takes longer where they are NaN or
infinite. In float32 products take so long that looking costs little beside them: its only pass is
careful and exact.

Rows may be those of all heads of a group, one below the other: then keys are read once for the
group, and reading is what decoding spends its time on. And the tiles of a row may be split among
several programs, whose (m, l, acc) `combine` merges.

There is one kernel: masks, scores and options are compiled into it or left out of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_core.kernels.tile import LOG2E, ahead_of, facts_of, judged, kept_of, line_of, taken

HIGH, DEEP = tl.constexpr(512.0), tl.constexpr(-65536.0)
"""What rows are measured from, in units of log 2. 2^-24 of HIGH is 1/16 of float16's rounding, and
2^-24 of DEEP all of bfloat16's. Rows that end between -512 and DEEP are what a finite bias has left
of hidden ones."""

REACH = tl.constexpr(3.0)
"""In units of log 2. In float16 sums may be 8 times what they end as; of weights below an eighth of
their row's greatest little is left to be gained."""

LN2 = tl.constexpr(0.6931471805599453)


# What is known of sizes is worth nothing within the loop, and a cache that grows would wait for the
# compiler whenever 16 divides another one of them. WHOLE alone is worth something, of partial tiles
# and of a bias, and is asked for where it is (`triton_forward`).
@triton.jit(
    do_not_specialize=[
        *("threshold", "map_batch", "map_head", "heads", "group"),
        *("q_len", "k_len", "tiles", "width", "splits"),
    ]
)
def forward(
    query,  # by strides: batch, head, row, column
    key,
    value,
    out,
    m_out,  # float32 (B, Hq, Tq) or (B, Hq, splits, Tq), contiguous; and so l
    l_out,
    alive_out,  # int8 (B, Hq, Tq): whether the row may see a key
    bias,
    sinks,
    kv_lengths,  # int32 (B or 1,)
    q_lengths,
    offsets,
    seed,  # two words: low, high
    order,  # int32 (Bm, Hm, tiles, width), and twice (Bm, Hm, tiles)
    full,
    live,
    mask_operands,
    score_operands,
    scale,
    threshold,
    keep_scale,
    q_strides,
    k_strides,
    v_strides,
    o_strides,  # of split parts: batch, head, split, row, column
    bias_strides,
    length_strides,  # 0 or 1: of kv_lengths, q_lengths, offsets
    map_batch,  # of the schedule's lines, from one batch to the next, and one key head
    map_head,
    heads,
    group,
    q_len,
    k_len,
    tiles,
    width,
    splits,  # programs that share the tiles of keys of one tile of rows
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD: tl.constexpr,  # D and DV as powers of two, at least 16
    PAD_V: tl.constexpr,
    M: tl.constexpr,  # rows of a tile, PACK heads of M // PACK rows each
    N: tl.constexpr,
    PACK: tl.constexpr,  # a power of two, at least the group where the group is packed, else 1
    SPLIT: tl.constexpr,  # whether there may be more than one of those: parts are written then
    MASK: tl.constexpr,
    SCORE: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether k_len is known to be a multiple of 16
    SINKS: tl.constexpr,
    KV_LENGTHS: tl.constexpr,
    Q_LENGTHS: tl.constexpr,
    DROPOUT: tl.constexpr,
    EARLY: tl.constexpr,  # whether the mask looks an array up at every entry
    LOOKS: tl.constexpr,  # what the score looks up at every entry, or None
    LATE: tl.constexpr,  # whether the scale comes after the difference: it is positive then
    RUN: tl.constexpr,  # whether full tiles are neighbours, so that they need not be looked up
    DESCRIPTORS: tl.constexpr,  # whether key and value are tensor descriptors of tiles
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = M // PACK
    rest = tl.program_id(0)
    if SPLIT:
        split, rest = rest % splits, rest // splits
    if WHOLE:
        k_len = k_len // 16 * 16  # which says so
    # Neighbouring programs share their keys; of a causal mask, the longest rows come first.
    tile = tiles - 1 - rest % tiles
    packs = heads if PACK == 1 else heads // group
    b, pack = rest // tiles // packs, rest // tiles % packs
    lane = tl.arange(0, M)
    if PACK == 1:
        h = tl.zeros((M,), tl.int32) + pack
        kv_head = pack // group
        there = lane < M
    else:
        # Lanes beyond the group repeat its last head, its queries too, by which a score may hide
        # keys: what they see, its own rows see as well.
        h = pack * group + tl.minimum(lane // ROWS, group - 1)
        kv_head = pack
        there = lane // ROWS < group
    row = tile * ROWS + lane % ROWS
    asked = row < q_len
    there = there & asked

    column, column_v = tl.arange(0, PAD), tl.arange(0, PAD_V)
    q_at = query + b.to(tl.int64) * q_strides[0] + h[:, None].to(tl.int64) * q_strides[1]
    q_at += row[:, None].to(tl.int64) * q_strides[2] + column[None, :].to(tl.int64) * q_strides[3]
    q = tl.load(q_at, mask=asked[:, None] & (column < D)[None, :], other=0.0)

    lengths = (kv_lengths, q_lengths, offsets)
    facts = facts_of(b, lengths, length_strides, q_len, k_len, KV_LENGTHS, Q_LENGTHS)
    arrays = (mask_operands, score_operands, (bias,), bias_strides, (seed,))
    schedule = (order, full, live)
    order, stop_full, stop = line_of(schedule, (map_batch, map_head), b, kv_head, tile, width)
    first = 0
    if SPLIT:
        share = tl.cdiv(stop, splits)
        first, stop = tl.minimum(split * share, stop), tl.minimum(split * share + share, stop)
        stop_full = tl.minimum(tl.maximum(stop_full, first), stop)
    row2 = row[:, None]
    h2 = tl.full((1, 1), 0, tl.int32) + pack if PACK == 1 else h[:, None]
    place = (b, kv_head, h, h2, row, row2)
    AT_ONCE: tl.constexpr = query.dtype.element_ty == tl.float32
    m, total, acc = along(
        q, key, value, (k_strides, v_strides), place, facts, arrays,
        (order, first, stop_full, stop), (scale, threshold), k_len, False,
        M, N, D, DV, PAD, PAD_V, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, LATE, RUN,
        DESCRIPTORS, PRECISION, AT_ONCE, AT_ONCE,
    )  # fmt: skip
    # Taken from where nobody looks, what is not finite is still not finite here: 0 times it is NaN.
    if not AT_ONCE:  # noqa: SIM102 - known before compiling, so that the rest is not compiled
        if tl.max((tl.abs(acc) < float("inf")).to(tl.int32) ^ 1) != 0:
            exact = tl.max((total != total).to(tl.int32)) != 0
            m, total, acc = along(
                q, key, value, (k_strides, v_strides), place, facts, arrays,
                (order, first, first, stop), (scale, threshold), k_len, exact,
                M, N, D, DV, PAD, PAD_V, MASK, SCORE, BIAS, DROPOUT, EARLY, LOOKS, LATE,
                RUN, DESCRIPTORS, PRECISION, True, False,
            )  # fmt: skip
    if DROPOUT:
        # Here, in float32: beside p it may be more than 16 bits hold.
        acc = acc * keep_scale

    if SPLIT:
        at = (b.to(tl.int64) * heads + h) * splits * q_len + split * q_len + row
        tl.store(m_out + at, m, mask=there)
        tl.store(l_out + at, total, mask=there)
        o_at = out + b.to(tl.int64) * o_strides[0] + h[:, None].to(tl.int64) * o_strides[1]
        o_at += split * o_strides[2] + row[:, None].to(tl.int64) * o_strides[3]
        o_at += column_v[None, :].to(tl.int64) * o_strides[4]
        tl.store(o_at, acc, mask=there[:, None] & (column_v < DV)[None, :])
    else:
        if SINKS:
            sink = tl.load(sinks + h, mask=there, other=0.0).to(tl.float32)
        else:
            sink = tl.full((M,), float("-inf"), tl.float32)
        m, log_l, alive, result = finished(m, total, acc, sink, row, facts[1], SINKS)
        at = (b.to(tl.int64) * heads + h) * q_len + row
        tl.store(m_out + at, m, mask=there)
        tl.store(l_out + at, log_l, mask=there)
        tl.store(alive_out + at, alive.to(tl.int8), mask=there)
        o_at = out + b.to(tl.int64) * o_strides[0] + h[:, None].to(tl.int64) * o_strides[1]
        o_at += (
            row[:, None].to(tl.int64) * o_strides[2] + column_v[None, :].to(tl.int64) * o_strides[3]
        )
        result = result.to(out.dtype.element_ty)
        tl.store(o_at, result, mask=there[:, None] & (column_v < DV)[None, :])


@triton.jit
def along(
    q, key, value,
    strides,  # of key, value
    place,  # b, key head, query head (M,) and (1, 1) or (M, 1), row (M,) and (M, 1)
    facts,  # offset, rows_seen, keys_seen, q_len, k_len
    arrays,  # mask operands, score operands, (bias,), its strides, (seed,)
    line,  # where the numbers of its tiles stand, the first, behind the full ones, behind the last
    numbers,  # scale, threshold
    k_len,
    exact,  # whether the product comes after the difference; asked where CAREFUL
    M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr,
    MASK: tl.constexpr, SCORE: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    EARLY: tl.constexpr, LOOKS: tl.constexpr, LATE: tl.constexpr, RUN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,  # whether values of keys that no row of the tile sees are replaced by 0
    EXACT: tl.constexpr,  # whether it is exact anyway
):  # fmt: skip
    """(m, l, acc) of a tile of rows along its tiles of keys."""
    b, kv_head, h, h2, row, row2 = place
    order, first, stop_full, stop = line
    # Of a row without full tiles this is some partial one, and never used.
    start = tl.load(order)
    unit = LOG2E
    if LATE:
        unit = numbers[0] * LOG2E
    m = tl.full((M,), float("-inf"), tl.float32)
    t = m
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, PAD_V), tl.float32)
    GREAT: tl.constexpr = q.dtype == tl.bfloat16
    # Left alone, LLVM holds so much ready before the loop that it has no registers within.
    for i in tl.range(first, stop, disable_licm=True):
        if RUN:
            j = tl.load(order + i, mask=i >= stop_full, other=start + i)
        else:
            j = tl.load(order + i)
        k = taken(key, strides[0], b, kv_head, j * N, k_len, N, D, PAD, False, DESCRIPTORS)
        at = (b, h2, row2, j * N + tl.arange(0, N)[None, :], j * N)
        partial = i >= stop_full
        ahead = ahead_of(at, facts, arrays, partial, M, N, MASK, BIAS, EARLY, LOOKS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32)
        if not LATE:
            s = s * numbers[0]
        # From here on -inf says that it is not allowed: one tile less in registers.
        if EARLY and SCORE is None and not BIAS and not CAREFUL:
            s = tl.minimum(s, ahead[1])
        elif partial:
            s, allowed, _ = judged(
                s, ahead, at, facts, arrays, M, N, MASK, SCORE, BIAS, EARLY, LOOKS, True
            )
            s = tl.where(allowed, s, float("-inf"))
        elif SCORE is not None or BIAS:
            s, allowed, _ = judged(
                s, ahead, at, facts, arrays, M, N, MASK, SCORE, BIAS, EARLY, LOOKS, False
            )
            s = tl.where(allowed, s, float("-inf"))
        if CAREFUL:
            seen = tl.max(s, 0) != float("-inf")
        if EXACT:
            m, p, fade = _exactly(s, m, unit)
        elif CAREFUL:
            if exact:
                m, p, fade = _exactly(s, m, unit)
                t = m
            else:
                m, t, p, fade = _swiftly(s, m, t, unit, GREAT)
        else:
            m, t, p, fade = _swiftly(s, m, t, unit, GREAT)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            kept = kept_of(arrays[4][0], b, h, row + facts[0], j * N, numbers[1], M, N)
            p = tl.where(kept, p, 0.0)
        v = taken(value, strides[1], b, kv_head, j * N, k_len, N, DV, PAD_V, False, DESCRIPTORS)
        if CAREFUL:
            v = tl.where(seen[:, None], v, 0.0).to(v.dtype)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    natural = 1.0
    if LATE:
        natural = numbers[0]
    if not EXACT:
        if CAREFUL:
            natural = tl.where(exact, natural, LN2)
        else:
            natural = LN2
        fade = tl.where(m == float("-inf"), 1.0, tl.exp2(t - m))
        total, acc = total * fade, acc * fade[:, None]
    return m * natural, total, acc


@triton.jit
def _exactly(s, m, unit):
    """(m', P, what earlier sums are worth now); m in units of s."""
    # NaN is no maximum here, so top is none, and exp2 of -inf less it is 0.
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.exp2((s - base[:, None]) * unit), tl.exp2((m - base) * unit)


@triton.jit
def _swiftly(s, m, t, unit, GREAT: tl.constexpr):
    """(m', t', P, what earlier sums are worth now), m and t in units of log 2. Earlier sums are
    worth NaN where t' is HIGH or DEEP. GREAT: whether values may be so great that t' is m' at
    least."""
    most = tl.max(s, 1)
    here = most * unit
    top = tl.maximum(m, here)
    mark = tl.maximum(here + REACH, top) if GREAT else tl.maximum(here, top - REACH)
    # Of a logit near the least of float32 the product is -inf: no row without keys, but a DEEP one.
    base = tl.where(tl.maximum(m, most) == float("-inf"), 0.0, mark)
    fade = tl.where((base < HIGH) & (base > DEEP), tl.exp2(t - base), float("nan"))
    return top, mark, tl.exp2(s * unit - base[:, None]), fade


@triton.jit
def finished(m, total, acc, sink, row, rows_seen, SINKS: tl.constexpr):
    """(m, log l, whether a key was seen, out) of whole rows; of one without a sum 0, +inf and 0."""
    alive = total != 0
    if SINKS:
        sink = tl.where(row < rows_seen, sink, float("-inf"))
        top = tl.maximum(m, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp2((m - base) * LOG2E)
        total = total * fade + tl.exp2((sink - base) * LOG2E)
        acc = acc * fade[:, None]
        m = top
    summed = total != 0
    divisor = tl.where(summed, total, 1.0)
    result = tl.where(alive[:, None], acc / divisor[:, None], 0.0)
    log_l = tl.where(summed, tl.log(divisor), float("inf"))
    return tl.where(m == float("-inf"), 0.0, m), log_l, alive, result


@triton.jit(do_not_specialize=["heads", "q_len", "splits"])
def combine(
    parts,  # float32 (B, Hq, splits, Tq, Dv), contiguous
    m_parts,  # float32 (B, Hq, splits, Tq)
    l_parts,
    out,
    m_out,
    l_out,
    alive_out,
    sinks,
    q_lengths,
    length_stride,
    o_strides,
    heads,
    q_len,
    splits,
    DV: tl.constexpr,
    PAD_V: tl.constexpr,
    N: tl.constexpr,  # parts that are read together
    SINKS: tl.constexpr,
    Q_LENGTHS: tl.constexpr,
):
    """A row of several programs put together: added up in one order, whoever was done first.

    Reading is all that it does, and it is done when the last part has come: N of them are asked for
    before any is waited for.
    """
    pid = tl.program_id(0)
    row, bh = pid % q_len, (pid // q_len).to(tl.int64)
    b, h = bh // heads, bh % heads
    column = tl.arange(0, PAD_V)
    rows_seen = q_len
    if Q_LENGTHS:
        rows_seen = tl.minimum(tl.load(q_lengths + b * length_stride), q_len)
    m = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, PAD_V), tl.float32)
    for first in tl.range(0, splits, N):
        split = first + tl.arange(0, N)
        there = split < splits
        at = (bh * splits + split) * q_len + row
        more = tl.load(m_parts + at, mask=there, other=float("-inf"))
        found = tl.load(l_parts + at, mask=there, other=0.0)
        at = at[:, None] * DV + column[None, :]
        part = tl.load(parts + at, mask=there[:, None] & (column < DV)[None, :], other=0.0)
        top = tl.maximum(m, tl.max(more, 0, keep_dims=True))
        base = tl.where(top == float("-inf"), 0.0, top)
        fade, gain = tl.exp2((m - base) * LOG2E), tl.exp2((more - base) * LOG2E)
        total = total * fade + tl.sum(found * gain, 0, keep_dims=True)
        acc = acc * fade[:, None] + tl.sum(part * gain[:, None], 0, keep_dims=True)
        m = top
    sink = tl.full((1,), float("-inf"), tl.float32)
    if SINKS:
        sink = tl.zeros((1,), tl.float32) + tl.load(sinks + h).to(tl.float32)
    m, log_l, alive, result = finished(m, total, acc, sink, row, rows_seen, SINKS)
    at = bh * q_len + row + tl.arange(0, 1)
    tl.store(m_out + at, m)
    tl.store(l_out + at, log_l)
    tl.store(alive_out + at, alive.to(tl.int8))
    o_at = out + b * o_strides[0] + h * o_strides[1] + row.to(tl.int64) * o_strides[2]
    o_at += column[None, :].to(tl.int64) * o_strides[3]
    tl.store(o_at, result.to(out.dtype.element_ty), mask=(column < DV)[None, :])
