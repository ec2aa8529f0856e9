"""What each implementation spends: bytes beside arguments and results, and in which numbers.

Counted from the same sizes by which the work is cut up. Torch runs one operation after another and
fuses none, so what a tile takes is its logits, the selected keys, and every step of mask and score;
of the loop's own there are the statistics of all rows and the keys and values of a part.
"""

from __future__ import annotations

from math import prod

import torch

from attn_core.backends.torch import chunked, native, native_bands, native_strips
from attn_core.backends.torch.chunked_parts import joined, tiles_of, together
from attn_core.backends.torch.native_documents import causal, documented
from attn_core.footprint import differs, reading, sizes
from attn_core.language.duals import differentiate
from attn_core.language.shifts import slides
from attn_core.language.tree import Tree, looks_up_entries
from attn_core.spec import WIDTH, Account, Problem

Numbers = tuple[str, tuple[str, str] | None]

_PHILOX = 20
"""Bytes of an entry of dropout's mask while it is made: words and their products are int64."""


_LISTED, _TILE = 4, 160
"""Bytes of a tile in a schedule of kernels; and while it is made of operations of torch."""

_DOCUMENT = 512
"""Rows of a document, of which only the call itself reads how long it is."""

_KEYS = 512
"""That a thread of torch's fused kernel takes at once on a CPU."""


def account(p: Problem, impl: str) -> Account:
    products = p.dtype if impl in ("native", "triton") else p.accumulation
    numbers = (products, _fast(p) if impl == "triton" else _lowered(products))
    found = sizes(p)
    if found is None:
        return Account(None, None, None, *numbers)
    if impl == "native":
        return _native(p, found, numbers)
    if impl in ("chunked", "triton") and 0 not in found:
        # Of arrays that hold nothing neither has a tile.
        return (_triton if impl == "triton" else _chunked)(p, found, numbers)
    return _reference(p, found, numbers)


def _chunked(p: Problem, found: tuple[int, int, int], numbers: Numbers) -> Account:
    batch, q_len, k_len = found
    wide, width = WIDTH[p.accumulation] // 8, p.width + p.v_width
    block_q, _, block_k, _ = tiles_of(p.group, q_len, k_len)
    keys = min(k_len, block_k * joined(block_k))
    batch_map, head_map = differs(p)
    batches, heads = together(block_q * p.group * keys * wide, p.kv_heads, batch_map, head_map)
    batches = min(batches, batch)
    n, tall = batches * heads, block_q * p.group
    span, rows = n * tall * keys, n * tall * width * wide
    of_part = n * k_len * width * wide
    # The loop makes the next part while it holds the last one.
    copied = 2 * of_part if p.dtype != p.accumulation or p.layout == "BTHD" else 0
    tile = {"b": batches, "h": heads * p.group, "row": block_q, "k": keys}
    hidden = reading(p.mask, tile, wide)
    if p.mask is not None or p.kv_lengths or p.q_lengths:
        # Whether a key is seen, and keys or values selected by that.
        hidden += tall * keys + n * keys * max(p.width, p.v_width) * wide
    if p.bias is not None:
        hidden += span
    score = slope = 0
    if p.score is not None:
        score = reading(p.score, tile, wide)
        slope = reading(differentiate(p.score).tree, tile, wide)
    dropped = _PHILOX * span if p.rate else 0
    saved = batch * p.heads * q_len * (2 * wide + 1)
    forward = saved + copied + span * wide + rows + hidden + score + dropped
    # Two spans are held, three with dropout, and gradients of this part's keys and the last one's.
    spans = (3 if p.rate else 2) * span * wide
    backward = saved + copied + spans + 3 * of_part // 2 + 2 * rows + hidden + slope + dropped
    return Account((block_q, block_k) if block_q else None, forward, backward, *numbers)


def _reference(p: Problem, found: tuple[int, int, int], numbers: Numbers) -> Account:
    batch, q_len, k_len = found
    wide = WIDTH[p.accumulation] // 8
    entries = batch * p.heads * q_len * k_len
    whole = {"b": batch, "h": p.heads, "row": q_len, "k": k_len}
    more = reading(p.mask, whole, wide) + reading(p.score, whole, wide)
    more += _PHILOX * entries if p.rate else 0
    # Five arrays of all entries at the peak, seven with those kept for the backward pass.
    return Account(None, entries * (5 * wide + 1) + more, entries * (7 * wide + 1) + more, *numbers)


