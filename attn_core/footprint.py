"""How much memory reading a tree takes, and whether block maps differ: for backends' accounts.

The values of a tree's steps are what an eager reading keeps:

    (q >= k) & (q - k <= 255)   over a tile of 256 rows and 512 keys

    q >= k    bool   256 * 512 bytes
    q - k     int    256 * 512 * 4
    ... <=    bool   256 * 512
    ... &     bool   256 * 512

A step spans the axes that it reads through its arguments, and has one value for all of the others.
Backends use this to say what an implementation would spend; a compiler that fuses steps holds none.
"""

from __future__ import annotations

from math import prod

from attn_core.language.tree import Tree
from attn_core.spec import Problem

_AXES = {"b": "b", "h": "h", "q": "row", "row": "row", "k": "k"}
_BYTES = {"bool": 1, "int": 4}


def reading(tree: Tree | None, tile: dict[str, int], float_bytes: int) -> int:
    """Bytes of every step's values over a tile.

    Args:
        tree: of a mask, a score or a derivative; None takes nothing.
        tile: how many there are of "b", "h", "row" and "k" in it.
        float_bytes: of an entry of the accumulation dtype.
    """
    if tree is None:
        return 0
    spans: list[frozenset[str]] = []
    total = 0
    for step in tree.steps:
        if step.op == "index":
            name = str(step.value)
            spans.append(frozenset(tile) if name == "s" else frozenset([_AXES[name]]))
            continue
        spanned = frozenset().union(*[spans[a] for a in step.args])
        spans.append(spanned)
        total += prod(tile[axis] for axis in spanned) * _BYTES.get(step.kind, float_bytes)
    return total


def differs(p: Problem) -> tuple[bool, bool]:
    """Whether the block map may differ from batch to batch, and from head to head."""
    mask = p.mask
    moved = p.offset == "given" and mask is not None and mask.reads("q")
    batch = p.kv_lengths or p.q_lengths or moved or (mask is not None and mask.reads("b"))
    return batch and p.batch != 1, mask is not None and mask.reads("h")


def sizes(p: Problem) -> tuple[int, int, int] | None:
    """(B, Tq, Tk), or None where one of them is not known yet."""
    if p.batch is None or p.q_len is None or p.k_len is None:
        return None
    return p.batch, p.q_len, p.k_len
