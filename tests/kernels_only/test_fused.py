"""The fused backward, which adds dQ by atomics, against the reference in float64.

It runs where the table of configurations says so, and nowhere where torch asks for one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import DEVICE, HALVES, by_kernel, compare, described, draw, found, narrowed
from kernel_cases import CASES, HQ, KEY, QUERY, SLOPES, TABLE, TK, TQ, VALUE, B, D

from attn_core import attention, masks, scores
from attn_core.backends.torch import triton_launch
from attn_core.kernels import configs


class Ran(list[tuple[str, dict[str, Any]]]):
    """The kernels that were launched, and what was compiled into them."""

    def backward(self) -> list[str]:
        named = [(f"{name}, fused" if o.get("FUSED") else name) for name, o in self]
        return [name for name in named if name not in ("forward", "combine", "delta")]


SPILLING = configs.Config(16, 16, 8, 1)
"""Of float32 no tile is free of spills, and the shipped table refuses to launch any: it would be
slow. Its numbers are right all the same, and are what is judged here."""


def unrefused(stack: ExitStack) -> None:
    """Let fused run where a table refuses it on the GPU that is here."""
    here = triton_launch.architecture(torch.device(DEVICE))
    for dtype, bits in (("float16", 16), ("float32", 32)):
        asked = (configs.FUSED, here, D, D, dtype)
        if any(configs.explain(*asked, name).refused for name in configs.CLASSES):
            about = (configs.FUSED, (here,), (), bits, (), SPILLING)
            stack.enter_context(configs.trying(configs.Entry(*about, "a test", "yours")))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ran]:
    """Chosen instead of the split everywhere; what ran is written down."""
    launch, seen = triton_launch.launch, Ran()

    def spy(kernel: Any, programs: int, shape: Any, *args: Any, **options: Any) -> None:
        seen.append((kernel.__name__, options))
        launch(kernel, programs, shape, *args, **options)

    monkeypatch.setattr(triton_launch, "launch", spy)
    with ExitStack() as stack:
        unrefused(stack)
        stack.enter_context(configs.fusing(True))
        yield seen


@pytest.fixture
def ordered() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_every_option(name: str, ran: Ran) -> None:
    given = {"query": QUERY, "key": KEY, "value": VALUE, **CASES[name]}
    compare(given)
    bias = ["d_bias"] if "bias" in given else []
    assert ran.backward() == ["d_keys, fused", *bias]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["plain", "lengths", "everything"])
def test_half_precision(name: str, dtype: torch.dtype, ran: Ran) -> None:
    given = {"query": QUERY, "key": KEY, "value": VALUE, **CASES[name]}
    if name == "everything":
        del given["dropout"]  # in half precision its own rounding is the larger part
    compare(narrowed(given, dtype))
    assert ran.backward()[0] == "d_keys, fused"


def test_the_other_layout_and_entries_apart(ran: Ran) -> None:
    options = {"mask": masks.causal(), "query_offset": 0}
    names = ("query", "key", "value")
    turned = [x.transpose(1, 2).contiguous() for x in (QUERY, KEY, VALUE)]
    compare({**dict(zip(names, turned, strict=True)), "layout": "BTHD", **options})
    apart = [draw(*x.shape[:3], 2 * D)[..., ::2] for x in (QUERY, KEY, VALUE)]
    compare({**dict(zip(names, apart, strict=True)), **options})
    assert ran.backward() == ["d_keys, fused"] * 2


@pytest.mark.skipif(not described(), reason="tensor descriptors are Hopper's and later GPUs'")
@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_sums_through_descriptors(layout: str, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the last one and columns behind the width are added nowhere."""
    choose = triton_launch.config
    monkeypatch.setattr(
        triton_launch, "config", lambda *about: replace(choose(*about), descriptors=True)
    )
    given = {"query": QUERY, "key": KEY, "value": VALUE, **CASES["lengths"]}
    if layout == "BTHD":
        turned = {n: given[n].transpose(1, 2).contiguous() for n in ("query", "key", "value")}
        given = {**given, **turned, "layout": layout}
    compare(given)
    assert ran.backward() == ["d_keys, fused"]
    assert all(o["DESCRIPTORS"] for _, o in ran if "DESCRIPTORS" in o)