def _native(p: Problem, found: tuple[int, int, int], numbers: Numbers) -> Account:
    batch, q_len, k_len = found
    narrow, wide = WIDTH[p.dtype] // 8, WIDTH[p.accumulation] // 8
    statistics = batch * p.heads * q_len * wide
    results = batch * p.heads * q_len * p.v_width * narrow
    whole = native._kind(p) != "tiles"
    block_q, block_k = _tile(p, found)
    forward, backward = statistics, 2 * statistics
    if p.device == "cpu":
        rows, keys = _split(q_len if whole else block_q), min(_KEYS, k_len)
        # Of 16 bits there is a narrow copy of every tile, too; backwards there are two tiles.
        logits = rows * keys * (wide + (narrow if narrow < wide else 0))
        forward += torch.get_num_threads() * (logits + rows * p.width * wide)
        backward += torch.get_num_threads() * (2 * logits + rows * p.width * wide)
    if whole:
        if _packs(p, q_len):
            forward += batch * p.kv_heads * k_len * (p.width + p.v_width) * narrow
        # The kernel wants what flows back as (B, T, H, D).
        backward += results if p.layout == "BHTD" else 0
    else:
        more, given = _bands(p, found)
        # Of 16 bits a sum, which tells whether all is finite, is over a copy.
        copied = results // narrow * wide if narrow < wide else 0
        forward, backward = max(forward + more, statistics + copied), backward + given
    if not chunked.sums_wide(p.group, p.dtype):
        backward = _chunked(p, found, numbers).backward or 0
    backward = max(forward, backward)
    # Documents are cut where they begin, which no tile of one size tells.
    cut = whole or _documented(p, found)
    return Account(None if cut else (block_q, block_k), forward, backward, *numbers)


def _packs(p: Problem, q_len: int) -> bool:
    """Whether torch's CPU kernel copies keys and values, laid out for AMX: seen with torch 2.13."""
    able = torch.cpu._is_amx_tile_supported() and torch.backends.mkldnn.enabled
    return bool(able) and p.dtype == "bfloat16" and q_len >= 64


def _lengths(p: Problem) -> bool:
    return p.kv_lengths or p.q_lengths


def _documented(p: Problem, found: tuple[int, int, int]) -> bool:
    return not _lengths(p) and documented(p.mask, p.offset, *found[1:])


def _sliding(p: Problem) -> bool:
    return native_bands.sliding(p.mask, p.offset, len(p.mask_operands), _lengths(p))


def _tile(p: Problem, found: tuple[int, int, int], backward: bool = False) -> tuple[int, int]:
    """Rows and keys of a tile of torch's fused kernel."""
    batch, q_len, k_len = found
    rows, keys = native_bands.ROWS, native_bands.KEYS
    if p.mask is not None and _sliding(p):
        extents = (batch, p.heads, p.kv_heads)
        rows = native_strips.rows_of(p.mask, p.offset, extents, q_len, k_len, backward)
        keys = native_strips.GRAIN
    block_q, _, block_k, _ = tiles_of(p.group, q_len, k_len, rows, keys)
    return block_q, block_k


