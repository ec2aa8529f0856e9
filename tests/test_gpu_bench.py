"""What `make gpu` does, on a machine that stands in for a GPU: cases, targets, results, page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from attn_core.benchmarks import gpu, gpu_cases, gpu_page, judge, tune
from attn_core.benchmarks.calls import Refused as Declined
from attn_core.benchmarks.gpu_cases import (
    COPY,
    CUDNN,
    DROPOUT,
    FLASH,
    OURS,
    GpuCase,
    Measured,
    Promise,
    Run,
)
from attn_core.cli import app
from attn_core.kernels import configs
from attn_core.reference import attention as reference

ROOT = Path(__file__).resolve().parent.parent


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


class Machine:
    """Answers by the judge, wrong where it is told to be; a call of n ms for subject n."""

    Refused = Declined
    MS: ClassVar[dict[str, float]] = {OURS: 2.0, FLASH: 3.0, CUDNN: 1.0, COPY: 0.5, DROPOUT: 4.0}

    def __init__(self, wrong: str = "", refused: str = "", broken: str = "") -> None:
        self.wrong, self.refused, self.broken = wrong, refused, broken
        self.graphs = 0

    def facts(self) -> dict[str, Any]:
        return {"gpu": "NVIDIA Stand-In 9", "architecture": "sm_90"}

    def prepared(self, subject: str, case: GpuCase, direction: str) -> Any:
        if subject == self.refused:
            raise Declined("it has no word for this.")
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

        from types import SimpleNamespace

        return SimpleNamespace(run=run, answer=answer)

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.graphs += 1
        return run

    class Timer:
        def sample(self, run: Callable[[], str], repeats: int) -> float:
            return Machine.MS[run()]


def test_a_run_is_checked_timed_and_written(tmp_path: Path) -> None:
    said: list[str] = []
    asked: list[list[str]] = []

    def call(command: list[str]) -> tuple[int, str]:
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
    assert gpu.SUBJECT in asked[0]
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
        Machine(), tmp_path / "x.json", stages=["conformance"], call=lambda command: (1, "2 failed")
    )
    assert gpu.failed(whole)


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
        "stages": {"conformance": {"status": "failed", "said": "a | b"}},
        "measured": [m._asdict() for m in synthetic() if m.direction == "forward"],
    }
    whole["measured"][0].update(status="error", samples=(), problem="it | broke")
    text = gpu_page.page([whole])
    assert "## NVIDIA Stand-In 9" in text
    assert "| forward vs FlashAttention-2 | 1.15 | 1.4 | 1.2 | incomplete |" in text
    assert "| backward vs FlashAttention-2 | 1 | 1.3 |  | not measured |" in text
    assert "it / broke" in text
    assert "No figure has been measured" not in text
    assert re.search(
        r"\| causal-T4096-D128 \| forward \| torch-sdpa-cudnn \| [\d.]+ .* 0.70 \|", text
    )


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    runs = [json.loads(p.read_text("utf-8")) for p in (ROOT / "benchmarks/results").glob("*.json")]
    runs = [whole for whole in runs if "gpu" in whole]
    assert (ROOT / "docs/GPU.md").read_text("utf-8") == gpu_page.page(runs)


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


def test_names_of_stages_and_kernels_are_checked() -> None:
    assert CliRunner().invoke(app, ["bench", "gpu", "--stage", "benchs"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "tune", "--kernel", "delta"]).exit_code == 2


# --- Tuning. --------------------------------------------------------------------------------------


class Tuned(Machine):
    """Its time depends on what is chosen; large tiles do not fit."""

    def prepared(self, subject: str, case: GpuCase, direction: str) -> Any:
        kernel = "forward" if direction == "forward" else "d_keys"
        name = {"full": "none", "causal": "positions", "documents": "mask"}[case.mask]
        chosen = configs.choose(kernel, "sm_90", case.width, case.width, case.dtype, name)
        if chosen.rows * chosen.keys > 128 * 64:
            raise MemoryError("out of resources: shared memory")

        from types import SimpleNamespace

        return SimpleNamespace(run=lambda: chosen)

    class Timer:
        def sample(self, run: Callable[[], Any], repeats: int) -> float:
            chosen = run()
            return 1000 / chosen.rows + 1 / chosen.keys + chosen.warps + chosen.stages


def test_what_is_fastest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "mine.toml"))
    configs.forget()
    won, tried = tune.tune(Tuned(), kernels=("forward",), widths=(128,), say=lambda words: None)
    assert len(won) == 3
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
    assert len(configs.yours()) == 6
    configs.forget()
