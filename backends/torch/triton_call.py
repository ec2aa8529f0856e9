"""What every kernel of a call is told alike.

Imported where it is used: torch alone does not need triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from attn_core.backends.torch import philox
from attn_core.backends.torch import triton_launch as launcher
from attn_core.backends.torch import triton_schedule as schedules
from attn_core.backends.torch.chunked_parts import Ask
from attn_core.backends.torch.triton_schedule import arguments as arguments
from attn_core.kernels.configs import Config
from attn_core.kernels.source import of_mask
from attn_core.language.neighbours import full_tiles_are_neighbours
from attn_core.language.tree import Tree, looks_up_entries
from attn_core.language.values import drop_threshold
from attn_core.schedule import Schedule
from attn_core.spec import Operands

Array = Any


class Call:
    """What forward and backward kernels are told alike.

    Attributes:
        q, k, v: heads first, by their strides.
        bias, bias_strides, seed, sinks: as kernels read them; an array of one zero where not given.
        told: what lengths and offsets say; `lengths` are its arrays, int32 (B or 1,).
        numbers: scale, dropout's threshold as int32 has its bits, 1 / (1 - rate).
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
        none = schedules.number(0, self.device)
        offset = x.query_offset if ask.offset == "given" else ask.offset
        if not self._places():
            offset = "zero"
        self.told = schedules.told(
            x.kv_lengths, x.q_lengths, offset, self.q_len, self.k_len, self.device
        )
        self.lengths, self.length_strides = self.told.arrays, self.told.strides
        bias, seed = none[None, None, None], none
        if x.bias is not None:
            bias = x.bias if x.bias.dim() == 4 else x.bias[None, None]
            # Torch's operations refuse another shape by themselves; a kernel would read beyond it.
            # It comes only where a compiler has known no sizes, and so nobody has compared them.
            whole = (self.batch, self.heads, self.q_len, self.k_len)
            if any(n not in (1, size) for n, size in zip(bias.shape, whole, strict=True)):
                raise ValueError(
                    f"`bias` must broadcast to (B, Hq, Tq, Tk) = {whole}. "
                    f"Got {tuple(x.bias.shape)}."
                )
        self.bias_strides = spanned(bias)
        if ask.rate:
            seed = torch.stack(philox.words(x.seed))
        self.seed, self.bias = seed, bias
        self.sinks = none if x.sinks is None else x.sinks.contiguous()
        self.numbers = (
            scale,
            _word(drop_threshold(ask.rate)) if ask.rate else 0,
            1 / (1 - ask.rate),
        )
        self.kind = launcher.Kind(
            (self.width, self.v_width),
            str(self.q.dtype).removeprefix("torch."),
            mask="operands" if x.mask else "positions" if ask.mask else "",
            table=looks_up_entries(ask.mask) or looks_up_entries(ask.score),
            lengths=self.told.cut,
            score=ask.score is not None,
            bias=x.bias is not None,
            dropout=ask.rate > 0,
            loose=x.bias is not None and loose(bias),
        )
        self.options = {
            "D": self.width,
            "DV": self.v_width,
            "PAD": max(16, next_power_of_2(self.width)),
            "PAD_V": max(16, next_power_of_2(self.v_width)),
            **of_mask(ask.mask, forms(x.mask, self.k_len)),
            "KV_LENGTHS": self.told.given[0],
            "Q_LENGTHS": self.told.given[1],
            "DROPOUT": bool(ask.rate),
            # Of 16-bit numbers it means nothing. AMD's compiler has TF32 for few of its devices.
            "PRECISION": "tf32" if ask.fast and not torch.version.hip else "ieee",
        }

    def _places(self) -> bool:
        """Whether it is asked anywhere at which position a query stands."""
        trees = (self.ask.mask, self.ask.score)
        return self.ask.rate > 0 or any(tree is not None and tree.reads("q") for tree in trees)

    def heads_first(self, x: Array) -> Array:
        return x if self.ask.layout == "BHTD" else x.transpose(1, 2)

    def config(self, kernel: str) -> Config:
        """The shape of this kernel's launch."""
        return launcher.config(kernel, self.device, self.kind)

    def schedule(self, rows: int, keys: int, *, columns: bool = False) -> Schedule:
        """Of tiles of so many rows and keys: (Bm, Hm, ...), Hm over key heads."""
        sizes = (self.batch, self.heads, self.kv_heads, self.q_len, self.k_len)
        ends = self._ends(rows, keys)
        asked = schedules.Asked(self.ask.mask, sizes, (rows, keys), ends, columns)
        return schedules.schedule(asked, self.x.mask, self.told, self.device)

    def _ends(self, rows: int, keys: int) -> tuple[bool, bool]:
        """Whether tiles in which rows end are partial, and those in which keys end.

        What lies behind the last key is not to be read. A lane behind the last row would see the
        keys that a score or a bias hides from every row, poison among them.
        """
        chosen = self.ask.score is not None or self.x.bias is not None
        return chosen and self.q_len % rows > 0, self.k_len % keys > 0


def tiled(
    shape: Config, tall: tuple[Array, ...], wide: tuple[Array, ...]
) -> tuple[tuple[Any, ...], bool]:
    """Arrays (B, H, T, D) as a kernel reads tiles of them, and whether that is by descriptors.

    A descriptor needs entries, side by side, all else in steps of 16 bytes, and one step at least
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
    return (
        x.shape[3] > 0
        and last == 1
        and x.data_ptr() % 16 == 0
        and all(n > 0 and n % 16 == 0 for n in steps)
    )


def map_strides(schedule: Schedule) -> tuple[int, ...]:
    """Of a schedule's lines: batch, key head; 0 where it is the same for all."""
    return spanned(schedule.full)[:2]


def forms(operands: Sequence[Array], k_len: int) -> list[tuple[int, bool, bool]]:
    """(rank, whether boolean, whether its last axis spans the keys) of each operand."""
    return [(a.dim(), a.dtype == torch.bool, a.shape[-1:] >= (k_len,)) for a in operands]


def neighbours(mask: Tree | None, *along: str) -> bool:
    """Whether the full tiles of a row (along "k") or a column (along "q", "row") are neighbours."""
    return mask is None or full_tiles_are_neighbours(mask, *along)


def _word(n: int) -> int:
    """32 bits as int32 has them: an argument's type would follow from its value."""
    return n - 2**32 if n >= 2**31 else n


def loose(bias: Array) -> bool:
    """Whether its keys are read one by one: compilers know of no row that it begins at a multiple
    of 16 bytes."""
    *apart, along = spanned(bias)
    if along == 0:
        return False
    return along > 1 or any(n % 16 for n in apart) or bias.data_ptr() % 16 > 0


def spanned(x: Array) -> tuple[int, ...]:
    """Strides, 0 along an axis of one entry."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
