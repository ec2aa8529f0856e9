"""MultiHeadAttention of JAX against the judge of layers, and in every form JAX has."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from layer_cases import CASES, B, Case, draw, inputs_of, judged, share, slope, weights_of, without

import attn_core
from attn_core import AttentionConfig, masks
from attn_core.backends.jax import AdditiveAttention, MultiHeadAttention, from_numpy, linen
from attn_core.conformance.tolerance import CAP, EPS, JUDGE
from attn_core.model.cache import Cache, LayerOutput
from attn_core.model.initial import initial
from attn_core.model.parameters import parameters
from attn_core.registry import UnsupportedError


def layer_of(case: Case, **options: Any) -> MultiHeadAttention:
    layer = MultiHeadAttention(**{**case.config, **options})
    layer.load_weights(weights_of(layer.plan))
    return moded(layer, case.training)


def moded(layer: Any, training: bool) -> Any:
    (layer.train if training else layer.eval)()
    return layer


def arrays(given: dict[str, Any], dtype: Any = None) -> dict[str, Any]:
    made = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    if dtype is not None and "bias" in made:
        made["bias"] = made["bias"].astype(dtype)
    return made


def call(layer: Any, case: Case, inputs: list[Any], **more: Any) -> Any:
    return layer(*[jnp.asarray(x) for x in inputs], **arrays(case.call), **more)


def one_by_one() -> Any:
    """No compilation: where a test asks many small questions, this is several times faster."""
    return jax.disable_jit()


def counted(layer: Any, **fixed: Any) -> tuple[Any, list[Any]]:
    """(x, options) -> the layer's answer under jax.jit, and a list of the traces it took."""
    definition, state = nnx.split(layer)
    traces: list[Any] = []

    @jax.jit
    def run(state: Any, x: Any, options: dict[str, Any]) -> Any:
        traces.append(x.shape)
        return nnx.merge(definition, state)(x, **options, **fixed)

    return lambda x, **options: run(state, x, options), traces


def flat(state: Any) -> dict[str, Any]:
    """A state's arrays by neutral name."""
    held = nnx.to_pure_dict(state)
    found: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_flatten_with_path(held)[0]:
        found[".".join(str(key.key) for key in path)] = x
    return found


# --- The judge. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    found = call(layer, case, inputs, return_weights=True)
    weights = layer.export_weights()
    assert share(found.out, case, weights, inputs) <= 1
    assert share(found.weights, case, weights, inputs, "weights") <= 1
    assert found.cache is None


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    """Of every weight and input, along one random direction each; and the output, compiled."""
    case = CASES[name]
    with jax.enable_x64(True):
        layer, inputs = layer_of(case, dtype="float64"), inputs_of(case)
        weights, plan, rng = layer.export_weights(), layer.plan, np.random.default_rng(8)
        definition, state = nnx.split(layer)
        options = arrays(case.call, jnp.float64)
        traced = {n: x for n, x in options.items() if isinstance(x, jax.Array)}
        fixed = {n: x for n, x in options.items() if n not in traced}

        def out(state: Any, inputs: Any, traced: Any) -> Any:
            return nnx.merge(definition, state)(*inputs, **traced, **fixed)

        given = [jnp.asarray(x, jnp.float64) for x in inputs]
        shape = jax.eval_shape(out, state, given, traced).shape
        pull = draw(*shape, seed=9).astype(np.float64)

        @jax.jit
        def both(state: Any, inputs: Any, traced: Any) -> Any:
            y, back = jax.vjp(lambda s, x: out(s, x, traced), state, inputs)
            return y, back(jnp.asarray(pull))

        got, (of_state, of_inputs) = both(state, given, traced)
    assert share(got, case, weights, inputs) <= 1
    found: dict[Any, Any] = flat(of_state) | dict(enumerate(of_inputs))
    found = {name: np.asarray(gradient) for name, gradient in found.items()}
    assert set(plan) < set(found)
    for name, gradient in found.items():
        way = rng.standard_normal(gradient.shape)
        want = slope(case, weights, inputs, pull, {name: way})
        # The judge's doubt is that of the suite; a gradient of zero, such as that of the keys'
        # bias where no position is read, is one of sums of the output.
        spread = max(abs(gradient * way).sum(), abs(pull).sum())
        doubt = (JUDGE + CAP["gradient"]["float64"]) * spread
        assert abs((gradient * way).sum() - want) <= doubt, name


