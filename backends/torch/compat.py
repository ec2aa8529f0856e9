"""torch's `scaled_dot_product_attention`, its signature and conventions, computed by `attention`.

torch's conventions, where they differ from ours, and how each is kept:

| torch | here |
|---|---|
| any leading dimensions, broadcast like a matmul's, heads at -3 | folded to (B, H, T, D) |
| `attn_mask` boolean, True = attend; a float one is added | `mask`, `bias` |
| `is_causal` starts at the first key, whatever the lengths | `query_offset="start"` |
| `causal_upper_left`, `causal_lower_right` as `attn_mask` | causal from the "start", the "end" |
| grouped heads only with `enable_gqa=True`, else heads broadcast | heads are checked first |
| `dropout_p` draws from torch's generator, and 1.0 drops everything | a seed is drawn from it |
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attn_core import masks
from attn_core.api import attention
from attn_core.check_arrays import documents_mask
from attn_core.language.values import Dropout


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by `attn_core.attention`.

        query (..., Hq, Tq, D), key (..., Hk, Tk, D), value (..., Hk, Tk, Dv) -> (..., Hq, Tq, Dv)
        out = dropout(softmax(scale * query keyᵀ + attn_mask)) value

    Args:
        query, key, value: tensors of rank 2 or more, of one dtype. Leading dimensions broadcast.
        attn_mask: broadcast to (..., Hq, Tq, Tk), of any rank. Boolean, True = attend; a float
            one is added to the scores, -inf hides, and it receives its gradient. Or a CausalBias.
        dropout_p: share of the weights that is dropped, whether or not a module is in training.
            The seed is drawn from torch's generator of query's device, so `torch.manual_seed`
            governs it; the mask is that of `attn_core.Dropout`, not torch's. 1.0 gives zeros.
        is_causal: query i sees keys 0 .. i, also where Tq and Tk differ; with attn_mask both apply.
        scale: host number, 1 / sqrt(D) when left out.
        enable_gqa: query head h reads key head h // (Hq / Hk). Without it heads must be equal, or
            1, which broadcasts.

    A row that may see no key gives 0, in its gradients too. `attn_core.use(impl=...)` chooses the
    implementation; those that "auto" takes have the first derivative, in reverse.

    Raises:
        TypeError, ValueError: an argument is not of its form; nothing has been computed.

    Source: torch's documentation of the function of that name.
    """
    q, k, v, lead = _folded(query, key, value, bool(enable_gqa))
    kwargs: dict[str, Any] = {}
    if type(attn_mask).__name__ == "CausalBias":
        if is_causal:
            raise ValueError("`is_causal` must be False beside a CausalBias. Got True.")
        kwargs.update(_causal_bias(attn_mask, q.shape[2], k.shape[2]))
    elif attn_mask is not None:
        kwargs.update(_mask(attn_mask, query, (*lead, q.shape[1], q.shape[2], k.shape[2])))
    if is_causal:
        causal = masks.causal()
        kwargs["mask"] = causal & masks.dense(kwargs["mask"]) if "mask" in kwargs else causal
        kwargs["query_offset"] = "start"
    rate = float(dropout_p)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"`dropout_p` must lie between 0 and 1. Got {dropout_p}.")
    if 0.0 < rate < 1.0:
        kwargs["dropout"] = Dropout(rate, drawn_seed(q.device))
    out = attention(q, k, v, scale=scale, **kwargs)
    if rate == 1.0:
        out = out.masked_fill(torch.ones((), dtype=torch.bool, device=out.device), 0.0)
    rank = max(query.dim(), key.dim(), value.dim())
    return out.reshape((*lead, *out.shape[-3:]) if rank > 2 else out.shape[-2:])


