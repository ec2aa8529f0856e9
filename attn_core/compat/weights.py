"""Weights of other libraries' layers in our plan: names, matrices (in, out), heads slowest.

A converter reads a layer of its library, and gives the AttentionConfig that says the same, with the
arrays under the names of `attn_core.model.parameters`:

    config, weights = from_multihead_attention(module)
    layer = attn_core.build(config)
    layer.load_weights(weights)

Where the original says something of a call (causal or not), or ours can say more, fields of the
config may be given by name: `from_multihead_attention(module, causal=True, backend="jax")`. What
the original computes and no field says is refused, before anything is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np

from attn_core.model.config import AttentionConfig
from attn_core.model.parameters import parameters
from attn_core.model.weights import checked


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
    given = {"dtype": dtypes.pop(), **fields, **changes}
    config = AttentionConfig.load({name: x for name, x in given.items() if x is not None})
    weights = {name: np.array(x, order="C") for name, x in held.items()}
    plan = parameters(config)
    return Converted(config, checked(plan, weights, dict.fromkeys(plan, config.dtype)))


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
