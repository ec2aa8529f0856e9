"""attn_core for Keras 3, on whichever backend Keras runs: TensorFlow, JAX or torch.

A room of its own, because Keras is no framework of arrays: its arrays are those of its backend, and
`attn_core.attention` answers for them there. Nothing in this room imports TensorFlow, so that under
KERAS_BACKEND=jax or torch none is loaded.
"""

from __future__ import annotations
