"""The command line: `attn-core doctor` and `attn-core conformance run`.

Completion: `attn-core --install-completion`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attn_core import config

app = typer.Typer(help="One attention with one meaning.", no_args_is_help=True)
suite = typer.Typer(help="Does an attention mean what the spec says?", no_args_is_help=True)
app.add_typer(suite, name="conformance")


def _backends(incomplete: str) -> list[str]:
    return [name for name in config.BACKENDS if name.startswith(incomplete)]


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
        typer.Option(help="Backend to judge; may be repeated.", autocompletion=_backends),
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
    from attn_core.conformance import page, report
    from attn_core.conformance.judgement import Verdict
    from attn_core.conformance.runner import plan, run

    console = Console()
    names = [*(backend or []), *(subject or [])] or config.installed().split(", ")
    forms, cases = form or [], case or []
    came: list[Verdict] = []
    interrupted = False
    try:
        total = sum(len(work.cases) for work in plan(names, forms, cases, tier))
        with _progress() as bar:
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
        Console(stderr=True).print(f"attn-core: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        # What was done is kept and shown, and the exit status says that it is not all.
        verdicts, interrupted = came, True
    console.print(report.matrix(verdicts, every=not failures))
    report.summary(verdicts, console)
    place = report.environment()
    for path, save in ((json, report.save), (junit, junit_report.save), (html, page.save)):
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


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@suite.command("diff")
def diff_reports(
    before: Annotated[Path, typer.Argument(help="JSON report of the run before.")],
    after: Annotated[Path, typer.Argument(help="JSON report of the run after.")],
    factor: Annotated[float, typer.Option(help="Growth of a share worth telling.")] = 2.0,
) -> None:
    """What changed between two reports; exit 1 where what passed no longer does."""
    from attn_core.conformance.difference import compare

    try:
        status = compare(before, after, Console(), factor)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"attn-core: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
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

    try:
        cases = chosen(case or [])
        with _progress() as bar:
            task = bar.add_task("golden", total=len(cases))
            write(directory, cases, seen=lambda name: bar.update(task, advance=1, description=name))
    except (ValueError, ImportError, OSError) as error:
        Console(stderr=True).print(f"attn-core: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    size = sum(path.stat().st_size for path in directory.iterdir())
    Console().print(
        f"{len(cases)} cases, {size / 1000:.0f} kB, in {directory}", markup=False, soft_wrap=True
    )


@vectors.command("check")
def check_golden(
    directory: Annotated[
        Path | None, typer.Argument(help="A golden set; the shipped one by default.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Backend to ask; may be repeated. numpy.", autocompletion=_backends),
    ] = None,
) -> None:
    """Verify golden vectors, then hold backends to them; exit 1 on a failure."""
    from attn_core.conformance import golden, golden_check, report
    from attn_core.conformance.judgement import Verdict

    console = Console()
    names = backend or ["numpy"]
    verdicts: list[Verdict] = []
    try:
        total = len(names) * len(golden.verify(directory))
        with _progress() as bar:
            task = bar.add_task("golden", total=total)

            def seen(verdict: Verdict) -> None:
                bar.update(task, advance=1, description=f"{verdict.backend} {verdict.case}")

            for name in names:
                verdicts += golden_check.check(directory, name, seen=seen)
    except golden.GoldenError as error:
        Console(stderr=True).print(f"attn-core: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except (ValueError, ImportError) as error:
        Console(stderr=True).print(f"attn-core: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    console.print(report.matrix(verdicts))
    report.summary(verdicts, console)
    raise typer.Exit(0 if all(v.passed for v in verdicts) else 1)


@app.command()
def doctor() -> None:
    """What is installed, and which backends can be used."""
    import subprocess
    import sys

    console = Console()
    console.print(f"attn-core {version('attn-core')}, Python {sys.version.split()[0]}")
    packages = {"torch": "torch", "tf": "tensorflow", "jax": "jax", "numpy": "numpy"}
    for name in config.BACKENDS:
        found = _version(packages[name])
        if found is None:
            console.print(f"  {name}: not installed; pip install 'attn-core[{name}]'", markup=False)
            continue
        # In a process of its own: two frameworks are never imported into one.
        check = subprocess.run(
            [sys.executable, "-c", f"from attn_core import registry; registry.load({name!r})"],
            capture_output=True,
            text=True,
        )
        last = (check.stderr.strip().splitlines() or ["no message"])[-1]
        state = "ready" if check.returncode == 0 else f"broken: {last}"
        console.print(f"  {name}: {packages[name]} {found}, {state}", markup=False)
    triton = _version("triton")
    if triton and _version("tensorflow") and not triton.startswith(("3.4", "3.5", "3.6")):
        console.print(
            f"  triton {triton} aborts a process that imported TensorFlow first (3.7 to 3.9 do); "
            "3.6.0 does not.",
            markup=False,
        )


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
