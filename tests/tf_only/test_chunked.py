"""The chunked implementation: many tiles against the reference, what is skipped, what raises."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import tensorflow as tf

import attn_core
from attn_core import Dropout, UnsupportedError, masks, reference, scores
from attn_core.api import resolve
from attn_core.backends import tf as backend
from attn_core.backends.tf import chunked_grid, chunked_tile, chunked_written

HQ, HK, D, DV = 4, 2, 3, 5


def draw(*shape, seed=0, dtype=np.float64):
    return tf.constant(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def inputs(b, tq, tk, dtype=np.float64):
    return {
        "query": draw(b, HQ, tq, D, seed=1, dtype=dtype),
        "key": draw(b, HK, tk, D, seed=2, dtype=dtype),
        "value": draw(b, HK, tk, DV, seed=3, dtype=dtype),
    }


def answers(call, form, impl, weights=False):
    """Outputs and gradients of everything, by name."""
    b, tq = call["query"].shape[0], call["query"].shape[2]
    shape = (b, HQ, tq, DV)
    if call.get("layout") == "BTHD":
        tq = call["query"].shape[1]
        shape = (b, tq, HQ, DV)
    pulled = {"out": draw(*shape, seed=4), "lse": draw(b, HQ, tq, seed=5)}
    call = call | {"impl": impl, "return_lse": True}
    if weights:
        tk = call["key"].shape[1 if call.get("layout") == "BTHD" else 2]
        call["return_weights"] = True
        pulled["weights"] = draw(b, HQ, tq, tk, seed=6)
    output, found = backend.vjp(call, pulled, form)
    for i, g in enumerate(found.pop("score", ())):
        found[f"score{i}"] = g
    found |= output._asdict()
    return {name: x.numpy() for name, x in found.items() if x is not None}


def agree(call, form, weights=False):
    found = answers(call, form, "chunked", weights)
    want = answers(call, "eager", "reference", weights)
    assert found.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.fixture
def small(monkeypatch):
    """Tiles of 16 by 16, and parts of few heads: every loop turns several times."""
    monkeypatch.setattr(chunked_grid, "_ROWS", 16)
    monkeypatch.setattr(chunked_grid, "_KEYS", 16)
    monkeypatch.setattr(chunked_grid, "_KEYS_MASKED", 16)
    monkeypatch.setattr(chunked_grid, "_ROWS_WHOLE", 32)
    monkeypatch.setattr(chunked_grid, "_KEYS_WHOLE", 16)
    monkeypatch.setattr(chunked_grid, "_LONGEST", 32)
    monkeypatch.setattr(chunked_grid, "AT_ONCE", 4096)
    backend.chunked._compiled.cache_clear()
    yield
    backend.chunked._compiled.cache_clear()


# --- Against the reference. -----------------------------------------------------------------------


def options(name, b, tq, tk):
    rng = np.random.default_rng([ord(c) for c in name])
    ids = np.sort(rng.integers(0, 3, (b, max(tq, tk))), -1).astype(np.int32)
    slopes = draw(HQ, seed=7)
    table, rows = attn_core.operand(draw(b, tk, seed=8)), attn_core.operand(draw(tq, seed=9))

    def hiding(s, b, h, q, k):
        x = table[b, k]
        return attn_core.where(x > 1.5, float("-inf"), s * x + rows[attn_core.row])

    bias = rng.standard_normal((b, 1, tq, tk))
    bias[rng.random(bias.shape) < 0.1] = -np.inf
    ends = {
        "kv_lengths": tf.constant(rng.integers(0, tk + 1, b)),
        "q_lengths": tf.constant(rng.integers(0, tq + 1, b)),
    }
    every = {
        "plain": {},
        "causal": {"mask": masks.causal(), "query_offset": "end"},
        "window": {"mask": masks.causal() & masks.window(left=9), "query_offset": "start"},
        "documents": {
            "mask": masks.segments(ids[:, :tq], ids[:, :tk]) & masks.causal(),
            "query_offset": tf.constant(rng.integers(-9, 9, b)),
            "sinks": draw(HQ, seed=10),
        },
        "lengths": {"mask": masks.causal(), "query_offset": "end", "sinks": slopes} | ends,
        "by_head": {
            "mask": attn_core.mask(lambda b, h, q, k: (q >= k) & (q - k < 12 * (h + 1))),
            "query_offset": 3,
        },
        "dense": {"mask": rng.random((b, HQ, tq, tk)) < 0.4, "dropout": Dropout(0.3, 11)},
        "bias": {"bias": tf.constant(bias), "mask": masks.prefix(tk - 1)},
        "bias_keys": {"bias": draw(1, HQ, 1, tk, seed=12)} | ends,
        "relative": {
            "score": scores.relative_bias(draw(9, HQ, seed=13), buckets="clipped"),
            "query_offset": "start",
        },
        "hiding": {"score": attn_core.score(hiding), "dropout": Dropout(0.2, 2**40 + 3)},
        "everything": {
            "score": scores.softcap(1.5).then(scores.alibi(slopes)),
            "mask": masks.causal() | masks.prefix(3),
            "query_offset": "end",
            "bias": tf.constant(bias),
            "sinks": draw(HQ, seed=14),
            "dropout": Dropout(0.25, 5),
        }
        | ends,
    }
    return every[name]


NAMES = (
    *("plain", "causal", "window", "documents", "lengths", "by_head", "dense", "bias"),
    *("bias_keys", "relative", "hiding", "everything"),
)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", ["function", "dynamic"])
@pytest.mark.parametrize("name", NAMES)
def test_many_tiles(name, form):
    call = inputs(3, 37, 51) | options(name, 3, 37, 51)
    agree(call, form, weights=name in ("dense", "everything"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["documents", "bias", "everything"])
def test_many_tiles_compiled(name):
    agree(inputs(2, 19, 33) | options(name, 2, 19, 33), "xla", weights=name == "everything")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", ["dynamic", "xla"])
def test_the_other_layout(form):
    call = inputs(3, 37, 51)
    call = {name: tf.transpose(x, (0, 2, 1, 3)) for name, x in call.items()}
    agree(
        call | options("lengths", 3, 37, 51) | {"layout": "BTHD"}, form, weights=form == "dynamic"
    )


@pytest.mark.parametrize(("tq", "tk"), [(1, 1300), (255, 257), (256, 512), (1100, 1300)])
def test_sizes_around_whole_tiles(tq, tk):
    mask = masks.causal() & masks.window(left=700)
    agree(inputs(1, tq, tk) | {"mask": mask, "query_offset": "end"}, "function")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_are_kept_in_the_accumulation_dtype(dtype):
    """2048 equal shares of 1/2048 add up to 1 in float32, and to nothing like it in bfloat16."""
    q, k = (tf.zeros((1, 1, n, 4), dtype) for n in (3, 2048))
    out, lse, _ = attn_core.attention(q, k, tf.ones_like(k), return_lse=True, impl="chunked")
    assert out.dtype == tf.as_dtype(dtype)
    np.testing.assert_allclose(tf.cast(out, tf.float32).numpy(), 1, rtol=1e-6)
    np.testing.assert_allclose(lse.numpy(), np.log(2048), rtol=1e-6)


@pytest.mark.usefixtures("small")
def test_weights_change_no_bit_of_the_output():
    call = inputs(2, 37, 51, np.float32) | {"mask": masks.causal(), "query_offset": "end"}
    plain = attn_core.attention(**call, impl="chunked").numpy()
    with_weights = attn_core.attention(**call, impl="chunked", return_weights=True)
    np.testing.assert_array_equal(plain, with_weights.out.numpy())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", ["function", "dynamic"])
def test_poison_in_padding_and_hidden_tiles(form):
    """Keys beyond their length, rows beyond theirs, and what flows back into them."""
    call = inputs(1, 37, 51)
    spoilt = dict(call)
    for name, valid in (("query", 20), ("key", 33), ("value", 33)):
        x = call[name].numpy()
        x[:, :, valid:] = np.nan
        spoilt[name] = tf.constant(x)
    ends = {
        "kv_lengths": tf.constant([33]),
        "q_lengths": tf.constant([20]),
        "score": scores.softcap(2.0),
        "impl": "chunked",
        "return_lse": True,
    }
    out, lse = draw(1, HQ, 37, DV, seed=4).numpy(), draw(1, HQ, 37, seed=5).numpy()
    pulled = {"out": tf.constant(out), "lse": tf.constant(lse)}
    out[:, :, 20:], lse[:, :, 20:] = np.nan, np.inf
    poison = {"out": tf.constant(out), "lse": tf.constant(lse)}
    want, want_g = backend.vjp(call | ends, pulled, form)
    found, found_g = backend.vjp(spoilt | ends, poison, form)
    np.testing.assert_array_equal(found.out.numpy(), want.out.numpy())
    for name in call:
        np.testing.assert_array_equal(found_g[name].numpy(), want_g[name].numpy(), err_msg=name)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bias_of_unknown_shape(compiled):
    """One trace for every shape that broadcasts."""
    call = {name: x.numpy() for name, x in inputs(2, 19, 19).items()}
    up, traces = draw(2, HQ, 19, DV, seed=17).numpy(), []
    heads = [(HQ, D), (HK, D), (HK, DV)]
    spec = [tf.TensorSpec((None, n, None, d), tf.float64) for n, d in heads]
    spec.append(tf.TensorSpec([None] * 4, tf.float64))

    @tf.function(input_signature=spec, jit_compile=compiled)
    def run(*given):
        traces.append(compiled)
        with tf.GradientTape() as tape:
            tape.watch(given)
            out = attn_core.attention(*given[:3], bias=given[3], impl="chunked")
        return out, *tape.gradient(out, given, tf.constant(up))

    for shape in [(2, HQ, 19, 19), (1, 1, 1, 19), (2, 1, 19, 1), (1, HQ, 1, 1)]:
        bias = draw(*shape, seed=16).numpy()
        found = run(*call.values(), bias)
        want = reference.gradients(**call, bias=bias, d_out=up)
        judged = [reference.attention(**call, bias=bias).out, *[want[n] for n in (*call, "bias")]]
        for x, y in zip(found, judged, strict=True):
            np.testing.assert_allclose(x.numpy(), y, rtol=1e-9, atol=1e-9, err_msg=str(shape))
    assert len(traces) == 1


@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_thirty_runs_are_one(layout, small):
    """Bit for bit: no sum depends on which thread comes first."""
    call = inputs(2, 37, 51, np.float32) | options("everything", 2, 37, 51)
    call |= {"sinks": draw(HQ, seed=14, dtype=np.float32), "layout": layout}
    call |= {"bias": tf.cast(call["bias"], tf.float32)}
    call["score"] = scores.softcap(1.5).then(scores.alibi(draw(HQ, seed=7, dtype=np.float32)))
    if layout == "BTHD":
        moved = ("query", "key", "value")
        call |= {name: tf.transpose(call[name], (0, 2, 1, 3)) for name in moved}
    shape = (2, HQ, 37, DV) if layout == "BHTD" else (2, 37, HQ, DV)
    up = draw(*shape, seed=4, dtype=np.float32)

    @tf.function
    def run():
        given = [call[name] for name in ("query", "key", "value", "bias", "sinks")]
        given += list(call["score"].arrays)
        with tf.GradientTape() as tape:
            tape.watch(given)
            out, lse, _ = attn_core.attention(**call, impl="chunked", return_lse=True)
        return out, lse, *tape.gradient(out, given, up)

    first = [x.numpy() for x in run()]
    assert all(x.any() and not np.isnan(x).any() for x in first)
    for _ in range(29):
        for x, y in zip(run(), first, strict=True):
            np.testing.assert_array_equal(x.numpy(), y)


@pytest.mark.usefixtures("small")
def test_a_packed_document_does_not_touch_the_others():
    """Bit for bit, also where documents share a tile."""
    ids = np.repeat([0, 1, 2], [21, 9, 23])
    inside = ids == 1
    call = {name: x.numpy() for name, x in inputs(1, 53, 53, np.float32).items()}
    up = draw(1, HQ, 53, DV, seed=4, dtype=np.float32).numpy()
    mask = masks.segments(ids) & masks.causal()

    @tf.function
    def run(query, key, value, up):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            out = attn_core.attention(query, key, value, mask=mask, impl="chunked")
        return out, *tape.gradient(out, [query, key, value], up)

    before = run(*call.values(), up)
    rng = np.random.default_rng(18)
    given = [*call.values(), up]
    for x in given:
        x[:, :, inside] += rng.standard_normal(x[:, :, inside].shape).astype(np.float32)
    for x, y in zip(run(*given), before, strict=True):
        np.testing.assert_array_equal(x.numpy()[:, :, ~inside], y.numpy()[:, :, ~inside])
        assert (x.numpy()[:, :, inside] != y.numpy()[:, :, inside]).all(-1).any()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_that_overflow_at_hidden_positions(sign):
    """Infinite, or 0 once they are: neither reaches what is not hidden."""
    call = {name: x.numpy() for name, x in inputs(1, 37, 51, np.float32).items()}
    up = draw(1, HQ, 37, DV, seed=4, dtype=np.float32).numpy()
    # Rows 20 on see keys 30 on, whose products with the first rows leave float32.
    call["query"][:, :, :20, 0], call["key"][:, :, 30:, 0] = 1e30, sign * 1e30
    call["query"][:, :, 20:, 0] = call["key"][:, :, :30, 0] = 0
    mask = np.zeros((37, 51), bool)
    mask[:20, :30] = mask[20:, 30:] = True
    tensors = {name: tf.constant(x) for name, x in call.items()}
    output, found = backend.vjp(
        tensors | {"mask": mask, "impl": "chunked"}, {"out": tf.constant(up)}, "function"
    )
    full = np.broadcast_to(mask, (1, HQ, 37, 51))
    want = reference.gradients(**call, mask=full, d_out=up)
    judged = reference.attention(**call, mask=full).out
    np.testing.assert_allclose(output.out.numpy(), judged, atol=2e-5)
    for name, kept in (("query", slice(1, None)), ("key", slice(1, None)), ("value", slice(None))):
        x, y = found[name].numpy()[..., kept], want[name][..., kept]
        np.testing.assert_allclose(x, y, atol=2e-5, err_msg=name)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("poison", ["value", "out", "weights"])
def test_no_weight_beside_an_infinite_gradient_is_data_in_every_tile(poison):
    """0 times it is NaN where the key may be seen, also in a tile that needs its mask."""
    sizes = {"query": 6, "key": 7, "value": 7}
    call = {n: np.array(draw(1, 1, t, 4, seed=t, dtype=np.float32)) for n, t in sizes.items()}
    call["query"][..., 0], call["key"][..., 2, :] = 1, [-1000, 0, 0, 0]
    pulled = {"out": np.array(draw(1, 1, 6, 4, seed=9, dtype=np.float32))}
    pulled["weights"] = np.zeros((1, 1, 6, 7), np.float32)
    if poison == "value":
        call["value"][0, 0, 2, 1] = np.inf
    else:
        pulled[poison][0, 0, 3, 2] = np.inf
    for mask in (None, np.broadcast_to(np.arange(7) < 6, (6, 7))):
        judged = reference.gradients(
            **call, mask=mask, d_out=pulled["out"], d_weights=pulled["weights"]
        )
        given = {name: tf.constant(x) for name, x in call.items()}
        given |= {} if mask is None else {"mask": masks.dense(mask)}
        given |= {"return_weights": True, "impl": "chunked"}
        found = backend.vjp(given, {name: tf.constant(x) for name, x in pulled.items()})[1]
        for key in (judged["key"][0, 0], found["key"][0, 0]):
            assert np.isnan(key[2]).all()
            assert mask is None or np.array_equal(key[6], np.zeros(4))


def test_rows_whose_logits_are_all_minus_infinity_move_nothing():
    """Whole rows, and in one head every row from the 20th on, hidden by their bias."""
    call = inputs(1, 37, 51)
    bias = draw(1, HQ, 37, 51, seed=12).numpy()
    bias[:, :, 5] = bias[:, 1, 20:] = -np.inf
    call |= {"bias": tf.constant(bias)}
    agree(call, "function")
    found = answers(call, "function", "chunked")
    assert not found["out"][:, :, 5].any()
    assert not found["query"][:, :, 5].any()
    assert (found["lse"][:, :, 5] == -np.inf).all()


# --- Tiles that are skipped. ----------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How many tiles were computed, and how many evaluated the mask, in graphs.

    Tiles are of 256 by 512, or by 256 under masks beyond causal; and of 512 // G by 2048 without.
    """
    sizes = (chunked_grid._ROWS, chunked_grid._KEYS, chunked_grid._KEYS_MASKED)
    assert sizes == (256, 512, 256)
    assert (chunked_grid._ROWS_WHOLE, chunked_grid._KEYS_WHOLE) == (512, 2048)
    seen = {"logits": 0, "structure": 0}

    def watch(name):
        function = getattr(chunked_tile, name)

        def count():
            seen[name] += 1
            return np.int32(0)

        def watched(*args, **kwargs):
            tf.numpy_function(count, [], tf.int32)
            return function(*args, **kwargs)

        monkeypatch.setattr(chunked_tile, name, watched)

    watch("logits")
    watch("structure")
    return seen


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("options", "live", "masked"),
    [
        ({"mask": masks.causal(), "query_offset": "end"}, 6, 4),
        ({"mask": masks.causal() & masks.window(left=511), "query_offset": "end"}, 9, 6),
        ({"kv_lengths": [600]}, 8, 4),
        ({"q_lengths": [256]}, 2, 0),
        # One key head and its two query heads, 512 rows and all keys: larger tiles, half as many.
        ({}, 4, 0),
    ],
)
def test_empty_tiles_are_skipped_and_full_ones_ask_no_mask(counted, options, known, live, masked):
    call = inputs(1, 1024, 1024, np.float32)
    names = list(call)
    spec = [
        tf.TensorSpec([1, x.shape[1], 1024 if known else None, x.shape[3]]) for x in call.values()
    ]

    @tf.function(input_signature=spec)
    def run(*given):
        with tf.GradientTape() as tape:
            tape.watch(given)
            out = attn_core.attention(**dict(zip(names, given, strict=True)), **options)
        return out, tape.gradient(out, given)

    run(*call.values())
    assert counted == {"logits": 2 * live, "structure": 2 * masked}


