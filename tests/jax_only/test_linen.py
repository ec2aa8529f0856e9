"""flax.linen modules: what the nnx modules of the same weights give, in linen's forms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import layer_cases
import model_cases
import numpy as np
import pytest
from flax import linen as flax_linen
from flax import nnx
from layer_cases import B, draw, weights_of

from attn_core import AdditiveConfig, AttentionConfig, TransformerConfig
from attn_core.backends.jax import AdditiveAttention, MultiHeadAttention, Transformer, linen
from attn_core.model.initial import initial
from attn_core.model.parameters import parameters

X = jnp.asarray(draw(B, 5, 12))


def arrays(given: list[np.ndarray]) -> list[Any]:
    return [jnp.asarray(x) for x in given]


def told(case: Any) -> dict[str, Any]:
    """The options of a case's call."""
    return {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in case.call.items()}


# --- A layer. -------------------------------------------------------------------------------------


def test_a_layer_is_nnxs() -> None:
    case = layer_cases.CASES["everything"]
    layer, inputs = MultiHeadAttention(**case.config), arrays(layer_cases.inputs_of(case))
    layer.load_weights(weights_of(layer.plan))
    module = linen.MultiHeadAttention(AttentionConfig(**case.config))
    variables = module.load_weights(layer.export_weights())
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer)))
    assert jax.tree.map(jnp.shape, variables) == {"params": shapes}
    options = told(case)
    found = module.apply(variables, *inputs, **options, deterministic=False)
    assert np.array_equal(found, layer(*inputs, **options))
    layer.eval()
    found = module.clone(deterministic=True).apply(variables, *inputs, **options)
    assert np.array_equal(found, layer(*inputs, **options))
    with pytest.raises(ValueError, match="deterministic"):
        module.apply(variables, *inputs, **options)
    for name, x in module.export_weights(variables).items():
        assert np.array_equal(x, layer.export_weights()[name])


def test_first_values() -> None:
    module = linen.MultiHeadAttention({"width": 12, "heads": 4, "qk_norm": "rms"}, seed=2)
    plan = parameters(module.settings)
    for name, x in module.export_weights(jax.jit(module.init)(jax.random.key(0), X)).items():
        assert np.array_equal(x, initial(plan, 2)[name])
    drawn = module.clone(seed=None)
    one, two = [drawn.export_weights(drawn.init(jax.random.key(k), X)) for k in (0, 1)]
    reach = (6 / 24) ** 0.5
    for name, (shape, kind) in plan.items():
        assert one[name].shape == shape
        if kind == "matrix":
            assert not np.array_equal(one[name], two[name])
            assert 0.8 * reach < abs(one[name]).max() <= reach
        else:
            assert (one[name] == (kind == "scale")).all()
    assert not np.array_equal(one["key.weight"], one["value.weight"])


def test_additive_attention_is_nnxs() -> None:
    layer = AdditiveAttention(width=9, query_input=12, key_input=6, dropout=0.3, site=2)
    layer.load_weights(weights_of(layer.plan))
    module = linen.AdditiveAttention(AdditiveConfig(9, 12, 6, dropout=0.3), site=2)
    variables = module.load_weights(layer.export_weights())
    assert set(variables["params"]) == {"query", "key", "bias", "score"}
    for name, x in module.export_weights(variables).items():
        assert np.array_equal(x, layer.export_weights()[name])
    given, told = (X, jnp.asarray(draw(B, 7, 6))), {"kv_lengths": jnp.asarray([7, 3])}
    found = module.apply(variables, *given, **told, seed=4, deterministic=False)
    assert np.array_equal(found, layer(*given, **told, seed=4))
    layer.eval()
    plain = module.apply(variables, *given, **told, deterministic=True, return_weights=True)
    assert np.array_equal(plain.out, layer(*given, **told))
    assert plain.weights.shape == (B, 1, 5, 7)
    assert abs(plain.out - found).max() > 1e-3
    with pytest.raises(ValueError, match="deterministic"):
        module.apply(variables, *given)
    slopes = jax.grad(lambda v: (module.apply(v, *given, deterministic=True) ** 2).sum())(variables)
    assert abs(slopes["params"]["score"]).max() > 1e-3


