"""Few queries: heads of a group packed into one tile, keys shared out, parts put together.

The interpreter has one processor, so splits are asked for here; that they were made is looked at in
what was launched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_calls import DEVICE, HALVES, compare, draw, found, ids, narrowed
from kernel_calls import by_kernel as ours

import attn_core
from attn_core import Dropout, masks, scores
from attn_core.backends.torch import triton_forward as decode
from attn_core.backends.torch import triton_launch as launcher
from attn_core.kernels import configs
from attn_core.kernels import forward as kernels

B, HQ, HK, TQ, TK, D = 2, 6, 2, 3, 150, 24
"""Groups of three heads, one lane of four empty; keys over the end of the last tile."""

QUERY, KEY, VALUE = draw(B, HQ, TQ, D), draw(B, HK, TK, D), draw(B, HK, TK, 40)
SLOPES, SINKS = draw(HQ).abs(), draw(HQ)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": masks.causal(), "query_offset": "end"},
    "window": {"mask": masks.window(40, 0), "query_offset": [147, 60]},
    "lengths": {
        "kv_lengths": [150, 13],
        "q_lengths": [3, 1],
        "mask": masks.causal(),
        "query_offset": "end",
    },
    "no keys": {"kv_lengths": [70, 0]},
    "sinks": {"sinks": SINKS, "kv_lengths": [64, 0], "q_lengths": [3, 2]},
    "every head its own": {
        "mask": attn_core.mask(lambda b, h, q, k: (q - k) % (h + 2) == b),
        "query_offset": 100,
    },
    "rows without keys": {
        "mask": attn_core.mask(lambda b, h, q, k: (q % 3 != 1) & (k > q)),
        "query_offset": 3,
    },
    "documents": {"mask": masks.segments(ids(TK, 40)), "query_offset": 118},
    "a bias": {"bias": draw(B, HQ, TQ, TK)},
    "a bias of a head": {"bias": draw(1, HQ, 1, TK), "mask": masks.causal(), "query_offset": "end"},
    "alibi": {"score": scores.alibi(SLOPES), "mask": masks.causal(), "query_offset": "end"},
    "softcap": {"score": scores.softcap(2.0)},
    "dropout": {"dropout": Dropout(0.3, 2**40 + 7), "query_offset": [3, 50]},
    "a scale below 0": {"scale": -0.3},
    "another layout": {
        "query": QUERY.transpose(1, 2),
        "key": KEY.transpose(1, 2),
        "value": VALUE.transpose(1, 2),
        "layout": "BTHD",
    },
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The kernels launched and what was compiled into them."""
    seen: list[tuple[str, dict[str, Any]]] = []
    launch = launcher.launch

    def spy(kernel: Any, programs: int, shape: Any, *args: Any, **options: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False))
        seen.append((kernel.__name__, {**given, **options, "programs": programs}))
        launch(kernel, programs, shape, *args, **options)

    monkeypatch.setattr(launcher, "launch", spy)
    return seen


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 keys, so that there is something to share out."""
    choose = launcher.config

    def config(kernel: str, *rest: Any) -> configs.Config:
        shape = choose(kernel, *rest)
        return replace(shape, keys=16) if kernel == "decode" else shape

    monkeypatch.setattr(launcher, "config", config)


def split_into(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "splits", lambda programs, tiles, filling: n)


@pytest.mark.parametrize("name", CASES)
def test_four_splits_of_packed_heads(
    name: str, launched: list[Any], short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(4, monkeypatch)
    compare({"query": QUERY, "key": KEY, "value": VALUE, **CASES[name]})
    kernels = dict(launched)
    assert kernels["forward"]["splits"] == 4
    assert kernels["forward"]["PACK"] == 4
    assert kernels["forward"]["M"] == 16
    assert kernels["forward"]["programs"] == B * HK * 4
    assert "combine" in kernels


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "pack", "rows"),
    [(1, 8, 1, 8, 16), (1, 4, 4, 1, 16), (16, 4, 2, 2, 32), (16, 16, 1, 16, 64), (5, 6, 2, 4, 32)],
)
def test_how_heads_are_packed(
    queries: int, heads: int, kv_heads: int, pack: int, rows: int, launched: list[Any]
) -> None:
    given = {
        "query": draw(1, heads, queries, D),
        "key": draw(1, kv_heads, 90, D),
        "value": draw(1, kv_heads, 90, D),
        "mask": masks.causal(),
        "query_offset": "end",
    }
    compare(given)
    options = dict(launched)["forward"]
    if launcher.INTERPRETED:
        assert (options["PACK"], options["M"]) == (pack, rows)
    else:
        assert options["PACK"] in (1, pack)


@pytest.mark.parametrize("name", ["plain", "lengths", "every head its own", "alibi", "dropout"])
def test_rows_that_one_tile_has_no_room_for_are_those_of_another(
    name: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a group together all the same: keys are read for each tile, and not for each head."""
    split_into(2, monkeypatch)
    choose = launcher.config

    def config(kernel: str, *rest: Any) -> configs.Config:
        shape = choose(kernel, *rest)
        return replace(shape, rows=16, keys=32) if kernel == "decode" else shape

    monkeypatch.setattr(launcher, "config", config)
    query = draw(B, HQ, 7, D)
    more = {**CASES[name]}
    more |= {"q_lengths": [7, 5]} if "q_lengths" in more else {}
    compare({"query": query, "key": KEY, "value": VALUE, **more})
    options = dict(launched)["forward"]
    assert (options["PACK"], options["M"]) == (4, 16)
    assert options["programs"] == B * HK * 2 * 2


