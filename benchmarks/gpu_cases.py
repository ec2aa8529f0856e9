"""The cases of a GPU, and what is promised there: all of it without touching one.

16k tokens and 2048 numbers a token (B T = 16384, Hq D = 2048) in bfloat16, as the published tables
of fused kernels have them; masks as in `cases.py`. Ratios are to the named backend of torch in the
same turns. Beside them stand cases that are there for their answers, at lengths over which others
have stumbled (T = 4095, T % 128 = 64).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from attn_core.benchmarks.cases import Case
from attn_core.benchmarks.targets import straightness

OURS = "torch:triton"
DROPOUT, DETERMINISTIC = f"{OURS}+dropout", f"{OURS}+deterministic"
SPLIT, FUSED = f"{OURS}+split", f"{OURS}+fused"
TOGETHER, APART = f"{OURS}+together", f"{OURS}+apart"
"""Our backward pass in either way, whatever the table of configurations says: dQ beside dK and dV
or in one kernel with them; dK and dV in one launch or in one each."""

WAYS = (SPLIT, FUSED, TOGETHER, APART)

CUDNN, FLASH, FLEX = "torch-sdpa-cudnn", "torch-sdpa-flash", "torch-flex"
SDPA = "torch-sdpa"
"""With the backend that torch itself prefers, which is what `impl="auto"` has where it takes
torch's own."""

COPY = "copy"
SUBJECTS = (OURS, DROPOUT, DETERMINISTIC, *WAYS, CUDNN, FLASH, SDPA, FLEX, COPY)

TOKENS, NUMBERS = 16384, 2048
LENGTHS = (1024, 2048, 4096, 8192, 16384)
WINDOWS = (128, 256, 512, 1024, 2048, 4096)
LINEAR = 16384
"""Tokens of the case in which time is set against live blocks."""