@pytest.mark.parametrize("heads", [1, 6, 8])
@pytest.mark.parametrize(
    ("batch", "length"), [(1, 2048), (1, 512), (3, 2040), (64, 16), (40, 100), (2, 5000)]
)
def test_unknown_sizes_are_cut_as_known_ones(batch, length, heads, monkeypatch):
    """Without a mask; a batch of which not all fits into a tile goes one by one."""
    asked = []
    geometry = chunked_grid.geometry
    monkeypatch.setattr(backend.chunked, "geometry", lambda p, x: asked.append(p) or geometry(p, x))
    backend.chunked._compiled.cache_clear()
    x = tf.zeros((1, heads, 8, 4))
    attn_core.attention(x, x, x, impl="chunked")
    (p,) = asked
    known = chunked_grid.cut_up(p, batch, length, length, (False, False))
    sizes = [tf.constant(n) for n in (batch, length, length)]
    found = chunked_grid.cut_up(p, *sizes, (False, False))
    wanted = [int(n) for n in (*known[3:9], *known.parts)]
    got = [int(n) for n in (*found[3:9], *found.parts)]
    if known.batches not in (1, batch):
        wanted[4], wanted[6] = 1, batch
    assert got == wanted


def test_lengths_that_are_tensors_skip_tiles(counted):
    """With every size and the lengths unknown, an empty half is not computed."""
    spec = [tf.TensorSpec((None, n, None, d)) for n, d in ((HQ, D), (HK, D), (HK, DV))]

    @tf.function(input_signature=[*spec, tf.TensorSpec((None,), tf.int32)])
    def run(q, k, v, kv_lengths):
        return attn_core.attention(
            q, k, v, kv_lengths=kv_lengths, mask=masks.causal(), query_offset="start"
        )

    run(*inputs(2, 1024, 1024, np.float32).values(), tf.constant([512, 0]))
    assert counted == {"logits": 4, "structure": 2}


