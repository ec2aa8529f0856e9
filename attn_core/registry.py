"""The registry: from an array or a name to a backend, and from a problem to a plan.

A backend is a module `attn_core.backends.<name>` with these verbs, in this order:

    owns(x)                         is x an array of this framework
    describe(x, name) -> Facts      shape, dtype, device; unknown dimensions are None; `name` is
                                    what it is called if it is refused
    admit(q, k, v)                  the three as the framework's own attention would take them
    refusals(problem, impl)         reasons why not, empty when it will answer
    ranked(problem)                 its implementations in the order in which "auto" asks them
    account(problem, impl)          an Account: what it would spend, for `explain`
    attend(plan, operands)          AttentionOutput
    vjp(arguments, cotangents)      outputs and gradients, for conformance
    from_numpy(x), to_numpy(x)
    outline(function, shapes, dtype)  what function says of arrays of these shapes, for none of
                                    which there need be memory
    known(x)                        can the values of x be read now, or does something trace them
    take(x, index, axis)            entries of an axis, by host ints
    keep(threshold, seed, ..)       what dropout keeps, for layers that drop hidden entries

where an implementation may turn out not to run when it is first called,

    fallen(problem, impl)           reasons why "auto" passes it over: what an earlier call found

where sizes may be symbols of a tracer,

    same(a, b)                      are two sizes known to be equal
    told(size)                      the size, or None where nothing is known of it yet

and two facts: IMPLEMENTATIONS, the names it has, and tracing(), whether the framework
is tracing Python itself right now. To add one, write that module and add a loader below.

Nothing here imports a framework until an array of it, or its name, comes by. The loaders are
plain functions around an import statement, because torch.compile can trace that and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from attn_core import config
from attn_core.language import values
from attn_core.model.config import ROOMS
from attn_core.spec import Plan, Problem


class UnsupportedError(NotImplementedError):
    """The implementation asked for cannot answer this problem; the message lists every reason."""


def _numpy() -> Any:
    import attn_core.backends.numpy as backend

    return backend


def _torch() -> Any:
    import attn_core.backends.torch as backend

    return backend


def _tf() -> Any:
    import attn_core.backends.tf as backend

    return backend


def _jax() -> Any:
    import attn_core.backends.jax as backend

    return backend


_LOADERS: dict[str, Callable[[], Any]] = {
    "numpy": _numpy,
    "torch": _torch,
    "tf": _tf,
    "jax": _jax,
}
_MODULES = {"torch": "torch", "tf": "tensorflow", "jax": "jax"}
_loaded: dict[str, Any] = {}


def load(name: str) -> Any:
    """The backend of that name.

    Raises:
        ValueError: unknown name, with the nearest one.
        ImportError: its framework is missing (naming the extra to install) or fails to import
            (keeping its own error).
    """
    found = _loaded.get(name)
    if found is not None:
        return found
    config.check_backend(name)
    try:
        found = _LOADERS[name]()
    except Exception as error:
        raise _import_error(name, error) from error
    _loaded[name] = found
    return found


def _import_error(name: str, error: Exception) -> ImportError:
    module = _MODULES.get(name, name)
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return ImportError(
            f"backend {name!r} needs {module}, which is not installed: "
            f"pip install 'attn-core[{name}]'. Installed: {config.installed()}."
        )
    return ImportError(
        f"backend {name!r} found {module}, but importing it failed: {type(error).__name__}: {error}"
    )


def layer(name: str, kind: str) -> Any:
    """A backend's class of layers, "MultiHeadAttention" or "Transformer".

    Raises:
        UnsupportedError: the backend has none.
        ImportError: what its layers are made of is missing, with the extra to install.
    """
    backend = load(name)
    try:
        return getattr(backend, kind)
    except AttributeError as error:
        having = ", ".join([room for room in ROOMS if room != name])
        raise UnsupportedError(f"backend {name!r} has no {kind}. These have: {having}.") from error
    except ModuleNotFoundError as error:
        raise ImportError(
            f"layers of backend {name!r} need {error.name}, which is not installed: "
            f"pip install 'attn-core[{name}]'."
        ) from error


def owner(x: Any) -> str | None:
    """The name of the backend whose framework `x` belongs to; None for anything else."""
    if isinstance(x, np.ndarray):
        return "numpy"
    if hasattr(x, "__torch_function__"):
        _meet_torch()
    for name in _loaded:
        if name != "numpy" and _loaded[name].owns(x):
            return name
    # An array of a framework exists only once that framework is imported, so only those are
    # asked, and loading their backend imports nothing new.
    for name in _MODULES:
        if name not in _loaded and _MODULES[name] in sys.modules and _root(x, name):
            backend = load(name)
            if backend.owns(x):
                return name
    return None


def _meet_torch() -> None:
    """Load torch's backend, if torch is completely imported by now."""
    if "torch" not in _loaded and _ready(sys.modules.get("torch")):
        load("torch")


