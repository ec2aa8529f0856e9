"""The documents' functions of TensorFlow against their listing and the judge."""

import os
import subprocess
import sys
from typing import Any

import document_cases
import numpy as np
import pytest
import tensorflow as tf
from document_cases import KINDS, LEADS, MODULE_REACHES, REACHES, given, judged, mask_of, shapes
from tf_cases import DV, INF, TK, TQ, D

import attn_core
from attn_core import Dropout, documents, reference
from attn_core.backends import tf as backend


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


# --- Masks of every shape, and none of them written out. ------------------------------------------


def both(q, k, v, mask):
    """out, and the gradient of the sum of its squares for a float mask."""
    if mask.dtype == tf.bool:
        return (backend.scaled_dot_product_attention(q, k, v, mask),)
    with tf.GradientTape() as tape:
        tape.watch(mask)
        out = backend.scaled_dot_product_attention(q, k, v, mask)
        total = tf.reduce_sum(out**2)
    return out, tape.gradient(total, mask)


def agree(found, x, mask):
    for got, want in zip(found, judged(x, mask), strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", LEADS)
def test_masks_of_every_shape(lead, kind):
    x = given(lead)
    for shape in shapes(lead):
        mask = mask_of(shape, kind)
        with attn_core.use(impl="reference"):
            agree(both(*[tf.constant(one) for one in (*x, mask)]), x, mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [3, None])
def test_masks_of_unknown_sizes(heads, kind):
    """Traced once for masks of a rank; heads that are not known are as many batches."""
    calls, traced = {}, []
    x = given((2, 3))
    spec = [tf.TensorSpec((None, heads, None, n)) for n in (4, 4, 3)]

    def run(q, k, v, mask):
        traced.append(mask)
        return both(q, k, v, mask)

    for shape in document_cases.UNKNOWN:
        mask = mask_of(shape, kind)
        if len(shape) not in calls:
            told = [*spec, tf.TensorSpec((None,) * len(shape), mask.dtype)]
            calls[len(shape)] = tf.function(run, input_signature=told)
        agree(calls[len(shape)](*x, mask), x, mask)
    assert len(traced) == len(calls)


def test_unknown_heads_have_no_numbers_to_drop():
    spec = tf.TensorSpec((None, None, None, 4))

    @tf.function(input_signature=[spec])
    def run(q):
        return backend.scaled_dot_product_attention(q, q, q, dropout_rate=0.1, seed=1)

    with pytest.raises(ValueError, match=r"a known number of heads.*Got \(\?, \?, \?, 4\)"):
        run.get_concrete_function()


@pytest.mark.parametrize("lead", LEADS)
def test_dropout_is_by_heads(lead):
    x = given(lead)
    got = backend.scaled_dot_product_attention(*x, dropout_rate=0.4, seed=5)
    np.testing.assert_allclose(got, document_cases.dropped(x, 0.4, 5), rtol=1e-4, atol=1e-5)
    if len(lead) == 2:
        with attn_core.use(backend="tf"):
            assert np.array_equal(got, attn_core.attention(*x, dropout=Dropout(0.4, 5)))


class Reached(Exception):
    """`attention` was called."""


@pytest.mark.parametrize("kind", KINDS)
def test_masks_go_on_as_they_are(kind, monkeypatch):
    reached = []

    def recording(*given: Any, mask: Any = None, bias: Any = None, **options: Any) -> Any:
        reached.append(tuple((mask if bias is None else bias).shape))
        raise Reached

    monkeypatch.setattr(documents, "attention", recording)
    for lead, shape, want in REACHES:
        with pytest.raises(Reached):
            backend.scaled_dot_product_attention(*given(lead), mask_of(shape, kind))
        assert reached.pop() == want, (lead, shape)
    held = {f"{part}.weight": tf.eye(4) for part in ("query", "key", "value", "out")}
    for lead, shape, want in MODULE_REACHES:
        x = tf.zeros((*lead, 5, 4))
        with pytest.raises(Reached):
            backend.attention_module(x, mask=mask_of(shape, kind), parameters=held, heads=4)
        assert reached.pop() == want, (lead, shape)


_PEAKS = """
import tensorflow as tf
import attn_core
from attn_core.backends.tf import scaled_dot_product_attention

T = 1024
x = tf.random.stateless_uniform((2, 8, T, 8), (1, 2))
padding = tf.sequence_mask([T, T // 2], T)[:, None, None]

def peak(call, *given):
    call(*given)
    tf.config.experimental.reset_memory_stats("CPU:0")
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    call(*given)
    return tf.config.experimental.get_memory_info("CPU:0")["peak"] - before

bare = lambda x, mask: attn_core.attention(x, x, x, mask=mask)
ours = lambda x, mask: scaled_dot_product_attention(x, x, x, mask)
told = [tf.TensorSpec((None, 8, None, 8)), tf.TensorSpec((None,) * 4, tf.bool)]
print(*[peak(f, x, padding) for f in (bare, ours)])
print(*[peak(tf.function(f, input_signature=told), x, padding) for f in (bare, ours)])
bare = lambda x, mask: attn_core.attention(x, x, x, bias=mask)
print(*[peak(f, x, tf.where(padding, 0.0, -1e9)) for f in (bare, ours)])
"""


def test_memory_is_linear():
    """By TensorFlow's own account. Written out the mask would be 16 MiB, a float one 64."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAKS],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TF_CPU_ALLOCATOR_USE_BFC": "true"},
    )
    lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for bare, ours in lines:
        assert 0 < ours <= bare + 2**20


def test_refused_in_our_words():
    document_cases.check_refused(backend.scaled_dot_product_attention, tf.constant)
