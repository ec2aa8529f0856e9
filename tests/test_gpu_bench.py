"""What `make gpu` does, on a machine that stands in for a GPU: cases, targets, results, page."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_machine import Clock, Machine, small
from typer.testing import CliRunner

from attn_core.benchmarks import check, gpu, gpu_apart, gpu_cases, gpu_page, gpu_stages, judge, tune
from attn_core.benchmarks.gpu_cases import (
    COPY,
    CUDNN,
    DROPOUT,
    FLASH,
    FUSED,
    OURS,
    SPLIT,
    GpuCase,
    Measured,
    Promise,
    Run,
)
from attn_core.cli import app
from attn_core.cli_gpu import _clean
from attn_core.kernels import ahead, configs
from attn_core.reference import attention as reference

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_is_checked_timed_and_written(tmp_path: Path) -> None:
    said: list[str] = []
    asked: list[list[str]] = []

    def call(command: list[str], seconds: float, into: Path) -> tuple[int, str]:
        assert seconds == float("inf")
        assert into.parent == tmp_path / "deep" / "it"
        asked.append(command)
        return 0, "all passed"

    where = tmp_path / "deep" / "it.json"
    whole, path = gpu.run(
        Machine(refused=FLASH), where, given=[small("one")], say=said.append, call=call
    )
    assert path == where
    assert json.loads(where.read_text("utf-8")) == json.loads(json.dumps(whole))
    assert not gpu.failed(whole)
    assert whole["stages"]["conformance"] == {"status": "passed", "said": "all passed"}
    assert "doctor" in asked[0]
    assert "tests/kernels_only" in asked[1]
    assert gpu_stages.SUBJECT in asked[2]
    assert "tiles.toml" in " ".join(asked[3])
    assert list(whole["stages"]) == list(gpu.STAGES)
    found = gpu.measured_of(json.loads(where.read_text("utf-8")))
    assert [(m.subject, m.direction, m.status) for m in found] == [
        (OURS, "forward", "measured"),
        (FLASH, "forward", "refused"),
        (OURS, "backward", "measured"),
        (FLASH, "backward", "refused"),
    ]
    assert found[0].samples == (2.0,) * 10
    assert found[0].rmse is not None
    assert 0 < found[0].rmse < 1e-6


def test_what_is_not_asked_for_stays_as_it_was(tmp_path: Path) -> None:
    """A stage alone does not cost a page its figures, nor figures what stages have said."""
    where, given = tmp_path / "it.json", [small("one")]
    said = {"status": "passed", "said": "all passed", "commit": "old", "date": "then"}

    def run(
        place: dict[str, Any], *stages: str, status: int = 0, minutes: float | None = None
    ) -> dict[str, Any]:
        whole, _ = gpu.run(
            Machine(), where, given=given, stages=stages, environment=place, minutes=minutes,
            call=lambda command, seconds, into: (status, "all passed"),
        )  # fmt: skip
        written: dict[str, Any] = json.loads(where.read_text("utf-8"))
        assert written == json.loads(json.dumps(whole))
        return written

    old = run({"commit": "old", "date": "then"}, "bench", "smoke")
    assert old["stages"]["smoke"] == said
    new = run({"commit": "new", "date": "now"}, "doctor", status=1)
    assert new["stages"]["doctor"] == {**said, "status": "failed", "commit": "new", "date": "now"}
    assert new["stages"]["smoke"] == said
    assert new["stages"]["tests"] == {"status": "skipped", "said": "not asked for"}
    assert (new["environment"], new["measured"]) == (old["environment"], old["measured"])
    again = run({"commit": "new", "date": "now"}, "bench")
    assert again["stages"]["smoke"] == said
    assert again["environment"]["commit"] == again["stages"]["bench"]["commit"] == "new"
    assert len(again["measured"]) == len(old["measured"])
    assert again["stages"]["doctor"]["status"] == "failed"
    assert not gpu.failed(again, ["bench"])
    # Nor does want of time, in which nothing begins.
    assert run({"commit": "newer"}, "smoke", "bench", minutes=0.1) == again

    where.write_text("{", "utf-8")
    with pytest.raises(gpu.Unreadable, match=r"it\.json must hold JSON, or not exist\. Got "):
        run({"commit": "new"}, "doctor")


def test_who_is_stopped_has_lost_no_figure_and_no_stage_speaks_for_another(tmp_path: Path) -> None:
    """Figures stay until others are there, and then no stage of before vouches for these."""
    where, given = tmp_path / "it.json", [small("one"), small("two")]
    run = partial(gpu.run, into=where, given=given, stages=["doctor", "bench"])
    run(Machine(), environment={"commit": "old"}, call=lambda *_: (0, "fine"))
    old = json.loads(where.read_text("utf-8"))
    assert old["stages"]["bench"]["status"] == "passed"

    def stopped(after: int) -> dict[str, Any]:
        def bench(machine: Any, units: Any, pace: Any, say: Any, limit: Any, keep: Any) -> None:
            for case, direction in units[:after]:
                keep([Measured(case.name, OURS, direction, "measured", samples=(1.0,))])
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(Machine(), environment={"commit": "new"}, call=lambda *_: (0, "fine"), bench=bench)
        found: dict[str, Any] = json.loads(where.read_text("utf-8"))
        return found

    early = stopped(0)
    assert early["stages"]["doctor"]["commit"] == "new"
    for name in ("facts", "environment", "pace", "measured"):
        assert early[name] == old[name]
    assert early["stages"]["bench"] == old["stages"]["bench"]
    late = stopped(1)
    assert late["environment"]["commit"] == "new"
    assert len(late["measured"]) == 1
    said = {"status": "stopped", "said": "it did not end", "commit": "new"}
    assert late["stages"]["bench"] == said


def test_figures_keep_the_facts_that_they_are_of(tmp_path: Path) -> None:
    class Newer(Machine):
        def facts(self) -> dict[str, Any]:
            return {**super().facts(), "cuda": "99"}

    where = tmp_path / "it.json"
    gpu.run(Machine(), where, given=[small("one")], stages=["bench"])
    old = json.loads(where.read_text("utf-8"))
    del old["pace"]  # as a file may be that somebody else wrote
    where.write_text(json.dumps(old), "utf-8")
    whole, _ = gpu.run(Newer(), where, stages=["doctor"], call=lambda *_: (0, "fine"))
    assert whole["facts"] == old["facts"]
    assert whole["measured"] == old["measured"]


@pytest.mark.parametrize("text", ["[]", '{"version": 1, "measurements": [1]}'])
def test_what_is_not_of_such_a_run_is_not_written_over(tmp_path: Path, text: str) -> None:
    where = tmp_path / "cpu.json"
    where.write_text(text, "utf-8")
    with pytest.raises(gpu.Unreadable, match=r"cpu\.json must be of `attn-core bench gpu`"):
        gpu.run(Machine(), where, stages=["doctor"], call=lambda *_: (0, "fine"))
    assert where.read_text("utf-8") == text


@pytest.mark.parametrize(("name", "other"), [("gpu", "another"), ("version", 0)])
def test_nor_is_what_is_of_another_gpu_or_version(tmp_path: Path, name: str, other: Any) -> None:
    where = tmp_path / "it.json"
    whole, _ = gpu.run(Machine(), where, given=[small("one")], stages=["bench"])
    where.write_text(json.dumps({**whole, name: other}), "utf-8")
    held = where.read_text("utf-8")
    with pytest.raises(
        gpu.Unreadable, match=rf"it\.json must be of {name} .*Got {other!r}: move it, or write else"
    ):
        gpu.run(Machine(), where, stages=["doctor"], call=lambda *_: (0, "fine"))
    assert where.read_text("utf-8") == held


def test_some_cases_do_not_cost_a_page_the_others(tmp_path: Path) -> None:
    """One run's figures take the place of another's, so that all on a page are of one commit."""
    where, given = tmp_path / "it.json", [small("one"), small("two")]
    run = partial(gpu.run, Machine(), where, given=given)
    run(stages=["bench"])
    held = where.read_text("utf-8")
    with pytest.raises(
        gpu.Unreadable,
        match=r"`--case`, .*it\.json must hold .*Got two too, of 1 such: write else",
    ):
        run(stages=["bench", "doctor"], only=["one"])
    assert where.read_text("utf-8") == held
    # Where none is lost it runs: another stage, every case, the same ones again.
    run(stages=["doctor"], only=["one"], call=lambda *_: (0, "fine"))
    assert len(run(stages=["bench"], only=["o"])[0]["measured"]) == 8
    beside = tmp_path / "one.json"
    for _ in range(2):
        again, _ = gpu.run(Machine(), beside, given=given, stages=["bench"], only=["one"])
        assert {m["case"] for m in again["measured"]} == {"one"}


def test_a_file_without_a_suffix_would_stand_where_its_folder_does(tmp_path: Path) -> None:
    with pytest.raises(
        gpu.Unreadable, match=r"must have a suffix, as in .*it\.json: .* Got .*it\."
    ):
        gpu.run(Machine(), tmp_path / "it", stages=["doctor"], call=lambda *_: (0, "fine"))
    assert not (tmp_path / "it").exists()


def test_a_wrong_answer_has_no_figure_and_fails_the_run(tmp_path: Path) -> None:
    whole, _ = gpu.run(
        Machine(wrong=OURS), tmp_path / "x.json", given=[small("one")], stages=["bench"], say=print
    )
    assert gpu.failed(whole)
    assert whole["stages"]["sanitizer"]["status"] == "skipped"
    found = gpu.measured_of(whole)
    assert {(m.subject, m.status) for m in found} == {(OURS, "wrong"), (FLASH, "measured")}
    assert all(not m.samples for m in found if m.status == "wrong")
    assert "d_value" in next(m.problem for m in found if m.direction == "backward" and m.problem)


@pytest.mark.parametrize(("broken", "fails"), [(OURS, True), (FLASH, False)])
def test_who_raises_costs_nobody_else(tmp_path: Path, broken: str, fails: bool) -> None:
    whole, _ = gpu.run(
        Machine(broken=broken), tmp_path / "x.json", given=[small("one")], stages=["bench"]
    )
    assert gpu.failed(whole) == fails
    found = gpu.measured_of(whole)
    assert {m.problem for m in found if m.subject == broken} == {"ZeroDivisionError: of its own"}
    assert all(m.samples for m in found if m.subject != broken)


def test_a_failed_suite_fails_the_run(tmp_path: Path) -> None:
    whole, _ = gpu.run(
        Machine(),
        tmp_path / "x.json",
        stages=["conformance"],
        call=lambda command, seconds, into: (1, "2 failed"),
    )
    assert gpu.failed(whole)


# --- Little time. ---------------------------------------------------------------------------------


def test_what_was_reached_is_written_and_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = gpu.Limit
    monkeypatch.setattr(gpu, "Limit", lambda minutes: limited(minutes, Clock(25.0)))
    where = tmp_path / "x.json"
    held: list[int] = []

    class Watched(Machine):
        def prepared(self, *about: Any) -> Any:
            held.append(len(json.loads(where.read_text())["measured"]) if where.exists() else 0)
            return super().prepared(*about)

    given = [small(f"case{n}", subjects=(OURS,), directions=("forward",)) for n in range(9)]
    whole, _ = gpu.run(Watched(), where, given=given, minutes=3, stages=["bench", "sanitizer"])
    assert whole["stages"]["bench"]["status"] == "stopped"
    reached = len(whole["measured"])
    assert 0 < reached < 9
    assert held == list(range(reached))  # each after the last had been written
    assert (
        f"{9 - reached} of 9 not reached, from case{reached} forward on"
        in (whole["stages"]["bench"]["said"])
    )
    assert whole["stages"]["sanitizer"] == {"status": "skipped", "said": "no time was left"}
    assert not gpu.failed(whole)


def test_what_tells_most_comes_first() -> None:
    found = gpu_cases.ranked(gpu_cases.cases())
    assert [case.name for case in found[: len(gpu_cases.FIRST)]] == list(gpu_cases.FIRST)
    assert {case.name for case in found} == {case.name for case in gpu_cases.cases()}
    # After a few of them, every promise has a figure.
    names = {case.name for case in found[: len(gpu_cases.FIRST)]}
    some = [m for m in synthetic() if m.case in names]
    assert all(each.worst is not None for each in Run(some).promises())


@pytest.mark.parametrize(("bad", "status"), [(True, "failed"), (False, "stopped")])
def test_a_suite_that_is_stopped_tells_of_its_part(tmp_path: Path, bad: bool, status: str) -> None:
    def call(command: list[str], seconds: float, into: Path) -> tuple[int, str]:
        assert seconds <= 0.3 * 600  # the smoke tier's share
        place = Path(command[command.index("--json") + 1])
        rows = [{"case": "causal", "status": "failed" if bad else "passed"}]
        place.write_text(json.dumps({"verdicts": rows}))
        return 130, "interrupted"

    whole, _ = gpu.run(
        Machine(), tmp_path / "x.json", stages=["smoke", "bench"], minutes=10, call=call,
        given=[small("one", subjects=(OURS,), directions=("forward",))],
    )  # fmt: skip
    assert whole["stages"]["smoke"]["status"] == status
    assert f"1 judged until time was up, {int(bad)} wrong" in whole["stages"]["smoke"]["said"]
    assert whole["stages"]["bench"]["status"] == "passed"


def test_who_takes_too_long_is_interrupted(tmp_path: Path) -> None:
    # Run in the background of a shell, tests would hand on that interrupts are ignored.
    code = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: print('what there is')"
    )
    began = time.monotonic()
    status, said = gpu_stages.called([sys.executable, "-c", code], 1.0, tmp_path / "said.txt")
    assert status == 130
    assert "begun" in said
    assert time.monotonic() - began < 30
    assert (tmp_path / "said.txt").read_text("utf-8") == "begun\nwhat there is\n"
    command = [sys.executable, "-c", "print(1); raise SystemExit(4)"]
    assert gpu_stages.called(command, 60, tmp_path / "other.txt") == (4, "1")


def test_a_failed_test_is_written_as_it_happens(tmp_path: Path) -> None:
    """By the tests' own conftest; who is interrupted afterwards is told how many there were."""

    def call(command: list[str], seconds: float, into: Path) -> tuple[int, str]:
        assert seconds <= 28 / 63 * 600
        (failures,) = (word.split("=")[1] for word in command if "--failures-into" in word)
        with open(failures, "a", encoding="utf-8") as file:
            file.write(f"{gpu_stages.FAILED}call of a.py::b\nassert 1 == 2\n\n" * 2)
        return 130, "interrupted"

    whole, _ = gpu.run(
        Machine(), tmp_path / "x.json", stages=["tests", "bench"], minutes=10, call=call,
        given=[small("one", subjects=(OURS,), directions=("forward",))],
    )  # fmt: skip
    found = whole["stages"]["tests"]
    assert found == {"status": "failed", "said": "time was up; 2 had failed by then"}
    assert whole["stages"]["bench"]["status"] == "passed"


