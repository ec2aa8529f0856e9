"""What layers and models of Keras are made of: projections, norms, angles, what is dropped."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from attn_core.backends.keras.tensors import (
    Array,
    at_least_float32,
    dtype_of,
    mean,
    merged,
    product,
    room,
)
from attn_core.language.values import Dropout, drop_threshold
from attn_core.model.positions import LOW, TURN, wheel
from attn_core.model.seeds import MIX, key, step_seed


class Linear(keras.layers.Layer):
    """y = x W + b in the policy's compute dtype, as keras.layers.Dense computes; W (in, out)."""

    def __init__(self, inner: int, outer: int, bias: bool, **make: Any) -> None:
        super().__init__(**make)
        self.supports_masking = True
        self.weight = self.add_weight((inner, outer), "zeros", name="weight")
        self.bias = self.add_weight((outer,), "zeros", name="bias") if bias else None
        self.built = True

    def call(self, x: Array) -> Array:
        y = product(x, ops.convert_to_tensor(self.weight))
        return y if self.bias is None else ops.add(y, self.bias)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape[:-1], self.weight.shape[1])


class Embedding(keras.layers.Layer):
    """Rows of a table, in the policy's compute dtype; where there is no such row, NaN.

    Left to themselves, Keras' backends answer with another row, with NaN, or fail each in its way.
    """

    def __init__(self, rows: int, width: int, **make: Any) -> None:
        super().__init__(**make)
        self.weight = self.add_weight((rows, width), "zeros", name="weight")
        self.built = True

    def call(self, x: Array) -> Array:
        inside = ops.logical_and(x >= 0, x < self.weight.shape[0])
        at = ops.where(inside, x, ops.zeros_like(x))
        found = ops.take(ops.cast(self.weight, self.compute_dtype), at, axis=0)
        return ops.where(inside[..., None], found, ops.full_like(found, np.nan))


class Norm(keras.layers.Layer):
    """Layer norm or RMS norm over the last axis, in float32 at least.

    layer   (x - mean) / sqrt(variance + epsilon) * scale + bias
    rms     x / sqrt(mean(x**2) + epsilon) * scale
    """

    def __init__(self, width: int, kind: str, bias: bool, epsilon: float, **make: Any) -> None:
        super().__init__(**make)
        self.kind, self.epsilon = kind, epsilon
        # Read whole, under any policy: a norm is no product that may be narrow.
        self.scale = self.add_weight((width,), "ones", name="scale", autocast=False)
        self.bias = None
        if bias:
            self.bias = self.add_weight((width,), "zeros", name="bias", autocast=False)
        self.built = True

    def call(self, x: Array) -> Array:
        wide = ops.cast(x, at_least_float32(x))
        if self.kind == "layer":
            wide = wide - mean(wide)
        wide = wide * ops.rsqrt(mean(wide * wide) + self.epsilon)
        wide = wide * ops.cast(self.scale, wide.dtype)
        if self.bias is not None:
            wide = wide + ops.cast(self.bias, wide.dtype)
        return ops.cast(wide, x.dtype)


