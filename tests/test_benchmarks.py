"""The benchmarks: sizes counted by brute force, a fake clock, planted mistakes, both verdicts."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support import seen
from typer.testing import CliRunner

from attn_core import cli, reference
from attn_core.benchmarks import (
    check,
    judge,
    memory,
    page,
    report,
    results,
    rooms,
    runner,
    subjects,
    targets,
    timing,
    worker,
)
from attn_core.benchmarks.calls import Call, Refused
from attn_core.benchmarks.cases import BLOCK, BY_NAME, CASES, DIRECTIONS, Case, named
from attn_core.benchmarks.results import Measurement, Results
from attn_core.conformance.plain import plain

MASKS = [("full", 0), ("causal", 0), ("window", 3), ("window", 200), ("documents", 64)]
PLACE: dict[str, Any] = {
    "date": "2026-01-31T12:00:00+00:00",
    "python": "3.11.9",
    "packages": {"numpy": "2.3.0", "torch": "2.13.0"},
    "cpu": "A processor",
    "cores": 2,
    "threads": 2,
    "load": [0.1, 0.2, 0.3],
}


def small(mask: str = "causal", reach: int = 0, length: int = 40, dtype: str = "float32") -> Case:
    return Case("small", length, 8, heads=2, mask=mask, reach=reach, dtype=dtype)


# Cases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "reach"), MASKS)
def test_a_case_counts_what_its_mask_lets_through(mask: str, reach: int) -> None:
    case = small(mask, reach, 300)
    dense = case.dense(np.arange(300))
    assert case.entries == dense.sum()
    edges = range(0, 300, BLOCK)
    blocks = sum(bool(dense[i : i + BLOCK, j : j + BLOCK].any()) for i in edges for j in edges)
    assert case.blocks == blocks
    assert case.operations("both") == 7 * 2 * 2 * 8 * case.entries


@pytest.mark.parametrize(("mask", "reach"), MASKS[1:])
def test_the_language_and_the_plain_rule_say_the_same(mask: str, reach: int) -> None:
    case = small(mask, reach, 150)
    said = case.language()
    assert said is not None
    shape = (1, 2, 150, 150)
    np.testing.assert_array_equal(
        seen(said, shape), np.broadcast_to(case.dense(np.arange(150)), shape)
    )


def test_cases_are_unique_known_and_come_back_from_json() -> None:
    assert len(BY_NAME) == len(CASES)
    for case in CASES:
        for subject in case.subjects:
            assert subjects.framework(subject) in subjects.FRAMEWORKS
            case.asked_of(subject)
        assert Case.of(json.loads(json.dumps(case.as_dict()))) == case


def test_equal_names_draw_equal_arrays_and_others_do_not() -> None:
    one, again, other = small(), small(), replace(small(), name="other")
    assert all(np.array_equal(one.arrays()[n], again.arrays()[n]) for n in one.arrays())
    assert not np.array_equal(one.arrays()["key"], other.arrays()["key"])


def test_a_subject_may_be_asked_with_another_mask() -> None:
    case = BY_NAME["window-256-T8192-D64-float32"]
    assert case.asked_of("jax:auto") == case
    assert case.asked_of("jax:auto@causal").mask == "causal"
    quick = case.small()
    assert (quick.length, quick.reach) == (512, 16)
    assert quick.asked_of("jax:auto@window-512").reach == 32
    with pytest.raises(ValueError, match=r"must be full, causal, window-<keys>.*Got 'widnow-3'"):
        case.asked_of("jax:auto@widnow-3")
    with pytest.raises(ValueError, match="Got 'window'"):
        case.asked_of("jax:auto@window")


def test_a_name_is_one_case_and_a_part_of_it_several() -> None:
    assert [case.name for case in named(["tiny-T4-D8-float32"])] == ["tiny-T4-D8-float32"]
    assert len(named(["causal-T2048"])) == 8
    with pytest.raises(ValueError, match=r"must name a case or a part of one. Got cuasal"):
        named(["cuasal"])


# The check -------------------------------------------------------------------------------------


def answered(case: Case, direction: str, **changed: Any) -> dict[str, np.ndarray]:
    """The judge's own results at full size, with the question changed as asked."""
    given = check.asked(case).arrays
    question: dict[str, Any] = {n: given[n] for n in ("query", "key", "value")}
    dense = np.stack([case.dense(np.arange(case.rows), b) for b in range(case.batch)])
    question |= {"mask": dense[:, None], **changed}
    found = reference.gradients(**question, d_out=given["cotangent"])
    found["out"] = reference.attention(**question).out
    dtype = given["query"].dtype
    return {n: found[n].astype(dtype) for n in check.expected_names(direction)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [4, 128, 300])
