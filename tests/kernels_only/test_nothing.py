"""`impl="triton"` where B, Tq or Tk is 0: what the spec says of it, and no launch.

A loader's last batch may be empty, and so is a cache before its first key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from explain_cases import FLOAT32
from kernel_calls import DEVICE, compare, draw, narrowed
from torch.func import grad, vmap

from attn_core import Dropout, attention, explain, masks, scores
from attn_core.backends.torch import chunked, triton_launch
from attn_core.backends.torch.chunked_parts import Ask
from attn_core.conformance import run

HQ, HK, D, DV = 4, 2, 8, 6
SINKS = torch.tensor([0.5, -torch.inf, -3.0, 2.0], device=DEVICE)
SIZES = {"batch": (0, 5, 7), "queries": (2, 0, 7), "keys": (2, 5, 0), "all": (0, 0, 0)}
TILES = {"many batches": (0, 300, 290), "many queries": (0, 0, 290), "many rows": (2, 300, 0)}
WAYS = ("plain", "causal", "sinks", "bias", "lengths", "score", "dropout", "everything")


def arrays(batch: int, queries: int, keys: int) -> dict[str, torch.Tensor]:
    return {
        "query": draw(batch, HQ, queries, D),
        "key": draw(batch, HK, keys, D),
        "value": draw(batch, HK, keys, DV),
    }


def given(way: str, batch: int, queries: int, keys: int) -> dict[str, Any]:
    """One option after the other, and all of them."""
    own = masks.dense(torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=DEVICE))
    lengths = {
        "kv_lengths": torch.full((batch,), keys, device=DEVICE),
        "q_lengths": torch.full((batch,), queries, device=DEVICE) // 2,
    }
    sinks = {"sinks": SINKS.clone()}
    bias = {"bias": draw(1, HQ, queries, keys)}
    score = {"score": scores.relative_bias(draw(16, HQ)), "query_offset": "end"}
    dropout = {"dropout": Dropout(0.3, torch.tensor(7, device=DEVICE)), "query_offset": 3}
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"mask": masks.causal(), "query_offset": "end"},
        "sinks": sinks,
        "bias": bias,
        "lengths": {**lengths, "mask": own},
        "score": score,
        "dropout": dropout,
        "everything": {**dropout, **score, **lengths, **bias, **sinks, "mask": own},
    }
    return {**arrays(batch, queries, keys), **options[way]}


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of kernels, nor of what their schedules and lengths are made by."""

    def launched(kernel: Any, *rest: Any, **options: Any) -> None:
        raise AssertionError(f"{kernel.__name__} was launched")

    for name in ("launch", "prepare"):
        monkeypatch.setattr(triton_launch, name, launched)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", SIZES)
def test_out_lse_and_every_gradient(sizes: str, way: str) -> None:
    compare(given(way, *SIZES[sizes]))


