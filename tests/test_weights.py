"""The weights of chosen heads and rows are those that `attention` gives there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attn_core
from attn_core import masks, scores

B, HQ, HK, TQ, TK, D = 2, 4, 2, 9, 11, 5
RNG = np.random.default_rng(5)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape)


QUERY, KEY = normal(B, HQ, TQ, D), normal(B, HK, TK, D)
DENSE = RNG.random((B, HQ, TQ, TK)) < 0.5
TABLE = attn_core.operand(normal(HQ, TK))

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": masks.causal(), "query_offset": "end"},
    "window": {"mask": masks.window(2, 3), "query_offset": [3, -1]},
    "start": {"mask": masks.causal(), "query_offset": "start"},
    "dense": {"mask": DENSE},
    "by head": {
        "mask": attn_core.mask(lambda b, h, q, k: (k + h) % 3 != b),
        "query_offset": "start",
    },
    "bias": {"bias": normal(1, HQ, TQ, 1), "sinks": normal(HQ)},
    "bias rank 2": {"bias": normal(TQ, TK), "scale": 0.3},
    "score": {
        "score": attn_core.score(lambda s, b, h, q, k: s * TABLE[h, k] + q),
        "query_offset": 2,
    },
    "alibi": {"score": scores.alibi(normal(HQ)), "query_offset": "end"},
    "lengths": {
        "mask": masks.causal(),
        "kv_lengths": [11, 4],
        "q_lengths": [9, 3],
        "query_offset": "end",
    },
    "row": {"mask": masks.segments(np.arange(TQ)[None] // 3, np.arange(TK)[None] // 4)},
    "one length": {"kv_lengths": 5, "q_lengths": 7},
}
CHOICES: list[tuple[Any, Any]] = [
    (None, None),
    ([2], [4]),
    ([3, 0], [8, 0, 3]),
    (1, None),
    (None, 8),
    (range(4), np.array([1, 1])),
]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("heads", "queries"), CHOICES)
def test_they_are_those_of_attention(name: str, heads: Any, queries: Any) -> None:
    options = OPTIONS[name]
    full = attn_core.attention(QUERY, KEY, KEY, return_weights=True, **options).weights
    picked = np.atleast_1d(np.arange(HQ) if heads is None else np.array(heads))
    rows = np.atleast_1d(np.arange(TQ) if queries is None else np.array(queries))
    found = attn_core.weights(QUERY, KEY, heads=heads, queries=queries, **options)
    np.testing.assert_allclose(found, full[:, picked][:, :, rows], rtol=1e-12, atol=1e-15)


def test_layout() -> None:
    turned = [a.swapaxes(1, 2) for a in (QUERY, KEY)]
    found = attn_core.weights(*turned, heads=[1], queries=[2, 3], layout="BTHD")
    want = attn_core.weights(QUERY, KEY, heads=[1], queries=[2, 3])
    np.testing.assert_array_equal(found, want)


def test_the_memory_is_that_of_the_chosen_rows() -> None:
    import tracemalloc

    query, key = np.ones((1, 2, 4096, 4), np.float32), np.ones((1, 2, 4096, 4), np.float32)
    bias = np.broadcast_to(np.float32(1), (1, 2, 4096, 4096))
    options: dict[str, Any] = {"heads": [1], "queries": [0, 4095], "bias": bias}
    tracemalloc.start()
    try:
        attn_core.weights(query, key, mask=masks.causal(), **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6  # all of one head's would be 67 MB


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"heads": [4]}, ValueError, r"`heads` must lie within \[0, Hq\) = \[0, 4\). Got 4"),
        ({"queries": -1}, ValueError, r"`queries` must lie within \[0, Tq\) = \[0, 9\). Got -1"),
        ({"heads": 1.5}, TypeError, "`heads` must be an int or host ints. Got float"),
        ({"heads": True}, TypeError, "`heads` must be an int or host ints. Got bool"),
        ({"queries": [2, False]}, TypeError, "`queries` must be an int or host ints. Got list"),
        ({"queries": "ab"}, TypeError, "`queries` must be an int or host ints. Got str"),
        ({"mask": masks.causal()}, ValueError, "`query_offset` must be given"),
        ({"mask": "causal"}, TypeError, "`mask` must be a Mask"),
    ],
)
def test_misuse(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attn_core.weights(QUERY, KEY, **given)


def test_an_offset_of_the_host_is_no_larger_than_it_is() -> None:
    """Held within +-2 ** 28, q * 1000 would not be an int32 for certain, and be refused."""
    far = attn_core.mask(lambda b, h, q, k: q * 1000 >= k)
    given = {"query": QUERY, "key": KEY, "mask": far, "query_offset": 1000}
    whole = attn_core.attention(**given, value=KEY, return_weights=True).weights
    got = attn_core.weights(**given, queries=[3])
    np.testing.assert_allclose(got, whole[:, :, [3]], atol=1e-12)


def test_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`heads` must name at least one head. Got none."):
        attn_core.weights(QUERY, KEY, heads=[])
    assert attn_core.weights(QUERY, KEY, queries=[]).shape == (B, HQ, 0, TK)
