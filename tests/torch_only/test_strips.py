"""Masks that slide, read along one strip, against the mask written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import seen

import attn_core
from attn_core import attention, masks
from attn_core.backends.torch import native_strips, native_tiles

SLIDING: dict[str, Any] = {
    "causal": masks.causal(),
    "a window": masks.causal() & masks.window(100),
    "both ways": masks.window(30, 77),
    "ahead": attn_core.mask(lambda b, h, q, k: (k - q >= 20) & (k - q < 90)),
    "behind": attn_core.mask(lambda b, h, q, k: q - k >= 150),
    "dilated": masks.dilated(3, 50) & masks.causal(),
    "stripes": attn_core.mask(lambda b, h, q, k: (abs(q - k) < 40) | (abs(q - k) >= 200)),
    "stripes close by": attn_core.mask(lambda b, h, q, k: (abs(q - k) < 40) | (abs(q - k) >= 90)),
    "by head": attn_core.mask(lambda b, h, q, k: (q >= k) & (q - k < 20 + 100 * h)),
    "nothing": attn_core.mask(lambda b, h, q, k: (q < k) & (q > k)),
}


@pytest.mark.parametrize(
    ("q_len", "k_len", "offset"),
    [
        (300, 300, "zero"),
        (300, 300, "end"),
        (100, 411, "zero"),
        (100, 411, "end"),
        (411, 100, "zero"),
        (411, 100, "end"),
        (1, 333, "end"),
    ],
)
@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("tall", [32, 24, 128])
def test_spans_hold_what_is_live_and_full_ones_nothing_else(
    name: str, q_len: int, k_len: int, offset: str, tall: int
) -> None:
    mask = SLIDING[name]
    assert native_strips.sliding(mask.tree, offset)
    rows = [slice(at, min(at + tall, q_len)) for at in range(0, q_len, tall)]
    (found,) = native_strips.lines(mask.tree, offset, 4, 2, q_len, k_len, rows)
    dense = seen(mask, (1, 4, q_len, k_len), k_len - q_len if offset == "end" else 0)[0]
    for head in range(2):
        spans = found[head if len(found) > 1 else 0]
        for tile, line in zip(rows, spans, strict=True):
            allowed = dense[2 * head : 2 * head + 2, tile]
            covered = np.zeros(k_len, bool)
            for span in line:
                assert 0 <= span.start < span.stop <= k_len
                assert not covered[span.start : span.stop].any()
                covered[span.start : span.stop] = True
                assert not span.full or allowed[..., span.start : span.stop].all()
            assert not allowed[..., ~covered].any()


def test_a_window_is_cut_close() -> None:
    """Of 32 rows and a reach of 256 no more than the keys of one block are looked at in vain."""
    mask = masks.causal() & masks.window(255)
    ((spans,),) = [native_strips.strips(mask.tree, "zero", 8, 8, 8192, 8192, 32)]
    assert [(s.start, s.stop) for s in spans] == [(-256, -224), (-224, 0), (0, 32)]
    assert [s.full for s in spans] == [False, True, False]


@pytest.mark.parametrize(
    "mask",
    [
        masks.segments(np.arange(300) // 7),
        masks.chunks(64),
        attn_core.mask(lambda b, h, q, k: q - k < 100 * b),
        attn_core.mask(lambda b, h, q, k: k - attn_core.row < 9),
    ],
)
def test_what_does_not_slide(mask: Any) -> None:
    assert not native_strips.sliding(mask.tree, "zero")
    assert not native_strips.sliding(masks.causal().tree, "given")


def test_heights_weigh_what_is_hidden_against_calls() -> None:
    def rows(reach: int, length: int, heads: int = 8, backward: bool = False) -> int:
        mask = masks.causal() & masks.window(reach - 1)
        sizes = (1, heads, heads)
        return native_strips.rows_of(mask.tree, "zero", sizes, length, length, backward)

    assert rows(256, 8192) == 32
    assert rows(256, 8192, backward=True) == 64, "gradients of keys are added up tile by tile"
    assert rows(4096, 8192) == 128
    assert rows(256, 512, heads=1) > 32, "calls cost more than what they save"


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("height", native_strips.HEIGHTS)
def test_tiles_of_every_height_answer(
    name: str, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_strips, "HEIGHTS", (height,))
    native_strips.rows_of.cache_clear()
    asked: list[int] = []
    kernel = native_tiles._kernel
    monkeypatch.setattr(
        native_tiles, "_kernel", lambda q, *a, **o: asked.append(q.shape[2]) or kernel(q, *a, **o)
    )
    rng = np.random.default_rng(4)
    given = [torch.as_tensor(rng.standard_normal((2, n, 420, 8))) for n in (4, 2, 2)]
    up = torch.as_tensor(rng.standard_normal((2, 4, 420, 8)))
    found = []
    for impl in ("native", "reference"):
        leaves = [x.clone().requires_grad_() for x in given]
        out = attention(*leaves, mask=SLIDING[name], impl=impl)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, up)])
    native_strips.rows_of.cache_clear()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    # Whole causal attention is not cut at all.
    assert name in ("causal", "nothing") or max(asked) in range(height - 16, height + 1)
