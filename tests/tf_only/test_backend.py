"""The TensorFlow backend against the float64 judge, eager and in every compiled form."""

import traceback

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import attn_core
from attn_core import Dropout, config, masks, reference, scores
from attn_core.backends import tf as backend
from attn_core.backends.tf.philox import keep
from attn_core.spec import Facts, Problem

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
    call = tensors(call) | {"return_lse": True, "return_weights": True}
    pulled = {name: backend.from_numpy(g) for name, g in cotangents.items()}
    output, gradients = backend.vjp(call, pulled, form)
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


# --- The formula. ---------------------------------------------------------------------------------


# With sizes that the graph knows the conformance suite asks every option of the same judge (form
# function, which make test runs). With sizes that it does not know test_chunked.py asks these, of
# more tiles than one, and the suite its sample.
TILED = (
    *("plain", "bthd", "causal_start", "causal_end", "offsets", "segments", "dense4", "bias4"),
    *("bias_keys", "sinks", "lengths", "everything", "poison"),
)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in CASES
        for form in backend.FORMS
        if form != "function" and (form != "dynamic" or name not in TILED)
    ],
)
def test_case(name, form):
    call, judge, cotangents = make(name)
    agree(answer(call, cotangents, form), judgement(judge, cotangents), TOLERANCE["float32"])


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("plain", "bthd")])
def test_each_case_is_told_from_no_options(name):
    """A case whose options could be ignored would prove nothing."""
    _, judge, _ = make(name)
    bare = {name: judge[name] for name in ("query", "key", "value")}
    if name == "poison":
        bare = {name: np.nan_to_num(x, posinf=0.0) for name, x in bare.items()}
    difference = reference.attention(**judge).weights - reference.attention(**bare).weights
    if name == "dropout":
        difference = reference.attention(**judge).out - reference.attention(**bare).out
    assert np.abs(difference).max() > 0.05


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "eager") for name in ("plain", "everything", "poison", "algebra")),
        ("everything", "xla"),
    ],
)
def test_dtypes(name, form, dtype):
    call, judge, cotangents = make(name, dtype)
    found = answer(call, cotangents, form)
    wide = "float64" if dtype == "float64" else "float32"
    for key in ("out", "weights", "query", "key", "value"):
        assert found[key].dtype == DTYPES[dtype], key
    assert found["lse"].dtype == wide
    # Operands and bias of float32 beside a wider query keep their dtype.
    for key in ("bias", "sinks"):
        assert key not in found or found[key].dtype == call[key].dtype
    agree(found, judgement(judge, cotangents), TOLERANCE[dtype])


@pytest.mark.parametrize("empty", ["b", "tq", "tk"])
@pytest.mark.parametrize("form", backend.FORMS)
def test_empty(empty, form):
    sizes = {"b": B, "tq": TQ, "tk": TK, empty: 0}
    call, judge, cotangents = make("empty", **sizes)
    shape = (sizes["b"], HQ, sizes["tq"], sizes["tk"])
    ids = np.zeros((sizes["b"], sizes["tk"]), np.int32)
    bias = np.ones((sizes["b"], 1, 1, sizes["tk"]), np.float32)
    sink = np.arange(HQ, dtype=np.float32)
    slopes = np.ones((sizes["b"], HQ), np.float32)
    table = attn_core.operand(slopes)
    mask = masks.segments(ids) & masks.dense(np.ones(shape[-2:], bool))
    score = attn_core.score(lambda s, b, h, q, k: s * table[b, h])
    options = {"bias": bias, "sinks": sink}
    call |= options | {"mask": mask, "query_offset": "start", "dropout": Dropout(0.5, 3)}
    judge |= options | {"operands": (slopes,), "dropout": (0.5, 3)}
    if sizes["tk"]:
        call["score"] = score
        judge["score"] = lambda s, b, h, q, k, t: s * t[b, h]
    else:
        judge["operands"] = ()
    # With Tk = 0 the ids are empty, and still read at the queries' positions.
    agree(answer(call, cotangents, form), judgement(judge, cotangents), TOLERANCE["float32"])


def test_nan_that_is_seen_is_data():
    call, judge, _ = make("plain")
    call["key"][0, 0, 2, 1] = NAN
    expected = reference.attention(**judge)
    out = backend.to_numpy(attn_core.attention(**tensors(call)))
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected.out))
    assert np.isnan(out).any()
    assert not np.isnan(out).all()