def test_the_check_passes_what_is_right(direction: str, dtype: str, length: int) -> None:
    case = small(length=length, dtype=dtype)
    shares = check.shares(case, direction, answered(case, direction))
    assert max(shares.values()) < 0.5


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_refuses_what_is_wrong(direction: str, dtype: str) -> None:
    case = small(length=300, dtype=dtype)
    for wrong in (
        {"scale": 0.3},
        {"mask": np.tril(np.ones((300, 300), bool), -1) | np.eye(300, k=1).astype(bool)},
    ):
        shares = check.shares(case, direction, answered(case, direction, **wrong))
        assert all(share > 1 for what, share in shares.items() if "scale" in wrong or what == "out")
        assert max(shares.values()) > 1


def test_a_gradient_outside_the_sample_is_a_mistake() -> None:
    case = small(length=300)
    rows = check.sampled(case)
    assert 0 in rows
    assert 299 in rows
    assert len(set(rows)) == len(rows) == 128
    got = answered(case, "backward")
    assert not np.delete(got["query"], rows, 2).any()
    outside = np.setdiff1d(np.arange(300), rows)[0]
    got["query"][0, 1, outside, 3] = 1e-30
    assert check.shares(case, "backward", got)["d_query"] == float("inf")


def test_one_wrong_entry_of_a_whole_gradient_is_seen() -> None:
    case = small(length=300)
    got = answered(case, "both")
    got["key"][0, 0, 201, 0] += 0.01
    shares = check.shares(case, "both", got)
    assert shares["d_key"] > 1
    assert shares["d_value"] < 1


UNEVEN = replace(small(length=300), batch=3, kv_lengths=(300, 117, 1))


