"""How a problem is cut into tiles, and which of them are computed.

Blocks are 256 rows by 512 keys, or by 256 under masks beyond causal, or 512 by 2048 of one head
without a mask; where one axis is short the other is cut more coarsely, so that a tile keeps its
area. An axis that fits into one block is a
tile of just its length. Batches and heads join a tile as long as it stays within a few MB, and
unless the map tells them apart.
The status of a tile comes from the mask's intervals: on the host, where nothing that it depends on
is a tensor, else in the graph, where sizes may be unknown. Tiles that a part holds of several
batches or heads are live if one of them is, and full if all are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf.chunked_parts import Geometry, Inputs, lay_out
from attn_core.backends.tf.tiles import Tiles
from attn_core.blocks import FULL, PARTIAL, block_map
from attn_core.footprint import differs
from attn_core.language.intervals import Intervals
from attn_core.language.rules import HOST
from attn_core.schedule import Schedule, of_status
from attn_core.spec import Operands, Problem
from attn_core.whole import CAUSAL

Array = Any

_ROWS, _KEYS, _KEYS_MASKED = 256, 512, 256
"""Rows and keys of a tile: products large enough for both cores, logits that stay in the cache.

Under a mask that hides more than a causal one does, as windows and documents do, the wider tile
would be mostly empty.
"""

_ROWS_WHOLE, _KEYS_WHOLE = 512, 2048
"""Without a mask: rows of all query heads of a key head together.

There a tile of one head is as good as one of many, and its rows and keys, which lie together, need
not be copied; and what is done once for a row of a tile is done for many keys. Of short lengths a
tile holds more heads, also where it is only seen in the graph that they are short.
"""

_LONGEST = 4096
"""Rows or keys of a tile at most, where the other axis is short."""
AT_ONCE = 2**22
"""Bytes that the logits of one tile may take."""


class Plan(NamedTuple):
    """The tiles to compute.

    Attributes:
        status: integers (parts of the map, rows, columns), of every tile; NumPy's where they are
            known.
        parts: how many parts the map tells apart, along batches and along key heads.
        some_full, some_partial: whether there may be such tiles.
        single: there is one tile, and it is live.
    """

    status: Array
    parts: tuple[bool, bool]
    some_full: bool
    some_partial: bool
    single: bool


def geometry(p: Problem, x: Operands) -> Geometry:
    q_axis = 2 if p.layout == "BHTD" else 1
    batch, q_len, k_len = (
        tf.shape(array)[axis] if size is None else size
        for size, array, axis in (
            (p.batch, x.query, 0),
            (p.q_len, x.query, q_axis),
            (p.k_len, x.key, q_axis),
        )
    )
    return cut_up(p, batch, q_len, k_len, _reads(p, x))


def cut_up(p: Problem, batch: Any, q_len: Any, k_len: Any, reads: tuple[bool, bool]) -> Geometry:
    """`reads`: whether the map may differ from batch to batch, and from head to head."""
    # An unknown size may turn out to be 0, where there still is a tile, of nothing.
    if not isinstance(batch, int):
        batch = tf.maximum(batch, 1)
    tall, keys = _ROWS, _KEYS if p.mask in (None, CAUSAL) else _KEYS_MASKED
    whole = p.mask is None and not (p.kv_lengths or p.q_lengths)
    if whole:
        tall, keys = max(_ROWS_WHOLE // p.group, _ROWS // 4), _KEYS_WHOLE
    least, area = tall, tall * keys
    if isinstance(k_len, int) and k_len < keys:
        tall = min(_LONGEST, area // k_len // 8 * 8)
    block_q, rows = _blocks(q_len, tall)
    wide = keys
    if isinstance(block_q, int) and block_q < least:
        wide = min(_LONGEST, area // block_q // 8 * 8)
    block_k, columns = _blocks(k_len, wide)
    # In one tile nothing is skipped, whatever the map tells apart.
    one = rows * columns == 1 if isinstance(rows * columns, int) else tf.equal(rows * columns, 1)
    of_head = p.group * block_q * block_k * 4
    reads_b, reads_h = reads
    heads = _most(p.kv_heads, AT_ONCE // of_head)
    heads = _either(one, heads, 1) if reads_h else heads
    every = heads == p.kv_heads if isinstance(heads, int) else tf.equal(heads, p.kv_heads)
    batches = _most_of(batch, _either(every, AT_ONCE // (heads * of_head), 1))
    batches = _either(one, batches, 1) if reads_b else batches
    return Geometry(
        batch,
        q_len,
        k_len,
        block_q,
        block_k,
        rows,
        columns,
        batches,
        heads,
        (batch // batches, p.kv_heads // heads),
        not isinstance(q_len, int) or rows * block_q != q_len,
        not isinstance(k_len, int) or columns * block_k != k_len,
    )


def _blocks(length: Any, block: int) -> tuple[Any, Any]:
    """(size, count) of the tiles of an axis; a size is a multiple of 8 where there are several.

    Counted anew from the size, which may be larger than a `block` that is none: a tile that began
    beyond the end would be read, and written, where others are.
    """
    if isinstance(length, int):
        count = -(-length // block)
        size = length if count == 1 else -(-length // (8 * count)) * 8
        return size, -(-length // size)
    length = tf.maximum(length, 1)
    count = -(-length // block)
    size = tf.where(count > 1, -(-length // (8 * count)) * 8, length)
    return size, -(-length // size)


def _most(count: int, room: Any) -> Any:
    """The greatest divisor of `count` within `room`, at least 1."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    if isinstance(room, int):
        return max(n for n in divisors if n <= room or n == 1)
    fitting = tf.constant(divisors)
    return tf.reduce_max(tf.where(fitting <= room, fitting, 1)) if count > 1 else 1


