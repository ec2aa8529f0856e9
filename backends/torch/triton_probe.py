"""What a process of its own runs to find out whether kernels work: `probe` asks, JSON answers.

On one GPU of each kind a causal attention goes forward and backward through the kernels, and is
held against the formula in float64: in float16 first, then in what may fail where that did not,
bfloat16 and the widest columns. Before each trial a line says what is tried, so that a trial that
ends the process is known, too.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from attn_core.backends.torch import triton_backward, triton_forward, triton_launch
from attn_core.backends.torch.chunked_backward import Saved, Upstream
from attn_core.backends.torch.chunked_parts import Ask
from attn_core.kernels.hazards import hazard
from attn_core.spec import Operands
from attn_core.whole import CAUSAL

_T = 80
"""Rows, over the end of a tile."""


class Trial(NamedTuple):
    """What is tried: a dtype, and columns of query, key and value."""

    dtype: str
    width: int


FIRST = Trial("float16", 64)
"""Where this fails, nothing is said to work on that GPU."""

_ROOM = 3 * 2**15
"""Bytes of shared memory that the widest tiles of float32 have everywhere from Ampere on."""

_ALLOWED = {"float16": 2.0**-6, "bfloat16": 2.0**-3, "float32": 2.0**-10}
"""Far above the dtype's rounding of a row, far below what a wrong product comes to."""


def main(settled: Collection[str] = (), near: int = 0) -> None:
    """Prints what was found so far as lines of JSON; the last one that ends is the whole.

    {"problem": what was wrong with all of it, "hazards": [...],
     "gpus": [{"name": "NVIDIA H200 (sm_90)", "at": their indices, "problem": what was wrong, or
               null before it was tried, "narrower": [[dtype, width, what was wrong], ...]}, ...],
     "trying": [name, dtype, width] or null}

    Args:
        settled: GPUs that an earlier process has tried, and was ended by.
        near: the GPU on which its kind is tried; others on the first of theirs.
    """
    found: dict[str, Any] = {"problem": "", "hazards": [], "gpus": []}

    def say(name: str, trial: Trial | None) -> None:
        trying = None if trial is None else [name, *trial]
        print(json.dumps({**found, "trying": trying}), flush=True)

    say("", FIRST)
    places: dict[str, list[int]] = {}
    try:
        if not torch.cuda.is_available():
            found["problem"] = "torch must see a GPU. Got none."
        else:
            places = kinds()
        for name, at in places.items():
            beware = hazard(triton_launch.architecture(torch.device("cuda", at[0])))
            if beware:
                found["hazards"].append(f"{name}: {beware}")
    except Exception as error:  # whatever it raises is the reason
        found["problem"] = f"torch must know its GPUs. Got {_said(error)}"
    if not found["problem"]:
        found["gpus"] = [
            {"name": name, "at": at, "problem": None, "narrower": []} for name, at in places.items()
        ]
        for gpu in found["gpus"]:
            if gpu["name"] not in settled:
                _try(gpu, near if near in gpu["at"] else gpu["at"][0], say)
    say("", None)


def _try(gpu: dict[str, Any], index: int, say: Any) -> None:
    """The first trial, and what may fail where that does not."""
    name, device = gpu["name"], torch.device("cuda", index)
    say(name, FIRST)
    gpu["problem"] = _wrong(name, device, FIRST)
    for trial in () if gpu["problem"] else trials(device):
        say(name, trial)
        wrong = _wrong(name, device, trial)
        if wrong:
            gpu["narrower"].append([*trial, wrong])


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def trials(device: torch.device) -> list[Trial]:
    """What is tried after the first: numbers and widths whose kernels are other ones."""
    with torch.cuda.device(device):
        brain = torch.cuda.is_bf16_supported(including_emulation=False)
        has = torch.cuda.get_device_properties(device)
    wide = "bfloat16" if brain else "float16"
    little = 0 < getattr(has, "shared_memory_per_block_optin", 0) < _ROOM
    numbers = [Trial("bfloat16", 64)] * brain + [Trial(wide, 256)]
    return numbers + [Trial("float32", 256)] * little


def _wrong(name: str, device: torch.device, trial: Trial) -> str:
    try:
        worst, allowed = error_on(device, trial), _ALLOWED[trial.dtype]
    except Exception as error:  # whatever it raises is the reason
        return f"kernels must compile and run on {name}. Got {_said(error)}"
    if worst <= allowed:
        return ""
    return (
        f"kernels must agree with the formula within {allowed:g} on {name}. "
        f"Got an error of {worst:g}."
    )


def kinds() -> dict[str, list[int]]:
    """The GPUs of each kind: {"NVIDIA H200 (sm_90)": [0, 1]}."""
    found: dict[str, list[int]] = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name = torch.cuda.get_device_name(device)
        found.setdefault(f"{name} ({triton_launch.architecture(device)})", []).append(index)
    return found


def error_on(device: torch.device, trial: Trial = FIRST) -> float:
    """The largest error of out and the gradients of query, key and value; NaN if there is one."""
    draw = torch.Generator().manual_seed(0)
    shape, dtype = (1, 2, _T, trial.width), getattr(torch, trial.dtype)
    q, k, v, up = (torch.randn(*shape, generator=draw).to(dtype) for _ in range(4))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    logits = wide[0] @ wide[1].transpose(-1, -2) * trial.width**-0.5
    hidden = torch.ones(_T, _T, dtype=torch.bool).triu(1)
    want = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ wide[2]
    pulled = torch.autograd.grad(want, wide, up.double())
    x = Operands(*[t.to(device) for t in (q, k, v)])
    ask = Ask("BHTD", "zero", 0.0, CAUSAL, None, 0, False, False, "triton")
    out, _, _, *rows = triton_forward.forward(ask, trial.width**-0.5, x)
    upstream = Upstream(up.to(device), None, None)
    wanted = [True, True, True, False, False]
    grads = triton_backward.backward(ask, trial.width**-0.5, x, Saved(out, *rows), upstream, wanted)
    pairs: list[tuple[Any, Any]] = list(zip((out, *grads), (want, *pulled), strict=True))
    errors = [(got.cpu().double() - true.detach()).abs().max() for got, true in pairs]
    return float(torch.stack(errors).max())


if __name__ == "__main__":
    main()
