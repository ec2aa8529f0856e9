"""The backward pass: for every column of tiles, the gradients that its live tiles of rows give.

With P = exp((z - m) - log l), dP = dO V^T (dropped and rescaled where P was) + dW, and
delta = sum(dO * O) + sum(P * dW) for each row::

    dz = P * (dP - delta + d lse)        where allowed
    dV = (P after dropout)^T dO          dsink = sum of exp((sink - m) - log l) * (d lse - delta)
    ds = dz * dscore/ds                  dQ = scale * ds K,  dK = scale * ds^T Q

Each tile is computed once and gives all of it; dQ is added up in a buffer of the accumulation
dtype. What comes from upstream is selected by row before anything else: rows that may see no key
pass nothing on, but for their sink's share of d lse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_core.backends.jax import chunked_tile as tiles
from attn_core.backends.jax.arrays import DTYPES, clamp
from attn_core.backends.jax.chunked_forward import (
    over_tiles,
    probability,
    query_tile,
    rows_shape,
    sinks_of,
    times,
)
from attn_core.backends.jax.chunked_parts import (
    cut_up,
    lay_out,
    line_of,
    over_parts,
    pad,
    padded_bias,
    rows_of,
    scheduled,
    whole,
)
from attn_core.backends.jax.chunked_tile import Geometry, Part
from attn_core.language.duals import Derivative, differentiate
from attn_core.schedule import Schedule
from attn_core.spec import AttentionOutput, Operands, Problem

Array = Any


class Upstream(NamedTuple):
    """Of every row, (B', Hk', G, T, ...): statistics, and what comes from upstream.

    Attributes:
        m, log_l: statistics of the forward pass; log l is +inf where there is no row.
        alive: the row may see a key; False for rows that fill up the last tile.
        d_out: (B', Hq', T, Dv), as it came, as `words`.
        delta: selected, sum(dO * O) + sum(P * dW).
        d_lse: selected.
        d_weights: (..., T, keys), or None.
        turned: rows of query, selected, and of d_out as (B', Hq', X, T), as words, where turning
            each tile anew takes longer than memory is worth: 16 bits on a CPU; else None.
    """

    m: Array
    log_l: Array
    alive: Array
    d_out: Array
    delta: Array
    d_lse: Array
    d_weights: Array | None
    turned: tuple[Array, Array] | None


class Shared(NamedTuple):
    """Gradients that every part adds to, in the accumulation dtype.

    Attributes:
        bias: as padded, or None.
        sinks: (Hk, G), or None.
        tables: of the score's float operands, None for the others.
    """

    bias: Array | None
    sinks: Array | None
    tables: tuple[Array | None, ...]


def backward(
    p: Problem,
    x: Operands,
    out: Array,
    m: Array,
    log_l: Array,
    alive: Array,
    cotangents: AttentionOutput,
) -> Operands:
    """Gradients of the float operands; None stands for those of integers."""
    dtype = DTYPES[p.accumulation]
    cut = cut_up(p, x, columns=True)
    g, by_columns = cut.geometry, cut.schedule
    by_rows = scheduled(cut.status) if p.return_weights else None
    bias = None if x.bias is None else padded_bias(p, g, x.bias)
    filled = x._replace(bias=bias)
    derivative = None if p.score is None else differentiate(p.score)

    up = _upstream(p, g, x.query, out, m, log_l, alive, cotangents)
    laid = lay_out(p, x, g)
    floats = [jnp.issubdtype(t.dtype, jnp.floating) for t in x.score]
    shared = Shared(
        None if bias is None else jnp.zeros(bias.shape, dtype),
        None if x.sinks is None else jnp.zeros((p.kv_heads, p.group), dtype),
        tuple(
            jnp.zeros(t.shape, dtype) if f else None for t, f in zip(x.score, floats, strict=True)
        ),
    )

    def turn(part: Part, up: Upstream, at: Any, shared: Shared) -> tuple[Shared, Any]:
        if by_rows is not None:
            up = _with_weights(p, filled, g, part, line_of(by_rows, at), up)
        if shared.sinks is not None:
            shared = shared._replace(sinks=_sinks(p, filled, g, part, up, at, shared.sinks))
        return _columns(p, filled, g, part, line_of(by_columns, at), up, derivative, shared)

    shared, (d_query, d_key, d_value) = over_parts(p, g, laid, up, turn, shared)
    d_bias = shared.bias
    if d_bias is not None:
        d_bias = d_bias[:, :, : x.bias.shape[2], : x.bias.shape[3]].astype(x.bias.dtype)
    tables = tuple(
        None if d is None else d.astype(t.dtype)
        for d, t in zip(shared.tables, x.score, strict=True)
    )
    return Operands(
        _given(p, whole(p, d_query), x.query),
        _given(p, d_key[:, :, : p.k_len], x.key),
        _given(p, d_value[:, :, : p.k_len], x.value),
        d_bias,
        None if shared.sinks is None else shared.sinks.reshape(-1).astype(x.sinks.dtype),
        mask=tuple(None for _ in x.mask),
        score=tables,
    )


def _given(p: Problem, d: Array, x: Array) -> Array:
    """In the layout and dtype of what was given."""
    d = tiles.numbers(p, d)
    return (d if p.layout == "BHTD" else d.swapaxes(1, 2)).astype(x.dtype)


def _rows(p: Problem, g: Geometry, x: Array, fill: Any) -> Array:
    """(B, Hk, G, T, ...) from (B, Hq, Tq, ...), filled up."""
    x = x.reshape(x.shape[0], p.kv_heads, p.group, *x.shape[2:])
    return pad(x, 3, g.q_size, fill)


def _upstream(
    p: Problem,
    g: Geometry,
    query: Array,
    out: Array,
    m: Array,
    log_l: Array,
    alive: Array,
    cotangents: AttentionOutput,
) -> Upstream:
    dtype = DTYPES[p.accumulation]
    live = _rows(p, g, alive, False)
    log_l = _rows(p, g, log_l, jnp.inf)
    d_out = rows_of(p, g, cotangents.out)
    # As a product: the sum of a multiplication takes XLA's CPU thirty times as long, on one thread.
    delta = jnp.einsum(
        "bhtd,bhtd->bht",
        *(rows.astype(dtype) for rows in (d_out, rows_of(p, g, out))),
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(live.shape)
    delta = jnp.where(live, delta, 0.0)
    d_lse = jnp.zeros_like(delta)
    if cotangents.lse is not None:
        d_lse = jnp.where(log_l < jnp.inf, _rows(p, g, cotangents.lse, 0.0), 0.0)
    d_weights = None
    if cotangents.weights is not None:
        d_weights = _rows(p, g, cotangents.weights, 0.0)
        d_weights = pad(d_weights, 4, g.k_size)
    turned = None
    if p.device == "cpu" and p.group == 1 and p.dtype in ("bfloat16", "float16"):
        query, up = (
            jnp.where(live[:, :, 0, :, None], rows, 0.0).swapaxes(2, 3)
            for rows in (rows_of(p, g, query), d_out)
        )
        turned = (tiles.words(query), tiles.words(up))
    d_out = tiles.words(d_out)
    return Upstream(_rows(p, g, m, 0.0), log_l, live, d_out, delta, d_lse, d_weights, turned)


def _with_weights(
    p: Problem, x: Operands, g: Geometry, part: Part, by_rows: Schedule, up: Upstream
) -> Upstream:
    """The rows' delta with sum(P * dW), which takes a pass over the tiles of its own."""

    def turn(line: Array, delta: Array) -> Array:
        i = line * g.step_q
        q = _selected(query_tile(p, g, part, i), _alive(g, up, i))
        m, log_l = (tiles.cut(a, i, g.block_q, 3) for a in (up.m, up.log_l))

        def step(masked: bool) -> Any:
            def body(j: Array, total: Array) -> Array:
                k = tiles.key_tile(p, g, part.laid.key, j)
                left = tiles.kept_back(p)
                z, found, *_ = tiles.logits(p, x, g, part, (i, j), q, k, masked, left=left)
                d = _weight_tile(g, up, i, j).astype(total.dtype)
                product = probability(p, z, found, m, log_l) * d
                product = product if found is None else jnp.where(found, product, 0.0)
                return total + product.sum(-1)

            return body

        total = over_tiles(g, by_rows, line, g.step_k, step, jnp.zeros(m.shape, delta.dtype))
        return _add(delta, total, i, 3)

    return up._replace(delta=times(g, g.rows, turn, up.delta))


