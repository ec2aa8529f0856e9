"""The TensorFlow backend against the float64 judge, eager and in every compiled form."""

import numpy as np
import pytest
import tensorflow as tf
from tf_cases import (
    CASES,
    DTYPES,
    HQ,
    NAN,
    TK,
    TOLERANCE,
    TQ,
    B,
    D,
    agree,
    answer,
    judgement,
    make,
    tensors,
    traced,
)

import attn_core
from attn_core import Dropout, config, masks, reference, scores
from attn_core.backends import tf as backend
from attn_core.backends.tf.philox import keep
from attn_core.spec import Facts, Problem

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


@pytest.mark.parametrize("form", backend.FORMS)
def test_empty(form):
    """With sizes that the graph does not know, one trace answers all three."""
    run = None
    for empty in ("b", "tq", "tk"):
        call, judge, cotangents = _empty(empty)
        if run is None or form != "dynamic":
            run = traced(call, cotangents, form)
        agree(run(call, cotangents), judgement(judge, cotangents), TOLERANCE["float32"])


def _empty(empty):
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
    call["score"] = score
    judge["score"] = lambda s, b, h, q, k, t: s * t[b, h]
    # With Tk = 0 the ids are empty, and still read at the queries' positions.
    return call, judge, cotangents


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
    with pytest.raises(TypeError, match=r"must be an array .* Got keras.*KerasTensor.*a layer"):
        attn_core.attention(x, x, x)
    ragged = tf.RaggedTensor.from_row_lengths(tf.zeros((5, D)), [2, 3])
    with pytest.raises(TypeError, match=r"Got .*RaggedTensor: .*to_tensor.*`kv_lengths`"):
        attn_core.attention(ragged, ragged, ragged)


@pytest.mark.parametrize("name", ["ragged", "sparse"])
def test_composite_tensors_are_refused_in_words(name):
    """Wherever they are given: their parts have shapes and dtypes, and failed deep within."""
    x = tf.zeros((2, 3, 8))
    given, words = {
        "ragged": (tf.RaggedTensor.from_tensor(x), r"RaggedTensor: pad it, {}\.to_tensor\(\)"),
        "sparse": (tf.sparse.from_dense(x), r"SparseTensor: tf\.sparse\.to_dense\({}\) makes"),
    }[name]
    layer = backend.MultiHeadAttention(width=8, heads=2)
    calls = {
        "key": lambda: attn_core.attention(x[:, None], given, given),
        "mask": lambda: attn_core.attention(*[x[:, None]] * 3, mask=given),
        "q": lambda: backend.scaled_dot_product_attention(given, x, x),
        "query": lambda: layer(given),
        "value": lambda: layer(x, x, given),
    }
    for argument, call in calls.items():
        with pytest.raises(TypeError, match=f"`{argument}` must be .*{words.format(argument)}"):
            call()


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
