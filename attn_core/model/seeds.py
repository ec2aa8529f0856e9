"""Seeds: one for each step of training, and a stream of its own for each place that drops.

Whoever trains counts steps and passes `seed=step`, an int or an integer scalar of the framework.
Every place in a model where something is dropped has a static number, its *site*, in the order of
`sites`; a layer on its own has site 0. A seed is taken mod 2**64, as `attn_core.Dropout` takes it,
and is read whole. With seed = high * 2**32 + low the key of Philox is

    (low, (high * MIX + site) mod 2**32)

so the same step drops the same entries in every framework, and no two places share a stream. Below
2**32 that is (seed, site); above, seeds that differ in `high` by little lie many sites apart.

Attention weights are dropped as `attn_core.Dropout` says. A hidden entry x[b, i, c] at position
p = i + offset[b] is kept by the same rule, read at batch b, head 0, query p and key c, and divided
by 1 - rate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_core.model.transformer import TransformerConfig

MIX = 0x6A09E667
"""The square root of 2 in 31 bits, odd: times 32 bits, and a site added, it stays in an int64."""


def sites(config: TransformerConfig) -> dict[str, int]:
    """The number of each place that drops: "encoder.embedding", "decoder.0.cross.weights", .."""
    names = []
    for stack in config.stacks:
        names.append(f"{stack}.embedding")
        for i in range(config.blocks(stack)):
            parts = ("attention", "cross") if config.crosses(stack) else ("attention",)
            for part in parts:
                names += [f"{stack}.{i}.{part}.weights", f"{stack}.{i}.{part}"]
            names.append(f"{stack}.{i}.feed")
    return {name: number for number, name in enumerate(names)}


def step_seed(seed: Any) -> Any:
    """The seed of a step, if it is one: host words (low, high), or an integer scalar array.

    Raises:
        ValueError: there is none, or an array that is no scalar.
        TypeError: it is no integer.
    """
    if seed is None:
        raise ValueError(
            "`seed` must be given in training with dropout, a number that differs from step to "
            "step, as in `layer(x, seed=step)`: nothing here draws from a global generator. Within "
            "Keras' `fit`, attn_core.backends.keras.Steps counts them. Got none. In evaluation "
            "nothing is dropped and no seed is needed: call `.eval()` (in Keras pass "
            "`training=False`), also before `make_cache(..., source=)` and `generate`."
        )
    if isinstance(seed, np.ndarray) and seed.shape == ():
        seed = seed[()]
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        return (int(seed) % 2**32, int(seed) // 2**32 % 2**32)
    if not hasattr(seed, "dtype") or "int" not in str(seed.dtype):
        raise TypeError(
            f"`seed` must be an int or an integer scalar array. Got {type(seed).__name__}."
        )
    if tuple(seed.shape) != ():
        raise ValueError(
            f"`seed` must be one number for the whole step. Got shape {tuple(seed.shape)}."
        )
    return seed


def key(words: tuple[Any, Any], site: int) -> tuple[Any, Any]:
    """The key of Philox at a site, from a seed's words: host ints, or arrays that hold 64 bits."""
    low, high = words
    return low, (high * MIX + site) & 0xFFFFFFFF