def test_every_stage_has_its_share_of_the_time(tmp_path: Path) -> None:
    asked: dict[str, float] = {}

    def call(command: list[str], seconds: float, into: Path) -> tuple[int, str]:
        asked[into.stem] = seconds
        return 0, "done"

    stages = ["doctor", "tests", "smoke", "tune"]
    gpu.run(Machine(), tmp_path / "x.json", stages=stages, minutes=57, call=call)
    # Nothing was spent: each has its own share and what those before it left.
    for stage, until in (("doctor", 4), ("tests", 30), ("smoke", 45)):
        assert asked[stage] == pytest.approx(60 * until, abs=5)
    assert asked["tune"] == pytest.approx(60 * 57 + 20, abs=5)
    # A quarter of an hour is enough for the first one to begin.
    assert 14 * 60 * gpu.SHARES["doctor"] / sum(gpu.SHARES.values()) > gpu_stages.LEAST


def test_some_heads_are_judged_as_all_are() -> None:
    case = small("some", kv_heads=2, length=40, batch=3)
    arrays = check.asked(case).arrays
    rows = np.arange(40)
    exact = judge.answer(case, arrays, rows, judge.exact).results
    got = {n: x.astype(np.float32) for n, x in exact.items()}
    pulled = {n: got[n] for n in ("query", "key", "value")}
    assert check.groups(case, 2) == ((0, 0), (2, 1))
    assert all(x <= 1 for x in check.shares(case, "backward", pulled, 2).values())
    assert check.error(case, "forward", got["out"], 2) < 1e-6
    for b, seen in ((1, False), (2, True)):  # batch 1 is not among those two
        wrong = {n: x.copy() for n, x in pulled.items()}
        wrong["key"][b, 1] += 0.1
        found = check.shares(case, "backward", wrong, 2)
        assert (found["d_key"] > 1) is seen
        assert check.shares(case, "backward", wrong)["d_key"] > 1


