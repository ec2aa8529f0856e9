"""attn_core for JAX: eager, jax.jit, vmap, grad, checkpoint, eval_shape.

Derivatives are those of the implementation. "reference" has forward mode and any order, and so has
"native" on a CPU; "chunked", which "auto" takes there, and "native" on a GPU have the first, in
reverse. `chunked` names impl="reference" where it is asked for others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_core.api import attention
from attn_core.backends.jax import accounts, chunked, native, reference
from attn_core.backends.jax import pytrees as _pytrees
from attn_core.backends.jax.arrays import DTYPES, from_host, is_wide, x64
from attn_core.backends.jax.documents import attention_module, scaled_dot_product_attention
from attn_core.backends.jax.meshes import laid_out
from attn_core.backends.jax.philox import keep
from attn_core.language.operands import Table
from attn_core.language.values import Dropout, Mask, Score, seed_array
from attn_core.spec import Account, AttentionOutput, Facts, Operands, Plan, Problem, as_output

if TYPE_CHECKING:  # what __getattr__ loads, for editors and type checkers
    from attn_core.backends.jax.additive import AdditiveAttention
    from attn_core.backends.jax.layers import MultiHeadAttention
    from attn_core.backends.jax.models import Transformer

__all__ = [
    "AdditiveAttention",
    "MultiHeadAttention",
    "Transformer",
    "attention_module",
    "keep",
    "scaled_dot_product_attention",
]

NAME = "jax"
IMPLEMENTATIONS = ("chunked", "native", "reference")
FORMS = ("eager", "jit")

# Compiled once for each problem, which is static: eager calls would else dispatch every operation
# on its own, some fifteen times slower. Under a surrounding jit this is inlined.
_HANDLERS = {
    "chunked": jax.jit(laid_out(chunked.attend), static_argnums=0),
    "native": jax.jit(laid_out(native.attend), static_argnums=0),
    "reference": jax.jit(laid_out(reference.attend), static_argnums=0),
}
_REFUSALS = {"chunked": chunked.refusals, "native": native.refusals, "reference": lambda p: []}
_pytrees.register()


def __getattr__(name: str) -> Any:
    """Layers, which are imported when they are first spoken of."""
    if name == "MultiHeadAttention":
        from attn_core.backends.jax import layers

        return layers.MultiHeadAttention
    if name == "AdditiveAttention":
        from attn_core.backends.jax import additive

        return additive.AdditiveAttention
    if name == "Transformer":
        from attn_core.backends.jax import models

        return models.Transformer
    if name == "linen":
        import attn_core.backends.jax.linen as linen

        return linen
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """With the layers that `__getattr__` loads, for completion."""
    return sorted({*globals(), *__all__})


def owns(x: Any) -> bool:
    return isinstance(x, jax.Array)


def describe(x: Any, name: str = "an array") -> Facts:
    # A tracer stands nowhere yet. A dimension of jax.export may be a symbol: not known either.
    traced = isinstance(x, jax.core.Tracer)
    device = jax.default_backend() if traced else next(iter(x.devices())).platform
    return Facts(tuple(n if isinstance(n, int) else None for n in x.shape), x.dtype.name, device)


def tracing() -> bool:
    """JAX traces values, not Python: what is cached stays valid."""
    return False


def admit(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """JAX has no autocast."""
    return query, key, value


def refusals(problem: Problem, impl: str) -> list[str]:
    if impl not in IMPLEMENTATIONS:
        return [f"`impl` must be one of {', '.join(IMPLEMENTATIONS)} in backend jax. Got {impl}."]
    return _REFUSALS[impl](problem)


def ranked(problem: Problem) -> tuple[str, ...]:
    """cuDNN's kernel first on a GPU; on a CPU jax.nn's is several times slower than ours."""
    return ("native", "chunked", "reference") if problem.device == "gpu" else IMPLEMENTATIONS


def account(problem: Problem, impl: str) -> Account:
    return accounts.account(problem, impl)


def attend(plan: Plan, operands: Operands) -> AttentionOutput:
    problem = plan.problem
    if problem.host:
        # Host arrays are known, so under a surrounding trace they are computed at once.
        with x64(problem.dtype == "float64"), jax.ensure_compile_time_eval():
            output = _HANDLERS[plan.impl](problem, _arrays(problem, operands))
            return AttentionOutput(*[None if x is None else to_numpy(x) for x in output])
    with x64(any(is_wide(x) for x in jax.tree_util.tree_leaves(operands))):
        return _HANDLERS[plan.impl](problem, _arrays(problem, operands))


def vjp(
    arguments: dict[str, Any],
    cotangents: dict[str, Any],
    form: str = "eager",
    function: Callable[..., Any] = attention,
) -> tuple[AttentionOutput, dict[str, Any]]:
    """Outputs of `function(**arguments)`, and the gradients that `cotangents` pull back.

    cotangents maps "out", "lse", "weights" to arrays; gradients come back by argument name, those
    of a score's operands as a tuple under "score". `form` is one of FORMS: eager, or the forward
    and backward pass together under jax.jit, whose arguments are every JAX array, Mask, Score and
    Dropout (host values stay host values). Arrays of float64 need no setting: where there is one,
    from `from_numpy` for instance, all of this runs under x64.
    """
    with x64(any(is_wide(x) for x in jax.tree_util.tree_leaves((arguments, cotangents)))):
        leaves = dict(arguments)
        inputs: dict[str, Any] = {}
        for name in ("query", "key", "value", "bias", "sinks", "slopes"):
            if leaves.get(name) is not None:
                inputs[name] = _array(leaves.pop(name), "float32")
        score = leaves.pop("score", None)
        wide = inputs["query"].dtype == jnp.float64
        tables = () if score is None else score.arrays
        tables = [_array(t, "float64" if wide else "float32") for t in tables]
        inputs["score"] = [t if jnp.issubdtype(t.dtype, jnp.floating) else None for t in tables]
        fixed = [t if g is None else None for t, g in zip(tables, inputs["score"], strict=True)]
        carried = {n: x for n, x in leaves.items() if isinstance(x, _CARRIED)}
        static = {n: x for n, x in leaves.items() if n not in carried}
        pulled = {n: _array(g, "float32") for n, g in cotangents.items()}

        def pull(inputs: Any, fixed: Any, carried: Any, pulled: Any) -> tuple[Any, Any]:
            def call(inputs: dict[str, Any]) -> AttentionOutput:
                given = dict(inputs)
                mine = [
                    t if g is None else g for g, t in zip(given.pop("score"), fixed, strict=True)
                ]
                if score is not None:
                    given["score"] = Score(score.tree, tuple(mine))
                return as_output(function(**given, **carried, **static))

            output, back = jax.vjp(call, inputs)
            zeros = {n: jnp.zeros_like(y) for n, y in output._asdict().items() if y is not None}
            return output, back(AttentionOutput(**{**zeros, **pulled}))[0]

        if form != "eager":
            pull = jax.jit(pull)
        output, gradients = pull(inputs, fixed, carried, pulled)
        found = tuple(gradients.pop("score"))
        if score is not None:
            gradients["score"] = found
        return output, gradients


def from_numpy(x: Any) -> Any:
    """An array of the same dtype; NumPy's bfloat16 is ml_dtypes', and float64 stays float64."""
    return from_host(x)


def to_numpy(x: Any) -> Any:
    return np.array(x)


def outline(function: Callable[..., Any], shapes: Sequence[Sequence[int]], dtype: str) -> Any:
    """What `function` says of arrays of these shapes: it is traced with them."""
    found: list[Any] = []
    with x64(dtype == "float64"):
        given = [jax.ShapeDtypeStruct(tuple(shape), DTYPES[dtype]) for shape in shapes]
        jax.eval_shape(lambda *arrays: found.append(function(*arrays)), *given)
    return found[0]


def known(x: Any) -> bool:
    """Whether the values of an array can be read: nothing traces or transforms it."""
    return not isinstance(x, jax.core.Tracer)


def take(x: Any, index: Sequence[int], axis: int) -> Any:
    """Entries of an axis, by host ints."""
    return jnp.take(x, np.asarray(index, np.int32), axis, mode="clip")


def _array(x: Any, accumulation: str) -> Any:
    """What is on the host, as an array; its integers have been found to fit int32."""
    if isinstance(x, tuple):
        x = np.array(x, np.int32)
    elif isinstance(x, Table):
        x = x.numpy(accumulation)
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8:
        x = x.astype(np.int32)
    return from_host(x)


def _arrays(problem: Problem, operands: Operands) -> Operands:
    """What is on the host, as arrays; a host seed too, so that a new one compiles nothing."""
    operands = operands.map_host(lambda x: _array(x, problem.accumulation))
    return operands._replace(seed=seed_array(operands.seed))


_CARRIED = (jax.Array, Mask, Score, Dropout)
