"""JAX's subjects, by exact entry point, and JAX's way of differentiating.

    jax:IMPL    attn_core.attention(impl=IMPL), under jax.jit
    jax-floor   the products of every live tile of `chunked`, in a jitted loop: no attention
                (`jax_floors`)
    jax-nn      jax.nn.dot_product_attention(implementation="xla"), under jax.jit; it takes
                (B, T, H, D), and is given arrays that lie so

A backward pass alone is the pullback of `jax.vjp`, jitted: what the forward pass keeps for it are
its arguments. Every call waits until its results are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from attn_core import registry
from attn_core.benchmarks import calls
from attn_core.benchmarks.calls import Attend, Call, Made, in_words
from attn_core.benchmarks.cases import Case
from attn_core.benchmarks.jax_floors import floor


def ours(impl: str) -> Made:
    """attn_core.attention with that implementation."""
    return lambda case: calls.ours("jax", impl, case)


def nn(case: Case) -> Attend:
    in_words("jax-nn", case, "full", "causal", lengths=True)
    causal = case.mask == "causal"
    lengths = np.array(case.kv_lengths, np.int32) if case.kv_lengths else None

    def attend(query: Any, key: Any, value: Any) -> Any:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=causal,
            key_value_seq_lengths=None if lengths is None else jax.numpy.asarray(lengths),
            implementation="xla",
        )

    return attend


__all__ = ["FUNCTIONS", "floor", "nn", "ours", "prepared"]

FUNCTIONS: dict[str, Made] = {"jax-nn": nn}
_BTHD = ("jax-nn",)


def prepared(name: str, attend: Attend, case: Case, direction: str) -> Call:
    """The function in that direction, on the case's arrays; compiled at its first call."""
    backend = registry.load("jax")
    swapped = name in _BTHD

    def forth(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.swapaxes(1, 2)) if swapped else x

    def moved(arrays: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
        names = ("query", "key", "value", "cotangent")
        return tuple(backend.from_numpy(forth(arrays[n])) for n in names)

    def both(q: Any, k: Any, v: Any, upstream: Any) -> tuple[Any, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return (out, *pull(upstream))

    names: tuple[str, ...]
    compiled: Callable[..., Any]
    if direction == "forward":
        names, compiled = ("out",), jax.jit(lambda q, k, v: (attend(q, k, v),))

        def given(q: Any, k: Any, v: Any, upstream: Any) -> tuple[Any, ...]:
            return q, k, v

    elif direction == "both":
        names, compiled = ("out", "query", "key", "value"), jax.jit(both)

        def given(q: Any, k: Any, v: Any, upstream: Any) -> tuple[Any, ...]:
            return q, k, v, upstream

    else:
        names, compiled = ("query", "key", "value"), jax.jit(lambda pull, g: pull(g))
        keeping = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1])

        def given(q: Any, k: Any, v: Any, upstream: Any) -> tuple[Any, ...]:
            return keeping(q, k, v), upstream

    arguments = given(*moved(case.arrays()))

    def answer(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled(*given(*moved(arrays)))
        back = [backend.to_numpy(x) for x in found]
        back = [x.swapaxes(1, 2) if swapped else x for x in back]
        return dict(zip(names, back, strict=True))

    def planned() -> int:
        found = compiled.lower(*arguments).compile().memory_analysis()  # type: ignore[attr-defined]
        return int(found.temp_size_in_bytes)

    return Call(lambda: jax.block_until_ready(compiled(*arguments)), answer, planned)
