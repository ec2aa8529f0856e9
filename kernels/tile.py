"""One tile, forward and backward alike: its arrays, who may be seen, score and bias, dropout.

A tile has M rows and N keys. Rows are those of one head, or of the heads of a group one below the
other: every row knows its own head. What a mask and a score mean comes in as two device functions
(`source.py`); None stands for none, and what is then not needed is not compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def taken(
    x, strides, b, h, first, length,
    COUNT: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    WHOLE: tl.constexpr, DESCRIBED: tl.constexpr, wanted=None,
):  # fmt: skip
    """Rows from `first` on of a head of an array (B, H, T, D), (COUNT, PAD); beyond its ends 0.

    Args:
        x: a pointer, or a tensor descriptor of blocks (1, 1, COUNT, PAD) where DESCRIBED.
        length: T.
        WHOLE: whether all of these rows are known to be there.
        wanted: (COUNT,), or None: whether a row is wanted; one that is not comes in as zeros.
    """
    if DESCRIBED:
        found = tl.reshape(x.load([b, h, first, 0]), (COUNT, PAD))
        if wanted is not None:
            found = tl.where(wanted[:, None], found, 0.0).to(found.dtype)
    else:
        row, column = first + tl.arange(0, COUNT), tl.arange(0, PAD)
        at = x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
        at += row[:, None].to(tl.int64) * strides[2] + column[None, :].to(tl.int64) * strides[3]
        if wanted is not None:
            # By the load itself: what it leaves out need not pass through registers.
            found = tl.load(at, mask=wanted[:, None] & (column < D)[None, :], other=0.0)
        elif WHOLE and PAD == D:
            found = tl.load(at)
        elif WHOLE:
            found = tl.load(at, mask=(column < D)[None, :], other=0.0)
        else:
            found = tl.load(at, mask=(row < length)[:, None] & (column < D)[None, :], other=0.0)
    return found


@triton.jit
def put(
    found, x, strides, b, h, first, length,
    COUNT: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Writes what `taken` reads, rounded to what x holds."""
    row, column = first + tl.arange(0, COUNT), tl.arange(0, PAD)
    at = x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    at += row[:, None].to(tl.int64) * strides[2] + column[None, :].to(tl.int64) * strides[3]
    found = found.to(x.dtype.element_ty)
    tl.store(at, found, mask=(row < length)[:, None] & (column < D)[None, :])


