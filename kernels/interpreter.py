"""What Triton's interpreter lacks, added where kernels are interpreted when this is imported.

bounds of loops    it takes them by `int()` of an array of one entry, which NumPy has stopped to
                   allow at 2.4: such a bound is handed over as the number it is
sums by TMA        of what may be done through a tensor descriptor it knows reading and writing:
                   adding is done by the atomics that it has
the lesser         of NaN and a number (and the greater) is the number, as on a GPU; it says NaN
a comparison       of scalars, spread over a block, has become int32: Triton 3.9 takes no such mask

bfloat16 is in `interpreter_bfloat16.py`, what it does too often in `interpreter_once.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

BFLOAT16 = True
"""Whether bfloat16 is what it is on a GPU."""

_patch = interpreter._patch_lang_tensor


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


_splat = interpreter.InterpreterBuilder.create_splat


def _spread(self: Any, block: Any, scalar: Any) -> Any:
    if scalar.data.dtype == np.bool_:
        scalar = interpreter.TensorHandle(scalar.data, tl.int1)
    return _splat(self, block, scalar)


def _lesser(self: Any, one: Any, other: Any) -> Any:
    return self.binary_op(one, other, np.fmin)


def _greater(self: Any, one: Any, other: Any) -> Any:
    return self.binary_op(one, other, np.fmax)


if triton.knobs.runtime.interpret:
    interpreter._patch_lang_tensor = _patched
    interpreter.InterpreterBuilder.create_splat = _spread
    interpreter.InterpreterBuilder.create_minnumf = _lesser
    interpreter.InterpreterBuilder.create_maxnumf = _greater
    if not hasattr(interpreter.InterpreterBuilder, "create_descriptor_reduce"):
        interpreter.InterpreterBuilder.create_descriptor_reduce = _reduced
    from attn_core.kernels import interpreter_bfloat16

    interpreter_bfloat16.replace()
    BFLOAT16 = interpreter_bfloat16.RIGHT
    if triton.__version__.startswith("3.6."):  # whose functions those are
        from attn_core.kernels import interpreter_once

        interpreter_once.replace()