def drawn_seed(device: torch.device) -> Any:
    """A seed for one call, from torch's own generator: `torch.manual_seed` governs it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def _folded(query: Any, key: Any, value: Any, grouped: bool) -> tuple[Any, Any, Any, Any]:
    """The three as (B, H, T, D), and the leading dimensions that B stands for."""
    given = {"query": query, "key": key, "value": value}
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor. Got {type(x).__name__}.")
        _dense(name, x, "pad it, and call attn_core.attention with kv_lengths and q_lengths")
        if x.dim() < 2:
            raise ValueError(f"`{name}` must have rank 2 or more. Got {tuple(x.shape)}.")
    rank = max(3, *[x.dim() for x in given.values()])
    q, k, v = [x.reshape((1,) * (rank - x.dim()) + tuple(x.shape)) for x in given.values()]
    lead = _broadcast([x.shape[:-3] for x in (q, k, v)], "leading dimensions", given)
    if grouped:
        heads = q.shape[-3]
        for name, x in (("key", k), ("value", v)):
            if x.shape[-3] == 0 or heads % x.shape[-3]:
                raise ValueError(
                    f"the heads of `query` must be a multiple of those of `{name}`. "
                    f"Got {heads} and {x.shape[-3]}."
                )
        kv_heads = max(k.shape[-3], v.shape[-3])
        if kv_heads % k.shape[-3] or kv_heads % v.shape[-3]:
            kv_heads = heads
        k, v = [x.repeat_interleave(kv_heads // x.shape[-3], -3) for x in (k, v)]
    else:
        what = "heads (dimension -3) without enable_gqa"
        (heads,) = _broadcast([x.shape[-3:-2] for x in (q, k, v)], what, given)
        # One key head for all query heads is what our grouped heads do, without copies.
        kv_heads = heads if k.shape[-3] != 1 or v.shape[-3] != 1 else 1
    spread = []
    for x, count in ((q, heads), (k, kv_heads), (v, kv_heads)):
        x = x.expand((*lead, count, *x.shape[-2:]))
        spread.append(x.reshape((math.prod(lead), *x.shape[-3:])) if len(lead) != 1 else x)
    return spread[0], spread[1], spread[2], lead


def _dense(name: str, x: Any, instead: str) -> None:
    """A tensor of one shape and strides."""
    if x.is_nested or x.layout is not torch.strided:
        kind = "a nested one" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"`{name}` must be a dense tensor. Got {kind}: {instead}.")


def _broadcast(shapes: list[Any], what: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """The common shape of equally long ones, 1 stretching."""
    common = []
    for sizes in zip(*shapes, strict=True):
        wide = [size for size in sizes if size != 1]
        if any(size != wide[0] for size in wide[1:]):
            q, k, v = [tuple(x.shape) for x in given.values()]
            raise ValueError(
                f"query, key and value must have {what} that broadcast. Got {q}, {k} and {v}."
            )
        common.append(wide[0] if wide else 1)
    return tuple(common)


def _causal_bias(given: Any, q_len: int, k_len: int) -> dict[str, Any]:
    """What one of torch.nn.attention.bias stands for: its own entries are no numbers at all."""
    if given.variant.name == "UPPER_LEFT":
        return {"mask": masks.causal(), "query_offset": "start"}
    sizes = given.seq_len_q, given.seq_len_kv
    if sizes != (q_len, k_len):
        raise ValueError(f"`attn_mask` must be of (Tq, Tk) = {(q_len, k_len)}. Got {sizes}.")
    return {"mask": masks.causal(), "query_offset": "end"}


def _mask(attn_mask: Any, query: Any, full: tuple[Any, ...]) -> dict[str, Any]:
    """attn_mask as `mask` or `bias` of rank 4; `full` is (..., Hq, Tq, Tk)."""
    if not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"`attn_mask` must be a tensor. Got {type(attn_mask).__name__}.")
    _dense("attn_mask", attn_mask, "pad it, or make it dense")
    names = [str(x.dtype).removeprefix("torch.") for x in (attn_mask, query)]
    documents_mask(names[0], names[1], tuple(attn_mask.shape), full, "attn_mask")
    rank = max(len(full), 4)
    attn_mask = attn_mask.reshape((1,) * (rank - attn_mask.dim()) + tuple(attn_mask.shape))
    lead = attn_mask.shape[:-3]
    if len(lead) > 1:
        if any(size != 1 for size in lead):
            attn_mask = attn_mask.expand((*full[:-3], *attn_mask.shape[-3:]))
        attn_mask = attn_mask.reshape((math.prod(attn_mask.shape[:-3]), *attn_mask.shape[-3:]))
    return {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}
