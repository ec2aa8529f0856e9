"""torch.compile and torch.export where sizes come of data: a count read, rows chosen by flags.

To torch each of them is a new symbol, equal to nothing it knows, and a branch on it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import attn_core
from attn_core import masks

RNG = torch.Generator().manual_seed(5)
query, key, value = (torch.randn(1, 2, n, 8, generator=RNG) for n in (5, 9, 9))
AT = torch.arange(9)

CUTS: dict[str, Callable[[Any, Any], Any]] = {
    "count": lambda x, flags: x[:, :, : flags.sum().item()],
    "flags": lambda x, flags: x[:, :, flags],
}


@pytest.fixture(autouse=True)
def _data_in_the_graph() -> Iterator[None]:
    torch._dynamo.reset()
    config = torch._dynamo.config
    before = config.capture_scalar_outputs, config.capture_dynamic_output_shape_ops
    config.capture_scalar_outputs = config.capture_dynamic_output_shape_ops = True
    yield
    config.capture_scalar_outputs, config.capture_dynamic_output_shape_ops = before


def traced(how: str, f: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    if how == "compile":
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, *given: Any) -> Any:
            return f(*given)

    return torch.export.export(Module(), arguments).module()


@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_and_values_cut_apart(impl: str, cut: str, how: str, masked: bool) -> None:
    """Two symbols: that they are equal torch sees when it runs, and refuses where they are not."""
    more = {"mask": masks.causal(), "query_offset": "end"} if masked else {}

    def f(q: Any, k: Any, v: Any, first: Any, second: Any) -> Any:
        k, v = CUTS[cut](k, first), CUTS[cut](v, second)
        return attn_core.attention(q, k, v, impl=impl, **more)

    g = traced(how, f, query, key, value, AT < 7, AT < 7)
    for n in (7, 1, 0):
        want = attn_core.attention(query, key[:, :, :n], value[:, :, :n], impl="reference", **more)
        torch.testing.assert_close(g(query, key, value, n > AT, n > AT), want, rtol=0, atol=2e-6)
    with pytest.raises((RuntimeError, AssertionError), match=r"Eq\(u\d+, u\d+\)|u\d+ == u\d+"):
        g(query, key, value, AT < 7, AT < 6)


@pytest.mark.parametrize("how", ["compile", "export"])
def test_one_size_for_all_three_needs_no_offset(how: str) -> None:
    def f(x: Any, flags: Any) -> Any:
        x = x[:, :, flags]
        return attn_core.attention(x, x, x, mask=masks.causal())

    g = traced(how, f, key, AT < 7)
    for n in (7, 1, 0):
        want = attn_core.attention(*[key[:, :, :n]] * 3, mask=masks.causal())
        torch.testing.assert_close(g(key, n > AT), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("how", ["compile", "export"])
def test_batches_chosen_by_flags(how: str) -> None:
    x = torch.randn(9, 2, 5, 8, generator=RNG)

    def f(x: Any, flags: Any) -> Any:
        return attn_core.attention(x[flags], x[flags], x[flags], mask=masks.causal())

    g = traced(how, f, x, AT < 7)
    for n in (7, 1, 0):
        want = attn_core.attention(x[:n], x[:n], x[:n], mask=masks.causal())
        torch.testing.assert_close(g(x, n > AT), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("how", ["compile", "export"])
def test_an_offset_that_is_missing_is_asked_for(how: str) -> None:
    def f(q: Any, k: Any, v: Any, flags: Any) -> Any:
        k, v = k[:, :, flags], v[:, :, flags]
        return attn_core.attention(q, k, v, mask=masks.causal())

    with pytest.raises(
        Exception, match=r"`query_offset` must be given .* Got Tq = 5 and Tk = unknown"
    ):
        traced(how, f, query, key, value, AT < 7)(query, key, value, AT < 7)


@pytest.mark.parametrize("how", ["compile", "export"])
@pytest.mark.parametrize("impl", ["auto", "chunked", "reference"])
def test_what_is_beside_such_keys(impl: str, how: str) -> None:
    """Lengths of the host are clamped then, and a bias is as long as the keys."""
    bias = torch.randn(5, 9, generator=RNG)
    mask = masks.segments(torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])) & masks.window(left=4)

    def f(q: Any, k: Any, v: Any, b: Any, flags: Any) -> Any:
        k, v, b = k[:, :, flags], v[:, :, flags], b[:, flags]
        more = {"mask": mask, "bias": b, "query_offset": "end"}
        return attn_core.attention(q, k, v, kv_lengths=6, impl=impl, **more)

    g = traced(how, f, query, key, value, bias, AT < 7)
    for n in (8, 7, 6):
        want = f(query, key, value, bias, n > AT)
        found = g(query, key, value, bias, n > AT)
        torch.testing.assert_close(found, want, rtol=0, atol=2e-6)


def test_gradients() -> None:
    def f(q: Any, k: Any, v: Any, first: Any, second: Any) -> Any:
        return attn_core.attention(q, k[:, :, first], v[:, :, second]).square().sum()

    g = traced("compile", f)
    given = [x.clone().requires_grad_() for x in (query, key, value)]
    for n in (7, 1):
        found = torch.autograd.grad(g(*given, n > AT, n > AT), given)
        want = torch.autograd.grad(f(*given, n > AT, n > AT), given)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
