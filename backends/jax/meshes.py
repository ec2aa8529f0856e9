"""Arrays that lie on a mesh of devices, for JAX to have nothing left to ask about them.

Under `jax.shard_map` each array says along which axes of the mesh it varies. What a loop carries
must say the same before and after, and a gradient what its argument said. So where a function has
loops, its arguments are all made to vary along the axes of any (of one that did not, the gradient
is then summed over the devices), and so is whatever a loop begins with:

    axes_of      the axes of any of the arrays
    spread       the same arrays, varying along these axes

On a mesh whose axes are Explicit, as those of `jax.make_mesh` are, each operation must say how its
result lies; a reshape or a slice often cannot. Batches and heads are therefore cut by shard_map, so
that each device computes its own (cuts.py). Whatever else is cut is computed with Auto axes, that
is XLA finds out, and only results are told where they lie:

    laid_out             an implementation of attention, on any mesh
    embedded, reshaped   an embedding, another shape
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_core.backends.jax.cuts import (
    RANKS,
    Names,
    cuts_of,
    dealt,
    names_of,
    part_of,
    parts_of,
    placed,
)
from attn_core.spec import AttentionOutput, Operands, Problem

Array = Any


def axes_of(tree: Any) -> tuple[str, ...]:
    """The axes of a surrounding shard_map along which any of the arrays varies."""
    found: set[str] = set()
    for x in jax.tree_util.tree_leaves(tree):
        found.update(_varying(x))
    return tuple(sorted(found))


def spread(axes: Sequence[str], tree: Any) -> Any:
    """The same arrays, varying along the axes too."""
    return jax.tree_util.tree_map(lambda x: _cast(axes, x), tree) if axes else tree


def _cast(axes: Sequence[str], x: Array) -> Array:
    # One by one: an axis that is there already may not be asked for again.
    for axis in axes:
        if axis not in _varying(x):
            x = jax.lax.pcast(x, axis, to="varying")
    return x


def _varying(x: Array) -> frozenset[str]:
    # JAX has said this in two ways, of which 0.8 knows the other.
    kind = jax.typeof(x)
    told = getattr(kind, "manual_axis_type", None)
    found: frozenset[str] = kind.vma if told is None else told.varying
    return found


def laid_out(attend: Callable[[Problem, Operands], AttentionOutput]) -> Any:
    """`attend`, whose arrays may lie on a mesh with Explicit axes.

    out lies as query does, and along its last axis as value does; lse and weights as query does.
    """

    @wraps(attend)
    def on_any_mesh(p: Problem, x: Operands) -> AttentionOutput:
        mesh = _explicit(x)
        if mesh is None:
            return attend(p, x)
        compute, left = partial(attend, p), mesh.explicit_axes
        cut = _cut(p, x, mesh)
        if cut is not None:
            x = _lie(mesh, x, cut.arguments)
            compute = partial(_by_parts, attend, p, cut)
            left = tuple(n for n in left if n not in cut.axes)
        query, value = _lies(x.query), _lies(x.value)
        batch, heads, rows = query[:3] if p.layout == "BHTD" else (query[0], query[2], query[1])
        found = AttentionOutput(
            (*query[:3], value[3]),
            (batch, heads, rows) if p.return_lse else None,
            (batch, heads, rows) if p.return_weights else None,
        )
        return _auto(mesh, compute, found, left)(x) if left else compute(x)

    return on_any_mesh


class Cut(NamedTuple):
    """What one device computes.

    Attributes:
        b, h: the axes of the mesh along which batches, and heads, are cut.
        arguments, results: how each is cut.
    """

    b: Names
    h: Names
    arguments: Operands
    results: AttentionOutput

    @property
    def axes(self) -> Names:
        return self.b + self.h


def _by_parts(attend: Any, p: Problem, cut: Cut, x: Operands) -> AttentionOutput:
    mesh = jax.typeof(x.query).sharding.mesh
    parts = parts_of(mesh, cut.b), parts_of(mesh, cut.h)

    def one(x: Operands) -> AttentionOutput:
        part = part_of(p, x, *parts)
        found: AttentionOutput = attend(part, placed(part, x, cut.b, cut.h))
        return found

    each = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(cut.arguments,),
        out_specs=cut.results,
        axis_names=set(cut.axes),
    )
    made: AttentionOutput = each(x)
    return made


def _cut(p: Problem, x: Operands, mesh: Any) -> Cut | None:
    """How the problem is cut; None if it is not.

    By the Explicit axes along which batches and heads of the query lie.
    """
    explicit, cuts = set(mesh.explicit_axes), cuts_of(p, x)
    both = dealt(p, cuts, mesh, _lies(x.query))
    b, h = (names if explicit.issuperset(names) else () for names in both)
    if not (b or h):
        return None
    arguments = jax.tree_util.tree_map(lambda a, x: a.spec(x.ndim, b, h), cuts.operands, x)
    results = AttentionOutput(
        *[None if a is None else a.spec(n, b, h) for a, n in zip(cuts.results, RANKS, strict=True)]
    )
    return Cut(b, h, arguments, results)


def _lie(mesh: Any, x: Operands, arguments: Operands) -> Operands:
    """The same arrays, cut as they are to be, and along their other axes as they were."""

    def laid(a: Array, wanted: Any) -> Array:
        used = {n for spec in wanted for n in names_of(spec)}
        both = [
            new or tuple(n for n in names_of(old) if n not in used)
            for new, old in zip(wanted, _lies(a), strict=True)
        ]
        return jax.sharding.reshard(a, jax.NamedSharding(mesh, jax.P(*[n or None for n in both])))

    return jax.tree_util.tree_map(laid, x, arguments)


def embedded(table: Array, index: Array) -> Array:
    """Rows of a table, NaN where there is no such row; they lie as the index does."""

    def taken(table: Array, index: Array) -> Array:
        return jnp.take(table, index, 0, mode="fill")

    mesh = _explicit((table, index))
    if mesh is None:
        return taken(table, index)
    return _auto(mesh, taken, (*_lies(index), _lies(table)[-1]))(table, index)


def reshaped(x: Array, shape: tuple[int, ...]) -> Array:
    """The same numbers; first axis and last two lie as they did, where that is still possible."""
    mesh = _explicit(x)
    if mesh is None:
        return x.reshape(shape)
    missing = max(0, 2 - x.ndim)
    before, lies = (*(1,) * missing, *x.shape), (*(None,) * missing, *_lies(x))
    kept = [n if shape[at] == before[at] else None for at, n in ((-2, lies[-2]), (-1, lies[-1]))]
    first = lies[0] if shape[0] % parts_of(mesh, lies[0]) == 0 else None
    return _auto(mesh, lambda x: x.reshape(shape), (first, *(None,) * (len(shape) - 3), *kept))(x)


def _auto(
    mesh: Any, compute: Callable[..., Any], found: Any, axes: Sequence[str] | None = None
) -> Callable[..., Any]:
    """`compute` with Auto axes, all or some.

    `found` says how its results lie: a tuple, or an AttentionOutput of tuples.
    """
    several = found if isinstance(found, AttentionOutput) else (found,)
    told = [
        None if lies is None else jax.NamedSharding(mesh, jax.P(*_once_each(lies)))
        for lies in several
    ]
    out = AttentionOutput(*told) if isinstance(found, AttentionOutput) else told[0]
    return jax.sharding.auto_axes(compute, axes=tuple(axes or mesh.explicit_axes), out_sharding=out)


def _explicit(tree: Any) -> Any:
    """The mesh of any of the arrays that has Explicit axes; None where none has."""
    for x in jax.tree_util.tree_leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if mesh.explicit_axes:
            return mesh
    return None


def _lies(x: Array) -> tuple[Any, ...]:
    """For each axis of an array the axis of the mesh that cuts it, several, or None."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _once_each(lies: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same without what an earlier one has: an axis of a mesh cuts one axis of an array."""
    taken: set[str] = set()
    kept = []
    for given in lies:
        left = tuple(name for name in names_of(given) if name not in taken)
        taken.update(left)
        kept.append(left or None)
    return tuple(kept)
