"""A GPU from beginning to end: is it right, how fast is it, is it clean?

    doctor        what is installed, and what the kernels' probe says
    tests         the kernels' own tests, compiled; each failure is written as it happens
    smoke         the suite's smallest tier, in every dtype: whether there is anything to time
    bench         check, then time: the cases of `gpu_cases.py`, those that tell most first
    tune          tiles, measured; what wins is written beside, and put in force nowhere
    conformance   the whole suite, every option, float32, float16 and bfloat16
    sanitizer     NVIDIA's compute-sanitizer over a small part of it, where it is installed

    {"version": 1, "gpu": "NVIDIA H200", "facts": {...}, "environment": {...}, "pace": {...},
     "stages": {"smoke": {"status": "passed", "said": "...", "commit": ..., "date": ...}, ...},
     "measured": [{"case": ..., "subject": ..., "direction": ..., "samples": [..ms..]}, ...]}

in `benchmarks/results/<gpu>.json`, from which `gpu_page.py` makes docs/GPU.md. It is written after
every case, and what a stage says goes into the folder of that name as it is said, so that who is
stopped has what was measured and what failed. Where minutes are given, each stage has its part of
them, and none goes on beyond: what was not reached is told, and is no figure. What the file holds
of stages that are not asked for now, or are skipped, stays, under the commit that it is of; the
measurements, the facts, the environment and the pace are those of `bench`, and stay until it
measures anew. Without a GPU nothing runs and nothing is written.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from attn_core.benchmarks import gpu_cases, gpu_stages, timing
from attn_core.benchmarks.check import asked, error, expected_names, shares
from attn_core.benchmarks.gpu_cases import GpuCase, Measured
from attn_core.benchmarks.gpu_stages import LEAST, Stage

VERSION = 1
_OF_BENCH = ("facts", "environment", "pace", "measured")
SHARES = {
    "doctor": 4,
    "tests": 26,
    "smoke": 15,
    "bench": 35,
    "tune": 12,
    "conformance": 6,
    "sanitizer": 2,
}
"""Stages in the order of what they tell, and their parts of the time: of those that are asked for,
and what one leaves over is the others'."""

STAGES = tuple(SHARES)


class NoGpu(RuntimeError):
    """There is no GPU to run on."""


class Unreadable(ValueError):
    """Where the results belong stands something else."""


class Pace(NamedTuple):
    """Rounds of turns, two samples each, calls in a sample, and key heads judged (0: all)."""

    rounds: int = 5
    repeats: int = 20
    heads: int = 0


PACE = Pace()
HURRIED = Pace(3, 5, 8)
"""Where minutes are given."""

Say = Callable[[str], None]
Call = Callable[[], Any]
Keep = Callable[[Sequence[Measured]], None]


