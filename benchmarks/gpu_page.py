"""docs/GPU.md: what was measured on GPUs, or, plainly, that nothing was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

from attn_core.benchmarks.gpu import measured_of
from attn_core.benchmarks.gpu_cases import CUDNN, FLASH, FLEX, OURS, Found, Run, cases

_HOW = """To measure on your own GPU, run `make gpu`. It checks the kernels on that GPU, times them
beside cuDNN, FlashAttention-2 and flex_attention, and writes this page. If you have the GPU for a
few minutes only:

    attn-core bench gpu --minutes 14    doctor, the kernels' own tests, the suite's smoke tier; then
                                        the cases, the most telling first; then tile sizes, and as
                                        much of the whole suite as there is time for
    attn-core bench gpu-page            write this page from what has been measured
    attn-core bench tune --minutes 20   look for faster tile sizes, and see whether the fused
                                        backward pass wins

Results are written to `benchmarks/results/<gpu>.json` after every case, and failures to the folder
of that name as they happen, so that nothing is lost if the run is stopped. First many processes
judge answers side by side, then one alone times who was right; a case that crashes ends itself.
"""

NOTHING = f"""# On a GPU

**No figure has been measured on a GPU yet**, and none stands here that was not. What is known of
the kernels without one is in [KERNELS.md](KERNELS.md): they are right in Triton's interpreter, and
they compile for sm_80, sm_90, sm_100 and gfx942.

{_HOW}
These are the targets; whether they hold is not known:

| target | must | aim |
| --- | --- | --- |
"""

_HEAD = f"""# On a GPU

`make gpu` writes this page from measurements; nothing here is written by hand. Every result was
first checked against float64, on sampled query rows. Subjects that are compared take turns. Times
are medians by the device's own clock, with its second-level cache swept before every call. Cases
where we lose are shown like the others. Figures are those of the commit that stands above them,
and each stage is of the commit in its line: [KERNELS_HISTORY.md](KERNELS_HISTORY.md) says what has
changed since.

{_HOW}
How to read the tables:

- A *target* is judged by its worst case. "must" is what has to hold, "aim" what we would like.
- "theirs / ours" is the time of the subject in that row over the time of `torch:triton`: above 1 we
  are faster.
- `torch:triton` is `attn_core.attention` with `impl="triton"`. `+dropout` drops a tenth of the
  weights, `+deterministic` runs under `torch.use_deterministic_algorithms(True)`, and `+split` and
  `+fused` force one way or the other of computing the backward pass.
- `torch-sdpa-cudnn` and `torch-sdpa-flash` are torch's `scaled_dot_product_attention` with that
  backend (the latter is FlashAttention-2), `torch-sdpa` the same with whichever torch prefers,
  `torch-flex` is compiled `flex_attention`, and `copy` copies keys and values once: it writes
  what it reads, and decoding only reads, so half of that time is the least that decoding can take.
"""


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
    text += "\n| stage | came out | at commit | |\n| --- | --- | --- | --- |\n"
    for name, stage in whole["stages"].items():
        at = stage.get("commit") or ""
        # The last of what it said tells most.
        said = " | ".join(part.strip("= ") for part in reversed(stage["said"].split(" | ")))
        text += f"| {name} | {stage['status']} | {at} | {_cell(said)} |\n"
    text += "\n| target | must | aim | worst | holds |\n| --- | --- | --- | --- | --- |\n"
    for found in run.promises():
        worst = "" if found.worst is None else f"{found.worst:.4g}"
        verdict = f"**{found.verdict}**" if found.verdict == "missed" else found.verdict
        text += f"| {found.promise.name} | {_bounds(found)} | {worst} | {verdict} |\n"
    return text + _ranges(run) + _times(run) + _without(run)


def _bounds(found: Found) -> str:
    promise = found.promise
    sign = "≥" if promise.more else "≤"
    return f"{sign} {promise.must:g} | {sign} {promise.aim:g}"


def _ranges(run: Run) -> str:
    """Of each other subject its least and greatest time as a share of ours, over all its cases."""
    text = "\n| theirs / ours | direction | from | to | cases |\n| --- | --- | --- | --- | --- |\n"
    for base in (CUDNN, FLASH, FLEX):
        for direction in ("forward", "backward"):
            found = sorted(
                (ratio, name)
                for name, case in run.cases.items()
                if base in case.subjects and direction in case.directions
                if (ratio := run.ratio(name, direction, base)) is not None
            )
            if found:
                low, high = (f"{ratio:.2f} ({name})" for ratio, name in (found[0], found[-1]))
                text += f"| {base} | {direction} | {low} | {high} | {len(found)} |\n"
    return text


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
