"""Launching a kernel: on the device and stream of its tensors, with the shape from the table.

Triton launches on torch's current device and on that device's current stream, so a launch is made
inside a guard for the tensors' own device, as torch's operations do. Nothing here waits for a
device, and whether an error that comes up later belongs to a launch is torch's to say.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from attn_core.backends.torch.chunked_parts import Ask
from attn_core.backends.torch.forks import Alone
from attn_core.kernels import configs, interpreter
from attn_core.kernels import forward as _forward
from attn_core.kernels.configs import Config
from attn_core.language.text import text
from attn_core.spec import Operands

INTERPRETED = not isinstance(_forward.forward, triton.JITFunction)
"""Whether kernels run in Triton's interpreter: decided when they were defined, at import."""

assert interpreter  # imported for what it does

_ALONE = Alone(RLock)
"""Held while kernels are interpreted: where it stands Triton knows once, for all threads."""


def consistent() -> bool:
    """Whether Triton's own device functions and ours are of one kind.

    They are not where TRITON_INTERPRET was set or cleared after triton had been imported.
    """
    return INTERPRETED is not isinstance(triton.language.cdiv, triton.JITFunction)


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """As the table of configurations knows it."""
    if INTERPRETED:
        return "interpreter"
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(found.gcnArchName).split(":")[0]
    return f"sm_{found.major}{found.minor}"


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors, or compute units."""
    if INTERPRETED:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Kind(NamedTuple):
    """What the table of configurations is asked by, beside the kernel.

    Attributes:
        widths: D and Dv.
        dtype: of query.
        mask: "", "positions" (of those alone) or "operands" (it looks arrays up).
        table: whether mask or score look an array up at every entry.
        lengths, score, bias, dropout: whether they are given.
        loose: whether rows of the bias begin anywhere (`triton_call.loose`).
    """

    widths: tuple[int, int]
    dtype: str
    mask: str
    table: bool
    lengths: bool
    score: bool
    bias: bool
    dropout: bool
    loose: bool = False


def config(kernel: str, device: torch.device, kind: Kind) -> Config:
    """The shape of a kernel's launch."""
    mask_class = configs.class_of(
        mask=bool(kind.mask) or kind.lengths,
        positions=kind.mask == "positions" and not kind.lengths,
        score=kind.score,
        table=kind.table,
        bias=kind.bias,
        loose=kind.loose,
        dropout=kind.dropout,
    )
    return configs.choose(kernel, architecture(device), *kind.widths, kind.dtype, mask_class)


def launch(kernel: Any, programs: int, shape: Config, *args: Any, **options: Any) -> None:
    """`programs` along the grid's first axis, the only one that may exceed 65,535.

    Whatever is looked up at every entry comes into shared memory, a tile of it for each stage, and
    the table of configurations knows of one array, not of as many as a mask and a score may have.
    Where they have no room, there are fewer stages: the same tiles, numbers and order of sums.
    """
    asked = (kernel, shape, *options.values())
    shape = _roomy.get(asked, shape)
    while True:
        try:
            kernel[(programs,)](*args, **options, **shape.launch)
            return
        except OutOfResources as error:
            if error.name != "shared memory" or shape.stages == 1:
                raise
        _roomy[asked] = shape = replace(shape, stages=shape.stages - 1)


_roomy: dict[Hashable, Config] = {}
"""Of launches that had no room, what they were launched with instead."""


def prepare(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """A kernel that works out what others are told: of schedules and lengths."""
    kernel[(programs,)](*args, **options, **configs.PREPARED.launch)


@contextmanager
def launching(what: str, ask: Ask, x: Operands) -> Iterator[None]:
    """The device's guard; and whatever is raised within says of which problem."""
    device = x.query.device
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if INTERPRETED:  # it computes with NumPy, which warns of what the kernels mean
            stack.enter_context(_ALONE.held())
            stack.enter_context(np.errstate(all="ignore"))
        try:
            yield
        except Exception as error:
            error.add_note(_note(what, ask, x))
            raise


def uncompiled(error: BaseException) -> bool:
    """Whether it came of compiling a kernel, or of a GPU that has no room for one."""
    if isinstance(error, (CompilationError, OutOfResources, PTXASError)):
        return True
    # Passes of the compiler and the tools that it calls raise whatever they like.
    at = error.__traceback__
    while at is not None:
        if at.tb_frame.f_code is triton.compile.__code__:
            return True
        at = at.tb_next
    return False


def _note(what: str, ask: Ask, x: Operands) -> str:
    arrays = ", ".join(
        f"{name} {tuple(t.shape)}"
        for name, t in zip(Operands._fields[:5], x[:5], strict=True)
        if t is not None
    )
    said = [
        f"{name} {text(tree)}" for name, tree in (("mask", ask.mask), ("score", ask.score)) if tree
    ]
    dtype = str(x.query.dtype).removeprefix("torch.")
    place = f"{dtype} in {ask.layout} on {x.query.device}"
    return f'attn_core: {what} of impl="triton": {"; ".join([f"{arrays}, {place}", *said])}'