# --- Kernels that take their process with them. ---------------------------------------------------


def apart(*words: str, given: Any = None, **more: Any) -> list[Measured]:
    found: list[Measured] = []
    command = [sys.executable, str(Path(__file__).parent / "gpu_machine.py"), *words]
    cases = given or [small(n, length=32, directions=("forward",)) for n in ("one", "two")]
    gpu_apart.bench(
        *(Machine(), [(case, d) for case in cases for d in case.directions], gpu.Pace(1, 1)),
        *(lambda words: None, gpu.Limit(None), found.extend, command),
        **more,
    )
    return found


def test_a_worker_measures_what_this_process_would() -> None:
    found = apart()
    assert [(m.case, m.subject, m.samples) for m in found] == [
        (case, subject, (ms, ms))
        for case in ("one", "two")
        for subject, ms in ((OURS, 2.0), (FLASH, 3.0))
    ]
    assert all(m.rmse for m in found)


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_a_kernel_that_ends_its_process_or_never_ends_costs_itself(how: str) -> None:
    found = apart(f"{how}={FLASH}", patience=3.0)
    assert [(m.case, m.subject, m.status) for m in found] == [
        (case, subject, status)
        for case in ("one", "two")
        for subject, status in ((OURS, "measured"), (FLASH, "error"))
    ]
    said = "an illegal address" if how == "crash" else "no word for"
    assert said in found[1].problem
    assert found[0].samples


