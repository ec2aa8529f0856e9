"""What the probe's own process tries, and what it prints; on a device that stands in for a GPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_calls import DEVICE

from attn_core.backends.torch import probe, triton_probe
from attn_core.backends.torch.triton_probe import FIRST, Trial

HERE = torch.device(DEVICE)


@pytest.mark.parametrize("trial", [FIRST, Trial("float16", 256), Trial("float32", 256)])
def test_kernels_agree_with_the_formula(trial: Trial) -> None:
    assert triton_probe.error_on(HERE, trial) < triton_probe._ALLOWED[trial.dtype] / 2


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: dict[Trial, Any]
) -> list[dict[str, Any]]:
    """The lines of a probe of one device, whose trials come out so."""

    def error_on(device: torch.device, trial: Trial) -> float:
        found = wrong.get(trial, 0.0)
        if isinstance(found, Exception):
            raise found
        return float(found)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_probe, "kinds", lambda: {"A GPU (sm_90)": HERE})
    monkeypatch.setattr(triton_probe, "hazard", lambda architecture: None)
    wide = Trial("bfloat16", 256)
    monkeypatch.setattr(triton_probe, "trials", lambda device: [Trial("bfloat16", 64), wide])
    monkeypatch.setattr(triton_probe, "error_on", error_on)
    triton_probe.main()
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
    tried = [line["trying"] for line in lines]
    assert tried == [["float16", 64]] * 2 + [["bfloat16", 64], ["bfloat16", 256], None]
    assert lines[-1]["devices"] == ["A GPU (sm_90)"]
    assert lines[-1]["narrower"] == []
    assert lines[-1]["problem"] == ""


def test_what_fails_alone_is_told_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {Trial("bfloat16", 64): float("nan"), Trial("bfloat16", 256): RuntimeError("no room")}
    last = printed(monkeypatch, capsys, bad)[-1]
    assert last["problem"] == ""
    first, second = last["narrower"]
    assert first[:2] == ["bfloat16", 64]
    assert "Got an error of nan" in first[2]
    assert second[:2] == ["bfloat16", 256]
    assert second[2].endswith("Got RuntimeError: no room")
    found = probe._part(json.dumps(last), "it ended")
    assert found is not None
    assert found.narrower == (tuple(first), tuple(second))


def test_where_the_first_fails_nothing_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = printed(monkeypatch, capsys, {FIRST: 1.0})[-1]
    assert "Got an error of 1." in last["problem"]
    assert last["trying"] is None
    assert last["devices"] == []
