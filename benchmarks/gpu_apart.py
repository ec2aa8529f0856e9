"""The cases of a GPU in processes apart: a kernel that ends one, or never ends, costs itself.

An address that is not the kernel's leaves a CUDA process without a device, and every case after it
without a figure; a barrier that nobody comes to waits for good. So workers go through the cases,
and say of each who begins and what came of it:

    {"begins": "torch:triton"}      {"begins": ""}      {"told": [...]}

Where one ends, where it says nothing for `PATIENCE` seconds, or where the device no longer answers
after an error, the subject that had begun is told of it, the rest of the case is asked again
without it, and another worker goes on.

They go through the cases twice. First about as many as there are processors judge answers, side by
side: what takes long then, compilers and the judge, is the host's work, and what is compiled stays
in caches on its disk. Then one alone times who was right, on numbers that the device has drawn.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from attn_core.benchmarks.gpu import Keep, Limit, Pace, Say, judged, timed
from attn_core.benchmarks.gpu_cases import GpuCase, Measured

PATIENCE = 180.0
"""Seconds without a word after which a worker is taken for dead; compiling is the longest."""

JUDGING = 0.6
"""The part of the time that judging may take."""

ROOM = 8 * 2**30
"""Bytes of the device that a judge may need: arrays of seven subjects, and what comes of them."""

_FUTILE = 3
"""Workers one after another that end before they have said anything."""

_LOST = 9
"""The exit status of a worker whose device no longer answers."""

_CODE = "from attn_core.benchmarks import gpu_apart; gpu_apart.main()"
COMMAND = (sys.executable, "-c", _CODE)


class Unit(NamedTuple):
    """A case, a direction, and what is told of each subject: of those to be asked "measured"."""

    case: GpuCase
    direction: str
    told: tuple[Measured, ...]

    @property
    def asked(self) -> tuple[str, ...]:
        return tuple(m.subject for m in self.told if m.status == "measured")


Told = Callable[[Unit, Sequence[Measured]], None]


def bench(
    machine: Any,
    units: Sequence[tuple[GpuCase, str]],
    pace: Pace,
    say: Say,
    limit: Limit,
    keep: Keep,
    command: Sequence[str] = COMMAND,
    patience: float = PATIENCE,
    judges: int | None = None,
) -> None:
    """`gpu.in_place`, in workers: what they measure is kept as it comes.

    Args:
        judges: how many judge answers side by side; by default one for each processor but two, as
            far as the device's memory goes.

    Raises:
        RuntimeError: workers end before they have begun with anything.
    """
    given = [
        Unit(c, d, tuple(Measured(c.name, s, d, "measured") for s in c.who(d))) for c, d in units
    ]
    names = list(dict.fromkeys(case.name for case, _ in units))
    many = min(judges or _judges(machine), len(names))
    answers: dict[tuple[str, str], tuple[Measured, ...]] = {}

    def answered(unit: Unit, found: Sequence[Measured]) -> None:
        answers[unit.case.name, unit.direction] = tuple(found)
        for m in found:
            if m.status in ("wrong", "error"):
                say(f"{m.case} {m.direction}, {m.subject}: {m.status}. {m.problem}")

    def judge(at: int) -> None:
        mine = [unit for unit in given if unit.case.name in names[at::many]]
        _through(mine, "judge", pace, limit.part(JUDGING), answered, command, patience)

    say(f"{len(given)} to judge, {many} at once")
    began = time.monotonic()
    with ThreadPoolExecutor(many) as pool:
        list(pool.map(judge, range(many)))
    right = [
        unit._replace(told=answers[unit.case.name, unit.direction])
        for unit in given
        if (unit.case.name, unit.direction) in answers
    ]
    say(f"{len(right)} judged in {time.monotonic() - began:.0f} s; now they are timed")

    done: list[Unit] = []

    def measured(unit: Unit, found: Sequence[Measured]) -> None:
        keep(found)
        done.append(unit)
        say(f"{len(done)} of {len(right)}: {unit.case.name}, {unit.direction}")

    _through(right, "time", pace, limit, measured, command, patience)


def _judges(machine: Any) -> int:
    room = machine.facts()["memory"] // ROOM
    return max(1, min((os.cpu_count() or 1) - 2, room))


def _through(
    units: Sequence[Unit],
    job: str,
    pace: Pace,
    limit: Limit,
    told: Told,
    command: Sequence[str],
    patience: float,
) -> None:
    """Workers do this job on all units, one worker after another."""
    left, futile = list(units), 0
    while left and limit.left() > 0:
        worker, begun, spoken = _Worker(command, job, left, pace), "", False
        while left:
            line = worker.line(min(patience, limit.left()))
            if line is None:
                break
            spoken = True
            if "begins" in line:
                begun = line["begins"]
                continue
            found = {m["subject"]: m for m in line["told"]}
            unit = left.pop(0)
            told(unit, [_merged(m, found.get(m.subject)) for m in unit.told])
            begun = ""
        how = worker.end()
        if not left or limit.left() <= 0 or how == _LOST:
            continue  # of the last, what was lost had been told before
        futile = 0 if spoken else futile + 1
        if futile == _FUTILE:
            raise RuntimeError(f"a worker must begin with its cases. Got {how}: {worker.last}")
        if spoken:
            left[0] = _blamed(left[0], begun, f"the process ended with it ({how}): {worker.last}")


def _merged(before: Measured, found: Any) -> Measured:
    """What a worker found of it; its answer was judged before it was timed."""
    if found is None:
        return before
    now = Measured(**{**found, "samples": tuple(found["samples"])})
    return now._replace(rmse=before.rmse if now.rmse is None else now.rmse)


def _blamed(unit: Unit, begun: str, problem: str) -> Unit:
    """Whoever had begun gets no figure here; of a case that was being timed, nobody does."""
    return unit._replace(
        told=tuple(
            m._replace(status="error", problem=problem[:400])
            if m.status == "measured" and begun in ("", m.subject)
            else m
            for m in unit.told
        )
    )


class _Worker:
    """A process that goes through units.

    Attributes:
        last: the last line that it said beside its answers.
    """

    def __init__(self, command: Sequence[str], job: str, units: Sequence[Unit], pace: Pace) -> None:
        asked = [(asdict(u.case), u.direction, u.asked) for u in units]
        self.last = "no message"
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._read, self._hear)]
        for thread in self.threads:
            thread.start()
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"job": job, "units": asked, "pace": pace}) + "\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, which its lines will tell

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _hear(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last = line.strip() or self.last

    def line(self, seconds: float) -> dict[str, Any] | None:
        """What it says next; None where it has ended, or says nothing for so long."""
        try:
            said = self.lines.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            self.last = f"no word for {seconds:.0f} s"
            return None
        return None if said is None else dict(json.loads(said))

    def end(self) -> int:
        """Its exit status, once it is gone."""
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
        status = self.process.wait()
        for thread in self.threads:
            thread.join(1)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return status


def main(machine: Any = None) -> None:
    """A worker: one line of JSON comes in, with the job, the units and the pace."""
    from attn_core.conformance.worker import own_stdout

    channel = own_stdout()
    asked = json.loads(sys.stdin.readline())
    if machine is None:
        from attn_core.benchmarks import gpu_calls

        machine = gpu_calls
    pace, timing = Pace(*asked["pace"]), asked["job"] == "time"
    timer = machine.Timer() if timing else None

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=channel, flush=True)

    def beginning(subject: str) -> None:
        say({"begins": subject})

    for fields, direction, subjects in asked["units"]:
        lists = {n: tuple(x) for n, x in fields.items() if isinstance(x, list)}
        case = GpuCase(**{**fields, **lists})
        if timing:
            told = [Measured(case.name, subject, direction, "measured") for subject in subjects]
            call = partial(machine.warmed, case=case, direction=direction)
            found = timed(machine, timer, case, direction, pace, told, call, beginning)
        else:
            found, _ = judged(machine, case, direction, pace.heads, subjects, beginning)
        say({"told": [m._asdict() for m in found]})
        if any(m.status == "error" for m in found) and not machine.answers():
            channel.flush()
            os._exit(_LOST)  # whatever is left would wait for the device


if __name__ == "__main__":
    main()
