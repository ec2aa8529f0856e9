"""A module of JAX whose weights are a plan's: named as there, in and out under those names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from os import PathLike
from typing import Any

import jax
import numpy as np
from flax import nnx

from attn_core.backends.jax.arrays import from_host
from attn_core.backends.jax.layer_parts import Array, known
from attn_core.model import parameters as plans
from attn_core.model.initial import initial
from attn_core.model.parameters import Plan
from attn_core.model.weights import check_held, weights_for

# Made once for each config and held here, not in the modules: their state is their weights alone,
# and what is static in them hashes.
parameters = functools.lru_cache(plans.parameters)


class Portable(nnx.Module):
    """A module whose weights are those of a plan, named as there, matrices (in, out).

    They alone are its state, so two modules of one config share a trace.
    """

    config: Any

    @property
    def plan(self) -> Plan:
        """Name -> Parameter."""
        return parameters(self.config)

    def export_weights(self) -> dict[str, np.ndarray]:
        """The weights under their neutral names, matrices (in, out): copies, NumPy.

        Raises:
            ValueError: a parameter is no longer the plan's.
        """
        from attn_core.backends.jax import to_numpy

        return {name: to_numpy(x[...]) for name, x in self._parameters_of_plan().items()}

    def load_weights(self, source: str | PathLike[str] | Mapping[str, Any]) -> None:
        """Set every weight, from a file of any framework or a mapping of neutral names to arrays.

        Raises:
            ValueError, TypeError: a weight is missing, unknown, of another shape or wider dtype,
                or the file is damaged or another model's; a parameter is no longer the plan's;
                nothing has been set.
        """
        held = {name: x.dtype.name for name, x in self._parameters_of_plan().items()}
        self._set(weights_for(self.config, self.plan, source, held))

    def initialise(self, seed: int) -> None:
        """First values: a function of the seed, the same in every framework."""
        self._set(initial(self.plan, seed))

    def get_parameter(self, name: str) -> nnx.Param:
        """The nnx.Param of that name."""
        found = self
        for word in name.split("."):
            found = getattr(found, word)
        return found

    def _set(self, weights: dict[str, np.ndarray]) -> None:
        for name, parameter in self._parameters_of_plan().items():
            x = np.asarray(weights[name]).astype(parameter.dtype)
            put(parameter, beside(parameter[...], from_host(x)))

    def _parameters_of_plan(self) -> dict[str, nnx.Param]:
        """Name -> parameter, every one of them found to be the plan's."""
        found = {}
        for name, (wanted, _) in self.plan.items():
            try:
                found[name] = self.get_parameter(name)
            except AttributeError:
                check_held(name, None, wanted)
            check_held(name, getattr(found[name], "shape", None), wanted)
        return found


def beside(held: Array, x: Array) -> Array:
    """x on the devices on which somebody has placed the array that it replaces."""
    if isinstance(held, jax.Array) and known(held) and held.committed:
        return jax.device_put(x, held.sharding)
    return x


def put(parameter: nnx.Param, x: Array) -> None:
    """Give a parameter another value."""
    if hasattr(parameter, "set_value"):
        parameter.set_value(x)
    else:
        parameter.value = x  # before Flax 0.12
