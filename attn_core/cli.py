"""The command line: `attn-core doctor`, `explain`, `conformance`, `bench` and `kernels`.

Options and their words stand here; what they lead to is imported when it is asked for.

Completion: `attn-core --install-completion`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attn_core import config
from attn_core.cli_gpu import gpu, gpu_page, tune
from attn_core.cli_kernels import kernels

app = typer.Typer(help="One attention with one meaning.", no_args_is_help=True)
suite = typer.Typer(help="Does an attention mean what the spec says?", no_args_is_help=True)
app.add_typer(suite, name="conformance")
app.add_typer(kernels, name="kernels")


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


@contextmanager
def _told(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """End with that exit status where one of these is raised, and say its message."""
    try:
        yield
    except kinds as error:
        Console(stderr=True).print(f"attn-core: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(status) from error


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

    with _told(ValueError, OSError):
        status = compare(before, after, Console(), factor)
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

    with _told(ValueError, ImportError, OSError):
        cases = chosen(case or [])
        with _progress() as bar:
            task = bar.add_task("golden", total=len(cases))
            write(directory, cases, seen=lambda name: bar.update(task, advance=1, description=name))
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
    # A set that is not what it says is a failure; a question that cannot be asked is misuse.
    with _told(ValueError, ImportError), _told(golden.GoldenError, status=1):
        total = len(names) * len(golden.verify(directory))
        with _progress() as bar:
            task = bar.add_task("golden", total=total)

            def seen(verdict: Verdict) -> None:
                bar.update(task, advance=1, description=f"{verdict.backend} {verdict.case}")

            for name in names:
                verdicts += golden_check.check(directory, name, seen=seen)
    console.print(report.matrix(verdicts))
    report.summary(verdicts, console)
    raise typer.Exit(0 if all(v.passed for v in verdicts) else 1)


def _masks(incomplete: str) -> list[str]:
    from attn_core.explain_shapes import NAMED

    return [name for name in NAMED if name.startswith(incomplete)]


def _scores(incomplete: str) -> list[str]:
    from attn_core.explain_shapes import SCORES

    return [name for name in SCORES if name.startswith(incomplete)]


@app.command("explain")
def explain_shapes(
    backend: Annotated[
        str, typer.Option(help="Backend to ask.", autocompletion=_backends)
    ] = "numpy",
    shape: Annotated[str, typer.Option(help="B,Hq,Tq,D of query.")] = "1,8,2048,64",
    kv_heads: Annotated[int | None, typer.Option(help="Hk; as query.")] = None,
    keys: Annotated[int | None, typer.Option(help="Tk; as query.")] = None,
    value_width: Annotated[int | None, typer.Option(help="Dv; as query.")] = None,
    dtype: Annotated[str, typer.Option(help="Of query, key and value.")] = "float32",
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help='causal, window:255, ... or text such as "q >= k"; may be repeated, all apply.',
            autocompletion=_masks,
        ),
    ] = None,
    bias: Annotated[
        str | None, typer.Option(help="Its shape, Tq,Tk or 1,Hq,Tq,Tk and the like.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help='softcap:50, alibi or text such as "s * 0.5"; may be repeated, one after another.',
            autocompletion=_scores,
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="1 / sqrt(D) when left out.")] = None,
    sinks: Annotated[bool, typer.Option("--sinks", help="A sink to each head.")] = False,
    kv_lengths: Annotated[
        str | None, typer.Option(help="An int for all batches, or one to each, commas between.")
    ] = None,
    q_lengths: Annotated[str | None, typer.Option(help="As --kv-lengths.")] = None,
    query_offset: Annotated[
        str | None, typer.Option(help="start, end, an int, or one to each batch.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="The rate.")] = 0.0,
    layout: Annotated[str, typer.Option(help="BHTD or BTHD.")] = "BHTD",
    precision: Annotated[str | None, typer.Option(help="highest or fast.")] = None,
    impl: Annotated[str, typer.Option(help="auto, or the name of an implementation.")] = "auto",
    return_lse: Annotated[bool, typer.Option("--return-lse", help="Ask for lse too.")] = False,
    return_weights: Annotated[
        bool, typer.Option("--return-weights", help="Ask for the weights too.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What attention would do with arrays of these sizes; exit 1 where nothing answers."""
    from json import dumps

    from attn_core.explain_shapes import report

    with _told(ValueError, TypeError, ImportError):
        found = report(
            backend,
            shape,
            kv_heads=kv_heads,
            keys=keys,
            value_width=value_width,
            dtype=dtype,
            mask=mask or (),
            bias=bias,
            score=score or (),
            scale=scale,
            sinks=sinks,
            kv_lengths=kv_lengths,
            q_lengths=q_lengths,
            query_offset=query_offset,
            dropout=dropout,
            layout=layout,
            precision=precision,
            impl=impl,
            return_lse=return_lse,
            return_weights=return_weights,
        )
    if json:
        typer.echo(dumps(found.as_dict(), indent=2))
    else:
        Console().print(found)
    raise typer.Exit(0 if found.impl else 1)


