"""How the work is cut up: the question without its sizes, tiles, and parts of batches and heads.

Rows of queries are cut into tiles, keys into blocks. The block map says which blocks a tile of
rows reads at all, and which without the mask; neighbours of one kind are joined into spans of keys,
since every torch operation costs microseconds however little it does. A part takes as many batches
and key heads at once as one span has room for, so that memory does not grow with B and H, and a map
that differs from batch to batch, or head to head, skips for each what it can.

Sizes are always read off the tensors: inside the operators they are numbers, while a compiled
function may hold symbols.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from attn_core.backends.torch import reference
from attn_core.blocks import EMPTY, FULL, PARTIAL, block_map
from attn_core.language.text import parse, text
from attn_core.language.tree import Step, Tree
from attn_core.spec import Operands

Array = Any

_BLOCK = 256
"""Rows of a tile (all query heads of a group counted, within reason) and keys of a block."""

_SPAN = 512
"""Keys of a span: few, large operations, and logits that stay in the cache."""

_AT_ONCE = 2**20
"""Bytes of logits in one span beyond which a part takes fewer batches or heads."""

_M = 0xFFFFFFFF


@dataclass(frozen=True)
class Ask:
    """What is static about a call but its sizes and scale. No pytree: transforms see one leaf.

    Attributes:
        layout, offset, rate: as in `Problem`.
        mask, score: trees, or None.
        masks: number of the mask's operands; the score's follow.
        lse, weights: whether they are returned.
        kernel: "" for products and softmax of our own, or how torch's fused kernel is asked:
            "full", "causal" or "tiles" (`native_tiles`), or "triton" for kernels of our own.
        fast: whether those may multiply float32 as TF32.
        falls: whether the call goes on without them where they do not compile (`unmade`).
    """

    layout: str
    offset: str
    rate: float
    mask: Tree | None
    score: Tree | None
    masks: int
    lse: bool
    weights: bool
    kernel: str = ""
    fast: bool = False
    falls: bool = False

    def written(self) -> str:
        """As text, which is how it enters an operator: `read` is the way back."""
        return written(
            self.layout,
            self.offset,
            self.rate,
            self.mask and tuple(self.mask),
            self.score and tuple(self.score),
            self.masks,
            self.lse,
            self.weights,
            self.kernel,
            self.fast,
            self.falls,
        )


def written(
    layout: str,
    offset: str,
    rate: float,
    mask: Any,
    score: Any,
    masks: int,
    lse: bool,
    weights: bool,
    kernel: str,
    fast: bool,
    falls: bool,
) -> str:
    """The text of an `Ask`; trees come as plain tuples (steps, results).

    torch.compile runs this instead of tracing it, and hands plain values only over to it.
    """
    trees = [
        tree and text(Tree(tuple([Step(*s) for s in tree[0]]), tree[1])) for tree in (mask, score)
    ]
    return repr((layout, offset, rate, *trees, masks, lse, weights, kernel, fast, falls))


@lru_cache(maxsize=512)
def read(source: str) -> Ask:
    layout, offset, rate, mask, score, *rest = ast.literal_eval(source)
    return Ask(layout, offset, rate, mask and parse(mask), score and parse(score), *rest)


class Span(NamedTuple):
    """Keys [start, stop); `full` is whether every row of the tile may see all of them."""

    start: int
    stop: int
    full: bool


class Part(NamedTuple):
    """Batches and key heads that are computed together, n = B' * Hk' of them.

    Attributes:
        batch, heads: slices.
        key, value: accumulation dtype (n, Tk, D or Dv).
        b, h: int32 (B', 1, 1, 1, 1) and (1, Hk', G, 1, 1): batches and query heads.
        offset: int32 (B' or 1, 1, 1, 1, 1).
        spans: for each tile of rows, the spans of keys that it reads.
    """

    batch: slice
    heads: slice
    key: Array
    value: Array
    b: Array
    h: Array
    offset: Array
    spans: Sequence[Sequence[Span]]


class Work:
    """One call: its arrays with heads first, where the tiles lie, and room to compute in.

    Attributes:
        ask, scale: static.
        x: the operands as they came.
        query: (B, Hk, G, Tq, D); key, value: (B, Hk, Tk, D or Dv). Views as given.
        bias: (Bb, Hkb, Gb, Tqb, Tkb), each axis spanned or 1; None without bias.
        kv_lengths, q_lengths: int64 (B or 1, 1, 1, 1, 1), or None.
        rows: slices of the tiles of rows.
    """

    def __init__(
        self,
        ask: Ask,
        scale: float,
        x: Operands,
        rows: int = _BLOCK,
        keys: int = _BLOCK,
    ) -> None:
        self.ask, self.scale, self.x = ask, scale, x
        kind = x.query.dtype
        self.dtype = torch.float64 if kind == torch.float64 else torch.float32
        self.accumulation = "float64" if kind == torch.float64 else "float32"
        self.device = x.query.device
        self.key, self.value = self.heads_first(x.key), self.heads_first(x.value)
        self.kv_heads = self.key.shape[1]
        self.query = self.grouped(x.query)
        self.batch, _, self.group, self.q_len, _ = self.query.shape
        self.k_len = self.key.shape[2]
        self.bias = None if x.bias is None else self.spread(x.bias)
        self.kv_lengths, self.q_lengths = _wide(x.kv_lengths), _wide(x.q_lengths)
        self.offset = reference.offset(ask, x, self.q_len, self.k_len)[..., None]
        self.structured = bool(ask.mask or x.kv_lengths is not None or x.q_lengths is not None)
        self.block_q, tall, self.block_k, _ = tiles_of(
            self.group, self.q_len, self.k_len, rows, keys
        )
        self.rows = [
            slice(i * self.block_q, min((i + 1) * self.block_q, self.q_len)) for i in range(tall)
        ]
        self._joined = joined(self.block_k)
        self._room: dict[int, Array] = {}

    def heads_first(self, x: Array) -> Array:
        return x if self.ask.layout == "BHTD" else x.transpose(1, 2)

    def grouped(self, x: Array) -> Array:
        """(B, Hk, G, T, D) of an array in query's layout."""
        return self.heads_first(x).unflatten(1, (self.kv_heads, -1))

    def grouped_rows(self, x: Array) -> Array:
        """(B, Hk, G, Tq, ...) of an array (B, Hq, Tq, ...)."""
        return x.unflatten(1, (self.kv_heads, self.group))

    def spread(self, bias: Array) -> Array:
        """A bias, or the gradient of one, with an axis for the group: a view."""
        bias = bias if bias.dim() == 4 else bias[None, None]
        heads = (self.kv_heads, self.group) if bias.shape[1] == self.heads else (1, 1)
        return bias.unflatten(1, heads)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def room(self, number: int, *shape: int) -> Array:
        """Memory for one span, the same at every call with this number."""
        size = shape[0] * shape[1] * shape[2]
        held = self._room.get(number)
        if held is None or held.numel() < size:
            held = self._room[number] = torch.empty(size, dtype=self.dtype, device=self.device)
        return held[:size].view(shape)

    def parts(self) -> Iterator[Part]:
        batch_map, head_map = self.status.shape[:2]
        tall = self.block_q * self.group
        wide = min(self.k_len, self.block_k * self._joined)
        span = tall * wide * self.dtype.itemsize
        batches, heads = together(span, self.kv_heads, batch_map > 1, head_map > 1)
        ints = {"dtype": torch.int32, "device": self.device}
        b = torch.arange(self.batch, **ints).view(-1, 1, 1, 1, 1)
        h = torch.arange(self.heads, **ints).view(1, self.kv_heads, self.group, 1, 1)
        lines: dict[tuple[int, int], Any] = {}
        for b_at in range(0, self.batch, batches):
            batch = slice(b_at, min(b_at + batches, self.batch))
            for h_at in range(0, self.kv_heads, heads):
                which = slice(h_at, min(h_at + heads, self.kv_heads))
                mapped = (b_at if batch_map > 1 else 0, h_at if head_map > 1 else 0)
                if mapped not in lines:
                    lines = {mapped: [self._spans(line) for line in self.status[mapped].tolist()]}
                key, value = (
                    x[batch, which].flatten(0, 1).to(self.dtype).contiguous()
                    for x in (self.key, self.value)
                )
                offset = self.offset if len(self.offset) == 1 else self.offset[batch]
                yield Part(batch, which, key, value, b[batch], h[:, which], offset, lines[mapped])

    def _spans(self, line: list[int]) -> list[Span]:
        spans, at, wide = [], 0, len(line)
        while at < wide:
            status, first = line[at], at
            at += 1
            if status == EMPTY:
                continue
            while at < wide and line[at] == status and at - first < self._joined:
                at += 1
            stop = min(at * self.block_k, self.k_len)
            spans.append(Span(first * self.block_k, stop, status == FULL))
        return spans

    @cached_property
    def words(self) -> tuple[int, int]:
        """Of the seed, which a tensor's values are waited for: where a tile is dropped at all."""
        return _words(self.x.seed)

    @cached_property
    def status(self) -> np.ndarray:
        """Of every block, int8 (Bm, Hm, rows, columns), Hm over key heads."""
        tall, wide = len(self.rows), -(-self.k_len // self.block_k)
        if not self.structured or tall * wide <= 1 or not self.batch:
            # Of a single tile the map could only say what evaluating the mask says as well; of no
            # batch nobody reads it, and what it is made of need not be waited for.
            return np.full((1, 1, tall, wide), PARTIAL if self.structured else FULL, np.int8)
        ask, x = self.ask, self.x
        sizes = (self.q_len, self.k_len, self.block_q, self.block_k)
        lengths = x.kv_lengths is not None or x.q_lengths is not None
        if not (ask.masks or lengths or ask.offset == "given"):
            at = self.k_len - self.q_len if ask.offset == "end" else 0
            return known(ask.mask, sizes, self.batch, self.heads, self.kv_heads, at)
        return _status(
            ask.mask,
            [host(t) for t in x.mask],
            sizes,
            (self.batch, self.heads, self.kv_heads),
            host(self.offset).reshape(-1),
            _clamped(x.kv_lengths, self.k_len),
            _clamped(x.q_lengths, self.q_len),
        )


def tiles_of(
    group: int, q_len: int, k_len: int, rows: int = _BLOCK, keys: int = _BLOCK
) -> tuple[int, int, int, int]:
    """(rows of a tile, how many tiles, keys of a block, how many blocks)."""
    return (*_blocks(q_len, max(rows // 4, rows // group)), *_blocks(k_len, keys))


def joined(block_k: int) -> int:
    """How many blocks of keys a span holds at most."""
    return max(1, _SPAN // block_k)


def together(span: int, kv_heads: int, batch_map: bool, head_map: bool) -> tuple[int, int]:
    """(batches, key heads) that a part may hold, when the logits of one span take `span` bytes.

    `batch_map`, `head_map`: whether the map differs from batch to batch, and head to head.
    """
    fit = max(1, _AT_ONCE // max(1, span))
    heads = 1 if head_map else min(kv_heads, fit)
    return (1 if batch_map or heads < kv_heads else max(1, fit // heads)), heads


def known(
    mask: Tree | None,
    sizes: tuple[int, int, int, int],
    batch: int,
    heads: int,
    kv_heads: int,
    offset: int,
) -> np.ndarray:
    """The map of a mask without operands or lengths; one for all batches unless it reads `b`."""
    q_len, k_len, block_q, block_k = sizes
    batch = batch if mask is not None and mask.reads("b") else 1
    small = batch * -(-q_len // block_q) * -(-k_len // block_k) <= 2**16
    find = _known if small else _known.__wrapped__
    return find(mask, sizes, (batch, heads, kv_heads), offset)


@lru_cache(maxsize=64)
def _known(
    mask: Tree | None, sizes: tuple[int, int, int, int], extents: tuple[int, int, int], offset: int
) -> np.ndarray:
    return _status(mask, (), sizes, extents, offset, None, None)


def _status(
    mask: Tree | None,
    arrays: Sequence[Any],
    sizes: tuple[int, int, int, int],
    extents: tuple[int, int, int],
    offsets: Any,
    kv_lengths: Any,
    q_lengths: Any,
) -> np.ndarray:
    q_len, k_len, block_q, block_k = sizes
    batch, heads, kv_heads = extents
    if not isinstance(offsets, int) and len(offsets) == 1:
        offsets = int(offsets[0])
    dense = block_map(
        mask,
        arrays,
        q_len=q_len,
        k_len=k_len,
        block_q=block_q,
        block_k=block_k,
        batch=batch,
        heads=heads,
        offsets=offsets,
        kv_lengths=kv_lengths,
        q_lengths=q_lengths,
    ).dense()
    if dense.shape[1] == 1:
        return dense
    # Heads of a group are computed together: a block is live if any of them needs it.
    group = dense.reshape(len(dense), kv_heads, heads // kv_heads, *dense.shape[2:])
    return np.where(group.min(2) == FULL, FULL, np.minimum(group.max(2), PARTIAL)).astype(np.int8)


def host(x: Array) -> np.ndarray:
    """A tensor's values; of a tensor on a device this waits for them."""
    return x.detach().cpu().numpy()


def operands_of(ask: Ask, tensors: Sequence[Any]) -> Operands:
    """Operands of the flat arguments of an operator: nine, then those of the mask and score."""
    operands = tuple(tensors[9:])
    masks, score = operands[: ask.masks], operands[ask.masks :]
    return Operands._make([*tensors[:9], masks, score])


def _blocks(length: int, most: int) -> tuple[int, int]:
    """(size, count) of the tiles of an axis; a size is a multiple of 8 where there are several."""
    count = -(-length // most)
    if count <= 1:
        return max(1, length), count
    size = -(-length // (8 * count)) * 8
    return size, -(-length // size)


def _wide(lengths: Array | None) -> Array | None:
    return None if lengths is None else lengths.to(torch.int64).reshape(-1, 1, 1, 1, 1)


def _clamped(lengths: Array | None, most: int) -> Any:
    if lengths is None:
        return None
    return np.clip(host(lengths.to(torch.int64)).reshape(-1), 0, most)


def _words(seed: Array) -> tuple[int, int]:
    """(low, high) 32-bit words of a seed, as numbers: there they cost nothing per tile."""
    given = seed.tolist()
    if isinstance(given, list):
        return given[0], given[1]
    return given & _M, given >> 32 & _M
