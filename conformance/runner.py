"""The run: every case through every subject and form, each subject in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from signal import Signals
from threading import Event, Timer
from typing import NamedTuple

from attn_core.config import installed, nearest
from attn_core.conformance.cases import SAMPLE
from attn_core.conformance.judgement import WRONG, Verdict, named
from attn_core.conformance.peers import PEERS

FORMS = {
    "numpy": ("eager",),
    "torch": ("eager", "aot_eager", "inductor"),
    "tf": ("eager", "function", "dynamic", "xla"),
    "jax": ("eager", "jit"),
}
"""Every form of every backend; the first is the default."""

_SAMPLED = ("inductor", "dynamic", "xla")
"""Forms too slow to compile for every case: they get the named sample."""

_FEW = 40
TIMEOUT = 300.0
"""Seconds that a case may take."""

STARTUP = 120.0
"""Seconds, at least, that importing a framework and a subject may take."""


class Work(NamedTuple):
    """One subject in one form, and the names of the cases it is asked."""

    subject: str
    form: str
    cases: tuple[str, ...]


def plan(
    subjects: Sequence[str],
    forms: Sequence[str] = (),
    cases: Sequence[str] = (),
    tier: str = "full",
) -> list[Work]:
    """What a run of these subjects, forms ("all" is every one) and cases comes to.

    A backend that has none of the forms is judged in its first; other subjects are judged eagerly
    unless a form is named. Nothing is imported here.

    Raises:
        ValueError: unknown backend, peer, form, tier or case.
    """
    known = ("all", *dict.fromkeys(form for available in FORMS.values() for form in available))
    for form in forms:
        if form not in known:
            raise ValueError(
                f"`forms` must be among {', '.join(known)}. Got {form!r}.{nearest(form, known)}"
            )
    names = named(list(cases), tier)
    work = []
    for subject in subjects:
        head, colon, _ = subject.partition(":")
        if head in FORMS:
            available = FORMS[head]
        elif colon or subject in PEERS:
            available = tuple(form for form in forms if form != "all") or ("eager",)
        else:
            known = (*FORMS, *PEERS)
            raise ValueError(
                f"a subject must be one of {', '.join(known)}, or package.module:function "
                f"(installed: {installed()}). Got {subject!r}.{nearest(subject, known)}"
            )
        wanted = available if "all" in forms else [f for f in available if f in forms]
        for form in wanted or available[:1]:
            sampled = form in _SAMPLED and not cases
            # Errors are raised before anything is compiled, and are the spec's own.
            ours = head in FORMS and form == available[0]
            asked = [name for name in names if ours or name not in WRONG]
            asked = [name for name in asked if not sampled or name in SAMPLE]
            work.append(Work(subject, form, tuple(asked)))
    return work


def run(
    subjects: Sequence[str],
    *,
    forms: Sequence[str] = (),
    cases: Sequence[str] = (),
    tier: str = "full",
    jobs: int = 2,
    timeout: float = TIMEOUT,
    seen: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:
    """Judge these subjects; `seen` is told of every verdict as it comes.

    A case that takes longer than `timeout` seconds is an error, as is one that takes its process
    down; the run goes on with the next. Verdicts are returned in the order of subject, form and
    case.

    Raises:
        ValueError: unknown backend, peer, form, tier or case.
        ImportError: a subject or its framework is missing or broken.
    """
    work = shared_out(plan(subjects, forms, cases, tier), jobs)
    stop = Event()
    asked = partial(attend, timeout=timeout, seen=seen or (lambda verdict: None), stop=stop)
    with ThreadPoolExecutor(jobs) as pool:
        parts = [pool.submit(asked, each) for each in work]
        try:
            return [verdict for part in parts for verdict in part.result()]
        except BaseException:
            stop.set()
            raise


def shared_out(work: Sequence[Work], jobs: int) -> list[Work]:
    """The same work, each in `jobs` parts; the order stays.

    How long a case takes depends on the framework by a factor of a hundred: one work in one process
    would be waited for by all the others. A part is no shorter than _FEW cases, though: a worker
    spends seconds on importing its framework.
    """
    shares = []
    for each in work:
        size = max(-(-len(each.cases) // jobs), _FEW)
        starts = range(0, len(each.cases), size)
        shares += [each._replace(cases=each.cases[start : start + size]) for start in starts]
    return shares


def attend(
    work: Work,
    command: Sequence[str] = (),
    *,
    timeout: float = TIMEOUT,
    seen: Callable[[Verdict], None] = lambda verdict: None,
    stop: Event | None = None,
) -> list[Verdict]:
    """One subject in one form; a worker that dies costs its case, and another takes the rest.

    `command` starts a worker: it says "ready", reads case names and writes verdicts as JSON lines.
    It is the suite's own where it is left out.
    """
    stop = stop or Event()
    suite = (sys.executable, "-m", "attn_core.conformance.worker", work.subject, work.form)
    verdicts: list[Verdict] = []
    while len(verdicts) < len(work.cases) and not stop.is_set():
        rest = work._replace(cases=work.cases[len(verdicts) :])
        ready, problem = _worker(rest, command or suite, verdicts, timeout, seen, stop)
        if problem and not stop.is_set():
            if not ready:
                raise ImportError(problem)
            name = work.cases[len(verdicts)]
            verdicts.append(Verdict(name, work.subject, work.form, problem=problem))
            seen(verdicts[-1])
    return verdicts


def _worker(
    work: Work,
    command: Sequence[str],
    verdicts: list[Verdict],
    timeout: float,
    seen: Callable[[Verdict], None],
    stop: Event,
) -> tuple[bool, str]:
    """Whether the worker started, and what ended it, if anything did."""
    # Problems are small and workers share the cores: threads of OpenMP that wait for more to do by
    # spinning would take ten times what torch computes in.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**quiet, **os.environ}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("".join(f"{name}\n" for name in work.cases))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died while starting; its exit status says so below
        late = Event()

        def expire() -> None:
            late.set()
            process.kill()

        clock = Timer(max(timeout, STARTUP), expire)
        clock.start()
        ready = process.stdout.readline() == "ready\n"
        clock.cancel()
        answered = 0
        while True:
            clock = Timer(timeout, expire)
            clock.start()
            line = process.stdout.readline()
            clock.cancel()
            if not line or stop.is_set():
                break
            verdicts.append(Verdict(**json.loads(line)))
            answered += 1
            seen(verdicts[-1])
        if stop.is_set():
            process.kill()
        status = process.wait()
        if late.is_set() and not ready:
            limit = max(timeout, STARTUP)
            return ready, f"{work.subject} was not imported within {limit:g} s, and was ended"
        if late.is_set():
            return ready, f"it gave no answer within {timeout:g} s, and was ended"
        if status == 0 and answered == len(work.cases):
            return ready, ""
        log.seek(0)
        last = [line for line in log.read().splitlines() if line.strip()][-1:] or ["no message"]
        how = f"signal {Signals(-status).name}" if status < 0 else f"status {status}"
        return ready, f"the worker ended with {how}: {last[0]}"