def test_a_named_implementation() -> None:
    """The config's impl is the one that runs: only "reference" has forward mode."""
    case, (x,) = CASES["self"], inputs_of(CASES["self"])
    layers = {impl: layer_of(case, impl=impl) for impl in ("chunked", "reference")}
    jax.jvp(layers["reference"], (jnp.asarray(x),), (jnp.ones_like(x),))
    with pytest.raises(UnsupportedError, match='impl="reference"'):
        jax.jvp(layers["chunked"], (jnp.asarray(x),), (jnp.ones_like(x),))


CHANGES = [name for name in CASES if name not in ("self", "cross", "dropout in evaluation")]


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_output(name: str) -> None:
    """Each in turn at its default: an option that is accepted and ignored would stay unseen."""
    case = CASES[name]
    layer, inputs = layer_of(case, impl="reference"), inputs_of(case)
    with one_by_one():
        out = call(layer, case, inputs)
    weights = layer.export_weights()
    shapes = ("kv_heads", "head_width", "value_width", "key_input", "value_input", "out_width")
    for option in case.config:
        if option in ("width", "heads", "dropout", "bias", "out_bias", *shapes):
            continue
        other = without(case, option)
        made = moded(MultiHeadAttention(**other.config, impl="reference"), case.training)
        made.load_weights({n: weights[n] for n in made.plan})
        with one_by_one():
            assert abs(call(made, other, inputs) - out).max() > 1e-3, option
    for option in case.call:
        left = {option: {"seed": 3, "query_offset": 0}.get(option)}
        other = Case(case.config, case.inputs, {**case.call, **left})
        with one_by_one():
            assert abs(call(layer, other, inputs) - out).max() > 1e-3, option


# --- Weights and first values. --------------------------------------------------------------------


def test_names_and_shapes_are_the_plans() -> None:
    layer = MultiHeadAttention(width=8, heads=2, bias=False, gate=True, seed=3)
    held = flat(nnx.state(layer))
    assert {n: x.shape for n, x in held.items()} == {n: p.shape for n, p in layer.plan.items()}
    assert all(isinstance(layer.get_parameter(n), nnx.Param) for n in layer.plan)
    for name, x in initial(layer.plan, 3).items():
        assert np.array_equal(held[name], x)
    assert abs(initial(layer.plan, 4)["query.weight"] - held["query.weight"]).max() > 0.1


def test_export_and_load(tmp_path: Any) -> None:
    case = CASES["everything"]
    layer = layer_of(case)
    held = layer.export_weights()
    assert list(held) == list(parameters(layer.config))
    held["out.bias"][:] = 0  # a copy
    assert abs(layer.out.bias[...]).max() > 0
    attn_core.save_weights(tmp_path / "w", layer)
    other = MultiHeadAttention(**case.config, seed=5)
    other.load_weights(tmp_path / "w")
    inputs = inputs_of(case)
    assert np.array_equal(call(layer, case, inputs), call(other, case, inputs))


def test_a_file_of_no_framework(tmp_path: Any) -> None:
    """What NumPy wrote, as another framework's layer would."""
    case, inputs = CASES["qk_norm"], inputs_of(CASES["qk_norm"])
    config = AttentionConfig(**case.config, backend="torch")
    weights = weights_of(parameters(config), seed=2)
    attn_core.save_weights(tmp_path / "w", weights, config)
    layer = attn_core.build(config, backend="jax")
    layer.load_weights(tmp_path / "w")
    assert share(call(layer, case, inputs), case, weights, inputs) <= 1
    loaded = attn_core.load_weights(tmp_path / "w").weights
    assert all(np.array_equal(x, loaded[n]) for n, x in layer.export_weights().items())


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