def _bands(p: Problem, found: tuple[int, int, int]) -> tuple[int, int]:
    """What one call over a band of tiles gives and is given, before it is put where it belongs."""
    batch, q_len, k_len = found
    narrow, wide = WIDTH[p.dtype] // 8, WIDTH[p.accumulation] // 8
    inputs = batch * (p.heads * q_len * p.width + p.kv_heads * k_len * (p.width + p.v_width))
    # Gradients are added up span by span, in memory of their own where entries have 16 bits.
    added = inputs * wide if narrow < wide else 0
    if p.mask is not None and _sliding(p):
        forward, _ = _strips(p, found, p.mask, backward=False)
        _, backward = _strips(p, found, p.mask, backward=True)
        return forward, backward + added
    if p.mask is not None and _documented(p, found):
        forward, backward = _documents(p, found, p.mask)
        return forward, backward + added
    by_batch, by_head = differs(p)
    heads = p.group if by_head else p.heads
    block_q, _ = _tile(p, found)
    masked = p.mask is not None or _lengths(p)
    read = heads if p.mask is not None and p.mask.reads("h") else 1
    # Where the mask slides from where nobody knows yet, tiles still share their selection.
    alike = p.mask is not None and slides(p.mask) and not _lengths(p)
    near = min(k_len, native_bands.JOINED // 2) if alike else k_len
    one = block_q * near * read * narrow
    selected, tiles, most = 0, q_len // block_q, native_bands.SELECTION
    if by_batch and tiles == 1 and batch * one <= 2 * most:
        by_batch, one = False, batch * one  # batches are taken together
    if alike:
        selected = one
    elif masked:
        selected = min(max(one, most), tiles * one)
        if p.mask is not None:  # else most spans are full, and bands long
            tiles = max(1, min(tiles, most // one))
    rows = tiles * block_q
    batches = 1 if by_batch or tiles > 1 else batch
    width = p.width + p.v_width
    # Neighbouring tiles of a band see some keys twice; each query head has its own gradients.
    keys = heads * (3 * rows // 2 + near if alike else k_len) * width
    if not alike:
        # Made of what is allowed, a byte each, and of the mask's steps.
        entries = selected // narrow
        tile = {"b": 1, "h": 1, "row": block_q, "k": entries // block_q}
        selected += entries + reading(p.mask, tile, wide)
    outputs = min(native_bands.BAND, batches * heads * rows * p.v_width * narrow)
    gradients = min(native_bands.BAND, batches * (heads * rows * p.width + keys) * narrow)
    return selected + outputs, selected + gradients + added


def _documents(p: Problem, found: tuple[int, int, int], mask: Tree) -> tuple[int, int]:
    """The same of documents, taken to be `_DOCUMENT` long: their ids are not read."""
    batch, q_len, _ = found
    narrow, wide = WIDTH[p.dtype] // 8, WIDTH[p.accumulation] // 8
    rows = length = min(q_len, _DOCUMENT)
    batches, tiles, selected = 1 if mask.reads("b") else batch, 1, 0
    if causal(mask):
        rows, _ = _tile(p, found)
        # Two documents of a length are a band; what the rows of one see is selected.
        batches, tiles = 1, 2
        tile = {"b": 1, "h": 1, "row": rows, "k": length}
        selected = rows * length * (narrow + 1) + reading(mask, tile, wide)
    of_rows, of_keys = rows * p.v_width, rows * p.width + length * (p.width + p.v_width)
    outputs, gradients = (
        min(native_bands.BAND, batches * tiles * p.heads * n * narrow) for n in (of_rows, of_keys)
    )
    return selected + outputs, selected + gradients


def _strips(p: Problem, found: tuple[int, int, int], mask: Tree, backward: bool) -> tuple[int, int]:
    """The same of a mask that slides, where a call is over as many tiles as a band has room for."""
    batch, q_len, k_len = found
    narrow, wide = WIDTH[p.dtype] // 8, WIDTH[p.accumulation] // 8
    rows, _ = _tile(p, found, backward)
    seen = native_strips.strips(mask, p.offset, p.heads, p.kv_heads, q_len, k_len, rows)
    by_head = len(seen) > 1
    heads, kv_heads = (p.group, 1) if by_head else (p.heads, p.kv_heads)
    keys = min(k_len, max(sum(s.stop - s.start for s in spans) for spans in seen))
    width = p.width + p.v_width
    given = max(rows * heads, (keys if backward else min(rows, keys)) * kv_heads) * width * narrow
    # Tiles further apart than the strip is long see other keys: those of the ends are not alike.
    alike = keys < k_len
    tiles = min(q_len // rows, max(1, native_bands.BAND // given)) if alike else 1
    batches = 1 if tiles > 1 else batch
    chosen = rows * min(keys, native_bands.JOINED) * (heads if mask.reads("h") else 1)
    tile = {"b": 1, "h": heads, "row": rows, "k": min(keys, native_bands.JOINED)}
    selected = chosen * (narrow + 1) + reading(mask, tile, wide)
    outputs = batches * heads * tiles * rows * p.v_width * narrow
    gradients = batches * tiles * (heads * rows * p.width + kv_heads * keys * width) * narrow
    return selected + outputs, selected + gradients


def _triton(p: Problem, found: tuple[int, int, int], numbers: Numbers) -> Account:
    from attn_core.backends.torch import triton_forward, triton_launch
    from attn_core.kernels.configs import Config
    from attn_core.kernels.reach import Form, reach
    from attn_core.kernels.statistics import LINE

    batch, q_len, k_len = found
    device = torch.device(p.device, p.place if p.device == "cuda" else None)
    kind = triton_launch.Kind(
        (p.width, p.v_width),
        p.dtype,
        mask="operands" if p.mask_operands else "positions" if p.mask else "",
        table=looks_up_entries(p.mask) or looks_up_entries(p.score),
        lengths=p.kv_lengths or p.q_lengths,
        score=p.score is not None,
        bias=p.bias is not None,
        dropout=p.rate > 0,
        # As one that lies row by row.
        loose=p.bias is not None and p.bias[3] and k_len % 16 > 0,
    )

    def config(kernel: str) -> Config:
        return triton_launch.config(kernel, device, kind)

    sizes = triton_forward.Sizes(batch, p.heads, p.kv_heads, q_len, k_len)
    way = triton_forward.cut(sizes, config, device)
    by_batch, by_head = differs(p)
    maps = batch if by_batch else 1
    forms = tuple(
        Form(tuple(n == 1 or 0 in shape for n in shape), kind.startswith("bool"))
        for kind, shape in p.mask_operands
    )

    def schedule(rows: int, keys: int) -> int:
        grid = -(-q_len // rows) * -(-k_len // keys)
        if reach(p.mask, forms, (rows, keys), (p.kv_lengths, p.q_lengths)) is None:
            return _TILE * maps * (p.heads if by_head else 1) * grid
        return _LISTED * maps * (p.kv_heads if by_head else 1) * grid

    rows = batch * p.heads * q_len
    parts = 0
    if way.splits > 1:
        parts = 4 * rows * way.splits * (p.v_width + 2)
    forward = 9 * rows + schedule(way.rows, way.shape.keys) + parts
    ordered, way_back = torch.are_deterministic_algorithms_enabled(), config("fused")
    shapes = [config(kernel) for kernel in ("d_keys", "d_query")]
    # What is known of a row stands in lines of whole tiles.
    lines = batch * p.heads * -(-q_len // LINE.value) * LINE.value
    backward = 6 * rows + 16 * lines
    if way_back.instead and not ordered:
        # dQ is added up in float32, and rounded when all of it is there.
        shapes = [way_back]
        backward += 4 * rows * p.width if WIDTH[p.dtype] < 32 else 0
    backward += max(schedule(c.rows, c.keys) for c in shapes)
    if p.sinks_dtype is not None:
        backward += 12 * rows
    if p.bias is not None:
        spans = zip(p.bias, (batch, p.heads, q_len, k_len), strict=True)
        backward += 4 * prod(n for yes, n in spans if yes)
    tables = [shape for kind, shape in p.score_operands if kind.startswith(("float", "bfloat"))]
    backward += sum(4 * prod(n or 1 for n in shape) for shape in tables)
    if tables and ordered:
        backward = max(backward, _chunked(p, found, numbers).backward or 0)
    return Account((way.rows, way.shape.keys), forward, max(forward, backward), *numbers)


def _fast(p: Problem) -> tuple[str, str] | None:
    """What `precision` allows kernels of ours to do to products of float32."""
    allowed = p.dtype == "float32" and p.precision == "fast" and not torch.version.hip
    return ("TF32", '`precision` is "fast"') if allowed else None


def _split(rows: int) -> int:
    """Rows that a thread of torch's CPU kernel takes at once."""
    return 256 if rows >= 768 else 64 if rows >= 192 else min(32, rows)


def _lowered(products: str) -> tuple[str, str] | None:
    """What torch's own switch allows for products of float32."""
    if products != "float32":
        return None
    try:
        switch = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Torch refuses to say where its older and its newer switches have both been turned.
        return "TF32 or bfloat16", "torch's switches of float32 products disagree"
    if switch == "highest":
        return None
    what = "TF32" if switch == "high" else "TF32 or bfloat16"
    return what, f"torch.get_float32_matmul_precision() is {switch!r}"
