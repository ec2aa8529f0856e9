"""What a process of its own runs to find out whether kernels work: `probe` asks, JSON answers.

On each kind of GPU a causal attention of float16 goes forward and backward through the kernels, and
is held against the formula in float64.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from attn_core.backends.torch import triton_backward, triton_forward, triton_launch
from attn_core.backends.torch.chunked_backward import Saved, Upstream
from attn_core.backends.torch.chunked_parts import Ask
from attn_core.kernels.hazards import hazard
from attn_core.spec import Operands
from attn_core.whole import CAUSAL

_T, _D = 80, 64
"""Rows, over the end of a tile, and columns."""

_ALLOWED = 2.0**-6
"""Far above float16's rounding of a row, far below what a wrong product comes to."""


def main() -> None:
    """Prints the devices on which kernels ran, what was wrong, and hazards, as one line of JSON."""
    devices: list[str] = []
    problem, hazards = "", []
    try:
        if not torch.cuda.is_available():
            problem = "torch must see a GPU. Got none."
        for name, device in kinds().items():
            beware = hazard(triton_launch.architecture(device))
            if beware:
                hazards.append(f"{name}: {beware}")
            worst = error_on(device)
            if not worst <= _ALLOWED:
                problem = (
                    f"kernels must agree with the formula within {_ALLOWED:g} on {name}. "
                    f"Got an error of {worst:g}."
                )
                break
            devices.append(name)
    except Exception as error:  # whatever it raises is the reason
        what = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"kernels must compile and run on every GPU that torch sees. Got {what}"
    print(json.dumps({"devices": devices, "problem": problem, "hazards": hazards}), flush=True)
    sys.stdout.flush()


def kinds() -> dict[str, torch.device]:
    """One device of each kind: "NVIDIA H200 (sm_90)"."""
    found: dict[str, torch.device] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name = torch.cuda.get_device_name(device)
        found.setdefault(f"{name} ({triton_launch.architecture(device)})", device)
    return found


def error_on(device: torch.device) -> float:
    """The largest error of out and the gradients of query, key and value; NaN if there is one."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, up = (torch.randn(1, 2, _T, _D, generator=draw).half() for _ in range(4))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    logits = wide[0] @ wide[1].transpose(-1, -2) * _D**-0.5
    hidden = torch.ones(_T, _T, dtype=torch.bool).triu(1)
    want = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ wide[2]
    pulled = torch.autograd.grad(want, wide, up.double())
    x = Operands(*[t.to(device) for t in (q, k, v)])
    ask = Ask("BHTD", "zero", 0.0, CAUSAL, None, 0, False, False, "triton")
    out, _, _, *rows = triton_forward.forward(ask, _D**-0.5, x)
    upstream = Upstream(up.to(device), None, None)
    wanted = [True, True, True, False, False]
    grads = triton_backward.backward(ask, _D**-0.5, x, Saved(out, *rows), upstream, wanted)
    pairs: list[tuple[Any, Any]] = list(zip((out, *grads), (want, *pulled), strict=True))
    errors = [(got.cpu().double() - true.detach()).abs().max() for got, true in pairs]
    return float(torch.stack(errors).max())


if __name__ == "__main__":
    main()
