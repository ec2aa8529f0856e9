"""One tile: its positions, which of them are allowed, and the logits there.

A tile of logits is (B', Hk', G, block_q, block_k), of the rows and keys that `chunked_parts` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from attn_core.backends.tf.arrays import DTYPES, Reading
from attn_core.backends.tf.chunked_parts import (
    Geometry,
    Inputs,
    Part,
    along,
    rows_at,
    span,
    tile_of,
)
from attn_core.backends.tf.philox import keep_at
from attn_core.language.duals import Derivative
from attn_core.language.values import drop_threshold
from attn_core.spec import Problem

Array = Any


class Logits(NamedTuple):
    """Of one tile: scaled scores with score and bias, and where they are allowed.

    Attributes:
        z: accumulation dtype (B', Hk', G, block_q, block_k).
        allowed: boolean, broadcasting to it; None where all is.
        slope: d score / d s, or None without a score or where it was not asked for.
        sites: for each look-up of the score, (d score / d value, the indices of the value).
    """

    z: Array
    allowed: Array | None
    slope: Array | None = None
    sites: Sequence[tuple[Array, Sequence[Array]]] = ()


def indices(g: Geometry, part: Part, i: Array, j: Array) -> dict[str, Array]:
    row = along(span(g.block_q, i * g.block_q), (1, 1, 1, -1, 1))
    k = along(span(g.block_k, j * g.block_k), (1, 1, 1, 1, -1))
    return {"b": part.b, "h": part.h, "q": row + part.offset, "k": k, "row": row}


def structure(p: Problem, x: Inputs, g: Geometry, part: Part, index: dict[str, Array]) -> Array:
    """Mask, lengths and the ends of rows and keys; broadcasts to the tile."""
    found: Array | None = None
    if part.kv_lengths is not None:
        found = index["k"] < part.kv_lengths
    elif g.padded_keys:
        found = index["k"] < g.k_len
    if part.q_lengths is not None:
        found = _and(found, index["row"] < part.q_lengths)
    elif g.padded_rows:
        found = _and(found, index["row"] < g.q_len)
    if p.mask is not None:
        found = _and(found, Reading(p.accumulation, x.mask).read(p.mask, index, x.mask)[0])
    if found is None or len(found.shape) != 5:
        found = _and(found, tf.ones((1, 1, 1, 1, 1), tf.bool))
    return tf.convert_to_tensor(found)


def logits(
    p: Problem,
    x: Inputs,
    g: Geometry,
    part: Part,
    at: tuple[Array, Array],
    q: Array,
    k: Array,
    masked: bool,
    derivative: Derivative | None = None,
) -> Logits:
    """The tile at (i, j) from folded rows q and keys k; `masked` is whether it needs its mask.

    Args:
        q: (B', Hk', G * block_q, D), already scaled where `prescaled` says so.
        derivative: of the score, where slopes are wanted.
    """
    z = tf.reshape(tf.matmul(q, k, transpose_b=True), (*g.outer(p), g.block_k))
    if not prescaled(p):
        z = z * p.scale
    if not masked and x.bias is None and p.score is None:
        return Logits(z, None)
    index = indices(g, part, *at)
    allowed = structure(p, x, g, part, index) if masked else None
    bias = None
    if x.bias is not None:
        bias = tf.cast(tile_of(x.bias, part, *at), z.dtype)
    slope, sites = None, []
    if p.score is not None:
        s = z if allowed is None else tf.where(allowed, z, tf.zeros_like(z))
        guard = allowed
        tree = p.score if derivative is None else derivative.tree
        read = Reading(p.accumulation, x.score, guard).read(tree, {**index, "s": s}, x.score)
        z = tf.broadcast_to(read[0], tf.shape(z)) if read[0].shape != z.shape else read[0]
        allowed = _and(allowed, tf.not_equal(z, -np.inf))
        if derivative is not None:
            slope, rest = read[1], iter(read[2:])
            for site in derivative.sites:
                sites.append((next(rest), [next(rest) for _ in range(site.indices)]))
    if bias is not None:
        bias = tf.broadcast_to(bias, tf.shape(z)) if bias.shape != z.shape else bias
        allowed = _and(allowed, tf.not_equal(bias, -np.inf))
        z = z + tf.where(allowed, bias, tf.zeros_like(bias))
        allowed = allowed & tf.not_equal(z, -np.inf)
    return Logits(z, allowed, slope, sites)


def prescaled(p: Problem) -> bool:
    """Whether rows are scaled before the product, in the accumulation dtype."""
    return p.score is None and p.bias is None


def query_of(p: Problem, x: Inputs, g: Geometry, part: Part, i: Array) -> Array:
    """Folded rows of a tile in the accumulation dtype, scaled where that is done beforehand."""
    q = rows_at(x.query, p, g, part, i, (g.rows, g.block_q), p.group)
    q = tf.cast(q, DTYPES[p.accumulation])
    return q * p.scale if prescaled(p) else q


def keys_of(p: Problem, x: Array, g: Geometry, part: Part, j: Array) -> Array:
    found = rows_at(x, p, g, part, j, (g.columns, g.block_k), 1)
    return tf.cast(found, DTYPES[p.accumulation])


def kept(p: Problem, x: Inputs, g: Geometry, part: Part, i: Array, j: Array) -> Array:
    """Dropout's mask over the tile."""
    index = indices(g, part, i, j)
    keys = (j * g.block_k, g.block_k)
    return keep_at(drop_threshold(p.rate), x.seed, (part.b, part.h, index["q"]), g.outer(p), keys)


def seen(allowed: Array) -> Array:
    """(B', Hk', block_k, 1): some row of the tile may see the key."""
    # TensorFlow looks for the greatest float in half the time in which it looks for any True.
    return tf.expand_dims(tf.reduce_max(tf.cast(allowed, tf.float32), (2, 3)), -1) > 0


def _and(found: Array | None, more: Array) -> Array:
    return more if found is None else tf.logical_and(found, more)
