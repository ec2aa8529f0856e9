"""The stages that are commands: each is run for its part of the time, and what it says is kept.

    call(command, seconds, into) -> (exit status, the last of what it said)

`called` runs a command in a session of its own, writes what it says as it says it, and interrupts
it when its time is up; the suite and the tests then say what they had found. A stage is given such
a function, so that tests hand it another.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SUBJECT = "attn_core.benchmarks.gpu_calls:triton"
"""`attention(impl="triton")` on the device, as the conformance suite names it."""

_SMALL = ("causal", "lengths", "dropout")
"""Cases that are run under compute-sanitizer, which makes them a hundred times slower."""


class Stage(NamedTuple):
    """What came of a stage: passed, failed, stopped for want of time, or skipped; and why."""

    status: str
    said: str


Call = Callable[[list[str], float, Path], tuple[int, str]]
"""Runs a command for so many seconds at most, and writes what it says to a file as it comes: (its
exit status, the last of what it said)."""

_STOPPED = 130
"""The exit status of the suite where it was interrupted: what it says is of a part."""

LEAST = 20.0
"""Seconds below which no stage is begun."""

_TESTS = Path("tests/kernels_only")


def called(command: list[str], seconds: float, into: Path) -> tuple[int, str]:
    """Runs it; who has not ended by then is interrupted, and says what there is to say."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with into.open("w+", encoding="utf-8", errors="replace") as told:
        ran = subprocess.Popen(
            command, stdout=told, stderr=told, start_new_session=True, env=environment
        )
        try:
            status = ran.wait(None if seconds == float("inf") else max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            status = _ended(ran)
        except BaseException:
            _killed(ran)  # it is in a session of its own, where no Ctrl-C comes
            raise
        told.seek(0)
        lines = [line.strip() for line in told.read().strip().splitlines() if line.strip()]
    return status, " | ".join(lines[-3:])


def _ended(ran: subprocess.Popen[bytes]) -> int:
    ran.send_signal(signal.SIGINT)
    try:
        ran.wait(LEAST)
    except subprocess.TimeoutExpired:
        pass
    _killed(ran)
    return _STOPPED


def _killed(ran: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(ran.pid, signal.SIGKILL)  # and the workers that it may have left
    except ProcessLookupError:
        pass
    ran.wait()


def _command(*words: str, setting: tuple[str, Path] | None = None) -> list[str]:
    """`attn-core` with these words; `setting` is a variable of the environment that it runs in."""
    code = "from attn_core.cli import app\nif __name__ == '__main__': app()"
    if setting is not None:
        name, value = setting
        code = f"import os\nos.environ[{name!r}] = {str(value.resolve())!r}\n{code}"
    return [sys.executable, "-c", code, *words]


def _judged(*words: str) -> list[str]:
    return _command("conformance", "run", "--subject", SUBJECT, *words)


def _jobs() -> int:
    # Compiling is most of it, and that a GPU's host does beside.
    return max(1, min(16, (os.cpu_count() or 2) - 2))


def _suite(name: str, tier: str) -> Callable[[Call, float, Path], Stage]:
    def judged(call: Call, seconds: float, into: Path) -> Stage:
        verdicts = into / f"{name}.json"
        verdicts.unlink(missing_ok=True)
        words = ("--tier", tier, "--failures", "--jobs", str(_jobs()), "--json", str(verdicts))
        status, said = call(_judged(*words), seconds, into / f"{name}.txt")
        if status != _STOPPED:
            return Stage("passed" if status == 0 else "failed", said)
        rows = json.loads(verdicts.read_text("utf-8"))["verdicts"] if verdicts.exists() else []
        bad = [row["case"] for row in rows if row["status"] in ("failed", "error")]
        said = f"{len(rows)} judged until time was up, {len(bad)} wrong"
        return Stage("failed" if bad else "stopped", ": ".join([said, *bad[:1]]))

    return judged


def _doctor(call: Call, seconds: float, into: Path) -> Stage:
    status, said = call(_command("doctor"), seconds, into / "doctor.txt")
    return _of_status(status, said)


def _tests(call: Call, seconds: float, into: Path) -> Stage:
    if not _TESTS.is_dir():
        return Stage("skipped", f"{_TESTS} is not here: it comes with the source alone")
    failures = into / "failures.txt"
    failures.write_text("", "utf-8")
    together = ["-n", str(_jobs())] if find_spec("xdist") is not None else []
    # A plug-in of benchmarks, which images for GPUs tend to hold, warns of xdist: an error here.
    words = [str(_TESTS), *together, "-v", "--tb=short", "-p", "no:benchmark"]
    words += [f"--junitxml={into / 'tests.xml'}", f"--failures-into={failures}"]
    status, said = call([sys.executable, "-m", "pytest", *words], seconds, into / "tests.txt")
    if status != _STOPPED:
        return _of_status(status, said)
    bad = failures.read_text("utf-8").count(FAILED)
    return Stage("failed" if bad else "stopped", f"time was up; {bad} had failed by then")


FAILED = "== FAILED "
"""With what each failure begins in the file of failures, which the tests' conftest writes."""


def _tune(call: Call, seconds: float, into: Path) -> Stage:
    minutes = [] if seconds == float("inf") else ["--minutes", f"{seconds / 60:.2f}"]
    # What wins stands there, and not where every call would take it from.
    setting = ("ATTN_CORE_KERNEL_CONFIGS", into / "tiles.toml")
    command = _command("bench", "tune", *minutes, setting=setting)
    status, said = call(command, seconds + LEAST, into / "tune.txt")
    return Stage("stopped", said) if status == _STOPPED else Stage("passed", said)


def _of_status(status: int, said: str) -> Stage:
    if status == _STOPPED:
        return Stage("stopped", "it was interrupted when time was up")
    return Stage("passed" if status == 0 else "failed", said)


def _sanitizer(call: Call, seconds: float, into: Path) -> Stage:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Stage("skipped", "compute-sanitizer is not installed")
    cases = [word for name in _SMALL for word in ("--case", name)]
    command = [tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += _judged("--tier", "smoke", "--jobs", "1", *cases)
    return _of_status(*call(command, seconds, into / "sanitizer.txt"))


STAGES: Mapping[str, Callable[[Call, float, Path], Stage]] = {
    "doctor": _doctor,
    "tests": _tests,
    "smoke": _suite("smoke", "smoke"),
    "tune": _tune,
    "conformance": _suite("conformance", "full"),
    "sanitizer": _sanitizer,
}
