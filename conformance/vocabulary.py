"""Masks and scores of the vocabulary, each beside the plain rule that it must mean.

A maker returns what the language says and what the judge is told: for a mask a Python function of
(b, h, q, k, i), for a score a NumPy function of (s, b, h, q, k, *operands) and those operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_core import masks, scores
from attn_core.conformance.questions import Rule, Shape
from attn_core.language.expr import exp, log, maximum, minimum, row, tanh, where
from attn_core.language.operands import operand
from attn_core.language.values import mask, score


def _ids(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.sort(rng.integers(0, 3, shape), -1)


def segments_flat(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    ids = _ids(rng, size.k_len)
    return masks.segments(ids), lambda b, h, q, k, i: ids[q] == ids[k]


def segments(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    ids = _ids(rng, size.batch, size.k_len)
    return masks.segments(ids), lambda b, h, q, k, i: ids[b, q] == ids[b, k]


def segments_apart(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    ids, others = _ids(rng, size.batch, size.q_len), _ids(rng, size.batch, size.k_len)
    return masks.segments(ids, others), lambda b, h, q, k, i: ids[b, i] == others[b, k]


def packed_prefix(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    ids = _ids(rng, size.batch, size.k_len)
    made = masks.segments(ids) & (masks.causal() | masks.prefix(3))
    last = size.k_len - 1

    def rule(b: int, h: int, q: int, k: int, i: int) -> bool:
        # A look-up beyond the table reads its end.
        return bool(ids[b, min(q, last)] == ids[b, k] and (k <= q or k < 3))

    return made, rule


def packed_causal(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    ids = _ids(rng, size.batch, size.k_len)
    made = masks.segments(ids) & masks.causal()
    return made, lambda b, h, q, k, i: bool(ids[b, q] == ids[b, k] and k <= q)


def prefix_each(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    n = rng.integers(0, size.k_len, size.batch)
    return masks.prefix(n) | masks.causal(), lambda b, h, q, k, i: k < n[b] or k <= q


def padding(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    keys, rows = np.array([4, 6]), np.array([5, 2])
    return masks.lengths(keys, rows), lambda b, h, q, k, i: k < keys[b] and i < rows[b]


def global_some(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    chosen = rng.random((size.batch, size.k_len)) < 0.3
    made = masks.global_tokens(chosen) | masks.window(1, 0)
    return made, lambda b, h, q, k, i: chosen[b, q] or chosen[b, k] or 0 <= q - k <= 1


def dense_2(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    array = rng.random((size.q_len, size.k_len)) < 0.5
    return masks.dense(array), lambda b, h, q, k, i: array[i, k]


def dense_4(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    array = rng.random((size.batch, 1, size.q_len, size.k_len)) < 0.5
    return masks.dense(array) & masks.causal(), lambda b, h, q, k, i: array[b, 0, i, k] and k <= q


def boolean_array(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    array = rng.random((1, size.heads, size.q_len, size.k_len)) < 0.5
    return array, lambda b, h, q, k, i: array[0, h, i, k]


def block_table(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    table = rng.random((3, 4)) < 0.5
    table[:, 0] = True
    return masks.blocks(table, (3, 2)), lambda b, h, q, k, i: table[q // 3, k // 2]


def edges(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    edges = rng.integers(0, min(size.q_len, size.k_len), (60, 2))
    known = {(int(q), int(k)) for q, k in edges}
    made = masks.graph(edges, (size.q_len, size.k_len))
    return made, lambda b, h, q, k, i: (q, k) in known


def floors(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    """`//`, `%` and `>>` of both signs, by divisors of both signs and by zero."""
    numbers = np.array([-7, 13, -1, 40, 5, -20, 3])
    found = operand(numbers, bounds=(-20, 40))
    made = mask(
        lambda b, h, q, k: (
            ((q - k) // 3 + (k - 4) % -3 + found[k] // (h - 1) + (found[k] >> (q - k))) % 2 == 0
        )
    )

    def rule(b: int, h: int, q: int, k: int, i: int) -> bool:
        number, count = int(numbers[k]), min(max(q - k, 0), 31)
        ratio = number // (h - 1) if h != 1 else 0
        return ((q - k) // 3 + (k - 4) % -3 + ratio + (number >> count)) % 2 == 0

    return made, rule


def programmed(rng: np.random.Generator, size: Shape) -> tuple[Any, Rule]:
    steps, flags = rng.integers(-3, 4, (size.heads, 3)), rng.random((1, size.k_len)) < 0.6
    found, known = operand(steps), operand(flags)
    made = mask(
        lambda b, h, q, k: (
            known[b, k] & ((q - 2 * k) % 3 + found[h, k - 4] // 2 >= 0)
            | (abs(k - q) == maximum(b, 1))
            | (where(h > 1, row, k) < 1)
        )
    )

    def rule(b: int, h: int, q: int, k: int, i: int) -> bool:
        step = steps[h, min(max(k - 4, 0), 2)]
        near = abs(k - q) == max(b, 1)
        return bool(
            (flags[0, k] and (q - 2 * k) % 3 + step // 2 >= 0) or near or (i if h > 1 else k) < 1
        )

    return made, rule


def softcap(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    return scores.softcap(1.5), lambda s, b, h, q, k: 1.5 * np.tanh(s / 1.5)


def softcap_50(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    return scores.softcap(50.0), lambda s, b, h, q, k: 50.0 * np.tanh(s / 50.0)


def softcap_learnt(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    cap = np.array(1.25, wide)
    return scores.softcap(cap), lambda s, b, h, q, k, c: c * np.tanh(s / c), cap


def alibi(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    slopes = rng.random(size.heads).astype(wide)
    return scores.alibi(slopes), lambda s, b, h, q, k, m: s - m[h] * np.abs(q - k), slopes


def t5(bidirectional: bool) -> Callable[..., tuple[Any, ...]]:
    def made(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
        table = rng.standard_normal((8, size.heads)).astype(wide)
        given = scores.relative_bias(table, bidirectional=bidirectional, max_distance=6)

        def function(s: Any, b: Any, h: Any, q: Any, k: Any, t: Any) -> Any:
            return s + t[_t5_bucket(k - q, bidirectional, 8, 6), h]

        return given, function, table

    return made


def _t5_bucket(away: np.ndarray, bidirectional: bool, count: int, most: int) -> np.ndarray:
    """T5's published bucketing, with its logarithms."""
    base = np.zeros_like(away)
    if bidirectional:
        count //= 2
        base = np.where(away > 0, count, 0)
        away = np.abs(away)
    else:
        away = np.maximum(-away, 0)
    exact = count // 2
    ratio = np.log(np.maximum(away, 1) / exact) / np.log(most / exact)
    large = exact + np.floor(ratio * (count - exact) + 1e-9).astype(int)
    return base + np.where(away < exact, away, np.minimum(large, count - 1))


