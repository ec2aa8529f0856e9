"""MultiHeadAttention of Keras against the judge of layers, on whichever backend Keras runs.

`make test` runs this once for each: KERAS_BACKEND=tensorflow, jax and torch.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras_support import BACKEND, Traced, array, gradients, tensor, tensors, wide
from layer_cases import CASES, B, Case, draw, inputs_of, judged, share, slope, weights_of, without

import attn_core
from attn_core import AttentionConfig, masks
from attn_core.backends.keras import MultiHeadAttention, Steps
from attn_core.backends.keras.portable import variable
from attn_core.conformance.tolerance import CAP, EPS, JUDGE
from attn_core.model.cache import Cache, LayerOutput
from attn_core.model.parameters import parameters

ops = keras.ops
# Keras asks NumPy for copies of variables in a way that NumPy deprecates.
keras_reads = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
tf_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow alone")


def layer_of(case: Case, **options: Any) -> MultiHeadAttention:
    layer = MultiHeadAttention(**{**case.config, **options})
    layer.load_weights(weights_of(layer.plan))
    return layer


def call(layer: Any, case: Case, inputs: list[Any], **more: Any) -> Any:
    options = {"training": case.training, **tensors(case.call), **more}
    return layer(*[tensor(x) for x in inputs], **options)


# --- The judge. -----------------------------------------------------------------------------------


# The class is the same everywhere: every case is asked on TensorFlow, whose layers these are. On
# JAX each operation is compiled for each shape, which takes most of the time.
EACH = list(CASES)
if BACKEND != "tensorflow":
    EACH = [
        "cross of other widths",
        "grouped heads",
        "rotary in part",
        "scores in order",
        "dropout",
    ]
    EACH += ["a mask of the language", "everything"]


@pytest.mark.parametrize("name", EACH)
def test_forward(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    found = call(layer, case, inputs, return_weights=True)
    weights = layer.export_weights()
    assert share(array(found.out), case, weights, inputs) <= 1
    assert share(array(found.weights), case, weights, inputs, "weights") <= 1
    assert found.cache is None
    alone = call(layer_of(case, impl="reference"), case, inputs)
    assert share(array(alone), case, weights, inputs) <= 1


# Keras' cos and sin are of float32 on JAX, so that rotary positions are refused in float64.
SLOPES = ["cross of other widths", "grouped heads", "qk_norm", "gate", "bias", "dropout"]
if BACKEND != "jax":
    SLOPES += ["rotary in part", "rotary interleaved", "alibi", "everything"]


@pytest.mark.parametrize("name", SLOPES)
def test_gradients(name: str) -> None:
    """Of every weight and input, along one random direction each."""
    case = CASES[name]
    with wide():
        layer, inputs = layer_of(case, dtype="float64"), inputs_of(case)
        rows, width = inputs[0].shape[1], layer.config.sizes.out
        pull = draw(B, rows, width, seed=9).astype(np.float64)
        options = {"training": case.training, **tensors(case.call, "float64")}
        found = gradients(layer, [tensor(x.astype(np.float64)) for x in inputs], pull, **options)
        weights, rng = layer.export_weights(), np.random.default_rng(8)
    found.pop("out")
    assert set(found) == {*layer.plan, *range(len(inputs))}
    for name, gradient in found.items():
        way = rng.standard_normal(gradient.shape)
        want = slope(case, weights, inputs, pull, {name: way})
        # The judge's doubt is that of the suite; a gradient of zero, such as that of the keys'
        # bias where no position is read, is one of sums of the output.
        spread = max(abs(gradient * way).sum(), abs(pull).sum())
        doubt = (JUDGE + CAP["gradient"]["float64"]) * spread
        assert abs((gradient * way).sum() - want) <= doubt, name


CHANGES = [
    name
    for name in EACH * (BACKEND != "jax")
    if name not in ("self", "cross", "dropout in evaluation")
]


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_output(name: str) -> None:
    """Each in turn at its default: an option that is accepted and ignored would stay unseen."""
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    out = array(call(layer, case, inputs))
    weights = layer.export_weights()
    shapes = ("kv_heads", "head_width", "value_width", "key_input", "value_input", "out_width")
    for option in case.config:
        if option in ("width", "heads", "dropout", "bias", "out_bias", *shapes):
            continue
        other = without(case, option)
        made = MultiHeadAttention(**other.config)
        made.load_weights({n: weights[n] for n in made.plan})
        if case.config.get("positions") == "rotary" and option == "positions":
            other = Case(other.config, other.inputs, {**other.call, "positions": None})
        found = call(made, other, inputs, training=case.training)
        assert abs(array(found) - out).max() > 1e-3, option
    for option in case.call:
        if option == "seed":
            left: dict[str, Any] = {"seed": 3}
        else:
            left = {option: 0 if option == "query_offset" else None}
        other = Case(case.config, case.inputs, {**case.call, **left}, training=case.training)
        assert abs(array(call(layer, other, inputs)) - out).max() > 1e-3, option


# --- Weights and first values. --------------------------------------------------------------------


def test_first_values_are_those_of_the_seed() -> None:
    one, two = MultiHeadAttention(width=8, heads=2), MultiHeadAttention(width=8, heads=2)
    assert np.array_equal(array(one.query.weight.value), array(two.query.weight.value))
    three = MultiHeadAttention(width=8, heads=2, seed=1).export_weights()["query.weight"]
    assert not np.array_equal(one.export_weights()["query.weight"], three)
    assert 0.8 * (6 / 16) ** 0.5 < abs(three).max() <= (6 / 16) ** 0.5


def test_biases_are_there_only_where_asked_for() -> None:
    layer = MultiHeadAttention(width=8, heads=2, bias=False, gate=True, name="mine")
    names = {"query/weight", "key/weight", "value/weight", "gate/weight", "out/weight", "out/bias"}
    assert {v.path for v in layer.trainable_variables} == {f"mine/{name}" for name in names}
    assert layer.count_params() == 5 * 64 + 8


def test_export_and_load(tmp_path: Any) -> None:
    case = CASES["everything"]
    layer = layer_of(case)
    held = layer.export_weights()
    assert list(held) == list(parameters(layer.config))
    assert {n: x.shape for n, x in held.items()} == {n: p.shape for n, p in layer.plan.items()}
    held["out.bias"][:] = 0  # a copy
    assert abs(layer.export_weights()["out.bias"]).max() > 0
    attn_core.save_weights(tmp_path / "w", layer)
    other = MultiHeadAttention(**case.config, seed=5)
    other.load_weights(tmp_path / "w")
    inputs = inputs_of(case)
    assert np.array_equal(array(call(layer, case, inputs)), array(call(other, case, inputs)))


def test_a_bad_load_changes_nothing(tmp_path: Any) -> None:
    layer = MultiHeadAttention(width=8, heads=2)
    before, held = layer.export_weights(), weights_of(layer.plan)
    attn_core.save_weights(tmp_path / "w", held, AttentionConfig(8, 4))
    (tmp_path / "cut").write_bytes((tmp_path / "w").read_bytes()[:-3])
    bad = [
        ({**held, "out.bias": np.zeros(3, np.float32)}, "`out.bias` must have shape"),
        ({n: x for n, x in held.items() if n != "out.bias"}, "Got none called 'out.bias'"),
        ({**held, "out.bais": held["out.bias"]}, "Did you mean 'out.bias'"),
        (tmp_path / "w", "heads: 2, 4"),
        (tmp_path / "cut", "complete safetensors file"),
    ]
    for source, words in bad:
        with pytest.raises(ValueError, match=words):
            layer.load_weights(source)
    assert all(np.array_equal(x, before[n]) for n, x in layer.export_weights().items())


def test_bfloat16_weights_go_out_and_in(tmp_path: Any) -> None:
    layer = MultiHeadAttention(width=8, heads=2, dtype="bfloat16", seed=4)
    assert layer.config.dtype == layer.compute_dtype == "bfloat16"
    attn_core.save_weights(tmp_path / "w", layer)
    other = MultiHeadAttention(width=8, heads=2, dtype="bfloat16")
    other.load_weights(tmp_path / "w")
    held = layer.export_weights()
    assert held["query.weight"].dtype.name == "bfloat16"
    assert all(np.array_equal(x, held[n]) for n, x in other.export_weights().items())


def test_build() -> None:
    config = AttentionConfig(8, 2, backend="tf")
    if BACKEND != "tensorflow":
        with pytest.raises(ImportError, match=f"Got KERAS_BACKEND={BACKEND}"):
            attn_core.build(config)
        return
    layer = attn_core.build(config, seed=3, name="mine")
    assert isinstance(layer, MultiHeadAttention)
    assert layer.name == "mine"
    other = MultiHeadAttention(config, seed=3).export_weights()
    assert np.array_equal(layer.export_weights()["key.weight"], other["key.weight"])


# --- Calls that are refused, before anything is computed. -----------------------------------------

PLAIN = MultiHeadAttention(width=12, heads=4)
X = tensor(draw(B, 5, 12))
REFUSED = {
    "rank": (lambda: PLAIN(X[0]), ValueError, r"`query` must have shape \(B, T, 12\). Got \(5, 12"),
    "width": (lambda: PLAIN(X[..., :8]), ValueError, r"`query` must have shape"),
    "key rows": (lambda: PLAIN(X, X, X[:, :3]), ValueError, "as many rows as `key`"),
    "a value alone, which Keras takes for the key": (
        lambda: PLAIN(X, value=X),
        ValueError,
        "`key` must be given where `value` is. .* `layer\\(query, source\\)`",
    ),
    "stock polarity": (
        lambda: PLAIN(X, mask=ops.zeros((5, 5))),
        TypeError,
        "`mask` must be boolean, True = attend. Got float32",
    ),
    "stock polarity beside causal": (
        lambda: MultiHeadAttention(width=12, heads=4, causal=True)(X, mask=np.zeros((5, 5))),
        TypeError,
        "`mask` must be boolean, True = attend. Got float",
    ),
    "positions that are no integers": (
        lambda: MultiHeadAttention(width=12, heads=2, positions="rotary")(X, positions=X[0, :, 0]),
        TypeError,
        "`positions` must be integers. Got float32",
    ),
    "an offset that is no integer": (
        lambda: MultiHeadAttention(width=12, heads=2, positions="rotary")(X, query_offset=0.5),
        TypeError,
        "`query_offset` must be integers. Got float32",
    ),
    "lengths that are no integers beside a cache": (
        lambda: PLAIN(X, cache=PLAIN.make_cache(B, 9), q_lengths=[1.5, 2.0]),
        TypeError,
        "`q_lengths` must be integers. Got float32",
    ),
    "a memory's lengths that are no integers": (
        lambda: PLAIN.memory(X, lengths=[1.5, 2.0]),
        TypeError,
        "`lengths` must be integers. Got float32",
    ),
    "lengths of another batch beside a cache": (
        lambda: PLAIN(X, cache=PLAIN.make_cache(B, 9), q_lengths=[1, 2, 3]),
        ValueError,
        r"`q_lengths` must be an int or have shape \(B,\) = \(2,\). Got \(3,\)",
    ),
    "the output that holds a cache": (
        lambda: PLAIN(X, cache=PLAIN(X, cache=PLAIN.make_cache(B, 9))),
        TypeError,
        "`cache` must be a Cache, .* Got LayerOutput: its `.cache`",
    ),
    "a site": (
        lambda: MultiHeadAttention(width=8, heads=2, site=0.5),
        TypeError,
        "`site` must be an",
    ),
    "a site below 0": (
        lambda: MultiHeadAttention(width=8, heads=2, site=-1),
        ValueError,
        "`site` must be at least 0. Got -1",
    ),
    "a mask of rank 3": (
        lambda: MultiHeadAttention(width=12, heads=4, causal=True)(X, mask=X[:, :, :5] > 0),
        ValueError,
        "rank 2",
    ),
    "a mask of another size": (
        lambda: MultiHeadAttention(width=12, heads=4, causal=True)(X, mask=X[0, :4, :4] > 0),
        ValueError,
        "must broadcast to",
    ),
    "no seed": (
        lambda: MultiHeadAttention(width=12, heads=4, dropout=0.1)(X, training=True),
        ValueError,
        "`seed` must be given in training with dropout",
    ),
    "a float seed": (
        lambda: MultiHeadAttention(width=12, heads=4, dropout=0.1)(X, seed=0.5, training=True),
        TypeError,
        "`seed` must be an int",
    ),
    "lengths out of range": (
        lambda: PLAIN(X, kv_lengths=np.array([5, 9])),
        ValueError,
        "`kv_lengths`",
    ),
    "a memory's lengths": (
        lambda: PLAIN.memory(X, lengths=[5, 9]),
        ValueError,
        "`lengths` must be from 0 to Tk = 5",
    ),
    "positions": (
        lambda: PLAIN(X, positions=np.arange(5)),
        ValueError,
        "`positions` must be left out but for self-attention with rotary",
    ),
    "rotary without an offset": (
        lambda: MultiHeadAttention(width=12, heads=2, positions="rotary")(X, X[:, :3]),
        ValueError,
        "`query_offset` must be given where Tq and Tk",
    ),
    "another layer's cache": (
        lambda: PLAIN(X, cache=MultiHeadAttention(width=12, heads=2).make_cache(B, 9)),
        ValueError,
        "`cache` must be one of this layer and batch",
    ),
    "a small cache": (
        lambda: PLAIN(X, cache=PLAIN.make_cache(B, 4)),
        ValueError,
        "Got 5 rows and 4 slots",
    ),
    "an offset beside a cache": (
        lambda: PLAIN(X, cache=PLAIN.make_cache(B, 9), query_offset=1),
        ValueError,
        "`query_offset` must be left out with a cache",
    ),
    "another config": (
        lambda: MultiHeadAttention(attn_core.AdditiveConfig(4)),
        TypeError,
        "`config` must be AttentionConfig",
    ),
    "an unknown option": (
        lambda: MultiHeadAttention(width=8, heads=2, cuasal=True),
        ValueError,
        "Did you mean 'causal'",
    ),
    "a policy of integers": (
        lambda: MultiHeadAttention(width=8, heads=2, dtype="int8_from_float32"),
        ValueError,
        "no quantised form",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    bad, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        bad()


# --- Caches. --------------------------------------------------------------------------------------

CACHED = {
    "plain": {},
    "rotary": {"positions": "rotary", "head_width": 6, "rotary_pairs": "interleaved"},
    "alibi": {"positions": "alibi"},
    "grouped, windowed": {"kv_heads": 2, "window": 3, "softcap": 2.0, "value_width": 5},
    "normed and gated": {"qk_norm": "rms", "gate": True, "positions": "rotary", "head_width": 4},
}
if BACKEND == "jax":
    CACHED = {name: CACHED[name] for name in ("plain", "normed and gated")}
ROWS, SLOTS = 9, 11


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("cuts", [[4, 1, 1, 3], [6, 0, 3]], ids=str)
def test_steps_give_what_one_call_gives(name: str, cuts: list[int]) -> None:
    case = Case({"width": 12, "heads": 4, "causal": True, **CACHED[name]}, ((B, ROWS, 12),))
    layer, inputs = layer_of(case), inputs_of(case)
    cache, outs, start = layer.make_cache(B, SLOTS), [], 0
    for rows in cuts:
        found = layer(tensor(inputs[0][:, start : start + rows]), cache=cache)
        assert isinstance(found, LayerOutput)
        outs.append(array(found.out))
        cache, start = found.cache, start + rows
    assert array(cache.lengths).tolist() == [ROWS] * B
    assert share(np.concatenate(outs, 1), case, layer.export_weights(), inputs) <= 1


@pytest.mark.parametrize("name", CACHED)
def test_ragged_batches(name: str) -> None:
    """Two sequences of unequal lengths, prefilled together and then continued row by row."""
    case = Case({"width": 12, "heads": 4, "causal": True, **CACHED[name]}, ((B, ROWS, 12),))
    layer, (x,) = layer_of(case), inputs_of(case)
    weights, want = layer.export_weights(), judged(case, layer.export_weights(), [x]).out
    counts = np.array([5, 2], np.int32)
    padded = x[:, :5].copy()
    padded[1, 2:] = np.nan  # padding must reach nobody
    found = layer(tensor(padded), cache=layer.make_cache(B, SLOTS), q_lengths=tensor(counts))
    assert array(found.cache.lengths).tolist() == [5, 2]
    got = {b: [array(found.out)[b, : counts[b]]] for b in range(B)}
    for step in range(4):
        rows = np.stack([x[b, counts[b] + step] for b in range(B)])[:, None]
        found = layer(tensor(rows), cache=found.cache)
        for b in range(B):
            got[b].append(array(found.out)[b])
    for b in range(B):
        rows = np.concatenate(got[b])
        one = Case(case.config, ((1, len(rows), 12),))
        assert share(rows[None], one, weights, [x[b : b + 1, : len(rows)]]) <= 1
        assert np.allclose(rows, want[b, : len(rows)], atol=1e-4)


def test_a_full_cache_is_refused_before_anything_changes() -> None:
    cache = PLAIN(X, cache=PLAIN.make_cache(B, 6), q_lengths=[5, 2]).cache
    held = [array(x).copy() for x in cache]
    with pytest.raises(ValueError, match="Got 2 for row 0 of the batch, in which 5 of 6 slots"):
        PLAIN(X[:, :2], cache=cache)
    assert all(np.array_equal(array(a), b) for a, b in zip(cache, held, strict=True))
    after = PLAIN(X[:, :2], cache=cache, q_lengths=[1, 2]).cache
    assert array(after.lengths).tolist() == [6, 4]


def test_a_full_cache_answers_nan_where_it_is_traced() -> None:
    step = Traced(lambda x, cache: PLAIN(x, cache=cache))
    cache = PLAIN(X, cache=PLAIN.make_cache(B, 6), q_lengths=[5, 2]).cache
    cache = Cache(*[tensor(array(x)) for x in cache])
    found = step(X[:, :2], cache)
    assert np.isnan(array(found.out)[0]).all()
    alone = PLAIN(X[1:, :2], cache=Cache(*[x[1:] for x in cache])).out
    assert np.allclose(array(found.out)[1:], array(alone), rtol=0, atol=1e-6)
    again = step(X[:, :1], found.cache)
    assert np.isnan(array(again.out)[0]).all()
    assert not np.isnan(array(again.out)[1]).any()


def test_a_cache_of_16_bits() -> None:
    layer = MultiHeadAttention(width=12, heads=4, causal=True)
    found = layer(X, cache=layer.make_cache(B, 6, dtype="bfloat16"))
    assert keras.backend.standardize_dtype(found.cache.key.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(found.out.dtype) == "float32"
    assert 0 < abs(array(found.out) - array(layer(X))).max() < 8 * EPS["bfloat16"]


def test_a_memory_is_the_source_projected_once() -> None:
    layer = MultiHeadAttention(width=12, heads=4, key_input=6, positions="rotary", head_width=4)
    source = draw(B, 7, 6)
    lengths = tensor(np.array([7, 3], np.int32))
    memory = layer.memory(source, lengths=lengths)
    want = array(layer(X, source, kv_lengths=lengths, query_offset=1))
    assert np.array_equal(array(layer(X, memory, query_offset=1)), want)
    assert abs(array(layer(X, layer.memory(source), query_offset=1)) - want).max() > 1e-3
    with pytest.raises(ValueError, match="`kv_lengths` must be left out where `key` is a Memory"):
        layer(X, memory, kv_lengths=lengths, query_offset=1)
    with pytest.raises(ValueError, match="`key` must be one of this layer"):
        PLAIN(X, memory._replace(key=memory.key[..., :2]))


# --- What Keras decides. --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["everything", "alibi", "mask of the config"])
def test_from_config(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case, site=3, seed=2), inputs_of(case)
    again = MultiHeadAttention.from_config(layer.get_config())
    assert (again.config, again.site, again.seed) == (layer.config, 3, 2)
    assert again.name == layer.name
    again.load_weights(layer.export_weights())
    assert np.array_equal(array(call(again, case, inputs)), array(call(layer, case, inputs)))


@keras_reads
def test_a_saved_model_comes_back(tmp_path: Any) -> None:
    """The functional API: a graph of KerasTensors, two layers deep, saved and loaded."""
    x, other = keras.Input((None, 12)), keras.Input((7, 6))
    seen = keras.Input((4, None, None), dtype="bool")
    y = MultiHeadAttention(width=12, heads=4, causal=True, positions="rotary", head_width=6)(
        x, mask=seen
    )
    cross = MultiHeadAttention(width=12, heads=2, key_input=6, out_width=5, dtype="mixed_bfloat16")
    z, weights, _ = cross(y, other, return_weights=True)
    assert z.shape == (None, None, 5)
    assert weights.shape == (None, 2, None, 7)
    assert z.dtype == weights.dtype == "bfloat16"
    model = keras.Model([x, other, seen], [z, weights])
    for layer in model.layers:
        if isinstance(layer, MultiHeadAttention):
            layer.load_weights(weights_of(layer.plan))
    mask = np.random.default_rng(3).random((B, 4, 5, 5)) < 0.7
    given = [X, tensor(draw(B, 7, 6)), tensor(mask)]
    want = [array(one) for one in model(given)]
    assert abs(want[0] - array(model([*given[:2], tensor(~mask)])[0])).max() > 1e-2
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    for one, two in zip(want, loaded(given), strict=True):
        assert np.array_equal(one, array(two))


def test_a_graph_of_keras_tensors_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`query` must have shape \(B, T, 12\)"):
        PLAIN(keras.Input((None, 8)))
    with pytest.raises(ValueError, match="`cache` must hold tensors"):
        PLAIN(keras.Input((1, 12)), cache=PLAIN.make_cache(B, 4))


def marked(x: Any, mask: np.ndarray) -> Any:
    """x with a mask of padding on it, as a layer before gives it."""
    found = keras.layers.Masking(mask_value=9.0)(
        ops.where(tensor(mask)[..., None], x, ops.full_like(x, 9.0))
    )
    return found


def test_a_mask_of_padding_is_honoured() -> None:
    """That Keras hands on from layer to layer: rows of padding see nothing and are not seen."""
    layer = MultiHeadAttention(width=12, heads=4, causal=True)
    lengths = np.array([5, 3], np.int32)
    ends = np.arange(5) < lengths[:, None]
    given = marked(X, ends)
    out = layer(given)
    want = array(layer(X, q_lengths=lengths, kv_lengths=lengths))
    assert np.allclose(array(out), want, rtol=0, atol=1e-6)
    assert abs(want - array(layer(X))).max() > 1e-2
    # It is ANDed with a mask of the call, and goes on with the output.
    masked = array(layer(given, mask=masks.window(left=1)))
    near = array(layer(X, mask=masks.window(left=1), q_lengths=lengths, kv_lengths=lengths))
    assert np.allclose(masked, near, rtol=0, atol=1e-6)
    assert np.allclose(array(layer(given, mask=np.ones((5, 5), bool))), want, rtol=0, atol=1e-6)
    assert np.allclose(array(layer(out)), array(layer(out, query_mask=tensor(ends))), atol=1e-6)
    assert abs(array(layer(out)) - array(layer(tensor(array(out))))).max() > 1e-2


def test_masks_of_padding_in_cross_attention() -> None:
    source, holes = draw(B, 7, 12, seed=4), np.random.default_rng(5).random((B, 7)) < 0.6
    want = array(PLAIN(X, source, mask=holes[:, None, None, :]))
    assert np.allclose(array(PLAIN(X, marked(tensor(source), holes))), want, rtol=0, atol=1e-6)
    assert abs(want - array(PLAIN(X, source))).max() > 1e-2
    with pytest.raises(ValueError, match="padding mask of Keras must be left out with a cache"):
        PLAIN(marked(X, np.ones((B, 5), bool)), cache=PLAIN.make_cache(B, 9))


@pytest.mark.parametrize("name", ["self", "rotary", "qk_norm", "gate"])
def test_a_mixed_policy_computes_as_keras_own_layers_do(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case, dtype="mixed_bfloat16"), inputs_of(case)
    assert {v.dtype for v in layer.variables} == {"float32"}
    found = call(layer, case, inputs, return_weights=True)
    assert {keras.backend.standardize_dtype(x.dtype) for x in found[:2]} == {"bfloat16"}
    want = judged(case, layer.export_weights(), inputs)
    gap = abs(array(found.out).astype(np.float32) - want.out).max()
    # Three products, each rounded to bfloat16, lie between.
    assert 0 < gap < 3 * CAP["out"]["bfloat16"] * abs(want.out).max()
    cache = layer.make_cache(B, 3)
    assert keras.backend.standardize_dtype(cache.key.dtype) == "bfloat16"


def test_the_policy_in_force() -> None:
    """The global policy is read where its variables are of the config's dtype; never switched."""
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        assert PLAIN.compute_dtype == "float32"
        layer = MultiHeadAttention(width=8, heads=2)
        assert (layer.variable_dtype, layer.compute_dtype) == ("float32", "bfloat16")
        assert MultiHeadAttention(width=8, heads=2, dtype="float32").compute_dtype == "float32"
        half = MultiHeadAttention(AttentionConfig(8, 2, dtype="float16"))
        assert (half.variable_dtype, half.compute_dtype) == ("float16", "float16")
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy(before)