def _turned(p: Problem, g: Geometry, whole: Any, which: int, i: Array, rows: Array) -> Array:
    """(B', Hk', X, G * block_q): the tile's rows, turned around.

    A product that sums over rows is dK^T = Q^T dS: XLA's CPU takes half as long for it, in the
    order dS^T Q, since it would turn dS around on one thread. Without the barrier it would fold
    the turn into the product again.
    """
    if whole is not None:
        return tiles.numbers(p, tiles.cut(whole[which], i, g.block_q, 3))
    return jax.lax.optimization_barrier(rows.swapaxes(2, 3))


def _alive(g: Geometry, up: Upstream, i: Array) -> Array:
    """Folded rows of the tile from row i on: whether each may see a key."""
    return tiles.fold(tiles.cut(up.alive, i, g.block_q, 3))


def _selected(x: Array, alive: Array) -> Array:
    """By tile, not once for all rows: a copy of all of them would be memory."""
    return jnp.where(alive[..., None], x, 0.0)


def _weight_tile(g: Geometry, up: Upstream, i: Array, j: Array) -> Array:
    rows = jax.lax.dynamic_slice_in_dim(up.d_weights, i, g.block_q, 3)
    return jax.lax.dynamic_slice_in_dim(rows, j, g.block_k, 4)


