"""What the probe's own process tries, and what it prints; on a device that stands in for a GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_calls import DEVICE

from attn_core.backends.torch import probe, triton_launch, triton_probe
from attn_core.backends.torch.triton_probe import FIRST, Trial

HERE = torch.device(DEVICE)
NAME, OTHER = "A GPU (sm_90)", "Another (sm_80)"


@pytest.mark.parametrize("trial", [FIRST, Trial("float16", 256), Trial("float32", 256)])
def test_kernels_agree_with_the_formula(trial: Trial) -> None:
    assert triton_probe.error_on(HERE, trial) < triton_probe._ALLOWED[trial.dtype] / 2


def printed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: dict[Trial, Any],
    settled: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """The lines of a probe of two kinds of devices; trials on the first of them come out so."""

    def error_on(device: torch.device, trial: Trial) -> float:
        found = wrong.get(trial, 0.0) if device.index == 1 else 0.0
        if isinstance(found, Exception):
            raise found
        return float(found)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_probe, "kinds", lambda: {NAME: [1, 2], OTHER: [0]})
    monkeypatch.setattr(triton_launch, "architecture", lambda device: f"of {device}")
    monkeypatch.setattr(
        triton_probe, "hazard", lambda architecture: "oh" if architecture == "of cuda:1" else None
    )
    wide = Trial("bfloat16", 256)
    monkeypatch.setattr(triton_probe, "trials", lambda device: [Trial("bfloat16", 64), wide])
    monkeypatch.setattr(triton_probe, "error_on", error_on)
    triton_probe.main(settled)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("room", "asked"), [(65_536, True), (101_376, False), (None, False)])
def test_float32_is_tried_where_there_is_little_room(
    room: int | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turing has too little for the widest tiles; of a GPU that says nothing nothing is known."""
    has = SimpleNamespace() if room is None else SimpleNamespace(shared_memory_per_block_optin=room)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: has)
    tried = triton_probe.trials(torch.device("cuda", 0))
    assert tried[:2] == [Trial("bfloat16", 64), Trial("bfloat16", 256)]
    assert tried[2:] == [Trial("float32", 256)] * asked


def test_every_trial_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(monkeypatch, capsys, {})
    trials = [["float16", 64], ["bfloat16", 64], ["bfloat16", 256]]
    each = [[name, *trial] for name in (NAME, OTHER) for trial in trials]
    assert [line["trying"] for line in lines] == [["", "float16", 64], *each, None]
    assert [[gpu["problem"] for gpu in line["gpus"]] for line in lines] == [
        *([], [None, None], ["", None], ["", None]),
        *(["", None], ["", ""], ["", ""], ["", ""]),
    ]
    last = lines[-1]
    assert [(gpu["name"], gpu["at"]) for gpu in last["gpus"]] == [(NAME, [1, 2]), (OTHER, [0])]
    assert [gpu["narrower"] for gpu in last["gpus"]] == [[], []]
    assert (last["problem"], last["hazards"]) == ("", [f"{NAME}: oh"])


@pytest.mark.parametrize(("near", "tried"), [(0, [1, 0]), (1, [1, 0]), (2, [2, 0])])
def test_a_kind_is_tried_on_the_gpu_that_is_asked_about(
    near: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    kinds = {NAME: [1, 2], OTHER: [0]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_probe, "kinds", lambda: kinds)
    monkeypatch.setattr(triton_probe, "hazard", lambda architecture: None)
    monkeypatch.setattr(triton_launch, "architecture", str)
    monkeypatch.setattr(triton_probe, "trials", lambda device: [])
    monkeypatch.setattr(
        triton_probe, "error_on", lambda device, trial: seen.append(device.index) or 0.0
    )
    triton_probe.main((), near)
    assert seen == tried


def test_what_fails_alone_is_told_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {Trial("bfloat16", 64): float("nan"), Trial("bfloat16", 256): RuntimeError("no room")}
    last = printed(monkeypatch, capsys, bad)[-1]
    assert last["problem"] == ""
    here, other = last["gpus"]
    assert here["problem"] == other["problem"] == ""
    first, second = here["narrower"]
    assert other["narrower"] == []
    assert first[:2] == ["bfloat16", 64]
    assert "Got an error of nan" in first[2]
    assert second[:2] == ["bfloat16", 256]
    assert second[2].endswith("Got RuntimeError: no room")
    found = probe._part(json.dumps(last), "it ended")
    assert found is not None
    assert found.on(1).narrower == found.on(2).narrower == (tuple(first), tuple(second))
    assert found.on(0).narrower == ()


@pytest.mark.parametrize("wrong", [1.0, RuntimeError("PTX of a later version")])
def test_where_the_first_fails_nothing_works_there(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(monkeypatch, capsys, {FIRST: wrong})
    here, other = lines[-1]["gpus"]
    assert here["problem"].endswith("of 1." if wrong == 1.0 else "PTX of a later version")
    assert NAME in here["problem"]
    assert other["problem"] == ""
    assert [line["trying"][0] for line in lines[1:-1]] == [NAME, OTHER, OTHER, OTHER]


def test_what_an_earlier_process_tried_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(monkeypatch, capsys, {}, settled=(NAME,))
    assert {line["trying"][0] for line in lines[1:-1]} == {OTHER}
    assert [gpu["problem"] for gpu in lines[-1]["gpus"]] == [None, ""]
