"""Dropout's mask as kernels make it: the bits of SPEC, section 7, whichever way a tile lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_calls import DEVICE

from attn_core import reference
from attn_core.kernels.tile import kept_of, philox

EDGES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)


@triton.jit
def words_of(out, counters, key0, key1, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    # One by one: no list can be made in what is compiled.
    x0, x1 = tl.load(counters + at).to(tl.uint32), tl.load(counters + COUNT + at).to(tl.uint32)
    x2 = tl.load(counters + 2 * COUNT + at).to(tl.uint32)
    x3 = tl.load(counters + 3 * COUNT + at).to(tl.uint32)
    found = philox(x0, x1, x2, x3, tl.load(key0).to(tl.uint32), tl.load(key1).to(tl.uint32))
    for n in tl.static_range(4):
        tl.store(out + n * COUNT + at, found[n].to(tl.int64))


@triton.jit
def mask_of(
    out, seed, b, heads, rows, first, threshold,
    M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    row, key = tl.arange(0, M), tl.arange(0, N)
    kept = kept_of(
        seed, b, tl.load(heads + row), tl.load(rows + row), first, threshold, M, N, TURNED
    )
    if TURNED:
        tl.store(out + row[None, :] * N + key[:, None], kept.to(tl.int8))
    else:
        tl.store(out + row[:, None] * N + key[None, :], kept.to(tl.int8))


def test_words_are_those_of_the_reference_at_the_edges_too() -> None:
    rng = np.random.default_rng(5)
    counters = rng.integers(0, 2**32, (4, 64))
    for word in range(4):
        counters[word, word * 8 : word * 8 + len(EDGES)] = EDGES
    for key in ((0, 0), (2**32 - 1, 2**32 - 1), (7, 2**31)):
        out = torch.zeros(4, 64, dtype=torch.int64, device=DEVICE)
        words = [torch.tensor([word], device=DEVICE) for word in key]
        words_of[(1,)](out, torch.from_numpy(counters).to(DEVICE), *words, COUNT=64)
        assert out.cpu().numpy().tolist() == [w.tolist() for w in reference.philox(counters, key)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (32, 64), (128, 16)])
def test_a_tile_keeps_what_the_reference_keeps(rows: int, keys: int, turned: bool) -> None:
    rng = np.random.default_rng(rows + keys)
    q = rng.integers(-(2**31), 2**31, rows).astype(np.int32)
    h = rng.integers(0, 200, rows).astype(np.int32)
    seed, b, first, threshold = (2**32 - 3, 12345), 3, 4096 + keys, 2**32 - 2**30
    out = torch.zeros(rows, keys, dtype=torch.int8, device=DEVICE)
    on = [torch.from_numpy(x).to(DEVICE) for x in (np.array(seed), h, q)]
    signed = threshold - 2**32  # as a launch passes it: int32 of its bits
    mask_of[(1,)](
        out, on[0], b, on[1], on[2], first, signed, M=rows, N=keys, TURNED=turned
    )  # fmt: skip

    k = first + np.arange(keys)
    at = (k // 4, q[:, None] % np.int64(2**32), h[:, None], b)
    words = np.stack([np.broadcast_to(w, (rows, keys)) for w in reference.philox(at, seed)])
    expected = np.take_along_axis(words, (k % 4)[None, None, :], 0)[0] >= threshold
    assert 0.1 < expected.mean() < 0.5
    assert (out.cpu().numpy() != 0).tolist() == expected.tolist()
