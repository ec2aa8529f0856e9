"""Batches and heads on devices, where only XLA knows which device holds what: on Auto axes.

XLA cuts what it is given by itself, but not a loop over batches or heads: it gathers all of them on
every device, and each computes the whole. A custom partitioning has it ask instead, once it knows
how query lies. Each device is then given the batches and heads of its share of query, a problem of
its own (cuts.py), and what should be the sum over all of them is added up over the devices.

It is used where there are several devices and nothing else says how arrays lie: `shard_map` and
Explicit axes have cut them before (meshes.py). XLA is left to itself under vmap, which custom
partitioning does not know, and in what `jax.export` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding

from attn_core.backends.jax.arrays import is_wide
from attn_core.backends.jax.cuts import Along, Names, cuts_of, dealt, part_of, parts_of, placed
from attn_core.backends.jax.meshes import axes_of
from attn_core.spec import Operands, Problem

Array = Any


def by_devices(
    run: Callable[..., Any],
    p: Problem,
    x: Operands,
    more: Any,
    along: Callable[[Any], tuple[Any, Any]],
) -> Any:
    """run(p, x, more), of which each device computes the batches and heads that it holds.

    Args:
        along: of the `Cuts`: an `Along` for every array of `more`, and one for every result.
            Results along neither are sums over the parts.
    """
    arguments = x, more
    if not _open(arguments):
        return run(p, x, more)
    cuts = cuts_of(p, x)
    if not (cuts.b or cuts.h):
        return run(p, x, more)
    flat, tree = jax.tree_util.tree_flatten(arguments)
    program, shape = jax.make_jaxpr(partial(run, p), return_shape=True)(*arguments)
    shapes, made = jax.tree_util.tree_flatten(shape)
    along_more, along_results = along(cuts)
    # Constants of the whole, a schedule say, go in beside the arrays; a part makes its own.
    flat, count = [*flat, *program.consts], len(flat)
    given = [*tree.flatten_up_to((cuts.operands, along_more)), *(Along() for _ in program.consts)]
    wanted = made.flatten_up_to(along_results)

    def whole(*flat: Array) -> list[Array]:
        closed = ClosedJaxpr(program.jaxpr, flat[count:])
        found: list[Array] = jaxpr_as_fun(closed)(*flat[:count])
        return found

    def names(lies: Any) -> tuple[Names, Names]:
        """The axes of the mesh that cut batches, and heads, of a query that lies like this."""
        if not isinstance(lies, NamedSharding):
            return (), ()
        return dealt(p, cuts, lies.mesh, (*lies.spec, *(None,) * (4 - len(lies.spec))))

    # XLA asks when tracing is over: what is asked holds none of the arrays.
    ranks, rule = [x.ndim for x in flat], _rule(p, flat, given, shapes, wanted)

    def laid(mesh: Any, ranks: Sequence[int], alongs: Sequence[Along], b: Any, h: Any) -> Any:
        specs = (a.spec(n, b, h) for n, a in zip(ranks, alongs, strict=True))
        return tuple(NamedSharding(mesh, spec) for spec in specs)

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        b, h = names(arguments[0].sharding)

        def share(*flat: Array) -> list[Array]:
            mine, more = tree.unflatten(flat[:count])
            part = part_of(p, mine, parts_of(mesh, b), parts_of(mesh, h))
            found = run(part, placed(part, mine, b, h), more)
            return [
                _added(x, (() if a.b is not None else b) + (() if a.h is not None else h))
                for x, a in zip(jax.tree_util.tree_leaves(found), wanted, strict=True)
            ]

        lie = list(laid(mesh, [x.ndim for x in shapes], wanted, b, h))
        return mesh, share, lie, laid(mesh, ranks, given, b, h)

    def infer(mesh: Any, arguments: Any, results: Any) -> Any:
        lies = names(arguments[0].sharding)
        return list(laid(mesh, [x.ndim for x in shapes], wanted, *lies))

    asked = custom_partitioning(whole)
    asked.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    told: list[Array] = _either.bind(
        *flat, whole=jax.make_jaxpr(whole)(*flat), asked=jax.make_jaxpr(asked)(*flat)
    )
    return made.unflatten(told)


def _open(tree: Any) -> bool:
    """Whether arrays may lie on several devices, and nobody has said how.

    Neither are those of 64 bits, under a context that XLA's question comes too late for.
    """
    if jax.device_count() == 1 or axes_of(tree):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes or mesh.explicit_axes:
        return False
    return not any(is_wide(x) for x in jax.tree_util.tree_leaves(tree))


def _added(x: Array, names: tuple[str, ...]) -> Array:
    """The sum over the devices along these axes, rounded once."""
    if not names:
        return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.psum(x.astype(wide), names).astype(x.dtype)


def _rule(
    p: Problem,
    arguments: Sequence[Any],
    given: Sequence[Along],
    results: Sequence[Any],
    wanted: Sequence[Along],
) -> Any:
    """That batches and heads lie alike everywhere, which XLA goes by before it asks."""
    grouped = 1 < p.kv_heads < p.heads and given[0].h is not None
    count = iter(range(4 * (len(arguments) + len(results))))

    def mapping(x: Any, a: Along) -> Any:
        factors: list[Any] = [f"x{next(count)}" for _ in range(x.ndim)]
        if a.b is not None:
            factors[a.b] = "b"
        if a.h is not None:
            both = grouped and x.shape[a.h] == p.heads
            factors[a.h] = CompoundFactor("h", "g") if both else "h"
        return ArrayMapping(*factors)

    return SdyShardingRule(
        tuple(mapping(x, a) for x, a in zip(arguments, given, strict=True)),
        tuple(mapping(x, a) for x, a in zip(results, wanted, strict=True)),
        **({"g": p.group} if grouped else {}),
    )


def _lowered(context: Any, *values: Any, whole: Any, asked: Any) -> Any:
    # A program that is kept has no way back to this process, which XLA would ask.
    kept = context.module_context.lowering_parameters.for_export
    program = jaxpr_as_fun(whole if kept else asked)
    return mlir.lower_fun(program, multiple_results=True)(context, *values)


def _batched(arrays: Sequence[Array], axes: Sequence[Any], *, whole: Any, asked: Any) -> Any:
    # Of vmap's batch nothing is known: neither where it lies, nor what it would take at a time.
    found = jax.vmap(jaxpr_as_fun(whole), in_axes=tuple(axes))(*arrays)
    return found, [0] * len(found)


# Holds both programs as JAX's own, which looks through them for what it must know beforehand.
_either = Primitive("attn_core_by_devices")
_either.multiple_results = True
_either.def_impl(lambda *flat, whole, asked: jaxpr_as_fun(whole)(*flat))
_either.def_abstract_eval(lambda *_, whole, asked: whole.out_avals)
mlir.register_lowering(_either, _lowered)
batching.primitive_batchers[_either] = _batched
