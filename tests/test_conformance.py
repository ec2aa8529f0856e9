"""The first conformance matrix: it passes what is right, and planted faults turn it red."""

from __future__ import annotations

import json
import types
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from attn_core import attention, cli, masks, registry
from attn_core.conformance import cases, judgement, report, tolerance
from attn_core.conformance.runner import FORMS, plan, run
from attn_core.conformance.subjects import Ours
from attn_core.language.values import Dropout

NUMPY = registry.load("numpy")


def subject(alter: Any) -> Any:
    """The numpy backend with its arguments, or its answer, altered on the way."""

    def vjp(arguments: dict[str, Any], cotangents: dict[str, Any], form: str, function: Any) -> Any:
        changed = dict(arguments)
        after = alter(changed)
        output, gradients = NUMPY.vjp(changed, cotangents, form, function)
        return after(output, gradients) if after else (output, gradients)

    same = {name: getattr(NUMPY, name) for name in ("NAME", "from_numpy", "to_numpy")}
    return types.SimpleNamespace(vjp=vjp, **same)


def failing(alter: Any, names: list[str]) -> list[str]:
    ours = Ours("numpy", "numpy", attention)
    planted = subject(alter)
    return [name for name in names if not judgement.judge(name, ours, planted, "eager").passed]


def untouched(arguments: dict[str, Any]) -> None:
    return None


def wrong_scale(arguments: dict[str, Any]) -> None:
    arguments["scale"] = 1.0


def top_left(arguments: dict[str, Any]) -> None:
    arguments["query_offset"] = "start"


def inverted(arguments: dict[str, Any]) -> None:
    arguments["mask"] = ~arguments["mask"]


def window_off_by_one(arguments: dict[str, Any]) -> None:
    arguments["mask"] = masks.causal() & masks.window(left=3)


def no_sinks(arguments: dict[str, Any]) -> Any:
    del arguments["sinks"]
    return lambda output, gradients: (output, gradients | {"sinks": np.zeros(4, np.float32)})


def other_seed(arguments: dict[str, Any]) -> None:
    arguments["dropout"] = Dropout(arguments["dropout"].rate, 8)


def dead_gradient(arguments: dict[str, Any]) -> Any:
    return lambda output, gradients: (output, gradients | {"bias": 0 * gradients["bias"]})


def swapped_heads(arguments: dict[str, Any]) -> None:
    arguments["key"] = arguments["key"][:, ::-1]


def one_nan(arguments: dict[str, Any]) -> Any:
    def after(output: Any, gradients: Any) -> Any:
        gradients["query"][0, 0, 0, 0] = np.nan
        return output, gradients

    return after


def empty_rows_average(arguments: dict[str, Any]) -> Any:
    def after(output: Any, gradients: Any) -> Any:
        empty = output.lse == -np.inf
        return output._replace(out=np.where(empty[..., None], 0.01, output.out)), gradients

    return after


def narrow(arguments: dict[str, Any]) -> Any:
    return lambda output, gradients: (
        output._replace(out=output.out.astype(np.float16)),
        gradients,
    )


def coarse(arguments: dict[str, Any]) -> Any:
    return lambda output, gradients: (
        output._replace(out=output.out.astype(np.float16).astype(np.float32)),
        gradients,
    )


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (wrong_scale, "plain"),
        (top_left, "mask-causal"),
        (inverted, "mask-causal"),
        (window_off_by_one, "mask-window-causal"),
        (no_sinks, "sinks"),
        (other_seed, "dropout"),
        (dead_gradient, "bias-bhqk"),
        (swapped_heads, "plain"),
        (one_nan, "plain"),
        (empty_rows_average, "empty-rows"),
        (narrow, "plain"),
        (coarse, "plain"),
    ],
)
def test_a_planted_fault_turns_its_case_red(fault: Any, case: str) -> None:
    assert failing(untouched, [case]) == []
    assert failing(fault, [case]) == [case]


def test_every_case_has_a_name_of_its_own_and_a_question_that_repeats() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert set(cases.SAMPLE) <= set(names)
    for case in cases.CASES:
        first, second = case.question(), case.question()
        for name in ("query", "key", "value"):
            assert np.array_equal(first.call[name], second.call[name], equal_nan=True)
            assert first.call[name].dtype.name == case.dtype


def test_poison_is_really_there() -> None:
    for name in ("poison-keys", "poison-values", "poison-queries", "poison-bias", "poison-all"):
        asked = judgement.BY_NAME[name].question()
        held = [x for x in asked.call.values() if isinstance(x, np.ndarray)]
        assert any(not np.isfinite(x).all() for x in held), name
    upstream = judgement.BY_NAME["poison-upstream"].question().cotangents
    assert all(np.isnan(upstream[name]).any() for name in upstream)


