"""`attn-core bench`: how fast, and how much memory? What needs a GPU stands in `cli_gpu.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attn_core.cli_gpu import gpu, gpu_page, tune
from attn_core.cli_terminal import progress, told

benches = typer.Typer(help="How fast, and how much memory?", no_args_is_help=True)


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
    again: Annotated[
        bool,
        typer.Option(help="With --resume: measure these cases anew, as where a run was disturbed."),
    ] = False,
) -> None:
    """Check, then time; exit 1 where an attention of ours is wrong or raises."""
    from attn_core.benchmarks import runner, terminal

    pace = (runner.QUICK if quick else runner.Pace())._replace(timeout=timeout)
    pace = pace if rounds is None else pace._replace(rounds=rounds)
    with told(ValueError):
        steps, found = terminal.begun(
            *(case or [], framework or []),
            threads=threads,
            quick=quick,
            into=json,
            resume=resume,
            again=again,
        )
    raise typer.Exit(
        terminal.run(
            *(steps, found),
            pace=pace,
            threads=threads,
            into=json,
            console=Console(),
            bar=progress(),
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

    with told(ValueError, ImportError, OSError):
        said = terminal.write_page(source, to)
    Console().print(said, markup=False, soft_wrap=True)


benches.command("gpu")(gpu)
benches.command("gpu-page")(gpu_page)
benches.command("tune")(tune)