def _sinks(
    p: Problem,
    x: Operands,
    g: Geometry,
    part: Part,
    up: Upstream,
    at: tuple[Array, Array],
    total: Array,
) -> Array:
    found = jnp.zeros(part.h.shape[1:3], total.dtype)
    g = g._replace(block_q=g.step_q)  # every row once, where tiles of it are spans too

    def turn(line: Array, found: Array) -> Array:
        i = line * g.step_q
        m, log_l, delta, d_lse = (
            tiles.cut(a, i, g.block_q, 3) for a in (up.m, up.log_l, up.delta, up.d_lse)
        )
        share = jnp.exp((sinks_of(p, x, g, part, i) - m) - log_l)
        return found + jnp.where(log_l < jnp.inf, share * (d_lse - delta), 0.0).sum((0, 3))

    found = times(g, g.rows, turn, found)
    start = at[1] if g.level == 2 else jnp.int32(0)
    return _add(total, found, start, 0)


def _columns(
    p: Problem,
    x: Operands,
    g: Geometry,
    part: Part,
    by_columns: Schedule,
    up: Upstream,
    derivative: Derivative | None,
    shared: Shared,
) -> tuple[Shared, tuple[Array, Array, Array]]:
    """(shared, (dQ, dK, dV)) of a part, the gradients as words."""
    dtype = DTYPES[p.accumulation]

    def given(d: Array) -> Array:
        return tiles.words(d.astype(DTYPES[p.dtype]))

    def turn(line: Array, carry: Any) -> Any:
        j = line * g.step_k
        d_query, d_keys, d_values, shared = carry
        k, v = (tiles.key_tile(p, g, a, j) for a in (part.laid.key, part.laid.value))

        def step(masked: bool) -> Any:
            def body(i: Array, carry: Any) -> Any:
                d_query, d_k, d_v, shared = carry
                alive = _alive(g, up, i)
                q = _selected(query_tile(p, g, part, i), alive)
                z, found, slope, sites = tiles.logits(
                    p, x, g, part, (i, j), q, k, masked, derivative, tiles.kept_back(p)
                )
                m, log_l, delta, d_lse = (
                    tiles.cut(a, i, g.block_q, 3) for a in (up.m, up.log_l, up.delta, up.d_lse)
                )
                weights = probability(p, z, found, m, log_l)
                d_out = tiles.folded_tile(p, g, up.d_out, i, k.shape[1])
                d_out = _selected(d_out, alive)
                d_shares = tiles.unfold(tiles.dot(p, d_out, v, (3, 3)), p.group)
                shares = weights
                if p.rate:
                    kept, scale = tiles.kept(p, x, g, part, i, j), 1 / (1 - p.rate)
                    shares = jnp.where(kept, weights * scale, 0.0)
                    d_shares = jnp.where(kept, d_shares * scale, 0.0)
                if up.d_weights is not None:
                    d_shares = d_shares + _weight_tile(g, up, i, j).astype(dtype)
                dz = weights * (d_shares - (delta - d_lse)[..., None])
                dz = _where(found, dz)
                shared = _share(p, x, g, part, shared, dz, found, sites, derivative, (i, j))
                ds = dz if slope is None else _where(found, dz * slope)
                ds = tiles.fold(jnp.broadcast_to(ds, z.shape)).astype(k.dtype)
                some = k if found is None else tiles.only(k, tiles.seen(found))
                shares = tiles.fold(jnp.broadcast_to(shares, z.shape)).astype(v.dtype)
                d_v = d_v + tiles.dot(p, _turned(p, g, up.turned, 1, i, d_out), shares, (3, 2))
                # Rows that were scaled beforehand make d K whole already.
                d_k = d_k + tiles.dot(p, _turned(p, g, up.turned, 0, i, q), ds, (3, 2))
                d_q = tiles.unfold(tiles.dot(p, ds, some, (3, 2)), p.group)
                return _add(d_query, d_q, i, 3), d_k, d_v, shared

            return body

        none = (jnp.zeros(x.swapaxes(2, 3).shape, dtype) for x in (k, v))
        carry = over_tiles(g, by_columns, line, g.step_q, step, (d_query, *none, shared))
        d_query, d_k, d_v, shared = carry
        # Of a span there is no loop to keep XLA from folding the turn into products of bfloat16,
        # which its CPU does not have in that order for several batches.
        d_k, d_v = jax.lax.optimization_barrier((d_k, d_v)) if g.spans else (d_k, d_v)
        d_k, d_v = d_k.swapaxes(2, 3), d_v.swapaxes(2, 3)
        d_k = d_k if tiles.prescaled(p) else d_k * p.scale
        d_keys, d_values = (
            jax.lax.dynamic_update_slice_in_dim(old, given(new), j, 2)
            for old, new in ((d_keys, d_k), (d_values, d_v))
        )
        return d_query, d_keys, d_values, shared

    carry = (
        jnp.zeros((*rows_shape(p, part), part.laid.query.shape[3]), dtype),
        jnp.zeros_like(part.laid.key),
        jnp.zeros_like(part.laid.value),
        shared,
    )
    d_query, d_keys, d_values, shared = times(g, g.columns, turn, carry)
    return shared, (given(d_query * p.scale), d_keys, d_values)


