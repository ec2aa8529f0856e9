"""`keras.ops.dot_product_attention`, computed here. See docs/COMPAT.md."""

from attn_core.compat.opening import opening

with opening("keras", "keras", "keras"):
    from attn_core.backends.keras.compat import dot_product_attention
    from attn_core.backends.keras.compat_weights import (
        from_group_query_attention,
        from_multi_head_attention,
    )

__all__ = ["dot_product_attention", "from_group_query_attention", "from_multi_head_attention"]
