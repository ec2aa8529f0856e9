"""Arrays, masks, scores and bias: what each argument of `attention` must be. See `check.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_core import masks
from attn_core.language.operands import Table
from attn_core.language.tree import Step
from attn_core.language.values import Mask, Score
from attn_core.registry import instead, owner
from attn_core.spec import DTYPES, WIDTH, Facts

_FULL = "(B, Hq, Tq, Tk)"


def fits(shape: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(a is None or b is None or a == b for a, b in zip(shape, wanted, strict=True))


def show(shape: tuple[Any, ...]) -> str:
    inner = ", ".join("?" if size is None else f"{size}" for size in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def describe(backend: Any, host: bool, name: str, x: Any) -> Facts:
    if isinstance(x, Table):
        return Facts(x.shape, x.dtype, "cpu")
    if host or isinstance(x, np.ndarray):
        return Facts(x.shape, x.dtype.name, "cpu")
    return backend.describe(x, _ticked(name))


def _ticked(name: str) -> str:
    """An argument's name in ticks; "operand 0 of `mask`" has them already."""
    return name if "`" in name else f"`{name}`"


def same_framework(name: str, x: Any, source: str) -> None:
    found = owner(x)
    if found is None:
        raise TypeError(
            f"{_ticked(name)} must be an array of {source}, as query is. "
            f"Got {type(x).__module__}.{type(x).__name__}{instead(x, name)}."
        )
    if found != source:
        raise TypeError(
            f"{_ticked(name)} must be an array of {source}, as query is. Got one of {found}: "
            "convert it first, frameworks are not mixed in one call."
        )


def carried(backend: Any, x: Any) -> Any:
    """`x` with the backend's arrays for NumPy's, of which torch.compile cannot tell a dtype."""
    if isinstance(x, np.ndarray):
        return backend.from_numpy(x)
    if isinstance(x, (Mask, Score)):
        return type(x)(x.tree, tuple([carried(backend, array) for array in x.arrays]))
    return x


def host_or_same(name: str, x: Any, source: str) -> None:
    """Masks, operands, lengths and offsets may be host values beside a framework's arrays."""
    if not isinstance(x, (np.ndarray, Table)):
        same_framework(name, x, source)


def as_mask(backend: Any, mask: Any, source: str, full: tuple[Any, ...]) -> Mask | None:
    if mask is None or isinstance(mask, Mask):
        return mask
    if isinstance(mask, Score):
        raise TypeError("`mask` must be a mask. Got a score: pass it as `score=`.")
    if callable(mask) and not hasattr(mask, "dtype"):
        raise TypeError(
            "`mask` must be a Mask or a boolean array. Got a function: "
            "write attn_core.mask(fn), or call it if it makes a mask."
        )
    if owner(mask) is None and not (hasattr(mask, "dtype") and hasattr(mask, "shape")):
        hint = ""
        if callable(getattr(mask, "mask_mod", None)):  # flex_attention's BlockMask
            hint = ": write attn_core.mask(fn) with the function that it was made of"
        if isinstance(mask, str) and mask in masks.__all__:
            hint = f" {mask!r}: write attn_core.masks.{mask}(..)"
        name = type(mask).__name__
        raise TypeError(f"`mask` must be a Mask or a boolean array. Got {name}{hint}.")
    host_or_same("mask", mask, source)
    facts = describe(backend, False, "mask", mask)
    if facts.dtype != "bool":
        hint = (
            "a float mask that is added to the scores is `bias=`"
            if "float" in facts.dtype
            else "compare it first, for instance `mask != 0`"
        )
        raise TypeError(f"`mask` must be boolean, True = attend. Got {facts.dtype}; {hint}.")
    broadcast("mask", facts.shape, full)
    return masks.dense(mask)


def as_score(score: Any) -> Score | None:
    if score is None or isinstance(score, Score):
        return score
    if isinstance(score, Mask):
        raise TypeError("`score` must be a score. Got a mask: pass it as `mask=`.")
    raise TypeError(
        "`score` must be a Score; write attn_core.score(fn) for a function. "
        f"Got {type(score).__name__}."
    )


def signature(
    backend: Any,
    host: bool,
    name: str,
    given: Mask | Score | None,
    source: str,
    accumulation: str,
    full: tuple[Any, ...],
) -> tuple[tuple[str, tuple[int | None, ...]], ...]:
    if given is None:
        return ()
    signature = []
    for number, array in enumerate(given.arrays):
        what = f"operand {number} of `{name}`"
        host_or_same(what, array, source)
        facts = describe(backend, host, what, array)
        if "float" in facts.dtype:
            if not isinstance(array, Table):
                _narrow_enough(what, facts.dtype, accumulation)
        elif isinstance(array, np.ndarray) and array.dtype != np.bool_:
            _int32(what, array)
        elif facts.dtype in ("uint32", "uint64"):
            raise TypeError(
                f"{what} must be a signed integer array, since ids and positions are computed in "
                f"int32. Got {facts.dtype}, which would be narrowed: cast it first."
            )
        if 0 in facts.shape and 0 not in full:
            raise ValueError(f"{what} must hold at least one value. Got {show(facts.shape)}.")
        signature.append((facts.dtype, facts.shape))
    for step in given.tree.steps:
        if step.op != "lookup":
            continue
        what, shape = f"operand {step.value} of `{name}`", signature[int(step.value or 0)][1]
        if _whole(given, step):
            # A table read at (b, h, row, k) is a dense array over the problem, and clamping
            # would hide a wrong shape.
            broadcast(what, shape, full)
        for axis, at in enumerate(step.args):
            # So would it for slopes of other heads, or lengths of another batch.
            _own_axis(what, given.tree.steps[at], shape, axis, full)
    return tuple(signature)


