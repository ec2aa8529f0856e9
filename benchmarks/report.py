"""The terminal's tables of a run, and the cells that the page shares with them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from attn_core.benchmarks.results import Measurement, Results
from attn_core.benchmarks.subjects import is_ours
from attn_core.benchmarks.targets import TARGETS, Outcome, Target, evaluate
from attn_core.conformance.report import printable

_STYLES = {"aim met": "bold green", "met": "green", "missed": "bold red"}


def outcomes(results: Results) -> list[Outcome]:
    """Every target in the light of the run, in the order of the table."""
    return [evaluate(target, results) for target in TARGETS]


def targets_table(results: Results) -> Table:
    """A rich table of the targets that the run says something about."""
    table = Table(title="targets: the worst case decides", title_justify="left")
    for name in ("target", "must", "aim", "worst", "case", ""):
        table.add_column(name, justify="right" if name in ("must", "aim", "worst") else "left")
    for each in outcomes(results):
        if each.worst is not None:
            verdict = Text(in_words(each), _STYLES.get(each.verdict, "yellow"))
            must, aim = bound(each.target, each.target.must), bound(each.target, each.target.aim)
            worst = value_of(each.target, each.worst)
            table.add_row(each.target.name, must, aim, worst, _worst_label(each), verdict)
    return table


def step_table(results: Results, measurements: Sequence[Measurement]) -> Table:
    """A rich table of one step: its subjects, their times and their shares of the ceiling."""
    first = measurements[0]
    table = Table(title=f"{first.case} {first.direction}", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "subject" else "right")
    for each in measurements:
        if each.status == "measured":
            table.add_row(each.subject, *cells(results, each))
        else:
            style = "bold red" if each.failed else "dim"
            reason = Text(printable(f"{each.status}: {each.problem}"[:200]), style)
            table.add_row(each.subject, reason)
    return table


COLUMNS = ("subject", "ms", "quartiles", "GFLOP/s", "of ceiling", "temporaries MB", "check")


def cells(results: Results, each: Measurement) -> list[str]:
    """The columns after the subject; what a measurement has not is empty."""
    share = max(each.shares.values(), default=None)
    check = "" if share is None else f"{share:.2f}"
    if each.first is not None:
        return [f"{each.first * 1e3:.0f}", "", "", "", "", check]
    if not each.rounds:
        size = each.temporaries
        return ["", "", "", "", "" if size is None else f"{size / 1e6:.1f}", check]
    low, middle, high = (f"{1e3 * x:.3g}" for x in each.time)
    rate = _rate(results, each)
    top = results.find(each.case, "matmul", each.direction)
    ceiling = "" if top is None else f"{100 * rate / _rate(results, top):.0f}%"
    return [middle, f"{low} to {high}", f"{rate:.3g}", ceiling, "", check]


def _rate(results: Results, each: Measurement) -> float:
    """Useful GFLOP/s."""
    if each.subject == "matmul":
        return 2 * 2048**3 / each.time.middle / 1e9
    case = results.cases[each.case].asked_of(each.subject)
    return case.operations(each.direction) / each.time.middle / 1e9


def _worst_label(each: Outcome) -> str:
    return next(row.label for row in each.rows if row.value == each.worst)


def in_words(each: Outcome) -> str:
    """The verdict; where not all was measured how much was not, and what the rest already says."""
    if each.verdict != "incomplete":
        return each.verdict
    known = len(each.rows) - each.missing
    said = f"not measured: {each.missing} of {len(each.rows)} cases"
    return f"{said}; {each.misses} of the other {known} missed" if each.misses else said


def bound(target: Target, limit: float) -> str:
    return f"{'≥' if target.more else '≤'} {limit:g} {target.unit}"


def value_of(target: Target, value: float | None) -> str:
    return "" if value is None else f"{value:.3g} {target.unit}"


def failures(results: Results) -> list[Measurement]:
    """Ours first: everything that is wrong or raised."""
    return sorted(
        (m for m in results.measurements if m.failed), key=lambda m: not is_ours(m.subject)
    )
