"""How the work is cut up: tiles, their schedules, and the outer loop over batches and heads.

One turn of the outer loop takes all batches and heads, where they share one block map and their
tiles together are small; else one batch, or one key head. So memory does not grow with B and H,
and a map that differs from batch to batch skips for each what it can.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn_core.backends.jax import reference
from attn_core.backends.jax.chunked_tile import Geometry, Laid, Part, words
from attn_core.backends.jax.meshes import axes_of, spread
from attn_core.backends.jax.tiles import Tiles
from attn_core.blocks import FULL, PARTIAL, block_grid, block_map
from attn_core.language.rules import HOST
from attn_core.language.tree import Tree
from attn_core.schedule import Schedule, of_status, runs
from attn_core.spec import Operands, Problem

Array = Any

_ROWS, _KEYS = 512, 256
"""Rows and keys of a tile.

Measured on a CPU: XLA gives a product both its cores from about this size on, and a tile's logits
for eight heads still fit the cache.
"""

_OPEN = 1024
"""Rows, of all the heads of a group, and keys of a tile where there is no mask: of one key head.

Measured on a CPU, in float32: fewer but larger products take 0.87 to 1.0 of the time. 16 bits,
which are widened tile by tile, take 1.2 times as long like this.
"""

_FINE, _FINE_FROM, _FINE_SHARE = 128, 4, 2 / 3
"""Rows and keys of a finer tile, from how many of the large along the rows it is thought of, and
the share of their entries down to which the finer ones must come.

A large tile goes beyond what a sparse mask allows on all sides. Finer ones cost more for each
entry, so that they lose where few entries are saved: full, causal and wide windows keep the large.
"""

_AT_ONCE = 2**23
"""Bytes of logits in one tile beyond which a turn takes fewer batches or heads."""


_SPAN_LINE, _SPAN_STEP, _SPAN_LONGEST = 256, 128, 768
"""Rows of a tile that takes all of their keys at once (or keys, all of their rows), the steps in
which such a span starts and ends, and the longest.

