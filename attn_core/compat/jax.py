"""`jax.nn.dot_product_attention`, computed here. See docs/COMPAT.md."""

from attn_core.compat.opening import opening

with opening("jax", "jax", "'attn-core[jax]'"):
    from attn_core.backends.jax.compat import dot_product_attention

__all__ = ["dot_product_attention"]