def test_answers_are_judged_side_by_side_and_timed_by_one_alone() -> None:
    """Each in the order of the cases, whoever judged it; and nobody is timed who is wrong."""
    names = ("one", "two", "three")
    given = [small(n, length=32, directions=("forward",)) for n in names]
    found = apart(f"wrong={FLASH}", given=given, judges=3)
    assert [(m.case, m.subject, m.status, len(m.samples)) for m in found] == [
        (case, subject, status, samples)
        for case in names
        for subject, status, samples in ((OURS, "measured", 2), (FLASH, "wrong", 0))
    ]
    assert "errors of what is allowed" in found[1].problem


@pytest.mark.parametrize(
    ("processors", "memory", "judges"), [(16, 141, 14), (64, 24, 3), (2, 4, 1)]
)
def test_judges_have_processors_and_room(
    processors: int, memory: int, judges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_apart.os, "cpu_count", lambda: processors)
    monkeypatch.setattr(Machine, "facts", lambda self: {"memory": memory * 2**30})
    said: list[str] = []
    ends: dict[str, float] = {}

    def through(units: Any, job: str, pace: Any, limit: gpu.Limit, *about: Any) -> None:
        said.append(job)
        ends[job] = limit.left()

    monkeypatch.setattr(gpu_apart, "_through", through)
    units = [(small(f"case {n}"), "forward") for n in range(50)]
    limit = gpu.Limit(1.0, lambda: 0.0)
    gpu_apart.bench(Machine(), units, gpu.PACE, said.append, limit, lambda found: None)
    assert ends == {"judge": pytest.approx(36), "time": 60}
    assert said.count("judge") == judges
    assert f"50 to judge, {judges} at once" in said
    assert said.count("time") == 1


def test_judging_leaves_time_for_timing() -> None:
    limit = gpu.Limit(1.0, lambda: 0.0)
    assert limit.part(gpu_apart.JUDGING).left() == pytest.approx(36)
    assert limit.until(0.5).part(gpu_apart.JUDGING).left() == pytest.approx(18)
    assert gpu.Limit(None).part(0.5).left() == float("inf")


def test_a_device_that_answers_no_more_gets_another_process() -> None:
    """Of the case itself what came before is kept; the next case has its figures."""
    given = [small("one", length=32, directions=("forward",), subjects=(FLASH, OURS))]
    given += [small("two", length=32, directions=("forward",), subjects=(OURS,))]
    found = apart(f"lost={OURS}", given=given)
    assert [(m.case, m.status) for m in found] == [
        ("one", "measured"), ("one", "error"), ("two", "error"),
    ]  # fmt: skip
    assert "illegal memory access" in found[1].problem