@pytest.mark.parametrize("more", [{}, {"bias": True}])
def test_a_row_of_one_key_moves_nothing(more):
    """Its weight is 1 whatever the logit: what two equal sums differ by must not be left over."""
    rng = np.random.default_rng(3)
    query, key, value, up = (
        tf.constant(rng.standard_normal((1, 2, 300, 128)), tf.float32) for _ in range(4)
    )
    bias = tf.zeros((300, 300))
    with tf.GradientTape() as tape:
        tape.watch([query, key, value, bias])
        options = {"bias": bias} if more else {}
        out = attn_core.attention(
            query, key, value, mask=masks.window(0, 0), impl="chunked", **options
        )
    d_query, d_key, d_value, d_bias = tape.gradient(out, [query, key, value, bias], up)
    assert not d_query.numpy().any()
    assert not d_key.numpy().any()
    np.testing.assert_allclose(d_value, up, rtol=1e-6)
    assert d_bias is None or not d_bias.numpy().any()


@pytest.mark.parametrize("form", ["eager", "function", "xla"])
@pytest.mark.parametrize("gap", [18.0, 20.0])
def test_weights_below_half_an_ulp_keep_their_gradient(gap, form):
    """A sum of 1 in float32 does not say that a row has one key.

    Row 0 gives key 1 a weight of exp(-gap), which does not show in the sum; the value there is far
    from that of key 0, so the gradient of its logit does. Keys point apart, so that the second
    component of the query's gradient is that of key 1's logit alone.
    """
    query = np.array([[5.0, 1.0], [0.5, -1.0]])
    key = np.array([[(gap + 1) / 5, 0.0], [0.0, 1.0]])
    value, up = np.array([[0.25, 0.5], [300.0, -150.0]]), np.array([[1.0, 0.5], [-0.5, 1.0]])
    value_there = value + np.array([0.125, 0.0])
    logits = query @ key.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = up @ value_there.T
    # sum_k p_k (dp_j - dp_k), a difference of unlike numbers also where p_j is all but 1.
    ds = p * ((dp[:, :, None] - dp[:, None]) * p[:, None]).sum(-1)
    assert np.float32(1) + np.float32(p[0, 1]) == 1
    assert abs(ds[0, 1]) > 3e-7
    call = {
        name: tf.constant(x[None, None], tf.float32)
        for name, x in (("query", query), ("key", key), ("value", value_there))
    }
    call |= {"scale": 1.0, "impl": "chunked"}
    _, found = backend.vjp(call, {"out": tf.constant(up[None, None], tf.float32)}, form)
    got = found["query"].numpy()[0, 0]
    np.testing.assert_allclose(got[0, 1], (ds @ key)[0, 1], rtol=1e-4)
    np.testing.assert_allclose(got, ds @ key, rtol=1e-4, atol=5 * abs(ds[0, 1]))
    # Row 1 must not hide what row 0 adds to key 1, so it is asked for by itself.
    call["query"] = call["query"][:, :, :1]
    _, found = backend.vjp(call, {"out": tf.constant(up[None, None, :1], tf.float32)}, form)
    got = found["key"].numpy()[0, 0]
    np.testing.assert_allclose(got[1], (ds[:1].T @ query[:1])[1], rtol=1e-4)
    # That of key 0 is the same with the other sign, and less than what its sum is rounded by.
    np.testing.assert_allclose(got[0], (ds[:1].T @ query[:1])[0], atol=6 * abs(ds[0, 1]))


