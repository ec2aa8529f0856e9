"""`attn_core.explain` of the kernels: tiles, blocks and bytes are those that run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from explain_cases import FLOAT32, counted, keys_of, near
from kernel_calls import DEVICE, draw
from support import seen
from torch_memory import peak

from attn_core import attention, explain, masks, scores
from attn_core.backends.torch import triton_forward, triton_launch
from attn_core.kernels import configs

LONG = 1024
allocator = pytest.mark.skipif(DEVICE != "cpu", reason="counts what the CPU's allocator gives")


def test_tiles_are_those_that_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, int]] = []
    launch = triton_launch.launch

    def spy(kernel: Any, programs: int, shape: Any, *args: Any, **options: Any) -> None:
        if kernel.__name__ == "forward":
            launched.append((options["M"] // options["PACK"], options["N"]))
        launch(kernel, programs, shape, *args, **options)

    monkeypatch.setattr(triton_launch, "launch", spy)
    for rows in (1, 5, 16, 17, 90):
        query, key = draw(1, 4, rows, 16), draw(1, 2, 90, 16)
        given = {"mask": masks.causal(), "query_offset": "end", "impl": "triton"}
        said = explain(query, key, key, **given)
        attention(query, key, key, **given)
        assert said.tiles == launched.pop()


def test_blocks_in_the_tiles_that_run() -> None:
    x = draw(2, 2, 300, 8)
    mask = masks.segments(torch.arange(300, device=DEVICE) // 90) & masks.causal()
    said = explain(x, x, x, mask=mask, kv_lengths=[300, 100], impl="triton")
    dense = seen(masks.segments(np.arange(300) // 90) & masks.causal(), (2, 2, 300, 300)).copy()
    dense[1, ..., 100:] = False
    counted(said, dense)
    assert keys_of(said)["impl"] == "triton"
    assert said.effective == FLOAT32


@allocator
@pytest.mark.parametrize(
    "more",
    [
        {"layout": "BTHD", "dtype": torch.float16},
        {"score": True},
        {"sinks": True, "score": True, "deterministic": True},
        {"lengths": [LONG, 100]},
        {"fused": True, "dtype": torch.float16},
        {"rows": 1, "splits": 8, "lengths": [LONG, 100]},
    ],
)
def test_estimates_are_near_what_is_allocated(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "splits" in more:
        monkeypatch.setattr(triton_forward, "splits", lambda *sizes: more["splits"])
    dtype = more.get("dtype", torch.float32)
    rows, heads = more.get("rows", LONG), 4 if "splits" in more else 1
    batch = len(more.get("lengths", [0]))
    arrays = [draw(batch, heads, n, 16).to(dtype) for n in (rows, LONG, LONG)]
    if more.get("layout") == "BTHD":
        arrays = [x.transpose(1, 2).contiguous() for x in arrays]
    options: dict[str, Any] = {"impl": "triton", "layout": more.get("layout", "BHTD")}
    options |= {"mask": masks.window(60, 0), "query_offset": "end"}
    if "lengths" in more:
        options["kv_lengths"] = torch.tensor(more["lengths"], device=DEVICE)
    extra: dict[str, torch.Tensor] = {}
    if "sinks" in more:
        extra["sinks"] = draw(heads)
    if "score" in more:
        extra["table"] = draw(16, heads)

    def call(*given: torch.Tensor) -> Any:
        named = dict(zip(extra, given[3:], strict=True))
        if "table" in named:
            named["score"] = scores.relative_bias(named.pop("table"))
        return attention(*given[:3], **named, **options)

    def forward() -> Any:
        with torch.no_grad():
            return call(*arrays, *extra.values())

    def backward() -> Any:
        leaves = [x.detach().requires_grad_() for x in (*arrays, *extra.values())]
        out = call(*leaves)
        return out, torch.autograd.grad(out, leaves, torch.ones_like(out))

    torch.use_deterministic_algorithms("deterministic" in more)
    try:
        monkeypatch.setattr(configs, "_fused", more.get("fused"))
        named = {**extra}
        if "table" in named:
            named["score"] = scores.relative_bias(named.pop("table"))
        said = explain(*arrays, **named, **options)
        sizes = [x.numel() * x.element_size() for x in (*arrays, *extra.values())]
        taken = peak(forward) - sizes[0], peak(backward) - 2 * sizes[0] - sum(sizes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert near(said.forward, taken[0]), taken
    # A step has the one and then the other; the gradients may be more than either.
    assert near(said.backward, max(taken)), taken