def _share(
    p: Problem,
    x: Operands,
    g: Geometry,
    part: Part,
    shared: Shared,
    dz: Array,
    found: Array | None,
    sites: Any,
    derivative: Derivative | None,
    at: tuple[Array, Array],
) -> Shared:
    """What a tile adds to the gradients of bias and of the score's operands."""
    if shared.bias is not None:
        shared = shared._replace(bias=_bias(p, g, part, shared.bias, dz, at))
    if derivative is None:
        return shared
    tables = list(shared.tables)
    for site, (adjoint, index) in zip(derivative.sites, sites, strict=True):
        d = _where(found, dz * adjoint)
        d = jnp.broadcast_to(d, dz.shape)
        index = [jnp.asarray(i).reshape((1,) * (5 - jnp.ndim(i)) + jnp.shape(i)) for i in index]
        # Added up first along every axis that the indices do not move along.
        still = tuple(a for a in range(5) if all(i.shape[a] == 1 for i in index))
        d = d.sum(still, keepdims=True)
        table = tables[site.operand]
        assert table is not None
        tables[site.operand] = table.at[clamp(table.shape, index)].add(
            d if index else d.reshape(())
        )
    return shared._replace(tables=tuple(tables))


def _bias(
    p: Problem, g: Geometry, part: Part, total: Array, dz: Array, at: tuple[Array, Array]
) -> Array:
    """`total` with the tile's share, summed along the axes that the bias does not span."""
    spans = p.bias or ()
    still = [axis for axis, spanned in zip((0, (1, 2), 3, 4), spans, strict=True) if not spanned]
    flat = tuple(a for axis in still for a in (axis if isinstance(axis, tuple) else (axis,)))
    d = dz.sum(flat, keepdims=True)
    d = d.reshape(d.shape[0], d.shape[1] * d.shape[2], *d.shape[3:])
    zero = jnp.int32(0)
    start = (
        part.b[0, 0, 0, 0, 0] if spans[0] and g.level >= 1 else zero,
        part.h[0, 0, 0, 0, 0] if spans[1] and g.level == 2 else zero,
        at[0] if spans[2] else zero,
        at[1] if spans[3] else zero,
    )
    old = jax.lax.dynamic_slice(total, start, d.shape)
    return jax.lax.dynamic_update_slice(total, old + d, start)


def _where(found: Array | None, x: Array) -> Array:
    return x if found is None else jnp.where(found, x, 0.0)


def _add(total: Array, more: Array, start: Array, axis: int) -> Array:
    old = jax.lax.dynamic_slice_in_dim(total, start, more.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, old + more, start, axis)