def test_rows_of_logits_that_are_all_minus_infinity_in_a_full_tile():
    query, key = tf.fill((1, 1, 1200, 2), 1e20), np.zeros((1, 1, 1200, 2), np.float32)
    key[:, :, :600] = -1e20
    value = tf.constant(np.random.default_rng(0).standard_normal((1, 1, 1200, 2)), tf.float32)
    got = attn_core.attention(query, tf.constant(key), value, impl="chunked")
    np.testing.assert_allclose(got[0, 0, 0], tf.reduce_mean(value[0, 0, 600:], 0), atol=1e-5)
    nothing = attn_core.attention(query, tf.fill(key.shape, -1e20), value, return_lse=True)
    assert not nothing.out.numpy().any()
    assert (nothing.lse.numpy() == -np.inf).all()


def test_five_lengths_are_one_trace():
    traced = []
    spec = [tf.TensorSpec((None, n, None, d)) for n, d in ((HQ, D), (HK, D), (HK, DV))]

    @tf.function(input_signature=spec)
    def run(q, k, v):
        traced.append(q.shape)
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            out = attn_core.attention(q, k, v, mask=masks.causal(), query_offset="end")
        return out, tape.gradient(out, [q, k, v])

    for tq, tk in ((5, 7), (1, 300), (300, 300), (513, 40), (0, 3)):
        call = inputs(2, tq, tk, np.float32)
        out, gradients = run(*call.values())
        want = attn_core.attention(
            **call, mask=masks.causal(), query_offset="end", impl="reference"
        )
        np.testing.assert_allclose(out.numpy(), want.numpy(), atol=2e-5)
        assert [g.shape for g in gradients] == [x.shape for x in call.values()]
    assert len(traced) == 1


