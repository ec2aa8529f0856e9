"""Tiles of decoding, tuned on what stands in for a GPU: what is tried, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_machine import Clock, Machine

from attn_core.benchmarks import gpu, tune
from attn_core.benchmarks.gpu_cases import GpuCase
from attn_core.cli_gpu import _clean
from attn_core.kernels import ahead, configs


class Decoding(Machine):
    """Its time depends on what is chosen when it is called; with eight warps it does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.cases: list[GpuCase] = []

    def prepared(self, subject: str, case: GpuCase, direction: str) -> Any:
        self.cases.append(case)
        name = {"full": "none", "causal": "positions"}[case.mask]
        about = ("sm_90", case.width, case.width, case.dtype, "mask" if case.kv_lengths else name)

        def run() -> Any:
            chosen = configs.choose("decode", *about)
            if chosen.warps == 8:
                raise MemoryError("out of resources: registers")
            return chosen

        return SimpleNamespace(run=run)

    class Timer:
        def sample(self, run: Callable[[], Any], repeats: int) -> float:
            chosen = run()
            return 10 / chosen.keys + chosen.warps + abs(chosen.programs - 2) - chosen.stages / 9


def test_decoding_is_timed_in_a_graph_against_a_large_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "mine.toml"))
    configs.forget()
    machine, said = Decoding(), []
    won, tried = tune.tune(machine, kernels=("decode",), widths=(128, 64), say=said.append)
    # Nobody drops anything there.
    assert [(entry.widths, entry.classes[0]) for entry in won] == [
        (width, name) for width in ((128,), (64,)) for name in ("none", "positions", "mask")
    ]
    assert len(set(machine.cases)) == 6
    assert machine.graphs == sum(not each.problem for each in tried)
    for case in machine.cases:
        assert case.cache_bytes == 2**28
        assert case.heads == 4 * case.kv_heads
        # Every key is seen, whatever says so.
        assert case.rows == 1
        assert [case.keys(np.zeros(1, int), b)[1].item() for b in (0, 1)] == [32768, 32768]
        assert case.keys(np.zeros(1, int))[0].item() == 0
    assert any("registers" in each.problem for each in tried)
    assert tune.keep(won) == tmp_path / "mine.toml"
    best = configs.choose("decode", "sm_90", 128, 128, "bfloat16", "none")
    # One warp is best, and two programs: tried last, since fewer bytes would be on their way.
    assert (best.warps, best.programs) == (1, 2)
    assert (
        best == min(tried, key=lambda each: each.milliseconds if each.width == 128 else 99).config
    )
    assert any("programs 2" in words for words in said)
    monkeypatch.undo()
    configs.forget()


def test_what_was_found_of_decoding_in_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    limited, said = gpu.Limit, []
    monkeypatch.setattr(tune, "Limit", lambda minutes: limited(minutes, Clock(5.0)))
    won, tried = tune.tune(
        Decoding(), kernels=("decode",), widths=(64,), minutes=1, say=said.append
    )
    assert [entry.classes for entry in won] == [("none",)]
    assert 1 < len(tried) < 15
    assert won[0].config == min(tried, key=lambda each: each.milliseconds).config
    assert said[-1] == "no time was left for decode D64 positions and 1 more"


def test_tiles_of_decoding_have_enough_on_their_way() -> None:
    now = configs.choose("decode", "sm_90", 128, 128, "bfloat16", "none")
    for width in (64, 128, 256):
        first, *rest = tune.decoding(now, True, width)
        assert first == now
        assert len(rest) == len(set(rest)) > 30
        for config in rest:
            flying = config.programs * (config.stages - 1) * config.keys * width * 4
            assert tune.FLYING[0] <= flying <= tune.FLYING[1] < ahead.SHARED["sm_90"]
            more = flying // config.programs * 2 * config.programs
            assert config.programs == 4 or more > tune.FLYING[1]
        assert {config.warps for config in rest} == {1, 2, 4, 8}
        assert {config.descriptors for config in rest} == {True, False}
    assert not any(config.descriptors for config in tune.decoding(now, False, 128)[1:])


def test_tiles_of_decoding_are_as_tall_as_they_compile() -> None:
    kind = configs.Config
    found = [kind(64, 64, 4, 3), kind(64, 32, 4, 3), kind(64, 32, 2, 3), kind(64, 32, 1, 3)]

    def clean(some: Sequence[Any]) -> list[Any]:
        return [c for c in some if c.warps == 4 or (c.warps == 2 and c.rows == 16)]

    want = [found[0], found[1], kind(16, 32, 2, 3)]
    assert tune.tallest(found, clean) == want


def test_other_numbers_of_programs_are_those_of_the_fastest() -> None:
    def tried(milliseconds: float, keys: int, programs: int = 2) -> Any:
        config = configs.Config(16, keys, 4, 3, programs=programs)
        return tune.Tried("decode", 128, "none", config, milliseconds)

    found = [tried(2.0, 16), tried(1.0, 32), tried(math.inf, 128), tried(3.0, 64, 4)]
    more = tune.with_programs(found, most=2)
    assert [(c.keys, c.programs) for c in more] == [(32, 1), (32, 4), (16, 1), (16, 4)]


def test_decoding_is_compiled_as_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query in 16 rows, and all rows that a tile may have: either may spill."""
    asked: list[Any] = []

    def run(jobs: Sequence[Any], processes: int) -> list[Any]:
        asked.extend(jobs)
        return [
            ahead.Finding(
                job, job.chosen, 0.1, spills=8 * (job.queries == 1) * job.chosen.warps % 16
            )
            for job in jobs
        ]

    monkeypatch.setattr(ahead, "run", run)
    question = tune.Question("decode", "sm_90", "plain", 128, "bfloat16")
    found = [configs.Config(64, 64, warps, 3) for warps in (1, 2, 4)]
    assert _clean(question, found) == found[1:]
    assert [(job.even, job.queries) for job in asked] == 3 * [(False, 0), (False, 1)]
