"""Graphs that torch makes otherwise than by compiling the call: make_fx, and backward passes alone.

torch.compile and torch.export of the whole are test_compile.py's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.compiled_autograd import _enable as compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from attn_core import Dropout, attention, masks, scores

RNG = torch.Generator().manual_seed(0)
OPTIONS: dict[str, Any] = {
    "causal": {},
    "host lengths": {"kv_lengths": [5, 7], "query_offset": [1, -2]},
    "ids of the host": {"mask": masks.segments([0] * 10 + [1] * 30)},
    "score, dropout": {"score": scores.alibi(heads=4), "dropout": Dropout(0.3, 5)},
}
PAIRS = [
    (impl, name)
    for impl in ("native", "chunked", "reference")
    for name in OPTIONS
    if (impl, name) != ("native", "score, dropout")
]


def draw(q_len: int, k_len: int) -> list[torch.Tensor]:
    shapes = (2, 4, q_len, 8), (2, 2, k_len, 8), (2, 2, k_len, 8)
    return [torch.randn(s, generator=RNG, requires_grad=True) for s in shapes]


def ask(impl: str, name: str, *arrays: torch.Tensor) -> torch.Tensor:
    options = {"mask": masks.causal(), "query_offset": "end", **OPTIONS[name]}
    return attention(*arrays, impl=impl, **options)


@pytest.mark.parametrize(("impl", "name"), PAIRS)
def test_sizes_of_make_fx_are_symbols(impl: str, name: str) -> None:
    """They were looked up in a cache of earlier calls, which symbols cannot be."""

    def whole(*arrays: torch.Tensor) -> Any:
        out = ask(impl, name, *arrays)
        return (out, *torch.autograd.grad(out.square().sum(), arrays))

    graph = make_fx(whole, tracing_mode="symbolic")(*draw(5, 9))
    other = draw(12, 14)
    for got, want in zip(graph(*other), whole(*other), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


# torch 2.13 itself looks at the gradient of whatever was saved.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("impl", "name"), [pair for pair in PAIRS if pair[0] != "reference"])
def test_compiled_autograd_of_a_plain_call(impl: str, name: str) -> None:
    """The backward pass is compiled whole, its forward pass was not compiled at all."""
    arrays = draw(5, 9)
    want = torch.autograd.grad(ask(impl, name, *arrays).square().sum(), arrays)
    out = ask(impl, name, *arrays)
    torch._dynamo.reset()
    with compiled_autograd(torch.compile(backend="aot_eager", fullgraph=True)):
        out.square().sum().backward()
    for leaf, its in zip(arrays, want, strict=True):
        torch.testing.assert_close(leaf.grad, its, rtol=1e-5, atol=2e-6)
