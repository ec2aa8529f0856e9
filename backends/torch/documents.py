"""The documents' `scaled_dot_product_attention`, with any leading dimensions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from attn_core.api import attention
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
        q, k, v: tensors of one dtype with equal leading dimensions; NumPy's arrays come back as
            NumPy.
        mask: broadcast to (..., Tq, Tk). A float mask is added to the scores, a boolean one
            selects, True = attend. The documents' PyTorch form, in which `mask == 0` is hidden,
            is `scaled_dot_product_attention(q, k, v, mask != 0)`.
        dropout_rate: on the weights, after softmax; needs `seed`.
        scale: host number; 1 / √D when left out.
        seed: of the dropout, as in `attn_core.Dropout`.

    Rows that may see no key give 0. Raises TypeError or ValueError on anything else.
    """
    from attn_core.backends.torch import from_numpy, to_numpy

    if all(isinstance(x, np.ndarray) for x in (q, k, v)):
        q, k, v = [from_numpy(x) for x in (q, k, v)]
        return to_numpy(
            scaled_dot_product_attention(q, k, v, mask, dropout_rate, scale=scale, seed=seed)
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a tensor, or all three NumPy. Got {type(x).__name__}."
            )
        if x.dim() < 2:
            raise ValueError(f"`{name}` must have rank 2 or more. Got {tuple(x.shape)}.")
        if x.shape[:-2] != q.shape[:-2]:
            raise ValueError(
                f"`{name}` must have the leading dimensions of q, {tuple(q.shape[:-2])}. "
                f"Got {tuple(x.shape[:-2])}."
            )
    lead = tuple(q.shape[:-2])
    batch = math.prod(lead)
    folded = [x.reshape(batch, 1, *x.shape[-2:]) for x in (q, k, v)]
    kwargs: dict[str, Any] = {}
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            mask = from_numpy(np.asarray(mask)).to(q.device)
        full = (*lead, q.shape[-2], k.shape[-2])
        documents_mask(_name(mask), _name(q), tuple(mask.shape), full)
        mask = torch.broadcast_to(mask, full).reshape(batch, 1, *full[-2:])
        kwargs["mask" if mask.dtype == torch.bool else "bias"] = mask
    if dropout_rate:
        kwargs["dropout"] = Dropout(dropout_rate, seed)
    out = attention(*folded, scale=scale, **kwargs)
    return out.reshape(*lead, q.shape[-2], v.shape[-1])


def _name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")