@triton.jit
def add(
    found, x, strides, b, h, first, length,
    COUNT: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Adds to what `taken` reads, float32, by atomics: in whatever order programs come along."""
    if DESCRIBED:
        x.atomic_add([b, h, first, 0], tl.reshape(found, (1, 1, COUNT, PAD)))
    else:
        row, column = first + tl.arange(0, COUNT), tl.arange(0, PAD)
        at = x + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
        at += row[:, None].to(tl.int64) * strides[2] + column[None, :].to(tl.int64) * strides[3]
        there = (row < length)[:, None] & (column < D)[None, :]
        tl.atomic_add(at, found, mask=there, sem="relaxed")


@triton.jit
def facts_of(b, lengths, strides, q_len, k_len, KV_LENGTHS: tl.constexpr, Q_LENGTHS: tl.constexpr):
    """(query offset, rows seen, keys seen, q_len, k_len) of a batch.

    Args:
        lengths: kv_lengths, q_lengths and offsets; of the first two whatever they do not say.
        strides: 0 or 1 for each: whether there is one for each batch.
    """
    rows_seen, keys_seen = q_len, k_len
    if Q_LENGTHS:
        rows_seen = tl.minimum(tl.load(lengths[1] + b * strides[1]), q_len)
    if KV_LENGTHS:
        keys_seen = tl.minimum(tl.load(lengths[0] + b * strides[0]), k_len)
    return tl.load(lengths[2] + b * strides[2]), rows_seen, keys_seen, q_len, k_len


@triton.jit
def line_of(schedule, map_strides, b, kv_head, tile, width):
    """(where its tiles stand, how many are full, how many live) of a line of a schedule."""
    line = b * map_strides[0] + kv_head * map_strides[1] + tile
    order = schedule[0] + line.to(tl.int64) * width
    return order, tl.load(schedule[1] + line), tl.load(schedule[2] + line)


@triton.jit
def ahead_of(
    place, facts, arrays, partial,
    M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr, LOOKS: tl.constexpr,
):  # fmt: skip
    """What is read for every entry of a tile: (bias, bounds of logits, what the score looks up).

    A bound is inf where the mask allows the pair and -inf where it does not: the lesser of a logit
    and its bound is an instruction, of a full tile too, and hides NaN.

    Called before the product whose entries they meet, though not needed sooner: Triton lays a tile
    out among threads for the first of the two, and where that is a load it computes softmax twice,
    as the load and as the product have their numbers. And then it is on its way meanwhile.

    Args:
        partial: whether the mask is wanted.
        EARLY: whether the mask looks an array up at every entry.
        LOOKS: what the score looks up at every entry, as a device function, or None.
    """
    b, h, row, k, _ = place
    added, bound, looked = 0.0, 0.0, ()
    if BIAS:
        added = bias_of(b, h, row, k, facts, arrays)
    if EARLY:
        bound = tl.full((M, N), float("inf"), tl.float32)
        if partial:
            here = allowed_of(b, h, row, k, facts[0], facts[1], facts[2], arrays[0], MASK)
            bound = tl.where(here, bound, float("-inf"))
    if LOOKS is not None:
        batch = tl.full((1, 1), 0, tl.int32) + b
        looked = LOOKS(batch, h, row + facts[0], k, row, arrays[1])
    return added, bound, looked


@triton.jit
def judged(
    s,  # (M, N): scaled
    ahead,  # what `ahead_of` has read of the tile
    place,  # b, h (1, 1) or (M, 1), row (M, 1), k (1, N), the first key's position
    facts,  # offset, rows_seen, keys_seen, q_len, k_len
    arrays,  # mask operands, score operands, (bias,), its strides, (seed,)
    M: tl.constexpr,
    N: tl.constexpr,
    MASK: tl.constexpr,
    SCORE: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    LOOKS: tl.constexpr,
    MASKED: tl.constexpr,  # whether the tile is partial
):
    """(s with score and bias, whether it is allowed, all that the score gave), each (M, N).

    Where it is not allowed s is anything.
    """
    b, h, row, k, _ = place
    offset, rows_seen, keys_seen, _, _ = facts
    mask_operands, score_operands, _, _, _ = arrays
    allowed = tl.full((M, N), 1, tl.int1)
    found = (s,)
    if MASKED:
        if EARLY:
            allowed = ahead[1] > 0
        else:
            allowed = allowed & allowed_of(
                b, h, row, k, offset, rows_seen, keys_seen, mask_operands, MASK
            )
    if BIAS:
        allowed = allowed & (ahead[0] != float("-inf"))
    if SCORE is not None:
        # Where nothing is allowed s goes in as 0: what comes out there is selected away.
        batch, known = tl.full((1, 1), 0, tl.int32) + b, tl.where(allowed, s, 0.0)
        if LOOKS is None:
            found = SCORE(batch, h, row + offset, k, row, known, score_operands)
        else:
            found = SCORE(batch, h, row + offset, k, row, known, ahead[2], score_operands)
        s = tl.broadcast_to(found[0], (M, N))
        allowed = allowed & (s != float("-inf"))
    if BIAS:
        s = s + ahead[0]
        allowed = allowed & (s != float("-inf"))
    return s, allowed, found


@triton.jit
def allowed_of(b, h, row, k, offset, rows_seen, keys_seen, operands, MASK: tl.constexpr):
    """Mask, lengths, and the ends of rows and keys; broadcasts to the tile.

    Args:
        b, offset, rows_seen, keys_seen: of the batch.
        h, row, k: int32, 2-D: rows (M, 1) and keys (1, N), or the tile turned over.
    """
    allowed = (row < rows_seen) & (k < keys_seen)
    if MASK is not None:
        found = MASK(tl.full((1, 1), 0, tl.int32) + b, h, row + offset, k, row, operands)
        allowed = allowed & found[0]
    return allowed


@triton.jit
def bias_of(b, h, row, k, facts, arrays):
    """The bias over a tile, float32, by strides that are 0 where it does not span an axis.

    Beyond the last row or key it is 0.
    """
    _, _, bias, strides, _ = arrays
    at = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    at = at + row.to(tl.int64) * strides[2] + k.to(tl.int64) * strides[3]
    there = (row < facts[3]) & (k < facts[4])
    return tl.load(bias[0] + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def kept_of(
    seed, b, h, q, first, threshold,
    M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr = False,
):  # fmt: skip
    """Dropout's mask: word k mod 4 of Philox4x32-10 at (k // 4, q, h, b), k from `first`.

    Four neighbours along the keys share one counter, and are made together.

    Args:
        h, q: of each row, (M,).
        TURNED: whether the mask is (N, M), and not (M, N).
    """
    key0, key1 = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
    quads = (first // 4 + tl.arange(0, N // 4)).to(tl.uint32)
    batch = tl.zeros((1, 1), tl.uint32) + b.to(tl.uint32)
    AT: tl.constexpr = 0 if TURNED else 1
    quads = tl.expand_dims(quads, 1 - AT)
    rows, heads = tl.expand_dims(q.to(tl.uint32), AT), tl.expand_dims(h.to(tl.uint32), AT)
    w0, w1, w2, w3 = philox(quads, rows, heads, batch, key0, key1)
    # A key's word and its logit are held by different threads: a bit of each word moves, two in a
    # number. They are joined, since Triton, rather than move a number that is no part of a join,
    # would compute it where it is needed: the ten rounds by two or four threads.
    least = tl.cast(threshold, tl.uint32)
    low = (w0 >= least).to(tl.int32) | ((w1 >= least).to(tl.int32) << 1)
    high = (w2 >= least).to(tl.int32) | ((w3 >= least).to(tl.int32) << 1)
    two, bit = tl.join(low, high), 1 + tl.arange(0, 2)
    if TURNED:
        two = tl.reshape(tl.permute(two, (0, 2, 1)), (N // 2, M))
        kept = tl.reshape(two[:, None, :] & bit[None, :, None], (N, M))
    else:
        two = tl.reshape(two, (M, N // 2))
        kept = tl.reshape(two[:, :, None] & bit[None, None, :], (M, N))
    return kept != 0


@triton.jit
def philox(x0, x1, x2, x3, key0, key1):
    """The four words of Philox4x32-10 at counters that broadcast; all are uint32 (SPEC, section 7).

    `tl.philox` gives the same. It takes high and low half by a multiplication each, of counters of
    the tile's shape; here one multiplication gives both, and as long as rows and keys have not met
    in one word, for two rounds, there is a product for a row or a key and not for each pair.
    """
    for n in tl.static_range(10):
        if n > 0:
            key0 += 0x9E3779B9
            key1 += 0xBB67AE85
        high0, low0 = _halves(x0, 0xD2511F53)
        high2, low2 = _halves(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high2 ^ x1 ^ key0, low2, high0 ^ x3 ^ key1, low0
    return x0, x1, x2, x3


@triton.jit
def _halves(x, FACTOR: tl.constexpr):
    """(high, low): the words of a product."""
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)
