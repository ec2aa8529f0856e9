"""Identities that say, in the user's words, which derivatives a function of loops has not.

`jax.custom_vjp` gives the first derivative in reverse. What JAX says of forward mode and of second
derivatives names neither this package nor a remedy, and often comes from deep inside a compiled
function. Two primitives stand at the entrances and raise instead, eagerly and while compiling:

    reverse_only    in front of the function; its tangent may be transposed, but not computed
    once            in front of the backward pass; has no derivative at all
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from attn_core.registry import UnsupportedError

_MESSAGE = (
    'forward mode and derivatives of derivatives need impl="reference". Got impl="chunked", which '
    "has the first derivative, in reverse."
)


def reverse_only(tree: Any) -> Any:
    """The same arrays; forward mode through them raises UnsupportedError."""
    return jax.tree_util.tree_map(_reverse.bind, tree)


def once(tree: Any) -> Any:
    """The same arrays; any derivative of them raises UnsupportedError."""
    return jax.tree_util.tree_map(_once.bind, tree)


def _refuse(*_: Any, **__: Any) -> Any:
    raise UnsupportedError(_MESSAGE)


def _identity(name: str) -> Primitive:
    made = Primitive(name)
    made.def_impl(lambda x: x)
    made.def_abstract_eval(lambda x: x)
    mlir.register_lowering(made, lambda context, x: [x])
    batching.primitive_batchers[made] = lambda args, dims: (made.bind(args[0]), dims[0])
    return made


def _tangent(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (t,) = primals, tangents
    return _reverse.bind(x), t if isinstance(t, ad.Zero) else _moved.bind(t)


_once = _identity("attn_core_once")
ad.primitive_jvps[_once] = _refuse
_reverse = _identity("attn_core_reverse_only")
ad.primitive_jvps[_reverse] = _tangent
# The tangent: reverse mode transposes it away, and only forward mode would have to compute it.
_moved = _identity("attn_core_tangent")
_moved.def_impl(_refuse)
mlir.register_lowering(_moved, _refuse)
# Of several tangents at once, which jacfwd pushes, JAX would refuse custom_vjp in its own words.
batching.primitive_batchers[_moved] = _refuse
ad.primitive_transposes[_moved] = lambda cotangent, x: [cotangent]
