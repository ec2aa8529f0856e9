"""How calls on a GPU are timed: what a device that stands in for one is told, in which order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from attn_core.benchmarks import gpu_calls, gpu_cases


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


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_what_torch_prefers_is_not_pinned(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pinned(backend: Any) -> Any:
        raise AssertionError(f"nobody may be pinned. Got {backend}.")

    monkeypatch.setattr(gpu_calls, "sdpa_kernel", pinned)
    case = gpu_cases.GpuCase("small", 32, 16, 2, 1, "float32", mask)
    q, k, v = (torch.randn(1, 2, 32, 16) for _ in range(3))
    found = gpu_calls._attend(gpu_cases.SDPA, case)(q, k, v)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")
    torch.testing.assert_close(found, wanted)
    with pytest.raises(AssertionError, match="FLASH"):
        gpu_calls._attend(gpu_cases.FLASH, case)(q, k, v)
