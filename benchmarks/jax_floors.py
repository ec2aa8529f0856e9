"""What JAX's own products cost on the live tiles of `chunked`, with nothing between them.

    forward     S = Q K^T and S V, of every tile: two products
    backward    S = Q K^T, dP = dO V^T, dV = S^T dO, dK = dP^T Q, dQ = dP K: five

No attention: the logits stand where the weights would. Tiles come at rows and keys that change, in
a jitted loop, of as many heads at once as `chunked` takes.
"""

from __future__ import annotations

from typing import Any

import jax

from attn_core.benchmarks.calls import Call, Refused, tiling
from attn_core.benchmarks.cases import Case


def floor(case: Case, direction: str) -> Call:
    """The products of that pass.

    Raises:
        Refused: it is for "both", which is the sum of the two.
    """
    if direction == "both":
        raise Refused("jax-floor is the products of one pass: forward or backward.")
    return _forward(case) if direction == "forward" else _backward(case)


SHORT, BESIDE = 128, 32
"""Rows of a short line, and how many lines of all heads `chunked` takes side by side."""

BACKWARD = 512, 256
"""Rows and keys of its tiles in a backward pass of the lengths that are timed here."""


def _forward(case: Case) -> Call:
    """All live tiles, one after the other, at rows and keys that change.

    Of as many heads at once as `chunked` takes, and summed in float32 as it sums. Where it takes
    short lines side by side, as many of them, and each product with the reduction for whose sake
    it has both cores: without it the floor would lie above the attention.
    """
    t, heads = tiling(case, "jax"), case.batch * case.heads
    together = t.heads or heads
    short = t.span and t.rows <= SHORT
    beside = -(-BESIDE // together) if short else 1
    arrays = case.arrays()
    q, k, v = (
        jax.numpy.asarray(arrays[n]).reshape(heads, case.length, case.width)
        for n in ("query", "key", "value")
    )

    def products(q: Any, k: Any, v: Any) -> Any:
        def tile(n: Any, total: Any) -> Any:
            def taken(x: Any, size: int) -> Any:
                head = n % (heads // together)
                at = [(n * beside + i) % (case.length // size) * size for i in range(beside)]
                sizes = (together, size, case.width)
                return jax.numpy.stack([jax.lax.dynamic_slice(x, (head, i, 0), sizes) for i in at])

            rows, keys, values = taken(q, t.rows), taken(k, t.keys), taken(v, t.keys)
            logits = jax.numpy.einsum("lhqd,lhkd->lhqk", rows, keys, **wide)
            if short:
                logits = logits - logits.max(-1, keepdims=True)
            found = jax.numpy.einsum("lhqk,lhkd->lhqd", logits.astype(v.dtype), values, **wide)
            return total + (found / logits.sum(-1, keepdims=True) if short else found)

        wide = {"preferred_element_type": jax.numpy.float32}
        start = jax.numpy.zeros((beside, together, t.rows, case.width), jax.numpy.float32)
        turns = -(-t.live // beside) * (heads // together)
        return jax.lax.fori_loop(0, turns, tile, start)

    compiled = jax.jit(products)
    return Call(lambda: jax.block_until_ready(compiled(q, k, v)), lambda arrays: {})


def _backward(case: Case) -> Call:
    """By columns of tiles of all heads; of a window, one to every column.

    The two products that sum over rows have them turned around first, as there, where XLA's CPU
    would turn the logits instead.
    """
    t, heads = tiling(case, "jax"), case.batch * case.heads
    rows, keys = (min(size, case.length) for size in BACKWARD)
    live = case.length // keys if t.span else t.live
    arrays = case.arrays()
    flat = [
        jax.numpy.asarray(arrays[n]).reshape(heads, case.length, case.width)
        for n in ("query", "key", "value", "cotangent")
    ]

    def products(*flat: Any) -> Any:
        def tile(n: Any, totals: Any) -> Any:
            def taken(x: Any, size: int) -> Any:
                at = (n * size) % (case.length - size + 1)
                return jax.lax.dynamic_slice(x, (0, at, 0), (heads, size, case.width))

            sizes = (rows, keys, keys, rows)
            q, k, v, d_out = (taken(x, size) for x, size in zip(flat, sizes, strict=True))
            d_q, d_k, d_v = totals
            logits = jax.numpy.einsum("hqd,hkd->hqk", q, k, **wide).astype(v.dtype)
            d_shares = jax.numpy.einsum("hqd,hkd->hqk", d_out, v, **wide).astype(v.dtype)
            turned = jax.lax.optimization_barrier((q.swapaxes(1, 2), d_out.swapaxes(1, 2)))
            return (
                d_q + jax.numpy.einsum("hqk,hkd->hqd", d_shares, k, **wide),
                d_k + jax.numpy.einsum("hdq,hqk->hdk", turned[0], d_shares, **wide),
                d_v + jax.numpy.einsum("hdq,hqk->hdk", turned[1], logits, **wide),
            )

        wide = {"preferred_element_type": jax.numpy.float32}
        shapes = ((rows, case.width), *2 * ((case.width, keys),))
        start = tuple(jax.numpy.zeros((heads, *s), jax.numpy.float32) for s in shapes)
        return jax.lax.fori_loop(0, live, tile, start)

    compiled = jax.jit(products)
    return Call(lambda: jax.block_until_ready(compiled(*flat)), lambda arrays: {})
