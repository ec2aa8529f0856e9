"""The documents' functions, with any leading dimensions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_core import config
from attn_core.api import attention
from attn_core.backends.jax.arrays import from_host, x64
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
        q, k, v: arrays of one dtype with equal leading dimensions; NumPy's come back as NumPy.
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
        if not host and not isinstance(x, jax.Array):
            raise TypeError(
                f"`{name}` must be an array of JAX, or all three NumPy. Got {type(x).__name__}."
            )
        if x.ndim < 2:
            raise ValueError(f"`{name}` must have rank 2 or more. Got {x.shape}.")
        if x.shape[:-2] != q.shape[:-2]:
            raise ValueError(
                f"`{name}` must have the leading dimensions of q, {q.shape[:-2]}. "
                f"Got {x.shape[:-2]}."
            )
    lead = tuple(q.shape[:-2])
    batch = math.prod(lead)
    folded = [x.reshape(batch, 1, *x.shape[-2:]) for x in (q, k, v)]
    kwargs: dict[str, Any] = {}
    if mask is not None:
        if not isinstance(mask, jax.Array):
            mask = np.asarray(mask) if host else _array(mask)
        full = (*lead, q.shape[-2], k.shape[-2])
        documents_mask(mask.dtype.name, q.dtype.name, mask.shape, full)
        spread = np.broadcast_to if isinstance(mask, np.ndarray) else jnp.broadcast_to
        mask = spread(mask, full).reshape(batch, 1, *full[-2:])
        kwargs["mask" if mask.dtype == bool else "bias"] = mask
    if dropout_rate:
        kwargs["dropout"] = Dropout(dropout_rate, seed)
    with config.use(backend="jax"):
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
        query, key, value: arrays of one dtype with equal leading dimensions; NumPy's come back
            as NumPy. Self-attention where `key` is left out; `value` is the key where left out.
        mask: broadcast to (..., H, Tq, Tk), of rank 2 or of that rank. A float mask is added to the
            scores, a boolean one selects, True = attend.
        dropout_rate: on the weights, after softmax; needs `seed`. The weights that are returned
            are those before.
        parameters: a MultiHeadAttention, whose config then says all that is static, and
            whose training mode whether it drops; or a mapping of arrays, JAX's or NumPy's,
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
    host = all(x is None or isinstance(x, np.ndarray) for x in (query, key, value))
    inputs = {"query": query, "key": key, "value": value}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    for name, x in inputs.items():
        if not host and not isinstance(x, jax.Array):
            raise TypeError(
                f"`{name}` must be an array of JAX, or all of them NumPy. Got {type(x).__name__}."
            )
    module.check_shapes({name: tuple(x.shape) for name, x in inputs.items()}, tuple.__eq__)
    layer = module.is_layer(parameters, dropout_rate=dropout_rate, heads=heads, scale=scale)
    with x64(query.dtype.name == "float64"):
        options = {"heads": heads, "dropout_rate": dropout_rate, "scale": scale, "seed": seed}
        inputs = {name: from_host(x) if host else x for name, x in inputs.items()}
        found = _module(inputs, mask, parameters, layer, options)
    return ModuleOutput(*map(np.asarray, found)) if host else found


def _module(
    inputs: dict[str, Any], mask: Any, parameters: Any, layer: bool, told: dict[str, Any]
) -> ModuleOutput:
    query = inputs["query"]
    lead, dtype = tuple(query.shape[:-2]), query.dtype.name
    batch = math.prod(lead)
    inputs = {name: x.reshape(batch, *x.shape[-2:]) for name, x in inputs.items()}
    if not layer:
        held = _held(parameters)
        config = module.config_of({name: x.shape for name, x in held.items()}, told["heads"])
        module.check_dtypes({name: x.dtype.name for name, x in {**inputs, **held}.items()}, dtype)
    else:
        config = parameters.config
    q, k = inputs["query"], inputs.get("key", inputs["query"])
    options: dict[str, Any] = {"return_weights": True}
    if mask is not None:
        mask = mask if isinstance(mask, jax.Array) else _array(mask)
        full = (*lead, config.heads, q.shape[1], k.shape[1])
        module.check_mask(mask.dtype.name, dtype, mask.shape, full)
        mask = jnp.atleast_2d(mask)
        if mask.ndim > 2:
            mask = jnp.broadcast_to(mask, (*lead, *mask.shape[-3:]))
            mask = mask.reshape(batch, *mask.shape[-3:])
        options["mask" if mask.dtype == bool else "bias"] = mask
    if layer:
        options["seed"] = told["seed"]
        found = parameters(q, inputs.get("key"), inputs.get("value"), **options)
        out = found.out
    else:
        v = inputs.get("value", k)
        calls.check_inputs(config, q.shape, k.shape, v.shape)
        if told["dropout_rate"]:
            options["dropout"] = Dropout(told["dropout_rate"], told["seed"])
        s = config.sizes
        q = _projected(held, "query", q).reshape(*q.shape[:2], s.heads, s.head)
        k = _projected(held, "key", k).reshape(*k.shape[:2], s.kv_heads, s.head)
        v = _projected(held, "value", v).reshape(*v.shape[:2], s.kv_heads, s.value)
        found = attention(q, k, v, scale=told["scale"], layout="BTHD", **options)
        out = _projected(held, "out", found.out.reshape(*q.shape[:2], s.heads * s.value))
    weights = found.weights
    return ModuleOutput(
        out.reshape(*lead, *out.shape[-2:]), weights.reshape(*lead, *weights.shape[-3:])
    )


def _held(parameters: Any) -> dict[str, Any]:
    """A mapping's arrays as JAX's."""
    held = {}
    for name, x in parameters.items():
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(
                f"`{name}` of `parameters` must be an array of JAX or of NumPy. "
                f"Got {type(x).__name__}."
            )
        held[name] = from_host(x) if isinstance(x, np.ndarray) else x
    return held


def _projected(held: dict[str, Any], part: str, x: Any) -> Any:
    y = x @ held[f"{part}.weight"]
    return y + held[f"{part}.bias"] if f"{part}.bias" in held else y


def _array(mask: Any) -> Any:
    """A host mask beside JAX arrays; a list of numbers takes JAX's own dtype."""
    return from_host(mask) if isinstance(mask, np.ndarray) else jnp.asarray(mask)
