"""Configurations measured on the GPU at hand: `attn-core bench tune`.

For every kernel, width and class of problems the candidates are timed on one case, the fastest that
answers wins, and is written where `attn_core.kernels.configs` looks first. What a candidate cannot
do (too much shared memory, say) is a reason not to take it, never an error.

The backward pass is timed as a whole, with one kernel's configuration changed at a time: the others
stay as they are, so that what differs is its own time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from attn_core.benchmarks.cases import Case
from attn_core.benchmarks.gpu_cases import OURS, GpuCase

KERNELS = ("forward", "d_keys", "d_query")
WIDTHS = (64, 128, 256)
CLASSES = {"none": "full", "positions": "causal", "mask": "documents"}
"""The class, and the mask of the case that stands for it."""

_TALL, _WIDE = (64, 128), (32, 64, 128)


class Tried(NamedTuple):
    """A candidate and its time: infinite where it did not answer, with the reason."""

    kernel: str
    width: int
    mask_class: str
    config: Any
    milliseconds: float
    problem: str = ""


def candidates(kernel: str, now: Any, descriptors: bool) -> list[Any]:
    """Configurations worth a try: what is chosen now, and tiles about as large as fit anywhere.

    Args:
        now: the `Config` in force.
        descriptors: whether the GPU has them.
    """
    made = [now]
    kind = type(now)
    tall, wide = (_TALL, _WIDE) if kernel != "d_keys" else (_WIDE, _TALL)
    for rows in tall:
        for keys in wide:
            for warps in (4, 8):
                for stages in (2, 3):
                    for described in (True, False) if descriptors else (False,):
                        made.append(kind(rows, keys, warps, stages, described))
    return list(dict.fromkeys(made))


def case_of(width: int, mask_class: str) -> GpuCase:
    """The case on which a class is measured."""
    mask = CLASSES[mask_class]
    return GpuCase(
        f"tune-{mask}-D{width}", 4096, width, 2048 // width, 4, "bfloat16", mask,
        1024 if mask == "documents" else 0, (OURS,), ("forward", "backward"),
    )  # fmt: skip


def tune(
    machine: Any,
    *,
    kernels: Sequence[str] = KERNELS,
    widths: Sequence[int] = WIDTHS,
    classes: Sequence[str] = tuple(CLASSES),
    repeats: int = 10,
    say: Callable[[str], None] = print,
) -> tuple[list[Any], list[Tried]]:
    """(entries of those that won, everything that was tried)."""
    from attn_core.kernels import configs

    facts = machine.facts()
    architecture, timer = facts["architecture"], machine.Timer()
    described = architecture.startswith("sm_") and int(architecture[3:]) >= 90
    won, tried = [], []
    for kernel in kernels:
        direction = "forward" if kernel == "forward" else "backward"
        for width in widths:
            for name in classes:
                case = case_of(width, name)
                now = configs.choose(kernel, architecture, width, width, case.dtype, name)
                found = []
                for config in candidates(kernel, now, described):
                    entry = configs.Entry(
                        kernel, (architecture,), (width,), 16, (name,), config, "", "yours"
                    )
                    found.append(_timed(machine, timer, configs, entry, case, direction, repeats))
                tried += found
                best = min(found, key=lambda each: each.milliseconds)
                if not math.isfinite(best.milliseconds):
                    say(f"{kernel} D{width} {name}: none answered. {best.problem}")
                    continue
                source = f"measured on {facts['gpu']}: {best.milliseconds:.3f} ms ({case.name})"
                won.append(
                    configs.Entry(
                        kernel, (architecture,), (width,), 16, (name,), best.config, source, "yours"
                    )
                )
                before = found[0].milliseconds
                say(f"{kernel} D{width} {name}: {before:.3f} to {best.milliseconds:.3f} ms")
    return won, tried


def _timed(
    machine: Any, timer: Any, configs: Any, entry: Any, case: Case, direction: str, repeats: int
) -> Tried:
    plain = Tried(entry.kernel, entry.widths[0], entry.classes[0], entry.config, math.inf)
    try:
        with configs.trying(entry):
            run = machine.prepared(OURS, case, direction).run
            run()
            return plain._replace(milliseconds=timer.sample(run, repeats))
    except Exception as error:  # a candidate that cannot run is not taken, whatever it raises
        return plain._replace(problem=f"{type(error).__name__}: {str(error)[:200]}")


def keep(won: Sequence[Any]) -> Any:
    """Write these where they are looked for, before what was there; its path."""
    from attn_core.kernels import configs

    known = {(e.kernel, e.on, e.widths, e.bits, e.classes) for e in won}
    others = [
        e for e in configs.yours() if (e.kernel, e.on, e.widths, e.bits, e.classes) not in known
    ]
    path = configs.user_file()
    configs.write(path, [*won, *others])
    configs.forget()
    return path
