"""`attn-core bench gpu`, `bench gpu-page` and `bench tune`: what needs a GPU, and says so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attn_core.cli_terminal import refused, told

PAGE = Path("docs/GPU.md")
RESULTS = Path("benchmarks/results")


def gpu(
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="doctor, tests, smoke, bench, tune, conformance or sanitizer; all by default."
        ),
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="Case, or a part of its name.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="End by then, with what tells most; without a limit, all."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of turns; 5, or 3 where minutes are given.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Where to write; benchmarks/results/<gpu>.json."),
    ] = None,
) -> None:
    """Judge the kernels on this machine's GPU, then time them; exit 1 on a wrong answer."""
    from attn_core.benchmarks import gpu as gpus
    from attn_core.benchmarks import gpu_apart, results
    from attn_core.kernels import configs

    unknown = sorted(set(stage or ()) - set(gpus.STAGES))
    if unknown:
        known = ", ".join(gpus.STAGES)
        raise refused(ValueError(f"`--stage` must be one of {known}. Got {', '.join(unknown)}."))
    try:
        machine = gpus.device()
    except gpus.NoGpu as error:
        raise refused(error) from error
    console = Console()
    environment = {**results.environment(1), "commit": results.commit(), "date": results.now()}
    try:
        environment["packages"]["triton"] = version("triton")
    except PackageNotFoundError:
        pass  # of another name, as in builds for AMD's GPUs
    environment["ptxas"] = _ptxas(machine.facts()["architecture"])
    if configs.VARIABLE in os.environ:  # other tiles than those of the commit
        environment["settings"][configs.VARIABLE] = os.environ[configs.VARIABLE]
    pace = gpus.PACE if minutes is None else gpus.HURRIED
    try:
        whole, path = gpus.run(
            machine,
            json,
            stages=stage or gpus.STAGES,
            only=case or (),
            pace=pace._replace(rounds=rounds or pace.rounds),
            minutes=minutes,
            environment=environment,
            bench=gpu_apart.bench,
            say=lambda words: console.print(words, markup=False, soft_wrap=True),
        )
    except gpus.Unreadable as error:
        raise refused(error) from error
    console.print(f"written: {path}", markup=False, soft_wrap=True)
    raise typer.Exit(1 if gpus.failed(whole, stage or gpus.STAGES) else 0)


def _ptxas(architecture: str) -> str:
    from attn_core.kernels import hazards

    found = hazards.assembler(architecture)
    version = "unknown" if found.version is None else ".".join(map(str, found.version))
    said = f"ptxas of CUDA {version}"
    return f"{said} (a known hazard)" if hazards.hazard(architecture) else said


def gpu_page(
    source: Annotated[
        list[Path] | None, typer.Argument(help="What `bench gpu` wrote; all that is there.")
    ] = None,
    to: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Write the page of GPUs, from what was measured and from nothing else."""
    from json import loads

    from attn_core.benchmarks import gpu_page as pages

    try:
        found = [
            loads(path.read_text("utf-8")) for path in source or sorted(RESULTS.glob("*.json"))
        ]
        runs = [whole for whole in found if "gpu" in whole]
        if source and len(runs) < len(found):
            raise ValueError("each file must be of `attn-core bench gpu`. Got another.")
        to.write_text(pages.page(runs), "utf-8")
    except (ValueError, OSError) as error:
        raise refused(error) from error
    Console().print(f"{to}: {len(runs)} GPU{'s' * (len(runs) != 1)}", markup=False, soft_wrap=True)


def tune(
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            help="forward, decode, d_value, d_key, d_keys, d_query or fused; all by default."
        ),
    ] = None,
    width: Annotated[list[int] | None, typer.Option(help="64, 128 or 256.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="End by then, with what was found.")
    ] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Measure, and write nothing.")] = False,
) -> None:
    """Measure kernel configurations on this machine's GPU, and keep the fastest for yourself."""
    from attn_core.benchmarks import gpu as gpus
    from attn_core.benchmarks import tune as tuning
    from attn_core.kernels import configs

    for name, given, known in (
        ("--kernel", kernel or (), tuning.KERNELS),
        ("--width", width or (), tuning.WIDTHS),
    ):
        odd = [word for word in given if word not in known]
        if odd:
            words = ", ".join(map(str, known))
            raise refused(ValueError(f"`{name}` must be one of {words}. Got {odd[0]}."))
    try:
        machine = gpus.device()
        if not dry:
            tuning.kept_before()
    except (gpus.NoGpu, gpus.Unreadable) as error:
        raise refused(error) from error
    from attn_core.kernels.signatures import hash_in_order

    console = Console()
    hash_in_order()  # so that a launch finds what has been compiled ahead of time in Triton's cache
    with told(gpus.Unreadable):  # of what somebody has written there since
        won, tried = tuning.tune(
            machine,
            kernels=kernel or tuning.KERNELS,
            widths=width or tuning.WIDTHS,
            minutes=minutes,
            kept=(lambda won: None) if dry else tuning.keep,
            clean=_clean,
            say=lambda words: console.print(words, markup=False, soft_wrap=True),
        )
    failed = sum(bool(each.problem) for each in tried)
    console.print(f"{len(tried)} tried, {failed} did not answer, {len(won)} won")
    if won and not dry:
        console.print(f"written: {configs.user_file()}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if won else 1)


def _clean(asked: Any, found: Sequence[Any]) -> list[Any]:
    """Of configurations those that compile without a problem, one process for each processor."""
    from attn_core.kernels import ahead, configs
    from attn_core.kernels.samples import SAMPLES

    about = asked.kernel, asked.architecture, SAMPLES[asked.sample]
    sizes = (asked.width, asked.width, asked.dtype)
    jobs = [ahead.Job(*about, *sizes, config) for config in found]
    if asked.kernel == configs.DECODE:
        # One query in 16 rows, and as many rows as a tile may have.
        jobs = [job._replace(even=False, queries=n) for job in jobs for n in (0, 1)]
    compiled = ahead.run(jobs, processes=os.cpu_count() or 1)
    bad = {each.config for each in compiled if each.problems}
    return [config for config in found if config not in bad]
