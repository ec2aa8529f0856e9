"""`attn_core.compat.keras` against Keras' own function, under whichever backend Keras runs.

`make test` runs this once for each: KERAS_BACKEND=tensorflow, jax and torch.
"""

from __future__ import annotations

import inspect
from typing import Any

import compat_cases as cases
import keras
import numpy as np
import pages
import pytest

import attn_core
from attn_core import compat, masks
from attn_core.compat.keras import dot_product_attention as ours

theirs = keras.ops.dot_product_attention
BACKEND = keras.backend.backend()
OPTIONS = (
    *("bias", "mask", "scale", "is_causal", "grouped", "more_queries"),
    *("flash_attention", "attn_logits_soft_cap"),
)


def softcap(s, b, h, q, k):
    return 1.5 * np.tanh(s / 1.5)


def asked(options: tuple[str, ...]) -> tuple[dict[str, Any], cases.Judge]:
    """Keras' arguments, as NumPy arrays, and the judge's."""
    rows, keys = (9, 5) if "more_queries" in options else (5, 9)
    kv_heads = 2 if "grouped" in options else 4
    shapes = {
        "query": (2, rows, 4, 8),
        "key": (2, keys, kv_heads, 8),
        "value": (2, keys, kv_heads, 8),
    }
    arrays = {name: cases.draw(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    given: dict[str, Any] = dict(arrays)
    judge: cases.Judge = {**arrays, "layout": "BTHD"}
    seen = np.ones((rows, keys), bool)
    if "mask" in options:
        seen = np.random.default_rng(7).random((2, 1, rows, keys)) < 0.7
        seen[..., 0] = True
        given["mask"] = seen
    if "bias" in options:
        given["bias"] = judge["bias"] = cases.draw(8, 1, 4, rows, keys)
    if "is_causal" in options:
        given["is_causal"] = True
        seen = seen & cases.causal(rows, keys)
    if "scale" in options:
        given["scale"] = judge["scale"] = 0.7
    if "flash_attention" in options:
        given["flash_attention"] = False
    if "attn_logits_soft_cap" in options:
        given["attn_logits_soft_cap"], judge["score"] = 1.5, softcap
    return given, {**judge, "mask": seen}


def tensor(x: Any) -> Any:
    return keras.ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x


def array(x: Any) -> np.ndarray:
    # Of torch's tensors Keras asks NumPy for a copy in a way that NumPy deprecates.
    return x.detach().numpy() if BACKEND == "torch" else keras.ops.convert_to_numpy(x)


def answered(function: Any, given: dict[str, Any], cotangent: np.ndarray) -> dict[str, np.ndarray]:
    given = {n: tensor(x) for n, x in given.items()}
    leaves = {n: given.pop(n) for n in ("query", "key", "value", "bias") if n in given}
    out, gradients = pulled(lambda leaves: function(**leaves, **given), leaves, tensor(cotangent))
    found = {"out": array(out)}
    return found | {f"d_{name}": array(gradient) for name, gradient in gradients.items()}


def pulled(call: Any, leaves: dict[str, Any], cotangent: Any) -> tuple[Any, dict[str, Any]]:
    """The answer and the gradients, by the backend's own means."""
    if BACKEND == "jax":
        import jax

        out, pull = jax.vjp(call, leaves)
        return out, pull(cotangent)[0]
    if BACKEND == "torch":
        import torch

        leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
        out = call(leaves)
        gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
        return out.detach(), dict(zip(leaves, gradients, strict=True))
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(leaves)
        out = call(leaves)
    return out, tape.gradient(out, leaves, cotangent)


@pytest.mark.parametrize("options", cases.singly_and_in_pairs(OPTIONS), ids="+".join)
def test_every_option_alone_and_in_pairs(options):
    given, judge = asked(options)
    cotangent = cases.draw(9, *given["query"].shape)
    mine = answered(ours, given, cotangent)
    shares = cases.shares(judge, cotangent, mine)
    assert cases.inside(shares), shares
    if "attn_logits_soft_cap" in options:
        return  # Keras has it on a TPU only
    if BACKEND == "torch" and "bias" in options and {"mask", "is_causal"} & set(options):
        return  # Keras refuses the pair there, or torch does
    its = cases.shares(judge, cotangent, answered(theirs, given, cotangent))
    assert cases.inside(its), its


@pytest.mark.parametrize("option", ["bias", "mask", "scale", "is_causal", "attn_logits_soft_cap"])
def test_each_option_changes_the_answer(option):
    assert cases.off_and_on(asked((option,))[1], asked(())[1])


def test_the_signature_is_keras():
    mine, its = [inspect.signature(f).parameters for f in (ours, theirs)]
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in its.values()
    ]


def test_a_row_that_sees_nothing_is_zero_on_every_backend():
    given, _ = asked(("mask",))
    given["mask"][0, 0, 2] = False
    assert not array(ours(**given))[0, 2].any()
    mean = given["value"][0].mean(0)
    np.testing.assert_allclose(array(theirs(**given))[0, 2], mean, atol=1e-6)


def test_flash_attention_chooses_among_implementations(monkeypatch):
    given, _ = asked(())
    found = []
    real = attn_core.registry.choose

    def spy(backend, problem, impl):
        plan = real(backend, problem, impl)
        found.append(plan.impl)
        return plan

    monkeypatch.setattr(attn_core.api.registry, "choose", spy)
    for asks in (None, True, False):
        ours(**given, flash_attention=asks)
    assert found[0] == found[1] != "reference"
    assert found[2] == "reference"
    with attn_core.use(impl="reference"), pytest.raises(ValueError, match="`flash_attention` must"):
        ours(**given, flash_attention=True)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float16", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float16", "float16"),
    ],
)
def test_dtypes_are_promoted_as_keras_does(dtypes):
    q, k, v = [keras.ops.cast(cases.draw(n, 2, 5, 4, 8), d) for n, d in enumerate(dtypes)]
    bias = cases.draw(3, 5, 5)
    mine, its = [f(q, k, v, bias=bias) for f in (ours, theirs)]
    assert mine.dtype == its.dtype
    eps = {"float32": 1e-5, "float16": 2**-8, "bfloat16": 2**-5}
    assert_close(mine, its, eps[keras.backend.standardize_dtype(mine.dtype)])


