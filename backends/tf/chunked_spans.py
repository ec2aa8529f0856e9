"""Narrow masks: what a row of tiles sees, taken as one span of keys.

Under a window of 256 keys, tiles of 256 by 256 are half empty. Where the mask's map is known when
the call is traced, and every row of tiles sees few tiles that lie close together, these are one
tile, narrower and of any start::

    rows     64 i, ..., 64 i + 63
    keys     64 a, ..., 64 (a + slots) - 1          a = starts[i]

so that softmax has nothing to build up. One turn of the loop computes several such tiles of one
key head, side by side, as one product over a batch of them::

    queries     (height, G, 64, D)
    keys        (height, 64 slots, D)               gathered: neighbours share most of theirs
    logits      (height, G, 64, 64 slots)

Formulas, statistics and rules are those of `chunked_forward` and `chunked_backward`. What a problem
must be like is said in one place, `spans`; every other one is cut into tiles as before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf import chunked_parts as parts
from attn_core.backends.tf import chunked_written as written
from attn_core.backends.tf.arrays import DTYPES, Reading
from attn_core.backends.tf.chunked_backward import settled
from attn_core.backends.tf.chunked_forward import Rows, inverted
from attn_core.backends.tf.chunked_grid import AT_ONCE, cut_up
from attn_core.backends.tf.chunked_slots import Sums
from attn_core.blocks import BlockMap, block_map
from attn_core.language.tree import Tree
from attn_core.spec import Operands, Problem

Array = Any

_BLOCK = 64
"""Rows of a tile, and the grain of a span: half of what a window of 128 sees is seen."""
_KEPT = 2**22
"""Bytes that the patterns of a mask may take."""
_TOGETHER = 16
"""Tiles whose patterns are found at a time."""
_WORTH = 0.8
"""Entries of spans at most, as a share of those of the tiles that they stand in for."""


class Spans(NamedTuple):
    """The tiles of one key head.

    Attributes:
        mask: whose map they come from.
        offset: of the rows.
        block: rows of a tile; keys of a slot.
        slots: how many slots a span has.
        starts: int32 (turns, height), the first slot of the span of every row of tiles.
        firsts: int32 (turns,), the least start of a turn.
        reach: slots from that to the end of the turn's last span, at most.
        columns: slots along the keys.
        patterns: bool (P, block, keys), what the mask says of a tile: under a window nearly all
            tiles are alike.
        which: int32 (turns, height), the pattern of every tile.
        places: int32 (turns, height * keys), the keys of every tile, and in the place of one that
            no row of it sees one that some row does, of another tile if this one sees none:
            nothing is held against the weight 0 then.
    """

    mask: Tree
    offset: int
    block: int
    slots: int
    starts: np.ndarray
    firsts: np.ndarray
    reach: int
    columns: int
    patterns: np.ndarray
    which: np.ndarray
    places: np.ndarray

    @property
    def keys(self) -> int:
        """Keys of a span."""
        return self.slots * self.block


def spans(p: Problem) -> Spans | None:
    """The spans of a problem, or None where it is cut into tiles of the grid.

    They need a mask that is alike for all batches and heads and looks nothing up, known sizes that
    are multiples of `_BLOCK`, layout "BHTD", and neither lengths, offsets that are given, scores,
    biases, dropout nor weights. And they must pay: fewer entries than tiles have, not too few in a
    turn, and few patterns.
    """
    mask = p.mask
    if mask is None or mask.reads("b") or mask.reads("h") or p.layout != "BHTD":
        return None
    if any(step.op == "lookup" for step in mask.steps) or p.offset == "given":
        return None
    if p.kv_lengths or p.q_lengths or p.rate or p.return_weights:
        return None
    if p.bias is not None or p.score is not None or p.batch is None:
        return None
    if not p.q_len or not p.k_len or p.q_len % _BLOCK or p.k_len % _BLOCK:
        return None
    g = cut_up(p, p.batch, p.q_len, p.k_len, (False, False))
    offset = p.k_len - p.q_len if p.offset == "end" else 0
    sizes = (p.q_len, p.k_len, p.group)
    return _found(mask, sizes, offset, (g.block_q, g.block_k), (_BLOCK, AT_ONCE, _KEPT, _WORTH))


@lru_cache(maxsize=128)
def _found(
    mask: Tree,
    sizes: tuple[int, int, int],
    offset: int,
    tile: tuple[int, int],
    limits: tuple[int, int, int, float],
) -> Spans | None:
    (q_len, k_len, group), (block, room, kept, worth) = sizes, limits

    def read(block_q: int, block_k: int) -> BlockMap:
        blocks = {"block_q": block_q, "block_k": block_k}
        return block_map(mask, (), q_len=q_len, k_len=k_len, offsets=offset, **blocks)

    instead = read(*tile).live_count * tile[0] * tile[1]
    rows, columns = q_len // block, k_len // block
    if instead == 0 or rows * block * block > worth * instead:
        return None
    first, last = np.full(rows, columns), np.zeros(rows, np.int64)
    row_start, live, _ = read(block, block).lists()
    row = np.repeat(np.arange(rows), np.diff(row_start))
    np.minimum.at(first, row, live)
    np.maximum.at(last, row, live + 1)
    slots = int((last - first).max())
    entries = group * block * slots * block * 4
    if q_len * slots * block > worth * instead or entries > room:
        return None
    starts = np.minimum(first, columns - slots)
    height = max(n for n in range(1, rows + 1) if rows % n == 0 and n * entries <= room)
    if 4 * height * entries < room:
        # So little at a time that the loop would cost more than half empty tiles do.
        return None
    starts = starts.reshape(-1, height).astype(np.int32)
    firsts = starts.min(1)
    reach = int((starts.max(1) - firsts).max()) + slots
    found = _patterns(mask, offset, (block, slots * block), starts.ravel(), kept)
    if found is None:
        return None
    patterns, which = found
    # argmax: the first key that is seen.
    seen = np.asarray(patterns.any(1))
    near = np.where(seen, np.arange(slots * block), seen.argmax(1)[:, None])
    places = starts.reshape(-1, 1) * block + near[which]
    blind = ~np.any(seen, axis=1)[which]
    if blind.all():
        return None
    places[blind] = places[~blind][0, 0]
    return Spans(
        *(mask, offset, block, slots, starts, firsts, reach, columns, patterns),
        which.reshape(starts.shape).astype(np.int32),
        places.reshape(len(starts), -1).astype(np.int32),
    )


def _patterns(
    mask: Tree, offset: int, tile: tuple[int, int], starts: np.ndarray, kept: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(patterns, the number of each tile's pattern); None where they are too many to keep.

    They are facts of the call, found beside the graph that is traced: a handful of tiles at a time.
    """
    (block, keys), numbers, which = tile, dict[bytes, int](), list[int]()
    with tf.init_scope(), tf.device("CPU:0"):
        if not tf.executing_eagerly():
            return None
        zero = tf.zeros((1, 1, 1), tf.int32)
        for first in range(0, len(starts), _TOGETHER):
            start = tf.constant(starts[first : first + _TOGETHER], tf.int32)
            number = tf.range(first, first + len(start))
            row = number[:, None, None] * block + tf.range(block)[:, None]
            key = start[:, None, None] * block + tf.range(keys)
            index = {"b": zero, "h": zero, "q": row + offset, "k": key, "row": row}
            found = Reading("float32", ()).read(mask, index, ())[0]
            for seen in tf.broadcast_to(found, (len(start), block, keys)).numpy():
                which.append(numbers.setdefault(seen.tobytes(), len(numbers)))
            if len(numbers) * block * keys > kept:
                return None
    tiles = [np.frombuffer(seen, bool).reshape(block, keys) for seen in numbers]
    return np.stack(tiles), np.array(which)