def test_workers_that_never_begin_are_given_up() -> None:
    units = [(small("one"), "forward")]
    command = [sys.executable, "-c", "raise SystemExit('no such module')"]
    with pytest.raises(RuntimeError, match="no such module"):
        gpu_apart.bench(
            *(Machine(), units, gpu.PACE, print, gpu.Limit(None), lambda found: None, command)
        )


def test_a_bench_that_never_begins_fails_its_stage(tmp_path: Path) -> None:
    def never(*about: Any) -> None:
        raise RuntimeError("a worker must begin with its cases. Got 1: no such module")

    whole, path = gpu.run(Machine(), tmp_path / "x.json", stages=["bench"], bench=never)
    assert whole["stages"]["bench"]["status"] == "failed"
    assert "no such module" in json.loads(path.read_text())["stages"]["bench"]["said"]


# --- What is measured. ----------------------------------------------------------------------------


def test_both_ways_of_the_backward_pass_are_timed(tmp_path: Path) -> None:
    given = [small("both", subjects=(OURS, SPLIT, FUSED), length=32)]
    whole, _ = gpu.run(Machine(), tmp_path / "x.json", given=given, stages=["bench"])
    assert [(m.direction, m.subject) for m in gpu.measured_of(whole)] == [
        ("forward", OURS), ("backward", OURS), ("backward", SPLIT), ("backward", FUSED),
    ]  # fmt: skip
    timed = {c.name: c.subjects for c in gpu_cases.cases() if FUSED in c.subjects}
    assert {f"causal-T4096-D{width}" for width in (64, 128, 256)} <= set(timed)
    assert all(SPLIT in subjects for subjects in timed.values())


def test_grouped_heads_are_judged() -> None:
    """The benchmark's judge, where Hk is less than Hq, against the reference."""
    case = small("grouped", kv_heads=2, length=24)
    arrays = {n: x.astype(np.float64) for n, x in case.arrays().items()}
    assert arrays["key"].shape == (2, 2, 24, 16)
    found = judge.answer(case, arrays, np.arange(24), judge.exact).results
    mask = np.tril(np.ones((24, 24), bool))
    wanted = reference(arrays["query"], arrays["key"], arrays["value"], mask=mask)
    np.testing.assert_allclose(found["out"], wanted.out, rtol=0, atol=1e-12)
    # Of one entry of key and value each, by central differences.
    for name in ("key", "value"):
        moved = []
        for step in (1e-6, -1e-6):
            changed = {**arrays, name: arrays[name].copy()}
            changed[name][1, 1, 3, 5] += step
            out = reference(changed["query"], changed["key"], changed["value"], mask=mask).out
            moved.append(float((out * arrays["cotangent"]).sum()))
        slope = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(found[name][1, 1, 3, 5], slope, rtol=1e-6, atol=1e-8)


def test_decoding_is_timed_as_a_graph(tmp_path: Path) -> None:
    machine = Machine()
    case = small(
        "decode", queries=1, mask="full", kind="decode", subjects=(OURS, COPY),
        directions=("forward",), kv_heads=2,
    )  # fmt: skip
    whole, _ = gpu.run(machine, tmp_path / "x.json", given=[case], stages=["bench"])
    assert machine.graphs == 1
    run = Run(gpu.measured_of(whole), [case])
    # The copy moves twice the bytes in 0.5 ms that we read in 2.
    assert run.bandwidth("decode") == pytest.approx(0.125)


def test_the_cases_are_what_the_protocol_says() -> None:
    found = gpu_cases.cases()
    assert len({case.name for case in found}) == len(found)
    for case in found:
        assert set(case.subjects) <= set(gpu_cases.SUBJECTS)
        assert case.dtype == "bfloat16"
        if case.kind in ("dense", "sparse"):
            assert case.batch * case.length == 16384
            assert case.heads * case.width == 2048
        if case.kind == "decode":
            assert case.cache_bytes >= 256e6
    lengths = {case.length for case in found if case.kind == "odd"}
    assert 4095 in lengths
    assert any(length % 128 == 64 for length in lengths)
    assert any(case.kv_heads and case.heads == 8 * case.kv_heads for case in found)


def test_promises_are_those_of_the_worst_case() -> None:
    better, less = Promise("x", 0.6, 0.8), Promise("y", 0.15, 0.08, more=False)
    assert better.verdict([0.9, 0.8]) == "aim met"
    assert better.verdict([0.9, 0.7]) == "met"
    assert better.verdict([0.9, 0.5, None]) == "missed"
    assert better.verdict([0.9, None]) == "incomplete"
    assert better.verdict([None]) == better.verdict([]) == "not measured"
    assert less.verdict([0.05]) == "aim met"
    assert less.verdict([0.1]) == "met"
    assert less.verdict([0.2]) == "missed"