@pytest.mark.parametrize(
    "case",
    [
        *(small(mask, reach, 150) for mask, reach in MASKS),
        *(small("window", 3, 150, dtype) for dtype in ("bfloat16", "float64")),
        *(UNEVEN, replace(UNEVEN, mask="full", queries=1), replace(UNEVEN, kv_lengths=(0, 9, 2))),
    ],
)
def test_the_judge_agrees_with_the_reference(case: Case) -> None:
    arrays, rows = case.arrays(), np.arange(case.rows)
    given = {n: x.astype(np.float64) for n, x in arrays.items()}
    dense = np.stack([case.dense(rows, b) for b in range(case.batch)])[:, None]
    asked: dict[str, Any] = {n: given[n] for n in ("query", "key", "value")} | {"mask": dense}
    want = reference.gradients(**asked, d_out=given["cotangent"])
    want["out"] = reference.attention(**asked).out
    found = judge.answer(case, arrays, rows, judge.exact)
    for name, x in found.results.items():
        np.testing.assert_allclose(x, want[name], rtol=1e-12, atol=1e-13, err_msg=name)
    logits = np.einsum("bhid,bhkd->bhik", given["query"], given["key"]) * case.width**-0.5
    assert found.logit == pytest.approx(np.abs(np.where(dense, logits, 0)).max())
    only = judge.answer(case, arrays, rows, judge.exact, gradients=False)
    assert set(only.results) == {"out"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_textbook_is_as_good_as_conformances(dtype: str) -> None:
    """What passes is measured by it, so it must be no worse than the suite's own, nor better."""
    case = small("causal", 0, judge.ROWS, dtype)
    arrays, rows = case.arrays(), np.arange(judge.ROWS)
    asked: dict[str, Any] = {n: arrays[n] for n in ("query", "key", "value")}
    asked |= {"mask": case.dense(rows)[None, None], "layout": "BHTD"}
    none = np.zeros((), np.float32)
    upstream = {"out": arrays["cotangent"], "lse": none, "weights": none}
    theirs = plain(asked, upstream, arrays["query"].dtype)
    ours = judge.answer(case, arrays, rows, judge.rounded(arrays["query"].dtype))
    right = judge.answer(case, arrays, rows, judge.exact).results
    assert ours.logit == pytest.approx(theirs.logit)
    for name, x in {"out": theirs.outputs["out"], **theirs.gradients}.items():
        if name in right:
            error = [np.abs(y - right[name]).max() for y in (ours.results[name], x)]
            assert error[0] == pytest.approx(error[1], rel=0.3), name


@pytest.mark.parametrize("length", [1, 4, 128, 300, 8192, 16384])
def test_rows_are_sampled_all_along(length: int) -> None:
    rows = check.sampled(small(length=length))
    assert len(set(rows)) == len(rows) == min(length, 128)
    assert {0, length - 1} <= set(rows)
    assert np.diff(rows).max(initial=0) <= max(length / 50, 1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lengths_that_are_not_kept_are_seen(direction: str) -> None:
    every = answered(UNEVEN, direction)
    assert max(check.shares(UNEVEN, direction, every).values()) < 0.5
    without = answered(replace(UNEVEN, kv_lengths=()), direction)
    assert min(check.shares(UNEVEN, direction, without).values()) > 1


@pytest.mark.parametrize("name", [c.name for c in CASES if c.kv_lengths])
def test_a_case_with_lengths_is_counted_and_asked_batch_by_batch(name: str) -> None:
    case = BY_NAME[name].small()
    assert len(case.kv_lengths) == case.batch
    assert len(set(case.kv_lengths)) > 1
    assert max(case.kv_lengths) <= case.length
    dense = [case.dense(np.arange(case.rows), b) for b in range(case.batch)]
    assert case.entries == sum(int(x.sum()) for x in dense)
    assert case.arrays()["query"].shape == case.sizes("out") != case.sizes("key") or (
        case.rows == case.length
    )


@pytest.mark.parametrize("name", ["torch", "jax", "tf"])
def test_subjects_are_right_about_lengths_or_refuse(name: str) -> None:
    if find_spec("tensorflow" if name == "tf" else name) is None:
        pytest.skip(f"{name} is not installed")
    with rooms.Worker(1) as room:
        for case in (c.small() for c in CASES if c.kv_lengths):
            for subject in case.subjects:
                if subjects.framework(subject) != name or subject == "matmul":
                    continue
                question = {"subject": subject, "case": case.as_dict(), "least": 0.001}
                got = room.ask({"do": "prepare", "direction": "forward", **question}, 300)
                if ":native" in subject and "refused" in got:
                    continue
                assert "shares" in got, (case.name, subject, got)
                assert float(got["shares"]["out"]) <= 1, (case.name, subject, got)


def test_a_wrong_form_is_told_in_words() -> None:
    case = small()
    got = answered(case, "forward")
    with pytest.raises(ValueError, match=r"a both call must give out, query, key, value. Got out"):
        check.shares(case, "both", got)
    with pytest.raises(ValueError, match=r"out must be float32 \(1, 2, 40, 8\). Got float64"):
        check.shares(case, "forward", {"out": got["out"].astype(np.float64)})


# Timing ----------------------------------------------------------------------------------------


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


# Rooms -----------------------------------------------------------------------------------------


def planted(name: str, case: Case, direction: str, threads: int) -> Call:
    """Subjects for one process: right, wrong, refused or raising, by name."""
    if name == "torch-flex":
        raise Refused("torch-flex has no backward pass here.")

    def answer(arrays: Any) -> dict[str, np.ndarray]:
        if name == "torch-sdpa-math":
            raise RuntimeError("out of luck")
        return answered(case, direction, **({"scale": 0.1} if name == "jax-nn" else {}))

    return Call(lambda: None, answer, lambda: 12345)


class Here:
    """A worker in this process, that dies when it is asked about `deadly`."""

    def __init__(self, deadly: str = "") -> None:
        self.room, self.deadly = worker.Room(1, planted), deadly

    def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        if command.get("subject") == self.deadly:
            raise rooms.WorkerError("the worker ended with signal SIGSEGV: no message")
        found: dict[str, Any] = json.loads(json.dumps(self.room.answer(command)))
        return found

    def close(self) -> None:
        pass


def measured(deadly: str = "") -> dict[str, Measurement]:
    asked = ("torch:auto", "torch-flex", "jax-nn", "torch-sdpa-math", "torch-sdpa", "matmul")
    step = runner.Step(replace(small(), subjects=asked), "backward", asked)
    opened: Any = lambda threads: Here(deadly)  # noqa: E731
    found = runner._timed(step, runner.Rooms(1, 9.0, opened), runner.QUICK, lambda what: None)
    assert [each.subject for each in found] == list(asked)
    return {each.subject: each for each in found}


def test_a_step_times_what_passes_and_says_why_for_the_rest() -> None:
    found = measured()
    assert found["torch:auto"].status == "measured"
    assert found["torch:auto"].shares["d_key"] < 1
    assert [len(part) for part in found["torch:auto"].rounds] == [2, 2]
    assert found["matmul"].rounds
    assert found["torch-flex"].problem == "torch-flex has no backward pass here."
    assert (found["jax-nn"].status, found["jax-nn"].rounds) == ("wrong", [])
    assert "must be at most 1. Got d_query" in found["jax-nn"].problem
    assert found["torch-sdpa-math"].problem == "RuntimeError: out of luck"


def test_a_subject_that_takes_its_room_down_costs_only_itself() -> None:
    found = measured("torch-sdpa")
    assert found["torch-sdpa"].status == "error"
    assert "SIGSEGV" in found["torch-sdpa"].problem
    assert found["torch:auto"].status == found["matmul"].status == "measured"


def test_a_room_answers_memory_and_first_calls_once_checked() -> None:
    room = worker.Room(1, planted)
    command = {"subject": "torch:auto", "case": small().as_dict(), "direction": "forward"}
    first = room.answer({"do": "first", **command})
    assert first["first"] >= 0
    assert first["shares"]["out"] < 1
    if sys.platform == "linux":
        assert room.answer({"do": "memory", **command})["planned"] == 12345
    assert (
        "must be a command of this room. Got 'dance'"
        in room.answer({"do": "dance", **command})["error"]
    )
    wrong = room.answer({"do": "first", **command, "subject": "jax-nn"})
    step = runner.Step(small(), "forward", ("jax-nn",))
    problem = runner._problem(step, "jax-nn", wrong)
    assert problem is not None
    assert problem.status == "wrong"


def test_a_worker_process_speaks_the_protocol_and_its_end_is_told() -> None:
    with rooms.Worker(1) as process:
        assert process.ask({"do": "drop"}, 60) == {}
        command = {"do": "prepare", "subject": "torch:nonsense", "direction": "forward"}
        answer = process.ask({**command, "case": small().as_dict(), "least": 0.001}, 120)
        assert "no implementation 'nonsense'" in answer.get("refused", "") or "not installed" in (
            answer.get("refused", "")
        )
        process._process.kill()
        with pytest.raises(rooms.WorkerError, match="signal SIGKILL"):
            process.ask({"do": "drop"}, 60)


def test_a_worker_that_is_silent_is_ended() -> None:
    code = "import time; print('ready', flush=True); time.sleep(60)"
    process = rooms.Worker(1, command=[sys.executable, "-c", code])
    with pytest.raises(rooms.WorkerError, match=r"no answer within 0.2 s, and was ended"):
        process.ask({"do": "drop"}, 0.2)


def test_onnxruntime_is_refused_by_name_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(Refused, match=r"needs onnx and onnxruntime, which are optional.*no module"):
        subjects.prepared("onnxruntime", small(), "forward", 1)


def test_subjects_know_their_rooms() -> None:
    assert subjects.room("torch-sdpa") == subjects.room("jax:auto@causal") == "torch+jax"
    assert subjects.room("keras-tf") == subjects.room("tf-unknown:auto") == "tf"
    assert subjects.room("keras-jax") == "keras-jax"
    with pytest.raises(ValueError, match=r"Got 'torch-spda'. Did you mean 'torch-sdpa'?"):
        subjects.room("torch-spda")


def test_a_plan_keeps_the_frameworks_that_were_named() -> None:
    steps = runner.plan(["windows"], ["jax"])
    assert {subjects.framework(name) for step in steps for name in step.subjects} == {"jax"}
    asked = {(s.direction, name) for s in runner.plan(["memory-"]) for name in s.subjects}
    assert {way for way, name in asked if name == "torch:auto"} == {"forward", "backward"}
    assert {way for way, name in asked if name == "tf-unknown:auto"} == {"forward", "both"}
    with pytest.raises(ValueError, match=r"Got 'tensorflow'. Did you mean 'tf'?"):
        runner.plan([], ["tensorflow"])
    with pytest.raises(ValueError, match="must leave something to measure"):
        runner.plan(["tiny"], ["jax"])


# Results, targets, page ------------------------------------------------------------------------


def timed(case: str, subject: str, direction: str, *seconds: float) -> Measurement:
    rounds = [[x, x] for x in seconds]
    return Measurement(case, subject, direction, shares={"out": 0.25}, repeats=3, rounds=rounds)


def run_of(*measurements: Measurement) -> Results:
    known = {each.case: BY_NAME[each.case] for each in measurements}
    return Results(PLACE, known, list(measurements))


def target(name: str) -> targets.Target:
    (found,) = [each for each in targets.TARGETS if each.name == name]
    return found


DENSE = [
    f"{mask}-T{length}-D{width}-float32"
    for mask in ("full", "causal")
    for length, width in ((2048, 64), (4096, 64), (2048, 128))
]


@pytest.mark.parametrize(("seconds", "verdict"), [(0.5, "aim met"), (1.05, "met"), (1.2, "missed")])
def test_a_speed_target_is_decided_by_its_worst_case(seconds: float, verdict: str) -> None:
    parts = [timed(case, "torch-sdpa-flash", "forward", 1.0) for case in DENSE]
    parts += [timed(case, "jax:auto", "forward", 0.5) for case in DENSE[1:]]
    asked = target("JAX forward against torch flash, float32")
    before = targets.evaluate(asked, run_of(*parts))
    assert (before.verdict, before.worst) == ("incomplete", 2.0)
    after = targets.evaluate(asked, run_of(*parts, timed(DENSE[0], "jax:auto", "forward", seconds)))
    assert after.verdict == verdict
    assert after.worst == pytest.approx(1 / seconds)
    assert targets.evaluate(asked, run_of()).verdict == "not measured"


def test_what_misses_is_told_of_a_target_that_was_not_measured_whole() -> None:
    parts = [timed(case, "torch-sdpa-flash", "forward", 1.0) for case in DENSE]
    parts += [timed(DENSE[0], "jax:auto", "forward", 2.0)]
    parts += [timed(DENSE[1], "jax:auto", "forward", 0.5)]
    found = targets.evaluate(target("JAX forward against torch flash, float32"), run_of(*parts))
    assert (found.verdict, found.missing, found.misses) == ("incomplete", 4, 1)
    said = "not measured: 4 of 6 cases; 1 of the other 2 missed"
    assert report.in_words(found) == said
    text = page.page(run_of(*parts), "x", picture=False)
    assert f"| 0.5 x | **{said}** |" in text
    assert f"| {DENSE[2]} | not measured |  |" in text


def test_a_wrong_subject_has_no_part_in_a_target() -> None:
    parts = [timed(case, "torch-sdpa-flash", "forward", 1.0) for case in DENSE]
    parts += [replace(timed(c, "jax:auto", "forward", 0.1), status="wrong") for c in DENSE]
    asked = target("JAX forward against torch flash, float32")
    assert targets.evaluate(asked, run_of(*parts)).verdict == "not measured"


def test_share_of_work_is_one_where_time_follows_live_entries() -> None:
    name = "window-256-T8192-D64-float32"
    case = BY_NAME[name]
    live = case.asked_of("torch:auto@causal").entries / case.entries
    assert 16 < live < 17
    parts = [
        timed(name, "torch:auto@causal", "forward", live),
        timed(name, "torch:auto", "forward", 2.0),
    ]
    rows = targets._work(name)(run_of(*parts))
    assert rows[0].label == "torch forward"
    assert rows[0].value == pytest.approx(0.5)
    assert rows[1].value is None


def test_straight_and_bent_lines() -> None:
    x = [100.0, 200.0, 400.0, 800.0]
    assert targets.straightness(x, [3 + 2 * a for a in x]) == pytest.approx(0, abs=1e-9)
    bent = targets.straightness(x, [a**2 for a in x])
    assert bent > 0.25
    assert targets.straightness([1, 2, 3], [1.0, 2.2, 3.0]) < 0.1


@pytest.mark.parametrize(("power", "verdict"), [(1, "aim met"), (2, "missed")])
def test_windows_must_cost_in_proportion(power: int, verdict: str) -> None:
    name = "windows-T8192-D64-float32"
    case, parts = BY_NAME[name], []
    for subject in case.subjects:
        parts.append(timed(name, subject, "forward", float(case.asked_of(subject).blocks) ** power))
    asked = target("time against live blocks, windows 128 to 4096, linear")
    assert targets.evaluate(asked, run_of(*parts)).verdict == verdict


def test_memory_overhead_and_first_calls() -> None:
    def held(mask: str, length: int, subject: str, side: str, size: int) -> Measurement:
        name = f"memory-{mask}-T{length}-D64-float32"
        return Measurement(name, subject, side, shares={"out": 0.1}, peak=size, planned=None)

    def every(power: int, unit: int, without: str = "", more: int = 0) -> Results:
        return run_of(
            *(
                held(mask, length, subject, side, unit * (length // 4096) ** power + extra)
                for mask in ("full", "causal")
                for length in (4096, 8192, 16384)
                for subject, extra in zip(asked, (0, 0, more, 0), strict=True)
                for side in DIRECTIONS
                if subject != without
            )
        )

    asked = ("torch:auto", "jax:auto", "tf:auto", "tf-unknown:auto")

    growth = target("temporaries at twice the length, growth")
    assert targets.evaluate(growth, every(1, 4_000_000)).verdict == "aim met"
    assert targets.evaluate(growth, every(2, 4_000_000)).verdict == "missed"
    assert targets.evaluate(growth, every(2, 1000)).verdict == "aim met"  # all below the floor
    forward = target("temporaries at T 16384, forward")
    assert targets.evaluate(forward, every(1, 4_000_000)).worst == 16
    assert targets.evaluate(forward, every(2, 4_000_000)).verdict == "missed"
    assert targets.evaluate(forward, every(1, 4_000_000, more=3_000_000)).worst == 19
    assert targets.evaluate(forward, every(1, 4_000_000, "tf:auto")).verdict == "incomplete"

    name = "tiny-T4-D8-float32"
    pair = [
        timed(name, "torch:auto", "forward", 50e-6),
        timed(name, "torch-sdpa", "forward", 20e-6),
    ]
    tiny = targets.evaluate(target("overhead on tiny tensors"), run_of(*pair))
    assert tiny.verdict == "met"
    assert tiny.worst == pytest.approx(30)


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    wrong = Measurement(DENSE[0], "jax-nn", "forward", "wrong", "p", {"out": float("inf")})
    before = run_of(timed(DENSE[0], "jax:auto", "forward", 0.25, 0.5), wrong)
    path = tmp_path / "deep" / "run.json"
    results.save(before, path)
    after = results.load(path)
    assert after.measurements == before.measurements
    assert after.cases == before.cases
    path.write_text(path.read_text("utf-8").replace('"version": 1', '"version": 7'), "utf-8")
    with pytest.raises(
        ValueError, match=r"must hold benchmark results of version 1. Got version 7"
    ):
        results.load(path)
    path.write_text('{"version": 1, "cases": []}', "utf-8")
    with pytest.raises(ValueError, match="must hold an environment, cases and measurements"):
        results.load(path)


def test_the_commit_is_that_of_the_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*words: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    for name in ("benchmarks/results/cpu.json", "benchmarks/results.py", "docs/B.md", "other.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n", "utf-8")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "benchmarks" / "results.py"))
    git("init")
    assert results.commit() == ""  # nothing of ours is in that checkout
    git("add", ".")
    git("commit", "-m", "one")
    clean = results.commit()
    assert len(clean) >= 7
    (tmp_path / "benchmarks/results/cpu.json").write_text("2\n", "utf-8")
    (tmp_path / "docs/B.md").write_text("2\n", "utf-8")
    assert results.commit() == clean
    (tmp_path / "other.py").write_text("2\n", "utf-8")
    assert results.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert results.commit() == ""


def test_the_page_publishes_losses_and_refusals(tmp_path: Path) -> None:
    parts = [timed(DENSE[0], "torch-sdpa-flash", "forward", 0.1, 0.1)]
    parts += [timed(DENSE[0], "jax:auto", "forward", 0.2, 0.2)]
    parts += [timed(DENSE[0], "matmul", "forward", 0.05, 0.05)]
    parts += [Measurement(DENSE[0], "onnxruntime", "forward", "refused", "it | is not here")]
    source = tmp_path / "cpu.json"
    run = run_of(*parts)
    results.save(run, source)
    assert not page.write_page(source, results.load(source), tmp_path / "B.md")
    text = (tmp_path / "B.md").read_text("utf-8")
    assert (
        "| JAX forward against torch flash, float32 | ≥ 0.9 x | ≥ 1 x | 0.5 x "
        "| **not measured: 5 of 6 cases; 1 of the other 1 missed** |" in text
    )
    assert "A processor, 2 threads on 2 cores; load before the run 0.1, 0.2, 0.3." in text
    rate = BY_NAME[DENSE[0]].operations("forward") / 0.2 / 1e9
    top = 2 * 2048**3 / 0.05 / 1e9
    row = f"| jax:auto | 200 | 200 to 200 | {rate:.3g} | {100 * rate / top:.0f}% | 0.25 |"
    assert row in text
    assert "| onnxruntime | refused | it \\| is not here | 1 |" in text
    assert page.PICTURE not in text
    run.quick = True
    with pytest.raises(ValueError, match=r"must be made from a full run. Got one with --quick"):
        page.page(run, "cpu.json", picture=False)


def test_a_page_says_of_which_commit_each_figure_is() -> None:
    def on(commit: str, date: str, case: str) -> Measurement:
        return replace(timed(case, "jax:auto", "forward", 0.2), commit=commit, date=date)

    def text(*measurements: Measurement, **place: Any) -> str:
        run = run_of(*measurements)
        return page.page(
            replace(run, environment={**PLACE, **place}), "cpu.json", picture=False
        ).replace("\n", " ")

    first, second = on("abc1234", "2026-01-31T13", DENSE[0]), on("def5678", "2026-02-03", DENSE[1])
    third = on("abc1234", "2026-02-02", DENSE[2])
    whole = text(first, third)
    assert (
        "Measured on 2026-01-31: commit abc1234 (2026-01-31 to 2026-02-02, 2 measurements)."
        in whole
    )
    assert "Commit abc1234." not in whole
    parts = text(first, second, parts=[PLACE["date"], "2026-02-03"])
    assert (
        "Measured in parts, begun 2 times, from 2026-01-31: commit abc1234 (2026-01-31, "
        "1 measurements); commit def5678 (2026-02-03, 1 measurements)." in parts
    )
    assert f"### {DENSE[1]}, forward  Commit def5678." in parts
    old = text(timed(DENSE[0], "jax:auto", "forward", 0.2), second)
    assert "commit not recorded (day not recorded, 1 measurements)" in old
    assert f"### {DENSE[0]}, forward  Commit not recorded." in old


def test_the_committed_results_still_make_a_page() -> None:
    source = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu.json"
    assert "## Targets, case by case" in page.page(results.load(source), "cpu.json", picture=False)


def test_the_bare_products_share_of_work_stands_beside_ours() -> None:
    name, floor = "window-256-T8192-D64-float32", "floor-window-T8192-D64-float32"
    live = BY_NAME[name].asked_of("jax:auto@causal").entries / BY_NAME[name].entries
    parts = [timed(name, "jax:auto@causal", "forward", live)]
    parts += [timed(name, "jax:auto", "forward", 4.0)]
    parts += [timed(floor, "jax-floor@causal", "forward", live)]
    parts += [timed(floor, "jax-floor", "forward", 2.0)]
    text = page.page(run_of(*parts), "x", picture=False)
    assert "| jax forward | 0.25 x | 0.25 x to 0.25 x, median 0.25 x | 0.5 x |" in text
    assert "| jax backward | not measured |  |  |" in text
    assert "| torch forward | not measured |  | not measured |" in text


def test_why_a_target_is_missed_stands_below_its_cases() -> None:
    each = next(t for t in targets.TARGETS if t.name == "temporaries at T 16384, forward")
    row = targets.Row("tf full forward", 40.0)
    told = [
        " ".join(page._target_rows(run_of(), targets.Outcome(each, [row], 40.0, verdict)).split())
        for verdict in ("missed", "met")
    ]
    assert each.why in told[0]
    assert each.why not in told[1]


def test_bare_products_beside_jax_nn() -> None:
    name = "causal-T2048-D128-float32"
    parts = [timed(name, "jax:auto", "forward", 1.0), timed(name, "jax-nn", "forward", 4.0)]
    parts += [timed(f"floor-{name}", "jax-floor", "forward", 0.5)]
    parts += [timed(f"floor-{name}", "jax-nn", "forward", 4.5)]
    text = page.page(run_of(*parts), "x", picture=False)
    assert f"| {name} | 4 x | 4 x to 4 x, median 4 x | 9 x |" in text


def test_floors_stand_beside_what_they_are_the_floor_of() -> None:
    name = next(case.name for case in CASES if case.name.startswith("floor-window"))
    parts = [timed(name, "jax:auto", "forward", 0.2), timed(name, "jax-floor", "forward", 0.05)]
    text = page.page(run_of(*parts, timed(name, "tf:auto", "forward", 0.2)), "x", picture=False)
    assert f"| {name} | jax | 200 | 50 | 25% | 25% to 25% |" in text
    assert f"| {name} | tf |" not in text
    assert "Where the time goes" not in page.page(run_of(parts[0]), "x", picture=False)


@pytest.mark.parametrize("name", ["torch", "jax", "tf"])
def test_a_floor_is_timed_and_never_checked(name: str) -> None:
    if find_spec("tensorflow" if name == "tf" else name) is None:
        pytest.skip(f"{name} is not installed")
    for case in (c.small() for c in CASES if f"{name}-floor" in c.subjects):
        question = {"subject": f"{name}-floor", "case": case.as_dict()}
        with rooms.Worker(1) as room:
            command = {"do": "prepare", **question, "least": 0.001}
            got = room.ask({**command, "direction": "forward"}, 300)
            if name == "torch" and case.mask in ("full", "causal"):
                assert "the kernel itself is the floor" in got["refused"]
                continue
            assert got["shares"] == {}
            assert room.ask({"do": "sample", **question}, 300)["seconds"] > 0
            got = room.ask({**command, "direction": "both"}, 300)
            assert "has no backward pass" in got["refused"]


def test_the_picture_stands_beside_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "windows-T8192-D64-float32"
    parts = [timed(name, s, "forward", 0.1 + i / 10) for i, s in enumerate(BY_NAME[name].subjects)]
    assert page.write_page(tmp_path / "cpu.json", run_of(*parts), tmp_path / "B.md")
    assert (tmp_path / page.PICTURE).stat().st_size > 5000
    assert f"]({page.PICTURE})" in (tmp_path / "B.md").read_text("utf-8")


def test_the_terminal_shows_times_verdicts_and_reasons() -> None:
    parts = [
        timed(DENSE[0], "torch-sdpa-flash", "forward", 0.1),
        timed(DENSE[0], "jax:auto", "forward", 0.2),
    ]
    parts.append(Measurement(DENSE[0], "jax-nn", "forward", "wrong", "Got d_key 7."))
    run = run_of(*parts)
    console = Console(file=io.StringIO(), width=160)
    console.print(report.step_table(run, parts), report.targets_table(run))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "wrong: Got d_key 7." in text
    assert "missed" in text
    assert not run.broken  # a peer's mistake is its own
    ours = Measurement(DENSE[0], "tf:auto", "forward", "wrong", "Got out 9.")
    assert run_of(*parts, ours).broken == [ours]
    assert report.failures(run_of(*parts, ours))[0] == ours


# The command line ------------------------------------------------------------------------------


def test_the_command_line_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    run = CliRunner()
    unknown = run.invoke(cli.app, ["bench", "run", "--case", "nonesuch"])
    assert unknown.exit_code == 2
    assert "must name a case" in unknown.output
    near = run.invoke(cli.app, ["bench", "run", "--case", "cuasal-T2048-D64-float32"])
    assert near.exit_code == 2
    assert "Did you mean 'causal-T2048-D64-float32'?" in near.output
    missing = run.invoke(cli.app, ["bench", "page", str(tmp_path / "none.json")])
    assert missing.exit_code == 2


@pytest.mark.parametrize("bad", [False, True])
def test_the_command_line_fails_on_ours_being_wrong(
    bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(steps: Any, **given: Any) -> Any:
        for name in steps[0].subjects:
            found = timed(steps[0].case.name, name, "forward", 0.1)
            broken = bad and name == "torch:auto"
            yield replace(found, status="wrong", rounds=[]) if broken else found

    monkeypatch.setattr(runner, "run", run)
    path = tmp_path / "run.json"
    monkeypatch.setattr(results, "commit", lambda: "abc1234-dirty")
    found = CliRunner().invoke(cli.app, ["bench", "run", "--case", "tiny", "--json", str(path)])
    assert found.exit_code == int(bad), found.output
    for each in results.load(path).measurements:
        assert each.commit == "abc1234-dirty"
        assert datetime.fromisoformat(each.date).tzinfo is not None
    assert len(results.load(path).measurements) == len(BY_NAME["tiny-T4-D8-float32"].subjects)


@pytest.mark.parametrize(
    ("words", "rounds", "least"),
    [
        ((), 7, timing.LEAST),
        (("--rounds", "3"), 3, timing.LEAST),
        (("--quick",), 2, 0.001),
        (("--quick", "--rounds", "1"), 1, 0.001),
    ],
)
def test_the_pace_is_as_asked(
    words: tuple[str, ...], rounds: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[runner.Pace] = []

    def run(steps: Any, *, threads: int, pace: runner.Pace, seen: Any) -> Any:
        paces.append(pace)
        return iter(())

    monkeypatch.setattr(runner, "run", run)
    CliRunner().invoke(cli.app, ["bench", "run", "--case", "tiny", "--timeout", "9", *words])
    assert paces == [runner.Pace(rounds, least, 9)]


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(steps: Any, **given: Any) -> Any:
        for step in steps:
            for name in step.subjects:
                if len(asked) == 12:
                    raise KeyboardInterrupt
                asked.append(f"{step.case.name} {step.direction} {name}")
                yield timed(step.case.name, name, step.direction, 0.1)

    monkeypatch.setattr(runner, "run", run)
    path = tmp_path / "run.json"
    command = ["bench", "run", "--case", "T4096-D64-bfloat16", "--json", str(path)]
    cut = CliRunner().invoke(cli.app, command)
    assert cut.exit_code == 130
    steps = runner.plan(["T4096-D64-bfloat16"])
    size = len(steps[0].subjects)
    assert len(results.load(path).measurements) == 12
    assert 12 % size, "a step must be cut in two for this to say anything"

    asked.clear()
    monkeypatch.setattr(runner, "run", lambda steps, **given: iter(asked.extend(steps) or ()))
    CliRunner().invoke(cli.app, [*command, "--resume"])
    assert asked == steps[12 // size :]
    kept = results.load(path)
    assert len(kept.measurements) == 12 // size * size


def test_a_case_that_changed_or_went_wrong_is_measured_again() -> None:
    good, bad = timed(DENSE[0], "jax:auto", "forward", 0.1), DENSE[1]
    before = run_of(good, Measurement(bad, "tf:auto", "both", "wrong", "Got out 9."))
    found = results.resumed(before, before)
    assert found.measurements == before.measurements
    assert found.holds(BY_NAME[DENSE[0]], "forward", ["jax:auto"])
    assert not found.holds(BY_NAME[bad], "both", ["tf:auto"])
    changed = replace(BY_NAME[DENSE[0]], subjects=("jax:auto",))
    now = replace(before, cases={**before.cases, changed.name: changed}, measurements=[])
    assert good not in results.resumed(before, now).measurements


def test_a_run_goes_on_only_where_it_began(tmp_path: Path) -> None:
    before = run_of(timed(DENSE[0], "jax:auto", "forward", 0.1))
    now = replace(before, environment={**PLACE, "date": "2026-02-01"}, measurements=[])
    found = results.resumed(before, now)
    assert found.environment["parts"] == [PLACE["date"], "2026-02-01"]
    assert len(found.measurements) == 1
    for name, other in (("cpu", "Another"), ("packages", {}), ("threads", 4)):
        with pytest.raises(ValueError, match=f"with {name} "):
            results.resumed(before, replace(now, environment={**PLACE, name: other}))
    with pytest.raises(ValueError, match="--quick"):
        results.resumed(before, replace(now, quick=True))
    refused = CliRunner().invoke(cli.app, ["bench", "run", "--case", "tiny", "--resume"])
    assert refused.exit_code == 2
    assert "--json" in refused.output
