"""Rotary and sinusoidal angles: exact at any position, in integers.

Channel pair j of R channels turns by f[j] = base**(-2 j / R) radians a position. In float32 the
angle position * f[j] is wrong by up to 2**-24 of itself, thousandths of a radian at position
10**5, and each framework's cosine then says something else. So a turn is counted in integers: the
share of a turn that a position adds is written as high * 2**-32 + low * 2**-64, and

    angle = TURN * wrapped(position * high) + TURN * 2**-32 * position * low

where `wrapped` keeps the low 32 bits as a signed int32, exactly, and the second product is below
0.2 radians for positions within 2**28. The angle is then right to a few units in the last place of
pi, whatever the position. Frameworks compute these two lines and the cosine and sine.

    turned pair (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)        rotary, arXiv 2104.09864
    PE[p, 2 j] = sin, PE[p, 2 j + 1] = cos of p * 10000**(-2 j / E)   sinusoidal, arXiv 1706.03762
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attn_core.model.config import AttentionConfig

TURN = 2 * math.pi / 2**32
"""Radians to a unit of the high word; TURN * 2**-32 to one of the low word."""
LOW = TURN / 2**32


def wheel(base: float, channels: int) -> np.ndarray:
    """The words (high, low) of f[j] / (2 pi) for each pair j: int32 (2, channels / 2)."""
    words = []
    for j in range(channels // 2):
        whole = int(base ** (-2.0 * j / channels) / (2.0 * math.pi) * 2.0**64)
        high = (whole + 2**31) >> 32
        words.append((high, whole - (high << 32)))
    return np.array(words, np.int64).astype(np.int32).reshape(-1, 2).T.copy()


def turned(config: AttentionConfig) -> int:
    """How many channels of a head turn; 0 without rotary positions."""
    if config.positions != "rotary":
        return 0
    return round(config.rotary_fraction * config.sizes.head)


def offset(given: Any, kv_lengths: Any, q_lengths: Any, q_len: Any, k_len: Any) -> Any:
    """Where query row 0 stands, for layers that must know: an int, or an array (B,).

    Lengths are int arrays of the framework within their sizes, or None; `given` is None, "start",
    "end", an int or an array, as in `attention`.

    Raises:
        ValueError: left out where Tq and Tk are not known to be equal.
    """
    if given is None:
        if q_len is None or k_len is None or q_len != k_len:
            raise ValueError(
                "`query_offset` must be given where Tq and Tk are not known to be equal and "
                f'the layer reads positions: an int, an int array (B,), "start" or "end". '
                f"Got Tq = {q_len} and Tk = {k_len}."
            )
        return 0
    if isinstance(given, str):
        if given not in ("start", "end"):
            raise ValueError(
                '`query_offset` must be an int, an int array (B,), "start" or "end". '
                f"Got {given!r}."
            )
        if given == "start":
            return 0
        keys = k_len if kv_lengths is None else kv_lengths
        return keys - (q_len if q_lengths is None else q_lengths)
    return given
