"""One tile: its positions, which of them are allowed, and the logits there.

Inside, arrays are (B, Hk, G, T, D): G query heads to a key head, whose rows are folded into one
tall matrix for every product, so that keys and values are never repeated. A tile of rows and keys
is (B', Hk', G, block_q, block_k), where B' and Hk' are all batches and key heads, or the one that
an outer loop has come to.

A tile that the block map calls full has `allowed` None: nothing is selected there. Rows and keys
that fill up the last tile are zeros; of the keys, the mask of that tile says that they are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_core.backends.jax.arrays import DTYPES, Reading
from attn_core.backends.jax.meshes import spread
from attn_core.backends.jax.philox import keep_at
from attn_core.language.values import drop_threshold
from attn_core.spec import Operands, Problem

Array = Any

_TINY = 2.0**-126
"""The least normal number of float32."""


class Geometry(NamedTuple):
    """Static sizes of the loops.

    Attributes:
        block_q, block_k: rows and keys of a tile.
        step_q, step_k: from the start of one tile to that of the next; less than the tile's rows
            or keys where a tile is a span, which may start anywhere in steps.
        rows, columns: steps along queries and keys.
        level: 0, all batches and heads in one tile; 1, a loop over batches; 2, and over key heads.
        full, partial: whether there may be tiles that need no mask, and tiles that do; a loop over
            tiles that cannot be is not compiled.
        axes: of a surrounding shard_map, along which all arrays vary (meshes.py).
    """

    block_q: int
    block_k: int
    step_q: int
    step_k: int
    rows: int
    columns: int
    level: int
    full: bool
    partial: bool
    axes: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        return self.rows == self.columns == 1

    @property
    def spans(self) -> bool:
        """Whether a line has one tile, which its schedule places."""
        return (self.block_q, self.block_k) != (self.step_q, self.step_k)

    @property
    def q_size(self) -> int:
        """Rows, filled up."""
        return self.rows * self.step_q

    @property
    def k_size(self) -> int:
        """Keys, filled up."""
        return self.columns * self.step_k


class Laid(NamedTuple):
    """The arrays laid out and padded to whole tiles; B' and Hk' are B and Hk before they are cut.

    Attributes:
        query: (B', Hq', q_size, D), as `words`.
        key, value: (B', Hk', k_size, D or Dv), as `words`.
        offset: int32 (B' or 1, 1, 1, 1, 1).
        kv_lengths, q_lengths: the same, or None.
    """

    query: Array
    key: Array
    value: Array
    offset: Array
    kv_lengths: Array | None
    q_lengths: Array | None


class Part(NamedTuple):
    """The batches and key heads of one turn of the outer loop.

    Attributes:
        laid: their arrays.
        b: int32 (B', 1, 1, 1, 1), the batches.
        h: int32 (1, Hk', G, 1, 1), the query heads.
    """

    laid: Laid
    b: Array
    h: Array


class Logits(NamedTuple):
    """Of one tile: scaled scores with score and bias, and where they are allowed.

    Attributes:
        z: accumulation dtype (B', Hk', G, block_q, block_k).
        allowed: boolean, broadcasting to z; None where all is.
        slope: d score / d s, or None without a score or where it was not asked for.
        sites: for each look-up of the score, (d score / d value, the indices of the value).
    """

    z: Array
    allowed: Array | None
    slope: Array | None = None
    sites: Sequence[tuple[Array, Sequence[Array]]] = ()


def words(x: Array) -> Array:
    """Numbers of 16 bits as uint16, others as they are: what is cut into tiles or put together.

    XLA's CPU computes with float32 in place of 16-bit floats, and takes slicing and updating for
    computing: it would widen whole arrays before a loop, and rewrite a whole result in each turn.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def numbers(p: Problem, x: Array) -> Array:
    """What `words` was given, in query's dtype."""
    return jax.lax.bitcast_convert_type(x, DTYPES[p.dtype]) if x.dtype == jnp.uint16 else x


def dot(p: Problem, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Products over the last two axes, batched over B' and Hk', in the accumulation dtype."""
    precision = jax.lax.Precision.DEFAULT if p.precision == "fast" else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((0, 1), (0, 1))),
        precision=precision,
        preferred_element_type=DTYPES[p.accumulation],
    )


def fold(x: Array) -> Array:
    """(B', Hk', G, T, X) as (B', Hk', G * T, X)."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def folded_tile(p: Problem, g: Geometry, x: Array, i: Array, heads: int) -> Array:
    """(B', Hk', G * block_q, X): the tile from row i of words (B', Hq', T, X), for `heads` keys."""
    x = numbers(p, cut(x, i, g.block_q, 2))
    return x.reshape(x.shape[0], heads, p.group * g.block_q, x.shape[3])


def unfold(x: Array, group: int) -> Array:
    return x.reshape(*x.shape[:2], group, x.shape[2] // group, *x.shape[3:])


def key_tile(p: Problem, g: Geometry, x: Array, j: Array) -> Array:
    """(B', Hk', block_k, X): the tile from key j of words (B', Hk', T, X)."""
    return numbers(p, cut(x, j, g.block_k, 2))


def cut(x: Array, at: Array, size: int, axis: int) -> Array:
    """Entries [at, at + size) of an axis; an axis of 1 is left as it is."""
    if x.shape[axis] == 1 and size != 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, at, size, axis)


def indices(g: Geometry, part: Part, i: Array, j: Array) -> dict[str, Array]:
    row = (i + jnp.arange(g.block_q, dtype=jnp.int32))[:, None]
    k = j + jnp.arange(g.block_k, dtype=jnp.int32)
    row, k = row[None, None, None], k[None, None, None, None]
    return {"b": part.b, "h": part.h, "q": row + part.laid.offset, "k": k, "row": row}


def allowed(p: Problem, x: Operands, g: Geometry, part: Part, index: dict[str, Array]) -> Array:
    """Mask, lengths and the end of the keys; broadcasts to the tile."""
    found = index["k"] < p.k_len
    if p.score is not None or g.q_size != p.q_len:
        # What a score makes of rows that are none is nobody's business, nor which keys they see.
        found = found & (index["row"] < p.q_len)
    if p.mask is not None:
        found = found & Reading(p.accumulation, x.mask).read(p.mask, index, x.mask)[0]
    if part.laid.kv_lengths is not None:
        found = found & (index["k"] < part.laid.kv_lengths)
    if part.laid.q_lengths is not None:
        found = found & (index["row"] < part.laid.q_lengths)
    return found


def _allowed_once(
    p: Problem, x: Operands, g: Geometry, part: Part, index: dict[str, Array], i: Array
) -> Array:
    """`allowed`, worked out once for a tile from row i on, and not anew for every head.

    XLA's CPU puts a mask into every loop that reads it, and so reads the language for each entry of
    each head, three times over: measured, a quarter of a window's forward pass. What a conditional
    gives is written down, while a barrier is gone before loops are made. Rows are never negative,
    which XLA does not know; where there is one tile alone it does, and nothing is lost.
    """

    def found() -> Array:
        return allowed(p, x, g, part, index)

    if p.device != "cpu" or p.mask is None:
        return found()
    shape = jax.eval_shape(found).shape
    return jax.lax.cond(
        i >= 0, lambda: spread(g.axes, found()), lambda: spread(g.axes, jnp.zeros(shape, bool))
    )


def logits(
    p: Problem,
    x: Operands,
    g: Geometry,
    part: Part,
    at: tuple[Array, Array],
    q: Array,
    k: Array,
    masked: bool,
    derivative: Any = None,
    left: float = 1.0,
) -> Logits:
    """The tile from row i and key j on, of folded rows q and keys k.

    Args:
        q: (B', Hk', G * block_q, D), already scaled where `prescaled` says so.
        masked: whether the tile needs its mask.
        derivative: of the score, from `duals.differentiate`, where slopes are wanted.
        left: the scale that is left to the exponential, `later` or `kept_back`.
    """
    i, j = at
    z = unfold(dot(p, q, k, (3, 3)), p.group)
    if left != 1.0:
        z = z if p.scale > 0 else -z
    elif not prescaled(p) and p.scale != 1.0:
        z = z * p.scale
    index = indices(g, part, i, j)
    found = _allowed_once(p, x, g, part, index, i) if masked else None
    bias = None
    if x.bias is not None:
        bias = bias_tile(p, x.bias, g, part, i, j)
        found = _and(found, bias != -jnp.inf)
    slope, sites = None, []
    if p.score is not None:
        s = z if found is None else jnp.where(found, z, 0.0)
        guard = None if found is None else jnp.broadcast_to(found, z.shape)
        tree = p.score if derivative is None else derivative.tree
        read = Reading(p.accumulation, x.score, guard).read(tree, {**index, "s": s}, x.score)
        value = jnp.broadcast_to(read[0], z.shape)
        found = _and(found, value != -jnp.inf)
        z = value
        if derivative is not None:
            slope, rest = read[1], iter(read[2:])
            for site in derivative.sites:
                sites.append((next(rest), [next(rest) for _ in range(site.indices)]))
    if bias is not None:
        z = z + jnp.where(found, bias, 0.0)
        found = _and(found, z != -jnp.inf)
    return Logits(z, found, slope, sites)


def prescaled(p: Problem) -> bool:
    """Whether rows are scaled before the product: exact enough, and not with a score or bias."""
    return p.dtype in ("float32", "float64") and p.score is None and p.bias is None


def later(p: Problem) -> float:
    """A scale s that is left to the exponential: exp(s (z - m)) from the maximum m of z.

    There it costs nothing, while a tile that is scaled before its maximum is written once more. It
    comes after the difference, since XLA contracts s z - s m into one operation, which rounds s m
    and not s z: of logits beyond 1e9 the difference would be anything. It must be a normal number:
    one that rounds to 0 makes NaN of the -inf that no key has reached. The sign of a scale stays
    with z, where it is exact.
    """
    s = abs(p.scale)
    plain = p.score is None and p.bias is None and _TINY <= s <= 1 / _TINY
    return s if plain and not prescaled(p) else 1.0


def kept_back(p: Problem) -> float:
    """`later`, where the statistics of a row stay in its units; a sink is a number of its own."""
    return later(p) if p.sinks_dtype is None else 1.0


def bias_tile(p: Problem, bias: Array, g: Geometry, part: Part, i: Array, j: Array) -> Array:
    """The bias over the tile, (B' or 1, Hk' or 1, G or 1, block_q or 1, block_k or 1).

    bias: (Bb, Hb, rows, keys), padded to whole tiles along the axes that it spans.
    """
    tile = cut(cut(bias, i, g.block_q, 2), j, g.block_k, 3).astype(DTYPES[p.accumulation])
    batch = tile.shape[0]
    if p.bias[1]:  # type: ignore[index]
        tile = tile.reshape(batch, p.kv_heads, p.group, *tile.shape[2:])
    else:
        tile = tile[:, :, None]
    if g.level >= 1 and p.bias[0]:  # type: ignore[index]
        tile = jax.lax.dynamic_slice_in_dim(tile, part.b[0, 0, 0, 0, 0], 1, 0)
    if g.level == 2 and p.bias[1]:  # type: ignore[index]
        tile = jax.lax.dynamic_slice_in_dim(tile, part.h[0, 0, 0, 0, 0] // p.group, 1, 1)
    return tile


def kept(p: Problem, x: Operands, g: Geometry, part: Part, i: Array, j: Array) -> Array:
    """Dropout's mask over the tile."""
    index = indices(g, part, i, j)
    b, h = part.b, part.h
    return keep_at(drop_threshold(p.rate), x.seed, b, h, index["q"], j, g.block_k)


def seen(found: Array) -> Array:
    """(B' or 1, Hk' or 1, block_k or 1): some row of the tile may see the key.

    Of `found` as it is: a mask that is the same for every head is not gone through for each.
    """
    return found.any((2, 3))


def only(x: Array, keys: Array) -> Array:
    return jnp.where(keys[..., None], x, 0.0)


def _and(found: Array | None, more: Array) -> Array:
    return more if found is None else found & more