def test_huge_biases_keep_their_weights():
    """One float32 lse cannot rebuild such a row; (m, log l) can."""
    q = tf.zeros((1, 1, 1, 8))
    for level in (1e4, -1e9, float(np.finfo(np.float32).min)):
        bias = tf.fill((1, 1, 1, 8), level)
        got = attn_core.attention(
            q, tf.ones((1, 1, 8, 8)), tf.ones((1, 1, 8, 3)), bias=bias, return_weights=True
        )
        np.testing.assert_allclose(got.weights.numpy(), 1 / 8, rtol=1e-6)
        np.testing.assert_allclose(got.out.numpy(), 1.0, rtol=1e-6)


# --- Dropout. -------------------------------------------------------------------------------------


def bits(seed, q, k_len, threshold=2**31):
    return keep(threshold, seed, B, HQ, q, k_len)


@pytest.mark.parametrize("form", ["eager", "function", "xla"])
def test_dropout_bits_are_the_definitions(form):
    """Every spelling of a seed, odd widths, negative positions and a batch of offsets."""
    value = 2**63 + 2**40 + 7
    q = np.array([[-3, -2, -1, 0, 1], [2**30, 5, 6, 7, 8]], np.int32)
    want = reference.keep(0.5, value, np.arange(B), np.arange(HQ), q, np.arange(TK))
    assert 0.4 < want.mean() < 0.6
    seeds = {
        "host": (value % 2**32, value // 2**32),
        "pair": tf.constant([value % 2**32, value // 2**32], tf.uint32),
        "uint64": tf.constant(value, tf.uint64),
        "int64": tf.constant(value - 2**64, tf.int64),
    }
    for name, seed in seeds.items():

        def draw(q, k_len=TK, seed=seed):
            return bits(seed, q, k_len)

        call = draw if form == "eager" else tf.function(draw, jit_compile=form == "xla")
        np.testing.assert_array_equal(call(tf.constant(q)).numpy(), want, err_msg=name)
    negative = reference.keep(0.5, -9, np.arange(B), np.arange(HQ), q, np.arange(TK))
    got = bits(tf.constant(-9, tf.int32), tf.constant(q), TK).numpy()
    np.testing.assert_array_equal(got, negative)


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.9999])
def test_dropout_threshold(rate):
    threshold = Dropout(rate, 1).threshold
    q = np.arange(64, dtype=np.int32)[None]
    want = reference.keep(rate, 1, np.arange(B), np.arange(HQ), q, np.arange(33))
    got = keep(threshold, (1, 0), B, HQ, tf.constant(q), 33).numpy()
    np.testing.assert_array_equal(got, want)


def test_dropout_bits_with_unknown_sizes():
    spec = tf.TensorSpec((None, None), tf.int32)

    @tf.function(input_signature=[spec, tf.TensorSpec((), tf.int32)])
    def draw(q, k_len):
        return keep(2**30, (5, 0), tf.shape(q)[0], HQ, q, k_len)

    for rows, keys in ((1, 1), (3, 6)):
        q = np.arange(2 * rows, dtype=np.int32).reshape(2, rows)
        want = reference.keep(0.25, 5, np.arange(2), np.arange(HQ), q, np.arange(keys))
        np.testing.assert_array_equal(draw(q, keys).numpy(), want)


# --- tf.function. ---------------------------------------------------------------------------------


def test_one_trace_for_unknown_sizes():
    traced = []

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, HQ, None, D)),
            tf.TensorSpec((None, HK, None, D)),
            tf.TensorSpec((None, HK, None, DV)),
            tf.TensorSpec((None,), tf.int64),
        ]
    )
    def run(q, k, v, kv_lengths):
        traced.append((q.shape, k.shape))
        return attn_core.attention(
            q, k, v, mask=masks.causal(), query_offset="end", kv_lengths=kv_lengths, return_lse=True
        )

    for b, tq, tk in ((2, 5, 7), (1, 3, 3), (3, 8, 2), (0, 2, 2)):
        call, judge, _ = make("sizes", b=b, tq=tq, tk=tk)
        given = np.array([99, -2, 1][:b], np.int64)
        at = np.clip(given, 0, tk) - tq
        shape = (b, HQ, tq, tk)
        got = run(call["query"], call["key"], call["value"], given)
        judge |= {"kv_lengths": given, "query_offset": at}
        judge["mask"] = rule(lambda b, h, q, k, i: q >= k, at, shape)
        want = reference.attention(**judge)
        np.testing.assert_allclose(got.out.numpy(), want.out, atol=2e-5)
        np.testing.assert_allclose(got.lse.numpy(), want.lse, atol=2e-5)
    assert len(traced) == 1


