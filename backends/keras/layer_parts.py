"""What layers and models of Keras are made of: projections, norms, angles, what is dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from os import PathLike
from typing import Any

import keras
import numpy as np
from keras import ops

from attn_core import registry
from attn_core.language.text import parse, text
from attn_core.language.values import Dropout, Mask, Score, drop_threshold
from attn_core.model import calls
from attn_core.model.initial import initial
from attn_core.model.parameters import Plan, parameters
from attn_core.model.positions import LOW, TURN, wheel
from attn_core.model.seeds import MIX, key, step_seed
from attn_core.model.weights import check_held, weights_for
from attn_core.model.words import arguments, check_words

Array = Any

# Keras has given these names to something else: parts of the plan that bear them are held aside.
TAKEN = {"input": "input_part", "output": "output_part"}


def room() -> Any:
    """The backend of attn_core whose arrays are those of Keras' backend."""
    name = keras.backend.backend()
    return registry.load({"tensorflow": "tf"}.get(name, name))


class Portable(keras.layers.Layer):
    """A layer whose weights are those of a plan, named as there, matrices (in, out).

    Keras casts none of its arguments: projections and norms cast what they are given, as those of
    Keras do, and a cache keeps its own dtype.
    """

    config: Any
    plan: Plan
    words: tuple[str, ...]
    # A tf.function runs layers as they are: AutoGraph has nothing to rewrite in them.
    autograph_info__ = None

    def __init__(
        self, config: Any, policy: Any, *, name: str | None = None, trainable: bool = True
    ) -> None:
        super().__init__(name=name, trainable=trainable, dtype=policy, autocast=False)
        self._convert_input_args = False
        self.config = config
        self.keep(plan=parameters(config))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.words = ("mask", *arguments(cls.call))

    def keep(self, **facts: Any) -> None:
        """Set attributes that Keras and its backend are not to see.

        They put containers of their own in the place of dictionaries and tuples.
        """
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)

    def export_weights(self) -> dict[str, np.ndarray]:
        """The weights under their neutral names, matrices (in, out): copies, NumPy.

        Raises:
            ValueError: a part is no longer the plan's.
        """
        read = room().to_numpy
        return {
            name: np.array(read(ops.convert_to_tensor(held)), order="C")
            for name, held in self._variables_of_plan().items()
        }

    def load_weights(self, source: str | PathLike[str] | Mapping[str, Any]) -> None:
        """Set every weight, from a file of any framework or a mapping of neutral names to arrays.

        Raises:
            ValueError, TypeError: a weight is missing, unknown, of another shape or wider dtype,
                or the file is damaged or another model's, or a part is no longer the plan's;
                nothing has been set.
        """
        self._variables_of_plan()
        self._set(weights_for(self.config, self.plan, source))

    def get_parameter(self, name: str) -> Any:
        """The keras.Variable of that name."""
        return variable(self, name)

    def initialise(self, seed: int) -> None:
        """First values: a function of the seed, the same in every framework."""
        self._set(initial(self.plan, seed))
        self.built = True

    def _set(self, weights: dict[str, np.ndarray]) -> None:
        make = room().from_numpy
        for name, held in self._variables_of_plan().items():
            held.assign(ops.cast(make(weights[name]), held.dtype))

    def _variables_of_plan(self) -> dict[str, Any]:
        """Name -> variable, every one of them found to be the plan's."""
        found = {}
        for name, (shape, _) in self.plan.items():
            try:
                found[name] = variable(self, name)
            except AttributeError:
                found[name] = None
            check_held(name, getattr(found[name], "shape", None), shape)
        return found


@keras.saving.register_keras_serializable(package="attn_core")
class Leaf:
    """A Mask or Score on its way through Keras, which would look for tensors within.

    Keras saves a graph with the arguments of its calls: a mask is saved as its text.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def get_config(self) -> dict[str, Any]:
        if not isinstance(self.value, Mask) or self.value.arrays:
            raise ValueError(
                "a graph that is saved must hold no score and no mask with arrays in its calls, "
                "only masks that are a text: give such a one to the model as an input, or to the "
                f"layer's config. Got {self.value!r}."
            )
        return {"mask": text(self.value.tree)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Leaf:
        return cls(Mask(parse(config["mask"])))


def leaf(x: Any) -> Any:
    """An argument as Keras is to see it: NumPy's arrays as tensors."""
    return Leaf(x) if isinstance(x, (Mask, Score)) else tensor(x)


def bare(x: Any) -> Any:
    """The argument again."""
    return x.value if isinstance(x, Leaf) else x


