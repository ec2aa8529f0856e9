"""What Triton's interpreter works out anew at every operation, worked out once.

It took two thirds of its time. Nothing that a kernel computes is another by it:

types              a block's is told by its entries' type and its sizes, and a tensor's shape by it;
                   tensors of one shape need no broadcasting
dtypes             NumPy's name of a type
patches            calling a device function does not patch the language that its kernel's launch
                   has patched
overflow           of integers is worked out only where it is asked for (`debug`)

These are functions within Triton 3.6, and others in other versions: there, and where kernels are
compiled, nothing is replaced (`interpreter.py`).
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

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

_TYPES: dict[tuple[Any, ...], dict[str, Any]] = {}
_TOLD: dict[tuple[int, ...], tuple[Any, Any]] = {(): (core.constexpr(1), core.tuple([]))}
"""What a tensor says of itself: how many entries, and the one object that is its sizes."""


def _typed(self: Any, element_ty: Any, shape: Any) -> None:
    """The type of a block."""
    sizes = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
    # Of 2.0, which is no size, the hash is that of 2.
    kinds = tuple(map(type, sizes))
    key = element_ty.name, getattr(element_ty, "address_space", None), sizes, kinds
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


def replace() -> None:
    for (owner, name), quick in ONCE.items():
        setattr(owner, name, quick)