def test_the_dynamic_form_knows_no_sizes(monkeypatch):
    seen = []

    def spy(x, describe=backend.describe):
        seen.append(describe(x))
        return seen[-1]

    monkeypatch.setattr(backend, "describe", spy)
    call, _, cotangents = make("everything")
    answer(call, cotangents, "dynamic")
    shapes = [facts.shape for facts in seen]
    assert shapes[:3] == [(None, HQ, None, D), (None, HK, None, D), (None, HK, None, DV)]
    # Bias, sinks, both lengths and the score's slopes.
    assert sorted(map(len, shapes[3:])) == [1, 1, 1, 1, 2]
    assert all(size is None for shape in shapes[3:] for size in shape)
    # Where the offset is left out, Tq = Tk has to be known.
    seen.clear()
    call, _, cotangents = make("plain", tq=TK)
    answer(call | {"mask": masks.causal()}, cotangents, "dynamic")
    assert [facts.shape[0::2] for facts in seen] == [(None, TK)] * 3


def test_unknown_sizes_never_count_as_equal():
    @tf.function(input_signature=[tf.TensorSpec((None, 2, None, 4))] * 3)
    def run(q, k, v):
        return attn_core.attention(q, k, v, mask=masks.causal())

    with pytest.raises(ValueError, match=r'"start".*"end".*Got Tq = unknown and Tk = unknown'):
        run.get_concrete_function()

    @tf.function(input_signature=[tf.TensorSpec((None, 2, None, 4))] * 3)
    def harmless(q, k, v):
        return attn_core.attention(q, k, v, mask=masks.prefix(2))

    assert harmless.get_concrete_function() is not None


def test_unknown_rank_is_refused():
    @tf.function(input_signature=[tf.TensorSpec(None)])
    def run(q):
        return attn_core.attention(q, q, q)

    with pytest.raises(ValueError, match="known rank"):
        run.get_concrete_function()


