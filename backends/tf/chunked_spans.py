"""Spans of keys, one to every row of tiles: attention under the masks that `chunked_narrow` knows.

One turn of the loop computes several tiles of one key head, side by side, as one product over a
batch of them::

    queries     (height, G, 64, D)
    keys        (height, 64 slots, D)               gathered: neighbours share most of theirs
    logits      (height, G, 64, 64 slots)

Formulas, statistics and rules are those of `chunked_forward` and `chunked_backward`; but the sums
of the rows are not needed to compute a tile again, since softmax finds them in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from attn_core.backends.tf import chunked_parts as parts
from attn_core.backends.tf import chunked_written as written
from attn_core.backends.tf.arrays import DTYPES
from attn_core.backends.tf.chunked_backward import settled
from attn_core.backends.tf.chunked_forward import Rows, inverted
from attn_core.backends.tf.chunked_narrow import Spans
from attn_core.backends.tf.chunked_slots import Sums
from attn_core.spec import Operands, Problem

Array = Any


class _Cut:
    """Reads the tiles of a turn, and what the mask says of them."""

    def __init__(self, p: Problem, s: Spans) -> None:
        self.p, self.s = p, s
        self.turns, self.height = s.starts.shape
        self.starts = tf.constant(s.starts)
        self.blind = not s.patterns.any(-1).all()
        # For every query head of a key head: repeated rows of a table cost less than a broadcast.
        which = np.repeat(s.which[..., None], p.group, -1)
        self.patterns, self.which = s.patterns, tf.constant(which)
        low, high = (tf.constant(x, DTYPES[p.accumulation]) for x in (-np.inf, np.inf))
        self.caps = tf.where(tf.constant(s.patterns), high, low)
        self.low = low

    def head(self, n: Array) -> tuple[Array, Array]:
        """(number of the key head through all batches, turn within it)."""
        return n // self.turns, n % self.turns

    def rows(self, x: Array, n: Array) -> Array:
        """(height, G, block, X) of (B, Hq, Tq, X)."""
        last = x.shape[-1]
        x = tf.reshape(x, (-1, self.height, self.s.block, last))
        if self.p.group == 1:
            return tf.gather(x, n)[:, None]
        return tf.transpose(tf.gather(x, self.place(n)), (1, 0, 2, 3))

    def place(self, n: Array) -> Array:
        """Where the rows of a turn lie, in turns of query heads: (G,)."""
        at, turn = self.head(n)
        return (at * self.p.group + tf.range(self.p.group)) * self.turns + turn

    def blank(self, count: int, last: int, dtype: Any) -> Array:
        """Room for what `count` turns leave."""
        return written.blank(count * self.p.group, self.height * self.s.block * last, dtype)

    def put(self, whole: Array, n: Array, x: Array) -> Array:
        """`whole` with what a turn leaves, (height, G, block, X), where its rows lie."""
        if self.p.group > 1:
            x = tf.transpose(x, (1, 0, 2, 3))
        return written.put(whole, self.place(n)[None], tf.reshape(x, (1, self.p.group, -1)))

    def keys(self, x: Array, n: Array) -> Array:
        """(height, keys, X) of (B, Hk, Tk, X); none that no row sees."""
        at, turn = self.head(n)
        last, s = x.shape[-1], self.s
        if s.places is not None:
            place = tf.gather(tf.constant(s.places), turn) + at * (s.columns * s.block)
            found = tf.gather(tf.reshape(x, (-1, last)), place)
        else:
            slot = tf.gather(self.starts, turn)[:, None] + tf.range(s.slots) + at * s.columns
            found = tf.gather(tf.reshape(x, (-1, s.block * last)), slot)
        found = tf.reshape(found, (self.height, s.keys, last))
        return tf.cast(found, DTYPES[self.p.accumulation])

    def hide(self, x: Array, n: Array) -> Array:
        """`x`, (height, G * block, keys), where the mask allows it, and else -inf.

        The lesser of `x` and -inf, or +inf: a select takes five times as long. NaN stays, which
        here comes of a key that is seen, or of a row that may see no key and is selected away.
        """
        caps = tf.gather(self.caps, tf.gather(self.which, n % self.turns))
        x = tf.minimum(self.unfolded(x), caps)
        return tf.where(self.sighted(n), x, self.low) if self.blind else x

    def sighted(self, n: Array) -> Array:
        """Which rows see a key, (height, G, block, 1)."""
        some = tf.constant(self.patterns.any(-1, keepdims=True))
        return tf.gather(some, tf.gather(self.which, n % self.turns))

    def gather_up(self, stacked: Array, batch: int) -> Array:
        """(B, Hq, Tq, X) of what the turns leave, (turns of all heads, height, G, block, X)."""
        p, last = self.p, stacked.shape[-1]
        if p.group > 1:
            inner = (self.turns, self.height, p.group, self.s.block, last)
            stacked = tf.reshape(stacked, (batch * p.kv_heads, *inner))
            stacked = tf.transpose(stacked, (0, 3, 1, 2, 4, 5))
        return tf.reshape(stacked, (batch, p.heads, -1, last))

    def folded(self, x: Array) -> Array:
        """(height, G * block, X), for a product with keys."""
        return tf.reshape(x, (self.height, -1, x.shape[-1]))

    def unfolded(self, x: Array) -> Array:
        return tf.reshape(x, (self.height, self.p.group, self.s.block, x.shape[-1]))


def forward(p: Problem, x: Operands, s: Spans) -> Rows:
    """All rows; their maxima and sums, which take a fifth of the time, only where they are read."""
    batch = int(p.batch or 0)
    dtype, cut = DTYPES[p.accumulation], _Cut(p, s)
    count = batch * p.kv_heads * cut.turns
    told = p.return_lse or x.sinks is not None
    kinds = (dtype, dtype) if told else (tf.bool,)
    shape = (cut.height, p.group, s.block, 1)
    arrays = [
        cut.blank(count, p.v_width, DTYPES[p.dtype]),
        *[tf.TensorArray(kind, count, element_shape=shape) for kind in kinds],
    ]
    sinks = None if x.sinks is None else tf.cast(x.sinks, dtype)

    every = tf.ones(shape, tf.bool)

    def faded(acc: Array, top: Array, most: Array, n: Array) -> Array:
        fade = tf.cast(tf.not_equal(top, -np.inf), dtype)
        if sinks is not None:
            sink = tf.reshape(sinks, (p.kv_heads, 1, p.group, 1, 1))
            fade = _settled(top, most, tf.gather(sink, cut.head(n)[0] % p.kv_heads))[3]
        return tf.math.multiply_no_nan(acc, fade)

    def turn(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        q = cut.folded(tf.cast(cut.rows(x.query, n), dtype) * p.scale)
        k = cut.keys(x.key, n)
        z = cut.hide(tf.matmul(q, k, transpose_b=True), n)
        share = tf.nn.softmax(z)
        acc = cut.unfolded(tf.matmul(cut.folded(share), cut.keys(x.value, n)))
        if told:
            top, most = (tf.reduce_max(a, -1, keepdims=True) for a in (z, share))
            out, kept = faded(acc, top, most, n), [top, most]
        else:
            # A row all of whose logits are -inf has shares of 0 / 0. They are computed again where
            # that is asked: while somebody might read them, softmax cannot take their place.
            hollow = tf.reduce_any(tf.math.is_nan(share[..., :1]))
            out, alive = tf.cond(
                hollow,
                lambda: _living(acc, cut.hide(tf.matmul(q, k, transpose_b=True), n)),
                lambda: (acc, every),
            )
            kept = [alive]
        whole = cut.put(carry[0], n, tf.cast(out, DTYPES[p.dtype]))
        return (whole, *[a.write(n, x) for a, x in zip(carry[1:], kept, strict=True)])

    whole, *found = parts.loop(0, count, turn, arrays)
    whole = tf.reshape(whole, (batch, p.heads, -1, p.v_width))
    first, *rest = (cut.gather_up(a.stack(), batch)[..., 0] for a in found)
    if not told:
        return Rows(whole, None, None, first)
    return Rows(whole, *_settled(first, rest[0], None if sinks is None else sinks[:, None])[:3])


def _living(acc: Array, z: Array) -> tuple[Array, Array]:
    """(what the rows get, 0 of those all of whose logits are -inf; which rows are others)."""
    alive = tf.not_equal(tf.reduce_max(z, -1, keepdims=True), -np.inf)
    return tf.math.multiply_no_nan(acc, tf.cast(alive, acc.dtype)), alive


def _settled(top: Array, most: Array, sink: Array | None) -> tuple[Array, Array, Array, Array]:
    """(m, total, alive, what the shares of a row keep beside its sink).

    Args:
        top, most: the greatest logit and the largest share of every row.
    """
    hidden = tf.equal(top, -np.inf)
    m = tf.where(hidden, tf.zeros_like(top), top)
    # exp(m - m), which an infinite maximum makes NaN, over the largest share.
    total = tf.where(hidden, tf.zeros_like(m), tf.exp(m - m) / most)
    alive, fade = tf.not_equal(total, 0), tf.cast(tf.logical_not(hidden), m.dtype)
    if sink is not None:
        top = tf.where(hidden, sink, tf.maximum(m, sink))
        m, before = tf.where(tf.equal(top, -np.inf), tf.zeros_like(top), top), m
        fade = tf.where(alive, total * tf.exp(before - m), tf.zeros_like(m))
        total = fade + tf.exp(sink - m)
        fade = fade / tf.where(tf.equal(total, 0), tf.ones_like(total), total)
    return m, total, alive, fade


def backward(
    p: Problem, x: Operands, s: Spans, rows: Rows, cotangents: tuple[Array, Array | None, Any]
) -> Operands:
    batch = int(p.batch or 0)
    dtype, cut = DTYPES[p.accumulation], _Cut(p, s)
    d_out, d_lse, _ = cotangents
    heads = batch * p.kv_heads
    living = tf.cast(rows.alive, dtype)
    moved = None
    if d_lse is not None:
        moved = tf.where(tf.not_equal(rows.total, 0), d_lse, tf.zeros_like(d_lse))
    within = Sums.of(s.starts[..., None] + np.arange(s.slots) - s.firsts[:, None, None], s.reach)

    def one(array: Array, n: Array) -> Array:
        return cut.rows(array[..., None], n)

    def turn(at: Array, turns: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        n = at * cut.turns + turns
        query, deltas, dk, dv = carry
        alive = one(living, n)
        pulled = tf.math.multiply_no_nan(tf.cast(cut.rows(d_out, n), dtype), alive)
        delta = tf.reduce_sum(pulled * tf.cast(cut.rows(rows.out, n), dtype), -1, keepdims=True)
        if moved is not None:
            delta -= one(moved, n)
        q = tf.cast(cut.rows(x.query, n), dtype)
        q = cut.folded(tf.math.multiply_no_nan(q, alive * p.scale))
        k, v = cut.keys(x.key, n), cut.keys(x.value, n)
        z = cut.hide(tf.matmul(q, k, transpose_b=True), n)
        share = tf.nn.softmax(z)
        if cut.blind:
            share = tf.where(cut.sighted(n), share, tf.zeros((), dtype))
        fade = alive
        if x.sinks is not None:
            # What the keys have beside the sink, whose sum is found as in the forward pass.
            top, most = (tf.reduce_max(a, -1, keepdims=True) for a in (z, share))
            fade = tf.exp(top - one(rows.m, n)) / (most * one(rows.total, n))
            fade = tf.math.multiply_no_nan(fade, alive)
            pulled = pulled * fade
        pulled = cut.folded(pulled)
        # No weight, no gradient, whatever comes of values that may not be seen.
        slope = cut.unfolded(tf.matmul(pulled, v, transpose_b=True)) - delta * fade
        slope = tf.math.multiply_no_nan(slope, share)
        if d_lse is None:
            # A sum of 1 is a largest share of 1.
            total = tf.reduce_max(share, -1, keepdims=True)
            if x.sinks is not None:
                total = one(rows.total, n)
            lone, all_of, rest = tf.equal(total, 1), slope, (share, fade)
            slope = tf.cond(
                tf.reduce_any(lone),
                lambda: settled(all_of, rest[0] * rest[1], lone),
                lambda: all_of,
            )
        slope = cut.folded(slope)
        dq = cut.unfolded(tf.matmul(slope, k)) * p.scale
        # Spans of a turn overlap: summed in the slots from its least start on.
        sums = []
        for left, right in ((slope, q), (cut.folded(share), pulled)):
            pieces = tf.matmul(left, right, transpose_a=True)
            pieces = tf.reshape(pieces, (cut.height * s.slots, -1))
            sums.append(within.over(pieces, turns))
        return (
            cut.put(query, n, tf.cast(dq, x.query.dtype)),
            deltas.write(n, delta),
            dk.write(turns, sums[0]),
            dv.write(turns, sums[1]),
        )

    outer = (cut.height, p.group, s.block)
    widths = (p.width, p.v_width)
    count = heads * cut.turns
    query = cut.blank(count, p.width, x.query.dtype)
    deltas = tf.TensorArray(dtype, count, element_shape=(*outer, 1))
    key, value = (
        written.blank(heads, s.columns * s.block * last, a.dtype)
        for a, last in zip((x.key, x.value), widths, strict=True)
    )
    # A turn may reach beyond the end by slots that hold nothing.
    every = Sums.of(s.firsts[None, :, None] + np.arange(s.reach), s.columns + s.reach)

    def head(at: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        query, deltas, key, value = carry
        fresh = [
            tf.TensorArray(dtype, cut.turns, element_shape=(s.reach, s.block * last))
            for last in widths
        ]
        inner = (query, deltas, *fresh)
        query, deltas, *found = parts.loop(0, cut.turns, lambda t, c: turn(at, t, c), inner)
        dk, dv = (
            every.over(tf.reshape(a.stack(), (cut.turns * s.reach, -1)), 0)[: s.columns]
            for a in found
        )
        place = tf.reshape(at, (1, 1))
        key, value = (
            written.put(whole, place, tf.cast(tf.reshape(d, (1, 1, -1)), whole.dtype))
            for whole, d in ((key, dk), (value, dv))
        )
        return (query, deltas, key, value)

    query, deltas, key, value = parts.loop(0, heads, head, (query, deltas, key, value))
    d_sinks = None
    if x.sinks is not None:
        t = cut.gather_up(deltas.stack(), batch)[..., 0]
        sinks = tf.cast(x.sinks, dtype)[:, None]
        share = tf.exp(sinks - rows.m) * inverted(rows.total)
        share = tf.where(tf.equal(sinks, -np.inf), tf.zeros_like(share), -share * t)
        d_sinks = tf.cast(tf.reduce_sum(share, (0, 2)), x.sinks.dtype)
    d_key, d_value = (
        tf.reshape(a, (batch, p.kv_heads, -1, last))
        for a, last in zip((key, value), widths, strict=True)
    )
    d_query = tf.reshape(query, (batch, p.heads, -1, p.width))
    return Operands(query=d_query, key=d_key, value=d_value, sinks=d_sinks)
