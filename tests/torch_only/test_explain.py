"""`attn_core.explain` of torch tensors: what runs, what it takes, and in which numbers."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from explain_cases import FLOAT32, WIDENED, as_of_zeros, counted, keys_of, near, ran
from support import seen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_memory import peak

import attn_core
from attn_core import Dropout, attention, explain, masks, registry, scores

BACKEND = registry.load("torch")


# Of a seed: the account does not know where documents begin, and is far off where all are short.
_DRAWN = torch.randint(0, 8, (2, 2048), generator=torch.Generator().manual_seed(4))
EACH = masks.segments(_DRAWN.sort(-1).values)
BY_HEAD = attn_core.mask(lambda b, h, q, k: q - k <= 100 * (h + 1))


def draw(length: int, batch: int = 1, heads: int = 4, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.randn(batch, heads, length, 64).to(dtype)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mask": masks.causal()},
        {"impl": "reference"},
        {"impl": "chunked", "score": scores.softcap(2.0)},
        {"dropout": Dropout(0.1, 1), "return_weights": True},
    ],
)
def test_what_is_said_to_answer_answers(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = draw(40)
    given = {"query": x, "key": x, "value": x, **more}
    said = explain(**given)
    assert ran(BACKEND, monkeypatch, **given) == [said.impl]
    assert [c.name for c in said.candidates] == list(BACKEND.IMPLEMENTATIONS)
    assert [c.name for c in said.candidates if c.verdict == "chosen"] == [said.impl]
    monkeypatch.setattr(BACKEND, "attend", None)
    assert explain(**given) == said
    assert keys_of(said)["backend_from"] == "array"


def test_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(8)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    said = explain(x, x, x, precision="highest")
    assert said.impl is None
    assert {c.verdict for c in said.candidates} == {"refused"}
    assert 'needs torch.set_float32_matmul_precision("highest")' in str(said)


def test_of_sizes_alone_it_says_the_same_and_makes_no_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_of_zeros("torch", monkeypatch)


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(8)
    said = explain(x, x, x, impl="chunked")
    assert said.effective == FLOAT32
    half = x.to(torch.bfloat16)
    assert explain(half, half, half, impl="chunked").effective == WIDENED
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(x, x, x, impl="chunked").effective == WIDENED
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert explain(x, x, x, impl="chunked").effective == (
        f"{FLOAT32}; TF32 may be used: torch.get_float32_matmul_precision() is 'high'"
    )

    def mixed() -> str:
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert "switches of float32 products disagree" in str(explain(x, x, x, impl="chunked"))


def test_blocks_in_the_tiles_that_run() -> None:
    x = torch.zeros(2, 4, 700, 8)
    mask = masks.segments(torch.arange(700) // 90) & masks.causal()
    said = explain(x, x[:, :2], x[:, :2], mask=mask, kv_lengths=torch.tensor([700, 100]))
    dense = seen(masks.segments(np.arange(700) // 90) & masks.causal(), (2, 4, 700, 700)).copy()
    dense[1, ..., 100:] = False
    counted(explain(x, x, x, mask=mask, kv_lengths=torch.tensor([700, 100]), impl="chunked"), dense)
    counted(said, dense)


def test_tiles_of_the_fused_kernel() -> None:
    """A window's are low and fine; documents are cut where they begin, in no tiles of one size."""
    x = torch.zeros(1, 8, 2048, 8)
    window = masks.causal() & masks.window(left=255)
    said = explain(x, x, x, mask=window, impl="native")
    assert said.tiles == (32, 16)
    counted(said, seen(window, (1, 1, 2048, 2048)))
    for packed in (masks.segments(np.arange(2048) // 300), masks.segments(np.arange(2048) // 512)):
        for mask in (packed, packed & masks.causal()):
            said = explain(x, x, x, mask=mask, impl="native")
            assert said.tiles is None
            assert explain(x, x, x, mask=mask, impl="native", kv_lengths=[9]).tiles == (128, 64)


def test_values_that_nobody_has_yet() -> None:
    with FakeTensorMode():
        x = torch.zeros(1, 2, 300, 8)
        said = explain(x, x, x, mask=masks.causal(), kv_lengths=torch.tensor([5]), impl="chunked")
    assert said.blocks is None
    assert "live blocks" in str(said)
    assert "known when it runs" in str(said)
    assert said.forward


# --- Bytes. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mask": masks.causal()},
        {"mask": masks.causal(), "dtype": torch.bfloat16},
        {"mask": masks.causal(), "score": scores.softcap(30.0)},
        {"mask": masks.causal(), "dropout": Dropout(0.1, 1)},
        {"mask": masks.causal(), "kv_heads": 1},
        {"mask": masks.causal(), "layout": "BTHD"},
        {"mask": masks.causal(), "impl": "reference", "heads": 1},
        {"mask": masks.causal(), "impl": "native"},
        {"mask": masks.causal() & masks.window(left=100), "impl": "native"},
        {"mask": masks.causal() & masks.segments(np.arange(2048) // 300), "impl": "native"},
        {"mask": masks.window(left=100), "impl": "native", "dtype": torch.bfloat16},
        {"mask": masks.causal(), "impl": "native", "layout": "BTHD"},
        {"mask": masks.causal(), "impl": "native", "offset": 100},
        {"mask": masks.prefix(700) | masks.causal(), "impl": "native"},
        {"mask": masks.dense(torch.rand(2048, 2048) > 0.5), "impl": "native"},
        {"mask": BY_HEAD, "impl": "native"},
        {"mask": masks.causal() & masks.window(left=100), "impl": "native", "offset": None},
        {"mask": masks.window(100, 9), "impl": "native", "offset": None, "dtype": torch.bfloat16},
        {"mask": masks.window(600, 0), "impl": "native", "offset": None, "batch": 3},
        {"mask": BY_HEAD, "impl": "native", "offset": None},
        {"mask": masks.window(256, 0), "impl": "native", "kv_heads": 1, "offset": None},
        {"mask": masks.window(256, 0), "impl": "native", "kv_heads": 1, "batch": 3},
        {"mask": masks.window(256, 0), "impl": "native", "kv_heads": 1, "dtype": torch.bfloat16},
        {"mask": masks.causal(), "impl": "native", "layout": "BTHD", "dtype": torch.bfloat16},
        {"impl": "native", "dtype": torch.bfloat16, "batch": 3},
        {"impl": "native", "dtype": torch.bfloat16, "kv_heads": 1},
        {"mask": EACH & masks.causal(), "impl": "native", "batch": 2},
        {"mask": EACH, "impl": "native", "batch": 2},
        {"mask": EACH & masks.causal(), "impl": "native", "batch": 2, "dtype": torch.bfloat16},
        {"lengths": [2048, 1500, 300], "impl": "native", "batch": 3},
        {"lengths": [2048, 1500, 300], "impl": "native", "batch": 3, "mask": masks.causal()},
    ],
)
def test_estimates_are_near_what_is_allocated(more: dict[str, Any]) -> None:
    given: dict[str, Any] = {"impl": "chunked", **more}
    dtype, heads = given.pop("dtype", torch.float32), given.pop("heads", 4)
    kv_heads = given.pop("kv_heads", heads)
    batch, lengths = given.pop("batch", 1), given.pop("lengths", None)
    query, key, value = (draw(2048, batch, h, dtype) for h in (heads, kv_heads, kv_heads))
    given |= {"query_offset": given.pop("offset", 0), "kv_lengths": lengths}
    if given.get("layout") == "BTHD":
        query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    arrays = (query, key, value)
    said = explain(*arrays, **given)
    sizes = [x.numel() * x.element_size() for x in arrays]

    def forward() -> Any:
        with torch.no_grad():
            return attention(*arrays, **given)

    upstream = torch.ones_like(query)

    def backward() -> Any:
        leaves = [x.detach().requires_grad_() for x in arrays]
        out = attention(*leaves, **given)
        return out, torch.autograd.grad(out, leaves, upstream)

    assert near(said.forward, peak(forward) - sizes[0])
    assert near(said.backward, peak(backward) - sizes[0] - sum(sizes))


@pytest.mark.parametrize("impl", ["native", "chunked"])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.causal() & masks.window(left=63)])
def test_with_backward_is_never_less(impl: str, mask: Any) -> None:
    for length, kv_heads, dtype, layout in product(
        (1, 64, 255, 1024), (2, 8), (torch.float32, torch.bfloat16), ("BHTD", "BTHD")
    ):
        query, key = draw(length, 1, 8, dtype), draw(length, 1, kv_heads, dtype)
        if layout == "BTHD":
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        said = explain(query, key, key, mask=mask, layout=layout, impl=impl)
        assert said.backward >= said.forward > 0