def test_values_do_not_retrace_and_trees_do():
    traced = []

    @tf.function
    def run(q, mask, score, dropout):
        traced.append(mask)
        return attn_core.attention(q, q, q, mask=mask, score=score, dropout=dropout)

    q = tf.constant(make("plain", tq=TK)[0]["key"])

    def both(n):
        return masks.segments(np.arange(TK) // n) & masks.causal()

    first = run(q, both(2), scores.alibi(np.ones(HK, np.float32)), Dropout(0.2, 1)).numpy()
    again = run(q, both(2), scores.alibi(np.ones(HK, np.float32)), Dropout(0.2, 1)).numpy()
    np.testing.assert_array_equal(first, again)
    changed = [
        run(q, both(3), scores.alibi(np.ones(HK, np.float32)), Dropout(0.2, 1)).numpy(),
        run(q, both(2), scores.alibi(np.zeros(HK, np.float32)), Dropout(0.2, 1)).numpy(),
        run(q, both(2), scores.alibi(np.ones(HK, np.float32)), Dropout(0.2, 2**40)).numpy(),
    ]
    assert len(traced) == 1
    for x in changed:
        assert np.abs(x - first).max() > 1e-3
    # The same values as tensors are the same types, and so the same trace.
    ids = tf.constant(np.arange(TK) // 2)
    slopes = scores.alibi(tf.ones(HK))
    same = run(q, masks.segments(ids) & masks.causal(), slopes, Dropout(0.2, 1)).numpy()
    np.testing.assert_array_equal(same, first)
    assert len(traced) == 1
    run(q, masks.causal(), scores.alibi(np.ones(HK, np.float32)), Dropout(0.2, 1))
    assert len(traced) == 2
    run(q, masks.causal(), scores.alibi(np.ones(HK, np.float32)), Dropout(0.3, 1))
    assert len(traced) == 3


def test_masks_are_written_inside_a_function():
    """AutoGraph rewrites the caller's own lambda, and leaves what it means alone."""

    @tf.function
    def run(q, ids):
        table = attn_core.operand(ids)
        near = attn_core.mask(lambda b, h, q, k: (abs(q - k) < 2) | (table[q] == table[k]))
        return attn_core.attention(q, q, q, mask=near & masks.causal())

    q = make("plain", tq=TK)[0]["key"]
    ids = np.array([0, 1, 0, 1, 0, 1, 0])

    def at(b, h, q, k, i):
        return (q >= k) & ((abs(q - k) < 2) | (ids[q] == ids[k]))

    want = reference.attention(q, q, q, mask=rule(at, shape=(B, HK, TK, TK))).out
    np.testing.assert_allclose(run(q, ids).numpy(), want, atol=2e-5)

    @tf.function
    def wrong(q):
        mask = attn_core.mask(lambda b, h, q, k: q >= k and k > 1)
        return attn_core.attention(q, q, q, mask=mask)

    with pytest.raises(TypeError, match="`a & b` for `a and b`"):
        wrong(q)


def test_autograph_leaves_our_code_alone(monkeypatch):
    """Rewriting it costs seconds at the first trace of every process."""
    rewritten = set()

    def spy(x, describe=backend.describe):
        stack = traceback.extract_stack()
        rewritten.update(f.name for f in stack if "__autograph_generated" in f.filename)
        return describe(x)

    monkeypatch.setattr(backend, "describe", spy)

    @tf.function
    def run(q):
        return attn_core.attention(q, q, q, mask=masks.causal(), score=scores.softcap(2.0))

    run(tf.ones((1, 1, 2, 3)))
    assert rewritten == {"tf__run"}


# --- Derivatives. ---------------------------------------------------------------------------------


def scalar(leaves, call):
    """A smooth number that reads out and lse, with derivatives of every kind."""
    got = attn_core.attention(**{**call, **leaves}, return_lse=True, impl="reference")
    finite = tf.where(tf.math.is_finite(got.lse), got.lse, tf.zeros_like(got.lse))
    return tf.reduce_sum(tf.sin(got.out)) + tf.reduce_sum(finite**2)


def smooth(name="everything"):
    call = tensors(make(name, "float64")[0])
    leaves = {n: call.pop(n) for n in ("query", "key", "value", "bias", "sinks")}
    leaves["sinks"] = tf.constant([0.5, -1.0, 3.0, 0.25])
    leaves = {n: tf.cast(x, tf.float64) for n, x in leaves.items()}
    return leaves, call


def along(leaves, directions, step):
    return {n: x + step * directions[n] for n, x in leaves.items()}


@pytest.mark.parametrize("compiled", [False, True])
def test_jvp_is_the_difference_quotient(compiled):
    leaves, call = smooth()
    rng = np.random.default_rng(1)
    directions = {n: tf.constant(rng.standard_normal(x.shape)) for n, x in leaves.items()}

    def tangent(leaves, directions):
        names = list(leaves)
        with tf.autodiff.ForwardAccumulator(
            [leaves[n] for n in names], [directions[n] for n in names]
        ) as accumulator:
            y = scalar(leaves, call)
        return accumulator.jvp(y)

    run = tf.function(tangent) if compiled else tangent
    h = 1e-5
    up = scalar(along(leaves, directions, h), call)
    down = scalar(along(leaves, directions, -h), call)
    quotient = float((up - down) / (2 * h))
    assert abs(quotient) > 1
    np.testing.assert_allclose(float(run(leaves, directions)), quotient, rtol=1e-6)


@pytest.mark.parametrize("form", ["eager", "function", "xla"])
def test_second_derivatives_are_the_difference_of_first_ones(form):
    leaves, call = smooth()
    rng = np.random.default_rng(2)
    directions = {n: tf.constant(rng.standard_normal(x.shape)) for n, x in leaves.items()}

    def gradients(leaves):
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            y = scalar(leaves, call)
        return tape.gradient(y, leaves)

    def hessian(leaves):
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            first = gradients(leaves)
            pulled = tf.add_n([tf.reduce_sum(first[n] * directions[n]) for n in leaves])
        return tape.gradient(pulled, leaves)

    run = hessian if form == "eager" else tf.function(hessian, jit_compile=form == "xla")
    found = run(leaves)
    h = 1e-5
    up, down = gradients(along(leaves, directions, h)), gradients(along(leaves, directions, -h))
    for n in leaves:
        want = (up[n] - down[n]) / (2 * h)
        assert np.abs(want).max() > 0.1, n
        np.testing.assert_allclose(found[n].numpy(), want.numpy(), atol=1e-6, err_msg=n)


def test_second_derivatives_let_no_poison_in():
    call, _, _ = make("poison", "float64")
    call = tensors(call)
    leaves = {n: call.pop(n) for n in ("query", "key", "value")}
    with tf.GradientTape() as outer:
        outer.watch(leaves)
        with tf.GradientTape() as inner:
            inner.watch(leaves)
            y = scalar(leaves, call)
        first = inner.gradient(y, leaves)
        total = tf.add_n([tf.reduce_sum(g**2) for g in first.values()])
    for name, g in outer.gradient(total, leaves).items():
        assert np.isfinite(g.numpy()).all(), name
        assert np.abs(g.numpy()).max() > 0, name


@pytest.mark.parametrize("mapped", [tf.map_fn, tf.vectorized_map])
def test_mapping_over_examples(mapped):
    call, _, _ = make("everything")
    call = tensors(call)
    rng = np.random.default_rng(3)
    stack = tf.constant(rng.standard_normal((3, B, HQ, TQ, D)), tf.float32)

    def one(q):
        with tf.GradientTape() as tape:
            tape.watch(q)
            out = attn_core.attention(**{**call, "query": q})
            y = tf.reduce_sum(out**2)
        return tf.concat([out, tape.gradient(y, q)], -1)

    found = mapped(one, stack).numpy()
    for x, q in zip(found, stack, strict=True):
        np.testing.assert_allclose(x, one(q).numpy(), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_variables_receive_gradients():
    call, judge, cotangents = make("scored")
    slopes = tf.Variable(judge["operands"][0])
    query = tf.Variable(call["query"])
    table = attn_core.operand(slopes)
    score = attn_core.score(lambda s, b, h, q, k: s * table[h])
    call = tensors(call) | {"query": query, "score": score}
    with tf.GradientTape() as tape:
        out = attn_core.attention(**call)
    found = tape.gradient(out, [query, slopes], tf.constant(cotangents["out"]))
    judge["score"] = lambda s, b, h, q, k, t: s * t[h]
    want = reference.gradients(**judge, d_out=cotangents["out"])
    np.testing.assert_allclose(found[0].numpy(), want["query"], atol=2e-5)
    # Dense, not IndexedSlices.
    assert isinstance(found[1], tf.Tensor)
    np.testing.assert_allclose(found[1].numpy(), want["operands"][0], atol=2e-5)


# --- The verbs. -----------------------------------------------------------------------------------


def test_owns_and_describes():
    assert backend.owns(tf.zeros(()))
    assert backend.owns(tf.Variable(0.0))
    assert not backend.owns(np.zeros(()))
    assert not backend.owns([1.0])
    assert backend.describe(tf.zeros((2, 0), tf.bfloat16)) == Facts((2, 0), "bfloat16", "cpu")
    assert backend.describe(tf.Variable(0.0)) == Facts((), "float32", "cpu")
    seen = []

    @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.uint64)])
    def look(x):
        seen.append((backend.owns(x), backend.describe(x)))
        return x

    look.get_concrete_function()
    assert seen == [(True, Facts((None, 3), "uint64", "cpu"))]


