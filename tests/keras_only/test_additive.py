"""AdditiveAttention of Keras against the judge of models, on whichever backend Keras runs.

`make test` runs this once for each: KERAS_BACKEND=tensorflow, jax and torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import model_judge
import numpy as np
import pytest
from keras_support import BACKEND, Traced, array, gradients, tensor, wide
from layer_cases import draw, weights_of
from layer_judge import kept
from model_cases import B

import attn_core
from attn_core import AdditiveConfig, masks
from attn_core.backends.keras import AdditiveAttention
from attn_core.benchmarks.memory import ALLOCATOR
from attn_core.conformance import tolerance
from attn_core.model import additive
from attn_core.model.cache import LayerOutput
from attn_core.model.initial import initial

ops = keras.ops
tf_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow alone")
keras_reads = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Q, K, V = draw(B, 5, 6), draw(B, 7, 4, seed=1), draw(B, 7, 3, seed=2)
SEES = np.random.default_rng(4).random((B, 5, 7)) < 0.6
SEES[1, 2] = False
EVERYTHING = np.ones((B, 5, 7), bool)
TILES = {"one tile": 2**22, "tiles of two": 2**8}
if BACKEND == "tensorflow":
    TILES["of one row"] = 1
tiles = pytest.mark.parametrize("pairs", TILES.values(), ids=TILES)


def additive_of(**options: Any) -> AdditiveAttention:
    layer = AdditiveAttention(width=9, query_input=6, key_input=4, **options)
    layer.load_weights(weights_of(layer.plan))
    return layer


def near(got: Any, weights: Any, *args: Any, **options: Any) -> bool:
    want, _ = model_judge.additive(weights, *args, **options)
    plain, _ = model_judge.additive(weights, *args, dtype=np.float32, **options)
    return tolerance.share(array(got), want, plain, "float32", "out", 3.0) <= 1


@tiles
def test_additive(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", pairs)
    layer, t = additive_of(), [tensor(x) for x in (Q, K, V)]
    weights = layer.export_weights()
    assert near(layer(*t), weights, Q, K, V, EVERYTHING)
    assert near(layer(*t[:2]), weights, Q, K, K, EVERYTHING)
    found = layer(*t, mask=tensor(SEES[:, None]), return_weights=True)
    assert isinstance(found, LayerOutput)
    assert found.cache is None
    assert near(found.out, weights, Q, K, V, SEES)
    _, shares = model_judge.additive(weights, Q, K, V, SEES)
    assert np.allclose(array(found.weights)[:, 0], shares, atol=1e-6)
    dense = layer(*t, mask=masks.dense(tensor(SEES[:, None])))
    assert np.allclose(array(dense), array(found.out), rtol=0, atol=1e-6)
    one = layer(*t, mask=tensor(SEES[:, None, :1]))
    assert near(one, weights, Q, K, V, np.broadcast_to(SEES[:, :1], SEES.shape))
    ends = np.arange(7) < np.array([4, 7])[:, None, None]
    rows = np.arange(5)[:, None] < np.array([5, 2])[:, None, None]
    got = layer(*t, kv_lengths=[4, 7], q_lengths=tensor(np.array([5, 2])))
    assert near(got, weights, Q, K, V, ends & rows)
    causal = np.arange(7) <= np.arange(5)[:, None] + np.array([1, -1])[:, None, None]
    got = additive_of(causal=True)(*t, query_offset=tensor(np.array([1, -1])))
    assert near(got, weights, Q, K, V, causal)


@tiles
def test_dropout(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", pairs)
    layer, t = additive_of(dropout=0.3, site=2), [tensor(x) for x in (Q, K, V)]
    weights = layer.export_weights()
    keep = kept(0.3, 5, 2, B, 1, np.broadcast_to(np.arange(5), (B, 5)), 7)[:, 0]
    got = layer(*t, seed=5, training=True)
    assert near(got, weights, Q, K, V, EVERYTHING, keep=keep, rate=0.3)
    assert near(layer(*t, seed=5), weights, Q, K, V, EVERYTHING)


@pytest.mark.parametrize("pairs", [2**22, 2**8], ids=["one tile", "tiles"])
def test_gradients(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every weight and input, along one random direction each."""
    monkeypatch.setattr(additive, "PAIRS", pairs)
    pull = draw(B, 5, 3, seed=9).astype(np.float64)
    with wide():
        layer = additive_of(dtype="float64")
        t = [tensor(x.astype(np.float64)) for x in (Q, K, V)]
        found = gradients(layer, t, pull, attention_mask=tensor(SEES[:, None]))
        held = {**layer.export_weights(), **dict(zip(range(3), (Q, K, V), strict=True))}
    assert found.pop("out").dtype == np.float64
    assert set(found) == set(held)
    rng = np.random.default_rng(8)
    for name, x in held.items():
        gradient, way = found[name], rng.standard_normal(x.shape)

        def loss(step: float, name: Any = name, way: Any = way) -> float:
            moved = {
                n: x.astype(np.float64) + (step * way if n == name else 0) for n, x in held.items()
            }
            inputs = [moved.pop(n) for n in range(3)]
            return float((pull * model_judge.additive(moved, *inputs, SEES)[0]).sum())

        h = 2.0**-12
        once, half = (loss(h) - loss(-h)) / (2 * h), (loss(h / 2) - loss(-h / 2)) / h
        spread = max(abs(gradient * way).sum(), abs(pull).sum())
        doubt = (tolerance.JUDGE + tolerance.CAP["gradient"]["float64"]) * spread
        assert abs((gradient * way).sum() - (4 * half - once) / 3) <= doubt, name


