"""Arrays of the host are held by content, and so is the schedule that follows from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_calls import DEVICE, alike, by_reference, draw

import attn_core
from attn_core import masks, scores
from attn_core.backends.torch import held, triton_forward, triton_schedule

THERE = torch.device(DEVICE)


def of(ids: np.ndarray) -> Any:
    return masks.causal() & masks.segments(held.copy(ids, THERE))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """By rows or by columns, every schedule that was made and not found."""
    found: list[bool] = []
    make = triton_schedule._made

    def counting(asked: Any, *rest: Any) -> Any:
        found.append(asked.columns)
        return make(asked, *rest)

    monkeypatch.setattr(triton_schedule, "_made", counting)
    triton_schedule._kept.clear()
    return found


def test_a_copy_is_known_by_what_it_holds() -> None:
    ids = np.arange(100, dtype=np.int32) // 30
    first, number = held.copy(ids, THERE), held.number(held.copy(ids, THERE))
    assert held.copy(ids.copy(), THERE) is first
    assert number is not None
    assert held.number(first.clone()) is None
    ids[0] = 7
    other = held.copy(ids, THERE)
    assert other is not first
    assert held.number(other) not in (None, number)
    assert first[0] == 0
    assert held.copy(ids.astype(np.int64), THERE).dtype == torch.int64


@pytest.mark.parametrize("kind", [">i4", ">i8", ">f4", "<u2", "?"])
def test_a_copy_is_in_the_order_of_bytes_that_torch_takes(kind: str) -> None:
    ids = np.arange(12).astype(kind).reshape(3, 4)[:, ::-1]
    copied = held.copy(ids, THERE)
    assert copied.tolist() == ids.tolist()
    assert copied.element_size() == ids.itemsize


def test_what_is_held() -> None:
    few, many = np.zeros(8, np.int32), np.zeros(held.MOST + 1, np.int8)
    gpu = torch.device("cuda")
    assert not held.keeps(few, torch.device("cpu"))
    assert held.keeps(few, gpu)
    assert not held.keeps(many, gpu)
    assert held.keeps(few.astype(np.float32), gpu)


def test_lists_and_arrays_of_the_host_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host would wait for the device in every call, and stand in no CUDA graph."""
    monkeypatch.setattr(held, "keeps", lambda x, device: True)
    seen: list[tuple[Any, ...]] = []
    call = triton_forward.Call

    def spy(ask: Any, scale: float, x: Any) -> Any:
        seen.append((*x.mask, *x.score))
        return call(ask, scale, x)

    monkeypatch.setattr(triton_forward, "Call", spy)
    q = draw(1, 4, 20, 16)
    for slopes in ({"heads": 4}, {"slopes": np.float32([0.5, 0.25, 0.125, 0.0625])}):
        seen.clear()
        for _ in range(2):
            mask, score = masks.prefix([7]), scores.alibi(**slopes)
            found = attn_core.attention(q, q, q, mask=mask, score=score, impl="triton")
        assert [x.dtype for x in seen[0]] == [torch.int32, torch.float32]
        assert all(a is b for a, b in zip(*seen, strict=True))
        want = by_reference(query=q, key=q, value=q, mask=mask, score=score).out
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_schedule_is_made_once_for_a_content(made: list[bool]) -> None:
    ids = np.arange(150, dtype=np.int32) // 40
    q, k, v = (draw(2, 2, 150, 16).requires_grad_() for _ in range(3))

    def step(mask: Any, **more: Any) -> list[torch.Tensor]:
        out = attn_core.attention(q, k, v, mask=mask, impl="triton", **more)
        return [out, *torch.autograd.grad(out.square().sum(), [q, k, v])]

    first = step(of(ids))
    count = len(made)
    assert count >= 2, "by rows, and by columns for the gradients of keys"
    for x, y in zip(step(of(ids.copy())), first, strict=True):
        alike(x, y)  # a table may have chosen atomics
    assert len(made) == count
    # Another content, other tensors, and offsets that a tensor gives, have schedules of their own.
    for mask, more in (
        (of(ids // 2), {}),
        (masks.causal() & masks.segments(torch.tensor(ids, device=DEVICE)), {}),
        (of(ids), {"query_offset": torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)}),
    ):
        before = len(made)
        got = step(mask, **more)
        assert len(made) > before
        want = by_reference(query=q, key=k, value=v, mask=mask, **more).out
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)


def test_a_schedule_of_many_tiles_is_not_kept(
    made: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every batch and head that the mask tells apart: a device holds all of them."""
    ids = np.arange(2 * 150, dtype=np.int32).reshape(2, 150) // 40
    by_batch = masks.segments(held.copy(ids, THERE))
    by_both = by_batch & attn_core.mask(lambda b, h, q, k: q >= k + h)
    nothing = triton_schedule.told(None, None, "zero", 150, 150, THERE)

    def asked(mask: Any) -> int:
        before = len(made)
        given = triton_schedule.Asked(mask.tree, (2, 4, 2, 150, 150), (64, 64), (False,) * 2, False)
        for _ in range(2):
            triton_schedule.schedule(given, mask.arrays, nothing, THERE)
        return len(made) - before

    # Nine tiles, of each of two batches, and of each of two key heads.
    for most, counts in ((17, (2, 2)), (18, (1, 2)), (36, (1, 1))):
        triton_schedule._kept.clear()
        monkeypatch.setattr(triton_schedule, "KEPT", most)
        assert (asked(by_batch), asked(by_both)) == counts