def synthetic() -> list[Measured]:
    """Every subject of every case: ours in proportion to its work, the others at known ratios."""
    found = []
    for case in gpu_cases.cases():
        for direction in case.directions:
            mine = case.operations(direction) / 4e11
            for subject in case.subjects:
                times = {CUDNN: 0.7, FLASH: 1.2, COPY: 1.6, DROPOUT: 1.5}
                time = mine * times.get(subject, 1.0)
                rmse = 1e-3 if subject == OURS else 1.1e-3
                found.append(
                    Measured(case.name, subject, direction, "measured", "", (time, time), rmse)
                )
    return found


def test_targets_are_worked_out_of_a_run() -> None:
    found = {each.promise.name: each for each in Run(synthetic()).promises()}
    assert found["forward D128, T >= 4k, full, vs cuDNN"].worst == pytest.approx(0.7)
    assert found["forward D128, T >= 4k, full, vs cuDNN"].verdict == "met"
    assert len(found["forward D128, T >= 4k, full, vs cuDNN"].values) == 3
    assert found["forward vs FlashAttention-2"].verdict == "met"
    assert found["backward vs FlashAttention-2"].worst == pytest.approx(1.2)
    assert found["dropout 0.1 vs none, forward"].worst == pytest.approx(1 / 1.5)
    assert found["deterministic vs default backward"].verdict == "aim met"
    assert found["decode: share of copy bandwidth"].worst == pytest.approx(0.8)
    assert found["error against float64, vs FlashAttention-2"].verdict == "aim met"
    line = found["time against live blocks: off the line"]
    assert line.worst is not None
    assert line.worst < 0.1
    nothing = Run([]).promises()
    assert {each.verdict for each in nothing} == {"not measured"}
    assert len(nothing) == len(found)


def test_the_page_holds_what_was_measured_and_says_what_was_not() -> None:
    whole = {
        "version": 1,
        "gpu": "NVIDIA Stand-In 9",
        "facts": {"gpu": "NVIDIA Stand-In 9", "architecture": "sm_90"},
        "environment": {"commit": "abc", "date": "2026-01-01T00:00:00", "packages": {"torch": "9"}},
        "stages": {
            "conformance": {"status": "failed", "said": "a | == b ==", "commit": "d0e"},
            "bench": {"status": "passed", "said": "c"},
        },
        "measured": [m._asdict() for m in synthetic() if m.direction == "forward"],
    }
    whole["measured"][0].update(status="error", samples=(), problem="it | broke")
    text = gpu_page.page([whole])
    assert "## NVIDIA Stand-In 9" in text
    assert "| conformance | failed | d0e | b / a |\n| bench | passed |  | c |\n" in text
    assert "| forward vs FlashAttention-2 | ≥ 1.15 | ≥ 1.4 | 1.2 | incomplete |" in text
    assert "| backward vs FlashAttention-2 | ≥ 1 | ≥ 1.3 |  | not measured |" in text
    assert "it / broke" in text
    # Of cases that are alike in their ratio each one counts; the one that broke has none.
    count = sum(FLASH in case.subjects for case in gpu_cases.cases()) - 1
    assert re.search(rf"\| torch-sdpa-flash \| forward \| .* \| {count} \|\n", text)
    assert re.search(r"\| torch-sdpa-cudnn \| forward \| 0.70 \(\S+\) \| [\d.]+ ", text)
    assert "rounds of turns" not in text
    hurried = {**whole, "pace": {**gpu.HURRIED._asdict(), "minutes": 9.0}}
    said = "In 9 minutes: 3 rounds of turns, and answers checked on 8 key heads of each case."
    assert said in gpu_page.page([hurried])
    assert "No figure has been measured" not in text
    assert "Figures are those of the commit that stands above them" in text
    assert re.search(
        r"\| causal-T4096-D128 \| forward \| torch-sdpa-cudnn \| [\d.]+ .* 0.70 \|", text
    )


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    runs = [json.loads(p.read_text("utf-8")) for p in (ROOT / "benchmarks/results").glob("*.json")]
    runs = [whole for whole in runs if "gpu" in whole]
    assert (ROOT / "docs/GPU.md").read_text("utf-8") == gpu_page.page(runs)


def test_the_readme_says_what_the_page_says() -> None:
    """Of everybody we are compared with the worst and the best case, on the GPU measured first."""
    page, readme = ((ROOT / at).read_text("utf-8") for at in ("docs/GPU.md", "README.md"))
    row = r"\| torch-\S+ \| (?:for|back)ward \| ([\d.]+) \(\S+\) \| ([\d.]+) \(\S+\) \| \d+ \|"
    found = re.findall(row, page)
    assert len(found) >= 6
    words = " ".join(readme.split())
    assert [f"{low} to {high}" in words for low, high in found[:6]] == [True] * 6


def test_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"version 1\. Got 2"):
        gpu.measured_of({"version": 2, "measured": []})


@pytest.mark.parametrize("command", ["gpu", "tune"])
def test_without_a_gpu_nothing_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Any:
        raise gpu.NoGpu("GPU benchmarks need a CUDA device that torch can use. Got none.")

    monkeypatch.setattr(gpu, "device", none)
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["bench", command])
    assert found.exit_code == 2
    assert "need a CUDA device" in found.output
    assert not list(tmp_path.iterdir())