def _most_of(count: Any, room: Any) -> Any:
    """All of `count`, or the greatest divisor where it is known, within `room`; else 1."""
    if isinstance(count, int):
        return _most(count, room)
    return tf.where(count <= room, count, 1)


def _either(condition: Any, x: Any, instead: Any) -> Any:
    """Chosen now where the condition is known now, else in the graph."""
    if isinstance(condition, bool):
        return x if condition else instead
    return tf.where(condition, x, instead)


def _reads(p: Problem, x: Operands) -> tuple[bool, bool]:
    """Whether the map may differ from batch to batch, and from head to head."""
    batch, head = differs(p)
    # Of length 1 they hold for all, which the problem does not say.
    given = (x.kv_lengths, x.q_lengths, x.query_offset)
    each = any(a is not None and a.shape[0] != 1 for a in given)
    return batch and (each or (p.mask is not None and p.mask.reads("b"))), head


def plan(p: Problem, x: Inputs, g: Geometry, asked: Operands) -> Plan:
    reads_b, reads_h = _reads(p, asked)
    host = _host(p, g)
    some_full = some_partial = True
    alone = isinstance(g.rows, int) and isinstance(g.columns, int) and g.rows * g.columns == 1
    if alone and (host is None or (host != host[:1, :1]).any()):
        # One tile: to ask whether it may be skipped takes longer than to compute it.
        host = np.full((1, 1, 1, 1), PARTIAL)
    if alone:
        host, reads_b, reads_h = host[:1, :1], False, False
    if host is not None:
        some_full, some_partial = bool((host == FULL).any()), bool((host == PARTIAL).any())
    # (parts, B', parts, Hk' * G, rows, columns), with 1 for what the map does not tell apart.
    inside = g.heads * p.group
    apart = (reads_b, reads_h)
    (batches, b), (heads, h) = (
        ((count, size) if reads else (1, 1))
        for reads, count, size in zip(apart, g.parts, (g.batches, inside), strict=True)
    )
    shape = (batches, b, heads, h, g.rows, g.columns)
    if host is not None:
        status = host.reshape(shape)
        least, most = status.min((1, 3)), status.max((1, 3))
        status = np.where(least >= FULL, least, np.minimum(most, PARTIAL))
        status = status.reshape(-1, g.rows, g.columns)
    else:
        status = tf.reshape(_traced(p, x, g, apart), shape)
        least, most = (f(status, (1, 3)) for f in (tf.reduce_min, tf.reduce_max))
        status = tf.where(least >= FULL, least, tf.minimum(most, PARTIAL))
        status = tf.reshape(status, (batches * heads, g.rows, g.columns))
    single = alone and (some_full or some_partial)
    return Plan(status, apart, some_full, some_partial, single)


def schedule(todo: Plan, columns: bool = False) -> Schedule:
    """Of every row, or every column, of tiles: (parts, lines, width) and twice (parts, lines)."""
    if isinstance(todo.status, np.ndarray):
        found = of_status(HOST, todo.status.swapaxes(1, 2) if columns else todo.status)
        return found if todo.single else Schedule(*[tf.constant(a, tf.int32) for a in found])
    status = tf.transpose(todo.status, (0, 2, 1)) if columns else todo.status
    order, full, live = (tf.cast(x, tf.int32) for x in of_status(Tiles(), status))
    return Schedule(order, full, live)


