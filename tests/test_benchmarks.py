"""The benchmarks: sizes counted by brute force, planted mistakes, and workers that fail."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from support import seen

from attn_core import reference
from attn_core.benchmarks import check, judge, rooms, runner, subjects, worker
from attn_core.benchmarks.calls import Call, Refused
from attn_core.benchmarks.cases import BLOCK, BY_NAME, CASES, DIRECTIONS, Case, named
from attn_core.benchmarks.results import Measurement
from attn_core.conformance.plain import plain

MASKS = [("full", 0), ("causal", 0), ("window", 3), ("window", 200), ("documents", 64)]


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
