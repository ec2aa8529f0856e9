"""`impl="triton"` where kernels cannot run: the reasons, the probe, and that nothing is lost.

Nothing here loads triton; kernels themselves are in tests/kernels_only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_core import UnsupportedError, attention, explain, masks, registry
from attn_core.api import stated
from attn_core.backends.torch import probe

BACKEND = registry.load("torch")
X = torch.randn(1, 2, 4, 8)
_, ON_CPU, _, _ = stated({"query": X, "key": X, "value": X, "mask": masks.causal()})
ON_GPU = replace(ON_CPU, device="cuda")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    probe._found.clear()
    registry._cached.cache_clear()
    yield
    probe._found.clear()
    registry._cached.cache_clear()


def answers(monkeypatch: pytest.MonkeyPatch, **ran: Any) -> list[Any]:
    """Processes started from now on end so; each is counted."""
    started: list[Any] = []

    def run(command: Any, **options: Any) -> Any:
        started.append((command, options))
        if "raises" in ran:
            raise ran["raises"]
        return types.SimpleNamespace(**{"stdout": "", "stderr": "", "returncode": 0, **ran})

    monkeypatch.setattr(subprocess, "run", run)
    return started


NAME = "A GPU (sm_90)"


def gpu(name: str = NAME, at: tuple[int, ...] = (0,), **found: Any) -> dict[str, Any]:
    """What a probe's process says of a GPU."""
    return {"name": name, "at": at, "problem": "", "narrower": [], **found}


def said(*gpus: dict[str, Any], **found: Any) -> str:
    return "a line of a library's\n" + json.dumps(
        {"problem": "", "hazards": [], "gpus": gpus, **found}
    )


# --- On a CPU. ------------------------------------------------------------------------------------


def test_on_a_cpu_it_is_refused_without_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    started = answers(monkeypatch)
    with pytest.raises(UnsupportedError) as raised:
        attention(X, X, X, impl="triton")
    assert "  triton: the device must be cuda; or cpu, in Triton's interpreter" in str(raised.value)
    assert "  native: would answer" in str(raised.value)
    report = explain(X, X, X)
    assert report.impl == "native"
    assert {c.name: c.verdict for c in report.candidates}["triton"] == "refused"
    assert not started


