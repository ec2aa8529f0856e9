"""The vocabulary of scores: changes of the scaled logit s before bias and mask.

Compose left to right with `then`: `scores.alibi(slopes).then(scores.softcap(50.0))` adds the slope
first and caps the sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_core.language.expr import cast, maximum, minimum, tanh, tape_of, where
from attn_core.language.operands import operand
from attn_core.language.values import Score, score

__all__ = ["alibi", "relative_bias", "softcap"]


def __dir__() -> list[str]:
    """What is public, for completion."""
    return __all__


def softcap(cap: Any) -> Score:
    """cap * tanh(s / cap), before bias and mask (Gemma 2, ONNX). A number, or a scalar array.

    Raises:
        TypeError: `cap` is neither a number nor a scalar array.
        ValueError: `cap` is a number on the host that is not positive and finite.
    """
    if isinstance(cap, bool) or not (isinstance(cap, (int, float)) or hasattr(cap, "shape")):
        raise TypeError(f"`cap` must be a number or a scalar array. Got {type(cap).__name__}.")
    if isinstance(cap, (int, float, np.generic)) and not 0 < float(cap) < float("inf"):
        raise ValueError(f"`cap` must be positive and finite. Got {cap}.")
    if isinstance(cap, (int, float, np.generic)):
        return score(lambda s, b, h, q, k: cap * tanh(s / cap))
    if len(cap.shape):
        raise TypeError(
            "`cap` must be a number or a scalar array; caps that differ are looked up in an "
            f"operand, by a score of your own. Got shape {tuple(cap.shape)}."
        )
    # Looked up, as torch.compile knows no product of an expression with a tensor.
    held = operand(cap)

    def capped(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        cap = held.looked_up(tape_of(s), ())
        return cap * tanh(s / cap)

    return score(capped)


def alibi(slopes: Any = None, *, heads: int | None = None) -> Score:
    """s - slopes[h] * |q - k|, attention with linear biases (Press et al., arXiv 2108.12409).

    Args:
        slopes: float array (Hq,); learnt ones receive their gradient.
        heads: instead of slopes, the paper's own for that many heads: 2**(-8 i / heads) for
            i = 1 .. heads where heads is a power of two, and the paper's interleaving otherwise.

    Raises:
        TypeError: both are given or neither, `slopes` is no float array (Hq,), or `heads` no int.
        ValueError: `heads` is less than 1.
    """
    if (slopes is None) == (heads is None):
        raise TypeError("one of `slopes` and `heads` must be given. Got both or neither.")
    if heads is not None and not isinstance(heads, (int, np.integer)):
        raise TypeError(f"`heads` must be an int. Got {type(heads).__name__}.")
    table = operand(_slopes(int(heads or 0)) if slopes is None else slopes)
    if table.kind != "float" or len(table.shape) != 1:
        raise TypeError(
            f"`slopes` must be a float array of shape (Hq,). Got {table.kind}s of {table.shape}."
        )
    return score(lambda s, b, h, q, k: s - table[h] * abs(q - k))


def _slopes(heads: int) -> list[float]:
    if heads < 1:
        raise ValueError(f"`heads` must be at least 1. Got {heads}.")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    if power < heads:
        # Between powers of two the paper takes every other slope of the next power.
        slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return slopes


def relative_bias(
    table: Any,
    *,
    buckets: str = "t5",
    bidirectional: bool | None = None,
    max_distance: int | None = None,
) -> Score:
    """s + table[bucket(k - q), h]: a learnt bias for each bucket of relative position.

    Args:
        table: float array (buckets, Hq), as an embedding of buckets; receives its gradient.
        buckets: "t5" (Raffel et al., arXiv 1910.10683: half of the buckets exact, the rest
            logarithmic up to `max_distance`, which takes the last bucket) or "clipped" (Shaw et
            al., arXiv 1803.02155: clip(k - q, -n, n) + n with 2 n + 1 buckets).
        bidirectional: "t5" only: half of the buckets for keys after the query (the default);
            otherwise those keys share bucket 0.
        max_distance: "t5" only; 128 when left out.

    Raises:
        TypeError: `table` is no float array (buckets, Hq), or an option of "t5" is given to
            "clipped".
        ValueError: `buckets` is another word, or the table has no such number of buckets.
    """
    found = operand(table)
    if found.kind != "float" or len(found.shape) != 2:
        raise TypeError(
            f"`table` must be a float array (buckets, Hq). Got {found.kind}s of {found.shape}."
        )
    count = int(found.shape[0])
    if buckets == "clipped":
        if bidirectional is not None or max_distance is not None:
            raise TypeError(
                '`bidirectional` and `max_distance` must go with buckets="t5": clipped buckets '
                f"are the table's rows. Got bidirectional={bidirectional} and "
                f"max_distance={max_distance}."
            )
        if count % 2 == 0:
            raise ValueError(f"`table` must have 2 n + 1 buckets when clipped. Got {count}.")
        reach = count // 2
        return score(
            lambda s, b, h, q, k: s + found[minimum(maximum(k - q, -reach), reach) + reach, h]
        )
    if buckets != "t5":
        raise ValueError(f'`buckets` must be "t5" or "clipped". Got {buckets!r}.')
    bidirectional = True if bidirectional is None else bidirectional
    max_distance = 128 if max_distance is None else max_distance
    half = count // 2 if bidirectional else count
    exact = half // 2
    if exact < 1 or (bidirectional and count % 2) or max_distance <= exact:
        raise ValueError(
            "`table` must have at least 2 buckets in each direction, and `max_distance` exceed "
            f"the exact ones. Got {count} buckets and max_distance {max_distance}."
        )
    steps = _thresholds(exact, half, max_distance)

    def t5(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        away = abs(q - k) if bidirectional else maximum(q - k, 0)
        bucket = minimum(away, exact)
        for step in steps:
            bucket = bucket + cast(away >= step, int)
        if bidirectional:
            bucket = bucket + where(k > q, half, 0)
        return s + found[bucket, h]

    return score(t5)


def _thresholds(exact: int, half: int, max_distance: int) -> list[int]:
    """The least distance that falls into each logarithmic bucket after the first.

    Bucket exact + j starts at the least n with log(n / exact) / log(max_distance / exact) *
    (half - exact) >= j, decided in integers so that no logarithm is rounded.
    """
    wide = half - exact
    steps = []
    for j in range(1, wide):
        bound = max_distance**j * exact ** (wide - j)
        low, high = exact, max_distance
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if middle**wide >= bound else (middle + 1, high)
        steps.append(low)
    return steps