@pytest.mark.parametrize(("b", "tq", "tk"), [(2, 3, 0), (2, 0, 3), (0, 3, 4), (0, 0, 0)])
def test_unknown_sizes_that_are_zero(b, tq, tk):
    """With a sink, the lse of a row without keys tells whether what fills up a tile was read."""
    spec = [tf.TensorSpec((None, n, None, d), tf.float64) for n, d in ((HQ, D), (HK, D), (HK, DV))]
    sinks = draw(HQ, seed=15)

    @tf.function(input_signature=spec)
    def run(q, k, v):
        with tf.GradientTape() as tape:
            tape.watch(sinks)
            got = attn_core.attention(q, k, v, sinks=sinks, return_lse=True, impl="chunked")
        return got.out, got.lse, tape.gradient(got.lse, sinks)

    out, lse, gradient = run(*inputs(b, tq, tk).values())
    assert out.shape == (b, HQ, tq, DV)
    assert lse.shape == (b, HQ, tq)
    if not tk:
        assert not out.numpy().any()
        np.testing.assert_array_equal(lse, np.broadcast_to(sinks.numpy()[:, None], lse.shape))
        np.testing.assert_allclose(gradient.numpy(), b * tq)


@pytest.mark.parametrize("mask", [None, masks.causal()])
def test_poison_where_an_unknown_size_leaves_no_query(small, mask):
    """A tile of no rows is not computed: what fills it up would see keys that no query sees."""
    spec = [tf.TensorSpec((None, n, None, d), tf.float64) for n, d in ((HQ, D), (HK, D), (HK, DV))]

    @tf.function(input_signature=spec)
    def run(q, k, v):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            out = attn_core.attention(q, k, v, mask=mask, query_offset="end", impl="chunked")
        return out, tape.gradient(out, [q, k, v])

    call = inputs(2, 0, 40)
    for name in ("key", "value"):
        call[name] *= np.nan
    out, (dq, *rest) = run(*call.values())
    assert out.shape == (2, HQ, 0, DV)
    assert dq.shape == (2, HQ, 0, D)
    for g, name in zip(rest, ("key", "value"), strict=True):
        np.testing.assert_array_equal(g.numpy(), np.zeros(call[name].shape))


