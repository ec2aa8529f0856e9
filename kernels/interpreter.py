"""What Triton's interpreter lacks, added where kernels are interpreted when this is imported.

bounds of loops    it takes them by `int()` of an array of one entry, which NumPy has stopped to
                   allow at 2.4: such a bound is handed over as the number it is
sums by TMA        of what may be done through a tensor descriptor it knows reading and writing:
                   adding is done by the atomics that it has

And what it works out anew at every operation, which took two thirds of its time, is worked out
once. Nothing that a kernel computes is another by it:

types              a block's is told by its entries' type and its sizes, and a tensor's shape by it;
                   tensors of one shape need no broadcasting
dtypes             NumPy's name of a type
patches            calling a device function does not patch the language that its kernel's launch
                   has patched
overflow           of integers is worked out only where it is asked for (`debug`)
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor

PLAIN: dict[tuple[Any, str], Any] = {
    (owner, name): getattr(owner, name)
    for owner, name in (
        (core.block_type, "__init__"),
        (core.tensor, "__init__"),
        (interpreter, "_get_np_dtype"),
        (interpreter, "_patch_lang"),
        (TritonSemantic, "broadcast_impl_value"),
        (TritonSemantic, "binary_op_sanitize_overflow_impl"),
    )
}
"""What works things out anew, as Triton has it."""

(_new_type, _, _np_dtype, _patch_all, _broadcast, _overflow) = PLAIN.values()


class _Numbers:
    """A patch scope that knows better what index a tensor is."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def set_attr(self, tensor: Any, name: str, value: Any) -> None:
        if name == "__index__":
            value = _index
        self.scope.set_attr(tensor, name, value)


def _index(self: Any) -> int:
    return int(self.handle.data.item())


def _patched(tensor: Any, scope: Any) -> None:
    _patch(tensor, _Numbers(scope))


def _reduced(self: Any, kind: Any, descriptor: Any, value: Any, indices: Any) -> Any:
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or not value.dtype.scalar.is_floating():
        raise NotImplementedError(f"sums of floats are all that is added here. Got {kind}.")
    at, there = descriptor.materialize_pointers(indices)
    mask = interpreter.TensorHandle(there, tl.int1)
    operation, order = ir.ATOMIC_OP.FADD, ir.MEM_SEMANTIC.RELAXED
    return self.create_atomic_rmw(operation, at, value, mask, order, ir.MEM_SYNC_SCOPE.GPU)


_TYPES: dict[tuple[Any, ...], dict[str, Any]] = {}
_TOLD: dict[tuple[int, ...], tuple[Any, Any]] = {(): (core.constexpr(1), core.tuple([]))}
"""What a tensor says of itself: how many entries, and the one object that is its sizes."""


def _typed(self: Any, element_ty: Any, shape: Any) -> None:
    """The type of a block."""
    sizes = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
    key = element_ty.name, getattr(element_ty, "address_space", None), sizes
    known = _TYPES.get(key)
    if known is None:
        _new_type(self, element_ty, shape)
        if sizes not in _TOLD:
            each = core.tuple([core.constexpr(s) for s in sizes])
            _TOLD[sizes] = core.constexpr(self.numel), each
        known = _TYPES[key] = {**self.__dict__, "told": _TOLD[sizes]}
    self.__dict__.update(known)


def _made(self: Any, handle: Any, type: Any) -> None:
    """A tensor of that type."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.told if type.is_block() else _TOLD[()]


_NAMES: dict[str, Any] = {}


def _named(tt_dtype: Any) -> Any:
    name = tt_dtype.scalar.name
    if name not in _NAMES:
        _NAMES[name] = _np_dtype(tt_dtype)
    return _NAMES[name]


def _patched_once(fn: Any) -> Any:
    if any(map(core.is_builtin, (tl.add, core.add, core.tensor.__add__))):
        return _patch_all(fn)
    return interpreter._LangPatchScope()


def _broadcast_rarely(self: Any, lhs: Any, rhs: Any) -> Any:
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast(self, lhs, rhs)


def _overflow_asked(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    if self.builder.options.debug:
        _overflow(self, lhs, rhs, binary_op)


ONCE = dict(
    zip(
        PLAIN,
        (_typed, _made, _named, _patched_once, _broadcast_rarely, _overflow_asked),
        strict=True,
    )
)

if triton.knobs.runtime.interpret:
    interpreter._patch_lang_tensor = _patched
    for (owner, name), quick in ONCE.items():
        setattr(owner, name, quick)
    if not hasattr(interpreter.InterpreterBuilder, "create_descriptor_reduce"):
        interpreter.InterpreterBuilder.create_descriptor_reduce = _reduced