def test_keras_tensors_are_not_ours():
    import keras

    x = keras.Input((HQ, TQ, D))
    assert not backend.owns(x)
    with pytest.raises(TypeError, match=r"`query` must be an array .* Got keras.*KerasTensor"):
        attn_core.attention(x, x, x)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.bool_, np.int32, np.uint32, np.uint64])
def test_numpy_there_and_back(dtype):
    raw = np.random.default_rng(4).integers(0, 2**16, (3, 5, 2)).astype(np.uint16)
    x = raw.view(dtype) if np.dtype(dtype).itemsize == 2 else raw.astype(dtype)
    for given in (x, x[::-1, :, 1:], x[:0]):
        back = backend.to_numpy(backend.from_numpy(given))
        assert back.dtype == given.dtype
        assert back.tobytes() == np.ascontiguousarray(given).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_in_numpy_out(dtype):
    call, judge, _ = make("lengths", dtype)
    with attn_core.use(backend="tf"):
        got = attn_core.attention(**call, return_lse=True, return_weights=True)
    want = reference.attention(**judge)
    assert type(got.out) is np.ndarray
    assert got.out.dtype == DTYPES[dtype]
    agree(got._asdict(), want._asdict(), TOLERANCE[dtype])


def test_numpy_inside_a_function_is_refused():
    x = np.ones((1, 1, 2, 3))

    @tf.function
    def run():
        return attn_core.attention(x, x, x)

    with attn_core.use(backend="tf"), pytest.raises(TypeError, match=r"tf\.constant"):
        run()


