"""Weights of Flax' layers, in the plain float64 layer."""

from __future__ import annotations

import functools

import compat_layers as layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from attn_core.compat.flax import (
    dot_product_attention,
    from_linen_attention,
    from_nnx_attention,
)

X, Y, Z = layers.draw(0, 2, 5, 12), layers.draw(1, 2, 7, 10), layers.draw(2, 2, 7, 6)
RAGGED = np.array([7, 4])
SEEN = (np.arange(7) < RAGGED[:, None])[:, None, None, :]
LINEN = {
    "plain": {},
    "other widths": {"qkv_features": 16, "out_features": 10},
    "no bias": {"use_bias": False},
}


def redrawn(params: dict) -> dict:
    """Biases start at 0, where none of them could be lost."""
    leaves, tree = jax.tree_util.tree_flatten(params)
    drawn = [jnp.asarray(layers.draw(n, *x.shape) * 0.4) for n, x in enumerate(leaves)]
    return jax.tree_util.tree_unflatten(tree, drawn)


@pytest.mark.parametrize("options", LINEN.values(), ids=LINEN)
def test_linen(options, tmp_path):
    module = linen.MultiHeadDotProductAttention(4, dropout_rate=0.25, deterministic=True, **options)
    variables = redrawn(module.init(jax.random.key(0), X, Y, Z))
    found = from_linen_attention(module, variables)
    assert found.config.dropout == 0.25
    its = module.apply(variables, X, Y, Z, mask=SEEN)
    shares = layers.used(found, {"its": its}, X, Y, Z, kv_lengths=RAGGED)
    assert layers.within(shares), shares
    layers.written(found, tmp_path / "x.safetensors")
    assert from_linen_attention(module, variables["params"]).config == found.config


def test_linen_causal():
    module = linen.MultiHeadDotProductAttention(4)
    variables = redrawn(module.init(jax.random.key(0), X))
    its = module.apply(variables, X, mask=linen.make_causal_mask(X[..., 0]))
    found = from_linen_attention(module, variables, causal=True)
    assert layers.within(layers.used(found, {"its": its}, X))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("options", [{}, {"use_bias": False, "out_features": 10}])
def test_nnx(kv_heads, options):
    module = nnx.MultiHeadAttention(
        *(4, 12, 16),
        num_kv_heads=kv_heads,
        in_kv_features=10,
        decode=False,
        rngs=nnx.Rngs(0),
        **options,
    )
    nnx.update(module, redrawn(nnx.state(module, nnx.Param)))
    found = from_nnx_attention(module)
    assert found.config.sizes.kv_heads == kv_heads
    its = module(X, Y, mask=SEEN)
    shares = layers.used(found, {"its": its}, X, Y, kv_lengths=RAGGED)
    assert layers.within(shares), shares
    its = module(X, Y, mask=np.tri(X.shape[1], Y.shape[1], dtype=bool)[None, None])
    causal = from_nnx_attention(module, causal=True)
    assert layers.within(layers.used(causal, {"its": its}, X, Y))


def test_what_no_config_says_is_refused():
    module = nnx.MultiHeadAttention(4, 12, decode=False, normalize_qk=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"`normalize_qk` of flax\.nnx' layer must be left out"):
        from_nnx_attention(module)
    module = linen.MultiHeadDotProductAttention(4, normalize_qk=True)
    variables = module.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"`normalize_qk` of flax\.linen's layer"):
        from_linen_attention(module, variables)
    module = linen.MultiHeadDotProductAttention(4, qk_attn_weights_einsum_cls=lambda: jnp.einsum)
    with pytest.raises(ValueError, match=r"`qk_attn_weights_einsum_cls` of flax\.linen's layer"):
        from_linen_attention(module, {})
    plain = linen.MultiHeadDotProductAttention(4)
    with pytest.raises(ValueError, match="`params` must hold 'query'"):
        from_linen_attention(plain, {"dense": {}})
    with pytest.raises(TypeError, match=r"`module` must be a flax\.nnx\.MultiHeadAttention"):
        from_nnx_attention(plain)
    with pytest.raises(TypeError, match=r"must be a flax\.linen\.MultiHeadDotProductAttention"):
        from_linen_attention(linen.Dense(3), {})


def tripled(query, key, value, **options):
    return nnx.dot_product_attention(3 * query, key, value)


@pytest.mark.parametrize("attend", [tripled, functools.partial(nnx.dot_product_attention)])
def test_an_attention_function_that_no_config_says_is_refused(attend):
    nnx_layer = nnx.MultiHeadAttention(
        *(4, 12), decode=False, attention_fn=attend, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"`attention_fn` of flax\.nnx' layer must be left out"):
        from_nnx_attention(nnx_layer)
    linen_layer = linen.MultiHeadDotProductAttention(4, attention_fn=attend)
    variables = linen.MultiHeadDotProductAttention(4).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"`attention_fn` of flax\.linen's layer must be left"):
        from_linen_attention(linen_layer, variables)


def test_our_attention_function_is_flax_own():
    ours = {"attention_fn": dot_product_attention}
    module = nnx.MultiHeadAttention(4, 12, decode=False, rngs=nnx.Rngs(0), **ours)
    assert layers.within(layers.used(from_nnx_attention(module), {"its": module(X)}, X))
    module = linen.MultiHeadDotProductAttention(4, **ours)
    variables = redrawn(module.init(jax.random.key(0), X))
    found = from_linen_attention(module, variables)
    assert layers.within(layers.used(found, {"its": module.apply(variables, X)}, X))


def test_a_subclass_is_refused():
    class Linen(linen.MultiHeadDotProductAttention):
        pass

    class Module(nnx.MultiHeadAttention):
        pass

    with pytest.raises(TypeError, match=r"and no subclass of it, .* Got Module"):
        from_nnx_attention(Module(4, 12, decode=False, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"and no subclass of it, .* Got Linen"):
        from_linen_attention(Linen(4), Linen(4).init(jax.random.key(0), X))
    named = linen.MultiHeadAttention(4)  # Flax' own other name
    assert from_linen_attention(named, named.init(jax.random.key(0), X)).config.heads == 4


def test_changes_may_not_gainsay_a_layer():
    """heads=2 would cut the same matrices into other heads."""
    module = linen.MultiHeadDotProductAttention(4)
    variables = module.init(jax.random.key(0), X)
    assert from_linen_attention(module, variables, heads=4, causal=True).config.causal
    for change in ({"heads": 2}, {"scale": 1.0}, {"bias": False}):
        with pytest.raises(ValueError, match=f"what the original computes.*{next(iter(change))}: "):
            from_linen_attention(module, variables, **change)