Measured on a CPU for windows: softmax needs no running maximum, and a product of this size has both
cores, while one of 128 x 128 has one. From a window of 1024 on, large tiles are as fast.
"""


class Cut(NamedTuple):
    """A problem cut up.

    Attributes:
        geometry: static sizes.
        status: (Bm, Hm, rows, columns) of the block map over key heads, NumPy's or traced; None
            where a row of tiles is a span.
        schedule: of the rows of tiles, or of the columns.
    """

    geometry: Geometry
    status: Array
    schedule: Schedule


class Spans(NamedTuple):
    """For every line of tiles the one run of steps that holds what is live.

    Attributes:
        line, lines: rows (or keys) of a line, and how many lines.
        step, steps: the same of the steps across.
        width: steps of every run.
        starts: int32 (lines, 1), the first step of each.
    """

    line: int
    lines: int
    step: int
    steps: int
    width: int
    starts: Array

    @property
    def entries(self) -> int:
        """Of all runs, of one head."""
        return self.line * self.lines * self.step * self.width


def spans_of(p: Problem, columns: bool) -> Spans | None:
    """The spans of rows of tiles, or of columns; None where tiles are the better way.

    For masks that are known when the call is traced, alike for batches and heads, and not where
    the weights are asked for, which are put together tile by tile.
    """
    if p.device != "cpu" or p.return_weights or not _alike(p):
        return None
    lengths = _known(p.q_len), _known(p.k_len)
    return _spans(p.mask, *lengths, start_of(p), columns)


@lru_cache(maxsize=1024)
def _spans(mask: Tree, q_len: int, k_len: int, start: int, columns: bool) -> Spans | None:
    if _blocks(k_len if columns else q_len, _SPAN_LINE)[1] < _FINE_FROM:
        return None
    found = spans_in(mask, (q_len, k_len), start, (_SPAN_LINE, _SPAN_STEP), columns)
    tiles = _live(mask, q_len, k_len, start, _blocks(q_len, _ROWS)[0], _blocks(k_len, _KEYS)[0])
    return None if found is None or found.entries > tiles else found


def spans_in(
    mask: Tree, lengths: tuple[int, int], start: int, sizes: tuple[int, int], columns: bool
) -> Spans | None:
    """Lines of up to sizes[0] rows in steps of sizes[1] keys; None where runs would be too long.

    Args:
        lengths: of queries and keys.
        columns: lines of keys, in steps of rows.
    """
    along, across = lengths[::-1] if columns else lengths
    (line, lines), (step, steps) = _blocks(along, sizes[0]), _blocks(across, sizes[1])
    block_q, block_k = (step, line) if columns else (line, step)
    found = block_map(
        mask, q_len=lengths[0], k_len=lengths[1], block_q=block_q, block_k=block_k, offsets=start
    )
    if found.live_count * step > lines * _SPAN_LONGEST:
        return None  # before the tiles are listed, of which there may be many
    starts, width = runs(found, columns)
    if width * step > _SPAN_LONGEST:
        return None
    return Spans(line, lines, step, steps, width, starts[:, None])


def tiles_of(p: Problem) -> tuple[int, int, int, int]:
    """(rows of a tile, how many along the queries, keys of a tile, how many along the keys).

    Finer tiles are for masks that are known when the call is traced, alike for batches and heads:
    only of those is it known what they save, and what one batch and head does at a time is small.
    """
    q_len, k_len = _known(p.q_len), _known(p.k_len)
    if _open(p):
        return (*_blocks(q_len, max(_OPEN // p.group, 1)), *_blocks(k_len, _OPEN))
    large = (*_blocks(q_len, _ROWS), *_blocks(k_len, _KEYS))
    if not _alike(p) or large[1] < _FINE_FROM:
        return large
    finer = (*_blocks(q_len, _FINE), *_blocks(k_len, _FINE))
    before, after = (_live(p.mask, q_len, k_len, start_of(p), t[0], t[2]) for t in (large, finer))
    return finer if after <= _FINE_SHARE * before else large


def _open(p: Problem) -> bool:
    """Whether every key is seen, in no fewer rows and keys than a large tile has."""
    if p.device != "cpu" or p.dtype not in ("float32", "float64"):
        return False
    enough = min(_known(p.q_len) * p.group, _known(p.k_len)) >= _OPEN
    return enough and p.mask is None and not (p.kv_lengths or p.q_lengths)


def _alike(p: Problem) -> bool:
    """Whether there is a mask, known when the call is traced, alike for batches and heads."""
    return p.mask is not None and not (p.mask.reads("b") or p.mask.reads("h")) and _static(p)


@lru_cache(maxsize=1024)
def _live(mask: Tree, q_len: int, k_len: int, start: int, block_q: int, block_k: int) -> int:
    """Entries in the live tiles of one head."""
    found = block_map(
        mask, q_len=q_len, k_len=k_len, block_q=block_q, block_k=block_k, offsets=start
    )
    return found.live_count * block_q * block_k


def _static(p: Problem) -> bool:
    """Whether nothing in the block map is an operand."""
    return not (p.mask_operands or p.kv_lengths or p.q_lengths or p.offset == "given")


def start_of(p: Problem) -> int:
    """The offset of a static problem."""
    return 0 if p.offset == "zero" else _known(p.k_len) - _known(p.q_len)


def level_of(p: Problem, tile: int, batch_map: bool, head_map: bool) -> int:
    """`Geometry.level`, when the logits of one key head's tile take `tile` bytes as float32.

    `batch_map`, `head_map`: whether the map differs from batch to batch, and head to head.
    """
    if _open(p):
        return 2 if p.kv_heads > 1 else 1 if _known(p.batch) > 1 else 0
    batch, level = _known(p.batch), 2 if head_map else 1 if batch_map else 0
    if level == 0 and batch > 1 and batch * p.kv_heads * tile > _AT_ONCE:
        level = 1
    return 2 if level < 2 and p.kv_heads > 1 and p.kv_heads * tile > 4 * _AT_ONCE else level


def sizes_of(p: Problem, columns: bool) -> Geometry:
    """How a pass by rows of tiles, or by columns, is cut up, all batches and heads together."""
    s = spans_of(p, columns)
    if s is None:
        block_q, rows, block_k, count = tiles_of(p)
        return Geometry(block_q, block_k, block_q, block_k, rows, count, 0, True, True)
    long = s.width * s.step
    if columns:
        return Geometry(long, s.line, s.step, s.line, s.steps, s.lines, 0, False, True)
    return Geometry(s.line, long, s.line, s.step, s.lines, s.steps, 0, False, True)


def cut_up(p: Problem, x: Operands, columns: bool = False) -> Cut:
    """The rows of tiles, as the forward pass goes by them, or the columns."""
    g, spans = sizes_of(p, columns)._replace(axes=axes_of(x)), spans_of(p, columns)
    tile = 4 * p.group * g.block_q * g.block_k
    if spans is not None:
        one = np.ones((1, 1, spans.lines), np.int32)
        schedule = Schedule(spans.starts[None, None], 0 * one, one)
        return Cut(g._replace(level=level_of(p, tile, False, False)), None, schedule)
    status = _status(p, x, g.block_q, g.block_k)
    if g.single:
        # Nothing to skip: one kind of tile, straight through, compiles and runs fastest.
        whole = isinstance(status, np.ndarray) and bool((status == FULL).all())
        status = np.full((1, 1, 1, 1), FULL if whole else PARTIAL)
    full = partial = True
    if isinstance(status, np.ndarray):
        full, partial = bool((status == FULL).any()), bool((status == PARTIAL).any())
    level = level_of(p, tile, status.shape[0] > 1, status.shape[1] > 1)
    schedule = scheduled(status.swapaxes(-1, -2) if columns else status)
    return Cut(g._replace(level=level, full=full, partial=partial), status, schedule)


def _known(size: int | None) -> int:
    assert size is not None, "refusals() lets no unknown size through"
    return size


def _blocks(length: int, block: int) -> tuple[int, int]:
    """(size, count) of the tiles of an axis; a size is a multiple of 8 where there are several.

    Counted anew from the size, which may be larger than a `block` that is none.
    """
    count = -(-length // block)
    if count == 1:
        return length, 1
    size = -(-length // (8 * count)) * 8
    return size, -(-length // size)


def _status(p: Problem, x: Operands, block_q: int, block_k: int) -> Array:
    """The status of every tile; known when traced where nothing in it is an operand."""
    static = _static(p)
    if not static and (block_q, block_k) == (p.q_len, p.k_len):
        return np.full((1, 1, 1, 1), PARTIAL)
    sizes: dict[str, Any] = {
        "q_len": _known(p.q_len),
        "k_len": _known(p.k_len),
        "block_q": block_q,
        "block_k": block_k,
        "batch": _known(p.batch),
        "heads": p.heads,
    }
    ops: Any = Tiles()
    if static:
        ops = HOST
        status = block_map(p.mask, offsets=start_of(p), **sizes).dense()
    else:
        offset = reference.offset(p, x, p.q_len, p.k_len).reshape(-1)
        kv, rows = lengths_of(p, x)
        status = block_grid(
            ops, p.mask, x.mask, offsets=offset, kv_lengths=kv, q_lengths=rows, **sizes
        )
    if status.shape[1] > 1:
        # The heads of a group share their keys, and a tile of all of them is what is read.
        grouped = status.reshape(status.shape[0], p.kv_heads, p.group, *status.shape[2:])
        some = ops.where(grouped.max(2) >= PARTIAL, PARTIAL, 0)
        status = ops.where(grouped.min(2) == FULL, FULL, some)
    return _ragged(p, status, block_q, block_k, ops)


def _ragged(p: Problem, status: Array, block_q: int, block_k: int, ops: Any) -> Array:
    """The last tiles need the mask where they reach beyond the last key (or row, for a score)."""
    rows, columns = np.arange(status.shape[2])[:, None], np.arange(status.shape[3])
    beyond = (columns + 1) * block_k > _known(p.k_len)
    if p.score is not None:
        beyond = beyond | ((rows + 1) * block_q > _known(p.q_len))
    return ops.where(beyond, ops.minimum(status, PARTIAL), status) if beyond.any() else status


def scheduled(status: Array) -> Schedule:
    """The schedule of the status's rows; a static one holds no more than its longest row."""
    if not isinstance(status, np.ndarray):
        return of_status(Tiles(), status)
    found = of_status(HOST, status)
    width = max(1, int(found.live.max(initial=0)))
    return Schedule(*[np.asarray(a, np.int32) for a in (found.order[..., :width], *found[1:])])


