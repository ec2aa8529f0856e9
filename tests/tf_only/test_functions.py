"""tf.function: traces, unknown sizes, what is written inside one."""

import traceback

import numpy as np
import pytest
import tensorflow as tf
from tf_cases import DV, HK, HQ, TK, B, D, answer, make, rule

import attn_core
from attn_core import Dropout, masks, reference, scores
from attn_core.backends import tf as backend


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

    def spy(*given, describe=backend.describe):
        seen.append(describe(*given))
        return seen[-1]

    monkeypatch.setattr(backend, "describe", spy)
    call, _, cotangents = make("everything")
    answer(call | {"impl": "reference"}, cotangents, "dynamic")
    shapes = [facts.shape for facts in seen]
    assert shapes[:3] == [(None, HQ, None, D), (None, HK, None, D), (None, HK, None, DV)]
    # Bias, sinks, both lengths and the score's slopes.
    assert sorted(map(len, shapes[3:])) == [1, 1, 1, 1, 2]
    assert all(size is None for shape in shapes[3:] for size in shape)
    # Where the offset is left out, Tq = Tk has to be known.
    seen.clear()
    call, _, cotangents = make("plain", tq=TK)
    call |= {"mask": masks.causal(), "impl": "reference"}
    answer(call, cotangents, "dynamic")
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

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def documents(q):
        return backend.scaled_dot_product_attention(q, q, q)

    with pytest.raises(ValueError, match=r"`q` must have a known rank .* tf\.ensure_shape"):
        documents.get_concrete_function()


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

    def spy(*given, describe=backend.describe):
        stack = traceback.extract_stack()
        rewritten.update(f.name for f in stack if "__autograph_generated" in f.filename)
        return describe(*given)

    monkeypatch.setattr(backend, "describe", spy)

    @tf.function
    def run(q):
        return attn_core.attention(q, q, q, mask=masks.causal(), score=scores.softcap(2.0))

    run(tf.ones((1, 1, 2, 3)))
    assert rewritten == {"tf__run"}


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
