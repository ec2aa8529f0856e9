"""torch.func.functionalize, by itself and among the other transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import functionalize, grad, hessian, jvp, vmap

from attn_core import Dropout, UnsupportedError, attention, masks, scores

# torch 2.13 itself scripts its forward-mode decompositions when they are first asked for.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

RNG = torch.Generator().manual_seed(3)
query, key, value = (torch.randn(2, 2, n, 4, generator=RNG, dtype=torch.float64) for n in (5, 7, 7))
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"mask": masks.causal(), "query_offset": "end"},
    "lengths": {"kv_lengths": torch.tensor([4, 7])},
    "score and dropout": {"score": scores.softcap(3.0), "dropout": Dropout(0.3, 7)},
}


def of(impl: str, options: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda x: attention(x, key, value, impl=impl, **options)


@pytest.mark.parametrize("impl", ["auto", "chunked"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_answers_as_the_formula(name: str, impl: str) -> None:
    f, formula = of(impl, OPTIONS[name]), of("reference", OPTIONS[name])
    several = torch.stack([query, query / 2])
    same = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(functionalize(f)(query), formula(query), **same)
    for mapped in (functionalize(vmap(f)), vmap(functionalize(f))):
        torch.testing.assert_close(mapped(several), vmap(formula)(several), **same)
    x = query.clone().requires_grad_()
    found, want = (
        torch.autograd.grad(g(x).square().sum(), x)[0] for g in (functionalize(f), formula)
    )
    torch.testing.assert_close(found, want, **same)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: functionalize(grad(lambda x: f(x).sum()))(query),
        lambda f: grad(lambda x: functionalize(f)(x).sum())(query),
        lambda f: functionalize(lambda x: jvp(f, (x,), (x,)))(query),
        lambda f: functionalize(hessian(lambda x: f(x).sum()))(query),
    ],
)
def test_derivatives_by_torch_func_are_the_formulas(call: Any) -> None:
    call(of("reference", {}))
    for impl in ("auto", "chunked"):
        with pytest.raises(UnsupportedError, match='functionalize need impl="reference"'):
            call(of(impl, {}))
