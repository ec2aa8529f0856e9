"""Triton's interpreter under NumPy 2.4 and newer.

It takes a loop's bounds by `int()` of an array of one entry, which NumPy has stopped to allow.
Where kernels are interpreted, importing this module hands such a bound over as the number it is.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter

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


if triton.knobs.runtime.interpret:
    interpreter._patch_lang_tensor = _patched
