"""Who can be asked, and in which room: a process whose libraries get on with each other.

torch and JAX share one, as their users do; TensorFlow has one of its own, because some versions of
Triton abort a process that imported TensorFlow first; and Keras, which reads its backend once, has
one to a backend, except that TensorFlow's is in TensorFlow's room.
"""

from __future__ import annotations

from typing import Any

from attn_core.benchmarks.calls import Call, Refused
from attn_core.benchmarks.cases import Case
from attn_core.config import nearest

FRAMEWORKS = ("torch", "jax", "tf", "onnxruntime")
PEERS = {
    "torch-sdpa": "torch",
    "torch-sdpa-flash": "torch",
    "torch-sdpa-math": "torch",
    "torch-flex": "torch",
    "jax-nn": "jax",
    "keras-torch": "torch",
    "keras-jax": "jax",
    "keras-tf": "tf",
    "onnxruntime": "onnxruntime",
    "matmul": "torch",
    "torch-floor": "torch",
    "jax-floor": "jax",
    "tf-floor": "tf",
}
"""The framework of every subject that is not ours."""

NO_ATTENTION = ("matmul", "torch-floor", "jax-floor", "tf-floor")
"""The ceiling and the floors give no answer that could be checked."""

_OURS = {"torch": "torch", "jax": "jax", "tf": "tf", "tf-unknown": "tf"}
_ROOMS = {"torch": "torch+jax", "jax": "torch+jax", "tf": "tf", "onnxruntime": "onnxruntime"}


def bare(name: str) -> str:
    """The subject without the mask that it is asked with."""
    return name.partition("@")[0]


def framework(name: str) -> str:
    """Whose arrays the subject takes; a mask after its name (@causal) changes nothing.

    Raises:
        ValueError: no subject is called that.
    """
    name = bare(name)
    head, colon, _ = name.partition(":")
    if colon and head in _OURS:
        return _OURS[head]
    if name in PEERS:
        return PEERS[name]
    known = (*(f"{head}:auto" for head in _OURS), *PEERS)
    raise ValueError(
        f"a subject must be one of {', '.join(known)}, or name an implementation after a colon. "
        f"Got {name!r}.{nearest(name, known)}"
    )


def room(name: str) -> str:
    """The process it is measured in; equal names share one."""
    if bare(name) in ("keras-torch", "keras-jax"):
        return bare(name)
    return _ROOMS[framework(name)]


def asked(name: str, case: Case, direction: str) -> bool:
    """Whether a step asks this subject: of memory, one way back is enough, and costs a process.

    "both" holds what "backward" holds; it is for TensorFlow, which has no other.
    """
    if case.measure != "memory" or direction == "forward":
        return True
    return (direction == "both") == (framework(name) == "tf")


def is_ours(name: str) -> bool:
    return name.partition(":")[0] in _OURS


def prepared(name: str, case: Case, direction: str, threads: int) -> Call:
    """The subject on that case (`Case.asked_of` it) in that direction; imports its framework.

    Raises:
        Refused: it is not for this case, or a package of its own is missing.
        ImportError: its framework is missing or broken.
    """
    name = bare(name)
    of, impl = framework(name), name.partition(":")[2]
    if of == "onnxruntime":
        from attn_core.benchmarks import onnx_calls

        return onnx_calls.prepared(case, direction, threads)
    try:
        calls = _calls(of)
        if name == "matmul":
            return calls.ceiling(case)
        if name in NO_ATTENTION:
            return calls.floor(case, direction)
        if name.startswith("keras-"):
            from attn_core.benchmarks import keras_calls

            attend = keras_calls.operation({"tf": "tensorflow"}.get(of, of))(case)
        elif name in calls.FUNCTIONS:
            attend = calls.FUNCTIONS[name](case)
        elif name.startswith("tf-unknown"):
            attend = calls.ours(impl, unknown=True)(case)
        else:
            attend = calls.ours(impl)(case)
    except ModuleNotFoundError as error:
        raise Refused(f"{name} needs {error.name}, which is not installed.") from error
    return calls.prepared(name, attend, case, direction)


def _calls(of: str) -> Any:
    """The framework's table and its way of differentiating; imports the framework."""
    if of == "torch":
        from attn_core.benchmarks import torch_calls

        return torch_calls
    if of == "jax":
        from attn_core.benchmarks import jax_calls

        return jax_calls
    from attn_core.benchmarks import tf_calls

    return tf_calls
