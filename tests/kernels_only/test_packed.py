"""The forward kernel as decoding launches it: heads packed into one tile, keys split, and both.

Launched by hand here, with tiles of every kind, so that what is said of it does not depend on who
launches it; against the reference in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_calls import HALVES, alike, bound, described, narrowed
from triton import cdiv, next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

import attn_core
import attn_core.kernels.interpreter
from attn_core import Dropout, attention, masks, scores
from attn_core.api import stated
from attn_core.backends.torch.tiles import Tiles
from attn_core.backends.torch.triton_call import forms
from attn_core.blocks import FULL, PARTIAL, block_grid
from attn_core.kernels import forward as kernels
from attn_core.kernels.source import of_mask, of_score
from attn_core.language.neighbours import full_tiles_are_neighbours
from attn_core.language.values import drop_threshold
from attn_core.schedule import of_status
from attn_core.spec import as_output

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, HK, TK, D, DV = 2, 2, 90, 24, 40
_RNG = torch.Generator().manual_seed(5)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_RNG).to(DEVICE)


def operands_of(arrays: Any, k_len: int) -> tuple[tuple[Any, ...], list[tuple[int, bool, bool]]]:
    given: list[Any] = []
    for a in arrays:
        given += [a.view(torch.int8) if a.dtype == torch.bool else a, *a.shape]
    return tuple(given), forms(arrays, k_len)


def launched(
    given: dict[str, Any],
    *,
    rows: int,
    keys: int,
    pack: int,
    splits: int,
    descriptors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse and whether each row sees a key; `rows` are those of one head in a tile."""
    _, p, x, _ = stated({**given, "return_lse": True})
    x = x._replace(
        mask=tuple(torch.as_tensor(a, device=DEVICE) for a in x.mask),
        score=tuple(torch.as_tensor(a, device=DEVICE).float() for a in x.score),
    )
    q, k, v = (t.transpose(1, 2) if p.layout == "BTHD" else t for t in x[:3])
    batch, heads, q_len, width = q.shape
    kv_heads, k_len, v_width = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads

    def ints(value: Any, default: int) -> torch.Tensor:
        found = torch.as_tensor(default if value is None else value, device=DEVICE)
        return found.reshape(-1).to(torch.int32)

    kv, ql = ints(x.kv_lengths, k_len), ints(x.q_lengths, q_len)
    offset = {"start": ints(None, 0), "end": kv - ql}.get(p.offset, ints(x.query_offset, 0))
    lengths = (kv, ql, offset)
    status = block_grid(
        Tiles(DEVICE), p.mask, x.mask, q_len=q_len, k_len=k_len, block_q=rows, block_k=keys,
        batch=batch, heads=heads, offsets=offset, kv_lengths=kv, q_lengths=ql,
    )  # fmt: skip
    if status.shape[1] > 1:
        each = status.unflatten(1, (kv_heads, group))
        some = torch.where(each.amax(2) >= PARTIAL, PARTIAL, 0)
        status = torch.where(each.amin(2) == FULL, FULL, some)
    if k_len % keys:
        status = torch.cat([status[..., :-1], status[..., -1:].clamp(max=PARTIAL)], -1)
    schedule = of_status(Tiles(DEVICE), status)
    lines = schedule.full
    maps = [0 if n == 1 else s for n, s in zip(lines.shape, lines.stride(), strict=True)][:2]
    tiles = cdiv(q_len, rows)
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    bias = none[None, None, None] if x.bias is None else x.bias
    strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
    seed = none
    if p.rate:
        seed = torch.tensor([int(x.seed[0]), int(x.seed[1])], device=DEVICE)
    mask_operands, mask_form = operands_of(x.mask, k_len)
    score_operands, score_form = operands_of(x.score, k_len)
    out = torch.full((*q.shape[:3], v_width), torch.nan, dtype=q.dtype, device=DEVICE)
    m = torch.full((batch, heads, q_len), torch.nan, device=DEVICE)
    log_l, alive = m.clone(), torch.full_like(m, 7, dtype=torch.int8)
    parts, part_m, part_l = out, m, log_l
    if splits > 1:
        part_m = torch.full((batch, heads, splits, q_len), torch.nan, device=DEVICE)
        part_l = part_m.clone()
        parts = torch.full((*part_m.shape, v_width), torch.nan, device=DEVICE)
    sinks = none if x.sinks is None else x.sinks
    numbers = (p.scale, drop_threshold(p.rate) if p.rate else 0, 1 / (1 - p.rate))
    packs = heads if pack == 1 else kv_heads
    pads = {name: max(16, next_power_of_2(n)) for name, n in (("PAD", width), ("PAD_V", v_width))}
    read = (k, v)
    if descriptors:
        read = tuple(
            TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, keys, wide])
            for t, wide in ((k, pads["PAD"]), (v, pads["PAD_V"]))
        )
    one = tuple(0 if len(n) == 1 else 1 for n in lengths)
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy
        kernels.forward[(tiles * batch * packs * splits,)](
            *(q, *read, parts, part_m, part_l, alive, bias, sinks, *lengths, seed, *schedule),
            *(mask_operands, score_operands, *numbers),
            *(q.stride(), k.stride(), v.stride(), parts.stride(), tuple(strides)),
            *(one, *maps, heads, group, q_len, k_len, tiles, schedule.order.shape[-1], splits),
            D=width, DV=v_width, **pads, M=rows * pack, N=keys, PACK=pack, SPLIT=splits > 1,
            **of_mask(p.mask, mask_form), **of_score(p.score, score_form),
            BIAS=x.bias is not None, WHOLE=k_len % 16 == 0,
            SINKS=x.sinks is not None and splits == 1,
            KV_LENGTHS=True, Q_LENGTHS=True, DROPOUT=bool(p.rate),
            LATE=x.bias is None and p.score is None and p.scale > 0,
            RUN=p.mask is None or full_tiles_are_neighbours(p.mask, "k"),
            DESCRIPTORS=descriptors, PRECISION="ieee",
        )  # fmt: skip
        if splits > 1:
            kernels.combine[(batch * heads * q_len,)](
                *(parts, part_m, part_l, out, m, log_l, alive, sinks, ql, one[1], out.stride()),
                *(heads, q_len, splits), DV=v_width, PAD_V=pads["PAD_V"], N=2,
                SINKS=x.sinks is not None, Q_LENGTHS=True,
            )  # fmt: skip
    lse = torch.where(log_l == torch.inf, -torch.inf, m + log_l)
    return out.transpose(1, 2) if p.layout == "BTHD" else out, lse, alive


