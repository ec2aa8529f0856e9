"""What the documents' `attention_module` is given: parameters as a layer or as plain arrays.

A mapping holds arrays under the portable names, matrices (in, out), and says by their shapes what
an AttentionConfig says in words:

    query.weight (E, Hq D)    key.weight (Ek, Hk D)
    value.weight (Ev, Hk Dv)  out.weight (Hq Dv, O)
    and query.bias, key.bias, value.bias, out.bias where there are biases
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from attn_core.check_arrays import documents_mask, fits, show
from attn_core.config import nearest
from attn_core.model import fields
from attn_core.model.config import AttentionConfig, Sizes
from attn_core.model.parameters import parameters

_PARTS = ("query", "key", "value", "out")
_NAMES = tuple([f"{part}.{kind}" for part in _PARTS for kind in ("weight", "bias")])


class ModuleOutput(NamedTuple):
    """What `attention_module` returns: out (.., Tq, O) and weights (.., Hq, Tq, Tk)."""

    out: Any
    weights: Any


def is_layer(given: Any, **left_out: Any) -> bool:
    """Whether parameters are those of a layer, which says all else itself.

    Raises:
        TypeError: they are neither a layer nor a mapping.
        ValueError: something is given beside a layer that its config says.
    """
    if isinstance(getattr(given, "config", None), AttentionConfig) and callable(given):
        for name, x in left_out.items():
            if x:
                raise ValueError(
                    f"`{name}` must be left out beside a layer, whose config says it. Got {x!r}."
                )
        return True
    if not isinstance(given, Mapping):
        raise TypeError(
            "`parameters` must be a MultiHeadAttention, or a mapping of arrays under the names "
            f"that its `export_weights` gives. Got {type(given).__name__}."
        )
    return False


def sizes_of(shapes: Mapping[str, tuple[int, ...]], heads: int | None) -> Sizes:
    """The sizes of the layer whose plan these shapes are.

    Raises:
        ValueError: `heads` is left out; a name is missing or unknown, or a shape does not fit.
    """
    if heads is None:
        raise ValueError(
            "`heads` must be given with a mapping of arrays, whose shapes do not say it. Got none."
        )
    fields.count("heads", heads)
    for name in shapes:
        if name not in _NAMES:
            raise ValueError(
                f"`parameters` must hold {', '.join(_NAMES)} only, the last of each pair where "
                f"there are biases. Got {name!r}.{nearest(name, _NAMES)} A layer with more than "
                "that is given itself."
            )
    for name in _NAMES[::2]:
        if len(shapes.get(name, ())) != 2:
            got = show(shapes[name]) if name in shapes else "none"
            raise ValueError(f"`parameters` must hold {name!r}, a matrix (in, out). Got {got}.")
    (width, inner), (key_input, keys), (value_input, values), (_, out) = [
        shapes[name] for name in _NAMES[::2]
    ]
    head = _share("query.weight", inner, "heads", heads)
    kv_heads = _share("key.weight", keys, "the width of a head", head)
    config = AttentionConfig(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head,
        value_width=_share("value.weight", values, "the heads of the keys", kv_heads),
        key_input=key_input,
        value_input=value_input,
        out_width=out,
        bias=any(f"{part}.bias" in shapes for part in _PARTS[:3]),
        out_bias="out.bias" in shapes,
    )
    for name, (shape, _) in parameters(config).items():
        if tuple(shapes.get(name, ())) != shape:
            got = show(shapes[name]) if name in shapes else "none"
            raise ValueError(f"`parameters` must hold {name!r} of shape {shape}. Got {got}.")
    return config.sizes


def _share(name: str, whole: int, what: str, parts: int) -> int:
    if whole == 0 or whole % parts:
        raise ValueError(
            f"`parameters` must hold {name!r} with columns that are a multiple of {what}, {parts}. "
            f"Got {whole}."
        )
    return whole // parts


def check_dtypes(given: Mapping[str, str], wanted: str) -> None:
    """Arrays have the query's dtype: nothing is cast silently."""
    for name, dtype in given.items():
        if dtype != wanted:
            raise TypeError(f"`{name}` must be of the query's dtype, {wanted}. Got {dtype}.")


def check_shapes(given: Mapping[str, tuple[Any, ...]], hint: str = "") -> None:
    """The inputs (.., T, width) have the leading dimensions of the first of them."""
    first = next(iter(given))
    for name, shape in given.items():
        if len(shape) < 2:
            raise ValueError(f"`{name}` must have rank 2 or more. Got {show(shape)}.")
        if not fits(shape[:-2], given[first][:-2]):
            raise ValueError(
                f"`{name}` must have the leading dimensions of `{first}`, "
                f"{show(given[first][:-2])}. Got {show(shape[:-2])}{hint}."
            )


def check_mask(dtype: str, query: str, shape: tuple[Any, ...], full: tuple[Any, ...]) -> None:
    """A mask of rank 2, or of the rank of the weights: (.., Tq, Tk) without heads is ambiguous."""
    if 2 < len(shape) < len(full):
        raise ValueError(
            f"`mask` must have rank 2 (Tq, Tk) or {len(full)}, (.., Hq, Tq, Tk) = {show(full)}. "
            f"Got rank {len(shape)}, {show(shape)}: an axis of 1 stands for all heads, "
            "`mask[..., None, :, :]`."
        )
    documents_mask(dtype, query, shape, full)