def _host(p: Problem, g: Geometry) -> Any:
    """The status grid (Bm, Hm, rows, columns) where it is known now, else None."""
    sizes = (g.batch, g.q_len, g.k_len)
    known = all(isinstance(size, int) for size in sizes)
    looks_up = p.mask is not None and any(step.op == "lookup" for step in p.mask.steps)
    if not known or looks_up or p.kv_lengths or p.q_lengths or p.offset == "given":
        return None
    found = block_map(
        p.mask,
        q_len=g.q_len,
        k_len=g.k_len,
        block_q=g.block_q,
        block_k=g.block_k,
        batch=g.batch,
        heads=p.heads,
        offsets=g.k_len - g.q_len if p.offset == "end" else 0,
    ).dense()
    for padded, edge in ((_rows_count(p, g), found[..., -1, :]), (g.padded_keys, found[..., -1])):
        if padded:
            edge[edge == FULL] = PARTIAL
    return found


def _rows_count(p: Problem, g: Geometry) -> bool:
    """Whether rows that are none make a tile partial.

    Without a bias and a score they are zeros that no key hides from, and are cut off in the end.
    """
    return g.padded_rows and (p.bias is not None or p.score is not None)


def traced(p: Problem, x: Operands, counts: tuple[int, int], block: int) -> Array:
    """The status (rows, columns) of square tiles of a mask alike for all batches and heads."""
    g = cut_up(p, p.batch, p.q_len, p.k_len, (False, False))
    rows, columns = counts
    g = g._replace(block_q=block, block_k=block, rows=rows, columns=columns)
    g = g._replace(padded_rows=False, padded_keys=False)
    return _traced(p, lay_out(p, x, g), g, (False, False))[0, 0]


def _traced(p: Problem, x: Inputs, g: Geometry, apart: tuple[bool, bool]) -> Array:
    """The status grid in the graph, int64 (B or 1, Hq or 1, rows, columns)."""
    ops = Tiles()
    known = isinstance(g.block_q, int) and isinstance(g.block_k, int)
    # Unknown blocks are multiples of 8, or the only one; and no longer than this.
    grain = (g.block_q, g.block_k) if known else (8, 8)
    most = grain if known else (_LONGEST, _LONGEST)

    def ends(count: Any, block: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
        first = tf.reshape(ops.index(tf.range(count) * block), shape)
        return first, first + (ops.index(block) - 1)

    rows, keys = ends(g.rows, g.block_q, (1, 1, -1, 1)), ends(g.columns, g.block_k, (1, 1, 1, -1))
    b = tf.reshape(ops.index(tf.range(g.batch if apart[0] else 1)), (-1, 1, 1, 1))
    h = tf.reshape(ops.index(tf.range(p.heads if apart[1] else 1)), (1, -1, 1, 1))
    limits = (
        (rows, x.q_lengths, g.q_len if _rows_count(p, g) else None),
        (keys, x.kv_lengths, g.k_len if g.padded_keys else None),
    )
    # No row that counts makes no tile partial; where there is none at all, no key is seen either.
    live, whole = tf.convert_to_tensor(g.q_len > 0), tf.constant(True)
    spans = []
    for (first, last), lengths, size in limits:
        end = size if lengths is None else lengths
        if end is not None:
            cut = tf.minimum(last, tf.reshape(ops.index(end), (-1, 1, 1, 1)) - 1)
            live, whole = live & (first <= cut), whole & (cut >= last)
            last = tf.maximum(cut, first)
        spans.append((first, last))
    if p.mask is not None:
        offset = tf.reshape(ops.index(x.offset), (-1, 1, 1, 1))
        if not p.mask.reads("q"):
            offset = offset[:1]
        found = Intervals(ops, p.mask, x.mask, grain).read(b, h, spans[0], spans[1], offset, most)
        live, whole = live & found.possible, whole & found.certain
    status = tf.where(live, tf.where(whole, ops.index(FULL), ops.index(PARTIAL)), ops.index(0))
    batch, heads = (g.batch if apart[0] else 1), (p.heads if apart[1] else 1)
    return tf.broadcast_to(status, (batch, heads, g.rows, g.columns))
