"""The documents' functions, with any leading dimensions."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from attn_core import documents
from attn_core.backends.torch.arrays import dense, told
from attn_core.model.module import ModuleOutput, sizes_of
from attn_core.words import in_documents_words

# What torch.compiler.assume_constant_result does, without loading torch's compiler (and triton).
sizes_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        q, k, v: tensors of one dtype with equal leading dimensions; NumPy's arrays come back as
            NumPy.
        mask: broadcast to (..., Tq, Tk), without being written out. A float mask is added to the
            scores, a boolean one selects, True = attend. The documents' PyTorch form, in which
            `mask == 0` is hidden, is `scaled_dot_product_attention(q, k, v, mask != 0)`.
        dropout_rate: on the weights, after softmax; needs `seed`. Of (.., H, T, D) it is counted
            by heads, so that of (B, H, T, D) it is that of `attn_core.attention`.
        scale: host number; 1 / √D when left out.
        seed: of the dropout, as in `attn_core.Dropout`.

    Rows that may see no key give 0. Raises TypeError or ValueError on anything else.
    """
    from attn_core.backends.torch import from_numpy, to_numpy

    given = {"q": q, "k": k, "v": v}
    host = all(isinstance(x, np.ndarray) for x in given.values())
    if host:
        given = {name: from_numpy(x) for name, x in given.items()}
    _check_tensors(given)
    out = documents.attend(_VERBS, given, mask, dropout_rate, scale, seed)
    return to_numpy(out) if host else out


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
        parameters: a MultiHeadAttention, whose config then says all that is static, and
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
    from attn_core.backends.torch import from_numpy, to_numpy

    given = {"query": query, "key": key, "value": value}
    given = {name: x for name, x in given.items() if x is not None or name == "query"}
    host = all(isinstance(x, np.ndarray) for x in given.values())
    if host:
        given = {name: from_numpy(x) for name, x in given.items()}
    _check_tensors(given)
    if isinstance(heads, int):
        heads = operator.index(heads)  # in a graph of symbolic numbers too, as in `_fixed`
    found = documents.attend_by_heads(
        _VERBS, given, mask, dropout_rate, parameters, heads, scale, seed
    )
    return ModuleOutput(*map(to_numpy, found)) if host else found


def _check_tensors(given: dict[str, Any]) -> None:
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"`{name}` must be a tensor, or all of them NumPy. Got {type(x).__name__}."
            )
        dense(f"`{name}`", x)


def _held(parameters: Any, query: Any) -> dict[str, Any]:
    """A mapping's arrays as tensors; a module's own lie the other way round, and are refused."""
    from attn_core.backends.torch import from_numpy

    held = {}
    for name, x in parameters.items():
        turned = hasattr(parameters, "_metadata") or isinstance(x, torch.nn.Parameter)
        if turned or not isinstance(x, (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"`{name}` of `parameters` must be a tensor or an array of NumPy, matrices "
                f"(in, out), as `export_weights` gives them. Got {type(x).__name__}"
                f"{': matrices of a torch module are (out, in), give the module' * turned}."
            )
        held[name] = from_numpy(x).to(query.device) if isinstance(x, np.ndarray) else x
    return held


def _mask(mask: Any, query: Any) -> Any:
    """A host mask as a tensor beside the query."""
    from attn_core.backends.torch import from_numpy

    if isinstance(mask, torch.Tensor):
        dense("`mask`", mask)
        return mask
    return from_numpy(np.asarray(mask)).to(query.device)


def _shape(x: Any) -> tuple[int | None, ...]:
    return tuple([told(n) for n in x.shape])


def _sizes(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)


def _fixed(x: Any) -> tuple[int, ...]:
    """In a graph of symbolic sizes too: one for each set of sizes, as of a layer's parameters."""
    return tuple([operator.index(n) for n in x.shape])


def _name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


_VERBS = documents.Verbs(
    shape=_shape,
    sizes=_sizes,
    fixed=_fixed,
    dtype=_name,
    reshape=torch.reshape,
    spread=torch.broadcast_to,
    held=_held,
    mask=_mask,
)
