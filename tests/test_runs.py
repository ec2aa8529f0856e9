"""Runs of the suite: their parts, time limits, interruption, and errors as part of the meaning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import attn_core
from attn_core import cli
from attn_core.backends import numpy as backend
from attn_core.conformance import cases, judgement, misuse, runner, subjects
from attn_core.conformance.runner import Work, plan, run, shared_out

HANGING = """
import os, time
import numpy as np
from attn_core.conformance import subject

@subject("numpy", backward=False)
def slow(query, key, value):
    {body}
    return np.zeros((*query.shape[:3], value.shape[3]), query.dtype)
"""


def stranger(folder: Path, body: str) -> None:
    (folder / "stranger.py").write_text(HANGING.format(body=body))


def test_each_work_is_shared_out_among_the_workers() -> None:
    names = tuple(f"case-{i}" for i in range(100))
    both = [Work("jax", "eager", names), Work("tf", "eager", names[:40])]
    assert shared_out(both, 2) == [
        Work("jax", "eager", names[:50]),
        Work("jax", "eager", names[50:]),
        both[1],  # what is little stays together
    ]
    assert shared_out(both, 1) == both
    assert [len(part.cases) for part in shared_out(both[:1], 8)] == [40, 40, 20]
    told: list[Any] = []
    verdicts = run(["numpy"], tier="smoke", jobs=2, seen=told.append)
    assert [v.case for v in verdicts] == list(plan(["numpy"], tier="smoke")[0].cases)
    assert len(told) == len(verdicts)


def test_a_case_that_hangs_is_ended_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stranger(tmp_path, "if query.shape[2] == 26: time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verdicts = run(["stranger:slow"], cases=["plain", "model-vit", "width-1"], timeout=6)
    by_name = {v.case: v for v in verdicts}
    assert by_name["model-vit"].problem == "it gave no answer within 6 s, and was ended"
    assert by_name["plain"].status == by_name["width-1"].status == "failed"
    assert by_name["width-1"].shares["out"] > 1


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_of_a_worker_wait_without_spinning_unless_they_are_told_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: str | None
) -> None:
    stranger(tmp_path, "raise ValueError(os.environ['OMP_WAIT_POLICY'])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    (verdict,) = run(["stranger:slow"], cases=["width-1"])
    assert verdict.problem == f"ValueError: {chosen or 'PASSIVE'}"


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 11)", "raise SystemExit(2)"])
def test_a_subject_that_takes_its_process_down_costs_its_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str
) -> None:
    stranger(tmp_path, f"if query.shape[2] == 26: {end}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verdicts = run(["stranger:slow"], cases=["plain", "model-vit", "width-1"])
    assert {v.case for v in verdicts if v.problem} == {"model-vit"}
    assert len(verdicts) == 3


def test_a_process_that_ends_well_without_an_answer_costs_its_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stranger(tmp_path, "if query.shape[2] == 26: os._exit(0)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verdicts = run(["stranger:slow"], cases=["plain", "model-vit", "width-1"])
    problem = {v.case: v.problem for v in verdicts}["model-vit"]
    assert problem.startswith("the worker ended with status 0")
    assert len(verdicts) == 3


def test_a_subject_that_cannot_be_imported_in_time_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "forever.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "STARTUP", 3.0)
    with pytest.raises(ImportError, match="forever:f was not imported within 3 s"):
        run(["forever:f"], cases=["plain"], timeout=2)


def test_bad_arguments_are_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stranger(tmp_path, "pass")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match="`form` must be one of eager for stranger:slow"):
        run(["stranger:slow"], forms=["jit"], cases=["plain"])
    with pytest.raises(ImportError, match=r"must have a subject 'slwo'. Got none. Did you mean"):
        run(["stranger:slwo"], cases=["plain"])
    command = ["conformance", "run", "--subject", "stranger:slow", "--case", "plain"]
    for wrong in (["--jobs", "0"], ["--timeout", "0"], ["--html", str(tmp_path)]):
        assert CliRunner().invoke(cli.app, [*command, *wrong]).exit_code == 2


def test_a_subject_that_answers_nothing_is_not_green(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stranger(tmp_path, "pass")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = CliRunner().invoke(
        cli.app, ["conformance", "run", "--subject", "stranger:slow", "--case", "sinks-mixed"]
    )
    assert done.exit_code == 1
    assert "stranger:slow answered no case: nothing has been judged." in done.stdout


# A shell starts what it puts into the background deaf to Ctrl-C, and its children inherit that.
HEARING = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def test_ctrl_c_keeps_what_was_done(tmp_path: Path) -> None:
    stranger(tmp_path, "if query.shape[2] == 26: open('asleep', 'w').close(); time.sleep(600)")
    into = tmp_path / "report.json"
    command = [str(Path(sys.executable).with_name("attn-core")), "conformance", "run"]
    command += ["--subject", "stranger:slow", "--case", "plain", "--case", "model-vit"]
    process = subprocess.Popen(
        [sys.executable, "-c", HEARING, *command, "--json", str(into)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        while not (tmp_path / "asleep").exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        # As a terminal does: to every process in the foreground.
        os.killpg(process.pid, signal.SIGINT)
        told, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert "interrupted: " in told
    rows = json.loads(into.read_text())["verdicts"]
    assert [row["case"] for row in rows] == ["plain"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"stranger.py", "asleep", "report.json", "__pycache__"}


def test_every_misuse_is_refused_in_the_words_written_down() -> None:
    names = [each.name for each in misuse.MISUSES]
    assert len(names) == len(set(names)) >= 45
    assert not set(names) & set(judgement.BY_NAME)
    ours = subjects.find("numpy")
    for name in names:
        verdict = judgement.judge(name, ours, backend, "eager")
        assert verdict.passed, verdict.problem


@pytest.mark.parametrize("fault", ["accepts", "class", "words"])
def test_another_answer_to_misuse_is_told(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def function(**arguments: Any) -> Any:
        try:
            return attn_core.attention(**arguments)
        except (TypeError, ValueError) as error:
            if fault == "class":
                raise RuntimeError(str(error)) from error
            if fault == "words":
                raise type(error)(f"{error} ") from error

    ours = subjects.Ours("numpy", "numpy", function)
    for each in misuse.MISUSES:
        verdict = judgement.judge(each.name, ours, backend, "eager")
        assert verdict.status == "error"
        assert verdict.problem.startswith(f"must raise {each.error.__name__}: ")


def test_misuse_is_asked_of_our_own_backends_alone_and_in_their_first_form() -> None:
    asked = {(w.subject, w.form): set(w.cases) for w in plan(["torch", "torch-sdpa"], ["all"])}
    every = {each.name for each in misuse.MISUSES}
    assert every <= asked["torch", "eager"]
    for column in (("torch", "aot_eager"), ("torch", "inductor"), ("torch-sdpa", "eager")):
        assert not every & asked[column]
    assert set(cases.SMOKE) | every == set(plan(["numpy"], tier="smoke")[0].cases)
    only = plan(["numpy"], cases=["refused-scale"])[0].cases
    assert only == ("refused-scale-nan", "refused-scale-boolean")
