"""docs/BENCHMARKS.md and its picture, made from a run.

Wins and losses stand in the same columns, in the order in which they were measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from attn_core.benchmarks.cases import again
from attn_core.benchmarks.report import COLUMNS, bound, cells, in_words, outcomes, value_of
from attn_core.benchmarks.results import Measurement, Results, merged
from attn_core.benchmarks.targets import Outcome, Row, sweep
from attn_core.benchmarks.timing import ratios
from attn_core.conformance.report import printable, write_whole

PICTURE = "benchmarks-blocks.png"
_SHOWN = ("torch", "jax", "jaxlib", "tensorflow", "keras", "onnxruntime", "numpy", "attn-core")
_HEAD = """# How fast it is

Measured, not written: `attn-core bench page` makes this page from `{file}`, which `make bench`
wrote. Every figure has passed a check first: outputs and gradients at full size against the float64
judge, on sampled query rows, by the tolerance of the conformance suite. Subjects that are compared
took turns, there and back, in an order that changes from round to round so that each follows each
other one equally often, and each sample comes after calls that are not counted: nobody alone pays
for waking up (`benchmarks/timing.py`). A target is judged by the ratio of the medians of all
samples. Beside it stand median and quartiles of the ratios of neighbours, each sample over what the
other subject took at that moment; where the two disagree, the machine was not quiet. Times are
medians between quartiles. Losses stand here as they were measured.

{cpu}, {threads} threads on {cores} cores; load before the run {load}. Python {python}, {versions}.
{parts}

`torch:auto` and the like are `attn_core.attention`; the other names are the libraries' own entry
points, listed at the head of `benchmarks/*_calls.py`. "backward" is the backward pass alone, "both"
is forward and backward in one; TensorFlow hands out no backward pass alone, so its targets are on
"both", on both sides. GFLOP/s counts the useful operations, those of live entries; the ceiling is a
2048 x 2048 torch matmul in the same dtype and the same turns.
"""

_FLOORS = """
## Where the time goes

A floor is no attention. In JAX and TensorFlow it is the products of every live tile, two in a
forward pass and five in a backward pass (measured in JAX, where it can be called by itself), in the
framework's own loop: what is above it are exponentials, sums, masks and the loop. In TensorFlow a
row of tiles of a window, and one of documents, is one tile of all the keys that it sees, and a
floor takes as many of them in a turn as the implementation does. Where JAX takes
short lines of rows side by side, its floor has the reduction with which XLA gives each product both
cores. In torch it is the framework's fused kernel, called once on tiles that hold every live entry
of a window, or on the documents as a batch, with no mask inside. What a floor does not reach is out
of reach for that loop in tiles of that size, however cheap the rest: finer tiles compute less that
is hidden, in products that run at a lower rate. What the bare products reach of the share of work,
against those of causal attention at that length, stands beside the share targets below, and how
many times as fast as jax.nn they are beside that target.

| case | framework | attention, ms | floor, ms | floor / attention | quartiles |
| --- | --- | --- | --- | --- | --- |
"""

_ITSELF = """
## What the method gets wrong

torch SDPA takes turns with itself, by two names. What is not 1 here is no difference between two
implementations, and nothing below is known better than this.

