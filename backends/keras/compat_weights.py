"""Weights of Keras' MultiHeadAttention and GroupQueryAttention."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from attn_core import masks
from attn_core.backends.keras.tensors import room
from attn_core.compat.weights import Converted, converted, flat, output, projection, refuse


def from_multi_head_attention(layer: Any, **changes: Any) -> Converted:
    """`keras.layers.MultiHeadAttention` as (AttentionConfig, weights).

    Args:
        layer: built, over inputs (B, T, E) with one axis of time.
        changes: fields of the config that the layer does not say itself, such as causal=True for
            `use_causal_mask`.

    `use_gate` and `sliding_window` come along: the window is a band to both sides, and is the
    config's `mask`. Masks of a call: `attn_core.compat.from_keras_mask`.

    Raises:
        TypeError: it is no such layer.
        ValueError: it is not built, attends over other axes than one of time, or its output is of
            several axes; or `changes` gainsay it.
    """
    if type(layer) is not keras.layers.MultiHeadAttention:  # a subclass may compute otherwise
        raise TypeError(
            f"`layer` must be a keras.layers.MultiHeadAttention. Got {type(layer).__name__}."
        )
    _check_built(layer)
    config = layer.get_config()
    axes = config.get("attention_axes")
    if axes is not None and tuple(axes) != (1,):
        refuse("keras' MultiHeadAttention", "attention_axes", axes, "ours attends over time alone")
    return _converted(layer, config, changes)


def from_group_query_attention(layer: Any, **changes: Any) -> Converted:
    """`keras.layers.GroupQueryAttention` as (AttentionConfig, weights).

    As `from_multi_head_attention`.
    """
    if type(layer) is not keras.layers.GroupQueryAttention:
        raise TypeError(
            f"`layer` must be a keras.layers.GroupQueryAttention. Got {type(layer).__name__}."
        )
    _check_built(layer)
    return _converted(layer, layer.get_config(), changes)


def _check_built(layer: Any) -> None:
    if not layer.built:
        raise ValueError(
            "`layer` must be built, since its weights are made then. Got one that is not: call "
            "it, or its build, first."
        )


# Their names in Keras' layers, and in our plan.
_PARTS = {"query": "query", "key": "key", "value": "value", "gate": "gate"}


def _converted(layer: Any, config: dict[str, Any], changes: Any) -> Converted:
    name = type(layer).__name__
    arrays: dict[str, np.ndarray | None] = {}
    shapes = {}
    for part in _PARTS:
        dense = getattr(layer, f"_{part}_dense", None)
        if dense is None:
            continue
        kernel = _array(dense.kernel)
        if kernel.ndim != 3:
            refuse(name, f"inputs of {part}", kernel.shape, "ours are (B, T, E)")
        shapes[part] = kernel.shape
        arrays[f"{part}.weight"], arrays[f"{part}.bias"] = (
            projection(kernel),
            flat(_array(dense.bias)),
        )
    kernel = _array(layer._output_dense.kernel)
    if kernel.ndim != 3:
        refuse(name, "output_shape", kernel.shape[2:], "ours has one axis of channels")
    arrays["out.weight"], arrays["out.bias"] = output(kernel), _array(layer._output_dense.bias)
    width, heads, head = shapes["query"]
    key_input, kv_heads, _ = shapes["key"]
    value_input, _, value = shapes["value"]
    window = config.get("sliding_window")
    fields = {
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads if kv_heads != heads else None,
        "head_width": head,
        "value_width": value if value != head else None,
        "key_input": key_input if key_input != width else None,
        "value_input": value_input if value_input != key_input else None,
        "out_width": kernel.shape[-1] if kernel.shape[-1] != width else None,
        "bias": arrays["query.bias"] is not None,
        "out_bias": arrays["out.bias"] is not None,
        "gate": "gate" in shapes,
        "dropout": float(config["dropout"]),
        # The total width of one side, the position itself included.
        "mask": None if window is None else masks.window(left=window - 1, right=window - 1),
    }
    return converted(fields, arrays, changes)


def _array(variable: Any) -> Any:
    # By way of a tensor: of a variable NumPy 2 makes Keras itself warn.
    return None if variable is None else room().to_numpy(keras.ops.convert_to_tensor(variable))
