"""The documents' functions, with any leading dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from attn_core import documents
from attn_core.backends.tf.arrays import sizes
from attn_core.model.module import ModuleOutput
from attn_core.registry import instead
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
        q, k, v: tensors of one dtype with equal leading dimensions, which a tf.function need not
            know; NumPy's arrays come back as NumPy.
        mask: broadcast to (..., Tq, Tk), without being written out. A float mask is added to the
            scores, a boolean one selects, True = attend. The documents' PyTorch form, in which
            `mask == 0` is hidden, is `scaled_dot_product_attention(q, k, v, mask != 0)`.
        dropout_rate: on the weights, after softmax; needs `seed`. Of (.., H, T, D) it is counted
            by heads, so that of (B, H, T, D) it is that of `attn_core.attention`.
        scale: host number; 1 / √D when left out.
        seed: of the dropout, as in `attn_core.Dropout`.

    Rows that may see no key give 0. Raises TypeError or ValueError on anything else.
    """
    given, host = _tensors({"q": q, "k": k, "v": v})
    out = documents.attend(_VERBS, given, mask, dropout_rate, scale, seed)
    return out.numpy() if host else out


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
        query, key, value: tensors of one dtype with equal leading dimensions; NumPy's come back
            as NumPy. Self-attention where `key` is left out; `value` is the key where left out.
        mask: broadcast to (..., H, Tq, Tk), of rank 2 or of that rank. A float mask is added to the
            scores, a boolean one selects, True = attend.
        dropout_rate: on the weights, after softmax; needs `seed`. The weights that are returned
            are those before.
        parameters: a MultiHeadAttention of Keras, whose config then says all that is static, and
            whose training mode whether it drops; or a mapping of arrays, tensors or NumPy's,
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
    given, host = _tensors({n: x for n, x in given.items() if x is not None or n == "query"})
    found = documents.attend_by_heads(
        _VERBS, given, mask, dropout_rate, parameters, heads, scale, seed
    )
    return ModuleOutput(*[x.numpy() for x in found]) if host else found


def _tensors(given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The inputs as tensors, and whether the answer is to be NumPy's, as they were."""
    host = all(isinstance(x, np.ndarray) for x in given.values())
    for name, x in given.items():
        if not host and not isinstance(x, (tf.Tensor, tf.Variable)):
            raise TypeError(
                f"`{name}` must be a tensor, or all of them NumPy. "
                f"Got {type(x).__name__}{instead(x, name)}."
            )
        if not host and x.shape.rank is None:
            raise ValueError(
                f"`{name}` must have a known rank of at least 2 when the call is traced; sizes "
                "may be unknown. Got one of unknown rank: say its shape with tf.ensure_shape."
            )
    found = {name: tf.convert_to_tensor(x) for name, x in given.items()}
    return found, host and tf.executing_eagerly()


def _held(parameters: Any, query: Any) -> dict[str, Any]:
    """A mapping's arrays as tensors."""
    held = {}
    for name, x in parameters.items():
        if not isinstance(x, (tf.Tensor, tf.Variable, np.ndarray)):
            raise TypeError(
                f"`{name}` of `parameters` must be a tensor or an array of NumPy. "
                f"Got {type(x).__name__}."
            )
        held[name] = tf.convert_to_tensor(x)
    return held


def _mask(mask: Any, query: Any) -> Any:
    return tf.convert_to_tensor(mask)


def _shape(x: Any) -> tuple[int | None, ...]:
    return tuple(x.shape)


def _name(x: Any) -> str:
    return str(x.dtype.name)


_VERBS = documents.Verbs(
    shape=_shape,
    sizes=sizes,
    fixed=_shape,
    dtype=_name,
    reshape=tf.reshape,
    spread=tf.broadcast_to,
    held=_held,
    mask=_mask,
)