def test_highest_precision_names_the_switch():
    """Judged by the problem's device, so that a machine without a GPU can test it."""
    fields = dict.fromkeys(Problem.__dataclass_fields__)
    ask = Problem(**fields | {"precision": "highest", "dtype": "float32", "device": "gpu"})
    was = tf.config.experimental.tensor_float_32_execution_enabled()
    try:
        tf.config.experimental.enable_tensor_float_32_execution(True)
        (reason,) = backend.refusals(ask, "reference")
        assert "enable_tensor_float_32_execution(False)" in reason
        tf.config.experimental.enable_tensor_float_32_execution(False)
        assert backend.refusals(ask, "reference") == []
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(was)
    x = tf.ones((1, 1, 2, 3))
    assert attn_core.attention(x, x, x, precision="highest").shape == (1, 1, 2, 3)


def test_unknown_implementation_is_refused():
    x = tf.ones((1, 1, 2, 3))
    with pytest.raises(
        attn_core.UnsupportedError, match="`impl` must be one of chunked, reference"
    ):
        attn_core.attention(x, x, x, impl="triton")


def test_host_tables_take_the_accumulation_dtype():
    x = tf.ones((1, 3, 2, 4), tf.float64)
    got = attn_core.attention(x, x, x, score=scores.alibi([0.1, 0.2, 0.3]), return_weights=True)
    want = 1 / (1 + np.exp(-np.array([0.1, 0.2, 0.3])))
    np.testing.assert_allclose(got.weights.numpy()[0, :, 0, 0], want, rtol=1e-14)


def test_vjp_of_a_host_table_and_without_extras():
    x = make("plain", tq=TK)[0]["key"]
    call = {name: tf.constant(x) for name in ("query", "key", "value")}
    call["score"] = scores.alibi([0.1, 0.2])
    g = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    want = reference.gradients(
        x, x, x, score=lambda s, b, h, q, k, t: s - t[h] * abs(q - k),
        operands=(np.array([0.1, 0.2]),), d_out=g,
    )  # fmt: skip
    for form in ("eager", "function"):
        output, found = backend.vjp(call, {"out": tf.constant(g)}, form)
        assert output.lse is None
        np.testing.assert_allclose(found["score"][0].numpy(), want["operands"][0], atol=2e-5)
        np.testing.assert_allclose(found["query"].numpy(), want["query"], atol=2e-5)


def test_the_flag_is_left_as_it_was():
    assert config.get("backend") is None


# --- The documents' function. ---------------------------------------------------------------------


def listing(q, k, v, mask=None, scale=1.0):
    """The documents' formula, written out in NumPy, float64."""
    q, k, v = [x.astype(np.float64) for x in (q, k, v)]
    s = scale * (q @ k.swapaxes(-1, -2))
    if mask is not None and mask.dtype == bool:
        s = np.where(mask, s, -INF)
    elif mask is not None:
        s = s + mask
    e = np.exp(s - s.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)) @ v


