"""float16 where the gradient of a logit is larger than its greatest number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_core

RNG = torch.Generator().manual_seed(1)
query, key, value, d_out = (torch.randn(1, 2, 16, 16, generator=RNG) for _ in range(4))


def steep(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s * 20000.0


RUNS = {
    "a loss scale": ((query, key / 100, value * 300), d_out * 300, {"scale": 0.01}),
    "a steep score": (
        (query / 100, key / 100, value / 75),
        d_out,
        {"scale": 0.05, "score": attn_core.score(steep)},
    ),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_these_keep_it_in_float32(name: str, impl: str) -> None:
    given, up, options = RUNS[name]

    def gradients(impl: str, dtype: torch.dtype) -> Any:
        leaves = [x.half().to(dtype).requires_grad_() for x in given]
        out = attn_core.attention(*leaves, impl=impl, **options)
        return torch.autograd.grad(out, leaves, up.half().to(dtype))

    want = gradients("reference", torch.float64)
    for got, exact in zip(gradients(impl, torch.float16), want, strict=True):
        assert got.isfinite().all()
        close = {"rtol": 0, "atol": 2e-3 * exact.abs().max().item()}
        torch.testing.assert_close(got.double(), exact, **close)
