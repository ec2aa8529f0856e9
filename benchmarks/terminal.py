"""A run as it is seen in a terminal: what is going on, the tables, and how it ended.

The command line says what is wanted (`attn_core.cli`), `runner` measures; this stands between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from attn_core.benchmarks import page, report, results, runner
from attn_core.benchmarks.results import Results
from attn_core.benchmarks.runner import Pace, Step


def begun(
    cases: Sequence[str],
    frameworks: Sequence[str],
    *,
    threads: int,
    quick: bool,
    into: Path | None,
    resume: bool,
    again: bool = False,
) -> tuple[list[Step], Results]:
    """What is still to be measured, and what there is already.

    Args:
        again: with `resume`, the cases are measured whether they have been or not, and the file
            says of which that was so.

    Raises:
        ValueError: unknown case or framework, or an earlier run that this one cannot go on with.
    """
    if resume and into is None:
        raise ValueError("`--resume` must come with --json FILE. Got none.")
    if again and not (resume and cases):
        raise ValueError("`--again` must come with --resume and --case. Got one of them at most.")
    steps = runner.plan(cases, frameworks, quick=quick)
    named = {step.case.name: step.case for step in steps}
    found = Results(results.environment(threads), named, quick=quick)
    if resume and into is not None:
        found = results.resumed(results.load(into), found) if into.exists() else found
        measured = [s for s in steps if found.holds(s.case, s.direction, s.subjects)]
        if again:
            before = found.environment.get("again", [])
            names = dict.fromkeys([*before, *(s.case.name for s in measured)])
            found.environment["again"] = list(names)
        else:
            steps = [s for s in steps if s not in measured]
        # Ratios are of samples that took turns: a step that was cut off begins anew.
        found.drop((s.case.name, s.direction) for s in steps)
    return steps, found


def run(
    steps: Sequence[Step],
    found: Results,
    *,
    pace: Pace,
    threads: int,
    into: Path | None,
    console: Console,
    bar: Progress,
) -> int:
    """Measure, show and keep it; the exit status: 1 where ours is wrong, 130 where it was cut off.

    Args:
        steps, found: what `begun` gave; what is measured is added to `found`.
        into: the file that holds all of `found` after every measurement.
    """
    load, cores = found.environment["load"], found.environment["cores"]
    if load and load[0] > cores / 4:
        console.print(f"The machine is busy: its load is {load[0]} on {cores} cores.")
    finished = _measure(steps, found, threads=threads, pace=pace, into=into, bar=bar)
    for parts in results.merged(found.measurements).values():
        console.print(report.step_table(found, parts))
    if not found.quick:
        console.print(report.targets_table(found))
    for each in report.failures(found):
        text = f"{each.case} {each.direction} {each.subject}: {each.status}: {each.problem}"
        console.print(text, markup=False, soft_wrap=True)
    if into is not None:
        results.save(found, into)
    if not finished:
        return 130
    if not any(each.status == "measured" for each in found.measurements):
        console.print("nothing has been measured.")
        return 1
    return 1 if found.broken else 0


def _measure(
    steps: Sequence[Step],
    found: Results,
    *,
    threads: int,
    pace: Pace,
    into: Path | None,
    bar: Progress,
) -> bool:
    """Add what is measured to `found`, and keep each; False where it was interrupted."""
    place: tuple[str, str] | None = None
    commit = ""
    try:
        with bar:
            task = bar.add_task("benchmarks", total=sum(len(step.subjects) for step in steps))
            for each in runner.run(
                steps,
                threads=threads,
                pace=pace,
                seen=lambda what: bar.update(task, description=what),
            ):
                if place != (each.case, each.direction):
                    # Asked once to a step: a run of hours may see the code change under it.
                    place, commit = (each.case, each.direction), results.commit()
                found.measurements.append(replace(each, commit=commit, date=results.now()))
                if into is not None:
                    results.save(found, into)
                bar.update(task, advance=1)
    except KeyboardInterrupt:
        # What was done is kept and shown, and the exit status says that it is not all.
        return False
    return True


def write_page(source: Path, to: Path) -> str:
    """Write the page of a run and its picture; in words, what has been written.

    Raises:
        ValueError, ImportError, OSError: no whole run, no matplotlib, or no such place.
    """
    drawn = page.write_page(source, results.load(source), to)
    return (
        f"{to}{f' and {page.PICTURE}' if drawn else ', without a picture: no sweep was measured'}"
    )
