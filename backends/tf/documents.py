"""The documents' functions, with any leading dimensions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from attn_core.api import attention
from attn_core.backends.tf.arrays import sizes
from attn_core.check_arrays import documents_mask, fits
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
        parameters: a MultiHeadAttention of Keras, whose config then says all that is static, and
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
    given = {"query": query, "key": key, "value": value}
    given = {name: x for name, x in given.items() if x is not None}
    host = all(isinstance(x, np.ndarray) for x in given.values())
    for name, x in given.items():
        if not host and not isinstance(x, (tf.Tensor, tf.Variable)):
            raise TypeError(
                f"`{name}` must be a tensor, or all of them NumPy. Got {type(x).__name__}."
            )
    inputs = {name: tf.convert_to_tensor(x) for name, x in given.items()}
    query = inputs["query"]
    for name, x in inputs.items():
        if x.shape.rank is None:
            raise ValueError(f"`{name}` must have a known rank of at least 2. Got {x.shape}.")
    module.check_shapes({name: tuple(x.shape) for name, x in inputs.items()}, fits)
    layer = module.is_layer(parameters, dropout_rate=dropout_rate, heads=heads, scale=scale)
    lead, dtype = sizes(query)[:-2], query.dtype.name
    batch = math.prod(lead)
    inputs = {name: tf.reshape(x, (batch, *sizes(x)[-2:])) for name, x in inputs.items()}
    if not layer:
        held = _held(parameters)
        config = module.config_of({name: tuple(x.shape) for name, x in held.items()}, heads)
        module.check_dtypes({name: x.dtype.name for name, x in {**inputs, **held}.items()}, dtype)
    else:
        config = parameters.config
    q, k = inputs["query"], inputs.get("key", inputs["query"])
    options: dict[str, Any] = {"return_weights": True}
    if mask is not None:
        mask = tf.convert_to_tensor(mask)
        full = (*query.shape[:-2], config.heads, q.shape[1], k.shape[1])
        module.check_mask(mask.dtype.name, dtype, tuple(mask.shape), full)
        if mask.shape.rank < 2:
            mask = tf.reshape(mask, (1, -1))
        elif mask.shape.rank > 2:
            mask = tf.broadcast_to(mask, (*lead, *sizes(mask)[-3:]))
            mask = tf.reshape(mask, (batch, *sizes(mask)[-3:]))
        options["mask" if mask.dtype == tf.bool else "bias"] = mask
    if layer:
        found = parameters(q, inputs.get("key"), inputs.get("value"), seed=seed, **options)
        out = found.out
    else:
        v = inputs.get("value", k)
        calls.check_inputs(config, tuple(q.shape), tuple(k.shape), tuple(v.shape))
        if dropout_rate:
            options["dropout"] = Dropout(dropout_rate, seed)
        s = config.sizes
        rows, keys = (batch, sizes(q)[1]), (batch, sizes(k)[1])
        q = tf.reshape(_projected(held, "query", q), (*rows, s.heads, s.head))
        v = tf.reshape(_projected(held, "value", v), (*keys, s.kv_heads, s.value))
        k = tf.reshape(_projected(held, "key", k), (*keys, s.kv_heads, s.head))
        if len(given) == 1:
            options["query_offset"] = 0  # of unknown sizes, too: keys are the rows themselves
        found = attention(q, k, v, scale=scale, layout="BTHD", **options)
        out = _projected(held, "out", tf.reshape(found.out, (*rows, s.heads * s.value)))
    out = tf.reshape(out, (*lead, *sizes(out)[-2:]))
    weights = tf.reshape(found.weights, (*lead, *sizes(found.weights)[-3:]))
    if host and tf.executing_eagerly():
        return ModuleOutput(out.numpy(), weights.numpy())
    return ModuleOutput(out, weights)


def _held(parameters: Any) -> dict[str, Any]:
    """A mapping's arrays as tensors."""
    held = {}
    for name, x in parameters.items():
        if not isinstance(x, (tf.Tensor, tf.Variable, np.ndarray)):
            raise TypeError(
                f"`{name}` of `parameters` must be a tensor or an array of NumPy. "
                f"Got {type(x).__name__}."
            )
        held[name] = tf.convert_to_tensor(x)
    return held


def _projected(held: dict[str, Any], part: str, x: Any) -> Any:
    y = x @ held[f"{part}.weight"]
    return y + held[f"{part}.bias"] if f"{part}.bias" in held else y
