"""Turns on a fake clock, calls that fill a sample, ratios and their spread, peak memory."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from attn_core.benchmarks import memory, timing


class Clock:
    """Every call of `run` takes as long as the list says, in turn."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.seconds, self.calls, self.slept = 0.0, list(seconds), 0, 0.0

    def run(self) -> None:
        self.now += self.seconds[self.calls % len(self.seconds)]
        self.calls += 1

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def test_turns_go_there_and_back_and_the_circle_changes() -> None:
    def shown(number: int) -> str:
        found = [turn for turn in timing.turns("ABCD", 2) if turn.round == number]
        return "".join(t.name if t.counted else f"({t.name})" for t in found)

    assert [shown(0), shown(1)] == ["(C)DABC(D)CBAD", "(D)BCAD(B)DACB"]
    assert [t.name for t in timing.turns(["A"], 1)] == ["A", "A"]
    assert not list(timing.turns([], 3))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 13, 20])
def test_each_follows_each_other_one_equally_often_and_none_itself(count: int) -> None:
    names = [str(n) for n in range(count)]
    pairs = [(a, b) for a in names for b in names if a != b]

    def followed(rounds: int) -> dict[tuple[str, str], int]:
        seen = list(timing.turns(names, rounds))
        asked = [turn.name for turn in seen if turn.counted]
        assert all(asked.count(name) == 2 * rounds for name in names)
        met = [(a.name, b.name) for a, b in pairwise(seen) if b.counted]
        assert all(a != b for a, b in met)
        return {pair: met.count(pair) for pair in pairs}

    assert set(followed(count - 1).values()) == {2}
    assert set(followed(3 * (count - 1)).values()) == {6}
    part = followed(7).values()
    assert max(part) - min(part) <= 1


def test_a_sample_is_the_mean_of_its_calls_without_pause_and_warming() -> None:
    clock = Clock(9.0, 1.0, 2.0, 3.0)
    assert timing.sample(clock.run, 3, clock.read, clock.sleep) == 2.0
    assert clock.slept == timing.PAUSE
    short = Clock(*[timing.WARM / 4] * 4, 1.0, 2.0, 3.0)
    assert timing.sample(short.run, 3, short.read, short.sleep) == 2.0  # warmed by four
    alone = Clock(9.0, 1.0)
    assert timing.sample(alone.run, 1, alone.read, alone.sleep) == 9.0
    short = Clock(timing.LONG / 2, 0.03)
    assert timing.sample(short.run, 1, short.read, short.sleep) == pytest.approx(0.03)


@pytest.mark.parametrize("seconds", [1e-6, 3e-4, 0.02, 0.05, 1.0])
def test_enough_calls_fill_a_sample_and_not_many_more(seconds: float) -> None:
    clock = Clock(seconds)
    repeats = timing.calibrated(clock.run, 0.05, clock.read)
    assert repeats * seconds >= 0.05 * (1 - 1e-9)
    assert repeats == 1 or repeats * seconds < 0.12


def test_a_clock_that_does_not_move_at_first_is_waited_for() -> None:
    clock = Clock(0.0)
    clock.seconds = [0.0] * 50 + [0.01] * 1000
    assert timing.calibrated(clock.run, 0.05, clock.read) > 50


