"""Runs of keys, of a length that a graph finds out: packed documents, and whatever is like them.

Of a mask that looks something up nothing is known when the call is traced. What its map says there,
in the graph, may still be that each row of tiles sees a few tiles that lie together::

    rows     128 i, ..., 128 i + 127
    keys     128 a, ..., 128 (a + n) - 1            a = first[i], n = count[i]

Then such a run is one tile, as in `chunked_spans`, and softmax has nothing to build up. Rows of
tiles take turns in the order of n, so that those of a turn, which all have the longest run among
them, have little more than their own. Whether runs pay is asked in the graph too, of the forward
pass and of the backward pass alike; where they do not, the grid is computed, and under XLA always,
since it wants shapes that are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf import chunked_loops as loops
from attn_core.backends.tf import chunked_written as written
from attn_core.backends.tf.arrays import DTYPES, Reading
from attn_core.backends.tf.chunked_backward import settled
from attn_core.backends.tf.chunked_forward import Rows
from attn_core.backends.tf.chunked_grid import traced
from attn_core.language.tree import Tree
from attn_core.spec import Operands, Problem

Array = Any

BLOCK = 128
"""Rows of a tile, and the grain of a run."""
AT_ONCE = 2**22
"""Bytes that the logits of one turn take at most, as long as it has several rows of tiles."""
ALONE = 2**23
"""Bytes that those of a single row of tiles may take: a longer run does not pay."""
SHORT = 4
"""Tiles of a run of which so many heads are taken together that a turn still has room for it."""


def possible(p: Problem) -> Tree | None:
    """The mask of a problem that may have runs, as far as is known when the call is traced.

    A mask that is alike for all batches and heads and looks something up, known sizes that are
    multiples of two blocks, layout "BHTD", and neither lengths, offsets that are given, scores,
    biases, sinks, dropout nor weights.
    """
    mask = p.mask
    if mask is None or mask.reads("b") or mask.reads("h") or p.layout != "BHTD":
        return None
    if not any(step.op == "lookup" for step in mask.steps) or p.offset == "given":
        return None
    if p.kv_lengths or p.q_lengths or p.rate or p.return_weights or p.sinks_dtype is not None:
        return None
    if p.bias is not None or p.score is not None or not p.batch or not p.q_len or not p.k_len:
        return None
    fits = p.q_len % (2 * BLOCK) == p.k_len % (2 * BLOCK) == 0 and heads(p) > 0
    return mask if fits else None


def heads(p: Problem) -> int:
    """Key heads of a turn, through all batches; 0 where one is too many."""
    every = (p.batch or 0) * p.kv_heads
    room = AT_ONCE // (p.group * SHORT * BLOCK * BLOCK * 4)
    return max((n for n in range(1, every + 1) if every % n == 0 and n <= room), default=0)


def either(
    p: Problem,
    mask: Tree,
    x: Operands,
    runs: Callable[[Runs], list[Array]],
    grid: Callable[..., list[Array]],
    given: Sequence[Array] = (),
    elsewhere: Callable[[], Sequence[Array]] | None = None,
) -> list[Array]:
    """`runs` where the graph finds that they pay, else `grid`; results are alike in shape.

    Args:
        given: the arguments of `grid`.
        elsewhere: what they are where no runs are taken: under XLA, and on other devices than a
            CPU. That may be another place than where the forward pass was.
    """
    # Traced once, for both places where it may be called.
    once = tf.function(grid, autograph=False).get_concrete_function(*given)

    def asked() -> list[Array]:
        found = _found(p, mask, x)
        result: list[Array] = tf.cond(found.pay, lambda: runs(found), lambda: once(*given))
        return result

    def never() -> list[Array]:
        result: list[Array] = once(*(given if elsewhere is None else elsewhere()))
        return result

    result: list[Array] = tf.__internal__.execute_fn_for_device({"CPU": asked}, never)
    return result


class Runs(NamedTuple):
    """What the map says.

    Attributes:
        mask: whose map it is.
        first, count: int32 (rows,), the run of each row of tiles, at least of one tile.
        order: int32 (rows,), rows of tiles from the shortest run to the longest.
        together: how many of them one turn has.
        pay: bool, whether runs are few entries and short enough for a turn.
    """

    mask: Tree
    first: Array
    count: Array
    order: Array
    together: Array
    pay: Array


def _found(p: Problem, mask: Tree, x: Operands) -> Runs:
    rows, columns = (p.q_len or 0) // BLOCK, (p.k_len or 0) // BLOCK
    live = tf.cast(traced(p, x, (rows, columns), BLOCK) > 0, tf.int32)
    first = tf.argmax(live, 1, tf.int32)
    last = columns - tf.argmax(live[:, ::-1], 1, tf.int32)
    count = tf.where(tf.reduce_max(live, 1) > 0, last - first, 1)
    instead = tf.reshape(live, (rows // 2, 2, columns // 2, 2))
    entries = 4 * tf.reduce_sum(tf.reduce_max(instead, (1, 3)))
    of_tile = heads(p) * p.group * BLOCK * BLOCK * 4
    longest = of_tile * tf.reduce_max(count)
    pay = (longest <= ALONE) & (tf.reduce_sum(count) <= entries)
    order = tf.argsort(count, stable=True)
    return Runs(mask, first, count, order, tf.maximum(AT_ONCE // longest, 1), pay)


class _Turn:
    """Reads what one turn computes: c rows of tiles, n tiles of keys each, of H' key heads.

    Attributes:
        rows, keys: where they lie, in blocks of query heads (H', c, G) and of key heads (H', c, n).
        allowed: bool (c, G * block, n * block), what the mask says.
        caps: of the same shape, inf where it allows, else -inf.
        seen: bool (c, n * block), the keys that some row of the tile sees.
    """

    def __init__(self, p: Problem, x: Operands, runs: Runs, turns: Array, n: Array) -> None:
        self.p, at, turn = p, n // turns, n % turns
        tall, wide = (p.q_len or 0) // BLOCK, (p.k_len or 0) // BLOCK
        tiles = runs.order[turn * runs.together : (turn + 1) * runs.together]
        count = tf.reduce_max(tf.gather(runs.count, tiles))
        first = tf.minimum(tf.gather(runs.first, tiles), wide - count)
        head = tf.reshape(tf.range(heads(p)) + at * heads(p), (-1, 1, 1))
        self.rows = (head * p.group + tf.range(p.group)) * tall + tiles[:, None]
        self.keys = head * wide + first[:, None] + tf.range(count)
        self.c, self.length = tf.size(tiles), count * BLOCK
        zero, block = tf.zeros((1, 1, 1), tf.int32), tf.range(BLOCK)
        row = tiles[:, None, None] * BLOCK + block[:, None]
        key = first[:, None, None] * BLOCK + tf.range(self.length)
        offset = (p.k_len or 0) - (p.q_len or 0) if p.offset == "end" else 0
        index = {"b": zero, "h": zero, "q": row + offset, "k": key, "row": row}
        low, high = (tf.constant(a, DTYPES[p.accumulation]) for a in (-np.inf, np.inf))
        allowed = Reading(p.accumulation, x.mask).read(runs.mask, index, x.mask)[0]
        self.allowed = tf.broadcast_to(allowed, (self.c, BLOCK, self.length))
        # In the place of a key that no row of its tile sees, one that some row does.
        self.seen = tf.reduce_any(self.allowed, 1)
        instead = tf.argmax(tf.cast(self.seen, tf.int32), 1, tf.int32)[:, None]
        place = tf.where(self.seen, tf.range(self.length), instead) + first[:, None] * BLOCK
        self.places = tf.reshape(head * (wide * BLOCK) + place, (-1,))
        if p.group > 1:
            self.allowed = tf.tile(self.allowed, (1, p.group, 1))
        self.caps = tf.where(self.allowed, high, low)

    def read(self, x: Array) -> Array:
        """(H' * c, G * block, X) of (B, Hq, Tq, X)."""
        last = x.shape[-1]
        found = tf.gather(tf.reshape(x, (-1, BLOCK * last)), tf.reshape(self.rows, (-1,)))
        found = tf.reshape(found, (-1, self.p.group * BLOCK, last))
        return tf.cast(found, DTYPES[self.p.accumulation]) if x.dtype.is_floating else found

    def read_keys(self, x: Array) -> Array:
        """(H' * c, n * block, X) of (B, Hk, Tk, X)."""
        last = x.shape[-1]
        found = tf.reshape(
            tf.gather(tf.reshape(x, (-1, last)), self.places),
            (heads(self.p) * self.c, self.length, last),
        )
        return tf.cast(found, DTYPES[self.p.accumulation])

    def hide(self, z: Array) -> Array:
        """`z` where the mask allows it, else -inf, and NaN where it is NaN: as in spans."""
        hidden = tf.minimum(tf.reshape(z, (heads(self.p), -1)), tf.reshape(self.caps, (1, -1)))
        return tf.reshape(hidden, tf.shape(z))

    def select(self, z: Array, instead: float) -> Array:
        """`z` where the mask allows it, whatever it is elsewhere: five times the price."""
        allowed = tf.tile(self.allowed, (heads(self.p), 1, 1))
        return tf.where(allowed, z, tf.constant(instead, z.dtype))

    def select_keys(self, x: Array) -> Array:
        """(H' * c, n * block, X), 0 for keys that no row of their tile sees."""
        return tf.where(tf.tile(self.seen, (heads(self.p), 1))[..., None], x, tf.zeros_like(x))

    def put(self, whole: Array, x: Array) -> Array:
        rows = tf.reshape(self.rows, (-1,))
        x = tf.cast(tf.reshape(x, (-1, whole.shape[-1])), whole.dtype)
        return tf.raw_ops.InplaceUpdate(x=whole, i=rows, v=x)

    def add(self, whole: Array, x: Array) -> Array:
        """One after the other: several rows of tiles see the same keys."""
        keys = tf.reshape(self.keys, (-1,))
        return tf.raw_ops.InplaceAdd(x=whole, i=keys, v=tf.reshape(x, (-1, whole.shape[-1])))


def _turns(p: Problem, runs: Runs) -> tuple[Array, Array]:
    """(turns of some heads, turns in all)."""
    rows = (p.q_len or 0) // BLOCK
    turns = -(-rows // runs.together)
    return turns, turns * ((p.batch or 0) * p.kv_heads // heads(p))


def _exact(tile: Callable[[bool], list[Array]]) -> list[Array]:
    """What a tile gives, computed again with every select where its first result holds a NaN.

    That takes a row without keys, whose shares are 0 / 0, or a NaN or an infinity in what is read.
    Without one no select changes a bit.
    """
    fast = tile(False)
    odd = tf.math.is_nan(tf.reduce_sum(fast[0]))
    found: list[Array] = tf.cond(odd, lambda: tile(True), lambda: fast)
    return found


def _blank(p: Problem, last: int, dtype: Any) -> Array:
    rows = (p.batch or 0) * p.heads * ((p.q_len or 0) // BLOCK)
    return written.blank(rows, BLOCK * last, dtype)


def forward(p: Problem, x: Operands, runs: Runs) -> Rows:
    """All rows; m and total are 0 where nobody reads them."""
    dtype = DTYPES[p.accumulation]
    turns, count = _turns(p, runs)

    def turn(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        now = _Turn(p, x, runs, turns, n)
        q, k, v = now.read(x.query) * p.scale, now.read_keys(x.key), now.read_keys(x.value)

        def tile(exact: bool) -> list[Array]:
            z = tf.matmul(q, k, transpose_b=True)
            z = now.select(z, -np.inf) if exact else now.hide(z)
            share = tf.nn.softmax(z)
            acc = tf.matmul(share, v)
            alive = tf.ones_like(acc[..., :1])
            if exact:
                top = tf.reduce_max(z, -1, keepdims=True)
                alive = tf.cast(tf.not_equal(top, -np.inf), dtype)
                acc = tf.math.multiply_no_nan(acc, alive)
            found = [acc, alive]
            if p.return_lse:
                top, most = (tf.reduce_max(a, -1, keepdims=True) for a in (z, share))
                # exp(m - m), which an infinite maximum makes NaN, over the largest share.
                kept = (top, tf.exp(top - top) / most)
                found += [tf.where(alive > 0, a, tf.zeros_like(a)) for a in kept]
            return found

        found = _exact(tile)
        return tuple(now.put(a, b) for a, b in zip(carry, found, strict=True))

    start = [_blank(p, p.v_width, DTYPES[p.dtype]), _blank(p, 1, dtype)]
    start += [_blank(p, 1, dtype) for _ in range(2 * p.return_lse)]
    out, *kept = loops.loop(tf.constant(0), count, turn, start, loops.SIDE_BY_SIDE)
    shape = (p.batch, p.heads, p.q_len)
    alive, *rest = (tf.reshape(a, shape) for a in kept)
    m, total = rest or (tf.zeros_like(alive), tf.zeros_like(alive))
    return Rows(tf.reshape(out, (*shape, p.v_width)), m, total, alive > 0)


def backward(
    p: Problem, x: Operands, runs: Runs, rows: Rows, cotangents: tuple[Array, Array | None, Any]
) -> Operands:
    dtype = DTYPES[p.accumulation]
    d_out, d_lse, _ = cotangents
    turns, count = _turns(p, runs)
    living = tf.cast(rows.alive, dtype)[..., None]
    moved = None if d_lse is None else tf.math.multiply_no_nan(d_lse[..., None], living)

    def turn(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        now = _Turn(p, x, runs, turns, n)
        query, pulled_all, out = now.read(x.query), now.read(d_out), now.read(rows.out)
        k, v = now.read_keys(x.key), now.read_keys(x.value)

        def tile(exact: bool) -> list[Array]:
            q, pulled, alive = query * p.scale, pulled_all, now.read(living) if exact else None
            if alive is not None:
                q = tf.math.multiply_no_nan(query, alive * p.scale)
                pulled = tf.math.multiply_no_nan(pulled, alive)
            delta = tf.reduce_sum(pulled * out, -1, keepdims=True)
            if moved is not None:
                delta -= now.read(moved)
            z = tf.matmul(q, k, transpose_b=True)
            share = tf.nn.softmax(now.select(z, -np.inf) if exact else now.hide(z))
            if alive is not None:
                share = now.select(tf.math.multiply_no_nan(share, alive), 0)
            slope = share * (tf.matmul(pulled, v, transpose_b=True) - delta)
            if alive is not None:
                slope = now.select(tf.where(alive > 0, slope, tf.zeros_like(slope)), 0)
            if d_lse is None:
                lone, all_of = tf.equal(tf.reduce_max(share, -1, keepdims=True), 1), slope
                slope = tf.cond(
                    tf.reduce_any(lone), lambda: settled(all_of, share, lone), lambda: all_of
                )
            dq = tf.matmul(slope, k) * p.scale
            dk, dv = (tf.matmul(a, b, transpose_a=True) for a, b in ((slope, q), (share, pulled)))
            if alive is not None:
                dq = tf.math.multiply_no_nan(dq, alive)
                dk, dv = now.select_keys(dk), now.select_keys(dv)
            return [dq, dk, dv]

        dq, dk, dv = _exact(tile)
        return now.put(carry[0], dq), now.add(carry[1], dk), now.add(carry[2], dv)

    columns = (p.batch or 0) * p.kv_heads * ((p.k_len or 0) // BLOCK)
    start = [_blank(p, p.width, DTYPES[p.dtype])]
    start += [
        written.blank(columns, BLOCK * last, dtype, zeros=True) for last in (p.width, p.v_width)
    ]
    found = loops.loop(tf.constant(0), count, turn, start, loops.SIDE_BY_SIDE)
    given = (x.query, x.key, x.value)
    made = [tf.cast(tf.reshape(a, b.shape), b.dtype) for a, b in zip(found, given, strict=True)]
    return Operands(*made)