class TestShare:
    want = np.array([1.0, -2.0, 0.5])

    def share(self, got: Any, plain: Any = None, dtype: str = "float32", **way: Any) -> float:
        plain = self.want if plain is None else np.asarray(plain)
        options = {"direction": "out", "logit": 0.0} | way
        return tolerance.share(np.asarray(got), self.want, plain, dtype, **options)

    def test_is_the_error_over_twice_the_plain_one_and_a_floor(self) -> None:
        step = 2.0**-20
        floor = tolerance.FLOOR["float32"] * 2.0
        got = self.want + np.array([0, step, 0])
        assert self.share(got) == pytest.approx(step / floor)
        assert self.share(got, self.want + np.array([0, 0, step])) == pytest.approx(
            step / (2 * step + floor)
        )

    def test_a_cap_holds_whatever_the_plain_one_does(self) -> None:
        got = self.want + np.array([0, 0.01, 0])
        cap = tolerance.CAP["out"]["float32"] * 2.0
        assert self.share(got, self.want + 1) == pytest.approx(0.01 / cap)
        assert self.share(got, self.want + 1, logit=100.0) == pytest.approx(0.0001 / cap)

    def test_nan_infinity_and_shape_never_pass(self) -> None:
        assert self.share([1.0, np.nan, 0.5]) == np.inf
        assert self.share([1.0, np.inf, 0.5]) == np.inf
        assert self.share([1.0, -2.0]) == np.inf
        assert self.share([1.0, np.nan, 0.5], [np.nan] * 3) == np.inf

    def test_infinities_of_the_judge_are_matched_exactly(self) -> None:
        want = np.array([-np.inf, 1.0])
        for got, passes in (([-np.inf, 1.0], True), ([-1e30, 1.0], False), ([np.inf, 1.0], False)):
            found = tolerance.share(np.asarray(got), want, want, "float32", "out", 0.0)
            assert (found <= 1) == passes

    def test_where_the_judge_says_zero_only_zero_will_do(self) -> None:
        zero = np.zeros(3)
        assert tolerance.share(zero, zero, zero, "float32", "out", 0.0) == 0
        assert tolerance.share(zero + 1e-30, zero, zero, "float32", "out", 0.0) == np.inf


def test_forms_are_those_of_the_backends() -> None:
    assert FORMS["numpy"] == NUMPY.FORMS


def test_a_plan_names_backends_forms_and_cases() -> None:
    work = plan(["torch", "numpy"], ["all"], ["mask-causal"])
    assert [(w.subject, w.form) for w in work] == [
        *[("torch", form) for form in FORMS["torch"]],
        ("numpy", "eager"),
    ]
    assert {w.cases for w in work} == {("mask-causal",)}
    sampled = [w for w in plan(["torch"], ["all"]) if w.form == "inductor"]
    assert sampled[0].cases == tuple(c.name for c in cases.CASES if c.name in cases.SAMPLE)
    for bad, words in (
        ({"subjects": ["torhc"]}, "Did you mean 'torch'"),
        ({"subjects": ["jax"], "forms": ["jitt"]}, "Did you mean 'jit'"),
        ({"subjects": ["jax"], "cases": ["nothing"]}, "must name a case"),
        ({"subjects": ["jax"], "cases": ["maks-causl"]}, "Did you mean 'mask-causal'"),
        ({"subjects": ["jax"], "tier": "smok"}, "Got 'smok'. Did you mean 'smoke'"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(**bad)  # type: ignore[arg-type]


def test_a_run_judges_in_workers_and_tells_of_each_verdict() -> None:
    told: list[Any] = []
    verdicts = run(["numpy"], cases=["mask-"], seen=told.append)
    assert len(verdicts) > 20
    assert all(v.passed for v in verdicts)
    assert told == verdicts


def test_a_worker_that_dies_costs_its_case_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    # The worker imports sitecustomize first: this one ends the process within one case.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, attn_core.conformance.judgement as j\n"
        "judge = j.judge\n"
        "def dying(name, *rest):\n"
        "    if name == 'mask-causal': os._exit(7)\n"
        "    return judge(name, *rest)\n"
        "j.judge = dying\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verdicts = run(["numpy"], cases=["mask-c", "mask-window-0"])
    assert {v.case: v.passed for v in verdicts} == {
        "mask-causal": False,
        "mask-window-0": True,
        "mask-chunks": True,
    }
    assert "status 7" in next(v for v in verdicts if v.case == "mask-causal").problem


def test_the_command_prints_a_matrix_and_fails_by_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    into = tmp_path / "verdicts.json"
    arguments = ["conformance", "run", "--backend", "numpy", "--case", "mask-c"]
    done = CliRunner().invoke(cli.app, [*arguments, "--json", str(into)])
    assert done.exit_code == 0
    assert "mask-causal" in done.stdout
    assert "2 passed, 0 failed" in done.stdout
    rows = json.loads(into.read_text())["verdicts"]
    assert [row["case"] for row in rows] == ["mask-causal", "mask-chunks"]
    assert 0 < rows[0]["worst"] <= 1

    def red(*_: Any, **__: Any) -> list[judgement.Verdict]:
        return [judgement.Verdict("mask-causal", "numpy", "eager", {"out": 3.0})]

    monkeypatch.setattr("attn_core.conformance.runner.run", red)
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1
    assert "out: 3 of what is allowed" in done.stdout
    done = CliRunner().invoke(cli.app, ["conformance", "run", "--backend", "torhc"])
    assert done.exit_code == 2
    said = CliRunner().invoke(cli.app, ["--version"])
    assert (said.exit_code, said.output) == (0, f"{version('attn-core')}\n")


def test_a_report_is_never_half_written(tmp_path: Any) -> None:
    into = tmp_path / "verdicts.json"
    into.write_text("before")
    bad = judgement.Verdict("a", "numpy", "eager", {"out": float("inf")})
    report.save([bad], into)
    row = json.loads(into.read_text())["verdicts"][0]
    assert row["passed"] is False
    assert row["worst"] is None
    assert list(tmp_path.iterdir()) == [into]