def triple(*lead, dtype=np.float32):
    rng = np.random.default_rng(6)
    shapes = ((*lead, TQ, D), (*lead, TK, D), (*lead, TK, DV))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("lead", [(), (3,), (2, 4), (2, 1, 3), (2, 1, 2, 2)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_documents_function(lead, scale):
    f = backend.scaled_dot_product_attention
    q, k, v = triple(*lead)
    factor = 1 / np.sqrt(D) if scale is None else scale
    rng = np.random.default_rng(7)
    additive = rng.standard_normal((*lead[:1], *[1] * len(lead[1:]), TQ, TK)).astype(np.float32)
    chosen = rng.random((TQ, TK)) < 0.6
    chosen[:, 0] = True
    for mask in (None, additive, chosen):
        want = listing(q, k, v, mask, factor)
        got = f(*[tf.constant(x) for x in (q, k, v)], mask, scale=scale)
        assert isinstance(got, tf.Tensor)
        np.testing.assert_allclose(got.numpy(), want, atol=2e-5)
        host = f(q, k, v, mask, scale=scale)
        assert isinstance(host, np.ndarray)
        np.testing.assert_array_equal(host, got.numpy())
    assert np.abs(listing(q, k, v) - listing(q, k, v, scale=1 / np.sqrt(D))).max() > 0.1


def test_documents_function_is_the_listing_in_tensorflow():
    q, k, v = [tf.constant(x) for x in triple(2, 3)]
    mask = tf.constant(np.random.default_rng(8).standard_normal((TQ, TK)).astype(np.float32))
    scores = tf.matmul(q, k, transpose_b=True)
    scores += mask
    want = tf.matmul(tf.nn.softmax(scores, -1), v)
    got = backend.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-5, atol=1e-6)


def test_documents_function_with_unknown_dimensions():
    traced = []

    @tf.function(
        input_signature=[tf.TensorSpec((None, 3, None, n)) for n in (D, D, DV)]
        + [tf.TensorSpec((None, None))]
    )
    def run(q, k, v, mask):
        traced.append(q.shape)
        return backend.scaled_dot_product_attention(q, k, v, mask)

    for b in (2, 1, 0):
        q, k, v = triple(b, 3)
        mask = np.random.default_rng(9).standard_normal((1, TK)).astype(np.float32)
        want = listing(q, k, v, mask, 1 / np.sqrt(D)) if b else np.zeros((0, 3, TQ, DV))
        np.testing.assert_allclose(run(q, k, v, mask).numpy(), want, atol=2e-5)
    assert len(traced) == 1


def test_documents_function_hides_and_drops():
    """`mask != 0` is their PyTorch form; a row of zeros gives 0; dropout needs its seed."""
    f = backend.scaled_dot_product_attention
    q, k, v = triple(2)
    mask = np.ones((TQ, TK), np.int32)
    mask[2], mask[1, 3] = 0, 0
    got = f(q, k, v, mask != 0)
    rows = [0, 1, 3, 4]
    want = listing(q[:, rows], k, v, mask[rows] != 0, 1 / np.sqrt(D))
    np.testing.assert_allclose(got[:, rows], want, atol=2e-5)
    assert (got[:, 2] == 0).all()
    dropped = f(q, k, v, dropout_rate=0.5, seed=11)
    judged = reference.attention(q[:, None], k[:, None], v[:, None], dropout=(0.5, 11)).out[:, 0]
    np.testing.assert_allclose(dropped, judged, atol=2e-5)
    with pytest.raises(TypeError, match="seed"):
        f(q, k, v, dropout_rate=0.5)


def test_documents_function_refuses():
    f = backend.scaled_dot_product_attention
    q, k, v = triple(2)
    with pytest.raises(ValueError, match="`k` must have the leading dimensions of `q`"):
        f(q, k[:1], v[:1])
    with pytest.raises(ValueError, match="`q` must have rank 2 or more"):
        f(q[0, 0], k, v)
    with pytest.raises(ValueError, match="`mask` must broadcast"):
        f(q, k, v, np.zeros((3, 1, 1), np.float32))
    with pytest.raises(TypeError, match="`mask` must be boolean"):
        f(q, k, v, np.zeros((TQ, TK), np.int32))
    with pytest.raises(TypeError, match="`mask` must not be wider"):
        f(q, k, v, np.zeros((TQ, TK)))
    with pytest.raises(TypeError, match="`k` must be a tensor, or all of them NumPy"):
        f(tf.constant(q), k, v)


def test_a_table_of_the_wrong_size_is_found_at_run_time():
    """Look-ups clamp, so a mask for other sizes would be read as if it fitted."""
    spec = [tf.TensorSpec((None, 1, None, 3), tf.float32)]

    def dense(x):
        return attn_core.attention(x, x, x, mask=np.tri(5, dtype=bool))

    def lengths(x):
        return attn_core.attention(x, x, x, mask=masks.prefix([1, 2, 3]))

    for call, fits, other in (
        (dense, (2, 1, 5, 3), (2, 1, 6, 3)),
        (lengths, (3, 1, 4, 3), (2, 1, 4, 3)),
    ):
        run = tf.function(call, input_signature=spec)
        assert np.isfinite(run(tf.ones(fits)).numpy()).all()
        with pytest.raises(tf.errors.InvalidArgumentError, match="must have that many entries"):
            run(tf.ones(other))


def test_a_float_table_keeps_its_digits_across_a_tf_function():
    score = scores.alibi(heads=3)
    x = tf.constant(np.random.default_rng(3).standard_normal((1, 3, 4, 5)))
    want = attn_core.attention(x, x, x, score=score).numpy()
    got = tf.function(lambda x, s: attn_core.attention(x, x, x, score=s))(x, score).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-14)
