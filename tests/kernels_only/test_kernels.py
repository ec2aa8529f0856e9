"""The kernels against the reference in float64: forward and backward, option by option."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import DEVICE, HALVES, by_kernel, compare, draw, found, narrowed, tiles
from kernel_cases import CASES, HK, HQ, KEY, QUERY, SINKS, TK, TQ, VALUE, B, D

import attn_core
from attn_core import Dropout, masks
from attn_core.backends.torch import triton_call, triton_launch
from attn_core.kernels import forward as forward_kernels
from attn_core.kernels.configs import Config


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str) -> None:
    compare({"query": QUERY, "key": KEY, "value": VALUE, **CASES[name]})


NO_SCALE = {"no scale": {"scale": 0.0, "mask": masks.causal(), "query_offset": 0}}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("plain", "lengths", "softcap", "sinks", "documents", "a scale below 0", "no scale"),
        *("a table", "a table below 0", "tables of a score"),
    ],
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    given = {"query": QUERY, "key": KEY, "value": VALUE, **(CASES | NO_SCALE)[name]}
    compare(narrowed(given, dtype))


def test_the_other_layout_and_strides_of_every_kind() -> None:
    turned = [x.transpose(1, 2).contiguous() for x in (QUERY, KEY, VALUE)]
    options = {"mask": masks.causal(), "query_offset": 0}
    compare(
        {**dict(zip(("query", "key", "value"), turned, strict=True)), "layout": "BTHD", **options}
    )
    apart = [draw(*x.shape[:3], 2 * D)[..., ::2] for x in (QUERY, KEY, VALUE)]
    compare({**dict(zip(("query", "key", "value"), apart, strict=True)), **options})


ROWS, KEYS = torch.arange(TQ, device=DEVICE), torch.arange(TK, device=DEVICE)
TABLE = masks.dense((ROWS[:, None] + KEYS) % 3 != 1)


@pytest.mark.parametrize("mask", [masks.causal(), TABLE], ids=["causal", "table"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_poison_stays_where_nobody_looks(dtype: torch.dtype, mask: Any) -> None:
    """Of 16 bits by going along the keys again, once a sum is not finite; of float32 at once."""
    options = {**CASES["lengths"], "mask": mask}
    given = {"query": QUERY.to(dtype, copy=True), "key": KEY.to(dtype, copy=True)}
    given |= {"value": VALUE.to(dtype, copy=True), **options}
    up, up_lse = draw(B, HQ, TQ, D).to(dtype), draw(B, HQ, TQ)
    want = found(by_kernel, given, up, up_lse)
    given["key"][1, :, 13:], given["value"][1, :, 13:] = torch.nan, torch.inf
    given["query"][1, :, 5:] = torch.nan
    up[1, :, 5:] = torch.nan
    got = found(by_kernel, given, up, up_lse)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("place", ["everywhere", "before", "behind"])
def test_logits_that_log_2_would_round(place: str, dtype: torch.dtype) -> None:
    """Of eight millions, next to which log 2 of 1 is rounded to 1 or 2; or of -1e9, a tile of which
    stands before or behind the keys that everything comes from."""
    key = torch.randint(0, 4, (B, HK, 192, D), device=DEVICE).to(dtype)
    query = torch.zeros(B, HQ, TQ, D, device=DEVICE).to(dtype)
    query[..., 0] = 1
    given: dict[str, Any] = {"query": query, "key": key, "value": draw(B, HK, 192, D).to(dtype)}
    if place == "everywhere":
        query[..., 1:9], key[..., 1:9] = 1024, 1024
    else:
        given["score"] = attn_core.score(
            lambda s, b, h, q, k: (
                s - attn_core.where(k < 128 if place == "before" else k >= 64, 1e9, 0)
            )
        )
    compare({**given, "scale": 1.0})


def two_tiles(below: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Of two tiles of 64 keys a key each, the second's logit so much below the first's, and its
    value 1; other keys, and other values, come to 0."""
    query = torch.zeros(1, 1, len(below), D, device=DEVICE, dtype=dtype)
    query[..., 1], query[..., 2] = -below.to(dtype), -1000
    key = torch.zeros(1, 1, 128, D, device=DEVICE, dtype=dtype)
    key[..., 2] = 1
    for number, at in enumerate((0, 64)):
        key[0, 0, at, 2], key[0, 0, at, number] = 0, 1
    value = torch.zeros_like(key)
    value[0, 0, 64] = 1
    return {"query": query, "key": key, "value": value, "scale": 1.0}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_greatest_weight_of_a_tile_is_not_rounded(dtype: torch.dtype) -> None:
    """So that all is rounded once, when it is stored."""
    given = two_tiles(torch.linspace(0.05, 2, 64, device=DEVICE), dtype)
    with ExitStack() as stack:
        tiles(stack, forward=Config(64, 64, 4, 2))
        out = attn_core.attention(**given, impl="triton")[0, 0, :, 0]
    below = -given["query"][0, 0, :, 1].double()
    assert torch.equal(out, (1 / (1 + below.exp())).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_tile_far_below_its_row_leaves_the_sums_as_they_are(dtype: torch.dtype) -> None:
    given = two_tiles(torch.linspace(0, 85, 64, device=DEVICE), dtype)
    given["value"][0, 0, 0] = 3e4
    with ExitStack() as stack:
        tiles(stack, forward=Config(64, 64, 4, 2))
        out = attn_core.attention(**given, impl="triton")[0, 0, :, 0]
    weight = 1 / (1 + given["query"][0, 0, :, 1].double().exp())
    want = 1 - weight + 3e4 * weight
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("behind", [-40.0, 200.0])
def test_sums_of_the_greatest_values_outgrow_no_float32(behind: float) -> None:
    """Of bfloat16, which has float32's range: where a tile far below its row's maximum has been
    gone along, and where another one has then left nothing of them."""
    key, value = (torch.zeros(1, 1, 192, D, device=DEVICE).bfloat16() for _ in range(2))
    key[..., 0], key[0, 0, 0, 0], key[0, 0, 128, 0] = -100, 0, behind
    value[0, 0, 0], value[0, 0, 128] = 3e38, 1
    query = torch.ones(1, 1, 64, D, device=DEVICE).bfloat16()
    with ExitStack() as stack:
        tiles(stack, forward=Config(64, 64, 4, 2))
        out = attn_core.attention(query, key, value, scale=1.0, impl="triton")
    assert torch.equal(out, value[:, :, :1].expand_as(out) if behind < 0 else torch.ones_like(out))


@pytest.mark.parametrize("rows", [TQ, 2])
@pytest.mark.parametrize("way", ["bias", "score"])
def test_rows_of_the_least_float32(way: str, rows: int) -> None:
    """What is added where others hide is data: a row that has nothing else gives the mean of its
    values, though in units of log 2 its logits are -inf, as those of a row without keys are. Other
    rows have a whole tile of it, and numbers behind that."""
    least = torch.finfo(torch.float32).min
    given: dict[str, Any] = {"query": QUERY[:, :, :rows].half(), "key": KEY.half()}
    given |= {"value": VALUE.half(), "kv_lengths": [TK, 0]}
    if way == "bias":
        bias = draw(rows, TK)
        bias[1], bias[:, :64] = least, least
        given["bias"] = bias
    else:
        given |= {"query_offset": 0}
        given["score"] = attn_core.score(
            lambda s, b, h, q, k: attn_core.where((q == 1) | (k < 64), least, s)
        )
    compare(given)


HIDDEN: dict[str, tuple[int, int]] = {"query": (1, 5), "up": (1, 5), "key": (1, 13)}
HIDDEN["value"] = HIDDEN["key"]
"""Batch, and behind which row or key nobody looks."""


@pytest.mark.parametrize("mask", [masks.causal(), TABLE], ids=["causal", "table"])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf, 65504.0])
@pytest.mark.parametrize("place", HIDDEN)
def test_each_poison_alone(place: str, poison: float, mask: Any) -> None:
    """Rows that see no key reach dK by query and dV by d_out, keys that no row sees reach dQ: each
    of these sums is looked at by itself. What is finite is multiplied by zeros the first time."""
    given = {"query": QUERY.half(), "key": KEY.half(), "value": VALUE.half(), **CASES["lengths"]}
    given["mask"] = mask
    up, up_lse = draw(B, HQ, TQ, D).half(), draw(B, HQ, TQ)
    want = found(by_kernel, given, up, up_lse)
    batch, first = HIDDEN[place]
    spoilt = up if place == "up" else given[place]
    spoilt[batch, :, first:] = poison
    got = found(by_kernel, given, up, up_lse)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("mask", [masks.causal(), TABLE], ids=["causal", "table"])
