"""The vocabulary of masks, each a line of meaning; True = attend. Compose with `&`, `|`, `~`.

Indices: b batch, h query head, q absolute query position (row + query_offset), k key position,
row the row of the query array. Every one of these is written in the language a user has too, so a
mask of your own (`attn_core.mask`) is worth exactly as much.
"""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np

from attn_core.language.expr import row
from attn_core.language.operands import operand
from attn_core.language.values import Mask, mask

__all__ = [
    "blocks",
    "causal",
    "chunks",
    "dense",
    "dilated",
    "global_tokens",
    "graph",
    "lengths",
    "prefix",
    "segments",
    "window",
]


def __dir__() -> list[str]:
    """What is public, for completion."""
    return __all__


_TILE = 32
"""Side of a tile of `graph`: one int32 holds one row of it."""


def causal() -> Mask:
    """A query sees the keys up to its own position: q >= k.

    Where Tq and Tk differ, `attention` asks for `query_offset`: with "start" query 0 sees key 0
    alone (torch, jax.nn, Keras), with "end" the last query sees all keys (FlashAttention, caches).
    """
    return mask(lambda b, h, q, k: q >= k)


def window(left: int | None = None, right: int | None = None) -> Mask:
    """A query sees `left` keys before its position and `right` after it, and its own.

    Both bounds count neighbours besides the position itself and are inclusive; None is unbounded.
    A window of total width W that ends at the query (Hugging Face, Mistral) is
    `causal() & window(left=W - 1)`.

        q - k <= left   and   k - q <= right

    Raises:
        TypeError: neither bound is given, or one is no int.
        ValueError: a bound is negative.
    """
    if left is None and right is None:
        raise TypeError("`left` or `right` must be given. Got neither; leave the mask out instead.")
    parts = []
    if left is not None:
        size = _count("left", left)
        parts.append(mask(lambda b, h, q, k: q - k <= size))
    if right is not None:
        reach = _count("right", right)
        parts.append(mask(lambda b, h, q, k: k - q <= reach))
    return parts[0] if len(parts) == 1 else parts[0] & parts[1]


def prefix(length: Any) -> Mask:
    """Every query sees the first `length` keys: k < length. An int, or an int array (B,).

    A prefix language model is `causal() | prefix(n)`.

    Raises:
        TypeError, ValueError: `length` is neither an int of at least 0 nor an int array (B,).
    """
    if _is_int(length):
        size = _count("length", length)
        return mask(lambda b, h, q, k: k < size)
    table = _per_batch("length", length)
    return mask(lambda b, h, q, k: k < table[b])


def lengths(kv: Any = None, q: Any = None) -> Mask:
    """Row b has kv[b] keys and q[b] queries; what lies beyond is padding. Int arrays (B,).

        k < kv[b]   and   row < q[b]

    The arguments `kv_lengths` and `q_lengths` of `attention` say the same of the arrays
    themselves, and differ in one point: with sinks, a padded row's lse is -inf there, the sink
    here.

    Raises:
        TypeError: neither is given, or one is no int array (B,).
    """
    if kv is None and q is None:
        raise TypeError("`kv` or `q` must be given. Got neither.")
    parts = []
    if kv is not None:
        keys = _per_batch("kv", kv)
        parts.append(mask(lambda b, h, q, k: k < keys[b]))
    if q is not None:
        queries = _per_batch("q", q)
        parts.append(mask(lambda b, h, q, k: row < queries[b]))
    return parts[0] if len(parts) == 1 else parts[0] & parts[1]


def segments(ids: Any, kv_ids: Any = None) -> Mask:
    """A query sees the keys of its own segment (document): ids[b, q] == ids[b, k].

    Args:
        ids: int array (T,) or (B, T), read at the absolute positions q and k.
        kv_ids: where queries and keys are numbered apart, the keys' ids, (Tk,) or (B, Tk); `ids`
            are then the queries', read by row: ids[b, row] == kv_ids[b, k].

    Raises:
        TypeError: ids are not integers of rank 1 or 2.
    """
    table = operand(_ids("ids", ids))
    flat = len(table.shape) == 1
    if kv_ids is None:
        if flat:
            return mask(lambda b, h, q, k: table[q] == table[k])
        return mask(lambda b, h, q, k: table[b, q] == table[b, k])
    keys = operand(_ids("kv_ids", kv_ids))
    one = len(keys.shape) == 1
    return mask(
        lambda b, h, q, k: (
            (table[row] if flat else table[b, row]) == (keys[k] if one else keys[b, k])
        )
    )


