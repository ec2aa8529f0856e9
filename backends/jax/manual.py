"""Within a `jax.shard_map`: arrays have types that say over which axes of the mesh they vary.

What a loop carries keeps its type there, and so do the two branches of a conditional; zeros, which
are the same on every device, do not have the type of what is added to them. And the gradient of an
array that is the same on every device is a sum over devices. Nothing here communicates: so every
array of a call is made to vary over the axes over which any of them does, whereby JAX adds up the
gradients, and what loops start from is made alike. Elsewhere all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def alike(tree: Any, like: Any) -> Any:
    """`tree`, each array of which varies over the axes over which any array of `like` does too."""
    if not _inside():
        return tree
    zero = _zero(like)
    return jax.tree_util.tree_map(lambda x: _plus(x, zero), tree)


def fori_loop(
    first: Array, beyond: Array, body: Callable[[Array, Any], Any], carry: Any, like: Any
) -> Any:
    """`jax.lax.fori_loop`, what it carries being like arrays of the loop's body."""
    if not _inside():
        return jax.lax.fori_loop(first, beyond, body, carry)
    zero = _zero(like)

    def tied(tree: Any) -> Any:
        return jax.tree_util.tree_map(lambda x: _plus(x, zero), tree)

    return jax.lax.fori_loop(first, beyond, lambda t, x: tied(body(t, x)), tied(carry))


def _inside() -> bool:
    """Whether a `shard_map` surrounds the call; before JAX 0.6 none has such types."""
    mesh = getattr(jax.sharding, "get_abstract_mesh", None)
    return mesh is not None and bool(getattr(mesh(), "manual_axes", ()))


def _zero(like: Any) -> Array:
    """0, of a type that varies as widely as `like`; XLA knows that it is 0."""
    zero, never = jnp.int32(0), jnp.bool_(False)
    for x in jax.tree_util.tree_leaves(like):
        if x.size:
            some = jax.lax.stop_gradient(x).ravel()[0].astype(jnp.int32)
            zero = zero + jax.lax.select(never, some, jnp.int32(0))
    return zero


def _plus(x: Array, zero: Array) -> Array:
    return x | zero.astype(x.dtype) if x.dtype == jnp.bool_ else x + zero.astype(x.dtype)
