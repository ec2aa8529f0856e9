"""PyTorch's subjects, by exact entry point, and torch's way of differentiating.

    torch:IMPL          attn_core.attention(impl=IMPL)
    torch-sdpa          torch.nn.functional.scaled_dot_product_attention, choosing for itself
    torch-sdpa-flash    the same, pinned to SDPBackend.FLASH_ATTENTION
    torch-sdpa-math     the same, pinned to SDPBackend.MATH
    torch-flex          torch.nn.attention.flex_attention.flex_attention, under torch.compile
    torch-floor         the kernel behind it, once over all tiles of 128 rows of a window with every
                        key that one of their rows sees, or over all documents: no mask within
    matmul              torch.matmul of two 2048 x 2048 matrices: the ceiling, no attention

A backward pass alone is `torch.autograd.grad` over a graph that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attn_core import registry
from attn_core.benchmarks import calls
from attn_core.benchmarks.calls import Attend, Call, Made, Refused, forward_only, in_words
from attn_core.benchmarks.cases import MASKS, Case

MATMUL = 2048
"""Rows and columns of the ceiling's matrices: 17 GFLOP."""


def ours(impl: str) -> Made:
    """attn_core.attention with that implementation."""
    return lambda case: calls.ours("torch", impl, case)


def sdpa(case: Case) -> Attend:
    """Lengths are a boolean mask to it, (B, 1, Tq, Tk), made beforehand with all that is hidden."""
    in_words("torch-sdpa", case, "full", "causal", lengths=True)
    causal, mask = case.mask == "causal", None
    if case.kv_lengths:
        rows, causal = np.arange(case.rows), False
        if case.mask == "full":
            rows = rows[:1]
        mask = torch.as_tensor(np.stack([case.dense(rows, b) for b in range(case.batch)]))[:, None]

    def attend(query: Any, key: Any, value: Any) -> Any:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)

    return attend


def pinned(backend: SDPBackend) -> Made:
    """scaled_dot_product_attention, allowed this backend alone."""

    def made(case: Case) -> Attend:
        inner = sdpa(case)

        def attend(query: Any, key: Any, value: Any) -> Any:
            with sdpa_kernel(backend):
                return inner(query, key, value)

        return attend

    return made


def flex(case: Case, device: str = "cpu") -> Attend:
    in_words("torch-flex", case, *MASKS)
    mask = None
    if case.mask != "full":
        sizes = (case.length, case.length)
        mask = create_block_mask(_rule(case), None, None, *sizes, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return compiled(query, key, value, block_mask=mask)

    return attend


def _rule(case: Case) -> Any:
    reach, kind = case.reach, case.mask

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def window(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k < reach)

    def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q // reach == k // reach)

    return {"causal": causal, "window": window, "documents": documents}[kind]


FUNCTIONS: dict[str, Made] = {
    "torch-sdpa": sdpa,
    "torch-sdpa-flash": pinned(SDPBackend.FLASH_ATTENTION),
    "torch-sdpa-math": pinned(SDPBackend.MATH),
    "torch-flex": flex,
}


def prepared(name: str, attend: Attend, case: Case, direction: str) -> Call:
    """The function in that direction, on the case's arrays."""
    if name == "torch-flex":
        forward_only(name, direction)
    backend = registry.load("torch")
    names = ("query", "key", "value")

    def call(tensors: Mapping[str, Any]) -> Any:
        """What is run, from leaves made here, outside of it."""
        q, k, v = (tensors[n].detach().requires_grad_(direction != "forward") for n in names)
        upstream = tensors["cotangent"]
        if direction == "forward":
            return lambda: (attend(q, k, v),)
        if direction == "both":

            def both() -> tuple[Any, ...]:
                out = attend(q, k, v)
                return (out.detach(), *torch.autograd.grad(out, (q, k, v), upstream))

            return both
        out = attend(q, k, v)
        return lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)

    def moved(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {n: backend.from_numpy(x) for n, x in arrays.items()}

    def answer(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = call(moved(arrays))()
        keys = {"forward": ("out",), "backward": names, "both": ("out", *names)}[direction]
        return {n: backend.to_numpy(x) for n, x in zip(keys, found, strict=True)}

    return Call(call(moved(case.arrays())), answer)


FLOOR = 128
"""Rows of a tile in the floor under a window."""


def floor(case: Case, direction: str) -> Call:
    """One call of the fused CPU kernel, which reads tiles by their stride; nothing is copied."""
    forward_only("torch-floor", direction)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    arrays = case.arrays()
    q, k, v = (torch.as_tensor(arrays[n])[0] for n in ("query", "key", "value"))
    documents = case.mask == "documents"
    if case.mask not in ("window", "documents"):
        raise Refused("of full and causal attention the kernel itself is the floor: torch-sdpa.")
    rows = case.reach if documents else min(FLOOR, case.length - case.reach)
    before = 0 if documents else case.reach

    def tiles(x: Any, size: int) -> Any:
        count = (x.shape[1] - size) // rows + 1
        return x.as_strided(
            (count, x.shape[0], size, x.shape[2]), (rows * x.stride(1), *x.stride())
        )

    given = [tiles(q[:, before:], rows), *(tiles(x, before + rows) for x in (k, v))]
    return Call(lambda: kernel(*given, 0.0, documents)[0], lambda arrays: {})


def ceiling(case: Case) -> Call:
    """A large matmul in the case's dtype; there is nothing to check but that it is there."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[case.dtype]
    one = torch.randn(MATMUL, MATMUL, dtype=dtype)
    other = torch.randn(MATMUL, MATMUL, dtype=dtype)
    return Call(lambda: one @ other, lambda arrays: {})
