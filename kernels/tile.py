"""One tile of logits, forward and backward alike: who may be seen, score and bias, dropout.

A tile has M rows and N keys. Rows are those of one head, or of the heads of a group one below the
other: every row knows its own head. What a mask and a score mean comes in as two device functions
(`source.py`); None stands for none, and what is then not needed is not compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def bias_of(bias, b, h, row, k, strides, q_len, k_len):
    """The bias over a tile, float32, by strides that are 0 where it does not span an axis.

    Beyond the last row or key it is 0.
    """
    at = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    at = at + row.to(tl.int64) * strides[2] + k.to(tl.int64) * strides[3]
    return tl.load(bias + at, mask=(row < q_len) & (k < k_len), other=0.0).to(tl.float32)


@triton.jit
def scored(s, allowed, b, h, row, k, offset, operands, FUNCTION: tl.constexpr):
    """Results of a score, or of its derivative, each broadcasting to the tile.

    Where nothing is allowed s goes in as 0: what comes out there is selected away.
    """
    batch = tl.full((1, 1), 0, tl.int32) + b
    return FUNCTION(batch, h, row + offset, k, row, tl.where(allowed, s, 0.0), operands)


@triton.jit
def kept_of(seed, b, h, q, first, threshold, M: tl.constexpr, N: tl.constexpr):
    """Dropout's mask, (M, N): word k mod 4 of Philox4x32-10 at (k // 4, q, h, b), k from `first`.

    Four neighbours along the keys share one counter, and are made together.
    """
    low, high = tl.load(seed).to(tl.uint64), tl.load(seed + 1).to(tl.uint64)
    zero = tl.zeros((M, N // 4), tl.uint32)
    quads = (first // 4 + tl.arange(0, N // 4)).to(tl.uint32)[None, :] + zero
    rows, heads = q.to(tl.uint32)[:, None] + zero, h.to(tl.uint32)[:, None] + zero
    w0, w1, w2, w3 = tl.philox(low | (high << 32), quads, rows, heads, b.to(tl.uint32) + zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, (M, N)) >= threshold
