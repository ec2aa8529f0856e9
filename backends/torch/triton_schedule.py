"""Schedules of tiles for the kernels, made where the tensors are.

A schedule (`attn_core.schedule`) is what the interval reading says of every tile. A kernel makes it
in one launch (`kernels/schedule.py`) wherever a tile bounds what has to be read of the operands;
elsewhere, where an index is itself looked up, it is made of operations of torch. Nothing depends on
what tensors hold, and the host waits for none.

Where no tensor has a say in it, it depends on sizes alone and is `kept` for later calls; and so
where all that has is `held`, as the host's arrays are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from triton import cdiv

from attn_core.backends.torch import held
from attn_core.backends.torch import triton_launch as launcher
from attn_core.backends.torch.kept import Kept
from attn_core.backends.torch.tiles import Tiles
from attn_core.blocks import FULL, PARTIAL, block_grid
from attn_core.kernels import schedule as _kernels
from attn_core.kernels.reach import Form, Reach, Reduced, reach
from attn_core.language.tree import Tree
from attn_core.schedule import Schedule, of_status
from attn_core.spec import FAR

Array = Any

KEPT = 2**18
"""Tiles, of all batches and heads, beyond which a schedule is made anew each time, not kept."""

_kept = Kept(64)
_numbers = Kept(64)


class Told(NamedTuple):
    """What lengths and offsets say, int32 on the device: kv_lengths, q_lengths, offsets.

    Attributes:
        arrays: of B or 1 each, held within [0, T] and within what offsets mean.
        given: whether there are lengths of keys, lengths of rows, and offsets that move.
        differ: whether each says something else of each batch.
        start: where queries begin if nothing moves them.
    """

    arrays: tuple[Array, Array, Array]
    given: tuple[bool, bool, bool]
    differ: tuple[bool, bool, bool]
    start: int

    @property
    def cut(self) -> bool:
        """Whether lengths have a say."""
        return self.given[0] or self.given[1]

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(0 if len(n) == 1 else 1 for n in self.arrays)


def told(
    kv_lengths: Array | None,
    q_lengths: Array | None,
    offset: Array | str,
    q_len: int,
    k_len: int,
    device: torch.device,
) -> Told:
    """What kernels are told of lengths and of where queries stand: one launch, or none.

    Args:
        offset: as it was given, or "zero" or "end".
    """
    end = offset == "end" if isinstance(offset, str) else False
    offsets = None if isinstance(offset, str) else offset
    arrays = [None if x is None else x.reshape(-1) for x in (kv_lengths, q_lengths, offsets)]
    keys, rows, places = (x is not None and len(x) != 1 for x in arrays)
    cut, start = arrays[0] is not None or arrays[1] is not None, k_len - q_len if end else 0
    end = end and cut
    given = (arrays[0] is not None, arrays[1] is not None, end or offsets is not None)
    differ = (keys, rows, keys or rows if end else places)
    if not any(given):
        none = number(0, device)
        return Told((none, none, number(start, device)), given, differ, start)
    count = max(len(x) for x in arrays if x is not None)
    # Rows a multiple of 16 bytes apart, whatever the batch: a kernel is told where arrays begin.
    apart = -4 * (-count // 4)
    out = torch.empty((3, apart), dtype=torch.int32, device=device)
    steps = tuple(0 if x is None or len(x) == 1 else x.stride(0) for x in arrays)
    launcher.prepare(
        *(_kernels.facts, cdiv(count, 128)),
        *(*[out if x is None else x for x in arrays], out, steps, count, apart),
        *(q_len, k_len, start),
        FAR=FAR,
        KV_LENGTHS=given[0],
        Q_LENGTHS=given[1],
        OFFSETS=offsets is not None,
        END=end,
        COUNT=128,
    )
    return Told((out[0, :count], out[1, :count], out[2, :count]), given, differ, start)


def number(n: int, device: torch.device) -> Array:
    """An int32 as an array of one."""
    made = lambda: torch.full((1,), n, dtype=torch.int32, device=device)  # noqa: E731
    return _numbers.of(n, device, made)


class Asked(NamedTuple):
    """What is static of a schedule.

    Attributes:
        sizes: B, Hq, Hk, Tq, Tk.
        tile: rows and keys.
        ends: whether tiles in which rows end are partial, and those in which keys end.
        columns: whether its lines are columns of tiles.
    """

    mask: Tree | None
    sizes: tuple[int, int, int, int, int]
    tile: tuple[int, int]
    ends: tuple[bool, bool]
    columns: bool

    @property
    def grid(self) -> tuple[int, int]:
        return cdiv(self.sizes[3], self.tile[0]), cdiv(self.sizes[4], self.tile[1])

    @property
    def apart(self) -> tuple[int, int]:
        """Batches and key heads that the mask tells apart; lengths and offsets may others."""
        batch, _, kv_heads, _, _ = self.sizes
        return batch if self.reads("b") else 1, kv_heads if self.reads("h") else 1

    def reads(self, *names: str) -> bool:
        return self.mask is not None and self.mask.reads(*names)


def schedule(asked: Asked, operands: Sequence[Array], said: Told, device: torch.device) -> Schedule:
    """Of the tiles that are asked for: (Bm, Hm, ...), Hm over key heads."""
    moved = said.given[2] and asked.reads("q")
    numbers = tuple(held.number(x) for x in operands)
    fixed = not (moved or said.cut or None in numbers)
    if not fixed or prod((*asked.apart, *asked.grid)) > KEPT:
        return _made(asked, operands, said, device)
    # An offset that the mask does not read moves nothing here.
    at = number(said.start, device)
    none = Told((at, at, at), (False,) * 3, (False,) * 3, said.start)
    make = lambda: _made(asked, operands, none, device)  # noqa: E731
    return _kept.of((asked, numbers, said.start), device, make)


def _made(asked: Asked, operands: Sequence[Array], said: Told, device: torch.device) -> Schedule:
    found = reach(asked.mask, tuple(map(form, operands)), asked.tile, said.given[:2])
    if found is None:
        return _by_torch(asked, operands, said, device)
    batch, heads, _, q_len, k_len = asked.sizes
    shifted = said.differ[2] and asked.reads("q")
    batches, maps = asked.apart
    batches = batch if shifted or any(said.differ[:2]) else batches
    lines, width = reversed(asked.grid) if asked.columns else asked.grid
    full = torch.empty((batches, maps, lines), dtype=torch.int32, device=device)
    live, order = torch.empty_like(full), full.new_empty((*full.shape, width))
    count = at_once(found, width)
    given = list(arguments(operands))
    for table in found.reduced:
        given += _reduced(operands[table.number], table)
    launcher.prepare(
        *(_kernels.schedule, batches * maps * lines),
        *(order, full, live, tuple(given), said.arrays, said.strides),
        *(maps, heads // maps if asked.reads("h") else 1, lines, width, q_len, k_len),
        *map(int, asked.ends),
        REACH=found.call,
        M=asked.tile[0],
        N=asked.tile[1],
        COUNT=count,
        ONCE=count >= width,
        COLUMNS=asked.columns,
        KV_LENGTHS=said.given[0],
        Q_LENGTHS=said.given[1],
    )
    return Schedule(order, full, live)


def at_once(found: Reach, width: int) -> int:
    """Tiles of a line that a program looks at together.

    Compiled in, and so of few values: 16, 128 or 1024 as far as there is room.
    """
    enough = next(n for n in (16, 128, 1024) if n >= min(width, 1024))
    return max(1, min(enough, _kernels.AT_ONCE // found.entries))


def form(operand: Array) -> Form:
    """What is static of it; of an empty one nothing is looked up but a zero."""
    ones = tuple(n == 1 or not operand.numel() for n in operand.shape)
    return Form(ones, operand.dtype == torch.bool)


def _reduced(table: Array, by: Reduced) -> list[Any]:
    """(least, greatest, sizes) of a table in grains."""
    tall, *wide = [axis for axis, grain in enumerate(by.grains) if grain > 1]
    last = wide[0] if wide else table.dim()
    sizes = list(table.shape)
    sides = (by.grains[tall], by.grains[last] if wide else 1)
    middle, inner = prod(sizes[tall + 1 : last]), prod(sizes[last + 1 :])
    across = sizes[last] if wide else 1
    grained = [cdiv(n, grain) for n, grain in zip(sizes, by.grains, strict=True)]
    source = table.contiguous()
    source = source.view(torch.int8) if source.dtype == torch.bool else source
    least = torch.empty(grained, dtype=source.dtype, device=source.device)
    most = torch.empty_like(least)
    launcher.prepare(
        *(_kernels.reduced, least.numel(), source, least, most),
        *(sizes[tall], middle, across, inner),
        TALL=sides[0],
        WIDE=sides[1],
        AT_ONCE=max(1, min(sides[0], _kernels.OF_TABLES // sides[1])),
    )
    return [least, most, *grained]


def _by_torch(
    asked: Asked, operands: Sequence[Array], said: Told, device: torch.device
) -> Schedule:
    """The same, as operations of torch: dozens of launches."""
    batch, heads, kv_heads, q_len, k_len = asked.sizes
    found = block_grid(
        *(Tiles(device, keep=True), asked.mask, operands),
        q_len=q_len,
        k_len=k_len,
        block_q=asked.tile[0],
        block_k=asked.tile[1],
        batch=batch,
        heads=heads,
        offsets=said.arrays[2] if said.given[2] else said.start,
        kv_lengths=said.arrays[0] if said.given[0] else None,
        q_lengths=said.arrays[1] if said.given[1] else None,
    )
    if found.shape[1] > 1:
        grouped = found.unflatten(1, (kv_heads, -1))
        some = torch.where(grouped.amax(2) >= PARTIAL, PARTIAL, 0)
        found = torch.where(grouped.amin(2) == FULL, FULL, some)
    for axis, partial in zip((-2, -1), asked.ends, strict=True):
        if partial:
            first, last = found.split([found.shape[axis] - 1, 1], axis)
            found = torch.cat([first, last.clamp(max=PARTIAL)], axis)
    if asked.columns:
        found = found.transpose(-1, -2).contiguous()
    return of_status(Tiles(device, keep=True), found)


def arguments(operands: Sequence[Array]) -> tuple[Any, ...]:
    """Pointer and sizes of each operand; of an empty one nothing is looked up but a zero."""
    found: list[Any] = []
    for a in operands:
        a = a.contiguous() if a.numel() else a.new_zeros((1,) * a.dim())
        found += [a.view(torch.int8) if a.dtype == torch.bool else a, *a.shape]
    return tuple(found)
