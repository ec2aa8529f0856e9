"""Whether our Triton kernels can run here, and in words why not.

Triton may be missing, may have no compiler for this GPU, and some versions end a process that has
imported TensorFlow first. So this process asks another one, once: it launches the kernels on every
kind of GPU that torch sees and compares what comes back (`triton_probe`). What it finds is a
sentence for `refusals`, for `explain` and for `attn-core doctor`; nothing is asked before a problem
on a GPU wants to know. A GPU that fails refuses what is asked of its own kind; one that ends the
process has another one go on with the others.

Without a GPU, kernels run where TRITON_INTERPRET=1 was set before triton was imported: slowly, for
tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from signal import Signals
from typing import Any, NamedTuple

from attn_core.backends.torch.forks import Alone

TIMEOUT = 300.0
"""Seconds that the other process may take; compiling the kernels is most of it."""

_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
_SAFE = ("3.4", "3.5", "3.6")
"""Versions that do not mind that TensorFlow came first; 3.7 to 3.9 abort the process."""

_PLAIN, _WIDE = 64, 256
"""Widths of trials: with the first every width up to it stands or falls, with the other those above
half of it."""

_LOCK = Alone()


class Gpu(NamedTuple):
    """What the other process found of one kind of GPU.

    Attributes:
        name: "NVIDIA H200 (sm_90)".
        at: the indices that torch gives to these.
        problem: why kernels cannot be used there, a sentence; "" where they can, None before that
            has been tried.
        narrower: (dtype, width, sentence): where kernels that otherwise work did not.
    """

    name: str
    at: tuple[int, ...] = (0,)
    problem: str | None = ""
    narrower: tuple[tuple[str, int, str], ...] = ()


class Finding(NamedTuple):
    """What the other process found.

    Attributes:
        gpus: by kind.
        problem: why kernels cannot be used at all, a sentence; "" where they may be.
        hazards: sentences about what is known to go wrong with these versions.
    """

    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    hazards: tuple[str, ...] = ()

    def on(self, index: int) -> Gpu:
        """That GPU; one that was not seen has a problem."""
        for gpu in self.gpus:
            if index in gpu.at:
                return gpu
        seen = ", ".join(f"{n}" for gpu in self.gpus for n in gpu.at) or "none"
        unseen = f"the GPU must be one that the probe saw: {seen}. Got cuda:{index}."
        return Gpu("", (index,), self.problem or unseen)


def problem(device: str, index: int = 0) -> str:
    """Why kernels cannot run on this device; "" where they can, and triton is loaded then.

    torch.compile runs this while it traces, and keeps the answer.
    """
    wrong, found = _place(device), version()
    if wrong:
        return wrong
    if found is None:
        return "triton must be installed: pip install 'attn-core[triton]'. Got none."
    wrong = _after_tensorflow(found)
    if not wrong and device == "cuda":
        with _LOCK.held():
            wrong = finding(index).on(index).problem or ""
    return wrong or _loaded(found)


def narrower(device: str, dtype: str, width: int, index: int = 0) -> str:
    """Why kernels that can run on this device cannot on such numbers; "" where they can.

    Of a width, all above half of it are taken to be alike, in either dtype of 16 bits: they have
    the same kernels, whose tiles are of a power of two. Those of float32 are others.

    Args:
        width: the wider of D and Dv.
    """
    if dtype not in ("float16", "bfloat16", "float32"):
        return ""
    if device != "cuda":
        return _interpreted(dtype)
    with _LOCK.held():
        found = finding(index).on(index).narrower
    for bad, most, wrong in found:
        alike = dtype == bad or "float32" not in (dtype, bad)
        if (dtype == bad and most <= _PLAIN) or (alike and most > _PLAIN and width > most // 2):
            return f"{wrong} It was {bad} of width {most}."
    return ""


def _interpreted(dtype: str) -> str:
    from attn_core.kernels import interpreter

    if dtype != "bfloat16" or interpreter.BFLOAT16:
        return ""
    return (
        "the dtype must be float32 or float16 in the interpreter of this version of Triton, which "
        "takes bfloat16 for an integer. Got bfloat16."
    )


# What torch.compiler.assume_constant_result does, without loading torch's compiler (and triton).
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
narrower._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


_found: list[Finding] = []


def finding(near: int = 0) -> Finding:
    """What processes of their own found, once: one, and another for each that a GPU has ended.

    Args:
        near: a GPU that stands for its kind there. Of many processes, with a GPU each, all would
            else try theirs on the first one, which has memory for the process that it belongs to.
    """
    if not _found:
        _found.append(_tried(near))
    return _found[0]


def _tried(near: int) -> Finding:
    if not sys.executable or getattr(sys, "frozen", False):
        # The executable of a frozen application is that application.
        return Finding(problem="Python must have an executable to probe kernels with. Got none.")
    gpus: dict[str, Gpu] = {}
    hazards: tuple[str, ...] = ()
    while True:
        tried = [name for name, gpu in gpus.items() if gpu.problem is not None]
        found = _asked(tried, near)
        gpus |= {gpu.name: gpu for gpu in found.gpus if gpu.name not in tried}
        hazards = found.hazards or hazards
        if not gpus:
            return found
        left = [name for name, gpu in gpus.items() if gpu.problem is None]
        if left and len(gpus) - len(left) == len(tried):
            wrong = found.problem or "kernels must be tried before they are used. Got no trial."
            gpus |= {name: gpus[name]._replace(problem=wrong) for name in left}
            left = []
        if not left:
            return Finding(tuple(gpus.values()), "", hazards)


def _asked(tried: Sequence[str], near: int) -> Finding:
    """What one process found, of GPUs that have not been tried; of those that it did not come to
    the problem is None."""
    # "" is the folder that this process stands in, from which we may have been imported.
    paths = os.pathsep.join(path or os.curdir for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths}
    told = f"{list(tried)!r}, {near}"
    code = f"from attn_core.backends.torch import triton_probe; triton_probe.main({told})"
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
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""
        said = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
        never = f"kernels must answer a probe within {TIMEOUT:g} s. Got no answer."
        return _part(said, never) or Finding(problem=never)
    except OSError as error:
        return Finding(problem=f"a process to probe kernels in must start. Got {error}.")
    status = ran.returncode
    how = f"signal {Signals(-status).name}" if status < 0 else f"status {status}"
    last = ([line for line in ran.stderr.splitlines() if line.strip()] or ["no message"])[-1]
    died = f"kernels must survive a probe. Got {how}: {last}"
    return _part(ran.stdout, died) or Finding(problem=died)


def _part(told: str, ended: str) -> Finding | None:
    """What the other process said, if only at last; None where that is nothing.

    Args:
        ended: what is to be said of the trial that it ended in.
    """
    try:
        said = json.loads(told.splitlines()[-1])
        gpus = [_gpu(each) for each in said["gpus"]]
        found = Finding((), str(said["problem"]), tuple(said["hazards"]))
        trying = said.get("trying")
        if trying is None:
            return found._replace(gpus=tuple(gpus))
        name, dtype, width = str(trying[0]), str(trying[1]), int(trying[2])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    if name not in [gpu.name for gpu in gpus]:
        return None
    at = [gpu.name for gpu in gpus].index(name)
    if (dtype, width) == ("float16", _PLAIN):
        gpus[at] = gpus[at]._replace(problem=ended)
    else:
        narrow = [*gpus[at].narrower, (dtype, width, ended)]
        if width <= _PLAIN:
            # What would have been tried after it is not known to work either.
            narrow.append((dtype, _WIDE, f"{ended} Wider ones were not tried."))
        gpus[at] = gpus[at]._replace(narrower=tuple(narrow))
    return found._replace(gpus=tuple(gpus))


def _gpu(said: Mapping[str, Any]) -> Gpu:
    """As `triton_probe.main` says it."""
    wrong = said["problem"]
    return Gpu(
        str(said["name"]),
        tuple(int(n) for n in said["at"]),
        None if wrong is None else str(wrong),
        tuple((str(dtype), int(width), str(why)) for dtype, width, why in said["narrower"]),
    )


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
    ready = [gpu.name for gpu in probed.gpus if not gpu.problem]
    bad = [gpu for gpu in probed.gpus if gpu.problem]
    none = probed.problem or (
        f"the probe failed on {', '.join(gpu.name for gpu in bad)}" if bad else "no GPU"
    )
    state = f"ready on {', '.join(ready)}" if ready else f"not used: {none}"
    return [
        f"triton: triton {found}, {state}",
        *[f"triton: not on {gpu.name}: {gpu.problem}" for gpu in bad],
        *[
            f"triton: not for {d} of width {n} on {gpu.name}: {why}"
            for gpu in probed.gpus
            for d, n, why in gpu.narrower
        ],
        *[f"triton: beware, {said}" for said in probed.hazards],
    ]
