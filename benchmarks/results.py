"""The results of a run, and the JSON file that keeps them, samples and all.

    {"version": 1,
     "environment": {"date": ..., "cpu": ..., "cores": 2, "threads": 2, "load": [..], ...},
     "quick": false,
     "cases": [{"name": "causal-T2048-D64-float32", "length": 2048, ...}, ...],
     "measurements": [{"case": ..., "subject": "jax:auto", "direction": "forward",
                       "status": "measured", "shares": {"out": 0.3}, "repeats": 2,
                       "rounds": [[0.031, 0.030], ...], "turns": [[3, 14], ...],
                       "commit": "9ea0324", "date": "2026-01-31T12:00:00+00:00"}, ...]}

Medians and ratios are not in it: they are worked out when they are read, from the samples. A run
may go on another day, with other code: so each measurement says of which commit it is, and when it
was made; those made before that was kept say nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attn_core.benchmarks.cases import Case
from attn_core.benchmarks.subjects import is_ours
from attn_core.benchmarks.timing import Series, Spread, ratio, ratios, spread
from attn_core.conformance import report

VERSION = 1
STATUSES = ("measured", "refused", "wrong", "error")


@dataclass(frozen=True)
class Measurement:
    """What came of one subject, case and direction.

    Attributes:
        status: one of STATUSES. "refused" is not for this subject, or not installed; "wrong" has
            failed its check, and so has no figure; "error" raised, crashed or hung.
        problem: why it has no figure.
        shares: error of each result as a share of what is allowed; more than 1 is wrong.
        repeats: calls in a sample.
        rounds: seconds per call, for every round there and back.
        turns: the numbers of these samples' turns among all of the step; empty where they were not
            kept.
        peak: bytes of temporaries by the kernel's mark.
        planned: bytes of temporaries by the framework's own account, where it gives one.
        first: seconds that the first call takes beyond a later one.
        commit: of the code that was measured, "-dirty" behind it where that had been changed since;
            empty where it is not known.
        date: when, ISO 8601; empty where it is not known.
    """

    case: str
    subject: str
    direction: str
    status: str = "measured"
    problem: str = ""
    shares: dict[str, float] = field(default_factory=dict)
    repeats: int = 0
    rounds: list[list[float]] = field(default_factory=list)
    turns: list[list[int]] = field(default_factory=list)
    peak: int | None = None
    planned: int | None = None
    first: float | None = None
    commit: str = ""
    date: str = ""

    @property
    def time(self) -> Spread:
        """Seconds per call."""
        return spread(self.rounds)

    @property
    def series(self) -> Series:
        """The samples by their turns. Where those were not kept, all ways have one number each."""
        ways = [(n, at) for n, part in enumerate(self.rounds) for at in range(len(part))]
        known = self.turns or [[2 * n, 2 * n + 1] for n in range(len(self.rounds))]
        return [(known[n][at], self.rounds[n][at]) for n, at in ways]

    @property
    def temporaries(self) -> int | None:
        """Bytes: the framework's own account where there is one, since it cannot miss any."""
        return self.peak if self.planned is None else self.planned

    @property
    def failed(self) -> bool:
        return self.status in ("wrong", "error")


@dataclass
class Results:
    """A run: its measurements, the cases they are of, and where it took place."""

    environment: dict[str, Any]
    cases: dict[str, Case]
    measurements: list[Measurement] = field(default_factory=list)
    quick: bool = False

    def find(self, case: str, subject: str, direction: str) -> Measurement | None:
        """The measurement, if it was made and gave a figure."""
        for each in self.measurements:
            if (each.case, each.subject, each.direction) == (case, subject, direction):
                return each if each.status == "measured" else None
        return None

    def faster(
        self, case: str, direction: str, subject: str, base: str
    ) -> tuple[float, Spread] | None:
        """Time of `base` over time of `subject`, and of neighbours; None where one has none."""
        ours, theirs = self.find(case, subject, direction), self.find(case, base, direction)
        if ours is None or theirs is None or not ours.rounds or not theirs.rounds:
            return None
        return ratio(theirs.rounds, ours.rounds), ratios(theirs.series, ours.series)

    def holds(self, case: Case, direction: str, subjects: Iterable[str]) -> bool:
        """Whether all of these have been asked this very case; ours must not have failed."""
        bad = {id(each) for each in self.broken}
        there = {(m.case, m.subject, m.direction) for m in self.measurements if id(m) not in bad}
        same = self.cases.get(case.name) == case
        return same and all((case.name, name, direction) in there for name in subjects)

    def drop(self, steps: Iterable[tuple[str, str]]) -> None:
        """Forget what was measured of these (case, direction): they will be measured again."""
        again = set(steps)
        self.measurements = [m for m in self.measurements if (m.case, m.direction) not in again]

    @property
    def broken(self) -> list[Measurement]:
        """Our own that are wrong or raised: what a run must not have."""
        return [each for each in self.measurements if each.failed and is_ours(each.subject)]