def assert_close(x: Any, y: Any, atol: float = 5e-6) -> None:
    x, y = [array(keras.ops.cast(z, "float32")) for z in (x, y)]
    np.testing.assert_allclose(x, y, atol=atol)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_ranks_are_right_aligned(rank):
    given, _ = asked(())
    shape = (2, 4, 5, 9)[4 - rank :]
    assert_close(*[f(**given, bias=cases.draw(5, *shape)) for f in (ours, theirs)])
    seen = cases.draw(6, *shape) > -0.8
    seen[..., 0] = True
    if BACKEND != "jax" or rank == 4:  # there Keras broadcasts a mask of lower rank only at the end
        assert_close(*[f(**given, mask=tensor(seen)) for f in (ours, theirs)])


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_a_mask_of_numbers_is_cast(dtype):
    given, _ = asked(("mask",))
    want = array(ours(**given))
    given["mask"] = given["mask"].astype(dtype)
    np.testing.assert_array_equal(array(ours(**given)), want)
    if BACKEND == "torch":
        assert_close(theirs(**given), want)


def test_a_scale_that_is_a_tensor():
    given, _ = asked(())
    assert_close(*[f(**given, scale=tensor(np.float32(0.3) * np.ones(()))) for f in (ours, theirs)])


def test_keras_tensors_become_a_graph():
    query, key = keras.Input((5, 4, 8)), keras.Input((9, 2, 8))
    seen = keras.Input((1, 5, 9), dtype="bool")
    out = ours(query, key, key, mask=seen, is_causal=True)
    assert out.shape == (None, 5, 4, 8)
    assert out.dtype == "float32"
    model = keras.Model([query, key, seen], out)
    arrays = [cases.draw(0, 2, 5, 4, 8), cases.draw(1, 2, 9, 2, 8), cases.draw(2, 2, 1, 5, 9) > 0]
    want = ours(arrays[0], arrays[1], arrays[1], mask=arrays[2], is_causal=True)
    assert_close(model([tensor(x) for x in arrays]), want, 0)
    if BACKEND == "tensorflow":  # elsewhere Keras would import TensorFlow in order to write it down
        again = keras.Model.from_config(model.get_config())
        assert_close(again([tensor(x) for x in arrays]), want, 0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a graph of TensorFlow's")
@pytest.mark.parametrize("jit", [False, True])
def test_unknown_lengths_in_a_function(jit):
    import tensorflow as tf

    given, _ = asked(("mask", "is_causal"))
    shapes = [(None, None, 4, 8), (None, None, 4, 8), (None, 1, None, None)]
    kinds = [tf.float32, tf.float32, tf.bool]
    specs = [tf.TensorSpec(*pair) for pair in zip(shapes, kinds, strict=True)]

    @tf.function(input_signature=specs, jit_compile=jit)
    def call(query, key, mask):
        return ours(query, key, key, mask=mask, is_causal=True)

    arrays = [tensor(given[n]) for n in ("query", "key", "mask")]
    want = theirs(arrays[0], arrays[1], arrays[1], mask=arrays[2], is_causal=True)
    assert_close(call(*arrays), want)


def test_inside_keras_layer(monkeypatch):
    """MultiHeadAttention takes the function from keras.ops."""
    layer = keras.layers.MultiHeadAttention(4, 8, dropout=0.0)
    x, context = cases.draw(0, 2, 5, 16), cases.draw(1, 2, 9, 16)
    seen = cases.draw(2, 2, 5, 9) > 0
    seen[..., 0] = True
    want = layer(x, context, attention_mask=seen)
    called = []

    def spy(*args, **kwargs):
        called.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr(keras.src.ops, "dot_product_attention", spy)
    found = layer(x, context, attention_mask=seen)
    assert called
    assert_close(found, want)
    projected = [
        getattr(layer, f"_{n}_dense")(y)
        for n, y in zip(("query", "key", "value"), (x, context, context), strict=True)
    ]
    mask = compat.from_keras_mask(tensor(seen))
    out = attn_core.attention(*projected, layout="BTHD", mask=mask)
    assert_close(layer._output_dense(out), want)


X = np.zeros((2, 5, 4, 8), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"query": X[0]}, ValueError, "`query` must have rank 4"),
        ({"key": X[:, :, :3]}, ValueError, "must agree on Hk"),
        ({"bias": X[:, :, :, :3]}, ValueError, "`bias` must broadcast"),
        ({"mask": np.ones((1, 1, 1, 5, 5), bool)}, ValueError, "`mask` must have rank 4 or less"),
        ({"flash_attention": "yes"}, ValueError, "`flash_attention` must be None or a bool"),
        ({"attn_logits_soft_cap": 0.0}, ValueError, "`c`|`cap`|softcap"),
    ],
)
def test_errors_are_in_our_words(arguments, error, words):
    with pytest.raises(error, match=words):
        ours(**{"query": X, "key": X, "value": X, **arguments})


def test_masks_of_the_language_stay_with_attention():
    with pytest.raises((TypeError, ValueError)):
        ours(X, X, X, mask=masks.causal())


def test_the_page_as_written():
    for code in pages.blocks("COMPAT.md", "keras"):
        held: dict[str, Any] = {}
        exec(code, held)
        assert held["model"].output.shape == (None, 5, 4, 8)
