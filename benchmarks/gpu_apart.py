"""The cases of a GPU in a process of their own: a kernel that ends it, or never ends, costs itself.

An address that is not the kernel's leaves a CUDA process without a device, and every case after it
without a figure; a barrier that nobody comes to waits for good. So a worker goes through the cases,
and says of each who begins and what came of it:

    {"begins": "torch:triton"}      {"begins": ""}      {"measured": [...]}

Where it ends, where it says nothing for `PATIENCE` seconds, or where the device no longer answers
after an error, the subject that had begun is told of it, the rest of the case is asked again
without it, and another worker goes on.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from attn_core.benchmarks.gpu import Keep, Limit, Pace, Say, measured
from attn_core.benchmarks.gpu_cases import GpuCase, Measured

PATIENCE = 180.0
"""Seconds without a word after which a worker is taken for dead; compiling is the longest."""

_FUTILE = 3
"""Workers one after another that end before they have said anything."""

_LOST = 9
"""The exit status of a worker whose device no longer answers."""

_CODE = "from attn_core.benchmarks import gpu_apart; gpu_apart.main()"
COMMAND = (sys.executable, "-c", _CODE)


class Unit(NamedTuple):
    """A case, a direction, and who is asked."""

    case: GpuCase
    direction: str
    subjects: tuple[str, ...]


def bench(
    machine: Any,
    units: Sequence[tuple[GpuCase, str]],
    pace: Pace,
    say: Say,
    limit: Limit,
    keep: Keep,
    command: Sequence[str] = COMMAND,
    patience: float = PATIENCE,
) -> None:
    """`gpu.in_place`, in workers: what they measure is kept as it comes.

    Raises:
        RuntimeError: workers end before they have begun with anything.
    """
    left = [Unit(case, direction, case.who(direction)) for case, direction in units]
    whole, futile = len(left), 0
    while left and limit.left() > 0:
        worker, begun, spoken = _Worker(command, left, pace), "", False
        say(f"{whole - len(left) + 1} of {whole}: {left[0].case.name}, {left[0].direction}")
        while left:
            line = worker.line(min(patience, limit.left()))
            if line is None:
                break
            spoken = True
            if "begins" in line:
                begun = line["begins"]
                continue
            keep([Measured(**{**m, "samples": tuple(m["samples"])}) for m in line["measured"]])
            left.pop(0)
            begun = ""
            if left:
                at = whole - len(left) + 1
                say(f"{at} of {whole}: {left[0].case.name}, {left[0].direction}")
        how = worker.end()
        if not left or limit.left() <= 0 or how == _LOST:
            continue  # of the last, what was lost had been told before
        futile = 0 if spoken else futile + 1
        if futile == _FUTILE:
            raise RuntimeError(f"a worker must begin with its cases. Got {how}: {worker.last}")
        if spoken:
            _blamed(left, begun, f"the process ended with it ({how}): {worker.last}", keep)


def _blamed(left: list[Unit], begun: str, problem: str, keep: Keep) -> None:
    """Whoever had begun gets no figure here; of a case that was being timed, nobody does."""
    unit = left.pop(0)
    bad = [begun] if begun else list(unit.subjects)
    keep([Measured(unit.case.name, s, unit.direction, "error", problem[:400]) for s in bad])
    others = tuple(s for s in unit.subjects if s not in bad)
    if others:
        left.insert(0, unit._replace(subjects=others))


class _Worker:
    """A process that goes through units.

    Attributes:
        last: the last line that it said beside its answers.
    """

    def __init__(self, command: Sequence[str], units: Sequence[Unit], pace: Pace) -> None:
        asked = [(asdict(u.case), u.direction, u.subjects) for u in units]
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
            self.process.stdin.write(json.dumps({"units": asked, "pace": pace}) + "\n")
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
    """A worker: one line of JSON comes in, with the units and the pace."""
    from attn_core.conformance.worker import own_stdout

    channel = own_stdout()
    asked = json.loads(sys.stdin.readline())
    if machine is None:
        from attn_core.benchmarks import gpu_calls

        machine = gpu_calls
    pace, timer = Pace(*asked["pace"]), machine.Timer()

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=channel, flush=True)

    for fields, direction, subjects in asked["units"]:
        lists = {n: tuple(x) for n, x in fields.items() if isinstance(x, list)}
        case = GpuCase(**{**fields, **lists})
        found = measured(
            *(machine, timer, case, direction, pace, subjects),
            beginning=lambda subject: say({"begins": subject}),
        )
        say({"measured": [m._asdict() for m in found]})
        if any(m.status == "error" for m in found) and not machine.answers():
            channel.flush()
            os._exit(_LOST)  # whatever is left would wait for the device


if __name__ == "__main__":
    main()
