"""The judge: attention and its gradients in plain float64 NumPy. It shares nothing with the judged.

For query row i of batch b and query head h, standing at q = i + query_offset[b], and key k:

    s = scale · (Q[b,h,i] · K[b,h//G,k])            scale is 1/√D where left out, G = Hq / Hk
    s = score(s, b, h, q, k, *operands)             optional, a plain NumPy function
    s = s + bias[b,h,i,k]                           optional
    allowed = mask[b,h,i,k] and k < kv_lengths[b] and i < q_lengths[b] and s is not −∞
    p = exp(s) / (Σ_allowed exp(s) + exp(sinks[h])) the weights
    out[b,h,i] = Σ_allowed p · keep / (1 − rate) · V[b,h//G,k]
    lse[b,h,i] = log(Σ_allowed exp(s) + exp(sinks[h]))

One rule settles nearly every question: *select before every sum*. A product with something that is
not allowed is never formed, so no NaN waiting there can reach anything; nothing large is ever added
to hide a key. What follows from the formula by that rule:

- a row with no allowed key has out 0, weights 0 and lse = sink, or −∞ where there is no sink, and
  the only non-zero gradient is ∂lse/∂sink = 1; a sink of −∞ is no sink;
- a padded row (i ≥ q_lengths[b]) has lse −∞ even with sinks, and passes no gradient on, whatever
  comes from upstream;
- a −∞ from bias, from score or from their sum takes its key away; a NaN there is data and spreads.

Axes: B batch, Hq query heads, Hk key/value heads, Tq queries, Tk keys, D and Dv widths. query is
(B,Hq,Tq,D), key (B,Hk,Tk,D), value (B,Hk,Tk,Dv) in layout "BHTD"; "BTHD" swaps the middle axes.
mask and bias have rank 2 (Tq,Tk) or 4 and broadcast to (B,Hq,Tq,Tk) in both layouts; sinks are
(Hq,), lengths (B,); query_offset is an int, (B,) ints, "start" (0) or "end" (kv length − query
length); dropout is (rate, seed). Inputs of any float dtype are taken to float64 first. Memory is
O(Tq·Tk).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
ScoreFunction = Callable[..., Any]  # score(s, b, h, q, k, *operands), elementwise in s
Offset = Any  # int, (B,) ints, "start" or "end"

# Half-width of the central differences, relative to values above 1: near the cube root of the
# float64 rounding unit, where truncation and rounding both stay below 1e-10.
STEP = 2.0**-17


class Judged(NamedTuple):
    """float64: out in the query's layout, lse (B,Hq,Tq), weights (B,Hq,Tq,Tk) before dropout."""

    out: Array
    lse: Array
    weights: Array


class _Logits(NamedTuple):
    """What the softmax takes, and what its backward needs of the way there."""

    q: Array  # (B,Hq,Tq,D)
    k: Array  # (B,Hq,Tk,D), repeated over the query heads of a group
    scale: float
    dot: Array  # (B,Hq,Tq,Tk) scaled dot product, 0 where not allowed
    logits: Array  # (B,Hq,Tq,Tk) after score and bias, −∞ where not allowed
    allowed: Array  # (B,Hq,Tq,Tk)
    padded: Array  # (B,1,Tq)
    place: tuple[Array, Array, Array, Array]  # b, h, q, k, broadcasting to (B,Hq,Tq,Tk)
    score: Callable[[Array, tuple[Array, ...]], Array] | None  # the caller's, at these places
    operands: tuple[Array, ...]