def wide(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.double()
    if isinstance(x, attn_core.Score):
        return type(x)(x.tree, tuple(wide(torch.as_tensor(t)) for t in x.arrays))
    return x


def question(group: int, q_len: int, **more: Any) -> dict[str, Any]:
    heads = HK * group
    return {
        "query": draw(B, heads, q_len, D),
        "key": draw(B, HK, TK, D),
        "value": draw(B, HK, TK, DV),
        **more,
    }


WAYS = {
    "packed": {"rows": 4, "keys": 16, "pack": 4, "splits": 1},
    "split": {"rows": 16, "keys": 16, "pack": 1, "splits": 3},
    "more splits than tiles": {"rows": 16, "keys": 64, "pack": 1, "splits": 8},
    "both": {"rows": 4, "keys": 32, "pack": 4, "splits": 2},
}
HEADS = torch.arange(8) % 3

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": masks.causal(), "query_offset": "end"},
    "window": {"mask": masks.window(20, 0), "query_offset": "end"},
    "documents": {
        "mask": masks.segments(torch.arange(128, device=DEVICE) // 40),
        "query_offset": 60,
    },
    "lengths": {
        "kv_lengths": [90, 13],
        "q_lengths": [3, 2],
        "mask": masks.causal(),
        "query_offset": "end",
    },
    "no keys": {"kv_lengths": [64, 0], "query_offset": 0},
    "rows without keys": {
        "mask": attn_core.mask(lambda b, h, q, k: (q % 2 == 1) & (k > 70)),
        "query_offset": 0,
    },
    "each head its own": {
        "mask": attn_core.mask(lambda b, h, q, k: (k + h) % 3 != b),
        "query_offset": 0,
    },
    "sinks": {"sinks": True, "kv_lengths": [64, 0], "q_lengths": [3, 0]},
    "everything": {
        "mask": masks.causal(),
        "query_offset": "end",
        "bias": True,
        "score": scores.softcap(2.0),
        "sinks": True,
        "kv_lengths": [90, 70],
        "dropout": Dropout(0.2, 5),
    },
}


def completed(options: dict[str, Any], group: int, q_len: int) -> dict[str, Any]:
    made = dict(options)
    if made.get("sinks"):
        made["sinks"] = draw(HK * group)
    if made.get("bias"):
        made["bias"] = draw(1, HK * group, q_len, TK)
    if "query_offset" not in made:
        made["query_offset"] = 0
    return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name: str, way: str) -> None:
    group, q_len = 3, 3  # no power of two: a packed tile has a lane that is nobody's
    given = question(group, q_len, **completed(CASES[name], group, q_len))
    compare(given, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_groups_and_numbers_of_queries(way: str, group: int) -> None:
    for q_len in (1, 5, 16):
        given = question(group, q_len, mask=masks.causal(), query_offset="end")
        compare(given, way)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_half_precision(way: str, dtype: torch.dtype) -> None:
    given = question(3, 3, **completed(CASES["sinks"], 3, 3))
    compare(narrowed(given, dtype), way)


def test_the_other_layout() -> None:
    given = question(3, 3, mask=masks.causal(), query_offset="end")
    turned = {n: given[n].transpose(1, 2).contiguous() for n in ("query", "key", "value")}
    compare({**given, **turned, "layout": "BTHD"}, "both")


def compare(given: dict[str, Any], way: str) -> None:
    """By the suite's rule, as `kernel_calls.compare`."""
    group = given["query"].shape[1 if given.get("layout") != "BTHD" else 2] // HK
    shape = dict(WAYS[way])
    shape["pack"] = 1 if shape["pack"] == 1 else next_power_of_2(group)
    shape["rows"] = max(shape["rows"], 16 // shape["pack"])
    out, lse, alive = launched(given, **shape)
    wanted, plain = (
        as_output(attention(**x, return_lse=True, impl="reference"))
        for x in ({n: wide(x) for n, x in given.items()}, given)
    )
    assert wanted.out.isfinite().all()
    dtype = str(given["query"].dtype).removeprefix("torch.")
    for got, want, other in ((out, wanted.out, plain.out), (lse, wanted.lse, plain.lse)):
        some = want.isfinite()
        off = float((other.double() - want)[some].abs().max()) if some.any() else 0.0
        spread = max(1.0, float(want[some].abs().max()) if some.any() else 0.0)
        allowed = bound(off, spread, dtype, "out")
        torch.testing.assert_close(got.double(), want, rtol=0, atol=allowed)
    unseen = (wanted.out == 0).all(-1)
    unseen = unseen.transpose(1, 2) if given.get("layout") == "BTHD" else unseen
    if not given.get("dropout"):
        assert torch.equal(alive == 0, unseen)


@pytest.mark.skipif(not described(), reason="tensor descriptors are Hopper's and later GPUs'")
@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
@pytest.mark.parametrize("name", ["plain", "window", "lengths", "everything"])
def test_tensor_descriptors_read_the_same(name: str, layout: str) -> None:
    """Tiles that reach over the ends of keys and of widths: what pointers read."""
    given = question(3, 3, **completed(CASES[name], 3, 3))
    if layout == "BTHD":
        turned = {n: given[n].transpose(1, 2).contiguous() for n in ("query", "key", "value")}
        given = {**given, **turned, "layout": "BTHD"}
    shape = {"rows": 16, "keys": 32, "pack": 1, "splits": 1}
    for a, b in zip(
        launched(given, **shape, descriptors=True), launched(given, **shape), strict=True
    ):
        alike(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_poison_of_what_no_row_of_the_group_sees(way: str) -> None:
    """A lane that is nobody's must not make a key seen: its value is NaN here."""
    group, heads = 3, HK * 3
    blind = attn_core.operand(torch.tensor([0, 0, 0, 1, 1, 1]))
    # Of the first group nobody sees keys past 40; the heads of the second do.
    made = attn_core.mask(lambda b, h, q, k: (k < 40) | (blind[h] == 1))
    given = question(group, 3, mask=made, query_offset=0)
    assert given["query"].shape[1] == heads
    want = launched(given, **{**WAYS[way], "pack": 4 if WAYS[way]["pack"] > 1 else 1})
    # A logit of poison is no logit, so the value alone is the harder question.
    for name, poison in (("value", torch.nan), ("key", torch.inf)):
        given[name][:, 0, 40:] = poison
        got = launched(given, **{**WAYS[way], "pack": 4 if WAYS[way]["pack"] > 1 else 1})
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert got[0].isfinite().all()