# torch.compile runs this for itself while it traces, and guards nothing that it reads: or a process
# whose first call is compiled would guard on the backends loaded before it, and compile it twice.
# (It is what torch.compiler.assume_constant_result says of a function; torch may not be there yet.)
setattr(_meet_torch, "_dynamo_marked_constant", True)  # noqa: B010


def _root(x: Any, name: str) -> bool:
    """Whether some class of `x` comes from the framework: a cheap test before loading it."""
    roots = {"torch": ("torch",), "tf": ("tensorflow", "keras"), "jax": ("jax", "jaxlib")}[name]
    return any(base.__module__.split(".")[0] in roots for base in type(x).__mro__)


_INSTEAD = {
    "KerasTensor": ", which has no values: a graph of Keras takes a layer, ours or one of your own "
    "that calls attention, or attn_core.compat.keras.dot_product_attention",
    "RaggedTensor": ": pad it, {name}.to_tensor(), and give the lengths of its rows as "
    "`kv_lengths` and `q_lengths`, to a model as `lengths`",
    "SparseTensor": ": tf.sparse.to_dense({name}) makes an array of it",
}


def instead(x: Any, name: str) -> str:
    """What to write for an argument that is no array but looks like one; "" of anything else."""
    return _INSTEAD.get(type(x).__name__, "").format(name=name.strip("`"))


def find(query: Any, backend: str | None = None) -> tuple[Any, bool]:
    """The backend that answers for `query`, and whether query is a host (NumPy) array."""
    name = owner(query)
    if name is None:
        raise TypeError(
            "`query` must be an array of NumPy, torch, TensorFlow or JAX. "
            f"Got {type(query).__module__}.{type(query).__name__}"
            f"{instead(query, 'query')}."
        )
    if name != "numpy":
        return load(name), False
    return load(backend or config.get("backend") or "numpy"), True


def choose(backend: Any, problem: Problem, impl: str) -> Plan:
    """The plan: the implementation asked for, or under "auto" the first that accepts.

    "auto" in the call leaves the choice to the flag.

    Raises:
        UnsupportedError: none may, or the one asked for may not; with every reason.
    """
    asked = config.check_impl(impl)
    if asked == "auto":
        asked = config.get("impl") or "auto"
    if backend.tracing() or problem.precision == "highest":
        # torch.compile traces this call and would look through the cache, with a warning. And
        # "highest" asks about the framework's own switch, which may be turned between two calls.
        return _choose(problem, asked)
    return _cached(problem, asked)


def _choose(problem: Problem, asked: str) -> Plan:
    backend = load(problem.backend)
    names = backend.ranked(problem) if asked == "auto" else (asked,)
    refused: list[tuple[str, tuple[str, ...]]] = []
    for name in names:
        reasons = refusals(backend, problem, name, asked)
        if not reasons:
            return Plan(problem, name, tuple(refused), asked == "auto")
        refused.append((name, reasons))
    raise UnsupportedError(_refusal(backend, problem, asked, refused))


_cached = lru_cache(maxsize=512)(_choose)


def refusals(backend: Any, problem: Problem, name: str, asked: str) -> tuple[str, ...]:
    """Why that implementation does not answer; under "auto" also what an earlier call found."""
    found = tuple(backend.refusals(problem, name))
    if found or asked != "auto" or not hasattr(backend, "fallen"):
        return found
    return tuple(backend.fallen(problem, name))


def forget() -> None:
    """Choose anew from here on: for a backend that has found out that something does not run."""
    _cached.cache_clear()


def _refusal(backend: Any, problem: Problem, asked: str, refused: list[Any]) -> str:
    lines = [
        (
            f"no implementation of backend {problem.backend!r} answers impl={asked!r} "
            f"for dtype {problem.dtype} on {problem.device}."
        )
    ]
    for name, reasons in refused:
        lines += [f"  {name}: {reason}" for reason in reasons]
    if asked != "auto":
        for name in backend.IMPLEMENTATIONS:
            if name != asked:
                reasons = backend.refusals(problem, name) or ["would answer"]
                lines += [f"  {name}: {reason}" for reason in reasons]
    return "\n".join(lines)


def greet() -> None:
    """Load the backends of frameworks that are imported by now, so that their pytrees exist.

    Called when a Mask, Score or Dropout is made: such a value may be handed to `jax.jit` before
    any attention has been called.
    """
    _meet_torch()
    torch = _loaded.get("torch")
    if torch is not None and torch.tracing():
        # It would guard on the number of modules imported so far, and recompile at the next import.
        return
    for name in ("torch", "jax"):
        if name not in _loaded and _ready(sys.modules.get(_MODULES[name])):
            load(name)


def _ready(module: ModuleType | None) -> bool:
    """Whether a framework is completely imported (TensorFlow imports JAX halfway, for one)."""
    if module is None:
        return False
    spec = getattr(module, "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


values.on_use(greet)