def _float64(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def _bhtd(x: Array, layout: str) -> Array:
    """To (B,H,T,·), or back: swapping twice is doing nothing."""
    if layout not in ("BHTD", "BTHD"):
        raise ValueError(f"`layout` must be 'BHTD' or 'BTHD'. Got {layout!r}.")
    return x if layout == "BHTD" else x.swapaxes(1, 2)


def _spread(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """A mask or bias as (B,Hq,Tq,Tk). Rank 3 would line B up with Hq, so it is refused."""
    if x.ndim not in (2, 4):
        raise ValueError(f"`{name}` must have rank 2 or 4. Got shape {x.shape}.")
    return np.broadcast_to(x, shape)


def _gather(x: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of broadcasting `shape` to the shape of x: sum over what was repeated."""
    y: Array = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return y.sum(axis=tuple(a for a, n in enumerate(shape) if n == 1), keepdims=True)


def _lengths(lengths: Any, T: int, B: int) -> Array:
    """(B,) ints in [0, T]; clipped, as a length known only at run time is."""
    given = np.asarray(T if lengths is None else lengths, dtype=np.int64)
    return np.clip(np.broadcast_to(given, (B,)), 0, T)


def _sum_seen(w: Array, seen: Array, x: Array) -> Array:
    """Σ_j w[b,h,i,j] · x[b,h,j,:] over seen[b,h,i,j]; w is 0 elsewhere, and 0 · NaN is not formed.

    Finite rows of x cannot do harm and go through a matmul; the others are added one by one.
    """
    finite = np.isfinite(x).all(axis=-1)
    total = w @ np.where(finite[..., None], x, 0.0)
    for b, h, j in np.argwhere(~finite):
        rows = seen[b, h, :, j]
        total[b, h, rows] += w[b, h, rows, j, None] * x[b, h, j]
    return total


def _logits(
    query: Any,
    key: Any,
    mask: Any,
    bias: Any,
    score: ScoreFunction | None,
    operands: tuple[Any, ...],
    scale: float | None,
    kv_lengths: Any,
    q_lengths: Any,
    query_offset: Offset,
    layout: str,
) -> _Logits:
    """Everything before the softmax, and so the one place that decides what is allowed."""
    q, k = _bhtd(_float64(query), layout), _bhtd(_float64(key), layout)
    (B, Hq, Tq, D), (_, Hk, Tk, _) = q.shape, k.shape
    shape = (B, Hq, Tq, Tk)
    if Hq % Hk:
        raise ValueError(f"`query` heads must be a multiple of `key` heads. Got {Hq} and {Hk}.")
    k = np.repeat(k, Hq // Hk, axis=1)
    scale = 1.0 / np.sqrt(D) if scale is None else float(scale)

    kv_n, q_n = _lengths(kv_lengths, Tk, B), _lengths(q_lengths, Tq, B)
    if isinstance(query_offset, str):
        query_offset = {"start": 0, "end": kv_n - q_n}[query_offset]
    offset = np.broadcast_to(np.asarray(query_offset, dtype=np.int64), (B,))
    b, h, i, j = np.ogrid[:B, :Hq, :Tq, :Tk]
    place = (b, h, i + offset[:, None, None, None], j)
    padded = i >= q_n[:, None, None, None]

    may = np.broadcast_to((j < kv_n[:, None, None, None]) & ~padded, shape)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != np.bool_:
            raise TypeError(f"`mask` must be boolean, True = attend. Got {mask.dtype}.")
        may = may & _spread("mask", mask, shape)
    if bias is not None:
        bias = _spread("bias", _float64(bias), shape)
        may = may & (bias != -np.inf)  # whatever the score says, NaN and +∞ included

    # Whole-number tables (segment ids, buckets) stay as they are; they receive no gradient.
    tables = tuple(np.asarray(x) for x in operands)
    tables = tuple(x if x.dtype.kind in "iub" else _float64(x) for x in tables)

    scored = None
    if score is not None:

        def scored(s: Array, tables: tuple[Array, ...]) -> Array:
            return np.broadcast_to(_float64(score(s, *place, *tables)), shape)

    # Each dot product reads one query and one key, so selecting here stops the poison of both.
    dot = np.where(may, scale * (q @ k.swapaxes(-1, -2)), 0.0)
    after = dot if scored is None else scored(dot, tables)
    total = after if bias is None else after + bias
    allowed = may & (after != -np.inf) & (total != -np.inf)
    return _Logits(
        q=q,
        k=k,
        scale=scale,
        dot=np.where(allowed, dot, 0.0),
        logits=np.where(allowed, total, -np.inf),
        allowed=allowed,
        padded=padded[..., 0],
        place=place,
        score=scored,
        operands=tables,
    )


def _softmax(x: _Logits, sinks: Any) -> tuple[Array, Array, Array, Array]:
    """p (B,Hq,Tq,Tk), and lse, the sink (−∞ is none) and its share of the softmax, (B,Hq,Tq) each.

    The normaliser travels as (m, log l): m + log l rounds log l away in a row of −1e9 or finfo.min.
    """
    sink = np.full(x.logits.shape[:3], -np.inf)
    if sinks is not None:
        sink = np.where(x.padded, -np.inf, _float64(sinks)[:, None])
    m = np.maximum(x.logits.max(axis=-1, initial=-np.inf), sink)
    m = np.where(m == -np.inf, 0.0, m)
    log_l = np.log(np.exp(x.logits - m[..., None]).sum(axis=-1) + np.exp(sink - m))
    p = np.where(x.allowed, np.exp((x.logits - m[..., None]) - log_l[..., None]), 0.0)
    p_sink = np.where(sink == -np.inf, 0.0, np.exp((sink - m) - log_l))
    return p, m + log_l, sink, p_sink


def _kept(x: _Logits, dropout: tuple[float, Any] | None) -> Array | float:
    """keep / (1 − rate) over (B,Hq,Tq,Tk), what dropout multiplies the weights by."""
    if dropout is None:
        return 1.0
    rate, seed = dropout
    b, h, q, k = x.place
    return keep(rate, seed, b.ravel(), h.ravel(), q[:, 0, :, 0], k.ravel()) / (1.0 - rate)


@np.errstate(all="ignore")
def allowed(
    query: Any,
    key: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    score: ScoreFunction | None = None,
    operands: tuple[Any, ...] = (),
    scale: float | None = None,
    kv_lengths: Any = None,
    q_lengths: Any = None,
    query_offset: Offset = 0,
    layout: str = "BHTD",
) -> Array:
    """Which keys each query row attends to: boolean (B,Hq,Tq,Tk), False throughout a padded row."""
    return _logits(
        *(query, key, mask, bias, score, operands, scale),
        *(kv_lengths, q_lengths, query_offset, layout),
    ).allowed


@np.errstate(all="ignore")
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    score: ScoreFunction | None = None,
    operands: tuple[Any, ...] = (),
    scale: float | None = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    q_lengths: Any = None,
    query_offset: Offset = 0,
    dropout: tuple[float, Any] | None = None,
    layout: str = "BHTD",
) -> Judged:
    """The formula above. Rows that see nothing: out 0, weights 0, lse the sink or −∞."""
    x = _logits(
        *(query, key, mask, bias, score, operands, scale),
        *(kv_lengths, q_lengths, query_offset, layout),
    )
    p, lse, _, _ = _softmax(x, sinks)
    v = _bhtd(_float64(value), layout)
    v = np.repeat(v, x.q.shape[1] // v.shape[1], axis=1)
    return Judged(_bhtd(_sum_seen(p * _kept(x, dropout), x.allowed, v), layout), lse, p)


@np.errstate(all="ignore")
def gradients(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    score: ScoreFunction | None = None,
    operands: tuple[Any, ...] = (),
    scale: float | None = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    q_lengths: Any = None,
    query_offset: Offset = 0,
    dropout: tuple[float, Any] | None = None,
    layout: str = "BHTD",
    d_out: Any = None,
    d_lse: Any = None,
    d_weights: Any = None,
) -> dict[str, Any]:
    """Pull d_out (as out), d_lse (B,Hq,Tq) and d_weights (B,Hq,Tq,Tk) back; one left out is 0.

        dp = keep / (1 − rate) · (d_out · V) + d_weights,   δ = Σ_allowed p · dp
        ds = p · (dp − δ + d_lse)                           after bias, so dbias is ds
        dsink = p_sink · (d_lse − δ)                        a key whose dp is 0

    ∂score/∂s and ∂score/∂operand are central differences, everything else is analytic.

    Returns float64 "query", "key", "value", each in its input's shape; "bias" and "sinks" where
    given, likewise; and always "operands", a tuple with None in the place of each integer operand.
    """
    x = _logits(
        *(query, key, mask, bias, score, operands, scale),
        *(kv_lengths, q_lengths, query_offset, layout),
    )
    p, _, sink, p_sink = _softmax(x, sinks)
    kept = _kept(x, dropout)
    v = _bhtd(_float64(value), layout)
    Hk = v.shape[1]
    G = x.q.shape[1] // Hk
    v = np.repeat(v, G, axis=1)

    # What is left out adds nothing, rather than 0 times a value that may be NaN.
    dp, do = np.zeros(p.shape), np.zeros(x.q.shape[:3] + v.shape[3:])
    if d_out is not None:
        do = _bhtd(_float64(d_out), layout)
        dp = dp + kept * (do @ v.swapaxes(-1, -2))
    if d_weights is not None:
        dp = dp + _float64(d_weights)
    dp = np.where(x.allowed, dp, 0.0)
    delta = (p * dp).sum(axis=-1)
    dl = np.zeros(delta.shape) if d_lse is None else _float64(d_lse)
    ds = np.where(x.allowed, p * (dp - delta[..., None] + dl[..., None]), 0.0)

    d_dot, d_operands = _score_gradients(x, ds)
    seen, turned = x.allowed, x.allowed.swapaxes(-1, -2)
    dq = x.scale * _sum_seen(d_dot, seen, x.k)
    dk = x.scale * _sum_seen(d_dot.swapaxes(-1, -2), turned, x.q)
    dv = _sum_seen((p * kept).swapaxes(-1, -2), turned, do)

    def group_sum(d: Array) -> Array:
        split: Array = d.reshape(d.shape[0], Hk, G, *d.shape[2:])
        return split.sum(axis=2)

    result: dict[str, Any] = {
        "query": _bhtd(dq, layout),
        "key": _bhtd(group_sum(dk), layout),
        "value": _bhtd(group_sum(dv), layout),
        "operands": d_operands,
    }
    if bias is not None:
        result["bias"] = _gather(ds, np.shape(bias))
    if sinks is not None:
        # The row's own d_lse may be poison where there is no sink to send it to.
        result["sinks"] = np.where(sink == -np.inf, 0.0, p_sink * (dl - delta)).sum(axis=(0, 2))
    return result


def _score_gradients(x: _Logits, ds: Array) -> tuple[Array, tuple[Array | None, ...]]:
    """From the gradient of the scores to that of the dot products and of each operand, selected."""

    def step(at: Array) -> Array:
        return STEP * np.where(np.isfinite(at), np.maximum(1.0, np.abs(at)), 1.0)

    def pull(up: Array, down: Array, h: Array) -> Array:
        return np.where(x.allowed, ds * ((up - down) / (2.0 * h)), 0.0)

    if x.score is None:
        return ds, tuple(None if t.dtype.kind in "iub" else np.zeros(t.shape) for t in x.operands)

    h = step(x.dot)
    d_dot = pull(x.score(x.dot + h, x.operands), x.score(x.dot - h, x.operands), h)

    d_operands: list[Array | None] = []
    for n, table in enumerate(x.operands):
        if table.dtype.kind in "iub":
            d_operands.append(None)
            continue
        d_table, steps = np.zeros(table.shape), step(table)
        for at in np.ndindex(table.shape):
            moved = []
            for sign in (1.0, -1.0):
                nudged = table.copy()
                nudged[at] += sign * steps[at]
                moved.append(x.score(x.dot, (*x.operands[:n], nudged, *x.operands[n + 1 :])))
            d_table[at] = pull(moved[0], moved[1], steps[at]).sum()
        d_operands.append(d_table)
    return d_dot, tuple(d_operands)


def philox(counter: Any, key: Any) -> tuple[Array, Array, Array, Array]:
    """Philox4x32-10: four uint32 words from a counter of four and a key of two, in [0, 2³²) each.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Words may
    be ints or integer arrays that broadcast; the arithmetic is uint64, where 32 × 32 bits fit.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> half) ^ c1 ^ k0, b & low, (a >> half) ^ c3 ^ k1, a & low
        k0 = (k0 + np.uint64(0x9E3779B9)) & low  # golden ratio
        k1 = (k1 + np.uint64(0xBB67AE85)) & low  # √3 − 1
    c0, c1, c2, c3 = np.broadcast_arrays(c0, c1, c2, c3)
    return c0.astype("u4"), c1.astype("u4"), c2.astype("u4"), c3.astype("u4")


def keep(rate: float, seed: Any, batch: Any, heads: Any, q: Any, k: Any) -> Array:
    """The dropout mask, True = kept: boolean (B,Hq,Tq,Tk), each entry a function of its position.

    batch (B,), heads (Hq,) and k (Tk,) are indices, q (B,Tq) absolute positions, of either sign.
    Word k mod 4 of counter (k // 4, q mod 2³², h, b) under key seed mod 2⁶⁴, low half first.
    """
    b = np.asarray(batch)[:, None, None, None]
    h = np.asarray(heads)[:, None, None]
    q = np.asarray(q, dtype=np.int64)[:, None, :, None] % 2**32
    k = np.asarray(k)
    seed = int(seed) % 2**64
    words = philox((k // 4, q, h, b), (seed % 2**32, seed // 2**32))
    threshold = min(round(rate * 2**32), 2**32 - 1)
    return np.choose(k % 4, words) >= np.uint32(threshold)
