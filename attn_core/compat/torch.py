"""`torch.nn.functional.scaled_dot_product_attention`, computed here. See docs/COMPAT.md."""

from attn_core.compat.opening import opening

with opening("torch", "torch", "'attn-core[torch]'"):
    from attn_core.backends.torch.compat import scaled_dot_product_attention
    from attn_core.backends.torch.compat_weights import from_multihead_attention

__all__ = ["from_multihead_attention", "scaled_dot_product_attention"]