def test_first_values_of_additive_attention() -> None:
    module = linen.AdditiveAttention({"width": 12}, seed=3, deterministic=True)
    made = module.export_weights(module.init(jax.random.key(0), X, X))
    for name, x in initial(parameters(module.settings), 3).items():
        assert np.array_equal(made[name], x)
    drawn = module.clone(seed=None)
    made = drawn.export_weights(drawn.init(jax.random.key(0), X, X))
    assert not made["bias"].any()
    assert 0.5 * (6 / 13) ** 0.5 < abs(made["score"]).max() <= (6 / 13) ** 0.5


def test_a_layer_within_a_module() -> None:
    """Nested in another module, with a cache, under jit and grad."""

    class Model(flax_linen.Module):
        @flax_linen.compact
        def __call__(self, x: Any, cache: Any = None) -> Any:
            layer = linen.MultiHeadAttention(AttentionConfig(12, 4, causal=True), name="attend")
            if cache is None:
                return layer(x)
            return layer(x, cache=cache)

    variables = Model().init(jax.random.key(1), X)
    assert set(variables["params"]["attend"]) == {"query", "key", "value", "out"}
    whole = Model().apply(variables, X)
    cache = linen.MultiHeadAttention(AttentionConfig(12, 4)).make_cache(B, 6)
    found = jax.jit(Model().apply)(variables, X[:, :3], cache)
    later = jax.jit(Model().apply)(variables, X[:, 3:], found.cache)
    assert np.allclose(jnp.concatenate([found.out, later.out], 1), whole, atol=1e-6)
    slopes = jax.grad(lambda v: (Model().apply(v, X) ** 2).sum())(variables)
    assert abs(slopes["params"]["attend"]["key"]["weight"]).max() > 1e-3
    module = linen.MultiHeadAttention(AttentionConfig(12, 4))
    held = {"params": variables["params"]["attend"]}
    memory = module.apply(held, X, method="memory")
    assert np.allclose(module.apply(held, X, memory), module.apply(held, X, X), atol=1e-6)


# --- Models. --------------------------------------------------------------------------------------


def both(name: str, **changes: Any) -> tuple[Transformer, linen.Transformer, Any, list[Any]]:
    """The nnx model of a case, in evaluation, and linen's with the same weights; inputs."""
    case = model_cases.CASES[name]
    model = Transformer(case.config, **changes)
    model.load_weights(weights_of(model.plan))
    model.eval()
    module = linen.Transformer({**case.config, **changes})
    variables = module.load_weights(model.export_weights())
    return model, module, variables, arrays(model_cases.inputs_of(case))


@pytest.mark.parametrize("name", ["everything", "as Gemma", "as BERT", "vectors to tokens"])
def test_a_model_is_nnxs(name: str) -> None:
    """Compiled, as models are; the params lie in the tree of the nnx module's state."""
    model, module, variables, inputs = both(name)
    options = {n: x for n, x in told(model_cases.CASES[name]).items() if n != "seed"}
    definition, state = nnx.split(model)
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    words = {str(n): x for n, x in shapes.items()}
    assert jax.tree.map(jnp.shape, variables) == {"params": words}
    run = jax.jit(lambda state, *given: nnx.merge(definition, state)(*given, **options))
    found = jax.jit(
        lambda variables, *given: module.apply(variables, *given, deterministic=True, **options)
    )(variables, *inputs)
    assert np.array_equal(found, run(state, *inputs))
    for n, x in module.export_weights(variables).items():
        assert np.array_equal(x, model.export_weights()[n])


