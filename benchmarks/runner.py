"""The run: every case through every subject, turn by turn, each in its room.

One step is a case in one direction. All of its subjects are made ready and checked first; then they
take turns (`timing.turns`), whichever room they are in, so that every ratio of the step is of
samples that stood side by side. Memory and first calls take a fresh process each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attn_core.benchmarks import cases as catalogue
from attn_core.benchmarks import memory, subjects, timing
from attn_core.benchmarks.cases import Case
from attn_core.benchmarks.results import Measurement
from attn_core.benchmarks.rooms import Worker, WorkerError
from attn_core.config import nearest

ROUNDS = 7
TIMEOUT = 900.0
"""Seconds that an answer may take; the longest is flex's compilation or XLA's, then the check."""

Seen = Callable[[str], None]


class Step(NamedTuple):
    """A case in one direction, and who is asked."""

    case: Case
    direction: str
    subjects: tuple[str, ...]


class Pace(NamedTuple):
    """How long to take over it."""

    rounds: int = ROUNDS
    least: float = timing.LEAST
    timeout: float = TIMEOUT


QUICK = Pace(rounds=2, least=0.001)
"""For a look at whether everything runs; figures made so mean nothing."""


def plan(
    patterns: Sequence[str] = (), frameworks: Sequence[str] = (), *, quick: bool = False
) -> list[Step]:
    """The steps of a run of these cases and frameworks; all of them without a choice.

    Raises:
        ValueError: unknown case or framework, or nothing is left.
    """
    for name in frameworks:
        if name not in subjects.FRAMEWORKS:
            raise ValueError(
                f"`framework` must be one of {', '.join(subjects.FRAMEWORKS)}. "
                f"Got {name!r}.{nearest(name, subjects.FRAMEWORKS)}"
            )
    steps = []
    for case in catalogue.named(list(patterns)):
        shown = case.small() if quick else case
        for direction in case.directions:
            chosen = tuple(
                name
                for name in case.subjects
                if (not frameworks or subjects.framework(name) in frameworks)
                and subjects.asked(name, case, direction)
            )
            if {subjects.bare(name) for name in chosen} - set(subjects.NO_ATTENTION):
                steps.append(Step(shown, direction, chosen))
    if not steps:
        raise ValueError(
            f"`case` and `framework` must leave something to measure. Got {', '.join(patterns)} "
            f"with {', '.join(frameworks)}."
        )
    return steps


def run(
    steps: Sequence[Step], *, threads: int = 2, pace: Pace | None = None, seen: Seen | None = None
) -> Iterator[Measurement]:
    """Measure, step by step; `seen` is told what is being done.

    What a subject does wrong is in its measurement; the run goes on with the others.
    """
    pace, seen = pace or Pace(), seen or (lambda what: None)
    rooms = Rooms(threads, pace.timeout)
    try:
        for step in steps:
            if step.case.measure == "time":
                yield from _timed(step, rooms, pace, seen)
            else:
                rooms.close()
                for name in step.subjects:
                    seen(f"{step.case.name} {step.direction} {name}")
                    yield _alone(step, name, threads, pace)
    finally:
        rooms.close()


class Rooms:
    """The rooms that are open, by name; each is opened when it is first needed."""

    def __init__(
        self, threads: int, timeout: float, opened: Callable[[int], Worker] = Worker
    ) -> None:
        self._threads, self._timeout, self._opened = threads, timeout, opened
        self._open: dict[str, Worker] = {}

    def ask(self, subject: str, **command: Any) -> dict[str, Any]:
        """The answer of the subject's room; one that has died is closed."""
        name = subjects.room(subject)
        try:
            if name not in self._open:
                self._open[name] = self._opened(self._threads)
            return self._open[name].ask({**command, "subject": subject}, self._timeout)
        except WorkerError:
            gone = self._open.pop(name, None)
            if gone is not None:
                gone.close()
            raise

    def drop(self) -> None:
        """Have every room forget its calls, so that the next step finds the memory free."""
        for name, worker in list(self._open.items()):
            try:
                worker.ask({"do": "drop"}, self._timeout)
            except WorkerError:
                del self._open[name]

    def close(self) -> None:
        for worker in self._open.values():
            worker.close()
        self._open.clear()


def _timed(step: Step, rooms: Rooms, pace: Pace, seen: Seen) -> list[Measurement]:
    """All subjects of a step in turns. One that takes its room down is out, and all begin anew."""
    out: dict[str, Measurement] = {}
    while True:
        rooms.drop()
        ready: dict[str, dict[str, Any]] = {}
        samples: dict[str, list[list[float]]] = {}
        places: dict[str, list[list[int]]] = {}
        name = ""
        try:
            for name in step.subjects:
                if name not in out:
                    seen(f"{step.case.name} {step.direction} {name}: check")
                    answer = rooms.ask(name, do="prepare", least=pace.least, **_question(step))
                    problem = _problem(step, name, answer)
                    if problem is None:
                        ready[name] = answer
                        samples[name] = [[] for _ in range(pace.rounds)]
                        places[name] = [[] for _ in range(pace.rounds)]
                    else:
                        out[name] = problem
            for place, turn in enumerate(timing.turns(list(ready), pace.rounds)):
                name = turn.name
                seen(f"{step.case.name} {step.direction} {name}: round {turn.round + 1}")
                answer = rooms.ask(name, do="sample")
                if "seconds" not in answer:
                    raise WorkerError(answer.get("error", "it gave no sample"))
                if turn.counted:
                    samples[name][turn.round].append(answer["seconds"])
                    places[name][turn.round].append(place)
        except WorkerError as error:
            out[name] = Measurement(
                step.case.name, name, step.direction, "error", problem=str(error)
            )
            continue
        for name, answer in ready.items():
            out[name] = Measurement(
                step.case.name,
                name,
                step.direction,
                shares=answer["shares"],
                repeats=answer["repeats"],
                rounds=samples[name],
                turns=places[name],
            )
        return [out[name] for name in step.subjects]


def _alone(step: Step, name: str, threads: int, pace: Pace) -> Measurement:
    """Memory, or what a first call costs: of one subject in a process of its own."""
    what = step.case.measure
    try:
        more = memory.ALLOCATOR if what == "memory" else {}
        with Worker(threads, more=more) as worker:
            answer = worker.ask({"do": what, "subject": name, **_question(step)}, pace.timeout)
    except WorkerError as error:
        return Measurement(step.case.name, name, step.direction, "error", problem=str(error))
    problem = _problem(step, name, answer)
    if problem is not None:
        return problem
    return Measurement(step.case.name, name, step.direction, **answer)


def _question(step: Step) -> dict[str, Any]:
    return {"case": step.case.as_dict(), "direction": step.direction}


def _problem(step: Step, name: str, answer: Mapping[str, Any]) -> Measurement | None:
    """Why there will be no figure, if that is so; shares come back as numbers."""
    place = (step.case.name, name, step.direction)
    for status in ("refused", "error"):
        if status in answer:
            return Measurement(*place, status, problem=answer[status])
    shares = answer["shares"]
    shares.update({what: float(share) for what, share in shares.items()})
    wrong = [f"{what} {share:.3g}" for what, share in shares.items() if not share <= 1]
    if wrong:
        text = f"error as a share of what is allowed must be at most 1. Got {', '.join(wrong)}."
        return Measurement(*place, "wrong", problem=text, shares=shares)
    return None