@pytest.mark.parametrize("sizes", TILES)
def test_over_many_tiles(sizes: str) -> None:
    compare(given("everything", *TILES[sizes]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_in_16_bits(sizes: str, dtype: torch.dtype) -> None:
    compare(narrowed(given("sinks", *SIZES[sizes]), dtype))


def test_rows_first() -> None:
    asked = given("everything", 2, 5, 0)
    for name in ("query", "key", "value"):
        asked[name] = asked[name].transpose(1, 2).contiguous()
    compare({**asked, "layout": "BTHD"})


def test_a_cache_before_its_first_key() -> None:
    """out 0; lse the sink's, of which a row's gradient is 1; a padded row has none."""
    asked, sinks = arrays(2, 3, 0), SINKS.clone().requires_grad_()
    query = asked.pop("query").requires_grad_()
    rows = torch.tensor([3, 1], device=DEVICE)
    options = {"sinks": sinks, "q_lengths": rows, "return_lse": True, "impl": "triton"}
    out, lse, _ = attention(query, **asked, **options)
    assert out.shape == (2, HQ, 3, DV)
    assert not out.any()
    want = SINKS[:, None].expand(2, HQ, 3).clone()
    want[1, :, 1:] = -torch.inf
    assert torch.equal(lse, want)
    loss = torch.where(lse.isfinite(), lse, 0.0).sum() + out.sum()
    d_query, d_sinks = torch.autograd.grad(loss, (query, sinks))
    assert torch.equal(d_sinks, torch.tensor([4.0, 0.0, 4.0, 4.0], device=DEVICE))
    assert not d_query.any()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sizes", ["batch", "queries", "keys"])
def test_compiled_whole(sizes: str, dynamic: bool) -> None:
    def loss(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        options = {"mask": masks.causal(), "query_offset": "end", "sinks": sinks}
        out, lse, _ = attention(q, k, v, **options, return_lse=True, impl="triton")
        return out.square().sum() + torch.where(lse > -torch.inf, lse, 0.0).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = [*arrays(*SIZES[sizes]).values(), SINKS.clone()]
    leaves = [x.requires_grad_() for x in leaves]
    found, want = compiled(*leaves), loss(*leaves)
    assert torch.equal(found, want)
    gradients = [torch.autograd.grad(x, leaves) for x in (found, want)]
    for leaf, a, b in zip(leaves, *gradients, strict=True):
        assert a.shape == b.shape == leaf.shape
        assert torch.equal(a, b)


def test_compiled_for_sizes_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty last batch, after full ones."""
    monkeypatch.undo()  # full ones are launched

    def f(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, mask=masks.causal(), query_offset="end", impl="triton")

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, queries, keys in ((3, 20, 23), (2, 20, 23), (0, 20, 23), (2, 0, 23), (2, 20, 0)):
        each = arrays(batch, queries, keys).values()
        found = compiled(*each)
        assert found.shape == (batch, HQ, queries, DV)
        torch.testing.assert_close(found, f(*each), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_opcheck(sizes: str) -> None:
    asked = arrays(*SIZES[sizes])
    ask = Ask("BHTD", "end", 0.0, masks.causal().tree, None, 0, True, False, "triton")
    bias = draw(1, HQ, *SIZES[sizes][1:])
    inputs = [*asked.values(), bias, SINKS.clone(), *[None] * 4, []]
    out, lse, _, *rows = chunked._forward_op(ask.written(), 0.35, *inputs)
    wanted, upstream = [True] * 5, [torch.randn_like(out), torch.randn_like(lse), None]
    backward = (ask.written(), 0.35, wanted, *inputs, [out, *rows], *upstream)
    torch.library.opcheck(chunked._backward_op, backward)
    leaves = [x.requires_grad_() for x in inputs[:5]]
    torch.library.opcheck(chunked._forward_op, (ask.written(), 0.35, *leaves, *inputs[5:]))


def test_vmap() -> None:
    asked = arrays(2, 5, 0)
    many = draw(3, *asked.pop("query").shape)

    def loss(q: Any, sinks: Any) -> Any:
        out, lse, _ = attention(q, **asked, sinks=sinks, return_lse=True, impl="triton")
        return out.sum() + lse.sum()

    finite = SINKS.clone()
    finite[1] = 1.0
    d_query, d_sinks = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(many, finite)
    assert d_query.shape == many.shape
    assert not d_query.any()
    assert torch.equal(d_sinks, torch.full((3, HQ), 10.0, device=DEVICE))


@pytest.mark.parametrize("sizes", {**SIZES, **TILES})
def test_nothing_waits_for_the_device(sizes: str) -> None:
    """On tensors that hold nothing, of which nobody could read a value."""
    batch, queries, keys = {**SIZES, **TILES}[sizes]

    def there(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ints = [there(batch, dtype=torch.int64) for _ in range(3)]
    table, entries = masks.dense(np.ones((1, 1, 2, 2), bool)), scores.relative_bias(draw(16, HQ))
    assert table.tree is not None
    ask = Ask("BHTD", "given", 0.3, table.tree, entries.tree, 1, True, False, "triton")
    x = [
        *[there(batch, h, n, D) for h, n in ((HQ, queries), (HK, keys), (HK, keys))],
        *(there(1, HQ, queries, keys), there(HQ), *ints, there(dtype=torch.int64)),
        *(there(1, 1, queries, keys, dtype=torch.bool), there(16, HQ)),
    ]
    out, lse, _, *rows = chunked._forward(ask, 0.35, x)
    found = chunked._backward(ask, 0.35, [True] * 6, x, (out, *rows), (out, lse, None))
    places = [*x[:5], x[-1]]
    assert [g.shape for g in found] == [a.shape for a in places]


@pytest.mark.parametrize("sizes", SIZES)
def test_explain_says_who_answers_and_that_there_is_no_tile(sizes: str) -> None:
    asked = given("causal", *SIZES[sizes])
    said = explain(**asked, impl="triton")
    assert (said.impl, said.tiles, said.effective) == ("triton", None, FLOAT32)
    assert said.blocks is not None
    assert said.blocks.total == 0
    assert "no tiles of its own" not in str(said)
    candidates = {c.name: c.verdict for c in explain(**asked).candidates}
    assert candidates["triton"] == ("chosen" if DEVICE == "cuda" else "would answer")


@pytest.mark.skipif(DEVICE != "cpu", reason="the suite asks on the CPU, of what is interpreted")
def test_the_suite_judges_it() -> None:
    found = {v.case: v.status for v in run(["torch:triton"], cases=["none-"])}
    assert found.pop("none-keys-float64") == "not offered"
    assert len(found) == 8
    assert set(found.values()) == {"passed"}
