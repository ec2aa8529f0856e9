"""Flax' `dot_product_attention`, for `attention_fn=` of linen and nnx. See docs/COMPAT.md."""

from attn_core.compat.opening import opening

with opening("flax", "flax", "'attn-core[jax]'"):
    from attn_core.backends.jax.compat_flax import dot_product_attention
    from attn_core.backends.jax.compat_flax_weights import from_linen_attention, from_nnx_attention

__all__ = ["dot_product_attention", "from_linen_attention", "from_nnx_attention"]
