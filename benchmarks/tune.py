"""Configurations measured on the GPU at hand: `attn-core bench tune`.

For every kernel, width and class of problems the candidates are timed on one case, the fastest that
answers wins, and is written where `attn_core.kernels.configs` looks first. What a candidate cannot
do (too much shared memory, say) is a reason not to take it, never an error. Before any is timed all
are compiled ahead of time, by as many processes as there are processors: those that spill, or whose
products wait for each other, are left out, and the largest tiles come first.

The backward pass is timed as a whole, with one kernel's configuration changed at a time: the others
stay as they are, so that what differs is its own time. Who has won stands while the next kernel is
tried. At width 256, where dK and dV together leave no registers for tiles of a size, `d_value` and
`d_key` are tried first, and then `d_keys`, in one launch, against those two: where they win, its
entry says that they are apart. `fused` comes last, against the split of those winners: where it
wins, its entry says that it runs instead, and where it does not, that it does not.

Decoding is timed as `bench gpu` times it: a query against a cache of 268 MB that it sees all of, in
a CUDA graph. What it takes is reading, so that what counts is how many bytes are on their way, in
tiles times stages times programs (`decoding`): every tile is tried with the most programs that a
processor has room for, and the three fastest with other numbers of them.

What is won is kept as it comes, so that who runs out of time has what was found until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from attn_core.benchmarks.gpu import Limit, Unreadable
from attn_core.benchmarks.gpu_cases import DROPOUT, OURS, GpuCase

PARTS = ("d_value", "d_key")
KERNELS = ("forward", "decode", *PARTS, "d_keys", "d_query", "fused")
WIDTHS = (128, 64, 256)
CLASSES = {"none": "full", "positions": "causal", "mask": "documents", "dropout": "causal"}
"""The class, and the mask of the case that stands for it."""

SAMPLES = {"none": "plain", "positions": "causal", "mask": "documents", "dropout": "dropout"}
"""The class, and what is compiled ahead of time for it."""

SUBJECTS = {"dropout": DROPOUT}
"""Who is timed for a class: of the others `OURS`, which drops nothing."""

_TALL, _WIDE = (64, 128), (32, 64, 128)

WIDEST = {
    "d_keys": ((16, 64, 8, 2), (64, 32, 16, 2), (64, 32, 8, 2), (32, 32, 16, 2), (32, 32, 8, 2)),
    "d_query": ((128, 16, 8, 3),),
}
"""Rows, keys, warps and stages of width 256, where registers end before the tiles of every width
begin: of `d_keys` none with 64 keys and more than 16 rows is free of spills, since dK and dV alone
are half of what eight warps have. Fewer keys are no product of Hopper's own (wgmma has 64 rows),
but of the kind that Ampere has. These are the tiles that compile clean, read by pointers."""

PARTED = (256,)
"""Widths at which dK and dV are tried in a launch each."""


PROGRAMS = (1, 2, 4)
"""Of decoding, to each multiprocessor."""

FLYING = (2**16, 200 * 2**10)
"""Bytes that a multiprocessor should have on their way at least, and has room for in its shared
memory. Of 4.8 TB/s each of an H200's 132 takes 36 bytes in a nanosecond, and a memory that is busy
is taken to answer after 1000 to 1500 of them: that is 36 to 54 KB."""


class Question(NamedTuple):
    """What configurations are sought for; `sample` is its mask's name in the kernels' samples."""

    kernel: str
    architecture: str
    sample: str
    width: int
    dtype: str


class Tried(NamedTuple):
    """A candidate and its time: infinite where it did not answer, with the reason."""

    kernel: str
    width: int
    mask_class: str
    config: Any
    milliseconds: float
    problem: str = ""


def candidates(kernel: str, now: Any, descriptors: bool, width: int) -> list[Any]:
    """Configurations worth a try: what is chosen now, and tiles about as large as fit anywhere.

    Of `fused` the first one is that it does not run, and the split does; of `d_keys` the second, at
    width 256, that it does not, or that it does where `d_value` and `d_key` do now.

    Args:
        now: the `Config` in force.
        descriptors: whether the GPU has them.
        width: of query, key and value.
    """
    fused = kernel == "fused"
    made = [replace(now, instead=False), replace(now, instead=True)] if fused else [now]
    if kernel == "d_keys" and width in PARTED:
        made.append(replace(now, apart=not now.apart))
    kind = type(now)
    tall, wide = (_TALL, _WIDE) if kernel in ("forward", "d_query") else (_WIDE, _TALL)
    for rows in tall:
        for keys in wide:
            for warps in (4, 8):
                for stages in (1, 2) if fused else (2, 3, 4):
                    for described in (True, False) if descriptors else (False,):
                        made.append(kind(rows, keys, warps, stages, described, fused))
    made += [kind(*tile) for tile in (WIDEST.get(kernel, ()) if width == 256 else ())]
    return list(dict.fromkeys(made))


def decoding(now: Any, descriptors: bool, width: int) -> list[Any]:
    """Of decoding: what is chosen now, then tiles that have enough bytes on their way.

    Each with the most programs that a multiprocessor has room for. With one warp or two, what a row
    has of its maximum and sum need not pass between warps.
    """
    made = []
    for keys in (64, 32, 128):
        for warps in (4, 2, 1, 8):
            for stages in (4, 3, 5, 2):
                # All buffers but one are being filled: of keys and values, in two bytes a number.
                flying = 4 * keys * width * (stages - 1)
                fit = [n for n in PROGRAMS if FLYING[0] <= n * flying <= FLYING[1]]
                for described in (True, False) if descriptors and fit else (False,):
                    made += [
                        type(now)(now.rows, keys, warps, stages, described, programs=n)
                        for n in fit[-1:]
                    ]
    return list(dict.fromkeys([now, *made]))


def tallest(found: Sequence[Any], clean: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """The first candidate, then those that compile, with as many rows as they do: all that a tile
    may have, or 16. One query of a few heads takes 16 in any case, and as long."""
    first, *rest = found
    good = set(clean(rest))
    lower = {c: replace(c, rows=16) for c in rest if c not in good and c.rows > 16}
    good |= set(clean(list(lower.values()))) if lower else set()
    return [first, *(c for c in dict.fromkeys(lower.get(c, c) for c in rest) if c in good)]


def with_programs(found: Sequence[Tried], most: int = 3) -> list[Any]:
    """The fastest that answered, each with every other number of programs."""
    good = [each for each in found if math.isfinite(each.milliseconds)]
    good.sort(key=lambda each: each.milliseconds)
    made = [replace(each.config, programs=n) for each in good[:most] for n in PROGRAMS]
    known = {each.config for each in found}
    return [config for config in dict.fromkeys(made) if config not in known]


def cleanest(found: Sequence[Any], clean: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """The first candidate, then those that compile without a problem, largest tiles first.

    Args:
        found: configurations; the first is what is in force, or of `fused` that it does not run.
        clean: those of them that compile without a problem.
    """
    first, *rest = found
    apart = [config for config in rest if config.apart]  # other kernels', compiled as theirs
    rest = [config for config in rest if not config.apart]
    return [first, *apart, *sorted(clean(rest), key=lambda config: -config.rows * config.keys)]


def decode_case(width: int, mask_class: str) -> GpuCase:
    """A query to each head that sees all keys of 268 MB, by its mask or its lengths too."""
    full = (32768, 32768) if mask_class == "mask" else ()
    return GpuCase(
        f"tune-decode-{mask_class}-D{width}", 32768, width, 4096 // width, 2, "bfloat16",
        "causal" if mask_class == "positions" else "full", 0, (OURS,), ("forward",),
        queries=1, kv_lengths=full, kv_heads=1024 // width, kind="decode", end=True,
    )  # fmt: skip


def case_of(width: int, mask_class: str, kernel: str = "") -> GpuCase:
    """The case on which a class is measured."""
    if kernel == "decode":
        return decode_case(width, mask_class)
    mask = CLASSES[mask_class]
    subject = SUBJECTS.get(mask_class, OURS)
    name = mask if subject == OURS else f"{mask}-{mask_class}"
    return GpuCase(
        f"tune-{name}-D{width}", 4096, width, 2048 // width, 4, "bfloat16", mask,
        1024 if mask == "documents" else 0, (subject,), ("forward", "backward"),
    )  # fmt: skip


def tune(
    machine: Any,
    *,
    kernels: Sequence[str] = KERNELS,
    widths: Sequence[int] = WIDTHS,
    classes: Sequence[str] = tuple(CLASSES),
    repeats: int = 10,
    minutes: float | None = None,
    say: Callable[[str], None] = print,
    kept: Callable[[Sequence[Any]], Any] = lambda won: None,
    clean: Callable[[Question, Sequence[Any]], Sequence[Any]] = lambda asked, found: found,
) -> tuple[list[Any], list[Tried]]:
    """(entries of those that won, everything that was tried); `kept` is told of them as they come.

    Args:
        minutes: how long it may take; who is being tried then is left as it was, or with the best
            so far of decoding.
        clean: of configurations those worth timing: the command compiles them ahead of time, which
            a GPU's own minutes are too dear for.
    """
    from attn_core.kernels import configs

    limit = Limit(minutes)
    facts = machine.facts()
    architecture, timer = facts["architecture"], machine.Timer()
    described = architecture.startswith("sm_") and int(architecture[3:]) >= 90
    won: list[Any] = []
    tried: list[Tried] = []
    asked = [
        (width, name, kernel)
        for width in widths
        for name in classes
        for kernel in kernels
        if width in PARTED or kernel not in PARTS
    ]
    # Nobody drops anything while decoding.
    asked = [each for each in asked if each[1:] != ("dropout", "decode")]
    with ExitStack() as standing:
        for number, (width, name, kernel) in enumerate(asked):
            what = f"{kernel} D{width} {name}"
            direction = "forward" if kernel in ("forward", "decode") else "backward"
            case = case_of(width, name, kernel)
            about = (architecture, width, width, case.dtype, name)
            refused = configs.explain(kernel, *about).refused
            if refused:
                # Where it is refused the split runs, and its time would go by another's name.
                say(f"{what}: not tried, since the table refuses it: {refused}")
                continue
            now = configs.choose(kernel, *about)
            plain = configs.Entry(kernel, (architecture,), (width,), 16, (name,), now, "", "yours")
            question = Question(kernel, architecture, SAMPLES[name], width, case.dtype)
            found: list[Tried] = []
            for config in _proposed(kernel, now, described, width, partial(clean, question), found):
                if limit.left() <= 0:
                    if kernel == "decode" and len(found) > 1:
                        break  # there are many, those that promise most first
                    say(f"no time was left for {what} and {len(asked) - number - 1} more")
                    return won, tried
                entry = plain._replace(config=config)
                found.append(_timed(machine, timer, configs, entry, case, direction, repeats))
                tried.append(found[-1])
            best = min(found, key=lambda each: each.milliseconds)
            if not math.isfinite(best.milliseconds):
                say(f"{what}: none answered. {best.problem}")
                continue
            source = f"measured on {facts['gpu']}: {best.milliseconds:.3f} ms ({case.name})"
            won.append(plain._replace(config=best.config, source=source))
            standing.enter_context(configs.trying(won[-1]))
            kept(won)
            say(f"{what}: {found[0].milliseconds:.3f} to {best.milliseconds:.3f} ms")
            if kernel == "decode":
                for each in sorted(found, key=lambda each: each.milliseconds)[:5]:
                    say(f"    {each.milliseconds:.4f} ms: {_told(each.config)}")
    return won, tried


def _proposed(
    kernel: str,
    now: Any,
    described: bool,
    width: int,
    clean: Callable[[Sequence[Any]], Sequence[Any]],
    found: Sequence[Tried],
) -> Iterator[Any]:
    """Candidates in their turns; `found` is what has come of those before."""
    if kernel != "decode":
        yield from cleanest(candidates(kernel, now, described, width), clean)
        return
    yield from tallest(decoding(now, described, width), clean)
    yield from with_programs(found)


def _told(config: Any) -> str:
    read = ", descriptors" if config.descriptors else ""
    return (
        f"{config.rows} x {config.keys}, warps {config.warps}, stages {config.stages}{read}, "
        f"programs {config.programs}"
    )


def _timed(
    machine: Any, timer: Any, configs: Any, entry: Any, case: GpuCase, direction: str, repeats: int
) -> Tried:  # fmt: skip
    plain = Tried(entry.kernel, entry.widths[0], entry.classes[0], entry.config, math.inf)
    try:
        with ExitStack() as stack:
            stack.enter_context(configs.trying(entry))
            stack.enter_context(configs.fusing(entry.config.instead))
            if entry.kernel in PARTS:
                stack.enter_context(configs.parting(True))
            run = machine.warmed(case.subjects[0], case, direction)
            if case.kind == "decode":
                run = machine.captured(run)
            return plain._replace(milliseconds=timer.sample(run, repeats))
    except Exception as error:  # a candidate that cannot run is not taken, whatever it raises
        return plain._replace(problem=f"{type(error).__name__}: {str(error)[:200]}")


def kept_before() -> Sequence[Any]:
    """What stands where `keep` writes: to be asked before a minute is spent on what it would add.

    Raises:
        Unreadable: not all of it can be read, and what cannot would be lost.
    """
    from attn_core.kernels import configs

    try:
        return configs.standing()
    except ValueError as error:
        raise Unreadable(
            f"{error} Writing the file would lose what cannot be read: mend it or move it away "
            "first, or measure without writing, with --dry."
        ) from error


def keep(won: Sequence[Any]) -> Any:
    """Write these where they are looked for, before what was there; its path.

    Raises:
        Unreadable: as `kept_before`; the file is left as it is.
    """
    from attn_core.kernels import configs

    known = {(e.kernel, e.on, e.widths, e.bits, e.classes) for e in won}
    others = [
        e for e in kept_before() if (e.kernel, e.on, e.widths, e.bits, e.classes) not in known
    ]
    path = configs.user_file()
    configs.write(path, [*won, *others])
    configs.forget()
    return path
