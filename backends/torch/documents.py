"""The documents' functions, with any leading dimensions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from attn_core.api import attention
from attn_core.check_arrays import documents_mask
from attn_core.language.values import Dropout
from attn_core.model import calls, module
from attn_core.model.module import ModuleOutput


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


def attention_module(
    query: Any,
    key: Any | None = None,
    value: Any | None = None,
    mask: Any | None = None,
    dropout_rate: float = 0.0,
    *,
    parameters: Any,
    heads: int | None = None,
    scale: float | None = None,
    seed: Any | None = None,
) -> ModuleOutput:
    """The documents' module: project, attend by heads, project; over any leading dimensions.

        q, k, v = query Wq + bq, key Wk + bk, value Wv + bv, cut into heads
        weights = softmax(scale * q kᵀ + mask)        out = (dropped(weights) v) Wo + bo

        query (..., Tq, E), key (..., Tk, Ek), value (..., Tk, Ev) -> (..., Tq, O), (..., H, Tq, Tk)

    The documents name the module and leave its arguments and the order of its results open: this is
    our reading. `out, weights = attention_module(x, parameters=layer)`.

    Args:
        query, key, value: tensors of one dtype with equal leading dimensions; NumPy's come back
            as NumPy. Self-attention where `key` is left out; `value` is the key where left out.
        mask: broadcast to (..., H, Tq, Tk), of rank 2 or of that rank. A float mask is added to the
            scores, a boolean one selects, True = attend.
        dropout_rate: on the weights, after softmax; needs `seed`. The weights that are returned
            are those before.
        parameters: a MultiHeadAttention, whose config then says all that is static, and
            whose training mode whether it drops; or a mapping of arrays, tensors or NumPy's,
            under its portable names, matrices (in, out), of the query's dtype:
            query.weight (E, H D), key.weight (Ek, Hk D), value.weight (Ev, Hk Dv),
            out.weight (H Dv, O), and query.bias, key.bias, value.bias, out.bias.
        heads: H, with a mapping; H / Hk query heads share a head of keys.
        scale: host number; 1 / √D when left out.
        seed: of the dropout, as in `attn_core.Dropout`; of a layer, the number of the step.

    A row that may see no key gives out's bias, and weights of 0.

    Raises:
        TypeError, ValueError: an argument is not of its form, or something is given that the layer
            says; nothing has been computed.
    """
    from attn_core.backends.torch import from_numpy, to_numpy

    if all(x is None or isinstance(x, np.ndarray) for x in (query, key, value)):
        query, key, value = [None if x is None else from_numpy(x) for x in (query, key, value)]
        told = {"parameters": parameters, "heads": heads, "scale": scale, "seed": seed}
        found = attention_module(query, key, value, mask, dropout_rate, **told)
        return ModuleOutput(*[to_numpy(x.detach()) for x in found])
    inputs = {"query": query, "key": key, "value": value}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    for name, x in inputs.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a tensor, or all of them NumPy. Got {type(x).__name__}."
            )
    module.check_shapes({name: tuple(x.shape) for name, x in inputs.items()}, tuple.__eq__)
    layer = module.is_layer(parameters, dropout_rate=dropout_rate, heads=heads, scale=scale)
    lead = tuple(query.shape[:-2])
    batch = math.prod(lead)
    inputs = {name: x.reshape(batch, *x.shape[-2:]) for name, x in inputs.items()}
    if not layer:
        held = _held(parameters, query)
        config = module.config_of({name: tuple(x.shape) for name, x in held.items()}, heads)
        module.check_dtypes(
            {name: _name(x) for name, x in {**inputs, **held}.items()}, _name(query)
        )
    else:
        config = parameters.config
    q, k = inputs["query"], inputs.get("key", inputs["query"])
    options: dict[str, Any] = {"return_weights": True}
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            mask = from_numpy(np.asarray(mask)).to(query.device)
        full = (*lead, config.heads, q.shape[1], k.shape[1])
        module.check_mask(_name(mask), _name(query), tuple(mask.shape), full)
        mask = mask.reshape((1,) * (2 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 2 else mask
        if mask.dim() > 2:
            mask = mask.expand(*lead, *mask.shape[-3:]).reshape(batch, *mask.shape[-3:])
        options["mask" if mask.dtype == torch.bool else "bias"] = mask
    if layer:
        found = parameters(q, inputs.get("key"), inputs.get("value"), seed=seed, **options)
        out = found.out
    else:
        v = inputs.get("value", k)
        calls.check_inputs(config, q.shape, k.shape, v.shape)
        if dropout_rate:
            options["dropout"] = Dropout(dropout_rate, seed)
        s = config.sizes
        q = _projected(held, "query", q).unflatten(-1, (s.heads, s.head))
        k = _projected(held, "key", k).unflatten(-1, (s.kv_heads, s.head))
        v = _projected(held, "value", v).unflatten(-1, (s.kv_heads, s.value))
        found = attention(q, k, v, scale=scale, layout="BTHD", **options)
        out = _projected(held, "out", found.out.flatten(-2))
    weights = found.weights
    return ModuleOutput(
        out.reshape(*lead, *out.shape[-2:]), weights.reshape(*lead, *weights.shape[-3:])
    )


def _held(parameters: Any, query: Any) -> dict[str, Any]:
    """A mapping's arrays as tensors; a module's own lie the other way round, and are refused."""
    from attn_core.backends.torch import from_numpy

    held = {}
    for name, x in parameters.items():
        turned = hasattr(parameters, "_metadata") or isinstance(x, torch.nn.Parameter)
        if turned or not isinstance(x, (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"`{name}` of `parameters` must be a tensor or an array of NumPy, matrices "
                f"(in, out), as `export_weights` gives them. Got {type(x).__name__}"
                f"{': matrices of a torch module are (out, in), give the module' * turned}."
            )
        held[name] = from_numpy(x).to(query.device) if isinstance(x, np.ndarray) else x
    return held


def _projected(held: dict[str, Any], part: str, x: Any) -> Any:
    y = x @ held[f"{part}.weight"]
    return y + held[f"{part}.bias"] if f"{part}.bias" in held else y


def _name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")
