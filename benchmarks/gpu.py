"""A GPU from beginning to end: is it right, is it clean, how fast is it?

    conformance   the suite, every option, float32, float16 and bfloat16
    sanitizer     NVIDIA's compute-sanitizer over a small part of it, where it is installed
    bench         check, then time: the cases of `gpu_cases.py`

    {"version": 1, "gpu": "NVIDIA H200", "facts": {...}, "environment": {...},
     "stages": {"conformance": {"status": "passed", "said": "..."}, ...},
     "measured": [{"case": ..., "subject": ..., "direction": ..., "samples": [..ms..]}, ...]}

in `benchmarks/results/<gpu>.json`, from which `gpu_page.py` makes docs/GPU.md. Without a GPU
nothing runs and nothing is written.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attn_core.benchmarks import gpu_cases, judge, timing
from attn_core.benchmarks.check import asked, expected_names, sampled, shares
from attn_core.benchmarks.gpu_cases import GpuCase, Measured

VERSION = 1
STAGES = ("conformance", "sanitizer", "bench")
SUBJECT = "attn_core.benchmarks.gpu_calls:triton"
"""`attention(impl="triton")` on the device, as the conformance suite names it."""

_SMALL = ("causal", "lengths", "dropout")
"""Cases that are run under compute-sanitizer, which makes them a hundred times slower."""


class NoGpu(RuntimeError):
    """There is no GPU to run on."""


class Stage(NamedTuple):
    """What came of a stage: passed, failed, or skipped with its reason."""

    status: str
    said: str


class Pace(NamedTuple):
    """Rounds of turns, two samples each, and calls in a sample."""

    rounds: int = 5
    repeats: int = 20


PACE = Pace()
Say = Callable[[str], None]


def device() -> Any:
    """What is known of the GPU (`gpu_calls`), imported here.

    Raises:
        NoGpu: there is no torch, or torch sees no CUDA device.
    """
    try:
        from attn_core.benchmarks import gpu_calls
    except ImportError as error:
        raise NoGpu(f"PyTorch must be installed for GPU benchmarks. Got {error}.") from error
    if not gpu_calls.available():
        raise NoGpu(
            "GPU benchmarks need a CUDA device that torch can use. Got none: nothing was run, and "
            "nothing was written."
        )
    return gpu_calls


def run(
    machine: Any,
    into: Path | None = None,
    *,
    stages: Sequence[str] = STAGES,
    only: Sequence[str] = (),
    pace: Pace = PACE,
    environment: Mapping[str, Any] | None = None,
    say: Say = print,
    call: Callable[[list[str]], tuple[int, str]] | None = None,
    given: Sequence[GpuCase] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run the stages, and write after each one what is known; (what was written, where).

    Args:
        machine: `gpu_calls`, or what stands in for it.
        only: parts of the names of cases; all by default.
        call: runs a command: (its exit status, the last of what it said).
    """
    known = machine.facts()
    path = into or Path("benchmarks/results") / f"{slug(known['gpu'])}.json"
    whole: dict[str, Any] = {
        "version": VERSION,
        "gpu": known["gpu"],
        "facts": known,
        "environment": dict(environment or {}),
        "stages": {},
        "measured": [],
    }
    called = call or _called
    for stage in STAGES:
        if stage not in stages:
            whole["stages"][stage] = Stage("skipped", "not asked for")._asdict()
            continue
        say(f"== {stage}")
        if stage == "bench":
            some = [c for c in given or gpu_cases.cases() if not only or _named(c.name, only)]
            found = bench(machine, some, pace, say)
            whole["measured"] = [m._asdict() for m in found]
            wrong = [m for m in found if m.status == "wrong"]
            ours = [
                m for m in found if m.status == "error" and m.subject.startswith(gpu_cases.OURS)
            ]
            result = Stage("failed" if wrong or ours else "passed", f"{len(found)} measurements")
        else:
            result = {"conformance": _conformance, "sanitizer": _sanitizer}[stage](called)
        say(f"{stage}: {result.status}. {result.said}")
        whole["stages"][stage] = result._asdict()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    return whole, path