def test_more_splits_than_tiles(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    split_into(16, monkeypatch)
    compare({"query": QUERY, "key": KEY, "value": VALUE, **CASES["lengths"]})
    assert dict(launched)["combine"]["splits"] == 16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(dtype: torch.dtype, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split_into(2, monkeypatch)
    compare(narrowed({"query": QUERY, "key": KEY, "value": VALUE}, dtype))


def test_poison_stays_where_nobody_looks(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    split_into(4, monkeypatch)
    given = {"query": QUERY, "key": KEY.clone(), "value": VALUE.clone(), **CASES["lengths"]}
    up, up_lse = draw(B, HQ, TQ, 40), draw(B, HQ, TQ)
    want = found(ours, given, up, up_lse)
    given["key"][1, :, 13:], given["value"][1, :, 13:] = torch.nan, torch.inf
    got = found(ours, given, up, up_lse)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_a_score_hides_by_its_size_is_hidden_from_empty_lanes_too(
    dtype: torch.dtype, launched: list[Any]
) -> None:
    """A lane without a head has no query of its own, and must not look where nobody does."""
    query, key, value = (x.to(dtype) for x in (QUERY[:, :, :1], KEY, VALUE))
    score = attn_core.score(lambda s, b, h, q, k: attn_core.where(s > -0.1, s, -torch.inf))
    given = {"query": query, "key": key, "score": score}
    s = torch.einsum("bgntd,bgkd->bgntk", query.unflatten(1, (HK, -1)).double(), key.double())
    hidden = (s * D**-0.5 < -0.2).all((2, 3))
    assert hidden.sum() > 4
    want = ours(value=value, **given)
    got = ours(value=torch.where(hidden[..., None], torch.nan, value), **given)
    assert torch.equal(got.out, want.out)
    assert dict(launched)["forward"]["PACK"] == 4


def test_splits_fill_the_device() -> None:
    assert decode.splits(8, 1000, 264) == 32  # 256 programs
    assert decode.splits(264, 1000, 264) == 1
    assert decode.splits(1, 1000, 264) == 128  # never more
    assert decode.splits(8, 5, 264) == 2  # two tiles to each, at least
    assert decode.splits(8, 1, 264) == 1
    for programs in range(1, 300, 7):
        n = decode.splits(programs, 10**6, 264)
        assert n & (n - 1) == 0
        assert n in (1, 128) or 132 < programs * n <= 264


def test_how_many_programs_a_processor_has_is_for_the_table_to_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "processors", lambda device: 132)
    sizes = decode.Sizes(2, 32, 8, 1, 32768)
    found = {}
    for programs in (1, 2, 3, 4, 8):
        config = configs.Config(16, 64, 4, 3, programs=programs)
        way = decode.cut(sizes, lambda kernel, c=config: c, torch.device(DEVICE))
        found[programs] = way.splits
    assert found == {1: 8, 2: 16, 3: 16, 4: 32, 8: 64}


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        ({}, 0),
        ({"mask": masks.causal()}, 1),
        ({"score": scores.alibi(SLOPES)}, 1),
        ({"score": scores.softcap(2.0)}, 0),
        ({"dropout": Dropout(0.3, 5)}, 1),
        ({"mask": attn_core.mask(lambda b, h, q, k: k % 3 > 0)}, 0),
        ({"kv_lengths": [70, 90]}, 1),
    ],
)
def test_where_queries_stand_is_worked_out_for_who_asks(
    more: dict[str, Any], facts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch less in a step that needs it least: one that looks at all that a cache holds."""
    seen = []
    prepare = launcher.prepare

    def spy(kernel: Any, *rest: Any, **options: Any) -> None:
        seen.append(kernel.__name__)
        prepare(kernel, *rest, **options)

    monkeypatch.setattr(launcher, "prepare", spy)
    given = {"query": QUERY, "key": KEY, "value": VALUE, "query_offset": [100, 120], **more}
    compare(given)
    assert (seen.count("facts") > 0) is bool(facts)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_parts_are_put_together_however_many_are_read_at_once(n: int) -> None:
    """Against float64; of rows without keys, of parts without keys, and twice the same bits."""
    splits, width, pad = 5, 24, 32
    m = 30 * torch.randn(B, HQ, splits, TQ)
    total = torch.rand_like(m) + 0.5
    parts = torch.randn(*m.shape, width)
    nothing = torch.zeros_like(m, dtype=torch.bool)
    nothing[:, 1, 2:4], nothing[:, :, -1], nothing[1, 2, :, 1] = True, True, True
    m[nothing], total[nothing], parts[nothing] = -torch.inf, 0, 0
    given = [x.to(DEVICE) for x in (parts, m, total)]
    answers = []
    for _ in range(2):
        out = torch.full((B, TQ, HQ, width), torch.nan, device=DEVICE).transpose(1, 2)
        row = torch.full((B, HQ, TQ), torch.nan, device=DEVICE)
        log_l, alive = row.clone(), torch.full_like(row, 7, dtype=torch.int8)
        with np.errstate(all="ignore"):
            kernels.combine[(B * HQ * TQ,)](
                *(*given, out, row, log_l, alive, row, row, 0, out.stride(), HQ, TQ, splits),
                DV=width, PAD_V=pad, N=n, SINKS=False, Q_LENGTHS=False,
            )  # fmt: skip
        answers.append([out, row, log_l, alive])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    out, row, log_l, alive = (x.double().cpu() for x in answers[0])
    weights = torch.exp(m.double() - m.double().amax(2, keepdim=True)).nan_to_num(0)
    whole = (weights * total.double()).sum(2)
    want = (weights[..., None] * parts.double()).sum(2) / whole[..., None].clamp_min(1e-300)
    seen = whole > 0
    assert not seen[1, 2, 1]
    assert seen.sum() == seen.numel() - 1
    assert torch.equal(alive == 1, seen)
    assert torch.equal(row[seen], m.double().amax(2)[seen])
    assert (row[~seen] == 0).all()
    assert torch.isposinf(log_l[~seen]).all()
    # Sums of five numbers whose sizes may differ: a few roundings of float32 each.
    size = (weights[..., None] * parts.double().abs()).sum(2) / whole[..., None].clamp_min(1e-300)
    assert ((out - want).abs() <= 2**-19 * size + 2**-126).all()
    assert ((log_l - whole.log())[seen].abs() <= 2**-19).all()


def test_many_queries_are_not_split(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    split_into(4, monkeypatch)
    ours(query=draw(1, 2, decode.FEW + 1, 16), key=draw(1, 2, 40, 16), value=draw(1, 2, 40, 16))
    assert dict(launched)["forward"]["splits"] == 1
