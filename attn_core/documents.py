"""The documents' two functions, in any framework's arrays.

Leading dimensions are folded into one batch, B their product, and unfolded again; the last of two
or more is taken for the heads, and stays:

    scaled_dot_product_attention   (.., H, T, D) -> (B, H, T, D) -> `attention` -> (.., H, Tq, Dv)
                                      (N, T, D) -> (N, 1, T, D) -> `attention` -> (N, Tq, Dv)
    attention_module               (.., T, E) -> (B, T, E) -> heads -> (.., Tq, O), (.., H, Tq, Tk)

So a mask that broadcasts over rows, keys or heads goes on as it is: written out for each of them it
would be as large as the weights, of which `attention` holds a tile.

A backend's `documents.py` has the docstrings, says whose arrays it takes, gives NumPy's back as
NumPy, and names in `Verbs` how it reshapes. What an argument must be is said here and in
`model/module.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from attn_core.api import attention
from attn_core.check_arrays import documents_mask, show
from attn_core.language.values import Dropout, Mask, Score
from attn_core.model import calls, module
from attn_core.model.module import ModuleOutput

Array = Any


class Verbs(NamedTuple):
    """What the two functions ask of a framework.

    Attributes:
        shape: of an array; None for a size that is not known yet.
        sizes: the same as numbers that `reshape` takes: of an unknown size, a scalar.
        fixed: the shape of a parameter, whose sizes are numbers of a compiled graph too.
        dtype: of an array, by name.
        reshape: an array in another shape.
        spread: an array broadcast to a shape.
        held: a mapping of parameters, and the query, as arrays of the framework by name.
        mask: a mask beside the query, as an array of the framework.
    """

    shape: Callable[[Array], tuple[Any, ...]]
    sizes: Callable[[Array], Sequence[Any]]
    fixed: Callable[[Array], tuple[Any, ...]]
    dtype: Callable[[Array], str]
    reshape: Callable[[Array, tuple[Any, ...]], Array]
    spread: Callable[[Array, tuple[Any, ...]], Array]
    held: Callable[[Any, Array], dict[str, Array]]
    mask: Callable[[Any, Array], Array]


def attend(
    verbs: Verbs, given: dict[str, Array], mask: Any, rate: float, scale: Any, seed: Any
) -> Array:
    """softmax(scale * q kᵀ + mask) v: given are q, k and v by name, the framework's."""
    shapes = {name: verbs.shape(x) for name, x in given.items()}
    module.check_shapes(shapes, _grouped(shapes))
    q, k, v = given.values()
    lead = tuple(verbs.sizes(q)[:-2])
    by_heads = _heads_known(shapes)
    if rate and not by_heads and len(lead) > 1 and shapes["q"][-3] != 0:
        raise ValueError(
            "`q`, `k` and `v` must have a known number of heads, (.., H, T, D), when the call is "
            "traced, where `dropout_rate` is given: what is dropped is counted by heads. "
            f"Got {', '.join(map(show, shapes.values()))}."
        )
    apart = 1 if by_heads else 0
    options: dict[str, Any] = {}
    if mask is not None:
        _check_array(mask, "it is for attn_core.attention, over (B, H, T, D)")
        mask = verbs.mask(mask, q)
        known = (*shapes["q"][:-1], shapes["k"][-2])
        documents_mask(verbs.dtype(mask), verbs.dtype(q), verbs.shape(mask), known)
        mask = _folded(verbs, mask, lead[: len(lead) - apart], 2 + apart)
        options[_kind(verbs, mask)] = mask
    if rate:
        options["dropout"] = Dropout(rate, seed)
    out = attention(*[_with_heads(verbs, x, apart) for x in (q, k, v)], scale=scale, **options)
    return verbs.reshape(out, (*lead, verbs.sizes(q)[-2], verbs.sizes(v)[-1]))