def clipped(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    table = rng.standard_normal((5, size.heads)).astype(wide)
    made = scores.relative_bias(table, buckets="clipped")
    return made, lambda s, b, h, q, k, t: s + t[np.clip(k - q, -2, 2) + 2, h], table


def alibi_softcap(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    slopes = rng.random(size.heads).astype(wide)
    made = scores.alibi(slopes).then(scores.softcap(2.0))
    return made, lambda s, b, h, q, k, m: 2 * np.tanh((s - m[h] * np.abs(q - k)) / 2), slopes


def free(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    a, c = [rng.standard_normal((size.heads, 3)).astype(wide) for _ in range(2)]
    first, second = operand(a), operand(c)
    made = score(
        lambda s, b, h, q, k: (
            where(k > q, s * tanh(first[h, k]), minimum(log(1 + exp(s)), abs(second[h, q - k]) + 1))
            - s / (2 + first[h, 0] * first[h, 0])
        )
    )

    def function(s: Any, b: Any, h: Any, q: Any, k: Any, a: Any, c: Any) -> Any:
        ahead = s * np.tanh(a[h, np.clip(k, 0, 2)])
        behind = np.minimum(np.log1p(np.exp(s)), np.abs(c[h, np.clip(q - k, 0, 2)]) + 1)
        return np.where(k > q, ahead, behind) - s / (2 + a[h, 0] ** 2)

    return made, function, a, c


def ties(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    """Operands that are equal: each side of minimum and maximum gets half of the gradient."""
    same = rng.standard_normal(size.heads).astype(wide)
    first, second = operand(same), operand(same.copy())
    made = score(
        lambda s, b, h, q, k: s * (1 + minimum(first[h], second[h])) + maximum(second[h], first[h])
    )

    def function(s: Any, b: Any, h: Any, q: Any, k: Any, x: Any, y: Any) -> Any:
        return s * (1 + np.minimum(x[h], y[h])) + np.maximum(y[h], x[h])

    return made, function, same, same.copy()


def hiding(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    made = score(lambda s, b, h, q, k: where((k % 3 == 1) | (q == 3), float("-inf"), 2 * s))
    return made, lambda s, b, h, q, k: np.where((k % 3 == 1) | (q == 3), -np.inf, 2 * s)


def spoilt_table(rng: np.random.Generator, size: Shape, wide: np.dtype) -> tuple[Any, ...]:
    """NaN in the operand at key positions that the case's mask hides (k >= 5)."""
    table = rng.standard_normal((size.heads, size.k_len)).astype(wide)
    table[:, 5], table[:, 6] = np.nan, np.inf
    found = operand(table)
    made = score(lambda s, b, h, q, k: s * found[h, k] + tanh(found[h, k]) / exp(s))
    return made, lambda s, b, h, q, k, t: s * t[h, k] + np.tanh(t[h, k]) / np.exp(s), table