def test_additive_memory_is_linear() -> None:
    """Nothing of the size of all pairs is held, forward or backward; one tile is."""
    pairs = 1024 * 1024 * 64 * 4 / 2**20
    code = (Path(__file__).parent / "additive_memory.py").read_text()
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **ALLOCATOR, "KERAS_BACKEND": BACKEND},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    held = {form: float(mib) for form, mib in map(str.split, run.stdout.splitlines())}
    assert held
    for form, mib in held.items():
        assert additive.PAIRS * 4 / 2**20 <= mib < pairs / 2, form


@tf_only
@pytest.mark.parametrize("form", [{}, {"jit_compile": True}], ids=["graph", "xla"])
def test_gradients_of_a_tf_function(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setattr(additive, "PAIRS", 2**8)
    layer, t = additive_of(causal=True), [tensor(x) for x in (Q, K, V)]

    def slopes(*given: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(given)
            total = tf.reduce_sum(layer(*given, query_offset=2) ** 2)
        return tape.gradient(total, [*given, *[v.value for v in layer.trainable_variables]])

    for one, two in zip(slopes(*t), tf.function(slopes, **form)(*t), strict=True):
        cap = tolerance.CAP["gradient"]["float32"] * float(tf.reduce_max(abs(one)))
        assert np.allclose(one, two, rtol=0, atol=cap)


@tf_only
@tiles
def test_unknown_sizes(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """B, Tq and Tk unknown: one trace for every size, a few rows at a time here too."""
    import tensorflow as tf

    monkeypatch.setattr(additive, "PAIRS", pairs)
    layer, count = additive_of(causal=True, dropout=0.3), []
    specs = [tf.TensorSpec([None, None, x.shape[2]]) for x in (Q, K, V)]

    @tf.function(input_signature=[*specs, tf.TensorSpec([None, 1, None, None], tf.bool)])
    def run(q: Any, k: Any, v: Any, mask: Any) -> Any:
        count.append(1)
        options = {"mask": mask, "query_offset": 1, "seed": 3, "training": True}
        return layer(q, k, v, return_weights=True, **options)[:2]

    for batch, rows, keys in ((2, 5, 7), (1, 3, 4), (2, 0, 7)):
        given = Q[:batch, :rows], K[:batch, :keys], V[:batch, :keys]
        mask = SEES[:batch, None, :rows, :keys]
        options = {"mask": mask, "query_offset": 1, "seed": 3, "training": True}
        want = layer(*given, return_weights=True, **options)
        for one, two in zip(run(*given, mask), want, strict=False):
            assert one.shape == two.shape
            assert np.allclose(one, two, rtol=0, atol=1e-6)
    assert len(count) == 1


@tiles
def test_traced(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", pairs)
    layer, t = additive_of(), [tensor(x) for x in (Q, K, V)]
    mask = tensor(SEES[:, None])
    traced = Traced(lambda *given: layer(*given[:3], mask=given[3]))
    want = array(layer(*t, mask=mask))
    for _ in range(2):
        assert np.allclose(array(traced(*t, mask)), want, atol=1e-6)
    assert traced.traces == 1


# --- What Keras decides. --------------------------------------------------------------------------


def marked(x: np.ndarray, mask: np.ndarray) -> Any:
    """x with a mask of padding on it, as a layer before gives it."""
    given = np.where(mask[..., None], x, np.float32(9.0))
    return keras.layers.Masking(mask_value=9.0)(tensor(given))


@tiles
def test_a_mask_of_padding_is_honoured(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", pairs)
    layer = additive_of()
    weights = layer.export_weights()
    rows, keys = SEES[:, :, 0], SEES[:, 1]
    both = rows[:, :, None] & keys[:, None]
    assert 0 < both.sum() < both.size
    got = layer(marked(Q, rows), marked(K, keys), tensor(V))
    assert near(got, weights, Q, K, V, both)
    got = layer(marked(Q, rows), marked(K, keys), tensor(V), mask=tensor(SEES[:, None]))
    assert near(got, weights, Q, K, V, both & SEES)
    with pytest.raises(TypeError, match="`mask` must be boolean"):
        layer(marked(Q, rows), marked(K, keys), mask=np.zeros((5, 7), np.float32))


def test_a_mixed_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    want, _ = model_judge.additive(additive_of().export_weights(), Q, K, V, EVERYTHING)
    for pairs in TILES.values():
        monkeypatch.setattr(additive, "PAIRS", pairs)
        layer = additive_of(dtype="mixed_bfloat16")
        assert {v.dtype for v in layer.variables} == {"float32"}
        found = layer(*[tensor(x) for x in (Q, K, V)], return_weights=True)
        assert {keras.backend.standardize_dtype(x.dtype) for x in found[:2]} == {"bfloat16"}
        gap = abs(array(found.out).astype(np.float32) - want).max()
        # Two products, each rounded to bfloat16, lie between.
        assert 0 < gap < 2 * tolerance.CAP["out"]["bfloat16"] * abs(want).max()


@keras_reads
def test_files_configs_and_graphs(tmp_path: Any) -> None:
    layer, t = additive_of(causal=True, site=3, name="mine"), [tensor(x) for x in (Q, K, V)]
    assert {v.path for v in layer.trainable_variables} == {
        "mine/" + name.replace(".", "/") for name in layer.plan
    }
    want = array(layer(*t, query_offset=2))
    assert abs(want - array(layer(*t, query_offset=0))).max() > 1e-3
    other = AdditiveAttention.from_config(layer.get_config())
    assert (other.config, other.site, other.name) == (layer.config, 3, "mine")
    first = initial(layer.plan, 0)
    assert all(np.array_equal(x, first[n]) for n, x in other.export_weights().items())
    attn_core.save_weights(tmp_path / "w", layer)
    other.load_weights(tmp_path / "w")
    assert np.array_equal(array(other(*t, query_offset=2)), want)
    q, k, v = [keras.Input((None, x.shape[2])) for x in (Q, K, V)]
    out, weights, _ = layer(q, k, v, query_offset=2, return_weights=True)
    assert (out.shape, weights.shape) == ((None, None, 3), (None, 1, None, None))
    model = keras.Model([q, k, v], [out, weights])
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert np.array_equal(array(loaded(t)[0]), want)


@keras_reads
def test_trained_by_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit`, compiled as Keras compiles on each backend, in one tile and in many: the loss falls,
    and alike."""
    losses = []
    x, y = draw(16, 5, 6), draw(16, 7, 4, seed=1)
    for pairs in (2**22, 2**8):
        monkeypatch.setattr(additive, "PAIRS", pairs)
        q, k = keras.Input((5, 6)), keras.Input((7, 4))
        model = keras.Model([q, k], additive_of()(q, k))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        kept = model.fit(
            [x, y], np.tanh(x[..., :4]), epochs=8, batch_size=8, verbose=0, shuffle=False
        )
        losses.append(kept.history["loss"])
    assert losses[0][-1] < 0.95 * losses[0][0]
    assert np.allclose(*losses, rtol=1e-5)


# --- Calls that are refused, before anything is computed. -----------------------------------------

T = [tensor(x) for x in (Q, K, V)]
REFUSED = {
    "a width": (lambda: additive_of()(T[1], T[1]), r"`query` must have shape \(B, T, 6\)"),
    "rows of values": (lambda: additive_of()(T[0], T[1], T[2][:, :3]), "`value` must have shape"),
    "a mask of other rows": (
        lambda: additive_of()(*T, mask=ops.ones((6, 7), "bool")),
        "`mask` must broadcast to .* with Tq = 5. Got",
    ),
    "no offset": (lambda: additive_of(causal=True)(*T), "`query_offset` must be given"),
    "no seed": (
        lambda: additive_of(dropout=0.1)(*T, training=True),
        "`seed` must be given",
    ),
    "a graph of another width": (
        lambda: additive_of()(keras.Input((5, 7)), keras.Input((7, 4))),
        r"`query` must have shape \(B, T, 6\)",
    ),
    "a site below 0": (lambda: additive_of(site=-1), "`site` must be at least 0. Got -1"),
}
MISTYPED = {
    "stock polarity": (lambda: additive_of()(*T, mask=ops.zeros((5, 7))), "`mask` must be boolean"),
    "lengths": (
        lambda: additive_of()(*T, q_lengths=[1.5, 2.0]),
        "`q_lengths` must be integers. Got float32",
    ),
    "an offset": (
        lambda: additive_of()(*T, query_offset=0.5),
        "`query_offset` must be integers. Got float32",
    ),
    "a site": (lambda: additive_of(site=0.5), "`site` must be an int. Got 0.5"),
}


@pytest.mark.parametrize("name", [*REFUSED, *MISTYPED])
def test_refused(name: str) -> None:
    bad, words = {**REFUSED, **MISTYPED}[name]
    with pytest.raises(TypeError if name in MISTYPED else ValueError, match=words):
        bad()


def test_build() -> None:
    config = AdditiveConfig(4, backend="tf")
    if BACKEND != "tensorflow":
        with pytest.raises(ImportError, match=f"Got KERAS_BACKEND={BACKEND}"):
            attn_core.build(config)
        return
    layer = attn_core.build(config, seed=3)
    assert isinstance(layer, AdditiveAttention)
    want = initial(layer.plan, 3)
    assert all(np.array_equal(x, want[n]) for n, x in layer.export_weights().items())