def attend_by_heads(
    verbs: Verbs,
    given: dict[str, Array],
    mask: Any,
    rate: float,
    parameters: Any,
    heads: int | None,
    scale: Any,
    seed: Any,
) -> ModuleOutput:
    """Project, attend by heads, project: of what is given of query, key and value, by name."""
    module.check_shapes({name: verbs.shape(x) for name, x in given.items()})
    query = given["query"]
    layer = module.is_layer(parameters, dropout_rate=rate, heads=heads, scale=scale)
    lead, dtype = tuple(verbs.sizes(query)[:-2]), verbs.dtype(query)
    batch = math.prod(lead)
    inputs = {name: verbs.reshape(x, (batch, *verbs.sizes(x)[-2:])) for name, x in given.items()}
    if layer:
        sizes = parameters.config.sizes
    else:
        held = verbs.held(parameters, query)
        sizes = module.sizes_of({name: verbs.fixed(x) for name, x in held.items()}, heads)
        dtypes = {name: verbs.dtype(x) for name, x in {**inputs, **held}.items()}
        module.check_dtypes(dtypes, dtype)
    q, k = inputs["query"], inputs.get("key", inputs["query"])
    options: dict[str, Any] = {"return_weights": True}
    if mask is not None:
        _check_array(mask, "it is for a layer, which is called with it")
        mask = verbs.mask(mask, query)
        full = (*verbs.shape(query)[:-2], sizes.heads, verbs.shape(q)[1], verbs.shape(k)[1])
        module.check_mask(verbs.dtype(mask), dtype, verbs.shape(mask), full)
        mask = _folded(verbs, mask, lead, 3)
        options[_kind(verbs, mask)] = mask
    if layer:
        keys = k if "value" in inputs else inputs.get("key")
        found = parameters(q, keys, inputs.get("value"), seed=seed, **options)
        out = found.out
    else:
        v = inputs.get("value", k)
        calls.check_inputs(sizes, verbs.shape(q), verbs.shape(k), verbs.shape(v))
        if rate:
            options["dropout"] = Dropout(rate, seed)
        if len(given) == 1 and verbs.shape(q)[1] is None:
            options["query_offset"] = 0  # keys are the rows themselves, however many they are
        q = _cut(verbs, _projected(held, "query", q), sizes.heads, sizes.head)
        k = _cut(verbs, _projected(held, "key", k), sizes.kv_heads, sizes.head)
        v = _cut(verbs, _projected(held, "value", v), sizes.kv_heads, sizes.value)
        found = attention(q, k, v, scale=scale, layout="BTHD", **options)
        joined = verbs.reshape(found.out, (*verbs.sizes(q)[:2], sizes.heads * sizes.value))
        out = _projected(held, "out", joined)
    return ModuleOutput(
        verbs.reshape(out, (*lead, *verbs.sizes(out)[-2:])),
        verbs.reshape(found.weights, (*lead, *verbs.sizes(found.weights)[-3:])),
    )


def _check_array(mask: Any, hint: str) -> None:
    """A mask is an array, or numbers in lists; what only `attention` can read is said to be."""
    if hasattr(mask, "dtype") or hasattr(mask, "__array__"):
        return
    if isinstance(mask, (bool, int, float, list, tuple)):
        return
    found = type(mask).__name__
    hint = f"; {hint}" if isinstance(mask, (Mask, Score)) else ""
    if callable(mask) and not hint:
        hint = "; attn_core.attention takes attn_core.mask(fn)"
    raise TypeError(
        "`mask` must be an array, boolean (True = attend) or floating point (added to the scores). "
        f"Got {found}{hint}."
    )


def _grouped(shapes: dict[str, tuple[Any, ...]]) -> str:
    """What is said of leading dimensions that differ, where keys have fewer heads."""
    q, k, v = shapes.values()
    if len(q) < 4 or not len(q) == len(k) == len(v):
        return ""
    heads = q[-3], k[-3], v[-3]
    if None in heads or heads[1] == 0 or heads[0] % heads[1] or heads[1] != heads[2]:
        return ""
    return "; attn_core.attention takes fewer heads of keys and values, over (B, H, T, D)"


def _heads_known(shapes: dict[str, tuple[Any, ...]]) -> bool:
    """Whether the last leading dimension is one that `attention` takes for its heads.

    It wants to know how many there are, and at least one; else they are as many batches.
    """
    heads = [shape[-3] for shape in shapes.values() if len(shape) > 3]
    return bool(heads) and all(n is not None and n != 0 for n in heads)


def _with_heads(verbs: Verbs, x: Array, apart: int) -> Array:
    """(.., T, D) as (B, H, T, D), or as (B, 1, T, D) where no heads are kept apart."""
    *lead, rows, width = verbs.sizes(x)
    heads = lead[-1] if apart else 1
    return verbs.reshape(x, (math.prod(lead[: len(lead) - apart]), heads, rows, width))


def _folded(verbs: Verbs, mask: Array, lead: tuple[Any, ...], kept: int) -> Array:
    """A mask beside arrays whose leading dimensions `lead` are folded, as one of rank 4.

    Its last `kept` axes, (Tq, Tk) or (H, Tq, Tk), stay as they are, those of size 1 too. Of the
    others a single one does as well, and several that are all 1 are one of 1. Where one of several
    spans, the mask is the same along those that do not.
    """
    missing = (1,) * (len(lead) + kept - len(verbs.shape(mask)))
    shape, sizes = (*missing, *verbs.shape(mask)), (*missing, *verbs.sizes(mask))
    first, last = shape[: len(lead)], sizes[len(lead) :]
    batch = 1
    if len(lead) == 1:
        batch = sizes[0]
    elif any(size is None or size != 1 for size in first):
        mask = verbs.spread(mask, (*lead, *last))
        batch = math.prod(lead)
    return verbs.reshape(mask, (batch, *(1,) * (3 - kept), *last))


def _kind(verbs: Verbs, mask: Array) -> str:
    """A boolean mask selects, a float one is added."""
    return "mask" if verbs.dtype(mask) == "bool" else "bias"


def _projected(held: dict[str, Array], part: str, x: Array) -> Array:
    y = x @ held[f"{part}.weight"]
    return y + held[f"{part}.bias"] if f"{part}.bias" in held else y


def _cut(verbs: Verbs, x: Array, heads: int, width: int) -> Array:
    """(B, T, H D) as (B, T, H, D)."""
    return verbs.reshape(x, (*verbs.sizes(x)[:2], heads, width))
