"""Whether our Triton kernels can run here, and in words why not.

Triton may be missing, may have no compiler for this GPU, and some versions end a process that has
imported TensorFlow first. So this process asks another one, once: it launches the kernels on every
kind of GPU that torch sees and compares what comes back (`triton_probe`). What it finds is a
sentence for `refusals`, for `explain` and for `attn-core doctor`; nothing is asked before a problem
on a GPU wants to know.

Without a GPU, kernels run where TRITON_INTERPRET=1 was set before triton was imported: slowly, for
tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import lru_cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from signal import Signals
from typing import NamedTuple

TIMEOUT = 300.0
"""Seconds that the other process may take; compiling the kernels is most of it."""

_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
_SAFE = ("3.4", "3.5", "3.6")
"""Versions that do not mind that TensorFlow came first; 3.7 to 3.9 abort the process."""

_LOCK = threading.Lock()


class Finding(NamedTuple):
    """What the other process found.

    Attributes:
        devices: the GPUs on which kernels ran: "NVIDIA H200 (sm_90)".
        problem: why kernels cannot be used, a sentence; "" where they can.
        hazards: sentences about what is known to go wrong with these versions.
    """

    devices: tuple[str, ...] = ()
    problem: str = ""
    hazards: tuple[str, ...] = ()


def problem(device: str) -> str:
    """Why kernels cannot run on this kind of device; "" where they can, and triton is loaded then.

    torch.compile runs this while it traces, and keeps the answer.
    """
    wrong, found = _place(device), version()
    if wrong:
        return wrong
    if found is None:
        return "triton must be installed: pip install 'attn-core[triton]'. Got none."
    wrong = _after_tensorflow(found)
    if not wrong and device == "cuda":
        with _LOCK:
            wrong = finding().problem
    return wrong or _loaded(found)


# What torch.compiler.assume_constant_result does, without loading torch's compiler (and triton).
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def interpreting() -> bool:
    """Whether Triton has been told to interpret kernels; spelled as it reads its own switch."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@lru_cache(maxsize=1)
def version() -> str | None:
    """Of the installed triton, which is not imported for it."""
    for name in _DISTRIBUTIONS:
        try:
            return version_of(name)
        except PackageNotFoundError:
            continue
    return None


def _after_tensorflow(found: str) -> str:
    loaded = "triton._C.libtriton" in sys.modules
    if loaded or "tensorflow" not in sys.modules or found.startswith(_SAFE):
        return ""
    return (
        "triton must be imported before TensorFlow, or be 3.6: later versions abort a process that "
        f"imported TensorFlow first. Got triton {found} and TensorFlow imported."
    )


def _place(device: str) -> str:
    if device == "cuda" and interpreting():
        return "TRITON_INTERPRET must not be set where the device is cuda. Got it set."
    if device != "cuda" and not (device == "cpu" and interpreting()):
        return (
            "the device must be cuda; or cpu, in Triton's interpreter: TRITON_INTERPRET=1, set "
            f"before triton is imported. Got {device}."
        )
    return ""


def _loaded(found: str) -> str:
    """Imports the kernels: from here on nothing that is imported later can come before triton."""
    try:
        from attn_core.backends.torch import triton_launch
    except Exception as error:  # whatever it raises is the reason
        return f"triton {found} must be importable. Got {type(error).__name__}: {error}"
    if not triton_launch.consistent() or interpreting() != triton_launch.INTERPRETED:
        return (
            "TRITON_INTERPRET must be the same as when triton was imported. Got it changed since."
        )
    return ""


@lru_cache(maxsize=1)
def finding() -> Finding:
    """What a process of its own found, once."""
    if not sys.executable or getattr(sys, "frozen", False):
        # The executable of a frozen application is that application.
        return Finding(problem="Python must have an executable to probe kernels with. Got none.")
    # "" is the folder that this process stands in, from which we may have been imported.
    paths = os.pathsep.join(path or os.curdir for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths}
    code = "from attn_core.backends.torch import triton_probe; triton_probe.main()"
    try:
        ran = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Finding(problem=f"kernels must answer a probe within {TIMEOUT:g} s. Got no answer.")
    except OSError as error:
        return Finding(problem=f"a process to probe kernels in must start. Got {error}.")
    try:
        said = json.loads(ran.stdout.splitlines()[-1])
        return Finding(tuple(said["devices"]), said["problem"], tuple(said["hazards"]))
    except (IndexError, KeyError, TypeError, ValueError):
        status = ran.returncode
        how = f"signal {Signals(-status).name}" if status < 0 else f"status {status}"
        last = ([line for line in ran.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        return Finding(problem=f"kernels must survive a probe. Got {how}: {last}")


def lines() -> list[str]:
    """What `attn-core doctor` says of the kernels."""
    found = version()
    if found is None:
        return ["triton: not installed; pip install 'attn-core[triton]'"]
    if interpreting():
        wrong = problem("cpu")
        state = (
            f"not used: {wrong}" if wrong else "interpreted on the CPU (TRITON_INTERPRET is set)"
        )
        return [f"triton: triton {found}, {state}"]
    probed = finding()
    state = (
        f"not used: {probed.problem}" if probed.problem else f"ready on {', '.join(probed.devices)}"
    )
    return [
        f"triton: triton {found}, {state}",
        *[f"triton: beware, {said}" for said in probed.hazards],
    ]