def test_training_is_handed_on_by_keras() -> None:
    class Around(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MultiHeadAttention(width=12, heads=4, dropout=0.3)

        def call(self, x: Any, seed: Any = None, training: bool = False) -> Any:
            return self.inner(x, seed=seed)

    layer = Around()
    plain = array(layer(X))
    assert np.array_equal(array(layer(X, seed=3)), plain)
    dropped = array(layer(X, seed=3, training=True))
    assert abs(dropped - plain).max() > 1e-3
    with pytest.raises(ValueError, match="`seed` must be given in training"):
        layer(X, training=True)


@keras_reads
def test_trained_by_keras() -> None:
    """`fit`, with the seed of a step from a counter of the model: the loss falls."""

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.attend = MultiHeadAttention(width=12, heads=4, dropout=0.1, causal=True)
            self.steps = Steps()

        def call(self, x: Any, training: bool = False) -> Any:
            seed = self.steps.next() if training else None
            return self.attend(x, seed=seed, training=training)

    model = Model()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    x = draw(16, 5, 12)
    history = model.fit(x, np.tanh(x), epochs=12, batch_size=8, verbose=0)
    model.evaluate(x, np.tanh(x), verbose=0)
    assert int(array(model.steps.count.value)) == 24
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]


FLOAT64 = {"plain": {}, "rotary": {"positions": "rotary", "head_width": 4}}