benches = typer.Typer(help="How fast, and how much memory?", no_args_is_help=True)
app.add_typer(benches, name="bench")
benches.command("gpu")(gpu)
benches.command("gpu-page")(gpu_page)
benches.command("tune")(tune)


def _bench_cases(incomplete: str) -> list[str]:
    from attn_core.benchmarks.cases import BY_NAME

    return [name for name in BY_NAME if name.startswith(incomplete)]


def _frameworks(incomplete: str) -> list[str]:
    from attn_core.benchmarks.subjects import FRAMEWORKS

    return [name for name in FRAMEWORKS if name.startswith(incomplete)]


@benches.command("run")
def run_benchmarks(
    case: Annotated[
        list[str] | None,
        typer.Option(help="Case, or a part of its name.", autocompletion=_bench_cases),
    ] = None,
    framework: Annotated[
        list[str] | None,
        typer.Option(
            help="torch, jax, tf or onnxruntime; may be repeated.", autocompletion=_frameworks
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rounds of turns, two samples each.",
            show_default="7, or 2 with --quick",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads, and cores, of every worker.")] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 900.0,
    quick: Annotated[
        bool, typer.Option(help="Small sizes and two rounds: does it run? No figures.")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also write the measurements here, one by one."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Keep what the --json file holds, and measure what is missing.")
    ] = False,
) -> None:
    """Check, then time; exit 1 where an attention of ours is wrong or raises."""
    from attn_core.benchmarks import runner, terminal

    pace = (runner.QUICK if quick else runner.Pace())._replace(timeout=timeout)
    pace = pace if rounds is None else pace._replace(rounds=rounds)
    with _told(ValueError):
        steps, found = terminal.begun(
            *(case or [], framework or []), threads=threads, quick=quick, into=json, resume=resume
        )
    raise typer.Exit(
        terminal.run(
            *(steps, found),
            pace=pace,
            threads=threads,
            into=json,
            console=Console(),
            bar=_progress(),
        )
    )


@benches.command("page")
def write_benchmark_page(
    source: Annotated[
        Path, typer.Argument(help="What `bench run --json` wrote.", dir_okay=False)
    ] = Path("benchmarks/results/cpu.json"),
    to: Annotated[Path, typer.Option(help="The page; its picture goes beside it.")] = Path(
        "docs/BENCHMARKS.md"
    ),
) -> None:
    """Write the page of a run, and the picture of time against live blocks."""
    from attn_core.benchmarks import terminal

    with _told(ValueError, ImportError, OSError):
        said = terminal.write_page(source, to)
    Console().print(said, markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """What is installed, and which backends can be used."""
    from attn_core.cli_doctor import lines

    console = Console()
    for line in lines():
        console.print(line, markup=False)