# TensorFlow's gelu has its constants in float32, whatever the dtype.
ACTIVATIONS = {
    "relu": ops.relu,
    "gelu": lambda x: x * 0.5 * (1.0 + ops.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: (
        x * 0.5 * (1.0 + ops.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
    ),
    "silu": ops.silu,
}

Words = tuple[list[int], list[int]]


def words_of(base: float, channels: int) -> Words:
    """The words of `channels` that turn, high and low, as host ints."""
    high, low = wheel(base, channels).tolist()
    return high, low


def angles(words: Words, positions: Array, dtype: str) -> Array:
    """Radians of every channel pair, (B, T, pairs), at int positions (B, T); see model.positions.

    Words are int32, whose products JAX lets wrap; elsewhere they are held in int64, which never
    overflows here.
    """
    high, low = words
    if keras.backend.backend() == "jax":
        wrapped = positions[..., None] * ops.convert_to_tensor(high, "int32")
    else:
        whole = ops.cast(positions, "int64")[..., None] * ops.convert_to_tensor(high, "int64")
        wrapped = ((whole + 2**31) & 0xFFFFFFFF) - 2**31
    rest = ops.cast(positions[..., None], dtype) * ops.convert_to_tensor(low, dtype)
    return ops.cast(wrapped, dtype) * TURN + rest * LOW


def rotated(x: Array, words: Words, positions: Array, pairs: str) -> Array:
    """Heads (B, T, H, D) turned by their positions (B or 1, T); the first channels turn."""
    dtype = at_least_float32(x)
    angle = angles(words, positions, dtype)[:, :, None]
    cos, sin = ops.cos(angle), ops.sin(angle)
    count = 2 * len(words[0])
    part, rest = ops.cast(x[..., :count], dtype), x[..., count:]
    if pairs == "half":
        a, b = part[..., : count // 2], part[..., count // 2 :]
        part = ops.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = part[..., 0::2], part[..., 1::2]
        part = merged(ops.stack([a * cos - b * sin, b * cos + a * sin], -1))
    return ops.concatenate([ops.cast(part, x.dtype), rest], -1)


def sinusoidal(words: Words, positions: Array, dtype: str) -> Array:
    """PE of int positions (B, T), (B, T, width): sines and cosines in turn, float32 at least."""
    angle = angles(words, positions, "float64" if dtype == "float64" else "float32")
    return ops.cast(merged(ops.stack([ops.sin(angle), ops.cos(angle)], -1)), dtype)


def weights_dropout(rate: float, seed: Any, site: int, training: Any) -> Dropout | None:
    """The dropout of attention weights at a site; None in evaluation."""
    if not training or not rate:
        return None
    seed = step_seed(seed)
    if isinstance(seed, tuple):
        return Dropout(rate, key(seed, site))
    seed = _counted(seed)
    # Both words, of an array that JAX may have no int64 for; elsewhere as one int64, of which the
    # upper has the sign.
    if keras.backend.backend() == "jax":
        low, high = _words(seed)
        mixed = high * ops.cast(MIX, "uint32") + ops.cast(site, "uint32")  # which wraps
        return Dropout(rate, ops.stack([low, mixed]))
    seed = ops.cast(seed, "int64")
    low, high = key((seed & 0xFFFFFFFF, (seed // 2**32) & 0xFFFFFFFF), site)
    return Dropout(rate, low + (((high + 2**31) & 0xFFFFFFFF) - 2**31) * 2**32)


def _words(seed: Array) -> tuple[Array, Array]:
    """(low, high), uint32, of an integer scalar of JAX, whose sign is that of all 64 bits."""
    dtype = dtype_of(seed)
    if dtype in ("int64", "uint64"):
        high = ops.right_shift(seed, 32)
        return ops.cast(seed & 0xFFFFFFFF, "uint32"), ops.cast(high & 0xFFFFFFFF, "uint32")
    if dtype[0] == "u":
        return ops.cast(seed, "uint32"), ops.zeros((), "uint32")
    seed = ops.cast(seed, "int32")
    return ops.cast(seed, "uint32"), ops.cast(ops.right_shift(seed, 31), "uint32")


def _counted(seed: Any) -> Array:
    """A seed as a tensor; of a variable, its value."""
    try:
        return ops.convert_to_tensor(seed)
    except TypeError as error:
        if not isinstance(seed, keras.Variable):
            raise
        # Keras' training on JAX takes the optimizer's variables away while the model computes.
        raise ValueError(
            "`seed` must be a number that the step is traced with. Got the variable "
            f"{seed.path!r}, whose value Keras gives no model that it trains on JAX: count steps "
            "with attn_core.backends.keras.Steps, on every backend alike."
        ) from error


def hidden_dropout(
    x: Array, rate: float, seed: Any, site: int, positions: Array, training: Any
) -> Array:
    """x (B, T, C) with entries dropped by position and channel; x itself in evaluation."""
    drop = weights_dropout(rate, seed, site, training)
    if drop is None:
        return x
    batch, channels = ops.shape(x)[0], x.shape[2]
    kept = room().keep(drop_threshold(rate), drop.seed, batch, 1, positions, channels)[:, 0]
    return ops.where(kept, x * (1 / (1 - rate)), ops.zeros_like(x))
