"""The formula in NumPy, reading masks and scores from their trees; O(Tq * Tk) memory.

Selection comes before every product: what may not be seen is replaced by zero before it is
multiplied, so that no 0 * NaN arises, and every result is selected once more where a cotangent
could carry poison in. The backward pass is analytic and takes the score's derivative from its
dual reading.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attn_core.backends.numpy.arrays import Reading, clamp
from attn_core.backends.numpy.philox import keep
from attn_core.language.duals import differentiate
from attn_core.language.values import drop_threshold
from attn_core.spec import AttentionOutput, Operands, Problem

Array = Any


class Forward(NamedTuple):
    """What the backward pass needs of the forward one; B, Hq, Tq, Tk unless said otherwise."""

    q: Array  # (B, Hq, Tq, D) accumulation dtype, zero where the row sees no key
    k: Array  # (B, Hk, Tk, D) zero where no query of the group sees it
    v: Array  # (B, Hk, Tk, Dv) likewise
    s: Array  # scaled product, before the score
    indices: dict[str, Array]
    allowed: Array
    rows: Array  # (B, Hq, Tq) sees at least one key
    seen: Array  # (B, Hk, Tk)
    weights: Array
    sink_share: Array  # (B, Hq, Tq) the sink's part of the softmax
    summed: Array  # (B, Hq, Tq) the denominator is not zero
    factor: Array | float  # keep / (1 - rate)
    out: Array
    lse: Array


def attend(problem: Problem, x: Operands) -> AttentionOutput:
    f = forward(problem, x)
    dtype = x.query.dtype
    out = f.out.astype(dtype)
    return AttentionOutput(
        out if problem.layout == "BHTD" else out.swapaxes(1, 2),
        f.lse if problem.return_lse else None,
        f.weights.astype(dtype) if problem.return_weights else None,
    )


def forward(p: Problem, x: Operands) -> Forward:
    dtype = np.dtype(p.accumulation)
    q, k, v = [_heads_first(a, p).astype(dtype) for a in (x.query, x.key, x.value)]
    full = (q.shape[0], p.heads, q.shape[2], k.shape[2])
    index = indices(p, x, *full)
    allowed = np.broadcast_to(structure(p, x, index), full)
    bias = None if x.bias is None else x.bias.astype(dtype)
    if bias is not None:
        allowed = allowed & (bias != -np.inf)
    if p.score is not None:
        # A score may hide keys too, by -inf, whatever the bias is there; what it hides must not be
        # multiplied either.
        logits = _logits(p, x, q, k, None, index, allowed)[1]
        allowed = allowed & (logits != -np.inf)
    s, logits = _logits(p, x, q, k, bias, index, allowed)
    allowed = allowed & (logits != -np.inf)
    rows, seen = allowed.any(-1), _seen(p, allowed)

    hidden = np.where(allowed, logits, -np.inf)
    m = hidden.max(-1, initial=-np.inf)
    valid = np.ones((), bool) if x.q_lengths is None else _valid(x, index)
    if x.sinks is not None:
        sinks = np.where(valid, x.sinks.astype(dtype)[:, None], -np.inf)
        m = np.maximum(m, sinks)
    m = np.where(m == -np.inf, 0, m)
    e = np.where(allowed, np.exp(hidden - m[..., None]), 0)
    sink = np.zeros_like(m) if x.sinks is None else np.exp(sinks - m)
    total = e.sum(-1) + sink
    summed = total != 0
    total = np.where(summed, total, 1)
    weights = np.where(allowed, e / total[..., None], 0)
    lse = np.where(summed, m + np.log(total), -np.inf)
    factor: Array | float = 1.0
    if p.rate:
        kept = keep(
            drop_threshold(p.rate), x.seed, full[0], p.heads, index["q"][:, 0, :, 0], full[3]
        )
        factor = np.where(kept, dtype.type(1 / (1 - p.rate)), dtype.type(0))
    q, k, v = _select(q, rows), _select(k, seen), _select(v, seen)
    out = _select(_product(p, weights * factor, v), rows)
    return Forward(
        q, k, v, s, index, allowed, rows, seen, weights, sink / total, summed, factor, out, lse
    )


def backward(
    p: Problem, x: Operands, d_out: Array | None, d_lse: Array | None, d_weights: Array | None
) -> Operands:
    """Gradients of every floating operand for these cotangents; None for the rest."""
    f = forward(p, x)
    dtype = f.q.dtype
    d_p = np.zeros_like(f.weights)
    d_v = np.zeros_like(f.v)
    if d_out is not None:
        d_out = _select(_heads_first(d_out, p).astype(dtype), f.rows)
        d_v = _gather(p, f.weights * f.factor, d_out)
        d_p = _product(p, d_out, f.v.swapaxes(-1, -2)) * f.factor
    if d_weights is not None:
        d_p = d_p + d_weights.astype(dtype)
    d_p = np.where(f.allowed, d_p, 0)
    carried = (f.weights * d_p).sum(-1)
    d_z = f.weights * (d_p - carried[..., None])
    d_sinks = -f.sink_share * carried
    if d_lse is not None:
        d_lse = np.where(f.summed, d_lse, 0)
        d_z = d_z + f.weights * d_lse[..., None]
        d_sinks = d_sinks + f.sink_share * d_lse
    d_z = np.where(f.allowed, d_z, 0)

    d_s, d_score = _through_score(p, x, f, d_z)
    d_q = _select(p.scale * _product(p, d_s, f.k), f.rows)
    d_k = _select(p.scale * _gather(p, d_s, f.q), f.seen)
    d_v = _select(d_v, f.seen)
    return Operands(
        query=_heads_first(d_q, p).astype(x.query.dtype),
        key=_heads_first(d_k, p).astype(x.key.dtype),
        value=_heads_first(d_v, p).astype(x.value.dtype),
        bias=None if x.bias is None else _reduce(d_z, x.bias.shape).astype(x.bias.dtype),
        sinks=None if x.sinks is None else d_sinks.sum((0, 2)).astype(x.sinks.dtype),
        score=d_score,
    )


def indices(
    p: Problem, x: Operands, batch: int, heads: int, q_len: int, k_len: int
) -> dict[str, Array]:
    """b, h, q, k and row as int32 arrays that broadcast to (B, Hq, Tq, Tk)."""
    row = np.arange(q_len, dtype=np.int32)[None, None, :, None]
    return {
        "b": np.arange(batch, dtype=np.int32)[:, None, None, None],
        "h": np.arange(heads, dtype=np.int32)[None, :, None, None],
        "q": row + offset(p, x, q_len, k_len),
        "k": np.arange(k_len, dtype=np.int32)[None, None, None, :],
        "row": row,
    }


def offset(p: Problem, x: Operands, q_len: int, k_len: int) -> Array:
    """query_offset as int32, (B or 1, 1, 1, 1)."""
    if p.offset == "zero":
        return np.zeros((1, 1, 1, 1), np.int32)
    if p.offset == "given":
        return x.query_offset.astype(np.int32).reshape(-1, 1, 1, 1)
    keys = np.int32(k_len) if x.kv_lengths is None else x.kv_lengths
    rows = np.int32(q_len) if x.q_lengths is None else x.q_lengths
    return np.asarray(keys - rows, np.int32).reshape(-1, 1, 1, 1)


def structure(p: Problem, x: Operands, index: dict[str, Array]) -> Array:
    """Mask and lengths, before bias and score have a say; broadcasts to (B, Hq, Tq, Tk)."""
    allowed = np.ones((1, 1, 1, 1), bool)
    if p.mask is not None:
        allowed = allowed & Reading(p.accumulation).read(p.mask, index, x.mask)[0]
    if x.kv_lengths is not None:
        allowed = allowed & (index["k"] < x.kv_lengths.reshape(-1, 1, 1, 1))
    if x.q_lengths is not None:
        allowed = allowed & _valid(x, index)[..., None]
    return allowed


def _valid(x: Operands, index: dict[str, Array]) -> Array:
    """(B or 1, 1, Tq): the row is no padding."""
    return index["row"][..., 0] < x.q_lengths.reshape(-1, 1, 1)


def _logits(
    p: Problem, x: Operands, q: Array, k: Array, bias: Array | None, index: Any, allowed: Array
) -> tuple[Array, Array]:
    """The scaled product, and what score and bias make of it, from selected operands."""
    q, k = _select(q, allowed.any(-1)), _select(k, _seen(p, allowed))
    s = z = q.dtype.type(p.scale) * _product(p, q, k.swapaxes(-1, -2))
    if p.score is not None:
        s = np.where(allowed, s, 0)
        z = Reading(p.accumulation, allowed).read(p.score, {**index, "s": s}, x.score)[0]
    if bias is not None:
        z = z + np.where(allowed, bias, 0)
    return s, np.broadcast_to(z, allowed.shape)


def _through_score(
    p: Problem, x: Operands, f: Forward, d_z: Array
) -> tuple[Array, tuple[Any, ...]]:
    """d s, and the gradient of each operand of the score."""
    if p.score is None:
        return d_z, ()
    dual = differentiate(p.score)
    s = np.where(f.allowed, f.s, 0)
    read = Reading(p.accumulation, f.allowed).read(dual.tree, {**f.indices, "s": s}, x.score)
    gradients: list[Any] = [
        np.zeros(a.shape, d_z.dtype) if a.dtype.kind not in "iub" else None for a in x.score
    ]
    at = 2
    for site in dual.sites:
        slope, *found = read[at : at + 1 + site.indices]
        at += 1 + site.indices
        table = gradients[site.operand]
        given = np.where(f.allowed, d_z * slope, 0)
        if not found:
            table += given.sum()
        elif table.size:
            place = np.broadcast_arrays(*clamp(table.shape, found), given)
            np.add.at(table, tuple(place[:-1]), given)
    d_score = tuple(
        None if g is None else g.astype(a.dtype) for g, a in zip(gradients, x.score, strict=True)
    )
    return np.where(f.allowed, d_z * read[1], 0), d_score


def _heads_first(x: Array, p: Problem) -> Array:
    """(B, H, T, D) from the layout, or back: the exchange is its own inverse."""
    return x if p.layout == "BHTD" else x.swapaxes(1, 2)


def _seen(p: Problem, allowed: Array) -> Array:
    """(B, Hk, Tk): some query of the group may see the key."""
    batch, _, rows, keys = allowed.shape
    return allowed.reshape(batch, p.kv_heads, p.group * rows, keys).any(2)


def _select(x: Array, rows: Array) -> Array:
    return np.where(rows[..., None], x, 0)


def _product(p: Problem, a: Array, b: Array) -> Array:
    """(B, Hq, T, X) @ (B, Hk, X, Y), the heads of a group as one tall matrix."""
    batch, _, rows, inner = a.shape
    folded = a.reshape(batch, p.kv_heads, p.group * rows, inner)
    return (folded @ b).reshape(batch, p.heads, rows, b.shape[-1])


def _gather(p: Problem, a: Array, b: Array) -> Array:
    """Sum over the group's rows: (B, Hq, T, X), (B, Hq, T, Y) -> (B, Hk, X, Y)."""
    batch, _, rows, _ = a.shape
    tall = (batch, p.kv_heads, p.group * rows)
    return a.reshape(*tall, a.shape[-1]).swapaxes(-1, -2) @ b.reshape(*tall, b.shape[-1])


def _reduce(g: Array, shape: tuple[int, ...]) -> Array:
    """A gradient summed over the axes along which its operand was broadcast."""
    rank4 = (1,) * (4 - len(shape)) + tuple(shape)
    axes = tuple(i for i in range(4) if rank4[i] == 1 and g.shape[i] != 1)
    return g.sum(axes, keepdims=True).reshape(shape)
