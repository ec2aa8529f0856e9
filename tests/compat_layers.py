"""What the tests of converted weights share: both layers held to the plain float64 layer."""

from __future__ import annotations

from typing import Any

import layer_judge
import numpy as np

from attn_core.conformance.tolerance import share
from attn_core.model.weights import save_weights

FIELDS = (
    *("heads", "kv_heads", "qk_norm", "norm_epsilon", "positions", "rotary_base"),
    *("rotary_fraction", "rotary_pairs", "scale", "softcap", "gate", "causal", "window"),
)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def used(
    found: Any, results: dict[str, Any], *inputs: Any, alive: Any = None, **call: Any
) -> dict[str, float]:
    """Each layer's error as a share of what is allowed.

    Args:
        found: a Converted.
        results: outputs of the original, and of ours, by name.
        inputs: of the layer.
        alive: (B, Tq), rows that are compared; all where left out.
        call: `sees`, `kv_lengths` and so on of the judge.
    """
    options = {name: getattr(found.config, name) for name in FIELDS}
    judged = layer_judge.layer(options, found.weights, *inputs, **call)
    textbook = layer_judge.layer(options, found.weights, *inputs, dtype=np.float32, **call)
    keep = np.ones(judged.out.shape[:2], bool) if alive is None else np.asarray(alive, bool)
    return {
        name: share(
            *(np.asarray(out)[keep], judged.out[keep], textbook.out[keep]),
            *("float32", "out", judged.logit),
        )
        for name, out in results.items()
    }


def within(shares: dict[str, float]) -> bool:
    return all(x <= 1 for x in shares.values())


def written(found: Any, path: Any) -> None:
    """The weights are a file's, too: the names and shapes are those of the plan."""
    save_weights(path, found.weights, found.config)
    assert path.stat().st_size > 0
