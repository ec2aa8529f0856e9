"""One attention with one meaning for PyTorch, TensorFlow, JAX and NumPy.

    import attn_core
    out = attn_core.attention(query, key, value, mask=attn_core.masks.causal())

query, key and value are (B, H, T, D) arrays of any of the four; the answer is an array of the
same. `docs/SPEC.md` says what every option means. Importing this package imports no framework.
"""

from typing import Any

from attn_core import backends, compat, config, masks, scores
from attn_core.api import attention, weights
from attn_core.config import use
from attn_core.explained import Report, explain
from attn_core.language.expr import cast, exp, log, maximum, minimum, row, tanh, where
from attn_core.language.operands import operand
from attn_core.language.values import Dropout, Mask, Score, mask, score
from attn_core.model.additive import AdditiveConfig
from attn_core.model.build import build
from attn_core.model.config import AttentionConfig
from attn_core.model.transformer import TransformerConfig
from attn_core.model.weights import load_weights, save_weights
from attn_core.registry import UnsupportedError
from attn_core.spec import AttentionOutput

__version__ = "0.1.0"

__all__ = [
    "AdditiveConfig",
    "AttentionConfig",
    "AttentionOutput",
    "Dropout",
    "Mask",
    "Report",
    "Score",
    "TransformerConfig",
    "UnsupportedError",
    "attention",
    "backends",
    "build",
    "cast",
    "compat",
    "config",
    "exp",
    "explain",
    "load_weights",
    "log",
    "mask",
    "masks",
    "maximum",
    "minimum",
    "operand",
    "row",
    "save_weights",
    "score",
    "scores",
    "tanh",
    "use",
    "weights",
    "where",
]


def __getattr__(name: str) -> Any:
    """`attn_core.conformance`, which is imported when it is first spoken of."""
    if name == "conformance":
        import attn_core.conformance as conformance

        return conformance
    raise AttributeError(f"module 'attn_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public, for completion: not the modules that it is made of."""
    return sorted([*__all__, "__version__", "conformance"])