@pytest.mark.parametrize("name", FLOAT64)
def test_float64_is_honoured_or_refused(name: str) -> None:
    """As a policy: to the last digits, or an error before there is a layer."""
    case = Case({"width": 12, "heads": 4, "causal": True, "dtype": "float64", **FLOAT64[name]})
    (x,) = inputs_of(case)
    if BACKEND == "jax":
        with pytest.raises(ValueError, match='`dtype` must not be "float64" where JAX holds none'):
            layer_of(case)
    if BACKEND == "jax" and name == "rotary":
        with wide(), pytest.raises(ValueError, match="\"float64\" with positions='rotary'"):
            layer_of(case)
        return
    with wide():
        layer = layer_of(case)
        found = array(call(layer, case, [x.astype(np.float64)]))
        want = judged(case, layer.export_weights(), [x]).out
    assert found.dtype == np.float64
    assert abs(found - want).max() <= CAP["out"]["float64"] * abs(want).max()


def test_an_input_of_float64_is_cast_as_the_policy_says() -> None:
    """As every layer of Keras casts: the layer's compute dtype is what it computes in."""
    layer = MultiHeadAttention(width=12, heads=4)
    x = draw(B, 5, 12).astype(np.float64)
    with wide():
        given = tensor(x)
        assert keras.backend.standardize_dtype(given.dtype) == "float64"
        found = array(layer(given))
    assert found.dtype == np.float32
    assert np.array_equal(found, array(layer(tensor(x.astype(np.float32)))))


