"""torch's defaults, a dtype and a device for what says neither, change no answer of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attn_core import Dropout, attention, masks

RNG = torch.Generator().manual_seed(0)
QUERY, KEY = (torch.randn(2, 4, n, 8, generator=RNG) for n in (17, 23))
HOST: dict[str, Any] = {
    "nothing": {},
    "lengths": {"kv_lengths": [5, 7], "q_lengths": (17, 9)},
    "one length": {"kv_lengths": 5},
    "offsets": {"query_offset": [1, -2]},
    "ids": {"mask": masks.segments([0] * 10 + [1] * 13)},
    "dropout": {"dropout": Dropout(0.3, 5)},
}
IMPLS = ("native", "chunked", "reference")
PAIRS = [(impl, name) for impl in IMPLS for name in HOST if (impl, name) != ("native", "dropout")]


@pytest.fixture(params=[torch.float64, torch.bfloat16, "meta"], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Sets it, once it is called."""

    def chosen() -> None:
        if isinstance(request.param, str):
            torch.set_default_device(request.param)
        else:
            torch.set_default_dtype(request.param)

    yield chosen
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def answers(impl: str, options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (QUERY, KEY, KEY)]
    asked = {"mask": masks.causal(), "query_offset": "end", "return_lse": True, **options}
    found = attention(*leaves, impl=impl, **asked)
    return (*found[:2], *torch.autograd.grad(found.out.square().sum(), leaves))


@pytest.mark.parametrize(("impl", "name"), PAIRS)
def test_answers_and_gradients(impl: str, name: str, default: Any) -> None:
    want = answers(impl, HOST[name])
    default()
    for got, its in zip(answers(impl, HOST[name]), want, strict=True):
        assert (got.dtype, got.device) == (its.dtype, its.device)
        assert torch.equal(got, its)