def lay_out(p: Problem, x: Operands, g: Geometry) -> Laid:
    kv, rows = (None if a is None else a.reshape(-1, 1, 1, 1, 1) for a in lengths_of(p, x))
    return Laid(
        rows_of(p, g, words(x.query)),
        keys_of(p, g, words(x.key)),
        keys_of(p, g, words(x.value)),
        reference.offset(p, x, p.q_len, p.k_len).reshape(-1, 1, 1, 1, 1),
        kv,
        rows,
    )


def lengths_of(p: Problem, x: Operands) -> tuple[Array | None, Array | None]:
    """kv_lengths and q_lengths within their bounds, (B or 1,) each."""
    kv = None if x.kv_lengths is None else reference.lengths(x.kv_lengths, p.k_len).reshape(-1)
    rows = None if x.q_lengths is None else reference.lengths(x.q_lengths, p.q_len).reshape(-1)
    return kv, rows


def rows_of(p: Problem, g: Geometry, x: Array) -> Array:
    """(B, Hq, rows * block_q, X) from an array in query's layout.

    Tiles of it are given an axis for the group, not the whole: XLA would lay that out anew.
    """
    x = x if p.layout == "BHTD" else x.swapaxes(1, 2)
    return pad(x, 2, g.q_size)


def keys_of(p: Problem, g: Geometry, x: Array) -> Array:
    """(B, Hk, columns * block_k, X) from an array in query's layout."""
    x = x if p.layout == "BHTD" else x.swapaxes(1, 2)
    return pad(x, 2, g.k_size)


