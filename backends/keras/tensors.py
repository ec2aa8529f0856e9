"""Tensors of whichever backend Keras runs on: what they are, whether they can be read, and the few
operations in which a backend of Keras narrows float64 on the way.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from attn_core import registry
from attn_core.model import calls

Array = Any


def room() -> Any:
    """The backend of attn_core whose arrays are those of Keras' backend."""
    name = keras.backend.backend()
    return registry.load({"tensorflow": "tf"}.get(name, name))


def check_float64() -> Array:
    """One float64: Keras must not narrow it on the way, which it does with JAX."""
    made = ops.convert_to_tensor(np.zeros((), np.float64))
    if dtype_of(made) != "float64":
        raise ValueError(
            '`dtype` must not be "float64" where JAX holds none: jax.config.update('
            '"jax_enable_x64", True) is the caller\'s to set. Got float64.'
        )
    return made


def product(x: Array, weight: Array) -> Array:
    """x W; of float64 Keras' own product is float32 on torch."""
    return x @ weight if dtype_of(x) == "float64" else ops.matmul(x, weight)


def mean(x: Array) -> Array:
    """Over the last axis, which stays; Keras' own of float64 is float32 on torch."""
    return ops.sum(x, -1, keepdims=True) / x.shape[-1]


def tanh(x: Array) -> Array:
    """Keras' own of float64 is float32 on JAX."""
    return 2 * ops.sigmoid(2 * x) - 1 if dtype_of(x) == "float64" else ops.tanh(x)


def dtype_of(x: Any) -> str:
    """A dtype by name."""
    return str(keras.backend.standardize_dtype(x.dtype))


def cache_dtype(given: Any) -> str:
    """The word of the floats that a cache is to hold, whichever of Keras' spellings is given."""
    try:
        given = keras.backend.standardize_dtype(given)
    except (TypeError, ValueError):
        pass  # no dtype of Keras, as is said next
    word = calls.cache_dtype(given, {})
    if word == "float64":
        check_float64()
    return word


def at_least_float32(x: Any) -> str:
    """The dtype in which angles and norms of x are computed."""
    return "float64" if dtype_of(x) == "float64" else "float32"


def merged(x: Array) -> Array:
    """(.., a, b) as (.., a b)."""
    return ops.reshape(x, (*ops.shape(x)[:-2], x.shape[-2] * x.shape[-1]))


def integers(name: str, given: Any) -> Array:
    """Host ints or a tensor as int32.

    What int32 does not hold is refused where it can be read, and else held at its ends.
    """
    if isinstance(given, (int, list, tuple)):
        flat = given if isinstance(given, (list, tuple)) else [given]
        if flat and all(isinstance(x, int) for x in flat):  # before JAX narrows them
            calls.check_int32(name, min(flat), max(flat))
    elif isinstance(given, np.ndarray) and given.dtype.kind in "iu" and given.size:
        calls.check_int32(name, int(given.min()), int(given.max()))
    found = ops.convert_to_tensor(given)
    if "int" not in dtype_of(found):
        raise TypeError(f"`{name}` must be integers. Got {dtype_of(found)}.")
    if dtype_of(found) in ("int64", "uint32", "uint64"):
        if known(found) and math.prod(found.shape):
            numbers = room().to_numpy(found)
            calls.check_int32(name, int(numbers.min()), int(numbers.max()))
        elif dtype_of(found) == "int64":
            found = within(found, -(2**31), 2**31 - 1)
    return ops.cast(found, "int32")


def within(x: Array, least: Any, most: Any) -> Array:
    """x held within two bounds."""
    return ops.minimum(ops.maximum(x, least), most)


def indices(x: Array) -> Array:
    """The indices of the rows of x (B, T, ..), int32 (1, T)."""
    return ops.arange(ops.shape(x)[1], dtype="int32")[None]


def shape(x: Any) -> tuple[int | None, ...]:
    """A shape in which a size that is not known yet is None."""
    return tuple([n if isinstance(n, int) else None for n in x.shape])


def tensor(x: Any) -> Any:
    """A NumPy array as a tensor; anything else stays."""
    return ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x


def on_host(x: Any) -> np.ndarray | None:
    """The values of a tensor that the host holds; None where it would have to wait for them."""
    if isinstance(x, keras.KerasTensor) or not known(x) or room().describe(x).device != "cpu":
        return None
    return np.asarray(room().to_numpy(x))


def known(x: Array) -> bool:
    """Whether the values of a tensor can be read: nothing traces or transforms it."""
    return room().known(x)
