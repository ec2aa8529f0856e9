"""What the loops read and write: parts of the batch and heads, and tiles of arrays within them.

Tiles of queries and keys are slices of the arrays as they came, taken in the loops: a copy of the
whole cut into tiles would be most of the memory there is. G query heads share a key head, and their
rows are folded into one tall matrix for every product, so that keys and values are never repeated:

    queries     (B', Hk', G * block_q, D)
    keys        (B', Hk', block_k, D)

A *part* is what one tile holds of batches and key heads: B' of them and Hk' of them. What fills up
the last tiles is no key, as the tile's own mask says, and no row: rows beyond the end are left out
of the results, and hand nothing back, since `alive` is False there. Numbers that belong to rows,
such as their maxima, are small, and are cut into tiles (parts * rows, B', Hk', G * block_q, 1)
before the loops, with zeros behind.

Sizes are ints where they are known when the call is traced, and int32 scalars elsewhere. So are the
numbers of tiles: where there is one, its positions are known too, as NumPy's arrays, it is read
without being cut out, and it is put together by being there. Tracing takes its time by operations,
constants among them, and most calls of short lengths are one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf import reference
from attn_core.backends.tf.arrays import DTYPES, sizes
from attn_core.backends.tf.chunked_loops import alone, static
from attn_core.spec import Operands, Problem

Array = Any


class Geometry(NamedTuple):
    """Sizes of the loops.

    Attributes:
        batch, q_len, k_len: B, Tq and Tk; an unknown B that turns out to be 0 is filled up to 1.
        block_q, block_k: rows and keys of a tile.
        rows, columns: tiles along queries and keys.
        batches, heads: B' and Hk', batches and key heads of a part.
        parts: how many parts there are along batches and along key heads.
        padded_rows, padded_keys: whether the last tile may hold rows or keys that are none.
    """

    batch: Any
    q_len: Any
    k_len: Any
    block_q: Any
    block_k: Any
    rows: Any
    columns: Any
    batches: Any
    heads: Any
    parts: tuple[Any, Any]
    padded_rows: bool
    padded_keys: bool

    def outer(self, p: Problem) -> tuple[Any, ...]:
        """(B', Hk', G, block_q), the rows of a tile."""
        return (self.batches, self.heads, p.group, self.block_q)


class Inputs(NamedTuple):
    """The operands as the loops read them; `lay_out` makes them.

    Attributes:
        query, key, value: in the problem's layout; a size that turns out to be 0 is filled up to 1.
        bias: `Tiled`, or None.
        offset, kv_lengths, q_lengths: int32 (B,) or (1,); lengths may be None.
        seed: Philox's key.
        mask, score: operands of the trees; those of the score in the accumulation dtype.
    """

    query: Array
    key: Array
    value: Array
    bias: Tiled | None
    offset: Array
    kv_lengths: Array | None
    q_lengths: Array | None
    seed: Array
    mask: tuple[Array, ...]
    score: tuple[Array, ...]


class Tiled(NamedTuple):
    """An array that broadcasts to (B, Hq, Tq, Tk), read in tiles; axes of size 1 stay of size 1.

    Attributes:
        array: itself, with sizes that turn out to be 0 filled up to 1.
        counts: how many tiles there are along batch, key heads, rows and keys.
        size: (B'', Hk'', G'', block_q'', block_k''), of one tile.
        shape: of the array.
    """

    array: Array
    counts: tuple[Any, Any, Any, Any]
    size: tuple[Any, Any, Any, Any, Any]
    shape: tuple[Any, ...]

    @property
    def inner(self) -> tuple[Any, Any, Any, Any]:
        """(B'', Hk'' * G'', block_q'', block_k'')."""
        return (self.size[0], self.size[1] * self.size[2], self.size[3], self.size[4])

    @property
    def count(self) -> Any:
        """How many tiles there are."""
        return self.counts[0] * self.counts[1] * self.counts[2] * self.counts[3]

    def number(self, part: Part, i: Array, j: Array) -> Array:
        at: Any = 0
        for place, count in zip((part.batch, part.head, i, j), self.counts, strict=True):
            at = at * count + (0 if alone(count) else _within(place, count))
        return at


class Part(NamedTuple):
    """The batches and key heads that the outer loop has come to.

    Attributes:
        number: of the part.
        batch, head: numbers of the part along batches and along key heads.
        b, h: int32 (B', 1, 1, 1, 1) and (1, Hk', G, 1, 1), the batches and query heads.
        key_h: int32 (1, Hk', 1, 1, 1), the key heads.
        offset, kv_lengths, q_lengths: int32 (B' or 1, 1, 1, 1, 1); lengths may be None.
    """

    number: Array
    batch: Array
    head: Array
    b: Array
    h: Array
    key_h: Array
    offset: Array
    kv_lengths: Array | None
    q_lengths: Array | None


def cut(x: Array, g: Geometry, blocks: tuple[Any, Any], heads: int) -> Array:
    """Tiles (parts * count, B', heads of a part, block, X) of an array (B, H, T, X).

    `blocks` is (count, block) along T; `heads` is H / Hk, which are folded into the rows.
    """
    count, block = blocks
    last = sizes(x)[-1]
    x = pad(x, {0: g.batch, 2: count * block})
    (batches, parts), heads_in = (g.parts, g.heads * heads)
    if _all_one(batches, parts, count):
        return tf.reshape(x, (1, g.batches, g.heads, heads * block, last))
    x = tf.reshape(x, (batches, g.batches, parts, heads_in, count, block, last))
    x = tf.transpose(x, (0, 2, 4, 1, 3, 5, 6))
    return tf.reshape(x, (batches * parts * count, g.batches, g.heads, heads * block, last))


def rows_at(
    x: Array, p: Problem, g: Geometry, part: Part, at: Array, blocks: tuple[Any, Any], heads: int
) -> Array:
    """Tile `at`, (B', Hk', heads * block, X), of an array in the problem's layout.

    What fills up the last tile is the last row again.
    """
    count, block = blocks
    last = sizes(x)[-1]
    heads_in = g.heads * heads
    shape = (g.batches, g.heads, heads * block, last)
    tall = (heads_in, block) if p.layout == "BHTD" else (block, heads_in)
    if isinstance(at, int) and isinstance(part.number, int) and x.shape == (g.batches, *tall, last):
        return shaped(x if p.layout == "BHTD" else tf.transpose(x, (0, 2, 1, 3)), shape)
    if p.layout == "BHTD" and isinstance(count, int) and count * block == x.shape[2]:
        batch, head = part.batch * g.batches, part.head * heads_in
        alone = isinstance(g.batches, int) and isinstance(heads_in, int)
        if alone and g.batches == heads_in == 1:
            # The rows lie one after the other: such a slice of whole rows is no copy.
            _, across, length, _ = sizes(x)
            first = (batch * across + head) * length + at * block
            found = tf.slice(tf.reshape(x, (-1, last)), [first, 0], [block, last])
        else:
            size = [g.batches, heads_in, block, last]
            found = tf.slice(x, [batch, head, at * block, 0], size)
    else:
        # One by one, in the order in which they are wanted: a slice that may reach beyond the end
        # would have to be moved, and one of the other layout to be turned over.
        axis = 2 if p.layout == "BHTD" else 1
        rows, across, b = sizes(x)[axis], p.kv_heads * heads, part.b
        t = tf.reshape(tf.minimum(span(block, at * block), rows - 1), (-1, 1))
        h = part.key_h if heads == 1 else part.h
        place = (b * across + h) * rows + t if axis == 2 else (b * rows + t) * across + h
        found = tf.gather(tf.reshape(x, (-1, last)), place)
    return shaped(found, shape)


def _window(x: Array, begin: list[Any], size: list[Any], fits: tuple[bool, bool]) -> Array:
    """A slice of an array of rank 4, with zeros where it reaches beyond the end.

    `fits` is whether tiles cut the last two axes without a rest.
    """
    if all(fits):
        here = all(isinstance(n, int) for n in (*begin, *size))
        return x if here and x.shape == size else tf.slice(x, begin, size)
    first, beyond = list(begin), [0, 0, 0, 0]
    for axis in (2, 3):
        if not fits[axis - 2]:
            # Always a slice of one size, which XLA needs: the last one starts earlier.
            first[axis] = tf.minimum(begin[axis], sizes(x)[axis] - size[axis])
            beyond[axis] = begin[axis] - first[axis]
    found = tf.slice(x, first, size)

    def moved() -> Array:
        behind = [(0, 0), (0, 0)]
        behind += [(0, 0 if fit else n) for fit, n in zip(fits, size[2:], strict=True)]
        return tf.slice(tf.pad(found, behind), beyond, size)

    found = tf.cond(beyond[2] + beyond[3] > 0, moved, lambda: found)
    found.set_shape(static(size))
    return found


def join(
    tiles: Array,
    g: Geometry,
    blocks: tuple[Any, Any],
    heads: int,
    size: tuple[Any, Any],
    layout: str,
) -> Array:
    """The array of which these are the tiles; `size` is (B, T)."""
    count, block = blocks
    last = sizes(tiles)[-1]
    (batches, parts), heads_in = g.parts, g.heads * heads
    if _all_one(batches, parts, count):
        x = tf.reshape(tiles, (g.batches, heads_in, block, last))
        if layout == "BHTD":
            return first(x, (size[0], heads_in, size[1], last))
        return first(tf.transpose(x, (0, 2, 1, 3)), (*size, heads_in, last))
    tiles = tf.reshape(tiles, (batches, parts, count, g.batches, heads_in, block, last))
    if layout == "BHTD":
        order, along = (0, 3, 1, 4, 2, 5, 6), 2
        shape = [g.batch, parts * heads_in, count * block, last]
    else:
        order, along = (0, 3, 2, 5, 1, 4, 6), 1
        shape = [g.batch, count * block, parts * heads_in, last]
    x = tf.reshape(tf.transpose(tiles, order), shape)
    shape[0], shape[along] = size
    return first(x, shape)


def first(x: Array, shape: Sequence[Any]) -> Array:
    """What of an array has this shape: itself, where that is known."""
    if x.shape.is_fully_defined() and tuple(x.shape) == tuple(shape):
        return x
    return tf.slice(x, [0] * len(shape), shape)


def shaped(x: Array, shape: Sequence[Any]) -> Array:
    """`tf.reshape`, of an array of another shape."""
    if x.shape.is_fully_defined() and tuple(x.shape) == tuple(shape):
        return x
    return tf.reshape(x, shape)


def nth(x: Array, n: Array) -> Array:
    """x[n]."""
    if isinstance(n, int) and x.shape[0] == 1:
        return tf.squeeze(x, 0)
    return tf.gather(x, n)


def span(count: Any, start: Any) -> Array:
    """int32 (count,): start, start + 1 and so on. NumPy's where both are known."""
    if isinstance(count, int) and isinstance(start, int):
        return np.arange(start, start + count, dtype=np.int32)
    return tf.range(count) + start


def along(x: Array, shape: Sequence[int]) -> Array:
    """An array of positions with these axes; NumPy's stays NumPy's."""
    return x.reshape(shape) if isinstance(x, np.ndarray) else tf.reshape(x, shape)


def fold(x: Array, g: Geometry, group: int) -> Array:
    """(B', Hk', G, block_q, X) as (B', Hk', G * block_q, X)."""
    return tf.reshape(x, (g.batches, g.heads, group * g.block_q, sizes(x)[-1]))


def spread(x: Array, p: Problem, g: Geometry) -> Tiled:
    """How a bias is read in tiles, or what flows back into weights."""
    return like(sizes(x), p, g)._replace(array=filled(x))


def like(shape: tuple[Any, ...], p: Problem, g: Geometry) -> Tiled:
    """How an array of this shape is cut into tiles; without the array."""
    batch, head, row, key = (_only(size == 1, size) for size in shape)
    ones = [batch, head, head, row, key]
    size = [_choose(one, n) for one, n in zip(ones, (*g.outer(p), g.block_k), strict=True)]
    counts = [
        _choose(one, n)
        for one, n in zip((batch, head, row, key), (*g.parts, g.rows, g.columns), strict=True)
    ]
    return Tiled(None, tuple(counts), tuple(size), shape)


def gather_up(tiles: Array, like: Tiled) -> Array:
    """The array whose tiles these are, of the shape that `like` was made from."""
    if _all_one(*like.counts):
        return first(tf.reshape(tiles, like.inner), like.shape)
    x = tf.reshape(tiles, (*like.counts, *like.inner))
    x = tf.transpose(x, (0, 4, 1, 5, 2, 6, 3, 7))
    x = tf.reshape(x, [n * m for n, m in zip(like.counts, like.inner, strict=True)])
    return first(x, like.shape)


def tile_of(x: Tiled, part: Part, i: Array, j: Array) -> Array:
    """The tile at (i, j), five axes of which some may be 1."""
    numbers = zip((part.batch, part.head, i, j), x.counts, strict=True)
    at = [0 if alone(count) else _within(n, count) for n, count in numbers]
    begin = [n * size for n, size in zip(at, x.inner, strict=True)]
    rest = zip(x.counts[2:], x.inner[2:], x.array.shape[2:], strict=True)
    fits = [isinstance(count, int) and count * size == length for count, size, length in rest]
    found = _window(x.array, begin, list(x.inner), (fits[0], fits[1]))
    return shaped(found, x.size)


def pad(x: Array, to: dict[int, Any], value: Any = 0) -> Array:
    """`x` with zeros behind, up to these sizes along these axes."""
    now = sizes(x)
    behind = [to.get(axis, size) - size for axis, size in enumerate(now)]
    if all(isinstance(n, int) and n == 0 for n in behind):
        return x
    found = tf.pad(x, [(0, n) for n in behind], constant_values=value)
    grown = [isinstance(n, int) for n in behind]
    known = [size + n if fits else None for size, n, fits in zip(now, behind, grown, strict=True)]
    found.set_shape([n if isinstance(n, int) else None for n in known])
    return found


def filled(x: Array) -> Array:
    """`x`, with zeros along axes that turn out to be empty: there still is a tile, of nothing."""
    return pad(x, {a: tf.maximum(n, 1) for a, n in enumerate(sizes(x)) if not isinstance(n, int)})


def lay_out(p: Problem, x: Operands, g: Geometry) -> Inputs:
    dtype = DTYPES[p.accumulation]

    def per_batch(given: Array | None) -> Array | None:
        if given is None or given.shape[0] == 1:
            return given
        if isinstance(p.batch, int) and given.shape[0] == p.batch:
            return pad(given, {0: g.batch})
        return pad(tf.broadcast_to(given, (_real(p.batch, x.query),)), {0: g.batch})

    axis = 2 if p.layout == "BHTD" else 1
    q_len, k_len = sizes(x.query)[axis], sizes(x.key)[axis]
    kv_lengths, q_lengths = (
        None if given is None else reference.lengths(given, most)
        for given, most in ((x.kv_lengths, k_len), (x.q_lengths, q_len))
    )
    offset = np.zeros(1, np.int32)
    if p.offset != "zero":
        offset = tf.reshape(reference.offset(p, x, q_len, k_len), (-1,))
    return Inputs(
        filled(x.query),
        filled(x.key),
        filled(x.value),
        None if x.bias is None else spread(x.bias, p, g),
        per_batch(offset),
        per_batch(kv_lengths),
        per_batch(q_lengths),
        x.seed,
        x.mask,
        tuple([tf.cast(t, dtype) if t.dtype.is_floating else t for t in x.score]),
    )


def part_of(p: Problem, x: Inputs, g: Geometry, number: Array) -> Part:
    batch, head = divided(number, g.parts[1])
    b, h = span(g.batches, batch * g.batches), span(g.heads, head * g.heads)

    def of_batch(given: Array | None) -> Array | None:
        if given is None:
            return None
        every = isinstance(number, int) and given.shape[0] == g.batches
        found = given if given.shape[0] == 1 or every else tf.gather(given, b)
        return along(found, (-1, 1, 1, 1, 1))

    key_h = along(h, (1, -1, 1, 1, 1))
    among = np.arange(p.group, dtype=np.int32).reshape(-1, 1, 1)
    return Part(
        number,
        batch,
        head,
        along(b, (-1, 1, 1, 1, 1)),
        key_h if p.group == 1 else key_h * p.group + among,
        key_h,
        of_batch(x.offset),
        of_batch(x.kv_lengths),
        of_batch(x.q_lengths),
    )


def divided(number: Array, count: Any) -> tuple[Array, Array]:
    """(number // count, number % count)."""
    if isinstance(count, int) and count == 1:
        return number, 0
    return number // count, number % count


def _real(size: int | None, x: Array) -> Any:
    return tf.shape(x)[0] if size is None else size


def _only(one: Any, size: Any) -> Any:
    """Whether a size is 1: a bool where that is known."""
    return bool(one) if isinstance(size, int) else tf.equal(size, 1)


def _choose(one: Any, size: Any) -> Any:
    if isinstance(one, bool):
        return 1 if one else size
    return tf.where(one, 1, size)


def _all_one(*counts: Any) -> bool:
    return all(alone(count) for count in counts)


def _within(at: Array, count: Any) -> Array:
    return at if isinstance(count, int) else tf.minimum(at, count - 1)