def slug(name: str) -> str:
    """A device's name as the name of a file: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def failed(whole: Mapping[str, Any]) -> bool:
    """Whether anything was wrong; a missed target is none of that, and is published."""
    return any(stage["status"] == "failed" for stage in whole["stages"].values())


def measured_of(whole: Mapping[str, Any]) -> list[Measured]:
    """The measurements that a file holds.

    Raises:
        ValueError: it is of another version.
    """
    if whole.get("version") != VERSION:
        raise ValueError(
            f"a GPU's results must be of version {VERSION}. Got {whole.get('version')!r}."
        )
    return [Measured(**{**m, "samples": tuple(m["samples"])}) for m in whole["measured"]]


def _named(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


def _called(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, " | ".join(lines[-3:])


def _command(*words: str) -> list[str]:
    code = "from attn_core.cli import app\nif __name__ == '__main__': app()"
    return [sys.executable, "-c", code, "conformance", "run", "--subject", SUBJECT, *words]


def _conformance(call: Callable[[list[str]], tuple[int, str]]) -> Stage:
    status, said = call(_command("--tier", "full", "--failures", "--jobs", "1"))
    return Stage("passed" if status == 0 else "failed", said)


def _sanitizer(call: Callable[[list[str]], tuple[int, str]]) -> Stage:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Stage("skipped", "compute-sanitizer is not installed")
    cases = [word for name in _SMALL for word in ("--case", name)]
    command = [tool, "--error-exitcode", "9", "--target-processes", "all"]
    status, said = call([*command, *_command("--tier", "smoke", "--jobs", "1", *cases)])
    return Stage("passed" if status == 0 else "failed", said)


def bench(machine: Any, given: Sequence[GpuCase], pace: Pace, say: Say) -> list[Measured]:
    """Every case through every subject: checked, then timed turn by turn."""
    timer = machine.Timer()
    found: list[Measured] = []
    for number, case in enumerate(given):
        for direction in case.directions:
            say(f"{number + 1} of {len(given)}: {case.name}, {direction}")
            found += _case(machine, timer, case, direction, pace)
    return found


def _case(machine: Any, timer: Any, case: GpuCase, direction: str, pace: Pace) -> list[Measured]:
    ready: dict[str, Callable[[], Any]] = {}
    told: dict[str, Measured] = {}
    for subject in case.subjects:
        plain = Measured(case.name, subject, direction, "measured")
        try:
            call = machine.prepared(subject, case, direction)
            told[subject] = _checked(plain, call, case)
            if told[subject].status == "measured":
                short = case.kind == "decode" and subject.startswith(gpu_cases.OURS)
                ready[subject] = machine.captured(call.run) if short else call.run
        except machine.Refused as error:
            told[subject] = plain._replace(status="refused", problem=str(error))
        except Exception as error:  # whatever a subject raises is told of it, and costs no other
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            told[subject] = plain._replace(status="error", problem=reason)
    samples: dict[str, list[float]] = {subject: [] for subject in ready}
    for turn in timing.turns(list(ready), pace.rounds):
        milliseconds = timer.sample(ready[turn.name], pace.repeats)
        if turn.counted:
            samples[turn.name].append(milliseconds)
    return [m._replace(samples=tuple(samples.get(s, ()))) for s, m in told.items()]


def _checked(plain: Measured, call: Any, case: GpuCase) -> Measured:
    """The same, wrong where its answer is; with its error where it is an output."""
    if plain.subject == gpu_cases.COPY or plain.subject == gpu_cases.DROPOUT:
        return plain  # a copy has no answer; what dropout leaves out is conformance's to judge
    given = asked(case)
    got = call.answer(given.arrays)
    found = shares(case, plain.direction, {n: got[n] for n in expected_names(plain.direction)})
    bad = [f"{name} {share:.2g}" for name, share in found.items() if not share <= 1]
    if bad:
        return plain._replace(
            status="wrong", problem="errors of what is allowed: " + ", ".join(bad)
        )
    if plain.direction != "forward":
        return plain
    rows = sampled(case)
    wanted = judge.answer(case, given.arrays, rows, judge.exact, gradients=False).results["out"]
    error = np.asarray(got["out"][:, :, rows], np.float64) - wanted
    return plain._replace(rmse=float(np.sqrt(np.mean(error**2))))
