"""What the tests of Keras' room need of the backend that Keras runs on, in one voice."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np

from attn_core.backends.keras.portable import variable
from attn_core.backends.keras.tensors import room

BACKEND = keras.backend.backend()


def tensor(x: Any) -> Any:
    """NumPy as tensors, dtype for dtype."""
    return room().from_numpy(x) if isinstance(x, np.ndarray) else x


def tensors(given: dict[str, Any], dtype: Any = None) -> dict[str, Any]:
    made = {n: tensor(x) for n, x in given.items()}
    if dtype is not None and "bias" in made:
        made["bias"] = keras.ops.cast(made["bias"], dtype)
    return made


def array(x: Any) -> np.ndarray:
    # Of torch's tensors Keras asks NumPy for a copy in a way that NumPy deprecates.
    return np.asarray(room().to_numpy(x))


def wide() -> Any:
    """Where float64 may be made: JAX has to be asked."""
    if BACKEND != "jax":
        return nullcontext()
    from attn_core.backends.jax.arrays import x64

    return x64(True)


def gradients(layer: Any, leaves: list[Any], pull: np.ndarray, **options: Any) -> dict[Any, Any]:
    """Of sum(pull * layer(*leaves)), by name of weight and number of leaf, and "out".

    Leaves of integers have none.
    """
    names = {id(variable(layer, name)): name for name in layer.plan}
    held = layer.trainable_variables
    assert [names[id(v)] for v in held]
    assert len(held) == len(layer.plan)
    moving = [n for n, x in enumerate(leaves) if "float" in str(x.dtype)]

    def loss(weights: Any, inputs: list[Any], stateless: bool) -> Any:
        given = list(leaves)
        for n, x in zip(moving, inputs, strict=True):
            given[n] = x
        if stateless:
            out, _ = layer.stateless_call(weights, [], *given, **options)
        else:
            out = layer(*given, **options)
        return keras.ops.sum(tensor(pull) * out), out

    inputs = [leaves[n] for n in moving]
    if BACKEND == "jax":
        import jax

        values = [v.value for v in held]
        (_, out), found = jax.value_and_grad(
            lambda w, x: loss(w, x, True), argnums=(0, 1), has_aux=True
        )(values, inputs)
    elif BACKEND == "torch":
        import torch

        inputs = [x.detach().requires_grad_() for x in inputs]
        total, out = loss(None, inputs, False)
        flat = torch.autograd.grad(total, [*[v.value for v in held], *inputs])
        found, out = (flat[: len(held)], flat[len(held) :]), out.detach()
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            total, out = loss(None, inputs, False)
        found = tape.gradient(total, ([v.value for v in held], inputs))
    by_name = {names[id(v)]: array(_dense(g)) for v, g in zip(held, found[0], strict=True)}
    by_name |= {n: array(g) for n, g in zip(moving, found[1], strict=True)}
    return {**by_name, "out": array(out)}


def _dense(x: Any) -> Any:
    """TensorFlow's gradient of a table that is looked up in is a list of slices."""
    if not hasattr(x, "indices") or BACKEND != "tensorflow":
        return x
    import tensorflow as tf

    return tf.convert_to_tensor(x)


class Traced:
    """A function as the backend compiles it, and how often its Python has run."""

    def __init__(self, function: Any) -> None:
        self.count = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return function(*args, **kwargs)

        if BACKEND == "jax":
            import jax

            self.call = jax.jit(counted)
        elif BACKEND == "torch":
            import torch
            from torch._dynamo.testing import CompileCounter

            self.counter = CompileCounter()
            torch._dynamo.reset()
            self.call = torch.compile(function, fullgraph=True, backend=self.counter)
        else:
            import tensorflow as tf

            self.call = tf.function(counted, reduce_retracing=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if BACKEND != "torch":
            return self.call(*args, **kwargs)
        import torch

        with torch.no_grad():
            return self.call(*args, **kwargs)

    @property
    def traces(self) -> int:
        return self.counter.frame_count if BACKEND == "torch" else self.count
