"""attn_core for TensorFlow: eager, tf.function with unknown B, Tq and Tk, XLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import isfunction
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

import attn_core
from attn_core.api import attention
from attn_core.backends.tf import accounts, chunked, reference
from attn_core.backends.tf.documents import attention_module, scaled_dot_product_attention
from attn_core.backends.tf.philox import keep
from attn_core.language.operands import Table
from attn_core.language.values import Score
from attn_core.spec import Account, AttentionOutput, Facts, Operands, Plan, Problem, as_output

if TYPE_CHECKING:  # what __getattr__ loads, for editors and type checkers
    from attn_core.backends.keras.additive import AdditiveAttention
    from attn_core.backends.keras.layers import MultiHeadAttention
    from attn_core.backends.keras.models import Transformer

__all__ = [
    "AdditiveAttention",
    "MultiHeadAttention",
    "Transformer",
    "attention_module",
    "keep",
    "scaled_dot_product_attention",
]

NAME = "tf"
IMPLEMENTATIONS = ("chunked", "reference")
FORMS = ("eager", "function", "dynamic", "xla")

_HANDLERS = {"chunked": chunked.attend, "reference": reference.attend}


def _leave_alone(functions: list[Any]) -> None:
    """Mark functions as AutoGraph marks what it does not rewrite.

    A tf.function rewrites what it calls, and what that calls. Here that takes seconds, warns, and
    changes nothing: no Python decision depends on a tensor.
    """
    for function in functions:
        if isfunction(function):
            function.autograph_info__ = None  # type: ignore[attr-defined]


for _module in (attn_core, attn_core.masks, attn_core.scores):
    _leave_alone([getattr(_module, name) for name in _module.__all__])
_leave_alone([attention_module, scaled_dot_product_attention])


def __getattr__(name: str) -> Any:
    """Layers, which are those of Keras and imported when they are first spoken of.

    Raises:
        ImportError: Keras runs on another framework in this process, and so would the layers.
    """
    if name not in ("AdditiveAttention", "MultiHeadAttention", "Transformer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from attn_core.backends import keras as room

    runs_on = room.backend()
    if runs_on != "tensorflow":
        raise ImportError(
            "layers of backend 'tf' must find Keras running on TensorFlow. Got "
            f"KERAS_BACKEND={runs_on}: set it to tensorflow before Keras is imported, or take "
            f"attn_core.backends.keras.{name}, which computes there."
        )
    return getattr(room, name)


def __dir__() -> list[str]:
    """With the layers that `__getattr__` loads, for completion."""
    return sorted({*globals(), *__all__})


def owns(x: Any) -> bool:
    return isinstance(x, (tf.Tensor, tf.Variable))


def describe(x: Any, name: str = "an array") -> Facts:
    """Facts of a tensor or variable; sizes that a tf.function does not know are None."""
    if x.shape.rank is None:
        raise ValueError(
            f"{name} must have a known rank when the call is traced; only B, Tq and Tk may be "
            "unknown. Got one of unknown rank: say its shape with tf.ensure_shape."
        )
    return Facts(tuple(x.shape), x.dtype.name, _device(x))


def tracing() -> bool:
    """tf.function records operations, and runs this Python code as it is."""
    return False


def admit(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """TensorFlow has no autocast: Keras policies cast in its layers."""
    return query, key, value


def refusals(problem: Problem, impl: str) -> list[str]:
    if impl == "native":
        return ["TensorFlow has no fused attention of its own. chunked answers every problem."]
    if impl not in IMPLEMENTATIONS:
        return [f"`impl` must be one of {', '.join(IMPLEMENTATIONS)} in backend tf. Got {impl}."]
    reasons = []
    if (problem.precision, problem.dtype, problem.device) == ("highest", "float32", "gpu"):
        switch = tf.config.experimental.tensor_float_32_execution_enabled()
        if switch:
            reasons.append(
                '`precision="highest"` needs '
                "tf.config.experimental.enable_tensor_float_32_execution(False), "
                f"which is the caller's to set. Got {switch}."
            )
    return reasons


def ranked(problem: Problem) -> tuple[str, ...]:
    return IMPLEMENTATIONS


def account(problem: Problem, impl: str) -> Account:
    return accounts.account(problem, impl)


def attend(plan: Plan, operands: Operands) -> AttentionOutput:
    problem = plan.problem
    if problem.host:
        if not tf.executing_eagerly():
            raise TypeError(
                "`query` must be a tensor inside a tf.function, where NumPy arrays cannot be given "
                "back. Got one of numpy: convert it with tf.constant."
            )
        with tf.device("CPU:0"):
            output = _HANDLERS[plan.impl](problem, _tensors(problem, operands))
        return AttentionOutput(*[None if x is None else to_numpy(x) for x in output])
    return _HANDLERS[plan.impl](problem, _tensors(problem, operands))


def vjp(
    arguments: dict[str, Any],
    cotangents: dict[str, Any],
    form: str = "eager",
    function: Callable[..., Any] = attention,
) -> tuple[AttentionOutput, dict[str, Any]]:
    """Outputs of `function(**arguments)`, and the gradients that `cotangents` pull back.

    cotangents maps "out", "lse", "weights" to arrays; gradients come back by argument name, those
    of a score's operands as a tuple under "score". `form` is one of FORMS: eager, tf.function,
    tf.function with sizes unknown wherever that is legal, or tf.function(jit_compile=True).
    """
    return pullback(arguments, cotangents, form, function)(arguments, cotangents)


def pullback(
    arguments: dict[str, Any],
    cotangents: dict[str, Any],
    form: str = "eager",
    function: Callable[..., Any] = attention,
) -> Callable[[dict[str, Any], dict[str, Any]], tuple[AttentionOutput, dict[str, Any]]]:
    """`vjp` as a function of arguments and cotangents, traced once: from these.

    What it is called with may differ from these in the values of tensors, and in whichever sizes
    the form does not know.
    """
    leaves = _leaves(arguments)
    flat = tf.nest.flatten(leaves)
    moving = [i for i, x in enumerate(flat) if isinstance(x, tf.Tensor)]

    def call(tensors: list[Any], pulled: list[Any]) -> tuple[AttentionOutput, list[Any]]:
        filled = list(flat)
        for i, tensor in zip(moving, tensors, strict=True):
            filled[i] = tensor
        packed = tf.nest.pack_sequence_as(leaves, filled)
        with tf.GradientTape() as tape:
            inputs = list(_differentiable(packed).values())
            tape.watch(inputs)
            output = as_output(function(**packed))
            results = [getattr(output, name) for name in cotangents]
        zero = tf.UnconnectedGradients.ZERO
        return output, tape.gradient(results, inputs, pulled, unconnected_gradients=zero)

    run: Any = call
    if form == "dynamic":
        names = tf.nest.flatten(
            {name: tf.nest.map_structure(lambda _, n=name: n, x) for name, x in leaves.items()}
        )
        run = tf.function(
            call,
            autograph=False,
            input_signature=(
                [_spec(leaves, names[i], flat[i]) for i in moving],
                [tf.TensorSpec([None] * g.shape.rank, g.dtype) for g in cotangents.values()],
            ),
        )
    elif form != "eager":
        run = tf.function(call, autograph=False, jit_compile=form == "xla")
    if form != "eager":
        # Called by itself, a concrete function is not suspected of being retraced in a loop.
        run = run.get_concrete_function([flat[i] for i in moving], list(cotangents.values()))

    def answer(
        arguments: dict[str, Any], cotangents: dict[str, Any]
    ) -> tuple[AttentionOutput, dict[str, Any]]:
        given = tf.nest.flatten(_leaves(arguments))
        output, found = run([given[i] for i in moving], list(cotangents.values()))
        by_name = dict(zip(_differentiable(leaves), found, strict=True))
        gradients = {name: g for name, g in by_name.items() if isinstance(name, str)}
        if leaves.get("score") is not None:
            tables = range(len(leaves["score"].arrays))
            gradients["score"] = tuple([by_name.get(i) for i in tables])
        return output, gradients

    return answer


def from_numpy(x: Any) -> Any:
    """A tensor of the same dtype; NumPy's bfloat16 is ml_dtypes'."""
    return tf.constant(x)


def to_numpy(x: Any) -> Any:
    return np.asarray(x.numpy())


def outline(function: Callable[..., Any], shapes: Sequence[Sequence[int]], dtype: str) -> Any:
    """What `function` says of tensors of these shapes: it is traced with them."""
    found: list[Any] = []

    def call(*tensors: Any) -> None:
        found.append(function(*tensors))

    given = [tf.TensorSpec(shape, dtype) for shape in shapes]
    tf.function(call, autograph=False).get_concrete_function(*given)
    return found[0]


def known(x: Any) -> bool:
    """Whether the values of a tensor can be read: it is no part of a graph."""
    return hasattr(x, "numpy")


def take(x: Any, index: Sequence[int], axis: int) -> Any:
    """Entries of an axis, by host ints."""
    return tf.gather(x, tf.constant(index, tf.int32), axis=axis)


def _leaves(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with the arrays of a score as tensors."""
    score = arguments.get("score")
    if score is None:
        return dict(arguments)
    wide = "float64" if arguments["query"].dtype == tf.float64 else "float32"
    arrays = [a.numpy(wide) if isinstance(a, Table) else a for a in score.arrays]
    arrays = [from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays]
    return arguments | {"score": Score(score.tree, tuple(arrays))}