@pytest.mark.parametrize("place", ["query", "key", "value", "up"])
def test_nan_goes_as_far_as_when_looked_at_at_once(place: str, mask: Any) -> None:
    """One row or key that is seen: 16 bits, told at the end, say no more and no less of NaN than
    float32 does, which looks at each tile.

    In tiles of one size, which a GPU's table does not give them: NaN of a key may reach every row
    of a tile in which one row sees it (SPEC, section 5).
    """
    arrays = {"query": QUERY, "key": KEY, "value": VALUE, "up": draw(B, HQ, TQ, D)}
    arrays[place] = arrays[place].clone()
    arrays[place][0, :, 66] = torch.nan
    up_lse, spread, same = draw(B, HQ, TQ), [], Config(64, 64, 4, 1)
    for dtype in (torch.float32, *HALVES):
        given: dict[str, Any] = {n: x.to(dtype) for n, x in arrays.items()}
        up = given.pop("up")
        given |= {"mask": mask, "query_offset": 0}
        with ExitStack() as stack:
            tiles(stack, forward=same, d_keys=same, d_query=same)
            spread.append([x.isnan() for x in found(by_kernel, given, up, up_lse)])
    assert any(x.any() for x in spread[0])
    for a, *rest in zip(*spread, strict=True):
        assert all(torch.equal(a, b) for b in rest)


