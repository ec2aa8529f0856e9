"""Attention for transformers, to register with it; its weights in ours. See docs/COMPAT.md."""

from attn_core.compat.opening import opening

with opening("transformers", "transformers", "'attn-core[torch,peers]'"):
    from attn_core.backends.torch.compat_transformers import attention_forward, register
    from attn_core.backends.torch.compat_transformers_masks import attention_mask
    from attn_core.backends.torch.compat_weights import from_attention, from_model

__all__ = ["attention_forward", "attention_mask", "from_attention", "from_model", "register"]