def _own_axis(what: str, index: Step, shape: tuple[Any, ...], axis: int, full: Any) -> None:
    """An axis looked up at b, h or row itself has one entry for each, or one for all."""
    axes = {"b": ("B", full[0]), "h": ("Hq", full[1]), "row": ("Tq", full[2])}
    if index.op != "index" or index.value not in axes:
        return
    (name, wanted), size = axes[index.value], shape[axis]
    if size is not None and wanted is not None and size not in (1, wanted):
        raise ValueError(
            f"{what} is looked up at [{index.value}] on axis {axis}, which must have {name} = "
            f"{wanted} entries, or 1. Got shape {show(shape)}."
        )


def _whole(given: Mask | Score, step: Any) -> bool:
    read = [given.tree.steps[a] for a in step.args]
    names = tuple(s.value for s in read if s.op == "index")
    return len(read) == len(names) and names in (("b", "h", "row", "k"), ("row", "k"))


def _int32(what: str, array: np.ndarray) -> None:
    if array.size and array.dtype.itemsize >= 4:
        least, most = int(array.min()), int(array.max())
        if least < -(2**31) or most >= 2**31:
            raise ValueError(
                f"{what} must fit int32, in which positions and ids are computed. "
                f"Got values from {least} to {most}."
            )


def float_array(
    backend: Any, host: bool, name: str, x: Any, source: str, accumulation: str
) -> Facts | None:
    if x is None:
        return None
    same_framework(name, x, source)
    facts = describe(backend, host, name, x)
    if "float" not in facts.dtype:
        hint = "; a boolean mask is `mask=`" if name == "bias" and "bool" in facts.dtype else ""
        raise TypeError(f"`{name}` must be floating point. Got {facts.dtype}{hint}.")
    _narrow_enough(f"`{name}`", facts.dtype, accumulation)
    return facts


def _narrow_enough(what: str, dtype: str, accumulation: str) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{what} must be one of {', '.join(DTYPES)}. Got {dtype}.")
    if WIDTH[dtype] > WIDTH[accumulation]:
        raise TypeError(
            f"{what} must not be wider than the accumulation dtype {accumulation}. Got {dtype}: "
            "cast it first, nothing is narrowed silently."
        )


def broadcast(name: str, shape: tuple[Any, ...], full: tuple[Any, ...]) -> tuple[Any, ...]:
    """`shape` as rank 4, if it broadcasts to (B, Hq, Tq, Tk)."""
    label = name if "`" in name else f"`{name}`"
    if len(shape) == 3:
        raise ValueError(
            f"{label} must have rank 2 (Tq, Tk) or 4 {_FULL}. Got rank 3, {show(shape)}: write "
            f"`[:, None]` after it if its first axis is the batch, `[None]` if it is the heads."
        )
    given = shape
    if len(shape) == 2:
        shape = (1, 1, *shape)
    if len(shape) != 4:
        raise ValueError(
            f"{label} must have rank 2 (Tq, Tk) or 4 {_FULL}. Got rank {len(shape)}, {show(shape)}."
        )
    for size, whole in zip(shape, full, strict=True):
        if size is not None and whole is not None and size != 1 and size != whole:
            hint = ""
            if given == (full[0], full[3]):  # a padding mask, as tokenizers give it
                hint = ": write `[:, None, None, :]` after it if it says which keys count, (B, Tk)"
            raise ValueError(
                f"{label} must broadcast to {_FULL} = {show(full)}. Got {show(given)}{hint}."
            )
    return shape


def documents_mask(
    dtype: str,
    query_dtype: str,
    shape: tuple[Any, ...],
    full: tuple[Any, ...],
    name: str = "mask",
) -> None:
    """The mask of the documents' function and of torch's, in the words of that function.

    It goes on as mask or bias of `attention`, whose messages would name an argument that the
    caller never gave. `full` is (..., Tq, Tk); unknown sizes are None.
    """
    if dtype != "bool" and "float" not in dtype:
        raise TypeError(
            f"`{name}` must be boolean (True = attend) or floating point (added to the scores). "
            f"Got {dtype}; where 0 hides, write `{name} != 0`."
        )
    if dtype == "float64" and query_dtype != "float64":
        raise TypeError(
            f"`{name}` must not be wider than float32 where the query is {query_dtype}. "
            "Got float64: cast it first, nothing is narrowed silently."
        )
    if not _broadcasts(shape, full):
        missing = len(full) - len(shape)
        hint = ""
        if missing > 0 and len(shape) > 1 and full[0] in (None, shape[0]):
            axes = "None, " * missing
            if len(shape) == 2 and _broadcasts(shape[1:], full):
                hint = f": write `[:, {axes}:]` after it if it says which keys count, (B, Tk)"
            elif _broadcasts(shape[1:], full):
                hint = f": write `[:, {axes[:-2]}]` after it if its first axis is the batch"
        raise ValueError(
            f"`{name}` must broadcast to (..., Tq, Tk) = {show(full)}. Got {show(shape)}{hint}."
        )


def _broadcasts(shape: tuple[Any, ...], full: tuple[Any, ...]) -> bool:
    """Sizes that are not known, None, may."""
    pairs = zip(shape[::-1], full[::-1], strict=False)
    wrong = any(None not in (a, b) and a != 1 and a != b for a, b in pairs)
    return len(shape) <= len(full) and not wrong