def test_a_ratio_is_of_medians_and_its_spread_is_of_neighbours() -> None:
    base = [[4.0, 4.0], [8.0, 10.0], [40.0, 40.0]]
    ours = [[2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]
    assert timing.ratio(base, ours) == 9.0 / 3.0
    one, other = [(0, 4.0), (3, 4.0), (6, 16.0)], [(1, 1.0), (5, 2.0), (9, 4.0)]
    # At 0, 3 and 6: 1, sqrt 2 and 2 * 2 ** (1/4); at 1, 5 and 9: 4, 4 * 4 ** (2/3) and 16.
    by_hand = [4, 4 / 2**0.5, 16 / 2**1.25, 4, 4 ** (1 + 2 / 3) / 2, 4]
    want = np.quantile(by_hand, [0.25, 0.5, 0.75])
    assert timing.ratios(one, other) == pytest.approx(tuple(want))
    assert timing.difference(other, one) == pytest.approx(
        tuple(np.quantile([3, 4 - 1.5, 16 - 2.5, 3, 12 - 2, 16 - 4], [0.25, 0.5, 0.75]))
    )
    assert timing.ratios([(3, 6.0)], [(9, 2.0)]).middle == pytest.approx(3)
    with pytest.raises(ValueError, match=r"must be of samples of both. Got 0 and 3"):
        timing.ratios([], other)


def test_drift_cancels() -> None:
    """Everything slows down evenly; A and B take the same time."""
    samples = {name: [[] for _ in range(6)] for name in "ABC"}  # type: ignore[var-annotated]
    series = {name: [] for name in "ABC"}  # type: ignore[var-annotated]
    for place, turn in enumerate(timing.turns("ABC", 6)):
        if turn.counted:
            samples[turn.name][turn.round].append(100.0 + place)
            series[turn.name].append((place, 100.0 + place))
    assert [np.mean(x) for x in samples["A"]] == [np.mean(x) for x in samples["B"]]
    # But for the ends, where there is a neighbour on one side only.
    assert timing.difference(series["A"], series["B"]) == pytest.approx((0, 0, 0))


class Machine:
    """A clock on which whoever comes after somebody else is slow at first.

    A call takes its own time, and as much again as `woken` says for the one who was asked before,
    which dies away within `lasting` seconds of calls. Everything slows down besides, and rattles.
    """

    def __init__(self, own: dict[str, float], woken: dict[str, float], lasting: float) -> None:
        self.own, self.woken, self.lasting = own, woken, lasting
        self.now, self.before, self.name, self.since = 0.0, "", "", 0.0
        self.rng = np.random.default_rng(5)

    def run(self, name: str) -> None:
        if name != self.name:
            self.before, self.name, self.since = self.name, name, self.now
        late = np.exp(-(self.now - self.since) / self.lasting) * self.woken.get(self.before, 0.0)
        slow = 1 + self.now / 1000 + 0.01 * self.rng.standard_normal()
        self.now += self.own[name] * (1 + late) * slow

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def sample(self, name: str) -> float:
        repeats = max(1, round(timing.LEAST / self.own[name]))
        call = lambda: self.run(name)  # noqa: E731
        return timing.sample(call, repeats, lambda: self.now, self.sleep)


@pytest.mark.parametrize("seconds", [1e-4, 0.03, 0.3])
def test_waking_up_is_paid_by_all_alike(seconds: float) -> None:
    """A and B are one and the same; C sleeps long, D sweeps the caches. B always came after A."""
    own = {"A": seconds, "B": seconds, "C": 2 * seconds, "D": 3 * seconds}
    woken = {"A": 0.0, "B": 0.1, "C": 0.5, "D": 0.9}
    rounds = 9

    def ratio(turns: Any, sampled: Any) -> tuple[float, float]:
        samples = {name: [[] for _ in range(rounds)] for name in own}  # type: ignore[var-annotated]
        series = {name: [] for name in own}  # type: ignore[var-annotated]
        for place, turn in enumerate(turns):
            taken = sampled(turn.name)
            if turn.counted:
                samples[turn.name][turn.round].append(taken)
                series[turn.name].append((place, taken))
        return (
            timing.ratio(samples["A"], samples["B"]),
            timing.ratios(series["A"], series["B"]).middle,
        )

    machine = Machine(own, woken, lasting=0.01 if seconds < 0.1 else 1.0)
    medians, neighbours = ratio(timing.turns("ABCD", rounds), machine.sample)
    assert medians == pytest.approx(1, abs=0.03)
    assert neighbours == pytest.approx(1, abs=0.03)

    # The same machine, one fixed order and nothing warmed: this is what it would have said.
    naive = Machine(own, woken, machine.lasting)

    def once(name: str) -> float:
        before = naive.now
        naive.run(name)
        return naive.now - before

    always = [timing.Turn(n, name) for n in range(rounds) for name in "ABCD"]
    assert ratio(always, once)[0] > 1.2


@pytest.mark.skipif(sys.platform != "linux", reason="the mark is Linux's")
def test_peak_memory_sees_what_is_gone_when_the_call_ends() -> None:
    size = 64 << 20

    def run() -> bytes:
        big = np.ones(size, np.uint8)
        return bytes(int(big[-1]))

    assert 0.9 * size < memory.peak(run, 0) < 1.2 * size
    assert memory.peak(run, size) < 0.2 * size


def test_a_pool_is_asked_for_the_least_of_what_it_handed_out_too_much() -> None:
    slack = iter([700, 0, 300])
    marks: list[str] = []

    def reset() -> int:
        marks.append("reset")
        return 5000

    def most() -> int:
        marks.append("most")
        return 5000 + 2000 + 100 + next(slack)

    def run() -> None:
        marks.append("run")

    assert memory.pooled(run, 2000, reset, most) == 100
    assert marks == ["reset", "run", "most"] * 3
    assert memory.pooled(run, 10_000, lambda: 5000, lambda: 8000) == 0