def test_logits_that_fade_are_nobodys_concern(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may begin far below where it ends, as by ALiBi: its keys are gone along once."""

    def again(*_: Any) -> Any:
        raise AssertionError("a row was gone along again")

    if triton_launch.INTERPRETED:
        monkeypatch.setattr(forward_kernels, "_exactly", again)
    score = attn_core.score(lambda s, b, h, q, k: s - 100.0 * (191 - k))
    given = {"query": QUERY, "key": draw(B, HK, 192, D), "value": draw(B, HK, 192, D)}
    compare({**{name: x.half() for name, x in given.items()}, "score": score})


WHOLE = 128
"""Keys that fill their tiles: with five rows a tile of them is full, and mostly nobody's."""

HIDING: dict[str, dict[str, Any]] = {
    "a bias": {"bias": torch.where(torch.arange(WHOLE, device=DEVICE) < 9, 0.0, -torch.inf)},
    "a score": {
        "score": attn_core.score(lambda s, b, h, q, k: attn_core.where(k <= q + 4, s, -torch.inf)),
        "query_offset": 0,
    },
}


@pytest.mark.parametrize("place", ["key", "value"])
@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("name", HIDING)
def test_lanes_behind_the_last_row_see_nothing(name: str, rows: int, place: str) -> None:
    given = {**HIDING[name], "query": draw(B, HQ, rows, D)}
    given |= {"key": draw(B, HK, WHOLE, D), "value": draw(B, HK, WHOLE, D)}
    if name == "a bias":
        given["bias"] = given["bias"].expand(rows, WHOLE)
    up, up_lse = draw(B, HQ, rows, D), draw(B, HQ, rows)
    want = found(by_kernel, given, up, up_lse)
    given[place] = given[place].clone()
    given[place][:, :, rows + 4 :] = torch.nan
    got = found(by_kernel, given, up, up_lse)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_rows_that_a_score_leaves_to_the_sink() -> None:
    """What hides all keys of a row is what s is: of a query of zeros it would hide none."""
    given = {"query": draw(B, HQ, TQ, D), "key": draw(B, HK, TK, D).abs(), "value": VALUE}
    given["query"][:, :, ::3] = -given["query"][:, :, ::3].abs()
    score = attn_core.score(lambda s, b, h, q, k: attn_core.where(s >= 0, s, -torch.inf))
    up, up_lse = torch.zeros(B, HQ, TQ, D, device=DEVICE), torch.ones(B, HQ, TQ, device=DEVICE)
    asked = {**given, "score": score, "sinks": SINKS, "bias": draw(TQ, TK)}
    out, lse, d_query, _, _, d_bias, _ = found(by_kernel, asked, up, up_lse)
    dead = slice(None, None, 3)
    assert (lse[:, :, dead] == SINKS[:, None]).all()
    for found_none in (out[:, :, dead], d_query[:, :, dead], d_bias[dead]):
        assert not found_none.any()
    compare(asked)


def test_what_dropout_leaves_may_be_rescaled_beyond_half_precision() -> None:
    """By 1 / (1 - rate) = 1e5, of values so small that the results are ordinary."""
    value = torch.full((1, 1, 1, D), 0.01, device=DEVICE).half().requires_grad_()
    query, key = draw(1, 1, 64, D).half(), torch.zeros(1, 1, 1, D, device=DEVICE).half()
    # Somewhere among these 64 queries one is kept; most of such tiles keep none.
    options = {"dropout": Dropout(0.99999, 3), "query_offset": 179887 // 64 * 64}
    found = []
    for impl in ("triton", "reference"):
        out = attn_core.attention(query, key, value, **options, impl=impl)
        found.append((out, *torch.autograd.grad(out, value, torch.full_like(out, 0.01))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2.0**-9, atol=0)
        assert want.max() > 100


def test_weights_of_huge_logits_stay_weights() -> None:
    """Backward, too, none exceeds 1, however logits of 1e11 round when they are made again."""
    query, key, value = 1e5 * QUERY, 1e5 * KEY, VALUE.clone().requires_grad_()
    up = draw(B, HQ, TQ, D)
    leaves = [query.requires_grad_(), key.requires_grad_(), value]
    out = attn_core.attention(*leaves, impl="triton")
    d_query, d_key, d_value = torch.autograd.grad(out, leaves, up)
    most = up.abs().sum(2, keepdim=True).unflatten(1, (HK, HQ // HK)).sum(2)
    assert (d_value.abs() <= most * (1 + 1e-5)).all()
    assert d_query.isfinite().all()
    assert d_key.isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="lays out memory that nothing stands in")
def test_a_bias_gradient_of_more_than_two_to_the_31_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches stand so far apart that in 32 bits the last one would lie before the first."""
    batches, size, step = 3, 16, 2**30
    # A file with holes: pages that nobody writes to take no room.
    room = torch.from_file(
        str(tmp_path / "room"), shared=True, size=(batches + 2) * step, dtype=torch.float16
    )
    into = room.as_strided((batches, 1, size, size), (step, size * size, size, 1), 2 * step)
    launch = triton_launch.launch

    def far(kernel: Any, programs: int, shape: Any, *args: Any, **options: Any) -> None:
        if kernel.__name__ == "d_bias":
            args = (*args[:4], into, *args[5:10], triton_call.spanned(into), *args[11:])
        launch(kernel, programs, shape, *args, **options)

    monkeypatch.setattr(triton_launch, "launch", far)
    query, key, value = (draw(batches, 1, size, D) for _ in range(3))
    up = draw(batches, 1, size, D)
    want = draw(batches, 1, size, size).requires_grad_()
    bias = want.detach().requires_grad_()
    for impl, leaf in (("triton", bias), ("reference", want)):
        attn_core.attention(query, key, value, bias=leaf, impl=impl).backward(up)
    torch.testing.assert_close(into.float(), want.grad, rtol=2.0**-10, atol=1e-5)
    assert want.grad[-1].abs().max() > 1e-2


def test_two_runs_are_one() -> None:
    given = {"query": QUERY, "key": KEY, "value": VALUE, **CASES["one bias"]}
    up, up_lse = draw(B, HQ, TQ, D), draw(B, HQ, TQ)
    first, second = (found(by_kernel, given, up, up_lse) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
