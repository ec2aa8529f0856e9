"""attn_core for Keras 3, on whichever backend Keras runs: TensorFlow, JAX or torch.

A room of its own, because Keras is no framework of arrays: its arrays are those of its backend, and
`attn_core.attention` answers for them there. Nothing in this room imports TensorFlow, so that under
KERAS_BACKEND=jax or torch none is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ loads, for editors and type checkers
    from attn_core.backends.keras.additive import AdditiveAttention
    from attn_core.backends.keras.layers import MultiHeadAttention
    from attn_core.backends.keras.models import Transformer
    from attn_core.backends.keras.steps import Steps

__all__ = ["AdditiveAttention", "MultiHeadAttention", "Steps", "Transformer"]


def __getattr__(name: str) -> Any:
    """Layers, which are imported when they are first spoken of."""
    if name == "MultiHeadAttention":
        from attn_core.backends.keras import layers

        return layers.MultiHeadAttention
    if name == "AdditiveAttention":
        from attn_core.backends.keras import additive

        return additive.AdditiveAttention
    if name == "Transformer":
        from attn_core.backends.keras import models

        return models.Transformer
    if name == "Steps":
        from attn_core.backends.keras import steps

        return steps.Steps
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """With the layers that `__getattr__` loads, for completion."""
    return sorted({*globals(), *__all__})


def backend() -> str:
    """What Keras runs on in this process: "tensorflow", "jax" or "torch"."""
    import keras

    return str(keras.backend.backend())
