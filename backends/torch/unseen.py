"""Code that torch.compile must not look into, wherever it is reached from.

`torch.compiler.disable` says so, but loads torch's compiler, and with it triton, into every process
that only wanted attention. Who has loaded it is asked at the call; who has not compiles nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run as it stands, and all that it calls.

    Under a graph break (a transform of torch.func inside torch.compile, say) Dynamo would compile
    frame by frame what launches kernels, which has nothing for it to gain and much to trip over.
    """
    hidden: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal hidden
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if hidden is None:
            hidden = torch.compiler.disable(function)
        return hidden(*args, **kwargs)

    return call