def test_importing_and_answering_on_a_cpu_loads_no_triton() -> None:
    code = (
        "import sys, torch, attn_core\n"
        "x = torch.ones(1, 1, 2, 2)\n"
        "attn_core.attention(x, x, x)\n"
        "try:\n    attn_core.attention(x, x, x, impl='triton')\n"
        "except attn_core.UnsupportedError:\n    print('refused', 'triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "refused False\n"


def test_a_compiled_call_is_refused_alike() -> None:
    torch._dynamo.reset()
    f = torch.compile(lambda x: attention(x, x, x, impl="triton"), backend="aot_eager")
    with pytest.raises(Exception, match="triton: the device must be cuda"):
        f(X)


@pytest.mark.skipif(not probe.version(), reason="triton is missing")
def test_the_interpreter_must_be_chosen_before_triton_is_imported() -> None:
    code = (
        "import os, torch, attn_core, triton\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "x = torch.ones(1, 1, 2, 2)\n"
        "try:\n    attn_core.attention(x, x, x, impl='triton')\n"
        "except attn_core.UnsupportedError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triton: TRITON_INTERPRET must be the same as when triton was imported" in run.stdout


# --- On a GPU, as far as a process of its own says. -----------------------------------------------


def test_the_order_on_each_device() -> None:
    many, few = (replace(ON_GPU, q_len=n) for n in (17, 16))
    assert BACKEND.ranked(many) == ("native", "triton", "chunked", "reference")
    assert BACKEND.ranked(few) == ("triton", "native", "chunked", "reference")
    assert BACKEND.ranked(ON_CPU) == ("native", "chunked", "reference", "triton")


def test_it_is_asked_once_and_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = f"kernels must compile and run on {NAME}. Got PTXASError: no"
    started = answers(monkeypatch, stdout=said(gpu(problem=wrong)))
    for _ in range(3):
        plan = registry.choose(BACKEND, ON_GPU, "auto")
        registry._cached.cache_clear()
        assert plan.impl == "chunked"  # float32: torch's kernel has none on a GPU
        assert dict(plan.refused)["triton"] == (wrong,)
    with pytest.raises(UnsupportedError) as raised:
        registry.choose(BACKEND, ON_GPU, "triton")
    for reason in (wrong, "native: the dtype must be one of", "chunked: would answer"):
        assert reason in str(raised.value)
    (command, options), *rest = started
    assert not rest
    assert command[0] == sys.executable
    assert options["timeout"] == probe.TIMEOUT


def test_what_works_answers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, stdout=said(gpu(), hazards=["ptxas of old"]))
    monkeypatch.setattr(probe, "_loaded", lambda found: "")
    assert registry.choose(BACKEND, ON_GPU, "auto").impl == "triton"
    first, second = probe.lines()
    assert first.endswith("ready on A GPU (sm_90)")
    assert second == "triton: beware, ptxas of old"


@pytest.mark.parametrize(
    ("ran", "reason"),
    [
        (
            {"returncode": -6, "stderr": "LLVM ERROR: gone\n\n"},
            "Got signal SIGABRT: LLVM ERROR: gone",
        ),
        ({"returncode": 1, "stderr": ""}, "Got status 1: no message"),
        ({"stdout": "no json"}, "Got status 0: no message"),
        ({"stdout": "[1]"}, "Got status 0: no message"),
        ({"raises": subprocess.TimeoutExpired("python", 3)}, "within 300 s. Got no answer."),
        ({"raises": PermissionError("not allowed")}, "must start. Got not allowed."),
    ],
)
def test_a_probe_that_dies_is_a_reason(
    ran: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, **ran)
    found = probe.problem("cuda")
    assert found.endswith(reason)
    assert probe.lines()[0].endswith(f"not used: {found}")


def narrow(dtype: str, width: int, device: str = "cuda") -> str:
    """What `impl="triton"` refuses such a problem for."""
    asked = replace(ON_GPU, dtype=dtype, width=width, v_width=width, device=device)
    refused = dict(registry.choose(BACKEND, asked, "auto").refused).get("triton", ())
    return " ".join(refused)


@pytest.mark.parametrize(
    ("bad", "refused"),
    [
        (["bfloat16", 64, "No."], {("bfloat16", 64), ("bfloat16", 256)}),
        (["bfloat16", 256, "No."], {("bfloat16", 256), ("float16", 256)}),
        (["float32", 256, "No."], {("float32", 256)}),
    ],
)
def test_what_fails_alone_is_refused_alone(
    bad: list[Any], refused: set[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = answers(monkeypatch, stdout=said(gpu(narrower=[bad])))
    monkeypatch.setattr(probe, "_loaded", lambda found: "")
    for dtype in ("float16", "bfloat16", "float32"):
        for width in (64, 256):
            expected = f"No. It was {bad[0]} of width {bad[1]}."
            assert narrow(dtype, width) == (expected if (dtype, width) in refused else "")
    assert narrow("float16", 128) == narrow("float32", 128) == ""
    assert narrow("float16", 136) == ("" if (bad[0], bad[1]) != ("bfloat16", 256) else expected)
    wide = replace(ON_GPU, dtype=bad[0], width=256, v_width=256)
    with pytest.raises(UnsupportedError, match=f"It was {bad[0]} of width"):
        registry.choose(BACKEND, wide, "triton")
    assert len(started) == 1
    assert probe.lines()[1] == f"triton: not for {bad[0]} of width {bad[1]} on {NAME}: No."


@pytest.mark.parametrize("how", ["signal", "time"])
@pytest.mark.parametrize(("trying", "works"), [(64, {("float16", 64)}), (256, {("bfloat16", 64)})])
def test_a_later_trial_that_ends_the_probe_costs_no_more_than_what_it_tried(
    trying: int, works: set[tuple[str, int]], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = said(gpu(problem=None), trying=[NAME, "float16", 64]) + "\n"
    told += said(gpu(), trying=[NAME, "bfloat16", trying]) + "\n"
    if how == "signal":
        answers(monkeypatch, stdout=told, returncode=-11, stderr="gone")
    else:
        answers(monkeypatch, raises=subprocess.TimeoutExpired("python", 3, output=told.encode()))
    monkeypatch.setattr(probe, "_loaded", lambda found: "")
    assert probe.problem("cuda") == ""
    wrong = {"signal": "Got signal SIGSEGV: gone", "time": "Got no answer."}[how]
    for dtype, width in (("float16", 64), ("bfloat16", 64), ("bfloat16", 256), ("float16", 256)):
        found = narrow(dtype, width)
        if width == 256 or (dtype, trying) == ("bfloat16", 64):
            assert wrong in found
        else:
            assert found == ""
    assert all(narrow(*each) == "" for each in works)


OTHER = "Another (sm_75)"


def on(index: int) -> str:
    """Who answers on that GPU under "auto"; and why not our kernels, if so."""
    plan = registry.choose(BACKEND, replace(ON_GPU, place=index), "auto")
    return plan.impl + " ".join(dict(plan.refused).get("triton", ()))


def test_a_gpu_that_fails_costs_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [["float32", 256, "No."]]
    found = said(gpu(at=(0, 2), narrower=bad), gpu(OTHER, (1,), problem="It adds wrongly."))
    started = answers(monkeypatch, stdout=found)
    monkeypatch.setattr(probe, "_loaded", lambda found: "")
    assert (on(0), on(1), on(2)) == ("triton", "chunkedIt adds wrongly.", "triton")
    assert on(3).endswith("must be one that the probe saw: 0, 2, 1. Got cuda:3.")
    with pytest.raises(UnsupportedError, match="It adds wrongly"):
        registry.choose(BACKEND, replace(ON_GPU, place=1), "triton")
    wide = {n: replace(ON_GPU, width=256, v_width=256, place=n) for n in (0, 1)}
    assert "of width 256" in dict(registry.choose(BACKEND, wide[0], "auto").refused)["triton"][0]
    assert dict(registry.choose(BACKEND, wide[1], "auto").refused)["triton"] == (
        "It adds wrongly.",
    )
    first, second, third = probe.lines()
    assert first.endswith(f"ready on {NAME}")
    assert second == f"triton: not on {OTHER}: It adds wrongly."
    assert third == f"triton: not for float32 of width 256 on {NAME}: No."
    assert len(started) == 1


def test_where_every_gpu_fails_that_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = gpu(problem="It adds wrongly."), gpu(OTHER, (1,), problem="It is slow.")
    answers(monkeypatch, stdout=said(*bad))
    first, *rest = probe.lines()
    assert first.endswith(f", not used: the probe failed on {NAME}, {OTHER}")
    assert rest == [
        f"triton: not on {NAME}: It adds wrongly.",
        f"triton: not on {OTHER}: It is slow.",
    ]


@pytest.mark.parametrize("again", ["answers", "ends", "says nothing"])
def test_a_gpu_that_ends_the_probe_leaves_the_others_to_another_one(
    again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("first", "second", "third")
    untried = [gpu(name, (n,), problem=None) for n, name in enumerate(names)]
    died = said(gpu("first"), *untried[1:], trying=["second", "float16", 64], hazards=["Beware."])
    later = {
        "answers": {"stdout": said(*untried[:2], gpu("third", (2,)))},
        "ends": {"stdout": said(*untried, trying=["third", "float16", 64]), "returncode": -9},
        "says nothing": {"returncode": 1, "stderr": "no room"},
    }[again]
    ran = [{"stdout": died, "returncode": -11}, later]
    codes: list[str] = []

    def run(command: Any, **options: Any) -> Any:
        codes.append(command[-1])
        return types.SimpleNamespace(**{"stdout": "", "stderr": "", "returncode": 0, **ran.pop(0)})

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(probe, "_loaded", lambda found: "")
    assert probe.problem("cuda", 0) == ""
    assert probe.problem("cuda", 1).endswith("Got signal SIGSEGV: no message")
    third = {"answers": "", "ends": "SIGKILL: no message", "says nothing": "status 1: no room"}
    assert probe.problem("cuda", 2).endswith(third[again])
    assert bool(probe.problem("cuda", 2)) == bool(third[again])
    assert [code[code.index("main(") :] for code in codes] == [
        "main([], 0)",
        "main(['first', 'second'], 0)",
    ]
    assert probe.lines()[-1] == "triton: beware, Beware."


def test_words_of_another_encoding_are_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_bytes(b"#!/bin/sh\nprintf 'biblioth\\350que absente\\n' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert probe.problem("cuda").endswith("Got status 3: biblioth\ufffdque absente")


def test_the_probe_finds_what_this_process_found_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook, or after `python -c`, the first path is "", the folder that it stands in."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -P -c 'import beside; beside.say()'\n")
    python.chmod(0o755)
    saying = json.dumps({"problem": "", "hazards": [], "gpus": [gpu("one")]})
    (tmp_path / "beside.py").write_text(f"def say():\n    print({saying!r})\n")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert probe.finding() == probe.Finding((probe.Gpu("one"),))


def test_a_kind_is_tried_on_the_gpu_that_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, whoever asks next: of eight processes each has another one."""
    started = answers(monkeypatch, stdout=said(gpu(at=(0, 1, 2))))
    monkeypatch.setattr(probe, "_loaded", lambda found: "")
    assert probe.problem("cuda", 2) == probe.problem("cuda", 1) == ""
    (command, _), *rest = started
    assert command[-1].endswith("triton_probe.main([], 2)")
    assert not rest


def test_a_frozen_application_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started = answers(monkeypatch)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "must have an executable" in probe.problem("cuda")
    assert not started


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    started = answers(monkeypatch)
    monkeypatch.setattr(probe, "version", lambda: None)
    assert probe.problem("cuda") == (
        "triton must be installed: pip install 'attn-core[triton]'. Got none."
    )
    assert "not installed" in probe.lines()[0]
    assert not started


@pytest.mark.parametrize(("version", "safe"), [("3.6.0", True), ("3.7.0", False), ("3.9.1", False)])
def test_after_tensorflow_triton_is_not_loaded(
    version: str, safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = answers(monkeypatch, stdout=said(problem="asked"))
    monkeypatch.setattr(probe, "version", lambda: version)
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    monkeypatch.delitem(sys.modules, "triton._C.libtriton", raising=False)
    found = probe.problem("cuda")
    assert bool(started) == safe
    assert found == "asked" if safe else f"Got triton {version} and TensorFlow imported." in found
    monkeypatch.setitem(sys.modules, "triton._C.libtriton", types.ModuleType("libtriton"))
    assert probe.problem("cuda") == "asked"


def test_the_interpreter_is_not_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "must not be set where the device is cuda" in probe.problem("cuda")


def test_the_real_probe_answers() -> None:
    """In a process of its own, on whatever stands here."""
    found = probe.finding()
    if torch.cuda.is_available():
        assert found.gpus or found.problem
    elif probe.version():
        assert found == probe.Finding(problem="torch must see a GPU. Got none.")
