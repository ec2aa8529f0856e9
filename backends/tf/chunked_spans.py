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

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf import chunked_loops as loops
from attn_core.backends.tf import chunked_written as written
from attn_core.backends.tf.arrays import DTYPES
from attn_core.backends.tf.chunked_backward import settled
from attn_core.backends.tf.chunked_forward import Rows, inverted
from attn_core.backends.tf.chunked_narrow import Spans
from attn_core.backends.tf.chunked_slots import Sums
from attn_core.spec import Operands, Problem

Array = Any


class _Turn(NamedTuple):
    """What the mask says of the tiles of a turn, the same in every head.

    Attributes:
        caps: (height, G, block, keys), +inf where it allows, else -inf.
        some: bool (height, G, block, 1), which rows see a key; None where all do.
        lone: as `some`, which rows see one key and no other.
    """

    caps: Array
    some: Array | None
    lone: Array


class _Cut:
    """Reads the tiles of a turn, and what the mask says of them."""

    def __init__(self, p: Problem, s: Spans) -> None:
        self.p, self.s = p, s
        self.turns, self.height = s.starts.shape
        self.starts = tf.constant(s.starts)
        self.blind = not s.patterns.any(-1).all()
        # For every query head of a key head: repeated rows of a table cost less than a broadcast.
        which = np.repeat(s.which[..., None], p.group, -1)
        self.which = tf.constant(which)
        self.low, high = (tf.constant(x, DTYPES[p.accumulation]) for x in (-np.inf, np.inf))
        self.caps = tf.where(tf.constant(s.patterns), high, self.low)
        self.seen = s.patterns.sum(-1, keepdims=True)

    def turn(self, t: Array) -> _Turn:
        which = tf.gather(self.which, t)
        some = tf.gather(tf.constant(self.seen > 0), which) if self.blind else None
        lone = tf.gather(tf.constant(self.seen == 1), which)
        return _Turn(tf.gather(self.caps, which), some, lone)

    def over(self, heads: int, body: Any, carry: Sequence[Any]) -> tuple[Any, ...]:
        """`carry = body(turn, n, carry)` for each turn n of all heads.

        The heads take the same turn one after the other: what the mask says of it is read once.
        """

        def outer(t: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            now = self.turn(t)
            inner = partial(turn, now, t)
            return loops.loop(0, heads, inner, carry, loops.SIDE_BY_SIDE)

        def turn(now: _Turn, t: Array, at: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            found: tuple[Any, ...] = body(now, at * self.turns + t, carry)
            return found

        return loops.loop(0, self.turns, outer, carry)

    def head(self, n: Array) -> tuple[Array, Array]:
        """(number of the key head through all batches, turn within it)."""
        return n // self.turns, n % self.turns

    def rows(self, x: Array, n: Array) -> Array:
        """(height, G, block, X) of (B, Hq, Tq, X)."""
        last = x.shape[-1]
        if self.p.group == 1:
            # They lie one after the other: such a slice is no copy.
            rows = self.height * self.s.block
            found = tf.slice(tf.reshape(x, (-1, last)), [n * rows, 0], [rows, last])
            return tf.reshape(found, (self.height, 1, self.s.block, last))
        x = tf.reshape(x, (-1, self.height, self.s.block, last))
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

    def hide(self, x: Array, now: _Turn) -> Array:
        """`x`, (height, G * block, keys), where the mask allows it, and else -inf.

        The lesser of `x` and -inf, or +inf: a select takes five times as long. NaN stays, which
        here comes of a key that is seen, or of a row that may see no key and is selected away.
        """
        x = tf.minimum(self.unfolded(x), now.caps)
        return x if now.some is None else tf.where(now.some, x, self.low)

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
    heads = batch * p.kv_heads
    count = heads * cut.turns
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
        acc = tf.math.multiply_no_nan(acc, tf.cast(tf.not_equal(top, -np.inf), dtype))
        if sinks is None:
            return acc
        sink = tf.reshape(sinks, (p.kv_heads, 1, p.group, 1, 1))
        # Not one that hides NaN: beside its sink a row may keep nothing, and still see.
        return acc * _settled(top, most, tf.gather(sink, cut.head(n)[0] % p.kv_heads))[3]

    def turn(now: _Turn, n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        q = cut.folded(tf.cast(cut.rows(x.query, n), dtype) * p.scale)
        k = cut.keys(x.key, n)
        z = cut.hide(tf.matmul(q, k, transpose_b=True), now)
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
                lambda: _living(acc, cut.hide(tf.matmul(q, k, transpose_b=True), now)),
                lambda: (acc, every),
            )
            kept = [alive]
        whole = cut.put(carry[0], n, tf.cast(out, DTYPES[p.dtype]))
        return (whole, *[a.write(n, x) for a, x in zip(carry[1:], kept, strict=True)])

    whole, *found = cut.over(heads, turn, arrays)
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


class _Tile(NamedTuple):
    """What the gradients of a turn are made of.

    Attributes:
        query: (height, G * block, D), and 0 of rows that may see no key.
        pulled: the same of dO, and beside a sink of what it leaves.
        delta: (height, G, block, 1), sum(dO * O).
        share, slope: (height, G * block, keys), P and what the products get, times the scale.
        d_query: as `query`.
    """

    query: Array
    pulled: Array
    delta: Array
    share: Array
    slope: Array
    d_query: Array


def backward(
    p: Problem, x: Operands, s: Spans, rows: Rows, cotangents: tuple[Array, Array | None, Any]
) -> Operands:
    """Gradients of query, key, value and sinks.

    A turn is computed without a select, and again with all of them where its dQ holds a NaN. That
    takes a row without keys, whose shares are 0 / 0, or a NaN or an infinity in what is read, which
    a weight of 0 would not keep away; without one no select changes a bit.
    """
    batch = int(p.batch or 0)
    dtype, cut = DTYPES[p.accumulation], _Cut(p, s)
    d_out, d_lse, _ = cotangents
    heads, zero = batch * p.kv_heads, tf.zeros((), dtype)
    moved = None
    if d_lse is not None:
        moved = tf.where(tf.not_equal(rows.total, 0), d_lse, tf.zeros_like(d_lse))
    within = Sums.of(s.starts[..., None] + np.arange(s.slots) - s.firsts[:, None, None], s.reach)

    def read(array: Array, n: Array) -> Array:
        return tf.cast(cut.rows(array, n), dtype)

    def one(array: Array, n: Array) -> Array:
        return cut.rows(array[..., None], n)

    def tile(now: _Turn, n: Array, k: Array, v: Array, exact: bool) -> _Tile:
        q, pulled = read(x.query, n), read(d_out, n)
        alive = one(rows.alive, n) if exact else None
        if alive is not None:
            q, pulled = (tf.where(alive, a, zero) for a in (q, pulled))
        delta = tf.reduce_sum(pulled * read(rows.out, n), -1, keepdims=True)
        if moved is not None:
            delta -= one(moved, n)
        z = tf.matmul(cut.folded(q * p.scale), k, transpose_b=True)
        # Where a weight may not be 0 but must be: rows that see nothing, and what they hide.
        kept = now.some
        if alive is not None:
            kept = alive & (now.caps > 0)
            z = tf.where(kept, cut.unfolded(z), cut.low)
        else:
            z = cut.hide(z, now)
        share = tf.nn.softmax(z)
        if kept is not None:
            share = tf.where(kept, share, zero)
        whole, base, total = pulled, delta, None
        if x.sinks is not None:
            # What the keys have beside the sink, whose sum is found as in the forward pass.
            top, most = (tf.reduce_max(a, -1, keepdims=True) for a in (z, share))
            total = one(rows.total, n)
            fade = tf.exp(top - one(rows.m, n)) / (most * total)
            fade = fade if alive is None else tf.where(alive, fade, zero)
            whole, base = pulled * fade, delta * fade
        factor, lone = tf.constant(p.scale, dtype), None
        if d_lse is None and x.sinks is None:
            # A sum of 1 is a largest share of 1: always of a row that sees a single key. What its
            # logit gets is the rounding of a difference of equals, and is made 0 beforehand.
            lone = tf.equal(tf.reduce_max(share, -1, keepdims=True), 1)
            if alive is None:
                lone &= tf.logical_not(now.lone)
                factor = tf.where(now.lone, zero, factor)
        elif d_lse is None:
            lone = tf.equal(total, 1)
        slope = tf.matmul(cut.folded(whole * factor), v, transpose_b=True)
        slope = share * (cut.unfolded(slope) - base * factor)
        if kept is not None and alive is not None:
            slope = tf.where(kept, slope, zero)
        if lone is not None:
            weight = share if x.sinks is None else share * fade
            all_of, every = slope, lone
            slope = tf.cond(
                tf.reduce_any(every), lambda: settled(all_of, weight, every), lambda: all_of
            )
        slope = cut.folded(slope)
        dq = tf.matmul(slope, k)
        return _Tile(cut.folded(q), cut.folded(whole), delta, cut.folded(share), slope, dq)

    def turn(now: _Turn, n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        query, key, value, *deltas = carry
        k, v = cut.keys(x.key, n), cut.keys(x.value, n)
        fast = tile(now, n, k, v, exact=False)
        odd = tf.math.is_nan(tf.reduce_sum(fast.d_query))
        found = _Tile(*tf.cond(odd, lambda: tile(now, n, k, v, exact=True), lambda: fast))
        # Spans of a turn overlap: summed in the slots from its least start on.
        at, t = cut.head(n)
        place = tf.gather(s.firsts, t) + tf.range(s.reach) + at * s.columns
        sums = []
        for whole, left, right in (
            (key, found.slope, found.query),
            (value, found.share, found.pulled),
        ):
            pieces = tf.matmul(left, right, transpose_a=True)
            pieces = tf.reshape(pieces, (cut.height * s.slots, -1))
            sums.append(written.add(whole, place, within.over(pieces, t)))
        dq = tf.cast(cut.unfolded(found.d_query), x.query.dtype)
        return (
            cut.put(query, n, dq),
            *sums,
            *[a.write(n, found.delta) for a in deltas],
        )

    count, widths = heads * cut.turns, (p.width, p.v_width)
    start = [cut.blank(count, p.width, x.query.dtype)]
    start += [
        written.blank(heads * s.columns, s.block * last, dtype, zeros=True) for last in widths
    ]
    if x.sinks is not None:
        outer = (cut.height, p.group, s.block, 1)
        start.append(tf.TensorArray(dtype, count, element_shape=outer))
    query, key, value, *deltas = cut.over(heads, turn, start)
    d_sinks = None
    if x.sinks is not None:
        t = cut.gather_up(deltas[0].stack(), batch)[..., 0]
        sinks = tf.cast(x.sinks, dtype)[:, None]
        share = tf.exp(sinks - rows.m) * inverted(rows.total)
        share = tf.where(tf.equal(sinks, -np.inf), tf.zeros_like(share), -share * t)
        d_sinks = tf.cast(tf.reduce_sum(share, (0, 2)), x.sinks.dtype)
    made = [
        tf.cast(tf.reshape(a, (batch, count, -1, b.shape[-1])), b.dtype)
        for a, b, count in (
            (query, x.query, p.heads),
            (key, x.key, p.kv_heads),
            (value, x.value, p.kv_heads),
        )
    ]
    return Operands(**dict(zip(("query", "key", "value"), made, strict=True)), sinks=d_sinks)
