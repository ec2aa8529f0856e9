"""What the host holds, kept on a device by its content.

A mask over document ids is often NumPy's, and the slopes of ALiBi are a list: known on the host,
the same in every layer and in the backward pass. Copied anew for each call it would wait for the
device, could stand in no CUDA graph, and everything worked out from it, a schedule of tiles above
all, would be worked out again. Copies are `kept` by the bytes that they hold, so that a changed
array is another one; nobody else has them, so that nobody writes there, and what follows from one
may be kept beside it, under its number.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from attn_core.backends.torch.kept import Kept

Array = Any

MOST = 2**20
"""Bytes beyond which an array is copied for each call instead."""

_kept = Kept(64)
_numbers: Any = WeakIdKeyDictionary()
_next = count()


def keeps(x: np.ndarray, device: torch.device) -> bool:
    """Whether it is held for later calls: few numbers, on a GPU."""
    return device.type == "cuda" and x.dtype.kind in "iubf" and x.nbytes <= MOST


def copy(x: np.ndarray, device: torch.device) -> Array:
    """`x` on the device, the same tensor for the same content. It is not to be written."""

    def made() -> Array:
        # Torch takes no other order of bytes than the machine's.
        found = torch.from_numpy(np.array(x, x.dtype.newbyteorder("="), order="C")).to(device)
        _numbers[found] = next(_next)
        return found

    return _kept.of((x.tobytes(), x.dtype, x.shape), device, made)


def number(x: Array) -> int | None:
    """Of a tensor that `copy` made: another one for every content. None of any other tensor."""
    found: int | None = _numbers.get(x)
    return found
