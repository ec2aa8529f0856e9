"""Schedules that a kernel makes are those of the interval reading on the host, list by list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_calls import DEVICE

import attn_core
from attn_core import masks, operand
from attn_core.backends.torch import triton_launch, triton_schedule
from attn_core.backends.torch.triton_schedule import Asked, schedule, told
from attn_core.blocks import EMPTY, FULL, PARTIAL, block_map
from attn_core.kernels.reach import reach
from attn_core.language.values import Mask

HERE = torch.device(DEVICE)
B, HQ, HK = 2, 4, 2
Launches = list[str]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The kernels that made schedules."""
    found: Launches = []
    prepare = triton_launch.prepare

    def spy(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        found.append(kernel.__name__)
        prepare(kernel, programs, *args, **options)

    monkeypatch.setattr(triton_launch, "prepare", spy)
    return found


def lists(found: Any) -> list[list[tuple[list[int], list[int]]]]:
    """(full, partial) tiles of each line of each map, of (B, Hk) maps."""
    order, full, live = (x.cpu().numpy() for x in found)
    lines = full.shape[2]
    order = np.broadcast_to(order, (B, HK, *order.shape[2:])).reshape(B * HK, lines, -1)
    full, live = (np.broadcast_to(x, (B, HK, lines)).reshape(-1, lines) for x in (full, live))
    return [
        [(o[:f].tolist(), o[f:n].tolist()) for o, f, n in zip(*each, strict=True)]
        for each in zip(order, full, live, strict=True)
    ]


def wanted(mask: Mask | None, asked: Asked, **more: Any) -> list[list[tuple[list[int], list[int]]]]:
    """The same of the host's map, by its quadtree."""
    arrays = () if mask is None else [np.asarray(a.cpu()) for a in mask.arrays]
    batch, heads, kv_heads, q_len, k_len = asked.sizes
    given = {"q_len": q_len, "k_len": k_len, "batch": batch, "heads": heads, **more}
    found = block_map(asked.mask, arrays, block_q=asked.tile[0], block_k=asked.tile[1], **given)
    grid = np.broadcast_to(found.dense(), (batch, heads, *found.grid))
    grouped = grid.reshape(batch, kv_heads, heads // kv_heads, *found.grid)
    some = np.where(grouped.max(2) >= PARTIAL, PARTIAL, EMPTY)
    grid = np.where(grouped.min(2) == FULL, FULL, some)
    if asked.ends[0]:
        grid[..., -1, :] = np.minimum(grid[..., -1, :], PARTIAL)
    if asked.ends[1]:
        grid[..., -1] = np.minimum(grid[..., -1], PARTIAL)
    if asked.columns:
        grid = grid.swapaxes(-1, -2)
    lines = grid.reshape(-1, *grid.shape[-2:])
    return [
        [(np.flatnonzero(x == FULL).tolist(), np.flatnonzero(x == PARTIAL).tolist()) for x in rows]
        for rows in lines
    ]


def compared(
    mask: Mask | None,
    q_len: int,
    k_len: int,
    tile: tuple[int, int],
    *,
    offset: Any = "zero",
    kv_lengths: Any = None,
    q_lengths: Any = None,
    ends: tuple[bool, bool] = (False, False),
) -> set[int]:
    """Both are one, by rows and by columns; the kinds of tiles that there are."""
    ints = [
        None if x is None or isinstance(x, str) else torch.tensor(x, device=HERE)
        for x in (kv_lengths, q_lengths, offset)
    ]
    said = told(*ints[:2], offset if ints[2] is None else ints[2], q_len, k_len, HERE)
    more: dict[str, Any] = {}
    keys = np.broadcast_to(k_len if kv_lengths is None else np.clip(kv_lengths, 0, k_len), B)
    rows = np.broadcast_to(q_len if q_lengths is None else np.clip(q_lengths, 0, q_len), B)
    if kv_lengths is not None:
        more["kv_lengths"] = keys
    if q_lengths is not None:
        more["q_lengths"] = rows
    places = {"zero": 0 * keys, "end": keys - rows}
    more["offsets"] = places[offset] if isinstance(offset, str) else np.broadcast_to(offset, B)
    kinds: set[int] = set()
    for columns in (False, True):
        tree, arrays = (None, ()) if mask is None else (mask.tree, mask.arrays)
        asked = Asked(tree, (B, HQ, HK, q_len, k_len), tile, ends, columns)
        found = lists(schedule(asked, arrays, said, HERE))
        want = wanted(mask, asked, **more)
        assert found == want
        for full, partial in (line for map_ in want for line in map_):
            width = -(-(q_len if columns else k_len) // tile[1 - columns])
            kinds |= {FULL} if full else set()
            kinds |= {PARTIAL} if partial else set()
            kinds |= {EMPTY} if len(full) + len(partial) < width else set()
    return kinds


def there(x: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x), device=HERE)


RNG = np.random.default_rng(7)
DOCUMENTS = np.sort(RNG.integers(0, 5, (B, 90)), 1)
MIXED = RNG.integers(0, 4, (B, 90))

MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.window(20, 3),
    "documents": masks.segments(there(DOCUMENTS)),
    "causal documents": masks.causal() & masks.segments(there(DOCUMENTS)),
    "documents of rows and keys": masks.segments(there(MIXED), there(DOCUMENTS)),
    "not sorted": masks.segments(there(MIXED)),
    "wide ids": masks.segments(there(DOCUMENTS.astype(np.int64) + 2**33)),
    "small ids": masks.segments(there(DOCUMENTS.astype(np.uint8))),
    "prefix": masks.prefix(there([11, 40])) | masks.causal(),
    "dilated": masks.dilated(3, left=9),
    "global": masks.global_tokens(there(np.arange(90) % 31 == 4)) | masks.window(6, 0),
    "chunks": masks.chunks(24),
    "table": masks.dense(there(RNG.random((B, 1, 77, 90)) < 0.02)),
    "table of all": masks.dense(there(np.tril(np.ones((77, 90), bool)))),
    "table of keys": masks.dense(there(np.arange(90) % 50 < 20)[None, None, None]),
    "table of rows": masks.dense(there(np.arange(77) % 50 < 20)[None, None, :, None]),
    "blocks": masks.blocks(there(RNG.random((5, 6)) < 0.4), 18),
    "each head its own": attn_core.mask(lambda b, h, q, k: (q - k) % (h + 2) == b),
    "of a head": attn_core.mask(lambda b, h, q, k: (q - k) < 8 * h),
    "never": attn_core.mask(lambda b, h, q, k: k != k),
    "one number": attn_core.mask(lambda b, h, q, k: q - k <= operand(there(17))[()]),
    "nothing there": attn_core.mask(
        lambda b, h, q, k: operand(there(np.zeros((0, 3), np.int32)))[k, q] <= q - k
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_of_the_vocabulary(name: str, prepared: Launches) -> None:
    mask = MASKS[name]
    kinds = compared(mask, 77, 90, (32, 16), offset=13, ends=(True, True))
    kinds |= compared(mask, 61, 83, (16, 32), kv_lengths=[83, 30], q_lengths=[61, 5], offset="end")
    kinds |= compared(mask, 1, 90, (1, 32), offset=[-3, 70], kv_lengths=88)
    assert set(prepared) >= {"schedule"}
    assert kinds >= ({EMPTY} if name == "never" else {PARTIAL})


def _number(depth: int, draw: np.random.Generator) -> Callable[..., Any]:
    """A random integer of (b, h, q, k), small enough for whatever is done to it."""
    if not depth or draw.random() < 0.2:
        value = int(draw.integers(-7, 9))
        leaves: list[Callable[..., Any]] = [
            lambda b, h, q, k: q,
            lambda b, h, q, k: k,
            lambda b, h, q, k: attn_core.row + 0 * q,
            lambda b, h, q, k: b + 2 * h,
            lambda b, h, q, k: 0 * q + value,
        ]
        return leaves[int(draw.integers(len(leaves)))]
    x, y = _number(depth - 1, draw), _number(depth - 1, draw)
    by = int(draw.integers(1, 6)) * (1 if draw.random() < 0.7 else -1)
    held = lambda n: attn_core.minimum(attn_core.maximum(n, -500), 500)  # noqa: E731
    one = operand(there(draw.integers(-9, 9, 70)), bounds=(-9, 9))
    two = operand(there(draw.integers(-9, 90, (2, 70))), bounds=(-9, 90))
    grid = operand(there(draw.integers(-9, 9, (70, 60))), bounds=(-9, 9))
    made: list[Callable[..., Any]] = [
        lambda *i: held(x(*i)) + held(y(*i)),
        lambda *i: held(x(*i)) - held(y(*i)),
        lambda *i: held(x(*i)) * by,
        lambda *i: x(*i) // by,
        lambda *i: x(*i) % by,
        lambda *i: x(*i) % (held(y(*i)) + 1),
        lambda *i: x(*i) // (held(y(*i)) - 1),
        lambda *i: abs(held(x(*i))),
        lambda *i: attn_core.minimum(x(*i), y(*i)),
        lambda *i: attn_core.maximum(x(*i), y(*i)),
        lambda *i: x(*i) >> held(y(*i)),
        lambda *i: x(*i) & 7,
        lambda *i: attn_core.where(x(*i) < y(*i), x(*i), y(*i)),
        lambda *i: one[x(*i)],
        lambda *i: two[i[0], x(*i)],
        lambda *i: grid[attn_core.row, i[3]],
        lambda *i: grid[i[2], i[3]],
        lambda *i: grid[i[3] // 4, i[2]],
    ]
    return made[int(draw.integers(len(made)))]


def _condition(depth: int, draw: np.random.Generator) -> Callable[..., Any]:
    if not depth or draw.random() < 0.2:
        x, y = _number(2, draw), _number(1, draw)
        flags = operand(there(draw.random(40) < 0.8))
        table = operand(there(draw.random((1, 70, 60)) < 0.7))
        made: list[Callable[..., Any]] = [
            lambda *i: x(*i) < y(*i),
            lambda *i: x(*i) >= y(*i),
            lambda *i: x(*i) == y(*i),
            lambda *i: x(*i) != y(*i),
            lambda *i: i[2] - i[3] <= y(*i),
            lambda *i: i[2] >= i[3],
            lambda *i: flags[x(*i)],
            lambda *i: table[i[0], attn_core.row, i[3]],
        ]
        return made[int(draw.integers(len(made)))]
    x, y, z = (_condition(depth - 1, draw) for _ in range(3))
    joined: list[Callable[..., Any]] = [
        lambda *i: x(*i) & y(*i),
        lambda *i: x(*i) | y(*i),
        lambda *i: x(*i) ^ y(*i),
        lambda *i: ~x(*i),
        lambda *i: x(*i) == y(*i),
        lambda *i: attn_core.where(x(*i), y(*i), z(*i)),
    ]
    return joined[int(draw.integers(len(joined)))]


@pytest.mark.parametrize(
    ("seeds", "there_are"),
    [(range(0, 16, 2), {EMPTY, PARTIAL, FULL}), (range(1, 16, 2), {EMPTY, PARTIAL})],
    ids=["even", "odd"],
)
def test_of_masks_that_nobody_thought_of(
    seeds: range, there_are: set[int], prepared: Launches
) -> None:
    """Some of them have no function, and are made by torch: the lists are the same. Half of them
    at a time: on a GPU nearly all of it is waiting for a compiler."""
    made, count, kinds = 0, len(seeds), set()
    for seed in seeds:
        draw = np.random.default_rng(seed)
        mask = attn_core.mask(_condition(2, draw))
        sizes = [int(n) for n in draw.integers(1, 70, 2)]
        tile = tuple(int(n) for n in 2 ** draw.integers(4, 6, 2))
        more: dict[str, Any] = {"offset": [0, int(draw.integers(-20, 20)), [3, 9], "end"][seed % 4]}
        if draw.random() < 0.5:
            more["kv_lengths"] = draw.integers(0, sizes[1] + 1, 2).tolist()
        if draw.random() < 0.3:
            more["q_lengths"] = draw.integers(0, sizes[0] + 1, 2).tolist()
        before = prepared.count("schedule")
        kinds |= compared(mask, *sizes, tile, ends=(seed % 3 == 0, seed % 5 == 0), **more)
        made += prepared.count("schedule") > before
    assert kinds == there_are
    assert count // 3 < made < count


def test_what_no_tile_bounds_is_left_to_torch(prepared: Launches) -> None:
    ids, places = there(DOCUMENTS[0]), there(RNG.integers(0, 90, 90))
    mask = attn_core.mask(lambda b, h, q, k: operand(ids)[operand(places)[k]] <= q // 9)
    compared(mask, 80, 90, (16, 32))
    assert "schedule" not in prepared
    forms = tuple(map(triton_schedule.form, mask.arrays))
    assert reach(mask.tree, forms, (16, 32), (False, False)) is None
    assert reach(masks.causal().tree, (), (16, 32), (False, False)) is not None
