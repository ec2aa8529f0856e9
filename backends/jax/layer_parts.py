"""What layers and models of JAX are made of: projections, norms, angles, what is dropped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_core.backends.jax import philox
from attn_core.backends.jax.arrays import DTYPES, is_wide, x64
from attn_core.backends.jax.meshes import embedded
from attn_core.language.values import Dropout, drop_threshold
from attn_core.model import calls
from attn_core.model import positions as places
from attn_core.model import rules as laws
from attn_core.model.positions import LOW, TURN
from attn_core.model.seeds import MIX, key, step_seed

Array = Any

# Made once for each config and held here, not in the modules: their state is their weights alone,
# and what is static in them hashes.
rules = functools.lru_cache(laws.rules)
wheel = functools.lru_cache(places.wheel)


def made(config: Any) -> dict[str, Any]:
    """Keyword arguments with which a parameter of a config is made."""
    return {"dtype": DTYPES[config.dtype]}


class Linear(nnx.Module):
    """y = x W + b in the dtype to which x and W promote, as nnx.Linear computes; W (in, out)."""

    def __init__(self, inner: int, outer: int, bias: bool, dtype: Any) -> None:
        self.weight = blank((inner, outer), dtype)
        self.bias = blank((outer,), dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        y = x @ self.weight[...]
        return y if self.bias is None else y + self.bias[...]


def blank(shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    """A parameter that is yet to be given its values."""
    with x64(dtype is jnp.float64):
        return nnx.Param(jnp.zeros(shape, dtype))


class Embedding(nnx.Module):
    """Rows of a table, by int index; where there is no such row, NaN: nobody can be told when."""

    def __init__(self, rows: int, width: int, **make: Any) -> None:
        self.weight = blank((rows, width), **make)

    def __call__(self, index: Array) -> Array:
        rows = self.weight.shape[0]
        return embedded(self.weight[...], jnp.where(index < 0, rows, index))


class Norm(nnx.Module):
    """Layer norm or RMS norm over the last axis, in float32 at least.

    layer   (x - mean) / sqrt(variance + epsilon) * scale + bias
    rms     x / sqrt(mean(x**2) + epsilon) * scale
    """

    def __init__(self, width: int, kind: str, bias: bool, epsilon: float, **make: Any) -> None:
        self.kind, self.epsilon = kind, epsilon
        self.scale = blank((width,), **make)
        self.bias = blank((width,), **make) if bias else None

    def __call__(self, x: Array) -> Array:
        wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.epsilon)
        wide = wide * self.scale[...].astype(wide.dtype)
        if self.bias is not None:
            wide = wide + self.bias[...].astype(wide.dtype)
        return wide.astype(x.dtype)


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def angles(words: np.ndarray, positions: Array, dtype: Any) -> Array:
    """Radians of every channel pair, (B, T, pairs), at int positions (B, T); see model.positions.

    Words are int32, whose products wrap.
    """
    high, low = words
    wrapped = positions[..., None] * high
    rest = positions[..., None].astype(dtype) * low.astype(dtype)
    return wrapped.astype(dtype) * TURN + rest * LOW


def rotated(x: Array, words: np.ndarray, positions: Array, pairs: str) -> Array:
    """Heads (B, T, H, D) turned by their positions (B or 1, T); the first channels turn."""
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    angle = angles(words, positions, dtype)[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    count = 2 * words.shape[1]
    part, rest = x[..., :count].astype(dtype), x[..., count:]
    if pairs == "half":
        a, b = jnp.split(part, 2, -1)
        part = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = part[..., 0::2], part[..., 1::2]
        part = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(part.shape)
    return jnp.concatenate([part.astype(x.dtype), rest], -1)


def sinusoidal(words: np.ndarray, positions: Array, dtype: Any) -> Array:
    """PE of int positions (B, T), (B, T, width): sines and cosines in turn, float32 at least."""
    angle = angles(words, positions, jnp.float64 if dtype == jnp.float64 else jnp.float32)
    both = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
    return both.reshape(*both.shape[:-2], 2 * words.shape[1]).astype(dtype)


def weights_dropout(rate: float, seed: Any, site: int, training: bool) -> Dropout | None:
    """The dropout of attention weights at a site; None in evaluation."""
    if not training or not rate:
        return None
    seed = step_seed(seed)
    if isinstance(seed, tuple):
        return Dropout(rate, key(seed, site))
    if not isinstance(seed, jax.Array):
        raise TypeError(f"`seed` must be an int or an array of JAX. Got {type(seed).__name__}.")
    low, high = philox.words(seed)
    return Dropout(rate, jnp.stack([low, high * np.uint32(MIX) + np.uint32(site)]))  # which wraps


def hidden_dropout(
    x: Array, rate: float, seed: Any, site: int, positions: Array, training: bool
) -> Array:
    """x (B, T, C) with entries dropped by position and channel; x itself in evaluation."""
    drop = weights_dropout(rate, seed, site, training)
    if drop is None:
        return x
    kept = philox.keep(drop_threshold(rate), drop.seed, x.shape[0], 1, positions, x.shape[2])[:, 0]
    return jnp.where(kept, x * (1 / (1 - rate)), 0.0)


def integers(name: str, given: Any) -> Array:
    """Host ints or an array as int32.

    What int32 does not hold is refused where it can be read, and else held at its ends.
    """
    if isinstance(given, int) or (isinstance(given, (list, tuple)) and all(map(known, given))):
        given = np.asarray(given)  # which jnp would narrow
    found = given if isinstance(given, np.ndarray) else jnp.asarray(given)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers. Got {found.dtype.name}.")
    if found.dtype.name in ("int64", "uint32", "uint64"):
        if known(found) and found.size:
            numbers = np.asarray(found)
            calls.check_int32(name, int(numbers.min()), int(numbers.max()))
        elif isinstance(found, jax.Array):
            least = 0 if found.dtype.name[0] == "u" else -(2**31)
            found = found.clip(least, 2**31 - 1)
    return jnp.asarray(found.astype(np.int32))


def indices(x: Array) -> Array:
    """The indices of the rows of x (B, T, ..), int32 (1, T)."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]


def shape(x: Array) -> tuple[int | None, ...]:
    """A shape in which a size that jax.export has not told is None."""
    return tuple([n if isinstance(n, int) else None for n in x.shape])


def on_host(x: Any) -> np.ndarray | None:
    """The values of an array that the host holds; None where it would have to wait for them."""
    if isinstance(x, np.ndarray):
        return x
    if not known(x) or not x.is_fully_addressable:
        return None
    return np.asarray(x) if all(d.platform == "cpu" for d in x.devices()) else None


def known(x: Array) -> bool:
    """Whether the values of an array can be read: nothing traces or transforms it."""
    return not isinstance(x, jax.core.Tracer)


def widened(method: Callable[..., Any]) -> Callable[..., Any]:
    """A module's method, under x64 where weights or arguments are of float64."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = jax.tree_util.tree_leaves((args, kwargs))
        with x64(self.config.dtype == "float64" or any(is_wide(x) for x in given)):
            return method(self, *args, **kwargs)

    return run