def test_a_model_drops_by_its_seed() -> None:
    """What the nnx model drops at that seed, and another choice at another; one trace for all."""
    model, module, variables, inputs = both("dropout", depth=1)
    definition, state = nnx.split(nnx.clone(model))
    traces = []

    @jax.jit
    def step(variables: Any, seed: Any) -> Any:
        traces.append(seed)
        return module.apply(variables, *inputs, seed=seed, deterministic=False)

    @jax.jit
    def wanted(state: Any, seed: Any) -> Any:
        made = nnx.merge(definition, state)
        made.train()
        return made(*inputs, seed=seed)

    one, two = step(variables, jnp.int32(1)), step(variables, jnp.int32(2))
    assert np.array_equal(one, wanted(state, jnp.int32(1)))
    assert np.array_equal(one, step(variables, jnp.int32(1)))
    assert abs(one - two).max() > 1e-3
    assert len(traces) == 1
    still = jax.jit(module.clone(deterministic=True).apply)
    assert abs(still(variables, *inputs) - one).max() > 1e-3
    with pytest.raises(ValueError, match="deterministic"):
        module.apply(variables, *inputs)
    with pytest.raises(ValueError, match="`seed` must be given in training"):
        module.apply(variables, *inputs, deterministic=False)
    _, module, variables, inputs = both("dropout of weights alone", depth=1)
    with pytest.raises(ValueError, match="deterministic"):
        module.apply(variables, *inputs)


def test_a_models_first_values_and_gradients() -> None:
    case = model_cases.CASES["learned"]
    module = linen.Transformer({**case.config, "depth": 1}, seed=2)
    (given,) = arrays(model_cases.inputs_of(case))
    plan = parameters(module.settings)
    variables = jax.jit(module.init)(jax.random.key(0), given)
    for name, x in module.export_weights(variables).items():
        assert np.array_equal(x, initial(plan, 2)[name])
    drawn = module.clone(seed=None)
    one, two = [drawn.export_weights(drawn.init(jax.random.key(k), given)) for k in (0, 1)]
    for name, (shape, kind) in plan.items():
        assert one[name].shape == shape
        assert np.array_equal(one[name], two[name]) == (kind in ("bias", "scale"))
    run = jax.jit(jax.grad(lambda v: (module.apply(v, given) ** 2).sum()))
    slopes = module.export_weights(run(variables))
    assert [name for name in plan if abs(slopes[name]).max() == 0] == []


def test_a_model_steps_and_generates() -> None:
    """With a cache, ragged; a decoder's cache takes no params, that of a source does."""
    model, module, variables, (given, source) = both("encoder-decoder", depth=1)
    definition, state = nnx.split(model)
    whole = jax.jit(lambda state, *read: nnx.merge(definition, state)(*read))(state, given, source)
    cache = module.apply(variables, B, 6, source=source, method="make_cache")
    run = jax.jit(lambda variables, *given, **more: module.apply(variables, *given, **more))
    counts = np.array([3, 1])
    found = run(variables, given[:, :3], lengths=jnp.asarray(counts), cache=cache)
    for b in range(B):
        assert np.allclose(found.out[b, : counts[b]], whole[b, : counts[b]], atol=2e-5)
    later = run(variables, given[np.arange(B), counts][:, None], cache=found.cache)
    assert np.allclose(later.out[:, 0], whole[np.arange(B), counts], atol=2e-5)
    made = module.apply(variables, given[:, :3], 4, source=source, method="generate")
    assert np.array_equal(made, model.generate(given[:, :3], 4, source=source))
    with pytest.raises(ValueError, match="one of `source` and a cache"):
        module.make_cache(B, 6)
    alone = linen.Transformer(model_cases.DECODER)
    assert [block.key.shape[1] for block in alone.make_cache(B, 6).blocks] == [6, 6]


def test_files_are_the_models(tmp_path: Any) -> None:
    import attn_core

    model, module, variables, _ = both("classes")
    attn_core.save_weights(tmp_path / "w", model)
    loaded = module.load_weights(tmp_path / "w")
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, variables))
    other = linen.Transformer(TransformerConfig.of(module.settings, window=3))
    with pytest.raises(ValueError, match="Got another's, which differs"):
        other.load_weights(tmp_path / "w")
