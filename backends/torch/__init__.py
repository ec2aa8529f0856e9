"""attn_core for PyTorch: eager, torch.compile(fullgraph=True), torch.func, autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attn_core.api import attention
from attn_core.backends.torch import accounts, chunked, held, native, reference, triton
from attn_core.backends.torch import pytrees as _pytrees
from attn_core.backends.torch.arrays import DTYPES, autocasts, dense, same, settle, told, tracing
from attn_core.backends.torch.documents import attention_module, scaled_dot_product_attention
from attn_core.backends.torch.layer_parts import known
from attn_core.backends.torch.philox import keep
from attn_core.backends.torch.tiles import constant
from attn_core.check_positions import range_problem
from attn_core.language.operands import Table
from attn_core.language.values import Score
from attn_core.spec import Account, AttentionOutput, Facts, Operands, Plan, Problem, as_output

if TYPE_CHECKING:  # what __getattr__ loads, for editors and type checkers
    from attn_core.backends.torch.additive import AdditiveAttention
    from attn_core.backends.torch.layers import MultiHeadAttention
    from attn_core.backends.torch.models import Transformer

__all__ = [
    "AdditiveAttention",
    "MultiHeadAttention",
    "Transformer",
    "attention_module",
    "keep",
    "known",
    "same",
    "scaled_dot_product_attention",
    "told",
    "tracing",
]

NAME = "torch"
IMPLEMENTATIONS = ("native", "chunked", "reference", "triton")
FORMS = ("eager", "aot_eager", "inductor")

_HANDLERS = {
    "native": native.attend,
    "chunked": chunked.attend,
    "reference": reference.attend,
    "triton": triton.attend,
}
_REFUSALS = {
    "native": native.refusals,
    "chunked": chunked.refusals,
    "reference": lambda p: [],
    "triton": triton.refusals,
}
_NAMES = {
    getattr(torch, name): name
    for name in (
        *("float64", "float32", "bfloat16", "float16", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}
_CALLS = count()
_NO_NUMBERS = {
    "CausalBias": 'give masks.causal() as the mask, with query_offset="start" for upper left and '
    '"end" for lower right',
    "DTensor": "give what each device holds, x.to_local(), cut along the batch or heads (which "
    "masks, scores and dropout then count from 0 on each)",
    "MaskedTensor": "give its numbers, x.get_data(), and what it hides as a mask or a bias of -inf",
}
"""torch's subclasses whose entries are not what they stand for, and what to give instead."""

_pytrees.register()
# oneMKL chooses the kernel of each function at its first call. When that call runs on several
# threads, one may take a low-precision kernel for its share, errors near 2e-5 once per process
# (pytorch issue 188792). A tensor of one element is computed by one thread, and settles it.
for _dtype in (torch.float32, torch.float64):
    for _function in (torch.exp, torch.log, torch.tanh):
        _function(torch.ones(1, dtype=_dtype, device="cpu"))
# What torch.compiler.assume_constant_result does, without loading torch's compiler (and triton).
range_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """Layers, which are imported when they are first spoken of."""
    if name == "MultiHeadAttention":
        from attn_core.backends.torch import layers

        return layers.MultiHeadAttention
    if name == "AdditiveAttention":
        from attn_core.backends.torch import additive

        return additive.AdditiveAttention
    if name == "Transformer":
        from attn_core.backends.torch import models

        return models.Transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """With the layers that `__getattr__` loads, for completion."""
    return sorted({*globals(), *__all__})


