"""What every kernel of a call is told alike, and its schedules of tiles.

A schedule is made on the tensors' device from the interval reading: nothing waits for the device,
and nothing depends on what tensors hold. Where no tensor has a say in it, it depends on sizes alone
and is kept for the next call; and so where all that has is `held`, as the host's arrays are.

Imported where it is used: torch alone does not need triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from attn_core.backends.torch import held, philox, reference
from attn_core.backends.torch import triton_launch as launcher
from attn_core.backends.torch.chunked_parts import Ask
from attn_core.backends.torch.tiles import Tiles
from attn_core.blocks import FULL, PARTIAL, block_grid
from attn_core.kernels.configs import Config
from attn_core.kernels.source import function
from attn_core.language.neighbours import full_tiles_are_neighbours
from attn_core.language.tree import Tree
from attn_core.language.values import drop_threshold
from attn_core.schedule import Schedule, of_status
from attn_core.spec import Operands

Array = Any

KEPT = 2**18
"""Tiles of a grid beyond which its schedule is made anew each time, rather than kept."""


class Call:
    """What forward and backward kernels are told alike.

    Attributes:
        q, k, v: heads first, by their strides.
        bias, bias_strides, seed, sinks: as kernels read them; an array of one zero where not given.
        lengths: kv_lengths, q_lengths, offsets; int32 (B or 1,).
        numbers: scale, dropout's threshold, 1 / (1 - rate).
        kind: what tiles are chosen by.
        options: what is compiled in.
    """

    def __init__(self, ask: Ask, scale: float, x: Operands) -> None:
        self.ask, self.scale, self.x = ask, scale, x
        self.q, self.k, self.v = (self.heads_first(t) for t in x[:3])
        self.batch, self.heads, self.q_len, self.width = self.q.shape
        self.kv_heads = self.k.shape[1]
        self.k_len, self.v_width = self.v.shape[2:]
        self.group = self.heads // self.kv_heads
        self.device = x.query.device
        self.kv_lengths, self.q_lengths = (
            None if given is None else reference.lengths(given, most).reshape(-1)
            for given, most in ((x.kv_lengths, self.k_len), (x.q_lengths, self.q_len))
        )
        none = _number(0, self.device)
        # Where no tensor moves the queries, they all start at one place.
        moved = ask.offset == "given" or (ask.offset == "end" and self.cut)
        self.start = self.k_len - self.q_len if ask.offset == "end" else 0
        offsets = _number(self.start, self.device)
        if moved:
            offsets = reference.offset(ask, x, self.q_len, self.k_len).reshape(-1)
        self.lengths = (
            none if self.kv_lengths is None else self.kv_lengths,
            none if self.q_lengths is None else self.q_lengths,
            offsets,
        )
        self.length_strides = tuple(0 if len(n) == 1 else 1 for n in self.lengths)
        bias, seed = none[None, None, None], none
        if x.bias is not None:
            bias = x.bias if x.bias.dim() == 4 else x.bias[None, None]
        self.bias_strides = spanned(bias)
        if ask.rate:
            seed = torch.stack(philox.words(x.seed))
        self.seed, self.bias = seed, bias
        self.sinks = none if x.sinks is None else x.sinks.contiguous()
        self.numbers = (scale, drop_threshold(ask.rate) if ask.rate else 0, 1 / (1 - ask.rate))
        self.kind = launcher.Kind(
            (self.width, self.v_width),
            str(self.q.dtype).removeprefix("torch."),
            mask="operands" if x.mask else "positions" if ask.mask else "",
            lengths=self.cut,
            score=ask.score is not None,
            bias=x.bias is not None,
            dropout=ask.rate > 0,
        )
        self.options = {
            "D": self.width,
            "DV": self.v_width,
            "PAD": max(16, next_power_of_2(self.width)),
            "PAD_V": max(16, next_power_of_2(self.v_width)),
            "MASK": device_function(ask.mask, x.mask),
            "KV_LENGTHS": self.kv_lengths is not None,
            "Q_LENGTHS": self.q_lengths is not None,
            "DROPOUT": bool(ask.rate),
            # Of 16-bit numbers it means nothing. AMD's compiler has TF32 for few of its devices.
            "PRECISION": "tf32" if ask.fast and not torch.version.hip else "ieee",
        }

    def heads_first(self, x: Array) -> Array:
        return x if self.ask.layout == "BHTD" else x.transpose(1, 2)

    def config(self, kernel: str) -> Config:
        """The shape of this kernel's launch."""
        return launcher.config(kernel, self.device, self.kind)

    def schedule(self, rows: int, keys: int, *, columns: bool = False) -> Schedule:
        """Of tiles of so many rows and keys: (Bm, Hm, ...), Hm over key heads."""
        ask = self.ask
        reads = ask.mask is not None and ask.mask.reads("q")
        if (reads and ask.offset == "given") or self.cut:
            return self._schedule(rows, keys, columns, self.lengths[2])
        if self.x.mask:
            numbers = tuple(held.number(x) for x in self.x.mask)
            grid = -(-self.q_len // rows) * -(-self.k_len // keys)
            if None in numbers or grid > KEPT or not launcher.keeping(self.device):
                return self._schedule(rows, keys, columns, self.lengths[2])
            given = (ask.mask, numbers, self.start, self._ends(rows, keys), self.device)
            lengths = (self.batch, self.heads, self.kv_heads, self.q_len, self.k_len)
            return _of_held(_Asked((rows, keys, columns, given, lengths), self))
        # An offset that the mask does not read moves nothing here.
        start = 0 if ask.offset == "given" else self.start
        grid = -(-self.q_len // rows) * -(-self.k_len // keys)
        batch = self.batch if ask.mask is not None and ask.mask.reads("b") else 1
        ends = self._ends(rows, keys)
        sizes = (self.q_len, self.k_len, rows, keys, batch, self.heads, self.kv_heads)
        kept = grid <= KEPT and launcher.keeping(self.device)
        made = _static if kept else _static.__wrapped__
        return made(ask.mask, sizes, start, ends, columns, self.device)

    def _ends(self, rows: int, keys: int) -> tuple[bool, bool]:
        """Whether tiles in which rows end are partial, and those in which keys end.

        What lies behind the last key is not to be read. A lane behind the last row would see the
        keys that a score or a bias hides from every row, poison among them.
        """
        chosen = self.ask.score is not None or self.x.bias is not None
        return chosen and self.q_len % rows > 0, self.k_len % keys > 0

    @property
    def cut(self) -> bool:
        """Whether lengths have a say."""
        return self.kv_lengths is not None or self.q_lengths is not None

    def _schedule(self, rows: int, keys: int, columns: bool, offsets: Array) -> Schedule:
        found = block_grid(
            _tiles(self.device),
            self.ask.mask,
            self.x.mask,
            q_len=self.q_len,
            k_len=self.k_len,
            block_q=rows,
            block_k=keys,
            batch=self.batch,
            heads=self.heads,
            offsets=offsets,
            kv_lengths=self.kv_lengths,
            q_lengths=self.q_lengths,
        )
        return _ordered(found, self.kv_heads, self._ends(rows, keys), columns)


def tiled(
    shape: Config, tall: tuple[Array, ...], wide: tuple[Array, ...]
) -> tuple[tuple[Any, ...], bool]:
    """Arrays (B, H, T, D) as a kernel reads tiles of them, and whether that is by descriptors.

    A descriptor needs entries side by side, all else in steps of 16 bytes, and one step at least
    between neighbours.

    Args:
        tall: arrays of which a tile has `shape.rows` rows.
        wide: those of which it has `shape.keys`.
    """
    arrays = (*tall, *wide)
    if not shape.descriptors or not all(_describable(x) for x in arrays):
        return arrays, False
    found = []
    for x, rows in zip(arrays, [shape.rows] * len(tall) + [shape.keys] * len(wide), strict=True):
        block = [1, 1, rows, max(16, next_power_of_2(x.shape[3]))]
        found.append(TensorDescriptor(x, list(x.shape), list(x.stride()), block))
    return tuple(found), True


def _describable(x: Array) -> bool:
    *outer, last = x.stride()
    steps = [stride * x.element_size() for stride in outer]
    return last == 1 and x.data_ptr() % 16 == 0 and all(n > 0 and n % 16 == 0 for n in steps)


def map_strides(schedule: Schedule) -> tuple[int, ...]:
    """Of a schedule's lines: batch, key head; 0 where it is the same for all."""
    return spanned(schedule.full)[:2]


def _number(n: int, device: torch.device) -> Array:
    """An int32 as an array of one; made once where it may be kept."""
    made = _one if launcher.keeping(device) else _one.__wrapped__
    return made(n, device)


@lru_cache(maxsize=64)
def _one(n: int, device: torch.device) -> Array:
    return torch.full((1,), n, dtype=torch.int32, device=device)


def _tiles(device: torch.device) -> Tiles:
    return Tiles(device, launcher.keeping(device))


def _ordered(found: Array, kv_heads: int, ends: tuple[bool, bool], columns: bool) -> Schedule:
    if found.shape[1] > 1:
        grouped = found.unflatten(1, (kv_heads, -1))
        some = torch.where(grouped.amax(2) >= PARTIAL, PARTIAL, 0)
        found = torch.where(grouped.amin(2) == FULL, FULL, some)
    for axis, partial in zip((-2, -1), ends, strict=True):
        if partial:
            first, last = found.split([found.shape[axis] - 1, 1], axis)
            found = torch.cat([first, last.clamp(max=PARTIAL)], axis)
    if columns:
        found = found.transpose(-1, -2).contiguous()
    return of_status(_tiles(found.device), found)


class _Asked:
    """A question for `_of_held`: equal ones have equal keys, and the call is who answers a new one.

    Attributes:
        key: everything that the answer depends on.
        call: let go once it has answered.
    """

    def __init__(self, key: Any, call: Call) -> None:
        self.key, self.call = key, call

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self.key == other.key


@lru_cache(maxsize=64)
def _of_held(asked: _Asked) -> Schedule:
    """A schedule in which only held arrays have a say."""
    call = asked.call
    del asked.call
    rows, keys, columns, *_ = asked.key
    return call._schedule(rows, keys, columns, call.lengths[2])


@lru_cache(maxsize=64)
def _static(
    mask: Tree | None,
    sizes: tuple[int, ...],
    start: int,
    ends: tuple[bool, bool],
    columns: bool,
    device: torch.device,
) -> Schedule:
    """A schedule that no tensor has a say in."""
    q_len, k_len, rows, keys, batch, heads, kv_heads = sizes
    found = block_grid(
        *(_tiles(device), mask),
        q_len=q_len,
        k_len=k_len,
        block_q=rows,
        block_k=keys,
        batch=batch,
        heads=heads,
        offsets=start,
    )
    return _ordered(found, kv_heads, ends, columns)


def device_function(tree: Tree | None, operands: Sequence[Array], score: bool = False) -> Any:
    if tree is None:
        return None
    return function(tree, tuple((a.dim(), a.dtype == torch.bool) for a in operands), score).call


def neighbours(mask: Tree | None, *along: str) -> bool:
    """Whether the full tiles of a row (along "k") or a column (along "q", "row") are neighbours."""
    return mask is None or full_tiles_are_neighbours(mask, *along)


def arguments(operands: Sequence[Array]) -> tuple[Any, ...]:
    """Pointer and sizes of each operand; of an empty one nothing is looked up but a zero."""
    found: list[Any] = []
    for a in operands:
        a = a.contiguous() if a.numel() else a.new_zeros((1,) * a.dim())
        found += [a.view(torch.int8) if a.dtype == torch.bool else a, *a.shape]
    return tuple(found)


def spanned(x: Array) -> tuple[int, ...]:
    """Strides, 0 along an axis of one entry."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
