"""Lengths, offsets, seeds, and the integer arithmetic they lead to. See `check.py`."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import numpy as np

from attn_core.check_arrays import fits, host_or_same, same_framework, show
from attn_core.language.intervals import check_range
from attn_core.language.tree import Step, Tree
from attn_core.language.values import Dropout, Mask, Score
from attn_core.registry import owner
from attn_core.spec import FAR


def lengths(
    backend: Any,
    name: str,
    x: Any,
    source: str,
    batch: int | None,
    axis: str,
    most: int | None,
) -> Any:
    """None, a tuple of host ints (one for all, or B), or the framework's int array (B,) or ()."""
    if x is None:
        return None
    x = integers(backend, name, x, source, batch)
    if isinstance(x, tuple) and x:
        if min(x) < 0:
            raise ValueError(f"`{name}` must not be negative. Got {min(x)}.")
        if most is not None and max(x) > most:
            raise ValueError(f"`{name}` must be at most {axis} = {most}. Got {max(x)}.")
    return x


def integers(backend: Any, name: str, x: Any, source: str, batch: int | None) -> Any:
    """Host integers as a tuple of Python ints; a framework's integer array as it is."""
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "iu":
            raise TypeError(f"`{name}` must be integers. Got {x.dtype.name}.")
        _one_each(name, x.shape, batch)
        x = x.tolist()
    shape = (len(x),) if isinstance(x, (list, tuple)) else ()
    if isinstance(x, (list, tuple)):
        x = tuple(x)
    elif isinstance(x, (bool, int, float, np.generic)):
        x = (x,)
    if isinstance(x, tuple):
        for value in x:
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"`{name}` must be integers. Got {type(value).__name__}.")
        x = tuple([int(value) for value in x])
    elif owner(x) is None:
        raise TypeError(
            f"`{name}` must be an int or an integer array (B,). Got {type(x).__name__}."
        )
    else:
        same_framework(name, x, source)
        facts = backend.describe(x, f"`{name}`")
        if "int" not in facts.dtype:
            raise TypeError(f"`{name}` must be integers. Got {facts.dtype}.")
        shape = facts.shape
    _one_each(name, shape, batch)
    return x


def _one_each(name: str, shape: tuple[Any, ...], batch: int | None) -> None:
    if len(shape) and not fits(shape, (batch,)):
        raise ValueError(
            f"`{name}` must be an int or have shape (B,) = {show((batch,))}. Got {show(shape)}."
        )


def dropout_of(dropout: Any, source: str) -> tuple[float, Any]:
    if dropout is None:
        return 0.0, None
    if not isinstance(dropout, Dropout):
        raise TypeError(
            "`dropout` must be attn_core.Dropout(rate, seed): a rate alone names no mask, and "
            f"nothing here draws from a global generator. Got {type(dropout).__name__}."
        )
    if dropout.rate == 0.0:
        return 0.0, None
    if not isinstance(dropout.seed, tuple):
        host_or_same("dropout.seed", dropout.seed, source)
    return dropout.rate, dropout.seed


