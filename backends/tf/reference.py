"""The formula in TensorFlow's own operations; O(Tq * Tk) memory, every option, every transform.

Selection comes before every product: what may not be seen is replaced by zero before it is
multiplied, so that no 0 * NaN arises forward or backward, and every result is selected once more
where a cotangent could carry poison in. The running maximum is held constant under
differentiation, which leaves first and higher derivatives exact, since the result does not depend
on it. Sizes that a tf.function does not know are read at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from attn_core.backends.tf.arrays import DTYPES, Reading, sizes
from attn_core.backends.tf.philox import keep
from attn_core.language.tree import Tree
from attn_core.language.values import drop_threshold
from attn_core.spec import FAR, AttentionOutput, Operands, Problem

Array = Any


def attend(p: Problem, x: Operands) -> AttentionOutput:
    dtype = DTYPES[p.accumulation]
    q, k, v = [tf.cast(_heads_first(a, p), dtype) for a in (x.query, x.key, x.value)]
    full = (sizes(q)[0], p.heads, sizes(q)[2], sizes(k)[2])
    index = indices(p, x, *full)
    fit(p.mask, x.mask, full)
    fit(p.score, x.score, full)
    allowed = tf.broadcast_to(structure(p, x, index), full)
    bias = None if x.bias is None else tf.cast(x.bias, dtype)
    if bias is not None:
        allowed = allowed & tf.not_equal(bias, -np.inf)
    if p.score is not None:
        # A score may hide keys too, by -inf, whatever the bias is there; what it hides must not be
        # multiplied either.
        logits = tf.stop_gradient(_logits(p, x, q, k, None, index, allowed))
        allowed = allowed & tf.not_equal(logits, -np.inf)
    logits = _logits(p, x, q, k, bias, index, allowed)
    allowed = allowed & tf.not_equal(tf.stop_gradient(logits), -np.inf)
    rows, seen = tf.reduce_any(allowed, -1), _seen(p, allowed)

    hidden = tf.where(allowed, logits, -np.inf)
    m = tf.reduce_max(tf.stop_gradient(hidden), -1)
    sinks = None
    if x.sinks is not None:
        sinks = tf.broadcast_to(tf.cast(x.sinks, dtype)[:, None], full[:3])
        if x.q_lengths is not None:
            sinks = tf.where(_valid(p, x, index), sinks, -np.inf)
        m = tf.maximum(m, tf.stop_gradient(sinks))
    m = tf.where(tf.equal(m, -np.inf), tf.zeros_like(m), m)
    e = tf.where(allowed, tf.exp(hidden - m[..., None]), 0.0)
    total = tf.reduce_sum(e, -1)
    if sinks is not None:
        total = total + tf.exp(sinks - m)
    summed = tf.not_equal(total, 0)
    total = tf.where(summed, total, 1.0)
    weights = tf.where(allowed, e / total[..., None], 0.0)
    lse = tf.where(summed, m + tf.math.log(total), -np.inf)
    shares = weights
    if p.rate:
        threshold = drop_threshold(p.rate)
        kept = keep(threshold, x.seed, full[0], p.heads, index["q"][:, 0, :, 0], full[3])
        shares = tf.where(kept, weights * (1 / (1 - p.rate)), 0.0)
    out = tf.cast(_select(_product(p, shares, _select(v, seen)), rows), x.query.dtype)
    return AttentionOutput(
        _heads_first(out, p),
        lse if p.return_lse else None,
        tf.cast(weights, x.query.dtype) if p.return_weights else None,
    )


def fit(tree: Tree | None, tables: Sequence[Array], full: tuple[Any, ...]) -> None:
    """What `check` could not hold against unknown sizes: an axis looked up at b, h or row, or at k
    in a dense array, has one entry for each of them or one for all. Look-ups clamp, and would hide
    it.
    """
    for step in () if tree is None else tree.steps:
        if step.op != "lookup":
            continue
        read = [tree.steps[a] for a in step.args] if tree is not None else []
        names = [s.value if s.op == "index" else None for s in read]
        axes = dict(zip(("b", "h", "row", "k"), full, strict=True))
        if names not in (["b", "h", "row", "k"], ["row", "k"]):
            del axes["k"]
        for name, size in zip(names, sizes(tables[int(step.value or 0)]), strict=True):
            if name not in axes or (isinstance(size, int) and isinstance(axes[name], int)):
                continue
            fits = tf.equal(size, 1) | tf.equal(size, axes[name])
            message = (
                f"operand {step.value}, looked up at [{name}], must have that many entries or 1"
            )
            tf.debugging.Assert(fits, [message, size, axes[name]])


def indices(p: Problem, x: Operands, batch: Any, heads: int, q_len: Any, k_len: Any) -> Any:
    """b, h, q, k and row as int32 tensors that broadcast to (B, Hq, Tq, Tk)."""
    row = tf.range(q_len)[None, None, :, None]
    return {
        "b": tf.range(batch)[:, None, None, None],
        "h": tf.range(heads)[None, :, None, None],
        "q": row + offset(p, x, q_len, k_len),
        "k": tf.range(k_len)[None, None, None, :],
        "row": row,
    }


def offset(p: Problem, x: Operands, q_len: Any, k_len: Any) -> Array:
    """query_offset as int32, (B or 1, 1, 1, 1)."""
    if p.offset == "zero":
        return tf.zeros((1, 1, 1, 1), tf.int32)
    if p.offset == "given":
        given = tf.clip_by_value(tf.cast(x.query_offset, tf.int64), -FAR, FAR)
        return tf.reshape(tf.cast(given, tf.int32), (-1, 1, 1, 1))
    keys = k_len if x.kv_lengths is None else lengths(x.kv_lengths, k_len)
    rows = q_len if x.q_lengths is None else lengths(x.q_lengths, q_len)
    return tf.reshape(keys - rows, (-1, 1, 1, 1))


def lengths(given: Array, most: Any) -> Array:
    """Lengths clamped to [0, most]: traced values cannot raise."""
    most = tf.cast(most, tf.int64)
    return tf.cast(tf.clip_by_value(tf.cast(given, tf.int64), 0, most), tf.int32)


def structure(p: Problem, x: Operands, index: dict[str, Array]) -> Array:
    """Mask and lengths, before bias and score have a say; broadcasts to (B, Hq, Tq, Tk)."""
    allowed = tf.ones((1, 1, 1, 1), tf.bool)
    if p.mask is not None:
        allowed = allowed & Reading(p.accumulation, x.mask).read(p.mask, index, x.mask)[0]
    if x.kv_lengths is not None:
        keys = tf.reshape(tf.cast(x.kv_lengths, tf.int64), (-1, 1, 1, 1))
        allowed = allowed & (tf.cast(index["k"], tf.int64) < keys)
    if x.q_lengths is not None:
        allowed = allowed & _valid(p, x, index)[..., None]
    return allowed


def _valid(p: Problem, x: Operands, index: dict[str, Array]) -> Array:
    """(B or 1, 1, Tq): the row is no padding."""
    rows = tf.reshape(tf.cast(x.q_lengths, tf.int64), (-1, 1, 1))
    return tf.cast(index["row"][..., 0], tf.int64) < rows


def _logits(
    p: Problem, x: Operands, q: Array, k: Array, bias: Array | None, index: Any, allowed: Array
) -> Array:
    """The scaled product with score and bias, from selected operands."""
    q, k = _select(q, tf.reduce_any(allowed, -1)), _select(k, _seen(p, allowed))
    z = p.scale * _product(p, q, k, turned=True)
    if p.score is not None:
        s = tf.where(allowed, z, 0.0)
        reading = Reading(p.accumulation, x.score, allowed)
        z = reading.read(p.score, {**index, "s": s}, x.score)[0]
        z = tf.broadcast_to(z, sizes(allowed))
    if bias is not None:
        z = z + tf.where(allowed, bias, 0.0)
    return z


def _heads_first(x: Array, p: Problem) -> Array:
    """(B, H, T, D) from the layout, or back: the exchange is its own inverse."""
    return x if p.layout == "BHTD" else tf.transpose(x, (0, 2, 1, 3))


def _seen(p: Problem, allowed: Array) -> Array:
    """(B, Hk, Tk): some query of the group may see the key."""
    batch, _, rows, keys = sizes(allowed)
    return tf.reduce_any(tf.reshape(allowed, (batch, p.kv_heads, p.group * rows, keys)), 2)


def _select(x: Array, rows: Array) -> Array:
    return tf.where(rows[..., None], x, 0.0)


def _product(p: Problem, a: Array, b: Array, turned: bool = False) -> Array:
    """(B, Hq, T, X) @ (B, Hk, X, Y), the heads of a group as one tall matrix.

    `turned`: b comes as (B, Hk, Y, X), which saves a copy.
    """
    batch, _, rows, inner = sizes(a)
    folded = tf.reshape(a, (batch, p.kv_heads, p.group * rows, inner))
    product = tf.matmul(folded, b, transpose_b=turned)
    return tf.reshape(product, (batch, p.heads, rows, sizes(product)[-1]))
