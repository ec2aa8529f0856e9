"""What the host holds, kept on a device by its content.

A mask over document ids is often NumPy's: known on the host, the same in every layer and in the
backward pass. Copied anew for each call it would wait for the device, and everything worked out
from it, a schedule of tiles above all, would be worked out again. Copies are kept by the bytes that
they hold, so that a changed array is another one; nobody else has them, so that nobody writes
there, and what follows from one may be kept beside it, under its number.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

Array = Any

MOST = 2**20
"""Bytes beyond which an array is copied for each call instead."""

_numbers: Any = WeakIdKeyDictionary()
_next = count()


def keeps(x: np.ndarray, device: torch.device) -> bool:
    """Whether it is held for later calls: booleans or integers, few, on a GPU's default stream.

    Another stream would have to wait for the copy; and on others CUDA graphs are captured, whose
    memory must hold nothing that lives on.
    """
    if device.type != "cuda" or x.dtype.kind not in "iub" or x.nbytes > MOST:
        return False
    return not torch.cuda.current_stream(device).cuda_stream


def copy(x: np.ndarray, device: torch.device) -> Array:
    """`x` on the device, the same tensor for the same content. It is not to be written."""
    return _copied(x.tobytes(), x.dtype, x.shape, device)


@lru_cache(maxsize=64)
def _copied(
    held: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], device: torch.device
) -> Array:
    x = torch.from_numpy(np.frombuffer(held, dtype).reshape(shape).copy()).to(device)
    _numbers[x] = next(_next)
    return x


def number(x: Array) -> int | None:
    """Of a tensor that `copy` made: another one for every content. None of any other tensor."""
    found: int | None = _numbers.get(x)
    return found
