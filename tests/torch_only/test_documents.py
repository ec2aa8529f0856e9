"""Masks of the documents' functions of torch: of every shape, and none of them written out."""

from __future__ import annotations

from typing import Any

import document_cases
import numpy as np
import pytest
import torch
from document_cases import KINDS, LEADS, MODULE_REACHES, REACHES, given, judged, mask_of, shapes
from torch_memory import peak

from attn_core import Dropout, attention, documents
from attn_core.backends.torch import attention_module, scaled_dot_product_attention


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", LEADS)
def test_masks_of_every_shape(lead: tuple[int, ...], kind: str) -> None:
    x = given(lead)
    for shape in shapes(lead):
        mask = mask_of(shape, kind)
        tensors = [torch.as_tensor(one) for one in (*x, mask)]
        if kind == "float":
            tensors[-1].requires_grad_()
        got = scaled_dot_product_attention(*tensors)
        want, slope = judged(x, mask)
        np.testing.assert_allclose(got.detach(), want, rtol=1e-4, atol=2e-6)
        if kind == "float":
            (found,) = torch.autograd.grad(got.square().sum(), tensors[-1:])
            np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-5)


class Reached(Exception):
    """`attention` was called."""


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shape of each mask that `attention` was given, which then ends the call."""
    seen: list[Any] = []

    def recording(*given: Any, mask: Any = None, bias: Any = None, **options: Any) -> Any:
        seen.append(tuple((mask if bias is None else bias).shape))
        raise Reached

    monkeypatch.setattr(documents, "attention", recording)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_masks_go_on_as_they_are(kind: str, reached: list[Any]) -> None:
    for lead, shape, want in REACHES:
        tensors = [torch.as_tensor(one) for one in (*given(lead), mask_of(shape, kind))]
        with pytest.raises(Reached):
            scaled_dot_product_attention(*tensors)
        assert reached.pop() == want, (lead, shape)
    held = {f"{part}.weight": torch.eye(4) for part in ("query", "key", "value", "out")}
    for lead, shape, want in MODULE_REACHES:
        x, mask = torch.zeros(*lead, 5, 4), torch.as_tensor(mask_of(shape, kind))
        with pytest.raises(Reached):
            attention_module(x, mask=mask, parameters=held, heads=4)
        assert reached.pop() == want, (lead, shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 1024), (1, 8, 1, 1024)])
def test_memory_is_linear(shape: tuple[int, ...], kind: str) -> None:
    """Written out for each row of each head the masks would be 16 and 64 MiB."""
    x, mask = torch.zeros(2, 8, 1024, 8), torch.as_tensor(mask_of(shape, kind))
    option = {"mask" if kind == "boolean" else "bias": mask}
    bare = peak(lambda: attention(x, x, x, **option))
    assert peak(lambda: scaled_dot_product_attention(x, x, x, mask)) <= bare + 2**20
    more = x.view(1, 2, 8, 1024, 8)
    assert peak(lambda: scaled_dot_product_attention(more, more, more, mask[None])) <= bare + 2**20
    x.requires_grad_()
    bare = peak(lambda: attention(x, x, x, **option).sum().backward())
    found = peak(lambda: scaled_dot_product_attention(x, x, x, mask).sum().backward())
    assert found <= bare + 2**20


@pytest.mark.parametrize("lead", LEADS)
def test_dropout_is_by_heads(lead: tuple[int, ...]) -> None:
    x = given(lead)
    tensors = [torch.as_tensor(one) for one in x]
    got = scaled_dot_product_attention(*tensors, dropout_rate=0.4, seed=5)
    np.testing.assert_allclose(got, document_cases.dropped(x, 0.4, 5), rtol=1e-4, atol=1e-5)
    if len(lead) == 2:
        assert torch.equal(got, attention(*tensors, dropout=Dropout(0.4, 5)))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_other_sizes(dynamic: bool | None) -> None:
    """Heads, rows and a padding mask of other sizes, with the gradient of a float mask."""

    def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
        out = scaled_dot_product_attention(q, k, v, mask)
        return out, *torch.autograd.grad(out.square().sum(), [mask])

    compiled = torch.compile(call, backend="aot_eager", dynamic=dynamic)
    for lead in ((2, 3), (2, 4), (3, 2)):
        x = given(lead)
        mask = mask_of((lead[0], 1, 1, 7), "float")
        tensors = [torch.as_tensor(one) for one in x]
        got = compiled(*tensors, torch.as_tensor(mask).requires_grad_())
        for found, want in zip(got, judged(x, mask), strict=True):
            np.testing.assert_allclose(found.detach(), want, rtol=1e-4, atol=1e-5)


def test_refused_in_our_words() -> None:
    document_cases.check_refused(scaled_dot_product_attention, torch.as_tensor)
