"""A module of torch whose weights are a plan's: named as there, in and out under those names."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch

from attn_core.model.initial import initial
from attn_core.model.parameters import Plan
from attn_core.model.weights import check_held, weights_for


class Portable(torch.nn.Module):
    """A module whose weights are those of a plan, named as there; a matrix is torch's (out, in).

    The names of `state_dict()` are the plan's too.
    """

    config: Any
    plan: Plan

    def export_weights(self) -> dict[str, np.ndarray]:
        """The weights under their neutral names, matrices (in, out): copies, NumPy.

        Raises:
            ValueError: a parameter is no longer the plan's.
        """
        from attn_core.backends.torch import to_numpy

        return {
            name: np.array(_turned(to_numpy(parameter), self.plan[name].kind), order="C")
            for name, parameter in self._parameters_of_plan().items()
        }

    def load_weights(self, source: str | PathLike[str] | Mapping[str, Any]) -> None:
        """Set every weight, from a file of any framework or a mapping of neutral names to arrays.

        Raises:
            ValueError, TypeError: a weight is missing, unknown, of another shape or wider dtype,
                or the file is damaged or another model's; a parameter is on the device "meta", or
                no longer the plan's; nothing has been set.
        """
        from attn_core.backends.torch import describe

        parameters = self._parameters_of_plan()
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(
                    f"`{name}` must be on a device that holds values: build the layer on one. "
                    "Got meta."
                )
        held = {name: describe(parameter).dtype for name, parameter in parameters.items()}
        self._set(weights_for(self.config, self.plan, source, held))

    def initialise(self, seed: int) -> None:
        """First values: a function of the seed, the same in every framework."""
        self._set(initial(self.plan, seed))

    def _set(self, weights: dict[str, np.ndarray]) -> None:
        from attn_core.backends.torch import from_numpy

        parameters = self._parameters_of_plan()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(from_numpy(_turned(weights[name], self.plan[name].kind)))

    def _parameters_of_plan(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter, every one of them found to be the plan's."""
        found = {}
        for name, (shape, kind) in self.plan.items():
            try:
                found[name] = self.get_parameter(name)
            except AttributeError:
                check_held(name, None, shape)
            held = tuple(found[name].shape)
            check_held(name, held[::-1] if kind == "matrix" else held, shape)
        return found


def _turned(array: np.ndarray, kind: str) -> np.ndarray:
    return array.T if kind == "matrix" else array
