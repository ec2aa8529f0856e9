"""Run by itself: how many MiB one training step of additive attention holds at most.

It prints a line for each form that Keras' backend has. All pairs of the step are 256 MiB. What the
process once held hides nothing: TensorFlow's pool and XLA are asked, and of torch's step the kernel
keeps a mark of its own, as attn_core.benchmarks.memory says, whose `ALLOCATOR` must be set.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np

from attn_core.backends.keras import AdditiveAttention
from attn_core.benchmarks import memory

ROWS = 1024
LAYER = AdditiveAttention(width=64)


def loss(x: Any) -> Any:
    return keras.ops.sum(LAYER(x, x) ** 2)


def tensorflow() -> dict[str, int]:
    import tensorflow as tf

    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = loss(x)
        return tape.gradient(total, [x, *[v.value for v in LAYER.trainable_variables]])

    def reset() -> int:
        tf.config.experimental.reset_memory_stats("CPU:0")
        return int(tf.config.experimental.get_memory_info("CPU:0")["current"])

    def most() -> int:
        return int(tf.config.experimental.get_memory_info("CPU:0")["peak"])

    spec, x = [tf.TensorSpec([None, None, 64])], given(ROWS)
    forms: dict[str, Callable[[Any], Any]] = {
        "eager": run,
        "function": tf.function(run),
        "dynamic": tf.function(run, input_signature=spec),
    }
    return {n: memory.pooled(partial(form, x), 0, reset, most) for n, form in forms.items()}


def jax() -> dict[str, int]:
    import jax

    values = [v.value for v in LAYER.trainable_variables]

    def total(held: Any, x: Any) -> Any:
        out, _ = LAYER.stateless_call(held, [], x, x)
        return keras.ops.sum(out**2)

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(values, given(ROWS)).compile()
    return {"jit": compiled.memory_analysis().temp_size_in_bytes}


def torch() -> dict[str, int]:
    x = given(ROWS).requires_grad_()

    def run() -> None:
        x.grad = None
        loss(x).backward()

    return {"eager": memory.peak(run, 0)}


def given(rows: int) -> Any:
    x = np.random.default_rng(0).standard_normal((1, rows, 64)).astype(np.float32)
    return keras.ops.convert_to_tensor(x)


def main() -> None:
    measured = {"tensorflow": tensorflow, "jax": jax, "torch": torch}[keras.backend.backend()]()
    for form, size in measured.items():
        print(form, size / 2**20)


main()
