"""`attn-core kernels`: the device functions that masks become, and what compilers make of kernels.

    attn-core kernels show --mask "causal() & window(255)" --score "softcap(50)"
    attn-core kernels compile --target sm_90 --target gfx942 --json found.json --resume
    attn-core kernels configs --target sm_90 --width 128

None of them needs a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from attn_core.cli_terminal import page, progress, refused, told

Finding = Any
"""As of attn_core.kernels.ahead, which is imported when it is asked for."""


kernels = typer.Typer(help="GPU kernels, looked at without a GPU.", no_args_is_help=True)


def _samples(incomplete: str) -> list[str]:
    from attn_core.kernels.samples import SAMPLES

    return [name for name in SAMPLES if name.startswith(incomplete)]


def _kernels(incomplete: str) -> list[str]:
    from attn_core.kernels.configs import KERNELS

    return [name for name in KERNELS if name.startswith(incomplete)]


def _targets(incomplete: str) -> list[str]:
    from attn_core.kernels.ahead import SHARED

    return [name for name in SHARED if name.startswith(incomplete)]


@kernels.command("compile")
def compile_kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(help="sm_90, gfx942, ...; may be repeated.", autocompletion=_targets),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Kernel; all by default.", autocompletion=_kernels)
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(help="Problem; all by default.", autocompletion=_samples),
    ] = None,
    width: Annotated[list[int] | None, typer.Option(help="Of query, key and value.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of query, key and value.")] = None,
    few: Annotated[
        bool, typer.Option("--few", help="One problem of each class, one width, bfloat16.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Compilers at a time.")] = 2,
    json: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write the findings here, one by one.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Keep what the --json file holds of kernels that have not changed since, and "
            "compile what is missing."
        ),
    ] = False,
) -> None:
    """Compile kernels ahead of time; exit 1 on spills, serialized products or too much memory, and
    where there is no compiler for a target."""
    from attn_core.kernels import ahead, hazards

    console = page()
    targets = target or list(ahead.TARGETS)
    try:
        asked = list(
            ahead.jobs(targets, kernel or (), sample or (), width or (), dtype or (), few=few)
        )
        if resume and json is None:
            raise ValueError("`--resume` must come with --json FILE. Got none.")
    except ValueError as error:
        raise refused(error) from error
    if not _triton():
        raise refused(ImportError("Triton must be installed (pip install 'attn-core[triton]')."))
    from attn_core.kernels import findings

    known: dict[Any, Finding] = {}
    with told(ValueError):
        if resume and json is not None and json.exists():
            known = findings.load(json)
    none = ahead.unmade(targets)
    asked = [job for job in asked if job.target not in none]
    came: list[Finding] = []
    whole = dict(known)  # what the file holds: also of what is not asked for today
    interrupted = False
    with progress() as bar:
        task = bar.add_task("kernels", total=len(asked))

        def seen(finding: Finding) -> None:
            came.append(finding)
            job = finding.job
            whole[job] = finding
            if json is not None and finding != known.get(job):
                findings.save(whole.values(), json, none)
            bar.update(task, advance=1, description=f"{job.target} {job.kernel} {job.sample.name}")

        try:
            found = ahead.run(asked, jobs, seen, known=known)
        except KeyboardInterrupt:
            found, interrupted = came, True
    if found:
        console.print(_summary(found))
    for name, reason in none.items():
        note = f"{name}: the compilers here make nothing for it, and none was tried. {reason}"
        console.print(note, markup=False, soft_wrap=True)
    bad = [finding for finding in found if finding.problems]
    if bad:
        console.print(_table(bad))
    for name in targets:
        of_target = [finding for finding in found if finding.job.target == name]
        registers = sum(finding.wgmma[1] > 0 for finding in of_target)
        said = hazards.hazard(name) if registers else None
        if said:
            note = f"{name}: {registers} kernels have such products. {said}"
            console.print(note, markup=False, soft_wrap=True)
    if json is not None:
        findings.save(whole.values(), json, none)
    kept = sum(finding == known.get(finding.job) for finding in found)
    said = f"{len(found) - kept} compiled" + (f", {kept} as {json} holds them" if kept else "")
    if interrupted:
        note = f"interrupted: {said}, {len(bad)} with problems; {len(asked) - len(found)} are left"
        console.print(note, markup=False, soft_wrap=True)
        raise typer.Exit(130)
    console.print(f"{said}, {len(bad)} with problems", markup=False, soft_wrap=True)
    raise typer.Exit(1 if bad or none else 0)


def _triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _summary(found: Sequence[Finding]) -> Table:
    """A row to each target and kernel."""
    table = Table("target", "kernel", box=None)
    for name in ("compiled", "problems", "registers", "shared kB", "seconds"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.job.target, finding.job.kernel), []).append(finding)
    for (target, kernel), group in groups.items():
        bad = sum(bool(finding.problems) for finding in group)
        registers = [finding.registers for finding in group if finding.registers is not None]
        table.add_row(
            target,
            kernel,
            str(len(group)),
            f"[red]{bad}[/red]" if bad else "0",
            _range(registers),
            _range([finding.shared // 1024 for finding in group]),
            f"{sum(finding.seconds for finding in group):.0f}",
        )
    return table


def _range(numbers: Sequence[int]) -> str:
    if not numbers:
        return "-"
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _table(found: Sequence[Finding]) -> Table:
    table = Table("target", "kernel", "problem", "width", "dtype", "tile", "what", box=None)
    for finding in found:
        job, config = finding.job, finding.config
        tile = f"{config.rows}x{config.keys} w{config.warps} s{config.stages}"
        tile += " tma" if config.descriptors else ""
        problem = f"{job.sample.name}, {job.sizes}"
        names = (job.target, job.kernel, problem, str(job.width), job.dtype, tile)
        table.add_row(*names, "; ".join(finding.problems))
    return table


@kernels.command("show")
def show(
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help='As in Python: "causal() & window(255)", or "q - k < 256"; or causal, window:255. '
            "May be repeated, all apply."
        ),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help='"softcap(50)", softcap:50, "s * 0.5"; may be repeated, one after another.'
        ),
    ] = None,
    kernel: Annotated[
        str, typer.Option(help="Which kernel --ttgir and --ptx print.", autocompletion=_kernels)
    ] = "forward",
    target: Annotated[
        str, typer.Option(help="The GPU that it is compiled for.", autocompletion=_targets)
    ] = "sm_90",
    width: Annotated[int, typer.Option(help="Of query, key and value.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of query, key and value.")] = "bfloat16",
    ttgir: Annotated[bool, typer.Option("--ttgir", help="The kernel in Triton's GPU IR.")] = False,
    ptx: Annotated[bool, typer.Option("--ptx", help="The kernel in PTX (or amdgcn).")] = False,
) -> None:
    """The device functions that a mask and a score become, beside their trees."""
    from attn_core import cli_words
    from attn_core.kernels import ahead
    from attn_core.kernels.samples import Sample
    from attn_core.language.text import text

    if not mask and not score:
        raise refused(
            ValueError('`--mask` or `--score` must be given: --mask "causal()". Got neither.')
        )
    if not _triton():
        raise refused(ImportError("Triton must be installed (pip install 'attn-core[triton]')."))
    try:
        seen = cli_words.mask_of(mask or (), cli_words.STANDING)
        made = cli_words.score_of(score or (), cli_words.STANDING_SCORES)
        sample = Sample(
            "shown",
            text(seen.tree) if seen is not None else "",
            text(made.tree) if made is not None else "",
        )
        job = ahead.job_of(kernel, target, sample, width, dtype)
    except ValueError as error:
        raise refused(error) from error
    # A smaller kernel tells it in fewer words, if the compilers here make nothing for a target.
    none = ahead.unmade([target]) if target not in ahead.SHARED else {}
    finding = None
    if (ttgir or ptx) and not none:
        (finding,) = ahead.run([job], texts=True)
        none = ahead.unmade([target]) if finding.error else {}
    for reason in none.values():
        known = ", ".join(ahead.SHARED)
        wanted = f"a GPU that the compilers here make kernels for: one of {known}, or newer"
        raise refused(ValueError(f"`--target` must be {wanted}. Got {target}. {reason}"))
    if finding is None:
        for title, source in _functions(sample):
            _code(title, source, "python")
        return
    if finding.error:
        raise refused(RuntimeError(finding.error))
    texts = finding.texts or {}
    said = f"{finding.registers} registers, {finding.shared} bytes shared"
    if finding.columns:
        said += f", {finding.columns} columns of tensor memory"
    title = ", ".join([f"{kernel} for {target}", said, *finding.problems])
    if ttgir:
        _code(title, texts["ttgir"], "text")
    if ptx:
        _code(title, texts["ptx"] if "ptx" in texts else texts["amdgcn"], "text")


def _functions(sample: Any) -> list[tuple[str, str]]:
    """(what it is, source) of the device functions of a sample."""
    from attn_core.kernels.samples import tree_of
    from attn_core.kernels.signatures import forms
    from attn_core.kernels.source import split, written
    from attn_core.language.duals import differentiate
    from attn_core.language.neighbours import full_tiles_are_neighbours

    found = []
    for what, words in (("mask", sample.mask), ("score", sample.score)):
        tree = tree_of(words)
        if tree is None:
            continue
        held = forms(tree)
        title = f"{what}: {words}"
        if what == "mask":
            near = full_tiles_are_neighbours(tree, "k")
            title += f"\nfull tiles: {'neighbours' if near else 'looked up in lists'}"
            found.append((title, written(tree, held)))
            continue
        derivative = "derivative of the score: value, slope, then slope and place of each look-up"
        for name, whole in ((title, tree), (derivative, differentiate(tree).tree)):
            looks, rest = split(whole)
            if looks is not None:
                found.append((f"looked up before there is an s: {name}", written(looks, held)))
            found.append((name, written(rest, held, True)))
    return found


def _code(title: str, source: str, language: str) -> None:
    console = Console()
    for line in title.splitlines():
        console.print(f"# {line}", markup=False, style="dim", soft_wrap=True)
    if console.is_terminal:
        console.print(Syntax(source, language, theme="ansi_dark", background_color="default"))
    else:
        # Whole lines, for whoever pipes them on.
        sys.stdout.write(source if source.endswith("\n") else source + "\n")


def _said_of(entry: Any) -> str:
    """Where an entry comes from; and of `fused` and `d_keys` who runs in whose place."""
    said = f"{entry.origin}: {entry.source}"
    if entry.refused:
        return f"{said}; refused: {entry.refused}"
    if entry.config.apart:
        return f"{said}; d_value and d_key run instead"
    return f"{said}; runs instead of d_keys and d_query" if entry.config.instead else said


@kernels.command("configs")
def show_configs(
    target: Annotated[
        str | None,
        typer.Option(help="What is chosen for this GPU.", autocompletion=_targets),
    ] = None,
    width: Annotated[int, typer.Option(help="Of query, key and value.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of query, key and value.")] = "bfloat16",
) -> None:
    """The configurations in force: yours first, then the shipped ones; or one GPU's choices."""
    from attn_core.kernels import ahead, configs

    if target is not None:
        try:
            if not any(target in entry.on for entry in configs.all_entries()):
                ahead.known_target(target)
            ahead.known_width(width)
        except ValueError as error:
            raise refused(error) from error
    console = page()
    place = configs.user_file()
    mine = len(configs.yours())
    console.print(
        f"yours: {mine} in {place}" if mine else f"yours: none ({place})",
        markup=False,
        soft_wrap=True,
    )
    names = ("kernel", "for", "widths", "bits", "classes", "rows", "keys", "warps", "stages")
    table = Table(*names, "programs", "tma", "from", box=None)
    if target is None:
        entries = [(e, ", ".join(e.on), ", ".join(e.classes)) for e in configs.all_entries()]
    else:
        try:
            entries = [
                (configs.explain(kernel, target, width, width, dtype, name), target, name)
                for kernel in configs.KERNELS
                for name in configs.CLASSES
            ]
        except KeyError as error:
            known = ", ".join(configs.DTYPES)
            raise refused(ValueError(f"`dtype` must be one of {known}. Got {dtype!r}.")) from error
    for entry, on, classes in entries:
        c = entry.config
        widths = ", ".join(map(str, entry.widths)) or "all"
        table.add_row(
            *(entry.kernel, on, widths, str(entry.bits or "all"), classes or "all"),
            *(str(n) for n in (c.rows, c.keys, c.warps, c.stages)),
            *(str(c.programs) if entry.kernel == configs.DECODE else "",),
            *("yes" if c.descriptors else "", _said_of(entry)),
        )
    console.print(table)
