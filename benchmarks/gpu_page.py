"""docs/GPU.md: what was measured on GPUs, or, plainly, that nothing was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

from attn_core.benchmarks.gpu import measured_of
from attn_core.benchmarks.gpu_cases import OURS, Found, Run, cases

_HOW = """Where there is a GPU, `make gpu` judges the kernels on it, times them beside cuDNN,
FlashAttention-2 and flex_attention, and writes this page. Where it is there for minutes only:

    attn-core bench gpu --minutes 14    doctor, the kernels' own tests, the suite's smoke tier, then
                                        cases in the order of what they tell, tiles, and as much of
                                        the whole suite as there is time for
    attn-core bench gpu-page            this page, of what was measured
    attn-core bench tune --minutes 20   tiles, and whether the fused backward pass wins

What is measured is in `benchmarks/results/<gpu>.json` after every case, and what failed in the
folder of that name as it happens, so that nothing is lost by stopping; and every case runs in a
process that may end without the others.
"""

NOTHING = f"""# On a GPU

**No figure has been measured on a GPU yet**, and none stands here that was not. What is known of
the kernels without one is in [KERNELS.md](KERNELS.md): they are right in Triton's interpreter, and
they compile for sm_80, sm_90, sm_100 and gfx942.

{_HOW}
It promises these; whether they hold is not known:

| target | must | aim |
| --- | --- | --- |
"""

_HEAD = f"""# On a GPU

Measured, not written: `make gpu` made this page. Every figure has passed a check first, against
float64, on sampled query rows. Subjects that are compared took turns; times are medians of samples
by the device's own clock, with its second-level cache swept before every call. A ratio is the time
of the named backend over ours: above 1 we win. Losses stand here as they were measured.

{_HOW}"""


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The page of these runs, a chapter to each GPU."""
    if not runs:
        rows = (f"| {f.promise.name} | {_bounds(f)} |\n" for f in Run([]).promises())
        return NOTHING + "".join(rows)
    return _HEAD + "".join(_chapter(whole) for whole in runs)


def _chapter(whole: Mapping[str, Any]) -> str:
    run = Run(measured_of(whole))
    facts = ", ".join(f"{name} {value}" for name, value in whole["facts"].items() if name != "gpu")
    place = whole["environment"]
    text = f"\n## {whole['gpu']}\n\n{facts}.\n"
    if place:
        packages = place.get("packages", {})
        versions = ", ".join(f"{n} {packages[n]}" for n in ("torch", "triton") if n in packages)
        told = (f"commit {place.get('commit') or 'not recorded'}", versions, place.get("ptxas", ""))
        text += f"\n{place.get('date', '')[:10]}, {', '.join(part for part in told if part)}.\n"
        for name, value in place.get("settings", {}).items():
            text += f"\nSet: `{name}={value}`.\n"
    pace = whole.get("pace", {})
    if pace.get("minutes"):
        text += (
            f"\nIn {pace['minutes']:g} minutes: {pace['rounds']} rounds of turns, and answers "
            f"checked on {pace['heads']} key heads of each case.\n"
        )
    text += "\n| stage | came out | |\n| --- | --- | --- |\n"
    for name, stage in whole["stages"].items():
        text += f"| {name} | {stage['status']} | {_cell(stage['said'])} |\n"
    text += "\n| target | must | aim | worst | holds |\n| --- | --- | --- | --- | --- |\n"
    for found in run.promises():
        worst = "" if found.worst is None else f"{found.worst:.3g}"
        verdict = f"**{found.verdict}**" if found.verdict == "missed" else found.verdict
        text += f"| {found.promise.name} | {_bounds(found)} | {worst} | {verdict} |\n"
    return text + _times(run) + _without(run)


def _bounds(found: Found) -> str:
    promise = found.promise
    return f"{promise.must:g} | {promise.aim:g}"


def _times(run: Run) -> str:
    text = "\n| case | direction | subject | ms | quartiles | TFLOP/s | theirs / ours |\n"
    text += "| --- | --- | --- | --- | --- | --- | --- |\n"
    for case in cases():
        for direction in case.directions:
            for subject in case.subjects:
                time = run.time(case.name, subject, direction)
                if time is None:
                    continue
                samples = run.found[(case.name, subject, direction)].samples
                low, _, high = quantiles(samples, n=4) if len(samples) > 1 else [time] * 3
                rate = case.operations(direction) / time / 1e9
                ratio = run.ratio(case.name, direction, subject)
                beside = "" if subject == OURS or ratio is None else f"{ratio:.2f}"
                text += (
                    f"| {case.name} | {direction} | {subject} | {time:.3f} "
                    f"| {low:.3f} to {high:.3f} | {rate:.0f} | {beside} |\n"
                )
    return text


def _without(run: Run) -> str:
    """Who has no figure, and why."""
    rows = [m for m in run.found.values() if m.status != "measured"]
    if not rows:
        return ""
    text = "\n| case | direction | subject | | why |\n| --- | --- | --- | --- | --- |\n"
    for m in rows:
        text += f"| {m.case} | {m.direction} | {m.subject} | {m.status} | {_cell(m.problem)} |\n"
    return text


def _cell(words: str) -> str:
    return " ".join(words.replace("|", "/").split())[:200]
