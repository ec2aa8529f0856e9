"""`attn-core conformance run`, `diff` and `golden`: does an attention mean what the spec says?

Exit status: 0 where all passes, 1 on a failure, 2 on words that make no sense, 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attn_core import config
from attn_core.cli_terminal import backends, page, progress, refused, told

suite = typer.Typer(help="Does an attention mean what the spec says?", no_args_is_help=True)


def _forms(incomplete: str) -> list[str]:
    from attn_core.conformance.runner import FORMS

    names = dict.fromkeys(["all", *(form for forms in FORMS.values() for form in forms)])
    return [name for name in names if name.startswith(incomplete)]


def _peers(incomplete: str) -> list[str]:
    from attn_core.conformance.peers import PEERS

    return [name for name in PEERS if name.startswith(incomplete)]


def _cases(incomplete: str) -> list[str]:
    from attn_core.conformance.judgement import named

    return [name for name in named([]) if name.startswith(incomplete)]


def _tiers(incomplete: str) -> list[str]:
    return [name for name in ("smoke", "full", "exhaustive") if name.startswith(incomplete)]


@suite.command("run")
def run_suite(
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend to judge; may be repeated.", autocompletion=backends),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(help="eager, jit, aot_eager, ... or all.", autocompletion=_forms),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Case, or a part of its name.", autocompletion=_cases),
    ] = None,
    subject: Annotated[
        list[str] | None,
        typer.Option(
            help="Also judge this: a peer (torch-sdpa, jax-nn, ...), or package.module:function.",
            autocompletion=_peers,
        ),
    ] = None,
    tier: Annotated[
        str, typer.Option(help="smoke, full or exhaustive.", autocompletion=_tiers)
    ] = "full",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a case may take.")] = 300.0,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes at a time.")] = 2,
    json: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write the verdicts here.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write JUnit XML here.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write one HTML page here.")
    ] = None,
    failures: Annotated[bool, typer.Option(help="Show only cases that fail.")] = False,
) -> None:
    """Judge backends against the float64 judge; exit 1 on a failure."""
    from attn_core.conformance import junit as junit_report
    from attn_core.conformance import page as html_page
    from attn_core.conformance import report
    from attn_core.conformance.judgement import Verdict
    from attn_core.conformance.runner import plan, run

    console = page()
    names = [*(backend or []), *(subject or [])] or config.installed().split(", ")
    forms, cases = form or [], case or []
    came: list[Verdict] = []
    interrupted = False
    try:
        total = sum(len(work.cases) for work in plan(names, forms, cases, tier))
        with progress() as bar:
            task = bar.add_task("conformance", total=total)

            def seen(verdict: Verdict) -> None:
                came.append(verdict)
                what = f"{verdict.backend} {verdict.form} {verdict.case}"
                bar.update(task, advance=1, description=what)

            verdicts = run(
                names,
                forms=forms,
                cases=cases,
                tier=tier,
                jobs=jobs,
                timeout=timeout,
                seen=seen,
            )
    except (ValueError, ImportError, TypeError) as error:
        raise refused(error) from error
    except KeyboardInterrupt:
        # What was done is kept and shown, and the exit status says that it is not all.
        verdicts, interrupted = came, True
    console.print(report.matrix(verdicts, every=not failures))
    report.summary(verdicts, console)
    place = report.environment()
    for path, save in ((json, report.save), (junit, junit_report.save), (html, html_page.save)):
        if path is not None:
            save(verdicts, path, place)
    if interrupted:
        console.print(f"interrupted: {len(verdicts)} of {total} asked")
        raise typer.Exit(130)
    silent = [
        name for name in names if not any(v.backend == name and not v.missing for v in verdicts)
    ]
    for name in silent:
        console.print(f"{name} answered no case: nothing has been judged.", markup=False)
    bad = silent or any(v.status in ("failed", "error") for v in verdicts)
    raise typer.Exit(1 if bad else 0)


@suite.command("diff")
def diff_reports(
    before: Annotated[Path, typer.Argument(help="JSON report of the run before.")],
    after: Annotated[Path, typer.Argument(help="JSON report of the run after.")],
    factor: Annotated[float, typer.Option(help="Growth of a share worth telling.")] = 2.0,
) -> None:
    """What changed between two reports; exit 1 where what passed no longer does."""
    from attn_core.conformance.difference import compare

    with told(ValueError, OSError):
        status = compare(before, after, page(), factor)
    raise typer.Exit(status)


vectors = typer.Typer(
    help="Questions and answers as files, for any language.", no_args_is_help=True
)
suite.add_typer(vectors, name="golden")


@vectors.command("write")
def write_golden(
    directory: Annotated[Path, typer.Argument(help="New, empty, or a golden set to replace.")],
    case: Annotated[
        list[str] | None,
        typer.Option(help="Case, or a part of its name; all by default.", autocompletion=_cases),
    ] = None,
) -> None:
    """Write golden vectors: inputs, options, the judge's results and allowances."""
    from attn_core.conformance.golden_write import write
    from attn_core.conformance.judgement import chosen

    with told(ValueError, ImportError, OSError):
        cases = chosen(case or [])
        with progress() as bar:
            task = bar.add_task("golden", total=len(cases))
            write(directory, cases, seen=lambda name: bar.update(task, advance=1, description=name))
    size = sum(path.stat().st_size for path in directory.iterdir())
    Console().print(
        f"{len(cases)} cases, {size / 1000:.0f} kB, in {directory}", markup=False, soft_wrap=True
    )


@vectors.command("check")
def check_golden(
    directory: Annotated[
        Path | None,
        typer.Argument(
            exists=True, file_okay=False, help="A golden set; the shipped one by default."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend to ask; may be repeated. numpy.", autocompletion=backends),
    ] = None,
) -> None:
    """Verify golden vectors, then hold backends to them; exit 1 on a failure."""
    from attn_core.conformance import golden, golden_check, report
    from attn_core.conformance.judgement import Verdict

    console = page()
    names = backend or ["numpy"]
    verdicts: list[Verdict] = []
    # A set that is not what it says is a failure; a question that cannot be asked is misuse.
    with told(ValueError, ImportError), told(golden.GoldenError, status=1):
        total = len(names) * len(golden.verify(directory))
        with progress() as bar:
            task = bar.add_task("golden", total=total)

            def seen(verdict: Verdict) -> None:
                bar.update(task, advance=1, description=f"{verdict.backend} {verdict.case}")

            for name in names:
                verdicts += golden_check.check(directory, name, seen=seen)
    console.print(report.matrix(verdicts))
    report.summary(verdicts, console)
    raise typer.Exit(0 if all(v.passed for v in verdicts) else 1)