def environment(threads: int) -> dict[str, Any]:
    """Where a run takes place, and how busy the machine is before it begins."""
    found = report.environment()
    try:
        found["packages"]["onnxruntime"] = version("onnxruntime")
    except PackageNotFoundError:
        pass  # optional; its figures are refused by name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []
    settings = {name: os.environ[name] for name in _SETTINGS if name in os.environ}
    machine = {"cpu": _processor(), "cores": cores, "threads": threads, "load": load}
    return {**found, **machine, "settings": settings}


def now() -> str:
    """The date of a measurement that has just been made."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str:
    """The commit of this code, or nothing where it is in no checkout of its own.

    What a run itself writes, its results and their page, makes no code "dirty".
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed below somebody else's checkout is none of that checkout's commits.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return ""
    outputs = [f":(top,exclude){place}" for place in ("benchmarks/results", "docs")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *outputs)
    return f"{git('describe', '--always') or ''}{'-dirty' if changed else ''}"


def resumed(earlier: Results, now: Results) -> Results:
    """An earlier run that goes on with the cases of this one, on the same machine.

    Raises:
        ValueError: another machine, other versions or settings, or one of the two was a quick look.
    """
    for name in ("cpu", "cores", "threads", "packages", "settings"):
        before, after = earlier.environment.get(name), now.environment.get(name)
        if before != after:
            raise ValueError(f"a run must go on where it began, with {name} {before}. Got {after}.")
    if earlier.quick != now.quick:
        raise ValueError("a run must go on as it began. Got --quick in one part of it.")
    parts = [*earlier.environment.get("parts", [earlier.environment["date"]])]
    place = {**earlier.environment, "parts": [*parts, now.environment["date"]]}
    # What was measured of a case that has changed since is no answer to the case as it is now.
    changed = {n for n, case in now.cases.items() if earlier.cases.get(n, case) != case}
    kept = [each for each in earlier.measurements if each.case not in changed]
    return Results(place, {**earlier.cases, **now.cases}, kept, now.quick)


_SETTINGS = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_AFFINITY",
    "XLA_FLAGS",
    "TF_ENABLE_ONEDNN_OPTS",
)
"""Set by the caller, and passed on to the workers: they change figures, so they are kept."""


def _processor() -> str:
    """The processor, with the instructions that decide how fast its matmuls are."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.M)
    present = set(flags[1].split()) if flags else set()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in present]
    name = model[1].strip() if model else platform.machine()
    return f"{name} ({', '.join(known)})" if known else name


def save(results: Results, path: Path) -> None:
    """The whole run as JSON, in one rename."""
    block = {
        "version": VERSION,
        "environment": results.environment,
        "quick": results.quick,
        "cases": [case.as_dict() for case in results.cases.values()],
        "measurements": [_encoded(each) for each in results.measurements],
    }
    report.write_whole(path, json.dumps(block, indent=1, allow_nan=False) + "\n")


def _encoded(each: Measurement) -> dict[str, Any]:
    row = asdict(each)
    # JSON has no infinity; four digits are more than any sample means.
    row["shares"] = {n: x if abs(x) < float("inf") else str(x) for n, x in each.shares.items()}
    row["rounds"] = [[float(f"{x:.4g}") for x in part] for part in each.rounds]
    return {name: x for name, x in row.items() if x not in (None, "", {}, [])}


def load(path: Path) -> Results:
    """The run that `save` wrote.

    Raises:
        FileNotFoundError: nothing stands there.
        ValueError: not a whole file of this version.
    """
    try:
        block = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a whole JSON file. Got: {error}.") from error
    found = block.get("version") if isinstance(block, dict) else None
    if found != VERSION:
        raise ValueError(
            f"{path} must hold benchmark results of version {VERSION}. "
            f"Got {'no version' if found is None else f'version {found}'}; "
            "measure again with `attn-core bench run --json`."
        )
    try:
        cases = [Case.of(row) for row in block["cases"]]
        measurements = [_decoded(row) for row in block["measurements"]]
        return Results(
            block["environment"], {c.name: c for c in cases}, measurements, bool(block["quick"])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold an environment, cases and measurements of "
            f"{', '.join(f.name for f in fields(Measurement))}. Got: {error!r}."
        ) from error


def _decoded(row: dict[str, Any]) -> Measurement:
    shares = {name: float(share) for name, share in row.get("shares", {}).items()}
    return Measurement(**{**row, "shares": shares})


def merged(parts: Iterable[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """Measurements by case and direction, in the order in which they were made."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for each in parts:
        found.setdefault((each.case, each.direction), []).append(each)
    return found