def dilated(rate: int, left: int | None = None, right: int | None = None) -> Mask:
    """A query sees every `rate`-th key, counted from its own position: (q - k) % rate == 0.

    `left` and `right` bound how many such keys before and after the query are seen, besides its
    own position; None is unbounded. `causal() & dilated(4)` looks back only.

    Raises:
        TypeError, ValueError: `rate` is no int of at least 1, or a bound none of at least 0.
    """
    step = _count("rate", rate)
    if step < 1:
        raise ValueError(f"`rate` must be at least 1. Got {rate}.")
    every = mask(lambda b, h, q, k: (q - k) % step == 0)
    if left is None and right is None:
        return every
    span = window(
        None if left is None else _count("left", left) * step,
        None if right is None else _count("right", right) * step,
    )
    return every & span


def global_tokens(tokens: Any) -> Mask:
    """Global tokens see every key and are seen by every query; union it with a local mask.

    `tokens` is an int n (the first n positions) or a boolean array (T,) or (B, T), True = global.

        q is global   or   k is global

    Raises:
        TypeError, ValueError: `tokens` is neither an int of at least 0 nor boolean of rank 1 or 2.
    """
    if _is_int(tokens):
        n = _count("tokens", tokens)
        return mask(lambda b, h, q, k: ((q >= 0) & (q < n)) | (k < n))
    table = operand(_boolean("tokens", tokens, (1, 2)))
    if len(table.shape) == 1:
        return mask(lambda b, h, q, k: table[q] | table[k])
    return mask(lambda b, h, q, k: table[b, q] | table[b, k])


