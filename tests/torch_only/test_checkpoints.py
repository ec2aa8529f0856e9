"""Layers that are checkpointed within what torch.compile compiles, masks and scores made inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attn_core import Dropout, attention, mask, masks, row, score, scores

T, H = 21, 4
IDS = torch.arange(T).expand(2, T) // 9
SEEN = torch.rand(T, T, generator=torch.Generator().manual_seed(1)) < 0.7
LENGTHS = torch.tensor([T, 8])
SLOPES = torch.linspace(0.1, 0.4, H, requires_grad=True)
CAP = torch.tensor(3.0, requires_grad=True)

OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "vocabulary": lambda: {"mask": masks.segments(IDS) & masks.window(2, 0)},
    "booleans": lambda: {"mask": SEEN, "dropout": Dropout(0.2, torch.tensor(5))},
    "a function": lambda: {"mask": mask(lambda b, h, q, k: (q >= k) & (k - row < 3))},
    "lengths": lambda: {
        "mask": masks.causal(),
        "kv_lengths": LENGTHS,
        "score": scores.alibi(SLOPES).then(scores.softcap(CAP)),
    },
    "a score": lambda: {"score": score(lambda s, b, h, q, k: s / (1 + abs(q - k)))},
}


def layer(x: torch.Tensor, made: Callable[[], dict[str, Any]]) -> torch.Tensor:
    query, key, value = x.unflatten(-1, (3, H, 4)).permute(2, 0, 3, 1, 4)
    return attention(query, key, value, **made()).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoints_inside_compile(name: str) -> None:
    made = OPTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(2, T, 3 * H * 4, requires_grad=True)
    held = [x, SLOPES, CAP] if name == "lengths" else [x]

    def kept(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, made, use_reentrant=False)

    compiled = torch.compile(kept, backend="aot_eager", fullgraph=True)
    found, wanted = compiled(x), layer(x, made)
    torch.testing.assert_close(found, wanted)
    gradients = (torch.autograd.grad(y.square().sum(), held) for y in (found, wanted))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_what_no_index_goes_with_compiles_outside_of_them() -> None:
    """`row + 1` alone does not say which mask it belongs to: the thread is told."""
    x = torch.randn(2, T, 3 * H * 4)
    made = lambda: {"mask": mask(lambda b, h, q, k: row + 1 >= k)}  # noqa: E731
    compiled = torch.compile(lambda x: layer(x, made), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x, made))
