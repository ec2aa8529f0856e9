"""What the interval reading asks of an array library, in torch's words.

The names and their order are those of `attn_core.language.rules.Host`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from attn_core.backends.torch.kept import Kept
from attn_core.language.tree import INT_MAX, INT_MIN

Array = Any


def constant(x: Any, dtype: torch.dtype, device: torch.device) -> Array:
    """Host integers or a boolean as a tensor.

    Copying them to a device would wait for it, and is not allowed while a CUDA graph is captured:
    there they are made on the device, as runs of equal steps.
    """
    if device.type == "cpu":
        return torch.as_tensor(x, dtype=dtype, device=device)  # whatever the process' default
    x = np.asarray(x)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if not x.ndim:
        return torch.full((), x.item(), **options)
    runs = [_run(*run, options) for run in _runs(x.reshape(-1).tolist())]
    flat = torch.cat(runs) if len(runs) > 1 else runs[0] if runs else torch.empty(0, **options)
    return flat.reshape(x.shape)


def _runs(x: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first, step, count) of neighbours that are apart by the same step."""
    at = 0
    while at < len(x):
        stop = at + 1
        step = x[stop] - x[at] if stop < len(x) else 0
        while stop < len(x) and x[stop] - x[stop - 1] == step:
            stop += 1
        yield x[at], step, stop - at
        at = stop


def _run(first: int, step: int, count: int, options: dict[str, Any]) -> Array:
    if not step:
        return torch.full((count,), first, **options)
    return torch.arange(first, first + step * count, step, **options)


_kept = Kept(256)


class Tiles:
    """Tile positions and operands as int32 (or bool) tensors on `device`; sums may be wider.

    Args:
        keep: whether constants may be kept there for the next one.
    """

    def __init__(self, device: torch.device | str = "cpu", keep: bool = False) -> None:
        self.device = torch.device(device)
        self.keep = keep

    def plus(self, x: Array, y: Array) -> Array:
        """Added up in 64 bits, where nothing overflows: a third of the operations."""
        return (x.to(torch.int64) + y).clamp(INT_MIN, INT_MAX)

    def minus(self, x: Array, y: Array) -> Array:
        return (x.to(torch.int64) - y).clamp(INT_MIN, INT_MAX)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return torch.where(condition, x, y)

    def minimum(self, x: Array, y: Array) -> Array:
        return torch.minimum(x, y)

    def maximum(self, x: Array, y: Array) -> Array:
        return torch.maximum(x, y)

    def floordiv(self, x: Array, y: Array) -> Array:
        return torch.div(x, y, rounding_mode="floor")

    def rshift(self, x: Array, count: Array) -> Array:
        return torch.bitwise_right_shift(x, count)

    def take(self, x: Array, index: Array) -> Array:
        # An index without an axis would be read on the host, which waits for the device.
        return x.reshape(-1)[index.reshape(-1)].reshape(index.shape)

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        return torch.cat(list(parts), axis)

    def index(self, x: Any) -> Array:
        if isinstance(x, torch.Tensor):
            return x.to(self.device, torch.int32)
        if self.keep:
            host = np.asarray(x, np.int64)
            made = lambda: constant(host, torch.int32, self.device)  # noqa: E731
            return _kept.of((host.tobytes(), host.shape), self.device, made)
        return constant(x, torch.int32, self.device)

    def array(self, x: Any) -> Array:
        if isinstance(x, bool):
            return constant(x, torch.bool, self.device)
        x = torch.as_tensor(x, device=self.device)
        return x if x.dtype in (torch.bool, torch.int64) else x.to(torch.int32)

    def least(self, x: Array) -> Array:
        return x.amin(-1)

    def most(self, x: Array) -> Array:
        return x.amax(-1)

    def total(self, x: Array) -> Array:
        return x.sum(-1, dtype=torch.int32)

    def descending(self, x: Array) -> Array:
        return torch.argsort(x, dim=-1, descending=True, stable=True).to(torch.int32)
