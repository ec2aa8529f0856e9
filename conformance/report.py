"""Reports of a run: the terminal's matrix and summary, and the JSON file that keeps it all.

The JSON file, version 2:

    {"version": 2,
     "environment": {"date": "2026-01-31T12:00:00+00:00", "python": ..., "platform": ...,
                     "machine": ..., "packages": {"numpy": "2.3.0", ...}},
     "verdicts": [{"case": ..., "backend": ..., "form": ..., "shares": {"out": 0.1}, ...}]}

JSON has no infinity and no NaN, so a share that is one stands there as the string "inf" or "nan"
and comes back as the number. `status`, `passed` and `worst` are there for readers in other
languages, `worst` null where it is not finite; `load` does not read them but works them out.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attn_core.conformance.judgement import Verdict

VERSION = 2
PACKAGES = ("attn-core", "numpy", "torch", "tensorflow", "jax", "keras", "flax", "transformers")
FAILURES = ("failed", "error")
"""The statuses that turn a run red; what is not offered is neither a pass nor a failure."""
# A message may hold a terminal's escapes, or half a surrogate pair, which no stream takes.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_DERIVED = ("status", "passed", "worst")


def matrix(verdicts: Sequence[Verdict], *, every: bool = True) -> Table:
    """A rich table, a row to a case and a column to a backend's form.

    0.30 reads: three tenths of the allowance used. Failures stand in bold with a cross, so that
    they can be told without colour; – was not offered, · was not asked. With `every` false only
    cases that fail somewhere are shown.
    """
    columns = list(dict.fromkeys((v.backend, v.form) for v in verdicts))
    cells = {(v.case, v.backend, v.form): v for v in verdicts}
    table = Table(title="worst error as a share of what is allowed", title_justify="left")
    table.add_column("case")
    for backend, form in columns:
        table.add_column(f"{backend}\n{form}", justify="right")
    for case in dict.fromkeys(v.case for v in verdicts):
        row = [cells.get((case, *column)) for column in columns]
        if every or any(v is not None and v.status in FAILURES for v in row):
            table.add_row(case, *[_cell(v) for v in row])
    return table


def _cell(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text("·", "dim")
    if verdict.status == "not offered":
        return Text("–", "dim")
    if verdict.status == "passed":
        return Text(f"{verdict.worst:.2f}", "green")
    word = "error" if verdict.status == "error" else f"{verdict.worst:.3g}"
    return Text(f"✗ {word}", "bold red")


def summary(verdicts: Sequence[Verdict], console: Console) -> None:
    """What failed and how, then for each backend a line and its likely causes, then the count.

    The last line stands alone and is meant for scripts: `N passed, N failed`, and `, N skipped`
    where something was not offered.
    """
    for verdict in verdicts:
        if verdict.status in FAILURES:
            console.print(f"[bold red]✗ {verdict.case}[/] on {verdict.backend} {verdict.form}:")
            for line in told(verdict):
                console.print(f"    {printable(line)}", markup=False, soft_wrap=True)
    for column in dict.fromkeys((v.backend, v.form) for v in verdicts):
        asked = [v for v in verdicts if (v.backend, v.form) == column]
        part = [v for v in asked if v.status != "not offered"]
        line = f"{' '.join(column)}: {sum(v.passed for v in part)} of {len(part)} cases"
        if part:
            worst = max(part, key=lambda v: v.worst)
            line += f", worst {worst.worst:.2f} ({worst.case})"
        if len(part) < len(asked):
            line += f", {len(asked) - len(part)} not offered"
        line += f", {sum(v.seconds for v in asked):.1f} s"
        console.print(line, markup=False, soft_wrap=True)
        causes = Counter(v.cause for v in part if v.cause and v.status in FAILURES)
        for cause, cases in causes.most_common():
            line = f"    likely cause in {cases} case{'s' if cases > 1 else ''}: {cause}"
            console.print(line, markup=False, soft_wrap=True)
    counts = counted(verdicts)
    skipped = f", {counts['not offered']} skipped" if counts["not offered"] else ""
    print(f"{counts['passed']} passed, {counts['failed'] + counts['error']} failed{skipped}")


def told(verdict: Verdict) -> list[str]:
    """What went wrong, a line to each thing: the problem, the cause, each result beyond its due."""
    lines = [verdict.problem] if verdict.problem else []
    if verdict.cause:
        lines.append(f"likely cause: {verdict.cause}")
    for what, share in verdict.shares.items():
        if not share <= 1:  # this way round NaN is told too
            at = verdict.where.get(what)
            first = f", first at {at}" if at is not None else ""
            lines.append(f"{what}: {share:.3g} of what is allowed{first}")
    return lines


def printable(text: str) -> str:
    """The text with whatever no screen can show replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def counted(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many verdicts have each status, zeros included."""
    counts = {"passed": 0, "failed": 0, "error": 0, "not offered": 0}
    for verdict in verdicts:
        counts[verdict.status] += 1
    return counts


def environment(date: datetime | None = None) -> dict[str, Any]:
    """Where a run took place. Packages are looked up, not imported: no framework is loaded here.

    Args:
        date: when the run took place; now, where it is left out.
    """
    packages = {}
    for name in PACKAGES:
        for distribution in (name, f"{name}-cpu"):  # TensorFlow's wheel without CUDA
            try:
                packages[name] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return {
        "date": (date or datetime.now(UTC)).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.system(),
        "machine": platform.machine(),
        "packages": packages,
    }


def save(
    verdicts: Sequence[Verdict], path: Path, environment: Mapping[str, Any] | None = None
) -> None:
    """The verdicts and their environment (this process's, where it is left out) as JSON."""
    block = dict(environment or _environment())
    rows = [encoded(v) for v in verdicts]
    text = json.dumps(
        {"version": VERSION, "environment": block, "verdicts": rows}, indent=1, allow_nan=False
    )
    write_whole(path, text + "\n")


_environment = environment  # `save` takes an argument of that name


def encoded(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain JSON values."""
    row = verdict.as_dict()
    row["shares"] = {what: _number(share) for what, share in verdict.shares.items()}
    row["where"] = {what: [int(i) for i in index] for what, index in verdict.where.items()}
    row["status"], row["passed"] = verdict.status, verdict.passed
    row["worst"] = float(verdict.worst) if math.isfinite(verdict.worst) else None
    return row


def _number(share: float) -> float | str:
    share = float(share)
    return share if math.isfinite(share) else str(share)


def load(path: Path) -> tuple[list[Verdict], dict[str, Any]]:
    """The verdicts and the environment of a report that `save` wrote.

    Raises:
        FileNotFoundError: nothing stands there.
        ValueError: not a whole report of this version.
    """
    try:
        report = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} must be a whole JSON report. Got: {error}.") from error
    found = report.get("version") if isinstance(report, dict) else None
    if found != VERSION:
        raise ValueError(
            f"{path} must be a conformance report of version {VERSION}. "
            f"Got {'no version' if found is None else f'version {found}'}; "
            "write it again with `attn-core conformance run --json`."
        )
    block, rows = report.get("environment"), report.get("verdicts")
    if not isinstance(block, dict) or not isinstance(rows, list):
        raise ValueError(f"{path} must hold an environment and verdicts. Got {', '.join(report)}.")
    return [_decoded(row, f"{path}, verdict {number}") for number, row in enumerate(rows)], block


def _decoded(row: Any, whose: str) -> Verdict:
    """A verdict from its JSON row; every field is looked at, since files travel."""
    if not isinstance(row, dict):
        raise ValueError(f"{whose} must be an object. Got {type(row).__name__}.")
    row = {name: x for name, x in row.items() if name not in _DERIVED}
    known = [field.name for field in fields(Verdict)]
    for name in (*("case", "backend", "form"), *row):
        if name not in row or name not in known:
            raise ValueError(f"{whose} must hold {', '.join(known)}. Got {', '.join(row)}.")
    try:
        row["shares"] = {what: float(share) for what, share in row.get("shares", {}).items()}
        return Verdict(**row)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{whose} must hold shares that are numbers. Got: {error}.") from error


def write_whole(path: Path, text: str) -> None:
    """`text` into a file in one rename, so that a half-written one never stands there.

    Folders on the way are made: after a run of minutes a missing one must not cost the report.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two runs that write the same report out of each other's way.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # Lone surrogates are possible in a subject's message, and are no UTF-8.
        part.write_text(text, "utf-8", errors="backslashreplace")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
