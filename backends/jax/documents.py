"""The documents' functions, with any leading dimensions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_core import config, documents
from attn_core.backends.jax.arrays import from_host, x64
from attn_core.backends.jax.meshes import reshaped
from attn_core.model.module import ModuleOutput
from attn_core.words import in_documents_words


@in_documents_words
def scaled_dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any | None = None,
    dropout_rate: float = 0.0,
    *,
    scale: float | None = None,
    seed: Any | None = None,
) -> Any:
    """softmax(scale * q kᵀ + mask) v, over any leading dimensions.

        q (..., Tq, D), k (..., Tk, D), v (..., Tk, Dv) -> (..., Tq, Dv)

    The documents define scaled attention as dividing by √D, and their listing leaves the division
    out. The default follows the definition; `scale=1.0` is the listing.

    Args:
        q, k, v: arrays of one dtype with equal leading dimensions; NumPy's come back as NumPy.
        mask: broadcast to (..., Tq, Tk), without being written out. A float mask is added to the
            scores, a boolean one selects, True = attend. The documents' PyTorch form, in which
            `mask == 0` is hidden, is `scaled_dot_product_attention(q, k, v, mask != 0)`.
        dropout_rate: on the weights, after softmax; needs `seed`. Of (.., H, T, D) it is counted
            by heads, so that of (B, H, T, D) it is that of `attn_core.attention`.
        scale: host number; 1 / √D when left out.
        seed: of the dropout, as in `attn_core.Dropout`.

    Rows that may see no key give 0. Raises TypeError or ValueError on anything else.
    """
    given = {"q": q, "k": k, "v": v}
    if not all(isinstance(x, np.ndarray) for x in given.values()):
        _check_arrays(given)
    with config.use(backend="jax"):
        return documents.attend(_VERBS, given, mask, dropout_rate, scale, seed)


@in_documents_words
def attention_module(
    query: Any,
    key: Any | None = None,
    value: Any | None = None,
    mask: Any | None = None,
    dropout_rate: float = 0.0,
    *,
    parameters: Any,
    heads: int | None = None,
    scale: float | None = None,
    seed: Any | None = None,
) -> ModuleOutput:
    """The documents' module: project, attend by heads, project; over any leading dimensions.

        q, k, v = query Wq + bq, key Wk + bk, value Wv + bv, cut into heads
        weights = softmax(scale * q kᵀ + mask)        out = (dropped(weights) v) Wo + bo

        query (..., Tq, E), key (..., Tk, Ek), value (..., Tk, Ev) -> (..., Tq, O), (..., H, Tq, Tk)

    The documents name the module and leave its arguments and the order of its results open: this is
    our reading. `out, weights = attention_module(x, parameters=layer)`.

    Args:
        query, key, value: arrays of one dtype with equal leading dimensions; NumPy's come back
            as NumPy. Self-attention where `key` is left out; `value` is the key where left out.
        mask: broadcast to (..., H, Tq, Tk), of rank 2 or of that rank. A float mask is added to the
            scores, a boolean one selects, True = attend.
        dropout_rate: on the weights, after softmax; needs `seed`. The weights that are returned
            are those before.
        parameters: a MultiHeadAttention, whose config then says all that is static, and
            whose training mode whether it drops; or a mapping of arrays, JAX's or NumPy's,
            under its portable names, matrices (in, out), of the query's dtype:
            query.weight (E, H D), key.weight (Ek, Hk D), value.weight (Ev, Hk Dv),
            out.weight (H Dv, O), and query.bias, key.bias, value.bias, out.bias.
        heads: H, with a mapping; H / Hk query heads share a head of keys.
        scale: host number; 1 / √D when left out.
        seed: of the dropout, as in `attn_core.Dropout`; of a layer, the number of the step.

    A row that may see no key gives out's bias, and weights of 0.

    Raises:
        TypeError, ValueError: an argument is not of its form, or something is given that the layer
            says; nothing has been computed.
    """
    given = {"query": query, "key": key, "value": value}
    given = {name: x for name, x in given.items() if x is not None or name == "query"}
    host = all(isinstance(x, np.ndarray) for x in given.values())
    if not host:
        _check_arrays(given)
    with x64(query.dtype.name == "float64"):
        if host:
            given = {name: from_host(x) for name, x in given.items()}
        found = documents.attend_by_heads(
            _VERBS, given, mask, dropout_rate, parameters, heads, scale, seed
        )
    return ModuleOutput(*map(np.asarray, found)) if host else found


def _check_arrays(given: dict[str, Any]) -> None:
    for name, x in given.items():
        if not isinstance(x, jax.Array):
            raise TypeError(
                f"`{name}` must be an array of JAX, or all of them NumPy. Got {type(x).__name__}."
            )


def _held(parameters: Any, query: Any) -> dict[str, Any]:
    """A mapping's arrays as JAX's."""
    held = {}
    for name, x in parameters.items():
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(
                f"`{name}` of `parameters` must be an array of JAX or of NumPy. "
                f"Got {type(x).__name__}."
            )
        held[name] = from_host(x) if isinstance(x, np.ndarray) else x
    return held


def _mask(mask: Any, query: Any) -> Any:
    """A host mask beside JAX's arrays as one of them; a list of numbers takes JAX's own dtype."""
    if isinstance(query, np.ndarray):
        return mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if isinstance(mask, jax.Array):
        return mask
    return from_host(mask) if isinstance(mask, np.ndarray) else jnp.asarray(mask)


def _shape(x: Any) -> tuple[int | None, ...]:
    """A dimension of jax.export may be a symbol: not known."""
    return tuple(n if isinstance(n, int) else None for n in x.shape)


def _sizes(x: Any) -> tuple[Any, ...]:
    return tuple(x.shape)


def _name(x: Any) -> str:
    return str(x.dtype.name)


def _reshape(x: Any, shape: tuple[Any, ...]) -> Any:
    if x.shape == shape:
        return x  # lies on its devices as it did
    return x.reshape(shape) if isinstance(x, np.ndarray) else reshaped(x, shape)


def _spread(x: Any, shape: tuple[Any, ...]) -> Any:
    spread = np.broadcast_to if isinstance(x, np.ndarray) else jnp.broadcast_to
    return spread(x, shape)


_VERBS = documents.Verbs(
    shape=_shape,
    sizes=_sizes,
    fixed=_sizes,
    dtype=_name,
    reshape=_reshape,
    spread=_spread,
    held=_held,
    mask=_mask,
)
