"""One room: commands come in on stdin as JSON lines, and every one is answered by a JSON line.

    {"do": "prepare", "subject": s, "case": {...}, "direction": d, "least": 0.05}
                                    -> {"shares": {...}, "repeats": n}
    {"do": "sample", "subject": s}  -> {"seconds": per call}
    {"do": "memory", "subject": s, "case": {...}, "direction": d}
                                    -> {"shares": {...}, "peak": bytes, "planned": bytes or null}
    {"do": "first", ...}            -> {"shares": {...}, "first": seconds}
    {"do": "drop"}                  -> {}

In place of these there may be {"refused": reason} or {"error": message}. The first line out is
"ready". Between commands the process sleeps in a read, so another room has the machine to itself.
What a subject gives is checked before anything is timed; memory and first calls are measured on a
process that is still fresh, and checked afterwards, before anybody hears of them.

The process keeps to as many cores as it is to have threads: XLA and TensorFlow size their pools by
what they may run on, and so does everybody else.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from attn_core.benchmarks import check, memory, subjects, timing
from attn_core.benchmarks.calls import Call, Refused, results_bytes
from attn_core.benchmarks.cases import Case
from attn_core.conformance.worker import own_stdout
from attn_core.registry import UnsupportedError

Prepare = Callable[[str, Case, str, int], Call]


class Room:
    """What a room holds between commands: the calls that are ready, and how often each is made."""

    def __init__(self, threads: int, prepare: Prepare = subjects.prepared) -> None:
        self.threads = threads
        self.prepare = prepare
        self.ready: dict[str, tuple[Call, int]] = {}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """What this command comes to; exceptions of a subject are answers too."""
        try:
            return self._answer(command)
        except (Refused, UnsupportedError) as reason:
            return {"refused": str(reason)}
        except Exception as error:
            # Whatever a library raises is that subject's result, and is told.
            text = str(error).strip() or "no message"
            return {"error": f"{type(error).__name__}: {text[:2000]}"}

    def _answer(self, command: dict[str, Any]) -> dict[str, Any]:
        what = command["do"]
        if what == "drop":
            self.ready.clear()
            gc.collect()
            return {}
        name = command["subject"]
        if what == "sample":
            call, repeats = self.ready[name]
            return {"seconds": timing.sample(call.run, repeats)}
        case, direction = Case.of(command["case"]).asked_of(name), command["direction"]
        call = self.prepare(name, case, direction, self.threads)
        if what == "prepare":
            shares = _checked(name, call, case, direction)
            call.run()
            repeats = timing.calibrated(call.run, command["least"])
            self.ready[name] = (call, repeats)
            return {"shares": shares, "repeats": repeats}
        if what == "memory":
            if call.warm is not None:
                call.warm()
            size = results_bytes(case, direction)
            found: dict[str, Any] = {
                "peak": memory.peak(call.run, size, first=call.warm is not None)
            }
            found["planned"] = None if call.planned is None else call.planned()
        elif what == "first":
            found = {"first": _first(call)}
        else:
            raise ValueError(f"`do` must be a command of this room. Got {what!r}.")
        return {**found, "shares": _checked(name, call, case, direction)}


def _first(call: Call) -> float:
    """Seconds by which the first call is longer than the second: tracing and compilation."""
    marks = [time.perf_counter()]
    for _ in range(2):
        call.run()
        marks.append(time.perf_counter())
    return max(marks[1] - marks[0] - (marks[2] - marks[1]), 0.0)


def _checked(name: str, call: Call, case: Case, direction: str) -> dict[str, float | str]:
    """The shares of the allowance, those that JSON has no number for as words."""
    if subjects.bare(name) in subjects.NO_ATTENTION:
        return {}
    got = call.answer(check.asked(case).arrays)
    found = check.shares(case, direction, got)
    return {n: x if abs(x) < float("inf") else str(x) for n, x in found.items()}


def keep_to(threads: int) -> None:
    """Let this process run on that many of its cores, where the system has such a thing."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def main() -> None:
    threads = int(sys.argv[1])
    channel = own_stdout()
    keep_to(threads)
    room = Room(threads)
    print("ready", file=channel)
    for line in sys.stdin:
        print(json.dumps(room.answer(json.loads(line))), file=channel)


if __name__ == "__main__":
    main()