def test_a_cast_layer_is_loaded_as_it_is_held() -> None:
    """Somebody has cast it since: nothing is narrowed silently, and it stays as it is cast."""
    layer = MultiHeadAttention(width=8, heads=2)
    held = weights_of(layer.plan)
    nnx.update(layer, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(layer)))
    before = layer.export_weights()
    assert before["out.bias"].dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="must not be wider than the layer's dtype bfloat16"):
        layer.load_weights(held)
    assert all(np.array_equal(x, before[n]) for n, x in layer.export_weights().items())
    layer.load_weights({n: x.astype(jnp.bfloat16) for n, x in held.items()})
    for name, x in layer.export_weights().items():
        assert np.array_equal(x, held[name].astype(jnp.bfloat16))


def test_bfloat16_weights_go_out_and_in(tmp_path: Any) -> None:
    layer = MultiHeadAttention(width=8, heads=2, dtype="bfloat16", seed=4)
    assert layer.query.weight.dtype == jnp.bfloat16
    attn_core.save_weights(tmp_path / "w", layer)
    other = MultiHeadAttention(width=8, heads=2, dtype="bfloat16")
    other.load_weights(tmp_path / "w")
    assert np.array_equal(layer.query.weight[...], other.query.weight[...])


def test_weights_are_loaded_where_they_lie() -> None:
    layer = MultiHeadAttention(width=8, heads=2)
    assert not layer.query.weight[...].committed
    nnx.update(layer, jax.device_put(nnx.state(layer), jax.devices()[0]))
    layer.load_weights(weights_of(layer.plan))
    assert layer.query.weight[...].committed


def test_build() -> None:
    config = AttentionConfig(8, 2, backend="jax")
    layer = attn_core.build(config, seed=3)
    assert isinstance(layer, MultiHeadAttention)
    assert np.array_equal(layer.key.weight, MultiHeadAttention(config, seed=3).key.weight)


# --- Calls that are refused, before anything is computed. -----------------------------------------

