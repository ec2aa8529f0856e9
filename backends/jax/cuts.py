"""What one device computes: a problem cut along its batches and heads.

Nothing but indices ties batches and heads together. Where a mask or score looks arrays up by `b`
and `h` alone, these are cut like query, and each part counts from 0; dropout, which draws by the
numbers of the whole, is told where the part begins. Key heads are cut with their groups; a single
one is shared.

    cuts_of      which axis of every operand goes along batches, which along heads
    dealt        along which axes of a mesh it is
    part_of      the problem of one part
    placed       its operands, with a seed that knows the part's first batch and head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_core.backends.jax.philox import words
from attn_core.language.tree import Tree, axes_along
from attn_core.spec import AttentionOutput, Operands, Problem

Array = Any
Names = tuple[str, ...]
"""Axes of a mesh."""

RANKS = AttentionOutput(4, 3, 4)
"""Of out, lse and weights."""


@dataclass(frozen=True)
class Along:
    """Which axis of an array goes along batches, and which along heads; None for neither."""

    b: int | None = None
    h: int | None = None

    def spec(self, rank: int, b: Names, h: Names) -> Any:
        """How the array lies if batches and heads are cut along these axes of a mesh."""
        cut = [b if at == self.b else h if at == self.h else () for at in range(rank)]
        return jax.sharding.PartitionSpec(*[n[0] if len(n) == 1 else n or None for n in cut])


class Cuts(NamedTuple):
    """How a problem can be cut.

    Attributes:
        b, h: whether its batches can be, and its heads.
        operands, results: an `Along` for every array.
        rows: that of what there is for every row, (B, Hq, Tq).
        gradients: those of the operands that have any.
    """

    b: bool
    h: bool
    operands: Operands
    results: AttentionOutput
    rows: Along
    gradients: Operands


def cuts_of(p: Problem, x: Operands) -> Cuts:
    """Of arrays as they are given, or as shapes."""
    batches, tables_b = _free(p, x, "b", p.batch)
    heads, tables_h = _free(p, x, "h", p.heads)
    b, h = (0 if batches else None), (1 if heads else None)

    def laid(h: int | None) -> Along:
        return Along(b, h if h is None or p.layout == "BHTD" else 2)

    def numbers(given: Any) -> Along | None:
        return None if given is None else Along(b if given.shape not in ((), (1,)) else None)

    def tables(given: Sequence[Any], b: Sequence[Any], h: Sequence[Any]) -> tuple[Along, ...]:
        return tuple(Along(*both) for both in zip(b, h, strict=True))

    bias = None
    if x.bias is not None:
        spans, before = p.bias or (), 4 - x.bias.ndim
        bias = Along(b if spans[0] and batches else None, h - before if h and spans[1] else None)
    keys = laid(h if p.kv_heads > 1 else None)
    operands = Operands(
        query=laid(h),
        key=keys,
        value=keys,
        bias=bias,
        sinks=None if x.sinks is None else Along(None, 0 if heads else None),
        kv_lengths=numbers(x.kv_lengths),
        q_lengths=numbers(x.q_lengths),
        query_offset=numbers(x.query_offset),
        seed=jax.tree_util.tree_map(lambda _: Along(), x.seed),
        mask=tables(x.mask, tables_b[0], tables_h[0]),
        score=tables(x.score, tables_b[1], tables_h[1]),
    )
    rows = Along(b, h)
    extras = rows if p.return_lse else None, rows if p.return_weights else None
    floats = [jnp.issubdtype(t.dtype, jnp.floating) for t in x.score]
    gradients = Operands(
        *operands[:5],
        mask=(None,) * len(x.mask),
        score=tuple(a if f else None for a, f in zip(operands.score, floats, strict=True)),
    )
    results = AttentionOutput(laid(h), *extras)
    return Cuts(batches, heads, operands, results, rows, gradients)


def _free(p: Problem, x: Operands, index: str, size: int | None) -> tuple[bool, Any]:
    """Whether mask and score let it be cut, and the axes of their arrays along it."""

    def along(tree: Tree | None, arrays: Sequence[Any]) -> tuple[int | None, ...] | None:
        if tree is None or size is None:
            return (None,) * len(arrays)
        return axes_along(tree, index, [a.shape for a in arrays], size)

    found = along(p.mask, x.mask), along(p.score, x.score)
    if size is None or None in found:
        return False, ((None,) * len(x.mask), (None,) * len(x.score))
    return True, found


def part_of(p: Problem, x: Operands, parts_b: int, parts_h: int) -> Problem:
    """The problem of one of parts_b * parts_h parts, whose operands are x."""

    def signature(arrays: Sequence[Any], told: Any) -> Any:
        return tuple((kind, tuple(a.shape)) for (kind, _), a in zip(told, arrays, strict=True))

    return replace(
        p,
        batch=None if p.batch is None else p.batch // parts_b,
        heads=p.heads // parts_h,
        kv_heads=max(1, p.kv_heads // parts_h),
        mask_operands=signature(x.mask, p.mask_operands),
        score_operands=signature(x.score, p.score_operands),
    )


def names_of(given: Any) -> Names:
    """The axes of a mesh that cut an axis of an array, which may be none, one or several."""
    return () if given is None else given if isinstance(given, tuple) else (given,)


def parts_of(mesh: Any, given: Any) -> int:
    """In how many parts they cut it."""
    return prod(mesh.shape[name] for name in names_of(given))


def dealt(p: Problem, cuts: Cuts, mesh: Any, lies: Sequence[Any]) -> tuple[Names, Names]:
    """The axes of the mesh along which batches, and heads, are dealt out evenly.

    Those that cut a query that lies like this; none where they cannot be.
    """
    query = cuts.operands.query
    b, h = (() if at is None else names_of(lies[at]) for at in (query.b, query.h))
    parts_b, parts_h = parts_of(mesh, b), parts_of(mesh, h)
    even = p.heads % parts_h == 0 and (p.kv_heads == 1 or p.kv_heads % parts_h == 0)
    return b if (p.batch or 0) % parts_b == 0 else (), h if even else ()


def placed(p: Problem, x: Operands, b: Names, h: Names) -> Operands:
    """The operands of a part, of batches and heads cut along these axes of a mesh.

    Inside of what runs on each device; p is the part's problem.
    """
    if x.seed is None or not (b or h):
        return x
    low, high = words(x.seed)

    def first(names: Names, size: int | None) -> Array:
        at = jax.lax.axis_index(names) if names else 0
        return jnp.asarray(at * (size or 0), jnp.uint32)

    return x._replace(seed=(low, high, first(b, p.batch), first(h, p.heads)))