| case | direction | medians | of neighbours |
| --- | --- | --- | --- |
"""


def page(results: Results, file: str, *, picture: bool) -> str:
    """docs/BENCHMARKS.md.

    Raises:
        ValueError: the run was a quick one, whose figures mean nothing.
    """
    if results.quick:
        raise ValueError(
            "a page must be made from a full run. Got one with --quick, whose figures mean nothing."
        )
    place, found = results.environment, outcomes(results)
    packages = place["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in _SHOWN if name in packages)
    facts = {name: place[name] for name in ("cpu", "threads", "cores", "python")}
    load = ", ".join(map(str, place["load"])) or "unknown"
    text = _HEAD.format(file=file, versions=versions, load=load, parts=_parts(results), **facts)
    text += (
        "\n## Targets\n\n| target | must | aim | worst | holds |\n| --- | --- | --- | --- | --- |\n"
    )
    for each in found:
        target = each.target
        worst = "" if each.worst is None else value_of(target, each.worst)
        bounds = f"{bound(target, target.must)} | {bound(target, target.aim)}"
        verdict = in_words(each)
        verdict = f"**{verdict}**" if each.misses else verdict
        text += f"| {target.name} | {bounds} | {worst} | {verdict} |\n"
    if picture:
        text += (
            "\n## Time against live blocks\n\nCausal windows of 128 to 4096 keys at T 8192,"
            " forward, float32. The line is fitted to the points.\n\n"
            f"![Time against live blocks]({PICTURE})\n"
        )
    text += _itself(results) + _floors(results)
    text += "\n## Targets, case by case\n"
    for each in found:
        text += _target_rows(results, each)
    text += "\n## Times\n"
    for (case, direction), parts in merged(results.measurements).items():
        measured = [p for p in parts if p.status == "measured" and p.rounds]
        text += _markdown(results, f"{case}, {direction}", measured)
    for title, measure in (("Memory", "memory"), ("First calls", "first")):
        text += f"\n## {title}\n"
        for (case, direction), parts in merged(results.measurements).items():
            known = results.cases[case].measure == measure
            measured = [p for p in parts if known and p.status == "measured"]
            text += _markdown(results, f"{case}, {direction}", measured)
    return text + _without(results)


def _parts(results: Results) -> str:
    """When it was measured, and of which code; a run that was made in parts is told as such."""
    dates: dict[str, list[str]] = defaultdict(list)
    for each in results.measurements:
        dates[each.commit].append(each.date[:10] or "day not recorded")
    begun = results.environment["date"][:10]
    days = results.environment.get("parts", ())
    told = [
        f"commit {commit or 'not recorded'} ({_span(found)}, {len(found)} measurements)"
        for commit, found in dates.items()
    ]
    if len(dates) > 1 or len(days) > 1:
        times = f", begun {len(days)} times" if len(days) > 1 else ""
        again = results.environment.get("again", ())
        # Who chooses what is measured twice chooses figures too: so it is said.
        twice = (
            f" Measured twice, and told as it came out then: {', '.join(again)}." if again else ""
        )
        return f"Measured in parts{times}, from {begun}: {'; '.join(told)}.{twice}"
    return f"Measured on {begun}: {'; '.join(told)}."


def _span(days: Sequence[str]) -> str:
    first, last = min(days), max(days)
    return first if first == last else f"{first} to {last}"


def _floors(results: Results) -> str:
    """Passes beside what their products alone cost; empty where those were not measured."""
    lines = ""
    for case in results.cases.values():
        for name in ("torch", "jax", "tf"):
            ours, floor = (
                results.find(case.name, f"{name}{what}", case.directions[0])
                for what in (":auto", "-floor")
            )
            if ours is None or floor is None:
                continue
            share = ratios(floor.series, ours.series)
            lines += (
                f"| {case.name} | {name} | {1e3 * ours.time.middle:.3g} "
                f"| {1e3 * floor.time.middle:.3g} | {100 * share.middle:.0f}% "
                f"| {100 * share.low:.0f}% to {100 * share.high:.0f}% |\n"
            )
    return _FLOORS + lines if lines else ""


def _itself(results: Results) -> str:
    """One subject timed twice over by two names: what the method itself gets wrong."""
    lines = ""
    for case in results.cases.values():
        for direction in case.directions:
            found = results.faster(case.name, direction, again(case.mask), "torch-sdpa")
            if found is not None:
                value, beside = found
                lines += (
                    f"| {case.name} | {direction} | {value:.3f} x "
                    f"| {beside.low:.3f} x to {beside.high:.3f} x, median {beside.middle:.3f} x |\n"
                )
    return _ITSELF + lines if lines else ""


def _target_rows(results: Results, each: Outcome) -> str:
    """Every case of a target that was measured at all, the bare products' figure beside ours."""
    target = each.target
    if each.worst is None:
        return ""
    columns = ["case", "value", "of neighbours", *(["bare products"] if target.floors else [])]
    text = f"\n### {target.name}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n"
    floors = {} if target.floors is None else target.floors(results)
    for row in each.rows:
        value = "not measured" if row.value is None else value_of(target, row.value)
        cells = [row.label, value, _quartiles(each, row)]
        if target.floors is not None:
            floor = floors.get(row.label)
            known = "" if floor is None else value_of(target, floor)
            # Of "both", and of torch's backward pass, there is no floor to be measured.
            some = row.label.endswith("forward") or row.label == "jax backward"
            cells.append(known or ("not measured" if some else ""))
        text += f"| {' | '.join(cells)} |\n"
    if target.why and each.verdict == "missed":
        text += f"\n{fill(target.why, 100)}\n"
    return text


