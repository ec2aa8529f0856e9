"""Several threads at once, each with a mask of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from kernel_calls import DEVICE

from attn_core import attention, masks

MASKS = [
    masks.causal(),
    masks.window(left=3),
    masks.chunks(5),
    masks.prefix(4),
    masks.segments([0] * 9 + [1] * 14),
]


def test_no_thread_gets_what_another_asked_for() -> None:
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, 16, generator=rng).to(DEVICE) for n in (17, 23))

    def answers(number: int, impl: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (query, key, key)]
        mask = MASKS[number % len(MASKS)]
        out = attention(*leaves, mask=mask, query_offset="end", impl=impl)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    want = [answers(number, "reference") for number in range(len(MASKS))]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: answers(number, "triton"), range(20)))
    for number, each in enumerate(found):
        for got, its in zip(each, want[number % len(MASKS)], strict=True):
            torch.testing.assert_close(got, its, rtol=1e-4, atol=2e-5)