# A tile of so many heads has 10, 6 or 4 rows, and several tiles are of multiples of 8: counted by
# the former, the last begins beyond these lengths, and the rows that it has not would be written
# over rows of the tiles before it.
@pytest.mark.parametrize("form", ["function", "dynamic"])
@pytest.mark.parametrize(("group", "length"), [(3, 25), (3, 81), (5, 27), (7, 89)])
def test_groups_whose_tiles_are_no_multiple_of_8(small, group, length, form):
    given = {
        "query": draw(2, group, length, D, seed=1),
        "key": draw(2, 1, 40, D, seed=2),
        "value": draw(2, 1, 40, DV, seed=3),
        "query_offset": 0,
    }
    pulled = {"out": draw(2, group, length, DV, seed=4), "lse": draw(2, group, length, seed=5)}
    (got, found), (want, wanted) = (
        backend.vjp(given | {"impl": impl, "return_lse": True}, pulled, how)
        for impl, how in (("chunked", form), ("reference", "eager"))
    )
    for a, b in (
        (got.out, want.out),
        (got.lse, want.lse),
        *zip(found.values(), wanted.values(), strict=True),
    ):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 9, 12])
def test_no_tile_begins_beyond_the_end(group, monkeypatch):
    """At full size, of every length at which a tile of such a group has one more, and beyond."""
    monkeypatch.undo()
    given = {n: tf.zeros((1, group if n == "query" else 1, 4096, 1)) for n in inputs(1, 1, 1)}
    p = resolve(given)[1].problem
    tall = chunked_grid._ROWS_WHOLE // group
    for length in [m * tall + more for m in range(1, 200) for more in (-1, 0, 1)]:
        g = chunked_grid.cut_up(p, 1, length, 4096, (False, False))
        assert (g.rows - 1) * g.block_q < length <= g.rows * g.block_q
        unknown = chunked_grid._blocks(tf.constant(length), tall)
        assert [int(n) for n in unknown] == list(chunked_grid._blocks(length, tall))


@pytest.mark.parametrize("form", ["eager", "function", "dynamic"])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.causal() & masks.window(3)])
def test_values_of_width_0_leave_the_other_gradients(mask, form):
    """`out` holds nothing then; lse is that of any value. At full size a window takes spans."""
    length = 9 if mask is None else 2048
    call = inputs(1, length, length, dtype=np.float32)
    given = {n: tf.constant(x[..., :0] if n == "value" else x) for n, x in call.items()}
    given |= {"mask": mask, "query_offset": 0}
    cotangents = {
        "out": tf.zeros((1, HQ, length, 0)),
        "lse": tf.constant(draw(1, HQ, length, seed=9, dtype=np.float32)),
    }
    found = [
        backend.vjp(
            given, cotangents, form, partial(attn_core.attention, impl=impl, return_lse=True)
        )
        for impl in ("chunked", "reference")
    ]
    (got, gradients), (want, wanted) = found
    assert got.out.shape == want.out.shape == (1, HQ, length, 0)
    assert gradients["value"].shape == given["value"].shape
    np.testing.assert_allclose(got.lse.numpy(), want.lse.numpy(), atol=1e-5)
    for name in ("query", "key"):
        assert wanted[name].numpy().any()
        np.testing.assert_allclose(gradients[name].numpy(), wanted[name].numpy(), atol=1e-4)


@pytest.mark.parametrize("length", [5, 600])
def test_unknown_sizes_under_xla(length):
    spec = [tf.TensorSpec((None, n, None, d)) for n, d in ((HQ, D), (HK, D), (HK, DV))]

    def run(q, k, v):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            out = attn_core.attention(q, k, v, mask=masks.causal(), query_offset="end")
        return [out, *tape.gradient(out, [q, k, v])]

    call = inputs(1, length, length, np.float32).values()
    found = tf.function(run, input_signature=spec, jit_compile=True)(*call)
    for x, y in zip(found, run(*call), strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), atol=2e-5)


def test_eager_lengths_do_not_retrace_without_bound(monkeypatch):
    traced = []
    forward = backend.chunked._forward

    def watched(p, x):
        traced.append((p.q_len, p.k_len))
        return forward(p, x)

    backend.chunked._compiled.cache_clear()
    monkeypatch.setattr(backend.chunked, "_forward", watched)
    for length in (3, 4, 9, 17, 300, 5):
        call = inputs(1, length, length, np.float32)
        attn_core.attention(**call, mask=masks.causal())
    assert traced == [(3, 3), (None, None)]
    backend.chunked._compiled.cache_clear()