def test_a_run_says_whose_tiles_it_measured_and_by_which_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "device", Machine)
    monkeypatch.setattr(gpu_stages, "called", lambda command, seconds, into: (0, "done"))
    monkeypatch.delenv(configs.VARIABLE, raising=False)
    monkeypatch.setattr("attn_core.cli_gpu.version", lambda name: f"{name} 9")
    found = []
    for tiles in (None, str(tmp_path / "mine.toml")):
        if tiles:
            monkeypatch.setenv(configs.VARIABLE, tiles)
        into = tmp_path / "x.json"
        CliRunner().invoke(app, ["bench", "gpu", "--stage", "doctor", "--json", str(into)])
        where = json.loads(into.read_text())["environment"]
        assert where["packages"]["triton"] == "triton 9"  # which compiled what is timed
        found.append(where["settings"].get(configs.VARIABLE))
    assert found == [None, tiles]


def test_names_of_stages_and_kernels_are_checked() -> None:
    assert CliRunner().invoke(app, ["bench", "gpu", "--stage", "benchs"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "tune", "--kernel", "delta"]).exit_code == 2


# --- Tuning. --------------------------------------------------------------------------------------


class Tuned(Machine):
    """Its time depends on what is chosen; large tiles do not fit."""

    def prepared(self, subject: str, case: GpuCase, direction: str) -> Any:
        name = {"full": "none", "causal": "positions", "documents": "mask"}[case.mask]
        name = "dropout" if subject == gpu_cases.DROPOUT else name
        about = ("sm_90", case.width, case.width, case.dtype, name)
        fused = configs.choose("fused", *about)
        kernel = "forward" if direction == "forward" else "fused" if fused.instead else "d_keys"
        chosen = configs.choose(kernel, *about)
        if chosen.rows * chosen.keys > 128 * 64:
            raise MemoryError("out of resources: shared memory")

        from types import SimpleNamespace

        return SimpleNamespace(run=lambda: chosen)

    class Timer:
        def sample(self, run: Callable[[], Any], repeats: int) -> float:
            chosen = run()
            found = 1000 / chosen.rows + 1 / chosen.keys + chosen.warps + chosen.stages
            return found * (0.5 if chosen.instead else 1.0)


class Split(Tuned):
    """Fused, it is slower."""

    class Timer:
        def sample(self, run: Callable[[], Any], repeats: int) -> float:
            return Tuned.Timer().sample(run, repeats) * (9.0 if run().instead else 1.0)


@pytest.mark.parametrize(("machine", "fused"), [(Tuned, True), (Split, False)])
def test_the_faster_of_split_and_fused_is_kept(
    machine: Any, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "mine.toml"))
    configs.forget()
    told: list[int] = []
    won, _ = tune.tune(
        machine(), kernels=("d_keys", "fused"), widths=(64,), say=lambda words: None,
        kept=lambda won: told.append(len(won)),
    )  # fmt: skip
    assert [entry.kernel for entry in won] == ["d_keys", "fused"] * 4
    assert told == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not any(entry.config.instead for entry in won if entry.kernel == "d_keys")
    tune.keep(won)
    for name in tune.CLASSES:
        found = configs.choose("fused", "sm_90", 64, 64, "bfloat16", name)
        assert found.instead is fused
    if fused:
        assert (found.rows, found.keys) == (128, 64)
    monkeypatch.undo()
    configs.forget()


class Parted(Machine):
    """dK and dV have a time each, or one for both; together it is `LOST` times as long."""

    LOST = 3.0

    def prepared(self, subject: str, case: GpuCase, direction: str) -> Any:
        name = {"full": "none", "causal": "positions", "documents": "mask"}[case.mask]
        name = "dropout" if subject == gpu_cases.DROPOUT else name
        about = ("sm_90", case.width, case.width, case.dtype, name)
        assert direction == "backward"
        one = configs.choose("d_keys", *about)
        ran = [configs.choose(n, *about) for n in configs.PARTS] if one.apart else [one]

        from types import SimpleNamespace

        return SimpleNamespace(run=lambda: ran)

    class Timer:
        def sample(self, run: Callable[[], Any], repeats: int) -> float:
            ran = run()
            whole = sum(1000 / c.rows + 100 / c.keys + c.warps + c.stages for c in ran)
            return whole * (Parted.LOST if len(ran) == 1 else 1.0)


class Together(Parted):
    class Timer:
        def sample(self, run: Callable[[], Any], repeats: int) -> float:
            found = Parted.Timer().sample(run, repeats)
            return found / Parted.LOST / 2 if len(run()) == 1 else found


@pytest.mark.parametrize(("machine", "apart"), [(Parted, True), (Together, False)])
def test_the_faster_of_one_launch_and_two_is_kept(machine: Any, apart: bool) -> None:
    said: list[str] = []
    kernels = ("d_value", "d_key", "d_keys")
    won, tried = tune.tune(
        machine(), kernels=kernels, widths=(64, 256), classes=("none",), say=said.append
    )
    # At width 64 both fit in one launch, and it alone is tried.
    assert [(e.kernel, e.widths) for e in won] == [
        ("d_keys", (64,)),
        *[(kernel, (256,)) for kernel in kernels],
    ]
    assert [e.config.apart for e in won] == [False, False, False, apart]
    best = configs.Config(128, 128, 4, 2, True)
    assert [(e.config.rows, e.config.keys, e.config.warps) for e in won[1:3]] == [(128, 128, 4)] * 2
    assert (won[3].config == best) is not apart
    assert {each.config.apart for each in tried if each.kernel == "d_keys"} == {True, False}
    assert not any(each.config.apart for each in tried if each.width == 64)