def _quartiles(each: Outcome, row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    low, high = value_of(each.target, row.low), value_of(each.target, row.high)
    if row.middle is None:
        return f"{low} to {high}"
    return f"{low} to {high}, median {value_of(each.target, row.middle)}"


def _markdown(results: Results, title: str, measured: Sequence[Measurement]) -> str:
    if not measured:
        return ""
    rows = [[each.subject, *cells(results, each)] for each in measured]
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    lines = [[COLUMNS[i] for i in used], ["---"] * len(used)]
    lines += [[row[i] for i in used] for row in rows]
    commits = {each.commit for each in results.measurements}
    here = ", ".join(sorted({each.commit or "not recorded" for each in measured}))
    # Where it is the same everywhere, the head of the page says it.
    of = f"Commit {here}.\n\n" if len(commits) > 1 else ""
    return f"\n### {title}\n\n{of}" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _without(results: Results) -> str:
    """Who has no figure, and why: a line to a reason."""
    reasons: dict[tuple[str, str, str], int] = defaultdict(int)
    for each in results.measurements:
        if each.status != "measured":
            why = printable(each.problem).splitlines()[0][:200].replace("|", "\\|")
            reasons[each.subject.partition("@")[0], each.status, why] += 1
    if not reasons:
        return ""
    text = "\n## Without a figure\n\n| subject | | why | times |\n| --- | --- | --- | --- |\n"
    for (subject, status, why), count in reasons.items():
        text += f"| {subject} | {status} | {why} | {count} |\n"
    return text


def draw(results: Results, path: Path) -> bool:
    """The picture: time against live blocks for each framework; False where nothing was measured.

    Raises:
        ImportError: matplotlib is missing.
    """
    lines = {name: sweep(results, f"{name}:auto") for name in ("torch", "jax", "tf")}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ImportError(
            "the picture needs matplotlib, which is not installed: pip install 'attn-core[viz]'."
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, points), marker in zip(lines.items(), "osD", strict=False):
        x, y = np.array(points).T
        slope, start = np.polyfit(x, y, 1, w=1 / y)
        (drawn,) = axes.plot(x, 1e3 * y, marker, label=f"{name}:auto")
        axes.plot(x, 1e3 * (start + slope * x), color=drawn.get_color(), linewidth=1)
    axes.set_xlabel("live blocks of 128 x 128")
    axes.set_ylabel("ms")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title("Causal windows of 128 to 4096 at T 8192, forward, float32", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return True


def write_page(source: Path, results: Results, target: Path) -> bool:
    """The page, and beside it its picture; whether there is one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = page(results, source.name, picture=True)
    drawn = draw(results, target.with_name(PICTURE))
    write_whole(target, text if drawn else page(results, source.name, picture=False))
    return drawn
