"""What stands in for a GPU: it answers by the judge, and fails where it is told to.

python tests/gpu_machine.py crash=torch-sdpa-cudnn      a worker of `gpu_apart`
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from attn_core.benchmarks import gpu_apart, judge
from attn_core.benchmarks.calls import Refused as Declined
from attn_core.benchmarks.gpu_cases import COPY, CUDNN, DROPOUT, FLASH, FUSED, OURS, SPLIT, GpuCase


def small(name: str, **changes: Any) -> GpuCase:
    fields = {
        "length": 96,
        "width": 16,
        "heads": 4,
        "batch": 2,
        "dtype": "float32",
        "mask": "causal",
        "subjects": (OURS, FLASH),
        "directions": ("forward", "backward"),
    }
    return GpuCase(name, **{**fields, **changes})


class Clock:
    """It goes on by so many seconds whenever it is asked."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Machine:
    """Answers by the judge, wrong where it is told to be; a call of n ms for subject n."""

    Refused = Declined
    MS: ClassVar[dict[str, float]] = {OURS: 2.0, FLASH: 3.0, CUDNN: 1.0, COPY: 0.5, DROPOUT: 4.0}
    MS |= {SPLIT: 2.0, FUSED: 1.5}

    def __init__(
        self, wrong: str = "", refused: str = "", broken: str = "", crash: str = "",
        hang: str = "", lost: str = "",
    ) -> None:  # fmt: skip
        self.wrong, self.refused, self.broken = wrong, refused, broken
        self.crash, self.hang, self.lost = crash, hang, lost
        self.graphs = 0
        self.there = True

    def facts(self) -> dict[str, Any]:
        return {"gpu": "NVIDIA Stand-In 9", "architecture": "sm_90", "memory": 24 * 2**30}

    def prepared(self, subject: str, case: GpuCase, direction: str) -> Any:
        if subject == self.refused:
            raise Declined("it has no word for this.")
        if subject == self.crash:
            print("an illegal address", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if subject == self.hang:
            time.sleep(60)
        if subject == self.lost:
            self.there = False
        if not self.there:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if subject == self.broken:
            raise ZeroDivisionError("of its own")

        def answer(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            rows = np.arange(case.rows)
            exact = judge.answer(case, arrays, rows, judge.exact)
            names = ("out",) if direction == "forward" else ("query", "key", "value")
            found = {n: exact.results[n].astype(np.float32) for n in names}
            if subject == self.wrong:
                found[names[-1]][..., 0] += 0.01
            return found

        def run() -> str:
            return subject

        return SimpleNamespace(run=run, answer=answer)

    def warmed(self, subject: str, case: GpuCase, direction: str) -> Callable[[], str]:
        run: Callable[[], str] = self.prepared(subject, case, direction).run
        run()
        return run

    def answers(self) -> bool:
        return self.there

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.graphs += 1
        return run

    class Timer:
        def sample(self, run: Callable[[], str], repeats: int) -> float:
            return Machine.MS[run()]


if __name__ == "__main__":
    gpu_apart.main(Machine(**dict(word.split("=") for word in sys.argv[1:])))