def chunks(size: int) -> Mask:
    """Positions are cut into chunks of `size`; a query sees the keys of its chunk.

    q // size == k // size

    Raises:
        TypeError, ValueError: `size` is no int of at least 1.
    """
    length = _count("size", size)
    if length < 1:
        raise ValueError(f"`size` must be at least 1. Got {size}.")
    return mask(lambda b, h, q, k: q // length == k // length)


def dense(array: Any) -> Mask:
    """A boolean array (Tq, Tk), or rank 4 broadcasting to (B, Hq, Tq, Tk), read by row.

    True = attend. Rank 3 is refused, since (B, Tq, Tk) would silently broadcast as (Hq, Tq, Tk)
    wherever B equals Hq.

    Raises:
        TypeError: `array` is not boolean.
        ValueError: it is not of rank 2 or 4.
    """
    array = _boolean("array", array, (2, 3, 4))
    rank = len(array.shape)
    if rank == 3:
        raise ValueError(
            "`array` must have rank 2 (Tq, Tk) or 4 (B, Hq, Tq, Tk). Got rank 3: write "
            "`array[:, None]` if its first axis is the batch, `array[None]` if it is the heads."
        )
    table = operand(array)
    if rank == 2:
        return mask(lambda b, h, q, k: table[row, k])
    return mask(lambda b, h, q, k: table[b, h, row, k])


def blocks(table: Any, size: int | tuple[int, int]) -> Mask:
    """A boolean table of blocks: block (i, j) allows the queries and keys of that tile.

        table[b, h, q // size, k // size]

    Args:
        table: boolean (blocks of q, blocks of k), or rank 4 with leading (B or 1, Hq or 1). q is
            the absolute position. BigBird and Longformer patterns are tables of this kind.
        size: positions to a block, an int or (query size, key size).

    Raises:
        TypeError, ValueError: `table` is not boolean of rank 2 or 4, or `size` is neither an int
            of at least 1 nor two.
    """
    array = _boolean("table", table, (2, 4))
    across = size if isinstance(size, tuple) else (size, size)
    if len(across) != 2:
        raise TypeError(f"`size` must be an int or (query size, key size). Got {size}.")
    tall, wide = _count("size", across[0]), _count("size", across[1])
    if tall < 1 or wide < 1:
        raise ValueError(f"`size` must be at least 1. Got {size}.")
    found = operand(array)
    if len(array.shape) == 2:
        return mask(lambda b, h, q, k: found[q // tall, k // wide])
    return mask(lambda b, h, q, k: found[b, h, q // tall, k // wide])


def graph(
    edges: Any, shape: tuple[int, int] | int | None = None, *, symmetric: bool = False
) -> Mask:
    """Query node q sees key node k where the graph has that edge; stored two-level.

    A table of 32 x 32 tiles points at the tiles that hold an edge, one bit for each entry, so
    memory is (T / 32)**2 words plus 128 bytes for each tile in use, and block maps skip the rest.

    Args:
        edges: int array (N, 2) of (query, key) pairs, or a boolean adjacency (Tq, Tk); on the
            host, since the storage depends on it. q is the absolute position.
        shape: (queries, keys), or one int for both; needed with pairs.
        symmetric: also add the edge from each key to its query.

    Raises:
        TypeError: `edges` are neither pairs of ints nor a boolean adjacency on the host, or `shape`
            is left out with pairs.
        ValueError: an edge lies outside `shape`, or `shape` is not the adjacency's.
    """
    query, key, (tall, wide) = _edges(edges, shape)
    if symmetric:
        query, key = np.concatenate([query, key]), np.concatenate([key, query])
        tall = wide = max(tall, wide)
    across = max(1, -(-wide // _TILE))
    tile = (query // _TILE) * across + key // _TILE
    used, number = np.unique(tile, return_inverse=True)
    table = np.zeros((max(1, -(-tall // _TILE)), across), np.int32)
    table.reshape(-1)[used] = 1 + np.arange(len(used), dtype=np.int32)
    words = np.zeros((len(used) + 1, _TILE), np.uint32)
    bits = np.left_shift(np.uint32(1), (key % _TILE).astype(np.uint32))
    np.bitwise_or.at(words, (number + 1, query % _TILE), bits)
    tiles, rows = operand(table), operand(words.view(np.int32))

    def edge(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = tiles[q // _TILE, k // _TILE]
        bit = (rows[found, q % _TILE] >> (k % _TILE)) & 1
        inside = (q >= 0) & (q < tall) & (k < wide)
        return inside & (found != 0) & (bit == 1)

    return mask(edge)


def _edges(edges: Any, shape: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    if not isinstance(edges, (np.ndarray, list, tuple)):
        raise TypeError(
            "`edges` must be a NumPy array or list: a graph's storage depends on its edges. "
            f"Got {type(edges).__name__}."
        )
    array = np.asarray(edges)
    if array.dtype == np.bool_ and array.ndim == 2:
        if shape is not None and _extent(shape) != array.shape:
            raise ValueError(f"`shape` must be the adjacency's, {array.shape}. Got {shape}.")
        query, key = np.nonzero(array)
        return query, key, (array.shape[0], array.shape[1])
    if array.size == 0:
        array = np.zeros((0, 2), np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            "`edges` must be integer pairs (N, 2) or a boolean adjacency (Tq, Tk). "
            f"Got {array.dtype} of shape {array.shape}."
        )
    if shape is None:
        raise TypeError("`shape` must be given with pairs, as (queries, keys). Got none.")
    tall, wide = _extent(shape)
    if array.size and (array.min() < 0 or array[:, 0].max() >= tall or array[:, 1].max() >= wide):
        raise ValueError(f"`edges` must lie within shape {(tall, wide)}. Got one outside.")
    return array[:, 0].astype(np.int64), array[:, 1].astype(np.int64), (tall, wide)


def _extent(shape: Any) -> tuple[int, int]:
    pair = (shape, shape) if _is_int(shape) else shape
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_int, pair)):
        raise TypeError(f"`shape` must be an int or (queries, keys). Got {shape!r}.")
    return _count("shape", pair[0]), _count("shape", pair[1])


def _is_int(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, (bool, np.bool_))


def _count(name: str, value: Any) -> int:
    if not _is_int(value):
        raise TypeError(f"`{name}` must be a Python int. Got {type(value).__name__}.")
    if value < 0:
        raise ValueError(f"`{name}` must not be negative. Got {value}.")
    return index(value)  # a size that torch.compile keeps symbolic becomes a number here


def _per_batch(name: str, value: Any) -> Any:
    table = operand(value)
    if table.kind != "int" or len(table.shape) != 1:
        raise TypeError(
            f"`{name}` must be an integer array of shape (B,). "
            f"Got {table.kind}s of shape {table.shape}."
        )
    return table


def _ids(name: str, value: Any) -> Any:
    found = operand(value)
    if found.kind != "int" or len(found.shape) not in (1, 2):
        raise TypeError(
            f"`{name}` must be an integer array (T,) or (B, T). "
            f"Got {found.kind}s of shape {found.shape}."
        )
    return found.array


def _boolean(name: str, value: Any, ranks: tuple[int, ...]) -> Any:
    found = operand(value)
    if found.kind != "bool":
        hint = {"float": "a float mask that is added to the scores is `bias=`"}
        raise TypeError(
            f"`{name}` must be boolean, True = attend. Got {found.kind}s; "
            f"{hint.get(found.kind, f'compare them first, for instance `{name} != 0`')}."
        )
    if len(found.shape) not in ranks:
        raise ValueError(
            f"`{name}` must have rank {' or '.join(map(str, ranks))}. Got shape {found.shape}."
        )
    return found.array
