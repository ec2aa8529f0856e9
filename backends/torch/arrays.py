"""torch's spelling of the array reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attn_core.language.arrays import ArrayReading

Array = Any

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def tracing() -> bool:
    """Whether torch.compile is tracing this very Python code, or sizes may be symbols otherwise.

    Symbols can be looked up in no cache. `make_fx(tracing_mode="symbolic")` makes them, too.
    """
    if torch.compiler.is_compiling():
        return True
    fake: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return fake is not None and fake.shape_env is not None


def autocasts(device: str) -> bool:
    """Whether devices of that type have autocast: asked of the others, torch raises.

    torch.compile takes the answer for constant: that of 2.9 does not trace torch's own question.
    """
    return torch.amp.is_autocast_available(device)


# What torch.compiler.assume_constant_result does, without loading torch's compiler (and triton).
autocasts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def dense(name: str, x: Array) -> None:
    """Raises:
    TypeError: the tensor has no one shape, or no strides.
    """
    if not x.is_nested and x.layout is torch.strided:
        return
    kind = "a nested one" if x.is_nested else f"{x.layout}: write x.to_dense()"
    raise TypeError(
        f"{name} must be dense, of layout torch.strided. Got {kind}. Rows of several lengths "
        "are padded, with `kv_lengths=` and `q_lengths=`, or packed, with "
        "attn_core.masks.segments(ids)."
    )


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal: of two that come of data nothing is known."""
    if not tracing():
        return bool(a == b)
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(a == b)


def told(size: Any) -> Any:
    """A size; None for one that comes of data and may be anything, 0 and 1 included."""
    if not tracing():
        return size
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    # What any other size is compared with here no guard comes of: torch has it apart from 0 and 1.
    for few in (0, 1):
        if guard_or_true(size == few) and not guard_or_false(size == few):
            return None
    return size


def settle(query: Array, key: Array, value: Array) -> None:
    """Let torch find out, as it runs, that sizes agree that it cannot compare while it traces.

    Those that come of data, `x[:, :, :count.item()]` or `x[:, :, flags]`, are new ones each time.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    pairs = [(key, value, axis) for axis in range(3)] + [(query, key, axis) for axis in (0, 3)]
    for x, y, axis in pairs:
        alike = x.shape[axis] == y.shape[axis]
        if guard_or_true(alike) and not guard_or_false(alike):
            torch._check(alike)


class Reading(ArrayReading):
    """Reads trees with torch tensors; floats are in the accumulation dtype.

    Integers are int32, or int64 where an operand is: torch narrows nothing on its own.
    """

    def __init__(
        self, accumulation: str, operands: Sequence[Array], device: Any, guard: Array | None = None
    ) -> None:
        super().__init__(guard)
        self.device = device
        self.float_dtype = DTYPES[accumulation]
        wide = any(t.dtype == torch.int64 for t in operands)
        self.int_dtype = torch.int64 if wide else torch.int32

    def const(self, kind: str, value: Any) -> Array:
        dtypes = {"bool": torch.bool, "int": self.int_dtype, "float": self.float_dtype}
        return torch.full((), value, dtype=dtypes[kind], device=self.device)

    def lookup(self, table: Array, index: Sequence[Array]) -> Array:
        if table.dtype.is_floating_point:
            table = table.to(self.float_dtype)
        elif table.dtype != torch.bool:
            table = table.to(self.int_dtype)
        if not index:
            return table
        if table.numel() == 0:
            # Nothing is looked up in an empty table: the tile of indices is empty as well.
            shape = torch.broadcast_shapes(*[i.shape for i in index])
            return torch.zeros(shape, dtype=table.dtype, device=self.device)
        return table[clamp(table.shape, index)]

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return torch.where(condition, x, y)

    def zeros_like(self, x: Array) -> Array:
        return torch.zeros_like(x)

    def equal(self, x: Array, y: Array) -> Array:
        return x == y

    def not_equal(self, x: Array, y: Array) -> Array:
        return x != y

    def int_floordiv(self, x: Array, y: Array) -> Array:
        return torch.div(x, y, rounding_mode="floor")

    def int_mod(self, x: Array, y: Array) -> Array:
        return torch.remainder(x, y)

    def int_rshift(self, x: Array, count: Array) -> Array:
        return x >> count

    def absolute(self, x: Array) -> Array:
        return torch.abs(x)

    def exp(self, x: Array) -> Array:
        return torch.exp(x)

    def log(self, x: Array) -> Array:
        return torch.log(x)

    def tanh(self, x: Array) -> Array:
        return torch.tanh(x)

    def floor(self, x: Array) -> Array:
        return torch.floor(x)

    def truncate(self, x: Array) -> Array:
        return torch.trunc(x)

    def stop_gradient(self, x: Array) -> Array:
        return x.detach()

    def as_int(self, x: Array) -> Array:
        return x.to(self.int_dtype)

    def as_float(self, x: Array) -> Array:
        return x.to(self.float_dtype)


def clamp(shape: Sequence[Any], index: Sequence[Array]) -> tuple[Array, ...]:
    """Look-up indices held within [0, size - 1] of each axis.

    A constant gets an axis: torch.compile takes a 0-d index for a Python number it must know.
    """
    return tuple(
        torch.clamp(i.reshape(1) if i.dim() == 0 else i, 0, size - 1).to(torch.int64)
        for i, size in zip(index, shape, strict=True)
    )