# --- Traced. --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["everything", "rotary to the end", "a mask array", "dropout"])
def test_traced(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    traced = Traced(lambda *given: call(layer, case, list(given)))
    want = array(call(layer, case, inputs))
    for _ in range(2):
        found = array(traced(*[tensor(x) for x in inputs]))
        assert np.allclose(found, want, rtol=0, atol=1e-6)
    assert traced.traces == 1


def test_a_decoding_loop_is_traced_twice_at_most() -> None:
    """Once for the prompt, once for a step, whatever the lengths."""
    layer = MultiHeadAttention(width=12, heads=2, causal=True, positions="rotary")
    step = Traced(lambda x, cache: layer(x, cache=cache))
    x = tensor(draw(B, 9, 12))
    want, cache, outs = array(layer(x)), layer.make_cache(B, 9), []
    for start, stop in [(0, 3), *[(i, i + 1) for i in range(3, 9)]]:
        found = step(x[:, start:stop], cache)
        cache = found.cache
        outs.append(array(found.out))
    assert step.traces == 2
    assert np.allclose(np.concatenate(outs, 1), want, rtol=0, atol=1e-6)


def test_a_seed_that_changes_is_traced_once_as_a_tensor() -> None:
    layer = layer_of(CASES["dropout"])
    step = Traced(lambda x, seed: layer(x, seed=seed, training=True))
    layer(X)
    outs = []
    for seed in (0, 7, 2**31 - 1, -1):
        outs.append(array(step(X, tensor(np.array(seed, np.int32)))))
        assert np.allclose(outs[-1], array(layer(X, seed=seed, training=True)), atol=1e-6)
    assert step.traces == 1
    assert abs(outs[0] - outs[1]).max() > 1e-3
    for seed in (2**32 - 1, 2**40 + 7, 2**63 - 1):  # every word of a seed is read
        out = array(layer(X, seed=seed, training=True))
        assert min(abs(out - other).max() for other in outs) > 1e-3
        with wide():
            given = tensor(np.array(seed, np.int64))
            assert np.allclose(array(layer(X, seed=given, training=True)), out, atol=1e-6)


@tf_only
@pytest.mark.parametrize("name", ["everything", "rotary", "causal", "a mask array", "lengths"])
def test_unknown_sizes(name: str) -> None:
    """B and T unknown, lengths traced: one trace for every size."""
    import tensorflow as tf

    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    options = tensors(case.call)
    specs = {
        n: tf.TensorSpec([None] * len(x.shape), x.dtype)
        for n, x in options.items()
        if isinstance(x, tf.Tensor)
    }
    fixed = {n: x for n, x in options.items() if n not in specs}
    count = []

    @tf.function(input_signature=[tf.TensorSpec([None, None, 12]), specs])
    def run(x: Any, options: Any) -> Any:
        count.append(1)
        return layer(x, training=case.training, **fixed, **options)

    for rows in (5, 3, 0):
        given = {
            n: x if rows == 5 else x[..., :rows, :rows] if x.ndim == 4 else tf.minimum(x, rows)
            for n, x in options.items()
            if n in specs
        }
        x = tensor(inputs[0][:, :rows])
        want = layer(x, training=case.training, **fixed, **given)
        assert np.allclose(run(x, given), want, rtol=0, atol=1e-6)
    assert len(count) == 1


@tf_only
def test_unknown_sizes_with_a_cache() -> None:
    """Prompt and steps are one trace where neither batch nor rows are known."""
    import tensorflow as tf

    layer = MultiHeadAttention(
        width=12, heads=4, kv_heads=2, causal=True, positions="rotary", head_width=6
    )
    count = []
    kept = [tf.TensorSpec([None, None, 2, 6])] * 2
    cache = Cache(*kept, tf.TensorSpec([None], tf.int32))

    @tf.function(input_signature=[tf.TensorSpec([None, None, 12]), cache])
    def step(x: Any, cache: Any) -> Any:
        count.append(1)
        return layer(x, cache=cache)

    for batch in (B, 1):
        x = tensor(draw(batch, 9, 12))
        held, outs = layer.make_cache(batch, 9), []
        for start, stop in [(0, 4), (4, 4), *[(i, i + 1) for i in range(4, 9)]]:
            found = step(x[:, start:stop], held)
            held = found.cache
            outs.append(found.out)
        assert np.allclose(tf.concat(outs, 1), layer(x), rtol=0, atol=1e-6)
    assert len(count) == 1


@tf_only
def test_gradients_of_a_tf_function() -> None:
    import tensorflow as tf

    case = CASES["everything"]
    layer, (x,) = layer_of(case), inputs_of(case)

    def loss(x: Any) -> Any:
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(call(layer, case, [x]) ** 2)
        return tape.gradient(total, [v.value for v in layer.trainable_variables])

    for one, two in zip(loss(tensor(x)), tf.function(loss)(tensor(x)), strict=True):
        cap = CAP["gradient"]["float32"] * float(tf.reduce_max(abs(one)))
        assert np.allclose(one, two, rtol=0, atol=cap)


@tf_only
def test_saved_model_round_trip(tmp_path: Any) -> None:
    """Any batch and length, lengths and a cache: a SavedModel without a line of ours."""
    import tensorflow as tf

    case = CASES["everything"]
    layer = layer_of(case, impl="reference", dropout=0.0)

    class Module(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        @tf.function(
            input_signature=[tf.TensorSpec([None, None, 12]), tf.TensorSpec([None], tf.int32)]
        )
        def run(self, x: Any, lengths: Any) -> Any:
            return self.layer(x, q_lengths=lengths)

    tf.saved_model.save(Module(), str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    for rows in (5, 9):
        x, lengths = tensor(draw(B, rows, 12)), tf.constant([rows - 1, 2])
        want = layer(x, q_lengths=lengths)
        assert np.allclose(loaded.run(x, lengths), want, rtol=0, atol=1e-6)


@tf_only
def test_exported_by_keras(tmp_path: Any) -> None:
    import tensorflow as tf

    x = keras.Input((None, 12))
    y = MultiHeadAttention(width=12, heads=4, causal=True, impl="reference")(x)
    model = keras.Model(x, y)
    model.export(str(tmp_path / "served"), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    assert np.allclose(loaded.serve(X), model(X), rtol=0, atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="of torch alone")
def test_torch_sees_every_weight() -> None:
    layer = layer_of(CASES["everything"])
    assert len(dict(layer.named_parameters())) >= len(layer.plan)
    held = {id(p) for p in layer.parameters()}
    assert all(id(variable(layer, name).value) in held for name in layer.plan)