PLAIN = MultiHeadAttention(width=12, heads=4)
CAUSAL = MultiHeadAttention(width=12, heads=4, causal=True)
X = jnp.asarray(draw(B, 5, 12))
REFUSED = {
    "a value alone, which Keras takes for the key": (
        lambda: PLAIN(X, value=X),
        ValueError,
        "`key` must be given where `value` is. .* `layer\\(query, source\\)`",
    ),
    "rank": (lambda: PLAIN(X[0]), ValueError, r"`query` must have shape \(B, T, 12\). Got \(5, 12"),
    "width": (lambda: PLAIN(X[..., :8]), ValueError, r"`query` must have shape"),
    "key rows": (lambda: PLAIN(X, X, X[:, :3]), ValueError, "as many rows as `key`"),
    "stock polarity": (
        lambda: CAUSAL(X, mask=jnp.zeros((5, 5))),
        TypeError,
        "`mask` must be boolean, True = attend. Got float32",
    ),
    "positions that are no integers": (
        lambda: MultiHeadAttention(width=12, heads=2, positions="rotary")(X, positions=X[0, :, 0]),
        TypeError,
        "`positions` must be integers. Got float32",
    ),
    "lengths of another batch beside a cache": (
        lambda: PLAIN(X, cache=PLAIN.make_cache(B, 9), q_lengths=[1, 2, 3]),
        ValueError,
        r"`q_lengths` must be an int or have shape \(B,\)",
    ),
    "a site": (
        lambda: MultiHeadAttention(width=8, heads=2, site=0.5),
        TypeError,
        "`site` must be an int. Got 0.5",
    ),
    "a site below 0": (
        lambda: MultiHeadAttention(width=8, heads=2, site=-1),
        ValueError,
        "`site` must be at least 0. Got -1",
    ),
    "a site of additive attention": (
        lambda: AdditiveAttention(width=8, site=-1),
        ValueError,
        "`site` must be at least 0. Got -1",
    ),
    "a site in linen": (
        lambda: linen.MultiHeadAttention(AttentionConfig(12, 4), seed=0, site=-1).init(
            jax.random.key(0), X
        ),
        ValueError,
        "`site` must be at least 0. Got -1",
    ),
    "the output that holds a cache": (
        lambda: PLAIN(X, cache=PLAIN(X, cache=PLAIN.make_cache(B, 9))),
        TypeError,
        "`cache` must be a Cache, .* Got LayerOutput: its `.cache`",
    ),
    "a mask of rank 3": (lambda: CAUSAL(X, mask=X[:, :, :5] > 0), ValueError, "rank 2"),
    "a mask of another size": (
        lambda: CAUSAL(X, mask=X[0, :4, :4] > 0),
        ValueError,
        "must broadcast to",
    ),
    "no seed": (
        lambda: MultiHeadAttention(width=12, heads=4, dropout=0.1)(X),
        ValueError,
        "`seed` must be given in training with dropout",
    ),
    "a float seed": (
        lambda: MultiHeadAttention(width=12, heads=4, dropout=0.1)(X, seed=jnp.float32(1)),
        TypeError,
        "`seed` must be an int",
    ),
    "a key for a seed": (
        lambda: MultiHeadAttention(width=12, heads=4, dropout=0.1)(X, seed=jax.random.key(0)),
        TypeError,
        "`seed` must be an int",
    ),
    "positions": (
        lambda: PLAIN(X, positions=jnp.arange(5)),
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
ROWS, SLOTS = 9, 11


def cached(name: str) -> Case:
    return Case({"width": 12, "heads": 4, "causal": True, **CACHED[name]}, ((B, ROWS, 12),))


@pytest.mark.parametrize("name", ["plain", "normed and gated"])
@pytest.mark.parametrize("cuts", [[4, 1, 1, 3], [6, 0, 3]], ids=str)
def test_steps_give_what_one_call_gives(name: str, cuts: list[int]) -> None:
    case = cached(name)
    layer, inputs = layer_of(case), inputs_of(case)
    cache, outs, start = layer.make_cache(B, SLOTS), [], 0
    for rows in cuts:
        found = layer(jnp.asarray(inputs[0][:, start : start + rows]), cache=cache)
        assert isinstance(found, LayerOutput)
        outs.append(found.out)
        cache, start = found.cache, start + rows
    assert cache.lengths.tolist() == [ROWS] * B
    assert share(np.concatenate(outs, 1), case, layer.export_weights(), inputs) <= 1


@pytest.mark.parametrize("name", CACHED)
def test_ragged_batches_compile_once_for_all_steps(name: str) -> None:
    """Two sequences of unequal lengths, prefilled together and then continued row by row."""
    case = cached(name)
    layer, (x,) = layer_of(case), inputs_of(case)
    weights = layer.export_weights()
    counts = np.array([5, 2])
    padded = x[:, :5].copy()
    padded[1, 2:] = np.nan  # padding must reach nobody
    step, traces = counted(layer)
    found = step(padded, cache=layer.make_cache(B, SLOTS), q_lengths=jnp.asarray(counts))
    assert found.cache.lengths.tolist() == [5, 2]
    got = {b: [found.out[b, : counts[b]]] for b in range(B)}
    for i in range(4):
        rows = np.stack([x[b, counts[b] + i] for b in range(B)])[:, None]
        found = step(rows, cache=found.cache)
        for b in range(B):
            got[b].append(found.out[b])
    assert traces == [(B, 5, 12), (B, 1, 12)]
    for b in range(B):
        rows = np.concatenate(got[b])
        one = Case(case.config, ((1, len(rows), 12),))
        assert share(rows[None], one, weights, [x[b : b + 1, : len(rows)]]) <= 1


def test_scan_over_steps() -> None:
    case = cached("rotary")
    layer, (x,) = layer_of(case), inputs_of(case)
    definition, state = nnx.split(layer)

    @jax.jit
    def decoded(state: Any, cache: Cache, x: Any) -> Any:
        def step(cache: Cache, row: Any) -> Any:
            found = nnx.merge(definition, state)(row[:, None], cache=cache)
            return found.cache, found.out[:, 0]

        return jax.lax.scan(step, cache, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    got = decoded(state, layer.make_cache(B, ROWS), x)
    assert share(got, case, layer.export_weights(), [x]) <= 1


def test_a_full_cache_is_refused_before_anything_changes() -> None:
    cache = PLAIN(X, cache=PLAIN.make_cache(B, 6), q_lengths=[5, 2]).cache
    with pytest.raises(ValueError, match="Got 2 for row 0 of the batch, in which 5 of 6 slots"):
        PLAIN(X[:, :2], cache=cache)
    with pytest.raises(ValueError, match="Got 2 for row 0 of the batch, in which 5 of 6 slots"):
        jax.jit(lambda x: PLAIN(x, cache=cache))(X[:, :2])  # known all the same
    assert PLAIN(X[:, :2], cache=cache, q_lengths=[1, 2]).cache.lengths.tolist() == [6, 4]


def test_a_full_cache_answers_nan_where_it_is_traced() -> None:
    step, _ = counted(PLAIN)
    cache = PLAIN(X, cache=PLAIN.make_cache(B, 6), q_lengths=[5, 2]).cache
    found = step(X[:, :2], cache=cache)
    assert jnp.isnan(found.out[0]).all()
    want = PLAIN(X[1:, :2], cache=Cache(*[x[1:] for x in cache])).out
    assert np.allclose(found.out[1], want[0], rtol=0, atol=1e-6)
    again = step(X[:, :1], cache=found.cache)
    assert jnp.isnan(again.out[0]).all()
    assert not jnp.isnan(again.out[1]).any()


def test_a_cache_of_16_bits() -> None:
    cache = CAUSAL.make_cache(B, 6, dtype="bfloat16")
    found = CAUSAL(X, cache=cache)
    assert found.cache.key.dtype == jnp.bfloat16
    assert found.out.dtype == jnp.float32
    assert 0 < abs(found.out - CAUSAL(X)).max() < 8 * EPS["bfloat16"]


def test_gradients_flow_through_a_cache() -> None:
    with jax.enable_x64(True):
        layer = MultiHeadAttention(width=12, heads=4, causal=True, dtype="float64")
        x = X.astype(jnp.float64)

        def stepped(x: Any) -> Any:
            first = layer(x[:, :3], cache=layer.make_cache(B, 6))
            second = layer(x[:, 3:], cache=first.cache)
            return (first.out**2).sum() + (second.out**2).sum()

        got = jax.jit(jax.grad(stepped))(x)
        want = jax.jit(jax.grad(lambda x: (layer(x) ** 2).sum()))(x)
    assert np.allclose(got, want, rtol=0, atol=1e-12)


def test_a_memory_is_the_source_projected_once() -> None:
    layer = MultiHeadAttention(width=12, heads=4, key_input=6, positions="rotary", head_width=4)
    source, lengths = jnp.asarray(draw(B, 7, 6)), jnp.array([7, 3])
    memory = layer.memory(source, lengths=lengths)
    want = layer(X, source, kv_lengths=lengths, query_offset=1)
    assert np.array_equal(layer(X, memory, query_offset=1), want)
    assert abs(layer(X, layer.memory(source), query_offset=1) - want).max() > 1e-3
    step, traces = counted(layer, query_offset=1)
    for _ in range(2):
        assert np.allclose(step(X, key=memory), want, rtol=0, atol=1e-6)
    assert len(traces) == 1
    with pytest.raises(ValueError, match="`kv_lengths` must be left out where `key` is a Memory"):
        layer(X, memory, kv_lengths=lengths, query_offset=1)
    with pytest.raises(ValueError, match="`key` must be one of this layer"):
        PLAIN(X, memory._replace(key=memory.key[..., :2]))


# --- Every form of JAX. ---------------------------------------------------------------------------


def test_a_seed_that_changes_compiles_once() -> None:
    layer = layer_of(CASES["dropout"])
    step, traces = counted(layer)
    x = jnp.asarray(inputs_of(CASES["dropout"])[0])
    outs = []
    for seed in (0, 7, 2**32 - 1):
        outs.append(step(x, seed=jnp.asarray(seed, jnp.uint32)))
        assert np.allclose(outs[-1], layer(x, seed=seed), rtol=0, atol=1e-6)
    assert len(traces) == 1
    assert abs(outs[0] - outs[1]).max() > 1e-2
    # An array's number is read whole, sign and all.
    whole = layer(x, seed=-1)
    assert abs(whole - outs[2]).max() > 1e-2
    assert np.allclose(step(x, seed=jnp.int32(-1)), whole, rtol=0, atol=1e-6)
    for seed in (-1, 2**40 + 7):
        with jax.enable_x64(True):
            wide = layer(x, seed=jnp.asarray(seed))
        assert np.allclose(wide, layer(x, seed=seed), rtol=0, atol=1e-6)
    assert abs(wide - outs[1]).max() > 1e-2  # not that of seed 7


def test_sites_drop_apart() -> None:
    """Entries are those that the judge's Philox keeps under the key (seed, site)."""
    case = CASES["dropout"]
    layer, inputs = layer_of(case), inputs_of(case)
    other = MultiHeadAttention(**case.config, site=3)
    other.load_weights(layer.export_weights())
    out = call(other, case, inputs)
    want = judged(case, layer.export_weights(), inputs, site=3).out
    assert np.allclose(out, want, rtol=0, atol=1e-5)
    assert abs(out - call(layer, case, inputs)).max() > 1e-2


def test_training_and_evaluation() -> None:
    layer = MultiHeadAttention(width=12, heads=4, dropout=0.5)
    dropped = layer(X, seed=0)
    layer.eval()
    assert layer.deterministic
    plain = layer(X)
    assert abs(plain - dropped).max() > 1e-2
    layer.train()
    assert np.array_equal(layer(X, seed=0), dropped)


def test_nnx_transforms() -> None:
    """Two layers of one config share a trace, and nnx.grad gives what jax.grad gives."""
    layer, other = [MultiHeadAttention(width=12, heads=4, dropout=0.2, seed=n) for n in (0, 1)]
    traces = []

    @nnx.jit
    def loss(layer: Any, x: Any, seed: Any) -> Any:
        traces.append(x.shape)
        return (layer(x, seed=seed) ** 2).sum()

    assert loss(layer, X, 3) != loss(other, X, 3)
    assert loss(layer, X, 3) != loss(layer, X, 4)
    assert len(traces) == 1
    found = flat(nnx.grad(loss)(layer, X, 3))
    definition, state = nnx.split(layer)
    want = flat(jax.grad(lambda state: loss(nnx.merge(definition, state), X, 3))(state))
    assert list(found) == list(want)
    assert all(np.allclose(found[n], want[n], rtol=0, atol=1e-6) for n in want)
    assert abs(found["query.weight"]).max() > 1e-3


def test_a_step_of_training_in_place() -> None:
    layer = MultiHeadAttention(width=12, heads=4)

    @nnx.jit
    def step(layer: Any, x: Any) -> Any:
        value, slopes = nnx.value_and_grad(lambda layer: (layer(x) ** 2).mean())(layer)
        state = nnx.state(layer)
        nnx.update(layer, jax.tree.map(lambda w, g: w - 0.5 * g, state, slopes))
        return value

    values = [float(step(layer, X)) for _ in range(4)]
    assert values[3] < 0.8 * values[0]
    assert values == sorted(values, reverse=True)


def test_vmap_and_forward_mode() -> None:
    layer = MultiHeadAttention(width=12, heads=4, impl="reference", causal=True)
    definition, state = nnx.split(layer)

    def loss(state: Any, x: Any) -> Any:
        return (nnx.merge(definition, state)(x) ** 2).sum()

    one = flat(jax.grad(loss)(state, X[:1]))
    each = flat(jax.vmap(jax.grad(loss), in_axes=(None, 0))(state, X[:, None]))
    for name, gradient in one.items():
        assert np.allclose(each[name][0], gradient, atol=1e-5)
        assert name == "key.bias" or not np.allclose(each[name][1], gradient, atol=1e-2)
    _, tangent = jax.jvp(layer, (X,), (jnp.ones_like(X),))
    step = 2.0**-8
    near = (layer(X + step) - layer(X - step)) / (2 * step)
    assert np.allclose(tangent, near, atol=1e-3)


def test_vmap_over_caches_and_seeds() -> None:
    """Lengths that a transform hides are traced ones."""
    layer = MultiHeadAttention(width=12, heads=4, causal=True, dropout=0.3)
    cache = layer(X[:, :3], cache=layer.make_cache(B, 6), seed=0).cache
    split = Cache(*[x[:, None] for x in cache])
    f = jax.jit(jax.vmap(lambda x, c, seed: layer(x, cache=c, seed=seed).out))
    got = f(X[:, None, 3:], split, jnp.array([5, 6]))
    for b, seed in enumerate((5, 6)):
        want = layer(X[b : b + 1, 3:], cache=Cache(*[x[b] for x in split]), seed=seed).out
        assert np.allclose(got[b], want, atol=1e-6)


def test_checkpoint() -> None:
    case = CASES["everything"]
    layer, inputs = layer_of(case), inputs_of(case)
    definition, state = nnx.split(layer)

    def loss(state: Any, x: Any) -> Any:
        return (nnx.merge(definition, state)(x, seed=7) ** 2).sum()

    x = jnp.asarray(inputs[0])
    want = flat(jax.jit(jax.grad(loss))(state, x))
    got = flat(jax.jit(jax.grad(jax.checkpoint(loss)))(state, x))
    for name, gradient in want.items():
        assert np.allclose(got[name], gradient, rtol=0, atol=1e-5 * abs(gradient).max())


@pytest.mark.parametrize("name", ["everything", "alibi", "a mask array"])
def test_copies(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    want = call(layer, case, inputs)
    for other in (copy.deepcopy(layer), nnx.clone(layer), nnx.merge(*nnx.split(layer))):
        assert np.array_equal(call(other, case, inputs), want)


@pytest.mark.parametrize(("inner", "outer"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtypes_promote_as_those_of_flax(inner: str, outer: str) -> None:
    layer = MultiHeadAttention(width=12, heads=4, qk_norm="rms", gate=True, dtype=inner)
    theirs = nnx.Linear(12, 12, param_dtype=inner, rngs=nnx.Rngs(0))
    assert layer(X.astype(outer)).dtype == theirs(X.astype(outer)).dtype == jnp.float32


@pytest.mark.parametrize("name", ["self", "rotary", "qk_norm", "gate"])
def test_half_precision(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    narrow = MultiHeadAttention(**{**case.config, "dtype": "bfloat16"})
    narrow.load_weights({n: x.astype(jnp.bfloat16) for n, x in layer.export_weights().items()})
    found = call(narrow, case, [x.astype(jnp.bfloat16) for x in inputs], return_weights=True)
    assert found.out.dtype == found.weights.dtype == jnp.bfloat16
    want = judged(case, layer.export_weights(), inputs)
    # Inputs, weights and three products, each rounded to bfloat16, lie between.
    assert abs(np.float32(found.out) - want.out).max() > 0
    assert (
        abs(np.float32(found.out) - want.out).max()
        < 3 * CAP["out"]["bfloat16"] * abs(want.out).max()
    )


def test_float64_takes_no_setting() -> None:
    case = CASES["rotary interleaved"]
    layer, inputs = layer_of(case, dtype="float64"), inputs_of(case)
    assert layer.query.weight.dtype == layer.make_cache(1, 1).key.dtype == jnp.float64
    want = judged(case, layer.export_weights(), inputs).out
    found = layer(from_numpy(inputs[0].astype(np.float64)), **arrays(case.call))
    assert found.dtype == jnp.float64
    assert abs(np.asarray(found) - want).max() <= CAP["out"]["float64"] * abs(want).max()
    assert not jax.config.jax_enable_x64


def test_export_round_trip() -> None:
    """Rows of any number, in a file."""
    layer = layer_of(CASES["everything"], impl="reference")
    layer.eval()
    definition, state = nnx.split(layer)
    weights, tree = jax.tree.flatten(state)

    def run(weights: Any, x: Any, lengths: Any) -> Any:
        return nnx.merge(definition, tree.unflatten(weights))(x, q_lengths=lengths)

    rows = export.symbolic_shape("rows")[0]
    given = (
        [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights],
        jax.ShapeDtypeStruct((B, rows, 12), jnp.float32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    )
    loaded = export.deserialize(export.export(jax.jit(run))(*given).serialize())
    for rows in (5, 9):
        x, lengths = jnp.asarray(draw(B, rows, 12)), jnp.array([rows - 1, 2])
        assert np.allclose(loaded.call(weights, x, lengths), layer(x, q_lengths=lengths), atol=1e-6)


def test_a_mask_of_a_call_crosses_jit() -> None:
    step, traces = counted(CAUSAL)
    for ids in ([0, 0, 1, 1, 1], [0, 1, 1, 1, 2]):
        m = masks.segments(jnp.array(ids))
        assert np.allclose(step(X, mask=m), CAUSAL(X, mask=m), atol=1e-6)
    assert len(traces) == 1