def test_other_sizes_than_each_other_are_found_at_run_time():
    spec = [tf.TensorSpec((None, 1, None, 3)), tf.TensorSpec((None, 1, None, 3))]

    @tf.function(input_signature=[*spec, tf.TensorSpec((None, None, None, None))])
    def run(q, k, bias):
        return attn_core.attention(q, k, k, bias=bias)

    q, k = draw(2, 1, 5, 3, dtype=np.float32), draw(2, 1, 7, 3, dtype=np.float32)
    run(q, k, tf.zeros((2, 1, 1, 7)))
    for bias, keys in ((tf.zeros((2, 1, 1, 6)), k), (tf.zeros((2, 1, 5, 7)), k[:1])):
        with pytest.raises(tf.errors.InvalidArgumentError, match="must fit"):
            run(q, keys, bias)


# --- Memory. --------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
import tensorflow as tf
import attn_core
from attn_core import masks

def run(length):
    q = tf.random.stateless_uniform((1, 2, length, 16), (1, 2))

    @tf.function
    def call(q):
        with tf.GradientTape() as tape:
            tape.watch(q)
            out = attn_core.attention(q, q, q, mask=masks.causal())
        return tape.gradient(out, q)

    float(tf.reduce_sum(call(q)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

run(1024)
print(run(2048), run(8192))
"""


def test_memory_is_linear():
    """Logits of 8192 by 8192 for two heads are 512 MiB; tiles and their sums are not."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert after - before < 128


_POOL = """
import tensorflow as tf
import attn_core
from attn_core import masks

B, H, T, D, DV = 1, 8, 8192, 16, 128

def run(q, v):
    return attn_core.attention(q, q, v, mask=masks.causal(), query_offset=0)

for b, t in ((B, T), (None, None)):
    spec = [tf.TensorSpec((b, H, t, n)) for n in (D, DV)]
    call = tf.function(run, input_signature=spec).get_concrete_function()
    q, v = (tf.random.stateless_uniform((B, H, T, n), (1, 2)) for n in (D, DV))
    call(q, v)
    tf.config.experimental.reset_memory_stats("CPU:0")
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    out = call(q, v)
    print(tf.config.experimental.get_memory_info("CPU:0")["peak"] - before - 4 * B * H * T * DV)
    del out
"""


def test_out_is_there_once():
    """Beside `out`, 33.6 MB, there is not `out` once more: by TensorFlow's own account.

    Of wide values, so that little is computed for an `out` that is large beside the tiles.
    """
    done = subprocess.run(
        [sys.executable, "-c", _POOL],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TF_CPU_ALLOCATOR_USE_BFC": "true"},
    )
    known, unknown = map(int, done.stdout.split())
    assert 0 < known < 32e6
    assert 0 < unknown < 32e6


# --- Rows of tiles where they belong. -------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
@pytest.mark.parametrize("form", ["function", "eager"])
def test_calls_share_no_memory(layout, form):
    """A result that is held stays as it was, whatever is called afterwards."""

    def run(*given):
        return attn_core.attention(*given, mask=masks.causal(), layout=layout, impl="chunked")

    calls = []
    for scale in (1.0, -2.0, 5.0):
        call = [scale * x for x in inputs(2, 40, 40).values()]
        calls.append([tf.transpose(x, (0, 2, 1, 3)) for x in call] if layout == "BTHD" else call)
    run_ = tf.function(run, autograph=False) if form == "function" else run
    held = [run_(*call) for call in calls]
    before = [x.numpy().copy() for x in held]
    assert not np.array_equal(before[0], before[1])
    for call, x in zip(calls, before, strict=True):
        np.testing.assert_array_equal(run_(*call), x)
    for x, y in zip(held, before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_what_was_traced_for_the_cpu_compiles(layout):
    """A function that XLA is handed after it was traced, as one out of a SavedModel is."""
    call = inputs(2, 37, 37)
    if layout == "BTHD":
        call = {n: tf.transpose(x, (0, 2, 1, 3)) for n, x in call.items()}

    def run(q, k, v):
        return attn_core.attention(q, k, v, mask=masks.causal(), layout=layout, impl="chunked")

    traced = tf.function(run, autograph=False).get_concrete_function(*call.values())
    assert "InplaceUpdate" in str(traced.graph.as_graph_def())
    compiled = tf.function(lambda *given: traced(*given), autograph=False, jit_compile=True)
    want = attn_core.attention(**call, mask=masks.causal(), layout=layout, impl="reference")
    np.testing.assert_allclose(compiled(*call.values()), want, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_put_where_they_belong_and_those_beyond_the_end_nowhere(compiled):
    place = np.array([[1, 2, 7], [5, 4, 6]], np.int32)
    rows = np.random.default_rng(7).standard_normal((2, 3, 4)).astype(np.float32)

    def run(start, rows):
        out = chunked_written.blank(8, 4, tf.float32)
        out = chunked_written.put(out, tf.range(8)[None], start)
        out = chunked_written.put(out, tf.constant(place), rows)
        return chunked_written.put(out, tf.constant(place[:, ::-1]), rows + 1, tf.constant(2))

    start = np.arange(32, dtype=np.float32).reshape(1, 8, 4)
    want = start[0].copy()
    want[place.ravel()] = rows.reshape(-1, 4)
    want[place[:, :0:-1].ravel()] = rows[:, :2].reshape(-1, 4) + 1
    found = tf.function(run, jit_compile=compiled)(tf.constant(start), tf.constant(rows))
    np.testing.assert_array_equal(found, want)


# --- Other derivatives. ---------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_derivatives_of_derivatives_raise(compiled):
    call = inputs(1, 5, 5)

    def second(q):
        with tf.GradientTape() as outer:
            outer.watch(q)
            with tf.GradientTape() as inner:
                inner.watch(q)
                out = attn_core.attention(**call | {"query": q}, impl="chunked")
            first = inner.gradient(out, q)
        return outer.gradient(first, q)

    run = tf.function(second, autograph=False) if compiled else second
    with pytest.raises(UnsupportedError, match='need impl="reference"'):
        run(call["query"])


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_raises(compiled):
    call = inputs(1, 5, 5)

    def tangent(q):
        with tf.autodiff.ForwardAccumulator(q, tf.ones_like(q)) as accumulator:
            out = attn_core.attention(**call | {"query": q}, impl="chunked")
        return accumulator.jvp(out)

    run = tf.function(tangent, autograph=False) if compiled else tangent
    with pytest.raises(UnsupportedError, match='need impl="reference"'):
        run(call["query"])


def test_two_tapes_around_a_function():
    """TensorFlow then asks for derivatives of what the backward pass keeps, too."""
    call = inputs(1, 5, 5)
    run = tf.function(lambda q: attn_core.attention(**call | {"query": q}, impl="chunked"))
    q = call["query"]
    with tf.GradientTape() as first, tf.GradientTape() as second:
        first.watch(q)
        second.watch(q)
        out = run(q)
    found = first.gradient(out, q).numpy()
    np.testing.assert_array_equal(second.gradient(out, q).numpy(), found)
    with tf.GradientTape() as tape:
        tape.watch(q)
        out = attn_core.attention(**call, impl="reference")
    np.testing.assert_allclose(found, tape.gradient(out, q).numpy(), rtol=1e-9, atol=1e-12)


def test_jacobians():
    call = inputs(1, 3, 4)
    found = []
    for impl in ("chunked", "reference"):
        q = call["query"]
        with tf.GradientTape() as tape:
            tape.watch(q)
            out = attn_core.attention(**call, impl=impl)
        found.append(tape.jacobian(out, q).numpy())
    np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tape_around_what_forgets_gradients_raises(compiled):
    """tf.vectorized_map loses what `tf.custom_gradient` says: the gradients would be 0."""
    call = inputs(2, 3, 4)

    def attend(impl, q):
        keys = {name: call[name][:1] for name in ("key", "value")}
        return attn_core.attention(q[None], **keys, impl=impl)[0]

    def gradient(function, q):
        with tf.GradientTape() as tape:
            tape.watch(q)
            out = function(q)
        return tape.gradient(out, q)

    def within(impl, q):
        return tf.vectorized_map(lambda q: gradient(lambda q: attend(impl, q), q), q)

    def around(impl, q):
        return gradient(lambda q: tf.vectorized_map(lambda q: attend(impl, q), q), q)

    def jacobian(impl, q):
        with tf.GradientTape() as tape:
            tape.watch(q)
            out = attend(impl, q[0])
        return tape.jacobian(out, q)

    def second(impl, q):
        return gradient(lambda q: jacobian(impl, q), q)

    def run(function, impl):
        made = tf.function(function, autograph=False) if compiled else function
        return made(impl, call["query"]).numpy()

    want = run(within, "reference")
    np.testing.assert_allclose(run(around, "reference"), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(run(within, "chunked"), want, rtol=1e-9, atol=1e-12)
    assert np.abs(want).max() > 1e-3
    assert np.abs(run(second, "reference")).max() > 1e-3
    for function in (around, second):
        with pytest.raises(LookupError, match='need impl="reference"'):
            run(function, "chunked")


@pytest.mark.parametrize("lengths", [False, True])
def test_short_rows_of_unknown_length_share_a_turn(lengths, monkeypatch):
    """As they do where the length is known: a turn for each batch took 150 times as long."""
    parts, made = [], chunked_grid.cut_up

    def cut_up(*given):
        g = made(*given)
        parts.append(tf.reduce_prod(g.parts))
        return g

    monkeypatch.setattr(chunked_grid, "cut_up", cut_up)
    unknown = tf.TensorSpec((None, 1, None, 4), tf.float32)

    @tf.function(autograph=False, input_signature=[unknown, tf.TensorSpec((None,), tf.int32)])
    def counted(q, n):
        given = {"kv_lengths": n} if lengths else {"mask": masks.causal()}
        out = attn_core.attention(q, q, q, query_offset=0, impl="chunked", **given)
        return out, tf.stack(parts)

    _, found = counted(tf.ones((2000, 1, 8, 4)), tf.fill((2000,), 5))
    assert (found.numpy() == 1).all()


@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_one_tile_is_not_cut_out(layout):
    """No loop, list, slice or sort: what one tile needs none of is not traced, either way."""
    call = inputs(2, 5, 7)
    if layout == "BTHD":
        call = {name: tf.transpose(x, (0, 2, 1, 3)) for name, x in call.items()}
    mask = masks.causal() & masks.window(left=3)

    @tf.function(autograph=False)
    def step(query, key, value):
        given = {"query": query, "key": key, "value": value}
        with tf.GradientTape() as tape:
            tape.watch(list(given.values()))
            out = attn_core.attention(
                **given, mask=mask, query_offset="end", layout=layout, impl="chunked"
            )
        return tape.gradient(out, list(given.values()))

    made = [op.type for op in step.get_concrete_function(**call).graph.get_operations()]
    assert "BatchMatMulV2" in made
    needless = ("While", "TensorList", "Slice", "Gather", "TopK", "Range")
    assert not [kind for kind in made if any(word in kind for word in needless)]
    assert len(made) < 300