def offset_of(
    backend: Any,
    x: Any,
    source: str,
    batch: int | None,
    sizes: tuple[Any, Any],
    mask: Mask | None,
    score: Score | None,
    rate: float,
    other: Callable[[], str],
) -> tuple[str, Any, tuple[int, int]]:
    """The kind of offset, its operand, and the least and most it can be.

    Of numbers that are 0 or that nothing asks for it is "zero": no framework makes an array of
    them, and tiles are known from sizes alone.

    Args:
        rate: of dropout, which draws by positions.
        other: a hint where sizes differ only because the layout is another one.
        sizes: Tq and Tk as the framework has them: of two unknown ones it may know that they are
            equal. They are compared only where that matters, since torch.compile guards on it.
    """
    q_len, k_len = [told(backend, size) for size in sizes]
    if isinstance(x, str):
        if x not in ("start", "end"):
            raise ValueError(
                f'`query_offset` must be an int, an int array (B,), "start" or "end". Got {x!r}.'
            )
        if x == "start":
            return "zero", None, (0, 0)
        return "end", None, (-(FAR if q_len is None else q_len), FAR if k_len is None else k_len)
    reads = (mask is not None and mask.tree.reads("q")) or (
        score is not None and score.tree.reads("q")
    )
    if x is None:
        if not reads or _same(backend, *sizes):
            return "zero", None, (0, 0)
        what = "mask" if mask is not None and mask.tree.reads("q") else "score"
        raise ValueError(
            f"`query_offset` must be given where Tq and Tk are not known to be equal and the "
            f'{what} reads the query position: "start" puts query 0 at position 0 (torch, '
            'jax.nn, Keras), "end" puts the last query at the last key (FlashAttention, KV '
            f"caches), an int or int array (B,) says it outright. Got Tq = {known(q_len)} and "
            f"Tk = {known(k_len)}{other()}."
        )
    x = integers(backend, "query_offset", x, source, batch)
    if isinstance(x, tuple):
        low, high = min((0, *x)), max((0, *x))
        if low < -FAR or high > FAR:
            far = max(x, key=abs)
            raise ValueError(f"`query_offset` must lie within +-{FAR}. Got {far}.")
        if not any(x) or (not reads and rate == 0):
            return "zero", None, (0, 0)
        return "given", x, (low, high)
    return "given", x, (-FAR, FAR)


def _power(x: int) -> int:
    """The next power of two away from zero; 0 stays."""
    return (1 << (abs(x) - 1).bit_length()) * (1 if x > 0 else -1) if x else 0


def ranges(
    mask: Mask | None,
    score: Score | None,
    batch: int | None,
    heads: int,
    k_len: int | None,
    q_len: int | None,
    offset: tuple[int, int],
) -> None:
    """Integer arithmetic of masks and scores must stay within int32, wherever it may go."""
    last = {"b": batch, "h": heads, "k": k_len, "row": q_len}
    far = (("q", -FAR, FAR), *[(name, 0, FAR - 1) for name in last])
    for given in (mask, score):
        if given is None:
            continue
        # Most trees fit whatever the sizes are, and finding that does not look at the sizes: a
        # compiler that keeps them symbolic need not fix them. `index` fixes one.
        steps = tuple([_plain(step) for step in given.tree.steps])
        results = tuple([index(at) for at in given.tree.results])
        if range_problem(steps, results, far) is not None:
            ends = {
                name: max(0, (FAR if size is None else index(size)) - 1)
                for name, size in last.items()
            }
            # Rounded out to powers of two, so that the check of a decoding loop is soon cached.
            low, high = _power(index(offset[0])), _power(index(offset[1]))
            bounds = [(name, 0, end) for name, end in ends.items()]
            bounds.append(("q", max(low, -FAR), min(ends["row"] + high, FAR)))
            problem = range_problem(steps, results, tuple(bounds))
            if problem is not None:
                raise ValueError(problem)


def _plain(step: Step) -> tuple[Any, ...]:
    """A step in plain values: of a mask that is a compiled function's argument they are not yet."""
    value = index(step.value) if isinstance(step.value, int) else step.value
    return step.op, step.kind, tuple([index(at) for at in step.args]), value


def range_problem(
    steps: tuple[tuple[Any, ...], ...],
    results: tuple[int, ...],
    bounds: tuple[tuple[str, int, int], ...],
) -> str | None:
    """What is wrong with the integer arithmetic of a tree over these bounds; None if nothing is.

    A pure function of static values, plain tuples of them: the torch backend tells torch.compile
    to run it rather than trace it, and only plain tuples reach such a function whole.
    """
    tree = Tree(tuple([Step(*step) for step in steps]), results)
    try:
        check_range(tree, {name: (low, high) for name, low, high in bounds})
    except ValueError as error:
        return str(error)
    return None


def _same(backend: Any, a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; a backend whose sizes may be symbols says so."""
    if a is None or b is None:
        return False
    return bool(backend.same(a, b)) if hasattr(backend, "same") else bool(a == b)


def told(backend: Any, size: Any) -> Any:
    """A size; None also for a symbol of which its backend knows nothing."""
    return backend.told(size) if hasattr(backend, "told") else size


def known(size: Any) -> str:
    return "unknown" if size is None else f"{size}"