def check_graph(seed: Any = None, **given: Any) -> None:
    """What a call of KerasTensors hands on to the call of tensors: no tensor of theirs is within.

    Keras puts tensors in the place of arguments that are KerasTensors, and looks into no Mask.
    """
    if isinstance(seed, keras.KerasTensor):
        raise ValueError(
            "`seed` must be a number in a graph of KerasTensors, or an array that is known when it "
            "is built: an Input has a batch, and a seed has none. Got a KerasTensor."
        )
    for name, x in given.items():
        arrays = x.value.arrays if isinstance(x, Leaf) else ()
        if any(isinstance(array, keras.KerasTensor) for array in arrays):
            raise ValueError(
                f"`{name}` must hold arrays that are known when a graph of KerasTensors is built. "
                "Got one of KerasTensors: give a boolean array of allowed pairs as `mask` itself, "
                "`kv_lengths` or a `bias`, or build the rule in the `call` of a layer of your own."
            )


def with_mask(options: dict[str, Any], mask: Any) -> dict[str, Any]:
    """The options of a call with its `mask` as `attention_mask`.

    Keras writes a mask of padding down as `mask` where a call has an argument of that name, and
    gives it to that name again: so no `call` here has one.
    """
    if mask is not None and options.get("attention_mask") is not None:
        raise ValueError(
            "`mask` and `attention_mask` must not both be given: they are two names of one "
            "argument. Got both."
        )
    mask = options.pop("attention_mask", None) if mask is None else mask
    return options if mask is None else {**options, "attention_mask": leaf(mask)}


def padding_of(x: Any) -> Any:
    """The mask of padding that Keras has put on a tensor, boolean (B, T); None without one.

    Keras hands it to `query_mask` itself, but where query is the only tensor of a call.
    """
    return getattr(x, "_keras_mask", None)


def in_our_words(call: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's `__call__`, which says of what `call` does not take how that is called here."""

    @wraps(call)
    def checked(self: Portable, *args: Any, **options: Any) -> Any:
        check_words(type(self).__name__, self.words, options)
        return call(self, *args, **options)

    return as_is(checked)


def as_is(method: Any) -> Any:
    """Mark a method as AutoGraph marks what it does not rewrite."""
    method.autograph_info__ = None
    return method


def variable(layer: Any, name: str) -> Any:
    """The variable, or the part, of that name."""
    for word in name.split("."):
        layer = getattr(layer, TAKEN.get(word, word))
    return layer


def opened(kind: Any, config: Any, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """A config and Keras' policy, which agree in the dtype of the weights.

    A `dtype` that is given says both. Left out, the config says the first, and the global policy
    the second where its variables are of that dtype.
    """
    if dtype is not None:
        policy = keras.dtype_policies.get(dtype)
        config = kind.of(config, **options, dtype=policy.variable_dtype)
    else:
        config, policy = kind.of(config, **options), keras.config.dtype_policy()
        if policy.variable_dtype != config.dtype:
            policy = keras.dtype_policies.DTypePolicy(config.dtype)
    if getattr(policy, "quantization_mode", None) is not None:
        raise ValueError(
            "`dtype` must be a policy of floats: these layers have no quantised form. "
            f"Got {policy.name!r}."
        )
    if config.dtype == "float64":
        _check_float64(config)
    return config, policy


def check_float64() -> Array:
    """One float64: Keras must not narrow it on the way, which it does with JAX."""
    made = ops.convert_to_tensor(np.zeros((), np.float64))
    if dtype_of(made) != "float64":
        raise ValueError(
            '`dtype` must not be "float64" where JAX holds none: jax.config.update('
            '"jax_enable_x64", True) is the caller\'s to set. Got float64.'
        )
    return made


def _check_float64(config: Any) -> None:
    """Keras must not narrow it, nor what is computed of it."""
    made = check_float64()
    turns = getattr(config, "positions", None) in ("rotary", "sinusoidal")
    if turns and dtype_of(ops.cos(made)) != "float64":
        raise ValueError(
            f'`dtype` must not be "float64" with positions={config.positions!r}: on this backend '
            "Keras computes cos and sin in float32. Got float64."
        )


def product(x: Array, weight: Array) -> Array:
    """x W; of float64 Keras' own product is float32 on torch."""
    return x @ weight if dtype_of(x) == "float64" else ops.matmul(x, weight)


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


def mean(x: Array) -> Array:
    """Over the last axis, which stays; Keras' own of float64 is float32 on torch."""
    return ops.sum(x, -1, keepdims=True) / x.shape[-1]


# TensorFlow's gelu has its constants in float32, whatever the dtype.
ACTIVATIONS = {
    "relu": ops.relu,
    "gelu": lambda x: x * 0.5 * (1.0 + ops.erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: (
        x * 0.5 * (1.0 + ops.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))
    ),
    "silu": ops.silu,
}


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


def merged(x: Array) -> Array:
    """(.., a, b) as (.., a b)."""
    return ops.reshape(x, (*ops.shape(x)[:-2], x.shape[-2] * x.shape[-1]))


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