def test_tuning_ends_in_time_with_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = gpu.Limit
    monkeypatch.setattr(tune, "Limit", lambda minutes: limited(minutes, Clock(1.0)))
    said: list[str] = []
    won, tried = tune.tune(
        Tuned(), kernels=("forward",), widths=(64,), minutes=1.5, say=said.append
    )
    assert len(won) == 1
    assert len(tried) < 90
    assert said[-1] == "no time was left for forward D64 positions and 2 more"


def test_what_spills_is_not_timed_and_large_tiles_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled first; what is in force is timed whatever the compiler says of it."""
    asked: list[Any] = []

    def run(jobs: Sequence[Any], processes: int) -> list[Any]:
        asked.extend(jobs)
        return [ahead.Finding(job, job.chosen, 0.1, spills=job.chosen.warps - 4) for job in jobs]

    monkeypatch.setattr(ahead, "run", run)
    now = configs.choose("forward", "sm_90", 64, 64, "bfloat16", "none")
    _, tried = tune.tune(
        Tuned(), kernels=("forward",), widths=(64,), classes=("none",), say=print, clean=_clean
    )
    timed = [each.config for each in tried]
    assert timed[0] == now
    assert {job.sample.name for job in asked} == {"plain"}
    assert len(asked) > len(timed) > 2
    assert all(config.warps == 4 for config in timed[1:])
    sizes = [config.rows * config.keys for config in timed[1:]]
    assert sizes == sorted(sizes, reverse=True)


def test_what_a_table_refuses_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The split would run, and its time stand under the name of the fused."""
    said: list[str] = []
    monkeypatch.setattr(Tuned, "facts", lambda self: {"architecture": "sm_999", "gpu": "another"})
    won, tried = tune.tune(Tuned(), kernels=("fused",), widths=(64,), say=said.append)
    assert won == tried == []
    assert all("not tried, since the table refuses it" in words for words in said)
    assert len(said) == len(tune.CLASSES)


def test_what_is_fastest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "mine.toml"))
    configs.forget()
    won, tried = tune.tune(Tuned(), kernels=("forward",), widths=(128,), say=lambda words: None)
    assert len(won) == len(tune.CLASSES) == 4
    best = configs.Config(128, 64, 4, 2, True)
    assert all(entry.config == best for entry in won)
    assert any("shared memory" in each.problem for each in tried)
    assert configs.choose("forward", "sm_90", 128, 128, "bfloat16", "none") != best
    assert tune.keep(won) == tmp_path / "mine.toml"
    assert configs.choose("forward", "sm_90", 128, 128, "bfloat16", "none") == best
    assert configs.choose("forward", "sm_90", 64, 64, "bfloat16", "none") != best
    assert "measured on NVIDIA Stand-In 9" in configs.yours()[0].source
    # Again, for another width: what was there stays, and is not there twice.
    more, _ = tune.tune(Tuned(), kernels=("forward",), widths=(64, 128), say=lambda words: None)
    tune.keep(more)
    assert len(configs.yours()) == 8
    configs.forget()


def test_tiles_of_width_256_are_tried_there_alone() -> None:
    now = configs.choose("d_keys", "sm_90", 256, 256, "bfloat16", "positions")
    assert set(tune.WIDEST) == {"d_keys", "d_query"}
    for kernel, tiles in tune.WIDEST.items():
        more = [configs.Config(*tile) for tile in tiles]
        wide, narrow = (tune.candidates(kernel, now, True, width) for width in (256, 128))
        assert wide[0] == narrow[0] == now
        assert len(set(wide)) == len(wide)
        assert set(more) <= set(wide)
        assert not set(more) & set(narrow)
    assert tune.candidates("forward", now, True, 256) == tune.candidates("forward", now, True, 64)


def test_dropout_is_tuned_by_a_case_that_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tiles are its own: timed without dropout they would be those of a causal mask."""
    asked: list[tuple[str, str, str]] = []

    class Dropping(Tuned):
        def prepared(self, subject: str, case: GpuCase, direction: str) -> Any:
            asked.append((subject, case.name, direction))
            return super().prepared(subject, case, direction)

    compiled: list[str] = []

    def clean(question: Any, found: Sequence[Any]) -> Sequence[Any]:
        compiled.append(question.sample)
        return found

    won, _ = tune.tune(
        Dropping(), kernels=("forward", "d_keys"), widths=(64,), classes=("positions", "dropout"),
        say=lambda words: None, clean=clean,
    )  # fmt: skip
    assert [(e.kernel, e.classes) for e in won] == [
        ("forward", ("positions",)), ("d_keys", ("positions",)),
        ("forward", ("dropout",)), ("d_keys", ("dropout",)),
    ]  # fmt: skip
    assert compiled == ["causal", "causal", "dropout", "dropout"]
    assert set(asked) == {
        (subject, name, direction)
        for subject, name in (
            (gpu_cases.OURS, "tune-causal-D64"),
            (gpu_cases.DROPOUT, "tune-causal-dropout-D64"),
        )
        for direction in ("forward", "backward")
    }
