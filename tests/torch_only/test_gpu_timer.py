"""How calls on a GPU are timed: what a device that stands in for one is told, in which order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attn_core.benchmarks import gpu_calls


def test_the_device_waits_until_the_host_has_said_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the events of a call stands the call alone: neither the sweep nor the host's time."""
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def elapsed_time(self, after: Any) -> float:
            return 3.0

    class Swept:
        def zero_(self) -> None:
            told.append("sweep")

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: Swept())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda n: told.append("wait" if n < 5_000_000 else "wait for long")
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("end"))
    found = gpu_calls.Timer().sample(lambda: told.append("call"), 2)
    assert found == 3.0
    calls = ["sweep", "wait", "event", "call", "event"] * 2
    assert told == ["wait for long", *calls, "end"]
