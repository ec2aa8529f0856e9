"""Questions to the TensorFlow backend, the judge's own account of them, and how answers compare."""

import ml_dtypes
import numpy as np

import attn_core
from attn_core import Dropout, masks, reference, scores
from attn_core.backends import tf as backend

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 8, 6
FULL = (B, HQ, TQ, TK)
NAN, INF = np.nan, np.inf
DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
# Of one entry, relative to 1 + its size: a few units of rounding of the coarsest dtype on its way.
TOLERANCE = {"float64": 1e-8, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


# --- The cases: arguments, the judge's own account of them, and a few changes to the arrays. ------


def make(name, dtype="float32", **sizes):
    """(call, judge, cotangents) in NumPy; the judge is told of masks entry by entry."""
    rng = np.random.default_rng([ord(c) for c in name])
    b, hq, hk, tq, tk = {"b": B, "hq": HQ, "hk": HK, "tq": TQ, "tk": TK, **sizes}.values()
    kind = DTYPES[dtype]

    def draw(*shape):
        return rng.standard_normal(shape).astype(kind)

    call = {"query": draw(b, hq, tq, D), "key": draw(b, hk, tk, D), "value": draw(b, hk, tk, DV)}
    wide = np.float64 if dtype == "float64" else np.float32
    cotangents = {
        "out": draw(b, hq, tq, DV),
        "lse": draw(b, hq, tq).astype(wide),
        "weights": draw(b, hq, tq, tk),
    }
    judge = dict(call)
    if name in CASES:
        CASES[name](call, judge, cotangents, rng)
    return call, judge, cotangents


def rule(fn, offset=0, shape=FULL):
    b, h, i, k = np.ogrid[tuple(slice(n) for n in shape)]
    q = i + np.broadcast_to(offset, shape[0])[:, None, None, None]
    return np.broadcast_to(fn(b, h, q, k, i), shape)


def plain(call, judge, cot, rng):
    pass


def bthd(call, judge, cot, rng):
    for name in ("query", "key", "value"):
        call[name] = judge[name] = np.ascontiguousarray(call[name].swapaxes(1, 2))
    cot["out"] = np.ascontiguousarray(cot["out"].swapaxes(1, 2))
    call |= {"layout": "BTHD", "scale": -0.7}
    judge |= {"layout": "BTHD", "scale": -0.7}


def causal_start(call, judge, cot, rng):
    call |= {"mask": masks.causal(), "query_offset": "start"}
    judge["mask"] = rule(lambda b, h, q, k, i: q >= k)


def causal_end(call, judge, cot, rng):
    call |= {"mask": masks.causal() & masks.window(left=2), "query_offset": "end"}
    judge["mask"] = rule(lambda b, h, q, k, i: (q >= k) & (q - k <= 2), TK - TQ)


def offsets(call, judge, cot, rng):
    """One row of the batch starts before the keys, so that its first queries see nothing."""
    at = np.array([-3, 4], np.int64)
    call |= {"mask": masks.causal(), "query_offset": at}
    judge |= {"mask": rule(lambda b, h, q, k, i: q >= k, at), "query_offset": at}


def segments(call, judge, cot, rng):
    rows, keys = np.array([[3, 3, 1, 1, 9]] * 2), np.array([[1, 1, 3, 3, 3, 1, 2], [3] * 7])
    call["mask"] = masks.segments(rows, keys)
    judge["mask"] = rule(lambda b, h, q, k, i: rows[b, i] == keys[b, k])


def clamped(call, judge, cot, rng):
    """Look-ups before the first entry and after the last, and an axis of size 1."""
    ids, table = np.array([[4, 6, 4, 6]], np.int32), rng.standard_normal((1, 3)).astype(np.float32)
    x = attn_core.operand(table)
    score = attn_core.score(lambda s, b, h, q, k: s + x[h, k - q])
    call |= {"mask": masks.segments(ids), "score": score, "query_offset": -2}
    judge |= {"query_offset": -2, "operands": (table,)}
    judge["score"] = lambda s, b, h, q, k, t: s + t[0, np.clip(k - q, 0, 2)]
    at = np.r_[0, 0, :4, [3] * (TK - 4)]
    judge["mask"] = ids[0, at[:TQ], None] == ids[0, at[2:]]


def graph(call, judge, cot, rng):
    adjacency = rng.random((TQ, TK)) < 0.4
    call |= {"mask": ~masks.graph(adjacency) | masks.dilated(3), "query_offset": "start"}
    judge["mask"] = ~adjacency | rule(lambda b, h, q, k, i: (q - k) % 3 == 0)


def dense2(call, judge, cot, rng):
    judge["mask"] = call["mask"] = rng.random((TQ, TK)) < 0.5


def dense4(call, judge, cot, rng):
    table = rng.random((B, 1, TQ, TK)) < 0.5
    table[:, :, 1] = False
    judge["mask"] = call["mask"] = table


def wide_ids(call, judge, cot, rng):
    """int64 in an operand, beside int32 positions, in every integer operation."""
    ids = np.array([5, -5, 2, 0, -3, 4, 1], np.int64)
    table = attn_core.operand(ids, bounds=(-5, 5))

    def fn(b, h, q, k):
        x, low = table[k], attn_core.minimum(table[k] // 2, 1)
        late = attn_core.cast(q > 3, int)
        return ((x % (q - 2) > 0) | (low >> 1 == -1)) & ((k & 6) != 2) ^ (x < late)

    def at(b, h, q, k, i):
        x = ids[k]
        mod = np.where(q == 2, 0, x % np.where(q == 2, 1, q - 2))
        return ((mod > 0) | (np.minimum(x // 2, 1) >> 1 == -1)) & ((k & 6) != 2) ^ (x < (q > 3))

    call |= {"mask": attn_core.mask(fn), "query_offset": "start"}
    judge["mask"] = rule(at)


def bias4(call, judge, cot, rng):
    bias = rng.standard_normal(FULL).astype(np.float32)
    bias[0, 1, 2, :3] = -INF
    bias[1, 1, 3] = -INF
    bias[0, 0, 0, :3] = -1e9
    bias[0, 0, 1, 2:] = np.finfo(np.float32).min
    bias[1, 0, 0, 1] = 1e4
    judge["bias"] = call["bias"] = bias


def bias2(call, judge, cot, rng):
    judge["bias"] = call["bias"] = rng.standard_normal((TQ, TK)).astype(call["query"].dtype)


def bias_keys(call, judge, cot, rng):
    judge["bias"] = call["bias"] = rng.standard_normal((1, HQ, 1, TK)).astype(np.float32)


def sinks(call, judge, cot, rng):
    dense4(call, judge, cot, rng)
    judge["sinks"] = call["sinks"] = np.array([0.5, -INF, 3.0, -1.0], np.float32)


def lengths(call, judge, cot, rng):
    at = np.array([7 - 3, 4 - 5])
    sizes = {"kv_lengths": np.array([7, 4], np.int32), "q_lengths": np.array([3, 5], np.int64)}
    call |= sizes | {"mask": masks.causal(), "query_offset": "end"}
    judge |= sizes | {"mask": rule(lambda b, h, q, k, i: q >= k, at), "query_offset": "end"}
    judge["sinks"] = call["sinks"] = np.array([0.5, -1.0, 3.0, -INF], np.float32)


def scored(call, judge, cot, rng):
    slopes = rng.standard_normal(HQ).astype(np.float32)
    call |= {"score": scores.softcap(1.5).then(scores.alibi(slopes)), "query_offset": 3}
    judge |= {"query_offset": 3, "operands": (slopes,)}
    judge["score"] = lambda s, b, h, q, k, t: 1.5 * np.tanh(s / 1.5) - t[h] * abs(q - k)


def relative(call, judge, cot, rng):
    table = rng.standard_normal((5, HQ)).astype(np.float16)
    call |= {"score": scores.relative_bias(table, buckets="clipped"), "query_offset": "end"}
    judge |= {"operands": (table,), "query_offset": TK - TQ}
    judge["score"] = lambda s, b, h, q, k, t: s + t[np.clip(k - q, -2, 2) + 2, h]


def algebra(call, judge, cot, rng):
    """Ties, zero divisors, floors, casts and a key that the score itself hides."""
    x = rng.standard_normal((B, TK)).astype(np.float32)
    x[0, 3], x[1, 2] = 0.1, 7.0
    t = attn_core.operand(x)
    w = attn_core.where

    def fn(s, b, h, q, k):
        y = t[b, k]
        tied = attn_core.minimum(s, y) + attn_core.maximum(y, 2.0 * y - y) * attn_core.exp(-abs(y))
        none = s % 0.0 + s / (0.0 * y)
        quotient = s / (y + (k == 3)) + none + (y // 0.3) * 0.01 + attn_core.cast(3 * y, int)
        return w(y > 5.0, float("-inf"), tied + quotient + attn_core.log(1.0 + y * y) * s)

    def judged(s, b, h, q, k, x):
        y = x[b, k]
        z = y + (k == 3)
        tied = np.minimum(s, y) + y * np.exp(-abs(y))
        quotient = s / z + np.floor(y / 0.3) * 0.01 + np.trunc(3 * y)
        return np.where(y > 5.0, -INF, tied + quotient + np.log(1.0 + y * y) * s)

    call["score"] = attn_core.score(fn)
    judge |= {"score": judged, "operands": (x,)}


def dropout(call, judge, cot, rng):
    call |= {"dropout": Dropout(0.4, -5), "query_offset": -2, "mask": masks.prefix(6)}
    judge |= {"dropout": (0.4, -5), "query_offset": -2, "mask": rule(lambda b, h, q, k, i: k < 6)}


def everything(call, judge, cot, rng):
    lengths(call, judge, cot, rng)
    slopes = rng.standard_normal(HQ).astype(np.float32)
    call |= {"score": scores.alibi(slopes), "dropout": Dropout(0.25, 2**40 + 7)}
    judge |= {"operands": (slopes,), "dropout": (0.25, 2**40 + 7)}
    judge["score"] = lambda s, b, h, q, k, t: s - t[h] * abs(q - k)
    bias2(call, judge, cot, rng)


def poison(call, judge, cot, rng):
    """Where nothing may look: keys 0 and 6, rows 1 and 4, their cotangents, bias and operands."""
    may = np.ones((TQ, TK), bool)
    may[:, [0, 6]] = may[[1, 4]] = may[2, 3] = False
    slopes = rng.standard_normal(TK).astype(np.float32)
    bias = rng.standard_normal(FULL).astype(np.float32)
    for name, axis, at in (("key", 2, 0), ("value", 2, 6), ("query", 2, 1), ("query", 2, 4)):
        call[name] = judge[name] = call[name].copy()
        np.moveaxis(call[name], axis, 0)[at] = NAN if at else INF
    cot["out"][:, :, 1], cot["lse"][:, :, 4], cot["weights"][:, :, 2, 3] = NAN, INF, NAN
    cot["weights"][:, :, 1] = INF
    bias[:, :, ~may] = NAN
    slopes[[0, 6]] = NAN, INF
    table = attn_core.operand(slopes)
    score = attn_core.score(lambda s, b, h, q, k: 2.0 * attn_core.tanh(s) * attn_core.exp(table[k]))
    call |= {"mask": may, "bias": bias, "score": score}
    judge |= {"mask": may, "bias": bias, "operands": (slopes,)}
    judge["score"] = lambda s, b, h, q, k, t: 2.0 * np.tanh(s) * np.exp(t[k])


CASES = {
    f.__name__: f
    for f in (
        *(plain, bthd, causal_start, causal_end, offsets, segments, clamped, graph, dense2),
        *(
            dense4,
            wide_ids,
            bias4,
            bias2,
            bias_keys,
            sinks,
            lengths,
            scored,
            relative,
            algebra,
            dropout,
        ),
        *(everything, poison),
    )
}


def tensors(call):
    """Every array of a call as a tensor, those within masks and scores as well."""

    def tensor(x):
        if hasattr(x, "tree"):
            return type(x)(x.tree, tuple(tensor(a) for a in x.arrays))
        return backend.from_numpy(x) if isinstance(x, np.ndarray) else x

    return {name: tensor(x) for name, x in call.items()}


def answer(call, cotangents, form):
    """Outputs and gradients under one flat set of names, in NumPy."""
    return traced(call, cotangents, form)(call, cotangents)


def traced(call, cotangents, form):
    """`answer` as a function of arrays in the place of these, in one trace."""
    run = backend.pullback(*_given(call, cotangents), form)
    return lambda call, cotangents: _named(*run(*_given(call, cotangents)))


def _given(call, cotangents):
    call = tensors(call) | {"return_lse": True, "return_weights": True}
    return call, {name: backend.from_numpy(g) for name, g in cotangents.items()}


def _named(output, gradients):
    found = output._asdict() | gradients
    for i, g in enumerate(found.pop("score", ())):
        if g is not None:
            found[f"score{i}"] = g
    return {name: backend.to_numpy(x) for name, x in found.items()}


def judgement(judge, cotangents):
    expected = reference.attention(**judge)._asdict()
    given = {f"d_{name}": g for name, g in cotangents.items()}
    expected |= reference.gradients(**judge, **given)
    for i, g in enumerate(expected.pop("operands")):
        if g is not None:
            expected[f"score{i}"] = g
    return expected


def agree(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        y = found[name].astype(np.float64)
        assert y.shape == x.shape, name
        finite = np.isfinite(x)
        np.testing.assert_array_equal(y[~finite], x[~finite], err_msg=name)
        error = np.abs(y[finite] - x[finite]) / (1 + np.abs(x[finite]))
        allowed = max(tolerance, TOLERANCE[found[name].dtype.name])
        assert error.max(initial=0) <= allowed, (name, error.max())
