"""dK and dV by a launch each, with tiles of their own, against the reference in float64.

They are so where the table of configurations says it, and where it does not one launch makes both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import DEVICE, HALVES, by_kernel, compare, described, draw, found, narrowed, tiles
from kernel_cases import CASES, HQ, KEY, QUERY, TQ, VALUE, B, D

from attn_core import attention, masks
from attn_core.backends.torch import triton_launch
from attn_core.kernels import ahead, configs
from attn_core.kernels.configs import Config, Entry
from attn_core.kernels.samples import SAMPLES

PARTS = ["d_keys of value", "d_keys of key"]


class Ran(list[tuple[str, Any, dict[str, Any]]]):
    """The kernels that were launched, their tiles, and what was compiled into them."""

    def backward(self) -> list[str]:
        made = {(True, True): "both", (True, False): "key", (False, True): "value"}
        named = [
            f"{name} of {made[o['KEY'], o['VALUE']]}" if "VALUE" in o else name
            for name, _, o in self
        ]
        return [name for name in named if name not in ("forward", "combine", "delta")]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Ran:
    launch, seen = triton_launch.launch, Ran()

    def spy(kernel: Any, programs: int, shape: Any, *args: Any, **options: Any) -> None:
        seen.append((kernel.__name__, shape, options))
        launch(kernel, programs, shape, *args, **options)

    monkeypatch.setattr(triton_launch, "launch", spy)
    return seen


@pytest.fixture
def ran(launched: Ran) -> Iterator[Ran]:
    """Apart everywhere, whatever a table says; what ran is written down."""
    with configs.parting(True):
        yield launched


@pytest.mark.parametrize("name", CASES)
def test_every_option(name: str, ran: Ran) -> None:
    given = {"query": QUERY, "key": KEY, "value": VALUE, **CASES[name]}
    compare(given)
    bias = ["d_bias"] if "bias" in given else []
    assert ran.backward() == [*PARTS, "d_query", *bias]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["plain", "lengths", "everything"])
def test_half_precision(name: str, dtype: torch.dtype, ran: Ran) -> None:
    given = {"query": QUERY, "key": KEY, "value": VALUE, **CASES[name]}
    if name == "everything":
        del given["dropout"]  # in half precision its own rounding is the larger part
    compare(narrowed(given, dtype))
    assert ran.backward()[:2] == PARTS


def test_the_other_layout_and_entries_apart(ran: Ran) -> None:
    options = {"mask": masks.causal(), "query_offset": 0}
    names = ("query", "key", "value")
    turned = [x.transpose(1, 2).contiguous() for x in (QUERY, KEY, VALUE)]
    compare({**dict(zip(names, turned, strict=True)), "layout": "BTHD", **options})
    spread = [draw(*x.shape[:3], 2 * D)[..., ::2] for x in (QUERY, KEY, VALUE)]
    compare({**dict(zip(names, spread, strict=True)), **options})
    assert ran.backward() == [*PARTS, "d_query"] * 2


@pytest.mark.skipif(not described(), reason="tensor descriptors are Hopper's and later GPUs'")
def test_through_descriptors(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = triton_launch.config
    monkeypatch.setattr(
        triton_launch, "config", lambda *about: replace(choose(*about), descriptors=True)
    )
    compare({"query": QUERY, "key": KEY, "value": VALUE, **CASES["lengths"]})
    assert ran.backward()[:2] == PARTS
    assert all(o["DESCRIPTORS"] for _, _, o in ran if "DESCRIPTORS" in o)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_poison_stays_where_nobody_looks(dtype: torch.dtype, ran: Ran) -> None:
    """Of 16 bits each of the two goes along its rows again, by what it has added up itself."""
    arrays = {"query": QUERY, "key": KEY, "value": VALUE}
    given: dict[str, Any] = {n: x.to(dtype, copy=True) for n, x in arrays.items()}
    given |= CASES["lengths"]
    up, up_lse = draw(B, HQ, TQ, D).to(dtype), draw(B, HQ, TQ)
    want = found(by_kernel, given, up, up_lse)
    given["key"][1, :, 13:], given["value"][1, :, 13:] = torch.nan, torch.inf
    given["query"][1, :, 5:] = torch.nan
    up[1, :, 5:] = torch.nan
    got = found(by_kernel, given, up, up_lse)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert ran.backward()[:2] == PARTS


@pytest.mark.parametrize("name", ["plain", "lengths", "dropout", "everything"])
def test_apart_is_what_together_is(name: str, launched: Ran) -> None:
    """With the same tiles every number is added up in the same order, so to the last bit."""
    given = {"query": QUERY, "key": KEY, "value": VALUE, **CASES[name]}
    up, up_lse = draw(B, HQ, TQ, D), draw(B, HQ, TQ)
    answers, both = [], Config(32, 32, 4, 1)
    for apart in (False, True):
        with ExitStack() as stack:
            tiles(stack, d_keys=replace(both, apart=apart), d_value=both, d_key=both)
            answers.append(found(by_kernel, given, up, up_lse))
    ways = [name for name in launched.backward() if name.startswith("d_keys")]
    assert ways == ["d_keys of both", *PARTS]
    for a, b in zip(*answers, strict=True):
        if DEVICE == "cpu":
            assert torch.equal(a, b)
        else:  # kernels apart from each other may contract their operations otherwise
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_each_has_tiles_of_its_own(launched: Ran) -> None:
    with ExitStack() as stack:
        tiles(
            stack,
            d_keys=Config(64, 64, 4, 1, apart=True),
            d_value=Config(32, 16, 4, 1),
            d_key=Config(16, 32, 8, 1),
        )
        compare({"query": QUERY, "key": KEY, "value": VALUE, **CASES["window"]})
    assert launched.backward() == [*PARTS, "d_query"]
    found = [(o["M"], o["N"], shape.warps) for name, shape, o in launched if name == "d_keys"]
    assert found == [(32, 16, 4), (16, 32, 8)]


def gradients(*wanted: str) -> tuple[torch.Tensor, ...]:
    arrays = {"query": QUERY, "key": KEY, "value": VALUE}
    leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in arrays.items()}
    out = attention(**leaves, impl="triton", mask=masks.causal(), query_offset=0)
    loss = (out * torch.cos(torch.arange(D, device=DEVICE))).sum()
    return torch.autograd.grad(loss, [leaves[n] for n in wanted])


def test_what_nobody_asks_for_is_not_launched(ran: Ran) -> None:
    want = dict(zip(("query", "key", "value"), gradients("query", "key", "value"), strict=True))
    for wanted, kernels in (
        (("key",), ["d_keys of key"]),
        (("value",), ["d_keys of value"]),
        (("key", "value"), PARTS),
        (("query", "value"), ["d_keys of value", "d_query"]),
        (("query",), ["d_query"]),
    ):
        ran.clear()
        for name, got in zip(wanted, gradients(*wanted), strict=True):
            assert torch.equal(got, want[name])
        assert ran.backward() == kernels


def test_a_table_of_yours_chooses_it(
    launched: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "kernels.toml"
    monkeypatch.setenv(configs.VARIABLE, str(where))
    for apart in (False, True):
        config = Config(32, 32, 4, 1, apart=apart)
        entry = Entry("d_keys", (configs.ANY,), (), 0, (), config, "a test", "yours")
        configs.write(where, [entry])
        configs.forget()
        gradients("key", "value")
    assert launched.backward() == ["d_keys of both", *PARTS]
    monkeypatch.undo()
    configs.forget()


def test_what_is_compiled_is_what_is_launched() -> None:
    """Of one launch or two ahead of time those that a call makes."""
    here = "sm_90", SAMPLES["causal"], 256, 256
    for dtype, kernels in (("bfloat16", ["d_value", "d_key"]), ("float32", ["d_keys"])):
        asked = ["d_keys", "d_value", "d_key"]
        jobs = list(ahead.jobs(["sm_90"], asked, ["causal"], [256], [dtype]))
        assert jobs == [
            ahead.Job(kernel, *here, dtype, even=even)
            for kernel in kernels
            for even in (True, False)
        ]
        refused = {k: ahead.Job(k, *here, dtype).refused for k in asked}
        assert {k for k in asked if not refused[k]} == set(kernels)
        assert all(
            "run in its place" in refused[k] or "makes both" in refused[k]
            for k in asked
            if k not in kernels
        )