def pad(x: Array, axis: int, size: int, fill: float = 0.0) -> Array:
    """`fill` appended along an axis."""
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if at == axis else 0) for at, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)


def padded_bias(p: Problem, g: Geometry, bias: Array) -> Array:
    """The bias with rank 4, filled up along the axes that it spans."""
    spans = p.bias or ()
    if spans[2]:
        bias = pad(bias, 2, g.q_size, -np.inf)  # rows that are none see nothing
    return pad(bias, 3, g.k_size) if spans[3] else bias


def whole(p: Problem, x: Array) -> Array:
    """(B, Hk, G, T, ...) back to (B, Hq, Tq, ...)."""
    return x.reshape(x.shape[0], p.heads, *x.shape[3:])[:, :, : p.q_len]


def over_parts(
    p: Problem,
    g: Geometry,
    laid: Laid,
    per_row: Any,
    turn: Callable[[Part, Any, tuple[Array, Array], Any], tuple[Any, Any]],
    carry: Any,
) -> tuple[Any, Any]:
    """Every turn of the outer loop: `turn(part, rows, (b, h), carry)` gives (carry, results).

    Args:
        per_row: a pytree of arrays (B, Hk or Hq, ...), cut up like the arrays of `laid`.
        carry: handed from turn to turn; results come back as (B, Hk, ...).
    """
    heads = jnp.arange(p.heads, dtype=jnp.int32).reshape(1, p.kv_heads, p.group, 1, 1)
    batches = jnp.arange(_known(p.batch), dtype=jnp.int32).reshape(-1, 1, 1, 1, 1)
    if g.level == 0:
        part = Part(laid, batches, heads)
        return turn(part, per_row, (jnp.int32(0), jnp.int32(0)), carry)

    def one(carry: Any, at: Array) -> tuple[Any, Any]:
        b, h = (at, jnp.int32(0)) if g.level == 1 else (at // p.kv_heads, at % p.kv_heads)

        def taken(a: Array) -> Array:
            a = jax.lax.dynamic_slice_in_dim(a, b, 1, 0) if a.shape[0] > 1 else a
            if g.level < 2 or a.shape[1] == 1:
                return a
            size = a.shape[1] // p.kv_heads  # 1 over key heads, G over query heads
            return jax.lax.dynamic_slice_in_dim(a, h * size, size, 1)

        part = Part(jax.tree_util.tree_map(taken, laid), taken(batches), taken(heads))
        return turn(part, jax.tree_util.tree_map(taken, per_row), (b, h), carry)

    count = _known(p.batch) * (p.kv_heads if g.level == 2 else 1)
    carry = spread(g.axes, carry)
    carry, results = jax.lax.scan(one, carry, jnp.arange(count, dtype=jnp.int32))

    def joined(a: Array) -> Array:
        return a.reshape(_known(p.batch), p.kv_heads, *a.shape[3:])

    return carry, jax.tree_util.tree_map(joined, results)


def line_of(schedule: Schedule, at: tuple[Array, Array]) -> Schedule:
    """The schedule of one turn: (lines, width) and twice (lines,)."""
    b, h = at
    found = []
    for a in schedule:
        a = jnp.asarray(a)
        b_at = b if a.shape[0] > 1 else jnp.int32(0)
        h_at = h if a.shape[1] > 1 else jnp.int32(0)
        found.append(a[b_at, h_at])
    return Schedule(*found)
