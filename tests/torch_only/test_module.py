"""The documents' `attention_module` of torch against the judge of layers."""

from __future__ import annotations

from typing import Any

import module_cases
import numpy as np
import pytest
import torch
from module_cases import CASES, check, given_of

from attn_core.backends.torch import MultiHeadAttention, attention_module


def made(x: Any) -> Any:
    return torch.as_tensor(x) if isinstance(x, np.ndarray) else x


def call(case: Any, given: Any = made) -> Any:
    weights, inputs = given_of(case)
    held = {name: torch.as_tensor(w) for name, w in weights.items()}
    options = {"parameters": held, "heads": case.config["heads"], **case.call}
    return attention_module(*map(given, inputs), mask=given(case.mask), **options)


@pytest.mark.parametrize("name", CASES)
def test_a_mapping(name: str) -> None:
    case = CASES[name]
    found = call(case)
    check(found, case, lambda x: x.numpy())
    assert all(isinstance(x, np.ndarray) for x in call(case, lambda x: x))
    check(call(case, lambda x: x), case, lambda x: x)
    for other in module_cases.changed(case):
        assert (call(other).out - found.out).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_a_layer(name: str) -> None:
    """The layer's config says what a mapping is called with; both have the same gradients."""
    case = CASES[name]
    weights, inputs = given_of(case)
    config = {**case.config, "scale": case.call.get("scale")}
    layer = MultiHeadAttention(**config, dropout=case.call.get("dropout_rate", 0.0))
    layer.load_weights(weights)
    given, more = [made(x) for x in inputs], {"mask": made(case.mask)}
    found = attention_module(*given, **more, parameters=layer, seed=case.call.get("seed"))
    check(found, case, lambda x: x.detach().numpy())
    found.out.square().sum().backward()
    held = {name: torch.as_tensor(w).requires_grad_() for name, w in weights.items()}
    more |= {"parameters": held, "heads": case.config["heads"], **case.call}
    attention_module(*given, **more).out.square().sum().backward()
    wanted = {name: layer.get_parameter(name).grad for name in held}
    most = max(x.abs().max().item() for x in wanted.values())
    for name, x in held.items():
        want = wanted[name].T if name.endswith("weight") else wanted[name]
        assert torch.allclose(x.grad, want, rtol=1e-4, atol=1e-6 * most)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_mapping_compiled(dynamic: bool | None) -> None:
    """Whole, with the gradients of its parts; for other lengths, and for other parts."""
    for name in ("self", "everything"):
        case = CASES[name]
        weights, inputs = given_of(case)
        # Numbers that torch.compile makes symbolic are no host numbers: rate and scale must be.
        options = {"heads": case.config["heads"], **({} if dynamic else case.call)}

        def module(*given: Any, parameters: Any, options: Any = options) -> Any:
            return attention_module(*given, parameters=parameters, **options)

        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for rows in (5, 7, 4):
            given = [made(x).repeat(1, 2, 1)[:, :rows] for x in inputs]
            found = []
            for f in (module, compiled):
                held = {n: torch.as_tensor(w).requires_grad_() for n, w in weights.items()}
                out, seen = f(*given, parameters=held)
                found.append((out, seen, *torch.autograd.grad(out.square().sum(), held.values())))
            for got, want in zip(*found[::-1], strict=True):
                assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_mapping_that_does_not_fit_is_refused_by_the_compiler() -> None:
    case = CASES["self"]
    weights, (x,) = given_of(case)
    held = {n: torch.as_tensor(w) for n, w in weights.items()}
    module = torch.compile(attention_module, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"a multiple of heads, 5\. Got 12"):
        module(made(x), parameters=held, heads=5)


@pytest.mark.parametrize("name", module_cases.REFUSED)
def test_refused(name: str) -> None:
    options, says = module_cases.refused(made, MultiHeadAttention(width=12, heads=4))[name]
    with pytest.raises((TypeError, ValueError), match=says):
        attention_module(**options)


def test_a_modules_own_matrices_are_refused() -> None:
    """They lie the other way round, and a square one would fit."""
    layer, x = MultiHeadAttention(width=12, heads=4), torch.zeros(2, 5, 12)
    for held in (layer.state_dict(), dict(layer.named_parameters())):
        with pytest.raises(TypeError, match=r"are \(out, in\), give the module"):
            attention_module(x, parameters=held, heads=4)
    assert attention_module(x, parameters=layer.export_weights(), heads=4).out.shape == x.shape
