"""Mask, Score and Dropout as pytrees of JAX: they cross jit, vmap, grad and checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from attn_core.language.values import (
    Dropout,
    Mask,
    Score,
    flatten,
    rebuild_dropout,
    seed_array,
    unflatten,
)


def register() -> None:
    """Once, when the backend is loaded. The tree is static: another one traces anew."""
    for kind in (Mask, Score):
        jax.tree_util.register_pytree_node(
            kind,
            _split,
            lambda static, arrays, kind=kind: unflatten(kind, static, arrays),
        )
    jax.tree_util.register_pytree_node(Dropout, _flatten, _unflatten)


def _split(value: Mask | Score) -> tuple[tuple[Any, ...], Any]:
    arrays, static = flatten(value)
    return _checked(arrays), static


def _checked(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arrays, whose 64-bit integers JAX narrows without a look on their way into jit."""
    for array in arrays:
        if isinstance(array, np.ndarray) and array.dtype in (np.int64, np.uint64) and array.size:
            least, most = int(array.min()), int(array.max())
            if least < -(2**31) or most >= 2**31:
                raise ValueError(
                    "operands of a mask or score must fit int32, in which positions and ids are "
                    f"computed. Got values from {least} to {most}."
                )
    return arrays


def _flatten(dropout: Dropout) -> tuple[tuple[Any, ...], float]:
    # A host seed travels as an array of two words, so that a new one does not retrace.
    return (seed_array(dropout.seed),), dropout.rate


def _unflatten(rate: float, words: Any) -> Dropout:
    return rebuild_dropout(rate, words[0])