class Limit:
    """Until when there is time."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.seconds = clock, None if minutes is None else 60 * minutes
        self.began = clock()

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over; infinite where there is no limit."""
        if self.seconds is None:
            return float("inf")
        return self.began + share * self.seconds - self.clock()

    def until(self, share: float) -> Limit:
        """The limit of whoever has the time up to this share of it."""
        other = copy(self)
        other.seconds = None if self.seconds is None else share * self.seconds
        return other

    def part(self, share: float) -> Limit:
        """The limit of whoever has this part of what is left."""
        other = copy(self)
        if self.seconds is not None:
            other.seconds = self.seconds - (1 - share) * self.left()
        return other


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
    minutes: float | None = None,
    environment: Mapping[str, Any] | None = None,
    say: Say = print,
    call: gpu_stages.Call | None = None,
    given: Sequence[GpuCase] | None = None,
    bench: Callable[..., None] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run the stages, and write all along what is known; (what was written, where).

    Args:
        machine: `gpu_calls`, or what stands in for it.
        only: parts of the names of cases; all by default.
        minutes: how long all of it may take.
        call: runs a command.
        bench: times the cases: `bench` here, or `gpu_apart.bench`, which survives its kernels.

    Raises:
        Unreadable: what stands in `into` is not of a run like this, or of measurements that this
            one would lose, or it has no suffix.
    """
    limit = Limit(minutes)
    known = machine.facts()
    path = into or Path("benchmarks/results") / f"{slug(known['gpu'])}.json"
    said_in = path.with_suffix("")
    if said_in == path:
        raise Unreadable(
            f"the file of results must have a suffix, as in {path}.json: the folder of what stages "
            f"say has its name without one. Got {path}."
        )
    place = dict(environment or {})
    now = {name: place[name] for name in ("commit", "date") if name in place}
    whole: dict[str, Any] = {
        "version": VERSION,
        "gpu": known["gpu"],
        "facts": known,
        "environment": place,
        "pace": {**pace._asdict(), "minutes": minutes},
        "stages": {},
        "measured": [],
    }
    before = _before(path, whole)
    if "bench" in stages:
        _none_lost(path, before, only)
    for stage in STAGES:  # at once, so that who is stopped has lost none of it
        unasked = Stage("skipped", "not asked for")._asdict()
        whole["stages"][stage] = before.get("stages", {}).get(stage, unasked)
    ours = {name: whole[name] for name in _OF_BENCH}
    if before.get("measured"):
        whole |= {name: before[name] for name in _OF_BENCH if name in before}

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
        beside.replace(path)

    def keep(found: Sequence[Measured]) -> None:
        ours["measured"] += [m._asdict() for m in found]
        whole.update(ours)
        whole["stages"]["bench"] = dict(Stage("stopped", "it did not end")._asdict(), **now)
        write()

    def timed(limit: Limit) -> Stage:
        some = [c for c in given or gpu_cases.cases() if not only or _named(c.name, only)]
        units = [(c, direction) for c in gpu_cases.ranked(some) for direction in c.directions]
        try:
            (bench or in_place)(machine, units, pace, say, limit, keep)
        except RuntimeError as raised:  # of `gpu_apart`: no worker begins with anything
            return Stage("failed", str(raised))
        return _of_bench(units, measured_of({**whole, **ours}))

    spent, whole_share = 0, sum(SHARES[stage] for stage in stages)
    for stage in STAGES:
        if stage not in stages:
            continue
        say(f"== {stage}")
        spent += SHARES[stage]
        mine = limit.until(spent / whole_share)
        if mine.left() < LEAST:
            result = Stage("skipped", "no time was left")
        elif stage == "bench":
            result = timed(mine)
        else:
            said_in.mkdir(parents=True, exist_ok=True)
            result = gpu_stages.STAGES[stage](call or gpu_stages.called, mine.left(), said_in)
        say(f"{stage}: {result.status}. {result.said}")
        if result.status == "skipped" and whole["stages"][stage]["status"] != "skipped":
            continue  # what it said before is worth more
        whole["stages"][stage] = dict(result._asdict(), **now)
        write()
    return whole, path


def _before(path: Path, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the file holds; nothing where there is none.

    Raises:
        Unreadable: it is no JSON, or of something else, another GPU or another version, which is
            not to be written over.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise Unreadable(f"{path} must hold JSON, or not exist. Got {error}.") from error
    if not isinstance(found, dict) or "gpu" not in found:
        raise Unreadable(
            f"{path} must be of `attn-core bench gpu`, or not exist. Got JSON without `gpu`."
        )
    for name in ("gpu", "version"):
        if found.get(name) != whole[name]:
            raise Unreadable(
                f"{path} must be of {name} {whole[name]!r}, or not exist: it would be written "
                f"over. Got {found.get(name)!r}: move it, or write elsewhere with --json."
            )
    return found


def _none_lost(path: Path, before: Mapping[str, Any], only: Sequence[str]) -> None:
    """Figures stand together or not at all: they are of one commit, one day and one machine.

    Raises:
        Unreadable: some of the file's would go, and nothing take their place.
    """
    held = sorted({m["case"] for m in before.get("measured", ())})
    lost = [name for name in held if only and not _named(name, only)]
    if lost:
        raise Unreadable(
            f"with `--case`, {path} must hold measurements of those cases alone, or not exist: one "
            f"run's take the place of another's. Got {lost[0]} too, of {len(lost)} such: write "
            "elsewhere with --json."
        )


def _of_bench(units: Sequence[tuple[GpuCase, str]], found: Sequence[Measured]) -> Stage:
    reached = {(m.case, m.direction) for m in found}
    behind = [f"{c.name} {d}" for c, d in units if (c.name, d) not in reached]
    bad = [m for m in found if m.status == "wrong"]
    bad += [m for m in found if m.status == "error" and m.subject.startswith(gpu_cases.OURS)]
    said = f"{len(found)} measurements"
    if behind:
        said += f"; {len(behind)} of {len(units)} not reached, from {behind[0]} on"
    return Stage("failed" if bad else "stopped" if behind else "passed", said)


def slug(name: str) -> str:
    """A device's name as the name of a file: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def failed(whole: Mapping[str, Any], stages: Sequence[str] = STAGES) -> bool:
    """Whether anything was wrong in one of these; a missed target is none of that, and is
    published."""
    return any(whole["stages"][stage]["status"] == "failed" for stage in stages)


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


