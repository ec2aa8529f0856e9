"""Two reports side by side: what an upgrade of a framework changed.

A cell is one case on one backend in one form. It *regressed* when it passed before and does not
now, whether it fails, raises, is no longer offered or is no longer there: a case that was quietly
dropped is not a case that passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from attn_core.conformance import report
from attn_core.conformance.judgement import Verdict

NOTICED = 0.1
"""Shares up to here are too comfortable for their growth to mean anything."""


class Change(NamedTuple):
    """One cell in the report before and in the one after; None where it is not in that one."""

    what: str  # "changed", "appeared", "vanished" or "grew"
    before: Verdict | None
    after: Verdict | None

    @property
    def cell(self) -> tuple[str, str, str]:
        """Case, backend and form."""
        verdict = self.after or self.before
        assert verdict is not None
        return verdict.case, verdict.backend, verdict.form

    @property
    def regressed(self) -> bool:
        """Whether it passed before and does not now."""
        return bool(self.before and self.before.passed and not (self.after and self.after.passed))


def difference(
    before: Sequence[Verdict], after: Sequence[Verdict], factor: float = 2.0
) -> list[Change]:
    """The cells that differ, regressions first, then in the order of the reports.

    A cell that kept its status *grew* when its worst share is above 0.1 and more than `factor`
    times what it was.

    Raises:
        ValueError: `factor` below 1.
    """
    if not factor >= 1:
        raise ValueError(f"`factor` must be at least 1. Got {factor}.")
    old = {(v.case, v.backend, v.form): v for v in before}
    new = {(v.case, v.backend, v.form): v for v in after}
    changes = []
    for cell in dict.fromkeys([*old, *new]):
        was, now = old.get(cell), new.get(cell)
        if was is None or now is None:
            changes.append(Change("appeared" if was is None else "vanished", was, now))
        elif was.status != now.status:
            changes.append(Change("changed", was, now))
        elif now.worst > max(NOTICED, factor * was.worst):
            changes.append(Change("grew", was, now))
    return sorted(changes, key=lambda change: not change.regressed)


def table(changes: Sequence[Change]) -> Table:
    """A rich table, a row to a change; regressions stand in bold with a cross."""
    drawn = Table(title="what changed", title_justify="left")
    for heading in ("", "case", "backend", "form"):
        drawn.add_column(heading)
    for heading in ("before", "after"):
        drawn.add_column(heading, justify="right")
    for change in changes:
        style = "bold red" if change.regressed else ""
        what = Text(f"✗ {change.what}" if change.regressed else change.what, style)
        words = (_words(change.before), _words(change.after))
        drawn.add_row(what, *[Text(word, style) for word in (*change.cell, *words)])
    return drawn


def _words(verdict: Verdict | None) -> str:
    if verdict is None:
        return "·"
    share = f" {verdict.worst:.3g}" if verdict.status in ("passed", "failed") else ""
    return f"{verdict.status}{share}"


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, a line to each: `torch 2.12.0 -> 2.13.0`."""
    old = {**before, **before.get("packages", {})}
    new = {**after, **after.get("packages", {})}
    return [
        f"{name} {old.get(name, 'not there')} -> {new.get(name, 'not there')}"
        for name in dict.fromkeys([*old, *new])
        if name not in ("packages", "date") and old.get(name) != new.get(name)
    ]


def compare(before: Path, after: Path, console: Console, factor: float = 2.0) -> int:
    """Print how two JSON reports differ; the exit status is 1 where a cell regressed, else 0.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: not a whole report of this version, or `factor` below 1.
    """
    (old, old_place), (new, new_place) = report.load(before), report.load(after)
    changes = difference(old, new, factor)
    for line in moved(old_place, new_place):
        console.print(line, markup=False)
    if changes:
        console.print(table(changes))
    regressed = sum(change.regressed for change in changes)
    console.print(f"{len(new)} cells, {len(changes)} changed, {regressed} regressed")
    return 1 if regressed else 0