HIDDEN: dict[str, dict[str, Any]] = {
    "lengths": {"kv_lengths": [90, 13], "mask": masks.causal(), "query_offset": "end"},
    "a bias": {"bias": torch.where(torch.arange(TK, device=DEVICE) < 13, 0.0, -torch.inf)},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_poison_of_keys_that_no_row_sees_reaches_no_query(name: str, ran: Ran) -> None:
    given = {"query": QUERY, "key": KEY.clone(), "value": VALUE.clone(), **HIDDEN[name]}
    if name == "a bias":
        given["bias"] = given["bias"].expand(TQ, TK)
    up, up_lse = draw(B, HQ, TQ, D), draw(B, HQ, TQ)
    want = found(by_kernel, given, up, up_lse)
    given["key"][1, :, 13:], given["value"][1, :, 13:] = torch.nan, torch.inf
    if name == "a bias":
        given["key"][0, :, 13:] = torch.nan
    got = found(by_kernel, given, up, up_lse)
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        if n == 2 and DEVICE != "cpu":  # dQ, added on a GPU in an order that no two runs share
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        else:
            assert torch.equal(a, b)
    assert ran.backward()[0] == "d_keys, fused"


# --- Who runs. ------------------------------------------------------------------------------------


def gradients(*wanted: str, **options: Any) -> tuple[torch.Tensor, ...]:
    arrays = {"query": QUERY, "key": KEY, "value": VALUE}
    leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in arrays.items()}
    out = attention(**leaves, impl="triton", query_offset=0, **options)
    loss = (out * torch.cos(torch.arange(D, device=DEVICE))).sum()
    return torch.autograd.grad(loss, [leaves[n] for n in wanted if n in leaves])


def test_the_split_runs_where_nothing_else_was_said() -> None:
    """No GPU has said that fused wins: no shipped entry does."""
    assert not any(entry.config.instead for entry in configs.shipped())
    named = {gpu for e in configs.shipped() if e.kernel == configs.FUSED for gpu in e.on}
    assert {"any", "interpreter", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"} <= named


def test_in_one_order_the_split_runs_whatever_was_chosen(ran: Ran, ordered: None) -> None:
    first = gradients("query", "key", "value", mask=masks.causal())
    second = gradients("query", "key", "value", mask=masks.causal())
    assert ran.backward() == ["d_keys", "d_query"] * 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    torch.use_deterministic_algorithms(False)
    fused = gradients("query", "key", "value", mask=masks.causal())
    assert ran.backward()[-1] == "d_keys, fused"
    for a, b in zip(first, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_table_of_yours_chooses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a line as `attn-core bench tune` writes it; `instead` alone is the difference."""
    where = tmp_path / "kernels.toml"
    monkeypatch.setenv(configs.VARIABLE, str(where))
    line = configs.Entry(
        configs.FUSED, (configs.ANY,), (), 0, (), configs.Config(32, 32, 4, 1), "a test", "yours"
    )
    found, ways = [], []
    launch = triton_launch.launch

    def spy(kernel: Any, *rest: Any, **options: Any) -> None:
        if kernel.__name__ == "d_keys":
            ways.append(options["FUSED"])
        launch(kernel, *rest, **options)

    monkeypatch.setattr(triton_launch, "launch", spy)
    for instead in (False, True):
        configs.write(where, [line._replace(config=replace(line.config, instead=instead))])
        configs.forget()
        found.append(gradients("query", "key", mask=masks.causal()))
    assert ways == [False, True]
    monkeypatch.undo()
    configs.forget()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_what_is_asked_for_alone_is_computed_alone(ran: Ran) -> None:
    for wanted, kernels in (
        (("query",), ["d_query"]),
        (("key",), ["d_keys"]),
        (("query", "value"), ["d_keys, fused"]),
    ):
        ran.clear()
        gradients(*wanted)
        assert ran.backward() == kernels


def test_arrays_of_a_score_are_added_on_the_way(ran: Ran) -> None:
    """Once: with dQ, or alone with the keys' gradients."""
    slopes = SLOPES.clone().requires_grad_()
    key = KEY.clone().requires_grad_()
    out = attention(QUERY, key, VALUE, score=scores.alibi(slopes), query_offset=0, impl="triton")
    got = torch.autograd.grad(out.square().sum(), (key, slopes))
    assert ran.backward() == ["d_keys, fused"]
    # Named: on a GPU kernels would answer again.
    out = attention(QUERY, key, VALUE, score=scores.alibi(slopes), query_offset=0, impl="reference")
    want = torch.autograd.grad(out.square().sum(), (key, slopes))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    table = TABLE.clone().requires_grad_()
    ran.clear()
    out = attention(
        QUERY, KEY, VALUE, score=scores.relative_bias(table), query_offset=0, impl="triton"
    )
    torch.autograd.grad(out.sum(), table)
    assert ran.backward() == ["d_query"]