def _differentiable(arguments: dict[str, Any]) -> dict[Any, Any]:
    """The inputs that have gradients: by argument name, operands of the score by number."""
    names = ("query", "key", "value", "bias", "sinks", "slopes")
    found: dict[Any, Any] = {n: arguments[n] for n in names if arguments.get(n) is not None}
    if arguments.get("score") is not None:
        tables = enumerate(arguments["score"].arrays)
        found |= {i: t for i, t in tables if t.dtype.is_floating}
    return found


def _spec(arguments: dict[str, Any], name: str, x: Any) -> tf.TensorSpec:
    """The argument's shape with every size unknown that may be."""
    if name == "dropout":
        return tf.TensorSpec(x.shape, x.dtype)
    if name not in ("query", "key", "value"):
        return tf.TensorSpec([None] * x.shape.rank, x.dtype)
    shape: list[int | None] = list(x.shape)
    shape[0] = None
    trees = [getattr(arguments.get(kind), "tree", None) for kind in ("mask", "score")]
    reads = any(tree is not None and tree.reads("q") for tree in trees)
    if arguments.get("query_offset") is not None or not reads:
        shape[1 if arguments.get("layout") == "BTHD" else 2] = None
    return tf.TensorSpec(shape, x.dtype)


def _device(x: Any) -> str:
    """Kind of device; what a graph leaves open goes to a GPU where there is one."""
    if x.device:
        return str(tf.DeviceSpec.from_string(x.device).device_type or "cpu").lower()
    return "gpu" if tf.config.list_logical_devices("GPU") else "cpu"


def _tensors(problem: Problem, operands: Operands) -> Operands:
    """What is on the host, as tensors; variables as their values."""

    def tensor(x: Any) -> Any:
        if isinstance(x, tuple):
            return tf.constant(x, tf.int64)
        if isinstance(x, Table):
            return from_numpy(x.numpy(problem.accumulation))
        if isinstance(x, tf.Variable):
            return tf.convert_to_tensor(x)
        return from_numpy(x) if isinstance(x, np.ndarray) else x

    return operands.map_host(tensor)
