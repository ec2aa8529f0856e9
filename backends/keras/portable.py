"""A layer of Keras whose weights are a plan's: named as there, in and out under those names."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import keras
import numpy as np
from keras import ops

from attn_core.backends.keras.tensors import check_float64, dtype_of, room
from attn_core.model.initial import initial
from attn_core.model.parameters import Plan, parameters
from attn_core.model.weights import check_held, weights_for
from attn_core.model.words import arguments

# Keras has given these names to something else: parts of the plan that bear them are held aside.
TAKEN = {"input": "input_part", "output": "output_part"}


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


def _check_float64(config: Any) -> None:
    """Keras must not narrow it, nor what is computed of it."""
    made = check_float64()
    turns = getattr(config, "positions", None) in ("rotary", "sinusoidal")
    if turns and dtype_of(ops.cos(made)) != "float64":
        raise ValueError(
            f'`dtype` must not be "float64" with positions={config.positions!r}: on this backend '
            "Keras computes cos and sin in float32. Got float64."
        )
