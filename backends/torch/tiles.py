"""What the interval reading asks of an array library, in torch's words.

The names and their order are those of `attn_core.language.rules.Host`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Array = Any


class Tiles:
    """Tile positions and operands as int32 (or bool) tensors on `device`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

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
        return x.reshape(-1)[index]

    def concat(self, parts: Sequence[Array], axis: int) -> Array:
        return torch.cat(list(parts), axis)

    def index(self, x: Any) -> Array:
        return torch.as_tensor(x, dtype=torch.int32, device=self.device)

    def array(self, x: Any) -> Array:
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