def in_place(
    machine: Any,
    units: Sequence[tuple[GpuCase, str]],
    pace: Pace,
    say: Say,
    limit: Limit,
    keep: Keep,
) -> None:
    """Every case and direction through every subject, in this process."""
    timer = machine.Timer()
    for number, (case, direction) in enumerate(units):
        if limit.left() < LEAST:
            return
        say(f"{number + 1} of {len(units)}: {case.name}, {direction}")
        keep(measured(machine, timer, case, direction, pace, case.who(direction)))


def measured(
    machine: Any,
    timer: Any,
    case: GpuCase,
    direction: str,
    pace: Pace,
    subjects: Sequence[str],
) -> list[Measured]:
    """Every subject checked, then all timed turn by turn."""
    told, calls = judged(machine, case, direction, pace.heads, subjects)
    return timed(machine, timer, case, direction, pace, told, calls.__getitem__)


def judged(
    machine: Any,
    case: GpuCase,
    direction: str,
    heads: int,
    subjects: Sequence[str],
    beginning: Callable[[str], None] = lambda subject: None,
) -> tuple[list[Measured], dict[str, Call]]:
    """Every subject's answer checked: (what is told of each, the calls of those that are right).

    Args:
        beginning: is told who comes next.
    """
    told: list[Measured] = []
    calls: dict[str, Call] = {}
    for subject in subjects:
        beginning(subject)
        plain = Measured(case.name, subject, direction, "measured")
        try:
            call = machine.prepared(subject, case, direction)
            told.append(_checked(plain, call, case, heads))
            if told[-1].status == "measured":
                calls[subject] = call.run
        except machine.Refused as reason:
            told.append(plain._replace(status="refused", problem=str(reason)))
        except Exception as raised:  # whatever a subject raises is told of it, and costs no other
            told.append(plain._replace(status="error", problem=_told(raised)))
    beginning("")
    return told, calls


def timed(
    machine: Any,
    timer: Any,
    case: GpuCase,
    direction: str,
    pace: Pace,
    told: Sequence[Measured],
    call: Callable[[str], Call],
    beginning: Callable[[str], None] = lambda subject: None,
) -> list[Measured]:
    """Those that were right timed, turn by turn; `call` prepares a subject's."""
    found = {m.subject: m for m in told}
    ready: dict[str, Call] = {}

    def wrong(subject: str, raised: Exception) -> None:
        found[subject] = found[subject]._replace(status="error", problem=_told(raised))

    for subject in [m.subject for m in told if m.status == "measured"]:
        beginning(subject)
        short = case.kind == "decode" and subject.startswith(gpu_cases.OURS)
        try:
            run = call(subject)
            ready[subject] = machine.captured(run) if short else run
        except Exception as raised:
            wrong(subject, raised)
    beginning("")
    samples: dict[str, list[float]] = {subject: [] for subject in ready}
    for turn in timing.turns(list(ready), pace.rounds):
        if turn.name not in ready:
            continue
        try:
            milliseconds = timer.sample(ready[turn.name], pace.repeats)
        except Exception as raised:
            del ready[turn.name], samples[turn.name]
            wrong(turn.name, raised)
            continue
        if turn.counted:
            samples[turn.name].append(milliseconds)
    return [m._replace(samples=tuple(samples.get(s, ()))) for s, m in found.items()]


def _told(raised: Exception) -> str:
    return f"{type(raised).__name__}: {str(raised)[:300]}"


def _checked(plain: Measured, call: Any, case: GpuCase, heads: int) -> Measured:
    """The same, wrong where its answer is; with its error where it is an output."""
    if plain.subject == gpu_cases.COPY or plain.subject == gpu_cases.DROPOUT:
        return plain  # a copy has no answer; what dropout leaves out is conformance's to judge
    got = call.answer(asked(case).arrays)
    given = {n: got[n] for n in expected_names(plain.direction)}
    found = shares(case, plain.direction, given, heads)
    bad = [f"{name} {share:.2g}" for name, share in found.items() if not share <= 1]
    if bad:
        return plain._replace(
            status="wrong", problem="errors of what is allowed: " + ", ".join(bad)
        )
    if plain.direction != "forward":
        return plain
    return plain._replace(rmse=error(case, plain.direction, got["out"], heads))
