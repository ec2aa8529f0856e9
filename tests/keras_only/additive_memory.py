"""Run by itself: by how many MiB a process grows in one training step of additive attention.

It prints a line for each form that Keras' backend has. All pairs of the step are 1024 MiB.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from attn_core.backends.keras import AdditiveAttention

ROWS = 2048
LAYER = AdditiveAttention(width=64)


def loss(x: Any) -> Any:
    return keras.ops.sum(LAYER(x, x) ** 2)


def tensorflow() -> dict[str, Callable[..., Any]]:
    import tensorflow as tf

    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = loss(x)
        return tape.gradient(total, [x, *[v.value for v in LAYER.trainable_variables]])

    spec = [tf.TensorSpec([None, None, 64])]
    dynamic = tf.function(run, input_signature=spec)
    return {"eager": run, "function": tf.function(run), "dynamic": dynamic}


def jax() -> dict[str, Callable[..., Any]]:
    """Compiling takes more than running: what XLA reserves for the step is asked."""
    import jax

    values = [v.value for v in LAYER.trainable_variables]

    def total(held: Any, x: Any) -> Any:
        out, _ = LAYER.stateless_call(held, [], x, x)
        return keras.ops.sum(out**2)

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(values, given(ROWS)).compile()
    print("jit", compiled.memory_analysis().temp_size_in_bytes / 2**20)
    return {}


def torch() -> dict[str, Callable[..., Any]]:
    def run(x: Any) -> Any:
        x.requires_grad_()
        loss(x).backward()
        return x.grad

    return {"eager": run}


def given(rows: int) -> Any:
    x = np.random.default_rng(0).standard_normal((1, rows, 64)).astype(np.float32)
    return keras.ops.convert_to_tensor(x)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    forms = {"tensorflow": tensorflow, "jax": jax, "torch": torch}[keras.backend.backend()]()
    for form, run in forms.items():
        run(given(32))
        before = peak()
        run(given(ROWS))
        print(form, peak() - before)


main()
