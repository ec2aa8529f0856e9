"""attn_core for NumPy: the language run plainly. No accelerator, no compilation, every option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attn_core.api import attention, resolve
from attn_core.backends.numpy import accounts, reference
from attn_core.language.operands import Table
from attn_core.spec import Account, AttentionOutput, Facts, Operands, Plan, Problem, as_output

NAME = "numpy"
IMPLEMENTATIONS = ("reference",)
FORMS = ("eager",)

_HANDLERS = {"reference": reference.attend}


def owns(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def describe(x: Any, name: str = "an array") -> Facts:
    return Facts(tuple(x.shape), x.dtype.name, "cpu")


def tracing() -> bool:
    """NumPy never traces."""
    return False


def admit(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """NumPy has no autocast."""
    return query, key, value


def refusals(problem: Problem, impl: str) -> list[str]:
    if impl not in IMPLEMENTATIONS:
        return [f"`impl` must be one of {', '.join(IMPLEMENTATIONS)} in backend numpy. Got {impl}."]
    return []


def ranked(problem: Problem) -> tuple[str, ...]:
    return IMPLEMENTATIONS


def account(problem: Problem, impl: str) -> Account:
    return accounts.account(problem, impl)


def attend(plan: Plan, operands: Operands) -> AttentionOutput:
    # Infinities and NaN are data here: what may not be seen is selected away.
    with np.errstate(all="ignore"):
        return _HANDLERS[plan.impl](plan.problem, _arrays(plan.problem, operands))


def vjp(
    arguments: dict[str, Any],
    cotangents: dict[str, Any],
    form: str = "eager",
    function: Callable[..., Any] = attention,
) -> tuple[AttentionOutput, dict[str, Any]]:
    """Outputs of `function(**arguments)`, and the gradients that `cotangents` pull back.

    cotangents maps "out", "lse", "weights" to arrays; gradients come back by argument name, those
    of a score's operands as a tuple under "score". NumPy differentiates nothing: of any other
    function than `attention` there are outputs only.
    """
    if function is not attention:
        with np.errstate(all="ignore"):
            return as_output(function(**arguments)), {}
    _, plan, operands = resolve(arguments)
    output = attend(plan, operands)
    with np.errstate(all="ignore"):
        gradients = reference.backward(
            plan.problem,
            _arrays(plan.problem, operands),
            cotangents.get("out"),
            cotangents.get("lse"),
            cotangents.get("weights"),
        )
    return output, {
        name: g for name, g in gradients._asdict().items() if g is not None and name != "mask"
    }


def from_numpy(x: Any) -> Any:
    return x


def to_numpy(x: Any) -> Any:
    return x


def outline(function: Callable[..., Any], shapes: Sequence[Sequence[int]], dtype: str) -> Any:
    """What `function` says of arrays of these shapes: one zero, seen everywhere."""
    if dtype == "bfloat16":
        import ml_dtypes

        zero = np.zeros((), ml_dtypes.bfloat16)
    else:
        zero = np.zeros((), dtype)
    return function(*[np.broadcast_to(zero, shape) for shape in shapes])


def known(x: Any) -> bool:
    """Always: nothing traces NumPy."""
    return True


def take(x: Any, index: Sequence[int], axis: int) -> Any:
    """Entries of an axis, by host ints."""
    # np.take would first copy the whole of an array that is not contiguous.
    return x[(slice(None),) * axis + (np.asarray(index, np.int64),)]


def allowed(problem: Problem, operands: Operands, full: tuple[int, int, int, int]) -> Any:
    """What mask and lengths allow, entry by entry, boolean (B, Hq, Tq, Tk): `full` of them.

    No verb: only NumPy has it, and `explain` asks it for the operands of every backend.
    """
    x = _arrays(problem, operands)
    index = reference.indices(problem, x, *full)
    return np.broadcast_to(reference.structure(problem, x, index), full)


def _arrays(problem: Problem, operands: Operands) -> Operands:
    """Host tuples and tables as NumPy arrays."""

    def array(x: Any) -> Any:
        if isinstance(x, tuple):
            return np.array(x, np.int32)
        return x.numpy(problem.accumulation) if isinstance(x, Table) else x

    return operands.map_host(array)