def test_chunked_is_linear_and_reference_quadratic() -> None:
    def bytes_of(length: int, impl: str) -> tuple[int, int]:
        x = torch.zeros((), dtype=torch.bfloat16).expand(1, 2, length, 16)
        said = explain(x, x, x, impl=impl)
        assert said.forward
        assert said.backward
        return said.forward, said.backward

    short, middle, long = (bytes_of(n, "chunked") for n in (8192, 16384, 32768))
    for a, b, c in zip(short, middle, long, strict=True):
        assert c - b == 2 * (b - a) > 0
    for one, two in zip(bytes_of(4096, "reference"), bytes_of(8192, "reference"), strict=True):
        assert two == 4 * one


def test_the_flag_is_told() -> None:
    x = np.zeros((1, 1, 4, 2), "float32")
    with attn_core.use(backend="torch", impl="reference"):
        said = explain(x, x, x)
    assert (said.backend, said.backend_from, said.impl) == ("torch", "use", "reference")
    assert (said.asked, said.asked_by) == ("reference", "use")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [16, 63, 64])
def test_keys_are_copied_for_many_queries_alone(rows: int, dtype: torch.dtype) -> None:
    """By torch's CPU kernel, in bfloat16, where the processor multiplies tiles of it."""
    query, key = draw(rows, 1, 4, dtype), draw(2048, 1, 4, dtype)

    def forward() -> Any:
        with torch.no_grad():
            return attention(query, key, key, impl="native")

    said = explain(query, key, key, impl="native").forward
    assert near(said, peak(forward) - query.numel() * query.element_size())
