"""The weights of chosen heads and rows: the same question asked of fewer queries.

A row's softmax needs nothing of any other row, so the weights of a few rows are an attention of
those rows alone, at O(chosen * Tk) time and memory. Only the positions must be told: the mask and
score of the smaller problem look its h, row and q up where the larger one has them,

    h   -> heads[h]
    row -> rows[row]
    q   -> rows[row] + offset[b]

and padded rows, which the smaller problem does not know by their place, become part of its mask.
Where heads alone are chosen, rows and offset stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import numpy as np

from attn_core.language.tree import Tape, Tree
from attn_core.language.values import Mask, Score
from attn_core.spec import FAR, Operands, Problem

Array = Any
Take = Callable[[Any, Sequence[int], int], Any]


def chosen(name: str, given: Any, size: int | None, axis: str) -> list[int] | None:
    """`heads` or `queries` as a list of host ints within [0, size); None is all of them."""
    if given is None:
        return None
    try:
        # torch.compile cannot look into np.iterable, and needs not for what is plainly one or many.
        plain = isinstance(given, (int, list, tuple, range))
        several = not isinstance(given, int) if plain else np.iterable(given)
        found = [_whole(i) for i in (given if several else [given])]
    except TypeError:
        raise TypeError(
            f"`{name}` must be an int or host ints. Got {type(given).__name__}."
        ) from None
    if not found and name == "heads":
        raise ValueError("`heads` must name at least one head. Got none.")
    for i in found:
        if i < 0 or (size is not None and i >= size):
            raise ValueError(f"`{name}` must lie within [0, {axis}) = [0, {size}). Got {i}.")
    return found


def _whole(i: Any) -> int:
    """A host int; True is none, which Python would take for 1."""
    if isinstance(i, bool):
        raise TypeError
    return index(i)


def narrowed(
    p: Problem, x: Operands, heads: list[int] | None, rows: list[int] | None, take: Take
) -> dict[str, Any]:
    """The arguments of `attention` that ask for the weights of these heads and rows.

    `take(array, indices, axis)` is the framework's gather.
    """
    head_axis, row_axis = (1, 2) if p.layout == "BHTD" else (2, 1)
    query, key, bias, sinks = x.query, x.key, x.bias, x.sinks
    if heads is not None:
        query = take(query, heads, head_axis)
        key = take(key, [h // p.group for h in heads], head_axis)
        sinks = None if sinks is None else take(sinks, heads, 0)
    if rows is not None:
        query = take(query, rows, row_axis)
    if bias is not None and p.bias is not None:
        # Rows first: all heads of a few rows are few, all rows of a few heads are Tq * Tk.
        for picked, spanned, axis in ((rows, p.bias[2], -2), (heads, p.bias[1], -3)):
            if picked is not None and spanned:
                bias = take(bias, picked, len(bias.shape) + axis)
    mask = None
    if p.mask is not None or (rows is not None and p.q_lengths):
        mask = Mask(*_moved(p, x, p.mask, x.mask, heads, rows))
    score = None if p.score is None else Score(*_moved(p, x, p.score, x.score, heads, rows))
    return {
        "query": query,
        "key": key,
        "value": key,  # any value will do
        "mask": mask,
        "bias": bias,
        "score": score,
        "scale": p.scale,
        "sinks": sinks,
        "kv_lengths": _plain(x.kv_lengths),
        "q_lengths": _plain(x.q_lengths) if rows is None else None,
        "query_offset": "start" if rows is not None else _offset(p, x),
        "layout": p.layout,
        "precision": p.precision,
        "return_weights": True,
    }


def _plain(lengths: Any) -> Any:
    """Host lengths as the user may give them: one for all, or a list."""
    if not isinstance(lengths, tuple):
        return lengths
    return lengths[0] if len(lengths) == 1 else list(lengths)


def _offset(p: Problem, x: Operands) -> Any:
    """The offset as it was given."""
    return _plain(x.query_offset) if p.offset == "given" else {"zero": "start"}.get(p.offset, "end")


def _moved(
    p: Problem,
    x: Operands,
    tree: Tree | None,
    arrays: Sequence[Any],
    heads: list[int] | None,
    rows: list[int] | None,
) -> tuple[Tree, tuple[Any, ...]]:
    """The tree over the positions of the larger problem; of a mask also its padded rows."""
    tape = Tape()
    b, bind = tape.index("b"), {}
    if heads is not None:
        # Held within what they are known to be, so that the int32 rule knows it too.
        h = tape.lookup(np.array(heads, np.int32), "int", [tape.index("h")])
        bind["h"] = _within(tape, h, 0, p.heads - 1)
    if rows is not None:
        row = tape.lookup(np.array(rows, np.int32), "int", [tape.index("row")])
        row = _within(tape, row, 0, (FAR if p.q_len is None else max(p.q_len, 1)) - 1)
        bind |= {"row": row, "q": _position(tape, p, x, row, b)}
    at = tape.const(True) if tree is None else tape.replay(tree, arrays, bind)
    if rows is not None and x.q_lengths is not None and tape.kind(at) == "bool":
        valid = tape.apply("lt", bind["row"], _one_each(tape, x.q_lengths, b))
        at = tape.apply("and", at, valid)
    return tape.finish(at)


def _position(tape: Tape, p: Problem, x: Operands, row: int, b: int) -> int:
    """q of a row of the larger problem."""
    if p.offset == "given":
        offset, most = x.query_offset, FAR
        if isinstance(offset, tuple):
            # A power of two, since what moves from step to step may not change the tree each time.
            most = 1 << max((abs(o) for o in offset), default=0).bit_length()
        offset = _within(tape, _one_each(tape, offset, b), -most, most)
        return tape.apply("add", row, offset)
    if p.offset != "end":
        return row
    ends = []
    for lengths, size in ((x.kv_lengths, p.k_len), (x.q_lengths, p.q_len)):
        end = tape.const(size or 0)
        if lengths is not None:
            end = _within(tape, _one_each(tape, lengths, b), 0, FAR if size is None else size)
        elif size is None:
            raise ValueError(
                '`query_offset="end"` must come with known Tq and Tk where rows are chosen. '
                "Got an unknown size: give the offset itself."
            )
        ends.append(end)
    return tape.apply("add", row, tape.apply("sub", *ends))


def _one_each(tape: Tape, given: Any, b: int) -> int:
    """Lengths or offsets looked up by batch; of length 1 they hold for all."""
    if isinstance(given, tuple):
        given = np.array(given, np.int32)
    return tape.lookup(given, "int", [b] if len(given.shape) else [])


def _within(tape: Tape, at: int, low: int, high: int) -> int:
    at = tape.apply("maximum", at, tape.const(low))
    return tape.apply("minimum", at, tape.const(high))
