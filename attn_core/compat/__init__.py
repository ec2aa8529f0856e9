"""Drop-ins: other libraries' attention functions, with their signatures and their conventions.

    from attn_core.compat.torch import scaled_dot_product_attention
    from attn_core.compat.jax import dot_product_attention
    from attn_core.compat.keras import dot_product_attention
    from attn_core.compat.flax import dot_product_attention      # attention_fn= of linen and nnx
    from attn_core.compat.transformers import register           # attn_implementation="attn_core"

One import line changes, the rest of a program stays. A drop-in takes what the original takes, in
its polarity, alignment, layout and dtypes, and computes it by `attn_core.attention`; what cannot be
honoured is refused. `docs/COMPAT.md` says what each keeps and where it differs.

For calls to `attn_core.attention` itself, the functions of `conventions.py` translate other
libraries' masks and windows, each named after the library that it comes from; `from_transformers`
of `models.py` translates whole models.

Importing this package imports no framework; each of the five doors imports its own.
"""

from __future__ import annotations

from typing import Any

from attn_core.compat.conventions import (
    from_flash_window,
    from_hf_mask,
    from_hf_window,
    from_jax_window,
    from_keras_mask,
    from_torch_mha_mask,
    from_transformer_engine_mask,
)
from attn_core.compat.models import from_transformers

__all__ = [
    "from_flash_window",
    "from_hf_mask",
    "from_hf_window",
    "from_jax_window",
    "from_keras_mask",
    "from_torch_mha_mask",
    "from_transformer_engine_mask",
    "from_transformers",
]

DOORS = ("torch", "jax", "keras", "flax", "transformers")


def __getattr__(name: str) -> Any:
    """A door is opened when it is first spoken of: `attn_core.compat.torch`."""
    if name == "torch":
        import attn_core.compat.torch as torch_door

        return torch_door
    if name == "jax":
        import attn_core.compat.jax as jax_door

        return jax_door
    if name == "keras":
        import attn_core.compat.keras as keras_door

        return keras_door
    if name == "flax":
        import attn_core.compat.flax as flax_door

        return flax_door
    if name == "transformers":
        import attn_core.compat.transformers as transformers_door

        return transformers_door
    raise AttributeError(f"attn_core.compat has {', '.join((*DOORS, *__all__))}. Got {name!r}.")


def __dir__() -> list[str]:
    """What is public, for completion: the doors too."""
    return sorted([*__all__, *DOORS])
