"""The documents' `scaled_dot_product_attention`, with any leading dimensions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from attn_core.api import attention
from attn_core.backends.tf.arrays import sizes
from attn_core.check_arrays import documents_mask
from attn_core.language.values import Dropout


def scaled_dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any | None = None,
    dropout_rate: float = 0.0,
    *,
    scale: float | None = None,
    seed: Any | None = None,
) -> Any:
    """softmax(scale * q kᵀ + mask) v, over any leading dimensions.

        q (..., Tq, D), k (..., Tk, D), v (..., Tk, Dv) -> (..., Tq, Dv)

    The documents define scaled attention as dividing by √D, and their listing leaves the division
    out. The default follows the definition; `scale=1.0` is the listing.

    Args:
        q, k, v: tensors of one dtype with equal leading dimensions, which a tf.function need not
            know; NumPy's arrays come back as NumPy.
        mask: broadcast to (..., Tq, Tk). A float mask is added to the scores, a boolean one
            selects, True = attend. The documents' PyTorch form, in which `mask == 0` is hidden,
            is `scaled_dot_product_attention(q, k, v, mask != 0)`.
        dropout_rate: on the weights, after softmax; needs `seed`.
        scale: host number; 1 / √D when left out.
        seed: of the dropout, as in `attn_core.Dropout`.

    Rows that may see no key give 0. Raises TypeError or ValueError on anything else.
    """
    host = all(isinstance(x, np.ndarray) for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not host and not isinstance(x, (tf.Tensor, tf.Variable)):
            raise TypeError(
                f"`{name}` must be a tensor, or all three NumPy. Got {type(x).__name__}."
            )
    q, k, v = [tf.convert_to_tensor(x) for x in (q, k, v)]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape.rank is None or x.shape.rank < 2:
            raise ValueError(f"`{name}` must have a known rank of at least 2. Got {x.shape}.")
        if not x.shape[:-2].is_compatible_with(q.shape[:-2]):
            raise ValueError(
                f"`{name}` must have the leading dimensions of q, {tuple(q.shape[:-2])}. "
                f"Got {tuple(x.shape[:-2])}."
            )
    *lead, rows, _ = sizes(q)
    keys, width = sizes(v)[-2:]
    batch = math.prod(lead)
    folded = [tf.reshape(x, (batch, 1, *sizes(x)[-2:])) for x in (q, k, v)]
    kwargs: dict[str, Any] = {}
    if mask is not None:
        mask = tf.convert_to_tensor(mask)
        full = (*lead, rows, keys)
        known = (*q.shape[:-1], k.shape[-2])
        documents_mask(mask.dtype.name, q.dtype.name, tuple(mask.shape), known)
        mask = tf.reshape(tf.broadcast_to(mask, full), (batch, 1, rows, keys))
        kwargs["mask" if mask.dtype == tf.bool else "bias"] = mask
    if dropout_rate:
        kwargs["dropout"] = Dropout(dropout_rate, seed)
    out = attention(*folded, scale=scale, **kwargs)
    out = tf.reshape(out, (*lead, rows, width))
    return out.numpy() if host and tf.executing_eagerly() else out