@dataclass(frozen=True)
class GpuCase(Case):
    """A case whose key heads may be fewer.

    Attributes:
        kv_heads: Hk; as many as there are heads where it is 0.
        kind: which target it belongs to: dense, sparse, linear, decode, odd.
        end: whether the last query stands at the last key, rather than query i at position i.
    """

    kv_heads: int = 0
    kind: str = "dense"
    end: bool = False

    def sizes(self, name: str) -> tuple[int, int, int, int]:
        batch, heads, count, width = super().sizes(name)
        if name in ("key", "value") and self.kv_heads:
            heads = self.kv_heads
        return batch, heads, count, width

    def keys(self, rows: np.ndarray, batch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        return super().keys(rows + (self.length - self.rows) * self.end, batch)

    def who(self, direction: str) -> tuple[str, ...]:
        """The subjects that are asked for this direction."""
        return tuple(s for s in self.subjects if direction != "forward" or s not in WAYS)

    def arrays(self) -> dict[str, np.ndarray]:
        """As of any case, the last one's kept: at these sizes drawing them takes seconds."""
        return dict(_drawn(self))

    @property
    def cache_bytes(self) -> int:
        """Of keys and values together, in two bytes a number."""
        batch, heads, count, width = self.sizes("key")
        return 2 * 2 * batch * heads * count * width


@lru_cache(maxsize=1)
def _drawn(case: GpuCase) -> dict[str, np.ndarray]:
    return super(GpuCase, case).arrays()


FIRST = (
    "causal-T4096-D128",
    "full-T4096-D128",
    "decode-Tq1",
    "window-T8192-D128",
    "documents-T8192-D128",
    "causal-T8192-D128",
    "causal-T4096-D64",
    "causal-T4096-D256",
    "full-T4096-D64",
    "full-T4096-D256",
    "full-T8192-D128",
    "full-T16384-D128",
    "causal-T16384-D128",
    *(f"linear-window{reach}" for reach in WINDOWS),
    "odd-causal-T4095",
    "decode-Tq4",
)
"""Cases in the order of what they tell: of every promise first one, at its heaviest use."""


def ranked(given: Sequence[GpuCase]) -> list[GpuCase]:
    """The same, `FIRST` first: what is measured where there is not time for all."""
    return sorted(given, key=lambda c: FIRST.index(c.name) if c.name in FIRST else len(FIRST))


def cases() -> tuple[GpuCase, ...]:
    """All of them, dense ones first."""
    found = []
    for width in (64, 128, 256):
        for length in LENGTHS:
            for mask in ("full", "causal"):
                found.append(_dense(width, length, mask))
    found.append(_dense(128, 8192, "causal", kv_heads=NUMBERS // 128 // 8, name="gqa-"))
    for mask, reach in (("window", 1024), ("documents", 1024)):
        for width in (64, 128):
            found.append(
                GpuCase(
                    f"{mask}-T8192-D{width}",
                    8192,
                    width,
                    NUMBERS // width,
                    TOKENS // 8192,
                    "bfloat16",
                    mask,
                    reach,
                    (OURS, FLEX, SPLIT, FUSED),
                    ("forward", "backward"),
                    kind="sparse",
                )
            )
    for reach in WINDOWS:
        found.append(
            GpuCase(
                f"linear-window{reach}",
                LINEAR,
                128,
                16,
                1,
                "bfloat16",
                "window",
                reach,
                (OURS,),
                ("forward",),
                kind="linear",
            )
        )
    for queries in (1, 4):
        # 268 MB of keys and values, more than any second-level cache holds.
        found.append(
            GpuCase(
                f"decode-Tq{queries}",
                32768,
                128,
                32,
                2,
                "bfloat16",
                "full",
                0,
                (OURS, COPY),
                ("forward",),
                queries=queries,
                kv_heads=8,
                kind="decode",
            )
        )
    for length, mask in ((4095, "causal"), (4160, "causal"), (4160, "window"), (4095, "full")):
        found.append(
            GpuCase(
                f"odd-{mask}-T{length}",
                length,
                128,
                16,
                1,
                "bfloat16",
                mask,
                1000,
                (OURS, CUDNN, FLASH) if mask != "window" else (OURS,),
                ("forward", "backward"),
                kind="odd",
            )
        )
    return tuple(found)


def _dense(width: int, length: int, mask: str, kv_heads: int = 0, name: str = "") -> GpuCase:
    subjects: tuple[str, ...] = (OURS, CUDNN, FLASH)
    if (width, length) == (128, 8192) and not kv_heads:
        subjects = (*subjects, DROPOUT, DETERMINISTIC)
    if length == 4096 and not kv_heads:
        subjects = (*subjects, SDPA, SPLIT, FUSED)
        if width == 256:  # where the two of them take more registers than there are
            subjects = (*subjects, TOGETHER, APART)
    return GpuCase(
        f"{name}{mask}-T{length}-D{width}",
        length,
        width,
        NUMBERS // width,
        TOKENS // length,
        "bfloat16",
        mask,
        0,
        subjects,
        ("forward", "backward"),
        kv_heads=kv_heads,
    )


# --- What came of them. ---------------------------------------------------------------------------


class Measured(NamedTuple):
    """One subject, case and direction.

    Attributes:
        status: measured, refused, wrong or error.
        problem: why it has no figure.
        samples: milliseconds per call, in the order of their turns.
        rmse: of `out` against float64, on the judged rows.
    """

    case: str
    subject: str
    direction: str
    status: str
    problem: str = ""
    samples: tuple[float, ...] = ()
    rmse: float | None = None


class Promise(NamedTuple):
    """What must hold, and what is aimed at: of every case that it speaks of the worst."""

    name: str
    must: float
    aim: float
    more: bool = True

    def verdict(self, values: Sequence[float | None]) -> str:
        """ "aim met", "met", "missed", "incomplete" or "not measured"."""
        known = [value for value in values if value is not None]
        if not known:
            return "not measured"
        if not all(self._holds(value, self.must) for value in known):
            return "missed"
        if len(known) < len(values):
            return "incomplete"
        return "aim met" if all(self._holds(value, self.aim) for value in known) else "met"

    def _holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.more else value <= bound


class Found(NamedTuple):
    """A promise in the light of a run: a value to each case, None where none was measured."""

    promise: Promise
    values: dict[str, float | None]

    @property
    def verdict(self) -> str:
        return self.promise.verdict(list(self.values.values()))

    @property
    def worst(self) -> float | None:
        known = [value for value in self.values.values() if value is not None]
        pick = min if self.promise.more else max
        return pick(known) if known else None


class Run:
    """The measurements of a run, asked for by what they compare."""

    def __init__(self, measured: Sequence[Measured], given: Sequence[GpuCase] = ()) -> None:
        self.cases = {case.name: case for case in given or cases()}
        self.found = {(m.case, m.subject, m.direction): m for m in measured}

    def time(self, case: str, subject: str, direction: str) -> float | None:
        """Milliseconds, the median; None where there is no figure."""
        found = self.found.get((case, subject, direction))
        return median(found.samples) if found is not None and found.samples else None

    def ratio(self, case: str, direction: str, base: str, subject: str = OURS) -> float | None:
        """How many times faster the subject is than the base: above 1 it wins."""
        times = [self.time(case, name, direction) for name in (base, subject)]
        return None if None in times else float(times[0] or 0) / float(times[1] or 1)

    def dense(self, direction: str, base: str, *widths: int, mask: str = "", least: int = 0) -> Any:
        return {
            f"{case.name} {direction}": self.ratio(case.name, direction, base)
            for case in self.cases.values()
            if case.kind == "dense" and case.width in widths and case.length >= least
            if mask in ("", case.mask) and not case.kv_heads
        }

    def promises(self) -> list[Found]:
        """Every promise, with what was measured of it."""
        sparse = [case.name for case in self.cases.values() if case.kind == "sparse"]
        wide = (64, 128, 256)
        slower = [name for name, case in self.cases.items() if DROPOUT in case.subjects]
        rows: list[tuple[Promise, Mapping[str, float | None]]] = [
            (
                Promise("forward D128, T >= 4k, full, vs cuDNN", 0.65, 0.80),
                self.dense("forward", CUDNN, 128, mask="full", least=4096),
            ),
            (
                Promise("forward D128, T >= 4k, causal, vs cuDNN", 0.60, 0.75),
                self.dense("forward", CUDNN, 128, mask="causal", least=4096),
            ),
            (Promise("forward D64 vs cuDNN", 0.62, 0.75), self.dense("forward", CUDNN, 64)),
            (Promise("forward D256 vs cuDNN", 0.50, 0.65), self.dense("forward", CUDNN, 256)),
            (
                Promise("forward vs FlashAttention-2", 1.15, 1.4),
                self.dense("forward", FLASH, *wide),
            ),
            (
                Promise("backward vs FlashAttention-2", 1.0, 1.3),
                self.dense("backward", FLASH, *wide),
            ),
            (
                Promise("window and documents vs flex_attention", 1.0, 1.2),
                {
                    f"{name} {direction}": self.ratio(name, direction, FLEX)
                    for name in sparse
                    for direction in ("forward", "backward")
                },
            ),
            (
                Promise("time against live blocks: off the line", 0.15, 0.08, more=False),
                {f"windows at T {LINEAR}": self._linear()},
            ),
            (
                Promise("decode: share of copy bandwidth", 0.75, 0.90),
                {
                    case.name: self.bandwidth(case.name)
                    for case in self.cases.values()
                    if case.kind == "decode"
                },
            ),
            (
                Promise("deterministic vs default backward", 0.75, 0.95),
                {n: self.ratio(n, "backward", OURS, DETERMINISTIC) for n in slower},
            ),
            (
                Promise("dropout 0.1 vs none, forward", 0.5, 0.7),
                {n: self.ratio(n, "forward", OURS, DROPOUT) for n in slower},
            ),
            (
                Promise("error against float64, vs FlashAttention-2", 1.0, 0.999, more=False),
                self._errors(),
            ),
        ]
        return [Found(promise, dict(values)) for promise, values in rows]

    def _linear(self) -> float | None:
        some = [case for case in self.cases.values() if case.kind == "linear"]
        times = [self.time(case.name, OURS, "forward") for case in some]
        if None in times or len(some) < 3:
            return None
        return straightness([case.blocks for case in some], [float(t or 0) for t in times])

    def bandwidth(self, name: str) -> float | None:
        """Bytes of keys and values a second, as a share of what a copy moves: it reads and writes,
        each of as many bytes, so its rate is twice the cache over its time."""
        mine, copy = (self.time(name, subject, "forward") for subject in (OURS, COPY))
        return None if mine is None or copy is None else copy / (2 * mine)

    def _errors(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for case in self.cases.values():
            pair = [self.found.get((case.name, s, "forward")) for s in (OURS, FLASH)]
            if FLASH in case.subjects and case.kind == "dense":
                errors = [None if m is None else m.rmse for m in pair]
                known = errors[0] is not None and errors[1]
                found[case.name] = float(errors[0] or 0) / float(errors[1] or 1) if known else None
        return found