class _Cut:
    """Reads the tiles of a turn, and what the mask says of them."""

    def __init__(self, p: Problem, s: Spans) -> None:
        self.p, self.s = p, s
        self.turns, self.height = s.starts.shape
        self.starts = tf.constant(s.starts)
        self.patterns, self.which = tf.constant(s.patterns), tf.constant(s.which)
        self.places = tf.constant(s.places)

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

    def keys(self, x: Array, n: Array, clean: bool) -> Array:
        """(height, keys, X) of (B, Hk, Tk, X); none that no row sees if `clean`."""
        at, turn = self.head(n)
        last, s = x.shape[-1], self.s
        if clean:
            place = tf.gather(self.places, turn) + at * (s.columns * s.block)
            found = tf.gather(tf.reshape(x, (-1, last)), place)
        else:
            slot = tf.gather(self.starts, turn)[:, None] + tf.range(s.slots) + at * s.columns
            found = tf.gather(tf.reshape(x, (-1, s.block * last)), slot)
        found = tf.reshape(found, (self.height, s.keys, last))
        return tf.cast(found, DTYPES[self.p.accumulation])

    def hide(self, x: Array, n: Array, instead: Array) -> Array:
        """`x` where the mask allows it, and else `instead`, a `constant`."""
        allowed = tf.gather(self.patterns, tf.gather(self.which, n % self.turns))[:, None]
        return tf.where(allowed, self.unfolded(x), instead)

    def sighted(self, n: Array) -> Array:
        """Which rows see a key, (height, 1, block, 1)."""
        some = tf.constant(self.s.patterns.any(-1, keepdims=True))
        return tf.gather(some, tf.gather(self.which, n % self.turns))[:, None]

    def constant(self, value: float) -> Array:
        """To be selected instead of a tile: made once, of a tile's shape if that is the mask's.

        A select of equal shapes takes half the time of one that repeats one of them.
        """
        found = tf.constant(value, DTYPES[self.p.accumulation])
        shape = (self.height, 1, self.s.block, self.s.keys)
        return tf.fill(shape, found) if self.p.group == 1 else found

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
    batch = int(p.batch or 0)
    dtype, cut = DTYPES[p.accumulation], _Cut(p, s)
    count = batch * p.kv_heads * cut.turns
    shape = (cut.height, p.group, s.block)
    arrays = [
        cut.blank(count, p.v_width, DTYPES[p.dtype]),
        *[tf.TensorArray(dtype, count, element_shape=(*shape, 1)) for _ in range(2)],
    ]
    low = cut.constant(-np.inf)
    sinks = None if x.sinks is None else tf.cast(x.sinks, dtype)

    def turn(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        q = tf.cast(cut.rows(x.query, n), dtype) * p.scale
        z = tf.matmul(cut.folded(q), cut.keys(x.key, n, False), transpose_b=True)
        z = cut.hide(z, n, low)
        top = tf.reduce_max(z, -1, keepdims=True)
        share = tf.nn.softmax(z)
        most = tf.reduce_max(share, -1, keepdims=True)
        acc = cut.unfolded(tf.matmul(cut.folded(share), cut.keys(x.value, n, True)))
        if sinks is None:
            fade = tf.cast(tf.not_equal(top, -np.inf), dtype)
        else:
            sink = tf.reshape(sinks, (p.kv_heads, 1, p.group, 1, 1))
            fade = _settled(top, most, tf.gather(sink, cut.head(n)[0] % p.kv_heads))[3]
        out = tf.math.multiply_no_nan(acc, fade)
        whole = cut.put(carry[0], n, tf.cast(out, DTYPES[p.dtype]))
        return (whole, carry[1].write(n, top), carry[2].write(n, most))

    whole, *found = parts.loop(0, count, turn, arrays)
    whole = tf.reshape(whole, (batch, p.heads, -1, p.v_width))
    top, most = (cut.gather_up(a.stack(), batch)[..., 0] for a in found)
    return Rows(whole, *_settled(top, most, None if sinks is None else sinks[:, None])[:3])


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
    heads, low = batch * p.kv_heads, cut.constant(-np.inf)
    none = tf.zeros_like(rows.total)
    living = tf.cast(rows.alive, dtype)
    moved = None if d_lse is None else tf.where(tf.not_equal(rows.total, 0), d_lse, none)
    blind = not s.patterns.any(-1).all()
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
        k, v = cut.keys(x.key, n, True), cut.keys(x.value, n, False)
        z = cut.hide(tf.matmul(q, k, transpose_b=True), n, low)
        share = tf.nn.softmax(z)
        if blind:
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
            lone, all_of, rest = tf.equal(one(rows.total, n), 1), slope, (share, fade)
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
    shapes = [(s.columns, s.block * last) for last in widths]
    key, value = (
        tf.TensorArray(a.dtype, heads, element_shape=shape)
        for a, shape in zip((x.key, x.value), shapes, strict=True)
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
        written = (key.write(at, tf.cast(dk, key.dtype)), value.write(at, tf.cast(dv, value.dtype)))
        return (query, deltas, *written)

    query, deltas, key, value = parts.loop(0, heads, head, (query, deltas, key, value))
    d_sinks = None
    if x.sinks is not None:
        t = cut.gather_up(deltas.stack(), batch)[..., 0]
        sinks = tf.cast(x.sinks, dtype)[:, None]
        share = tf.exp(sinks - rows.m) * inverted(rows.total)
        share = tf.where(tf.equal(sinks, -np.inf), none, -share * t)
        d_sinks = tf.cast(tf.reduce_sum(share, (0, 2)), x.sinks.dtype)
    d_key, d_value = (
        tf.reshape(a.stack(), (batch, p.kv_heads, -1, last))
        for a, last in zip((key, value), widths, strict=True)
    )
    d_query = tf.reshape(query, (batch, p.heads, -1, p.width))
    return Operands(query=d_query, key=d_key, value=d_value, sinks=d_sinks)
