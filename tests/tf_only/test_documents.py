"""The documents' `scaled_dot_product_attention` of TensorFlow against its listing and the judge."""

import numpy as np
import pytest
import tensorflow as tf
from tf_cases import DV, INF, TK, TQ, D

from attn_core import reference
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