def owns(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def describe(x: Any, name: str = "a tensor") -> Facts:
    dense(name, x)
    kind = type(x).__name__
    if kind in _NO_NUMBERS:
        raise TypeError(f"{name} must be one of plain numbers. Got a {kind}: {_NO_NUMBERS[kind]}.")
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    dtype, device = _NAMES.get(x.dtype) or str(x.dtype), x.device
    return Facts(tuple(x.shape), dtype, device.type, needs_grad, device.index or 0)


def admit(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Under autocast, cast as torch's own scaled_dot_product_attention is: float64 stays."""
    if tracing() and query.dim() == key.dim() == value.dim() == 4:
        settle(query, key, value)
    kind = query.device.type
    if not autocasts(kind) or not torch.is_autocast_enabled(kind):
        return query, key, value
    to = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(to) if x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (query, key, value)
    )


def refusals(problem: Problem, impl: str) -> list[str]:
    if impl not in IMPLEMENTATIONS:
        return [f"`impl` must be one of {', '.join(IMPLEMENTATIONS)} in backend torch. Got {impl}."]
    reasons = _REFUSALS[impl](problem)
    # Kernels of ours multiply as they are told, whatever the switch.
    own = impl == "triton"
    if problem.precision == "highest" and problem.dtype == "float32" and not own:
        switch = torch.get_float32_matmul_precision()
        if switch != "highest":
            reasons.append(
                '`precision="highest"` needs torch.set_float32_matmul_precision("highest"), '
                f"which is the caller's to set. Got {switch!r}."
            )
    return reasons


def ranked(problem: Problem) -> tuple[str, ...]:
    """The fastest first. Of our kernels, last where they can only be interpreted.

    On a GPU torch's own, where it accepts: whole problems of many rows are what it is tuned for.
    All else is our kernels', and a step of decoding, in which they share out the keys.
    """
    if problem.device != "cuda":
        return IMPLEMENTATIONS
    few = problem.q_len is not None and problem.q_len <= triton.FEW
    first = ("triton", "native") if few else ("native", "triton")
    return (*first, "chunked", "reference")


def fallen(problem: Problem, impl: str) -> list[str]:
    """Kernels that did not compile when an earlier call asked for them."""
    if impl != "triton" or tracing():
        return []
    from attn_core.backends.torch import unmade

    return unmade.reasons(problem)


def account(problem: Problem, impl: str) -> Account:
    return accounts.account(problem, impl)


def attend(plan: Plan, operands: Operands) -> AttentionOutput:
    problem, impl = plan.problem, plan.impl
    device = torch.device("cpu") if problem.host else operands.query.device
    x = _tensors(problem, operands, device)
    falls = plan.auto and impl == "triton"
    output = triton.attend(problem, x, falls) if falls else _HANDLERS[impl](problem, x)
    if not problem.host:
        return output
    return AttentionOutput(*[None if x is None else to_numpy(x) for x in output])


def vjp(
    arguments: dict[str, Any],
    cotangents: dict[str, Any],
    form: str = "eager",
    function: Callable[..., Any] = attention,
) -> tuple[AttentionOutput, dict[str, Any]]:
    """Outputs of `function(**arguments)`, and the gradients that `cotangents` pull back.

    cotangents maps "out", "lse", "weights" to arrays; gradients come back by argument name, those
    of a score's operands as a tuple under "score". `form` is one of FORMS: eager, or
    torch.compile(fullgraph=True) with that backend.
    """
    leaves = dict(arguments)
    for name in ("query", "key", "value", "bias", "sinks", "slopes"):
        if leaves.get(name) is not None:
            leaves[name] = leaves[name].detach().requires_grad_()
    score = leaves.get("score")
    if score is not None:
        wide = "float64" if leaves["query"].dtype == torch.float64 else "float32"
        tensors: list[Any] = [a.numpy(wide) if isinstance(a, Table) else a for a in score.arrays]
        tensors = [from_numpy(a) if isinstance(a, np.ndarray) else a for a in tensors]
        leaves["score"] = Score(
            score.tree,
            tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors),
        )

    def call(leaves: dict[str, Any]) -> AttentionOutput:
        return as_output(function(**leaves))

    if form != "eager":
        # A code object of its own: torch counts recompilations by code object, and these calls
        # have nothing in common.
        code = call.__code__.replace(co_name=f"call_{next(_CALLS)}")
        call = FunctionType(code, call.__globals__, closure=call.__closure__)
        call = torch.compile(call, fullgraph=True, backend=form, dynamic=False)
    output = call(leaves)
    pairs = [(getattr(output, name), g) for name, g in cotangents.items()]
    inputs = {
        name: x for name, x in leaves.items() if isinstance(x, torch.Tensor) and x.requires_grad
    }
    wanted = list(inputs.values())
    tables = () if score is None else leaves["score"].arrays
    wanted += [t for t in tables if t.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
    )
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    gradients: dict[str, Any] = dict(zip(inputs, filled, strict=False))
    if score is not None:
        rest = iter(filled[len(inputs) :])
        gradients["score"] = tuple(next(rest) if t.requires_grad else None for t in tables)
    return AttentionOutput(*[None if y is None else y.detach() for y in output]), gradients


def from_numpy(x: Any) -> Any:
    """A tensor of the same dtype; NumPy's bfloat16 is ml_dtypes'.

    It shares memory where torch can: not with an array that is read-only, in another byte order,
    or of strides that are negative or no multiple of an entry.
    """
    if tracing():
        return torch.as_tensor(x)
    if x.dtype.name == "bfloat16":
        return from_numpy(x.view(np.int16)).view(torch.bfloat16)
    odd = any(stride < 0 or stride % x.itemsize for stride in x.strides)
    if odd or not x.flags.writeable or not x.dtype.isnative:
        x = np.array(x, x.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(x)


def to_numpy(x: Any) -> Any:
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def outline(function: Callable[..., Any], shapes: Sequence[Sequence[int]], dtype: str) -> Any:
    """What `function` says of tensors of these shapes on the CPU: one zero, seen everywhere."""
    zero = torch.zeros((), dtype=DTYPES[dtype], device="cpu")
    return function(*[zero.expand(*shape) for shape in shapes])


def take(x: Any, index: Sequence[int], axis: int) -> Any:
    """Entries of an axis, by host ints."""
    return torch.index_select(x, axis, torch.tensor(index, dtype=torch.int64, device=x.device))


def _tensors(problem: Problem, operands: Operands, device: torch.device) -> Operands:
    """What is on the host, as tensors on the device of query."""
    ready = True
    for name, given in zip(Operands._fields, operands, strict=True):
        if given is None:
            continue
        for x in given if name in ("mask", "score") else (given,):
            if not isinstance(x, torch.Tensor):
                ready = False
            elif x.device != device and x.dim():
                raise ValueError(
                    f"`{name}` must be on the device of query, {device}. Got {x.device}."
                )
    if ready:
        return operands

    def tensor(x: Any) -> Any:
        if isinstance(x, tuple):
            if tracing():  # they may be symbols
                return torch.tensor(x, dtype=torch.int32, device=device)
            return constant(x, torch.int32, device)
        if isinstance(x, Table) and tracing():  # which NumPy's arrays cannot be made in
            dtype = {"bool": torch.bool, "int": torch.int32, "float": DTYPES[problem.accumulation]}
            return torch.tensor(x.values, dtype=dtype[x.kind], device=device).reshape(x.shape)
        if isinstance(x, Table):
            x = x.numpy(problem.accumulation)
        if not isinstance(x, np.ndarray):
            return x
        if not tracing() and held.keeps(x, device):
            return held.copy(x, device)
        return from_numpy(x).to(device)

    return operands.map_host(tensor)
