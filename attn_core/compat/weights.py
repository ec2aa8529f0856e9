"""Weights of other libraries' layers in our plan: names, matrices (in, out), heads slowest.

A converter reads a layer of its library, and gives the AttentionConfig that says the same, with the
arrays under the names of `attn_core.model.parameters`:

    config, weights = from_multihead_attention(module)
    layer = attn_core.build(config)
    layer.load_weights(weights)

Fields of the config may be given by name, `from_multihead_attention(module, causal=True,
backend="jax")`: those that change no meaning of weights (dropout, dtype, backend, impl), and, where
the layer itself hides nothing so, those that hide what a call's mask could (causal, window, mask).
One that gainsays what the layer computes is refused, and so is, before anything is made, what the
original computes and no field says.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from attn_core.model.config import AttentionConfig, Config
from attn_core.model.parameters import parameters
from attn_core.model.weights import FREE, checked

HIDING = ("causal", "window", "mask")
"""Fields that hide what a call's own mask could, of a layer that does not hide so itself."""

Kind = TypeVar("Kind", bound=Config)


class Converted(NamedTuple):
    """A layer in our terms.

    Attributes:
        config: what the layer computes.
        weights: name -> NumPy array, copies, for `load_weights` and `save_weights`.
    """

    config: AttentionConfig
    weights: dict[str, np.ndarray]


def converted(
    fields: dict[str, Any], arrays: dict[str, np.ndarray | None], changes: dict[str, Any]
) -> Converted:
    """Config and weights, checked against one another; a None among the arrays is not there."""
    held = {name: x for name, x in arrays.items() if x is not None}
    dtypes = {x.dtype.name for x in held.values()}
    if len(dtypes) != 1:
        raise TypeError(
            f"the weights of a layer must share one dtype. Got {', '.join(sorted(dtypes))}."
        )
    config = with_changes(AttentionConfig, {"dtype": dtypes.pop(), **fields}, changes)
    weights = {name: np.array(x, order="C") for name, x in held.items()}
    plan = parameters(config)
    return Converted(config, checked(plan, weights, dict.fromkeys(plan, config.dtype)))


def with_changes(kind: type[Kind], fields: dict[str, Any], changes: dict[str, Any]) -> Kind:
    """The config of an original, with fields given by name on top.

    Raises:
        ValueError: one gainsays the original.
    """
    silent = [name for name in HIDING if fields.get(name) is None or fields[name] is False]
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    free = [name for name in (*FREE, *silent) if name in known]
    allowed = {name: x for name, x in changes.items() if name in free}
    own, config = [
        kind.load({name: x for name, x in {**fields, **given}.items() if x is not None})
        for given in (allowed, changes)
    ]
    apart = own.differences(config, ())
    if apart:
        raise ValueError(
            "fields given to a converter must say what the original computes, but for "
            f"{', '.join(free)}. Got others, which differ (the original's, the given): "
            f"{'; '.join(apart)}."
        )
    return config


def projection(kernel: np.ndarray) -> np.ndarray:
    """(E, H, D) as (E, H D)."""
    return kernel.reshape(kernel.shape[0], -1)


def flat(bias: np.ndarray | None) -> np.ndarray | None:
    """(H, D) as (H D)."""
    return None if bias is None else bias.reshape(-1)


def output(kernel: np.ndarray) -> np.ndarray:
    """(H, D, out) as (H D, out)."""
    return kernel.reshape(-1, kernel.shape[-1])


def refuse(source: str, option: str, got: Any, why: str) -> NoReturn:
    raise ValueError(f"`{option}` of {source} must be left out: {why}. Got {got!r}.")
