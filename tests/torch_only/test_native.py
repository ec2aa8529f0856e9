"""torch's fused kernel: where it is asked, what is done around it, and where it refuses.

Expected values are the reference implementation's in float64, and conformance judges it too
(`attn-core conformance run --subject torch:native`); here sizes go over several tiles.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import grad, jvp, vmap

import attn_core
from attn_core import UnsupportedError, attention, masks, scores
from attn_core.backends.torch import (
    native,
    native_bands,
    native_documents,
    native_selections,
    native_tiles,
)
from attn_core.backends.torch.chunked_backward import Saved
from attn_core.spec import Operands

RNG = np.random.default_rng(23)
B, HQ, HK, TQ, TK, D = 2, 4, 2, 300, 410, 8


def draw(*shape: int, dtype: Any = torch.float64) -> torch.Tensor:
    return torch.as_tensor(RNG.standard_normal(shape)).to(dtype)


def ints(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.as_tensor(RNG.integers(low, high, shape))


def arrays(rows: int = TQ, keys: int = TK) -> list[torch.Tensor]:
    return [draw(B, HQ, rows, D), draw(B, HK, keys, D), draw(B, HK, keys, D)]


def found(given: list[torch.Tensor], impl: str, **options: Any) -> list[torch.Tensor]:
    """Outputs, and the gradients of query, key and value."""
    leaves = [x.clone().requires_grad_() for x in given]
    got = attention(*leaves, impl=impl, **options)
    got = [x for x in got if x is not None] if isinstance(got, tuple) else [got]
    draws = np.random.default_rng(3)
    pulled = [torch.as_tensor(draws.standard_normal(tuple(x.shape))).to(x.dtype) for x in got]
    return [*[x.detach() for x in got], *torch.autograd.grad(got, leaves, pulled)]


def compare(given: list[torch.Tensor], **options: Any) -> None:
    both = [found(given, impl, **options) for impl in ("native", "reference")]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


SEGMENTS = ints(0, 4, B, TK).sort(-1).values
CASES: dict[str, Any] = {
    "plain": {},
    "causal": {"mask": masks.causal(), "query_offset": "end"},
    "a window": {"mask": masks.causal() & masks.window(70), "query_offset": "end"},
    "rows without keys": {"mask": masks.causal(), "query_offset": -200},
    "lengths": {"kv_lengths": [410, 0], "q_lengths": [129, 300]},
    "offsets": {"mask": masks.causal(), "query_offset": torch.tensor([-150, 110])},
    "documents": {"mask": masks.segments(SEGMENTS) & masks.causal(), "query_offset": 0},
    "keys that lie apart": {
        "mask": masks.window(40) | masks.global_tokens(3) | masks.blocks(np.eye(4) > 0, 100),
        "query_offset": 0,
    },
    "a mask of heads": {
        "mask": attn_core.mask(lambda b, h, q, k: (k - q) % 256 < 50 * h + 50),
        "query_offset": 0,
    },
    "a mask of batches": {
        "mask": attn_core.mask(lambda b, h, q, k: k - q < 100 * b),
        "query_offset": 0,
    },
    "one key each": {"mask": masks.window(0, 0), "query_offset": 0},
    "one key for some": {"mask": masks.chunks(3), "query_offset": 1},
    "a dense mask": {"mask": ints(0, 2, B, HQ, TQ, TK) == 1},
    "the statistics too": {"mask": masks.window(70), "query_offset": 0, "return_lse": True},
}


@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
@pytest.mark.parametrize("name", CASES)
def test_over_several_tiles(name: str, layout: str) -> None:
    given = arrays()
    if layout == "BTHD":
        given = [x.transpose(1, 2) for x in given]
    compare(given, layout=layout, **CASES[name])


@pytest.mark.parametrize("options", [{}, {"mask": masks.causal()}])
def test_whole(options: Any) -> None:
    compare(arrays(200, 200), **options)


def test_a_long_row_is_asked_for_in_spans_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_bands, "JOINED", 64)
    for name in ("causal", "keys that lie apart", "lengths", "rows without keys"):
        compare(arrays(), **CASES[name])


def test_entries_that_lie_apart() -> None:
    """The kernel takes for granted that they do not, and would answer wrongly without a word."""
    spread = [draw(*x.shape[:3], 2 * D)[..., ::2] for x in arrays()]
    assert all(x.stride(-1) == 2 for x in spread)
    compare(spread, mask=masks.window(50), query_offset=0)
    even = [draw(B, n, 200, 2 * D)[..., ::2] for n in (HQ, HK, HK)]
    compare(even)
    with torch.no_grad():
        got, want = (attention(*even, impl=impl) for impl in ("native", "reference"))
    torch.testing.assert_close(got, want)


def test_poison_stays_where_nobody_looks() -> None:
    q, k, v = arrays()
    options = {"kv_lengths": [300, 77], "q_lengths": [222, 300], "mask": masks.window(60, 2)}
    want = found([q, k, v], "native", query_offset=0, **options)
    for x, lengths in ((k, (300, 77)), (v, (300, 77)), (q, (222, 300))):
        for b, length in enumerate(lengths):
            x[b, :, length:] = torch.nan
    k[0, :, -1], v[1, :, -1] = torch.inf, -torch.inf
    got = found([q, k, v], "native", query_offset=0, **options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


POISON = (torch.nan, torch.inf, -torch.inf, 1e37)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_kernel_says_so_wherever_poison_is_hidden(rows: int, dtype: Any) -> None:
    """What is not replaced beforehand is told by the answer, of which that is taken for granted.

    The kernel has vectors and what is left over, blocks of 512 keys and of 32 rows.
    """
    for keys in (2, 15, 17, 64, 70, 530):
        q, k, v, up = (draw(1, 2, n, 16, dtype=dtype) for n in (rows, keys, keys, rows))
        allowed = torch.as_tensor(RNG.random((rows, keys)) < 0.4)
        allowed[:, 0], allowed[:, keys // 2 :: 3], allowed[:, -1] = True, False, False
        added = torch.zeros(rows, keys, dtype=dtype).masked_fill(~allowed, -torch.inf)
        for value in POISON:
            # Finite, but logits overflow.
            big = 100 if value == 1e37 else 1
            value = min(value, torch.finfo(dtype).max) if big > 1 else value
            forth = native_tiles._kernel(q * big, k, v, 0.0, False, attn_mask=added)
            back = native_tiles._kernel_backward(
                up * big, q * big, k, v, *forth, 0.0, False, attn_mask=added
            )
            hidden = torch.nonzero(~allowed.any(0)).flatten().tolist()
            for at in {*hidden[:3], *hidden[-3:], hidden[len(hidden) // 2]}:
                for number in range(2):
                    pair = [k.clone(), v.clone()]
                    pair[number][:, :, at] = value
                    out, lse = native_tiles._kernel(q * big, *pair, 0.0, False, attn_mask=added)
                    told = ~(out.isfinite().all(-1) & lse.isfinite())
                    same = (out == forth[0]).all(-1) & (lse == forth[1])
                    assert (told | same).all(), (keys, at, number, value)
                    found = native_tiles._kernel_backward(
                        up * big, q * big, *pair, *forth, 0.0, False, attn_mask=added
                    )
                    for got, want in zip(found, back, strict=True):
                        assert torch.equal(got, want) or not got.isfinite().all(), (keys, at, value)


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_keys_are_looked_at_only_when_the_answer_is_odd(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    look = native_tiles._Clean.look
    monkeypatch.setattr(native_tiles._Clean, "look", lambda c: looked.append(c) or look(c))
    q, k, v = draw(6, HQ, 1, D), draw(6, HK, 300, D), draw(6, HK, 300, D)
    lengths = torch.tensor([300, 0, 1, 64, 65, 299])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, kv_lengths=lengths, impl="native")

    if form == "compiled":
        call = torch.compile(call, fullgraph=True, backend="aot_eager")

    def results(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    want = results(q, k, v)
    assert not looked
    for array in (k, v):
        for value in POISON:
            other = [x.clone() for x in (q, k, v)]
            place = other[1 if array is k else 2]
            for b, length in enumerate(lengths.tolist()):
                place[b, :, length:] = value
            looked.clear()
            got = results(*other)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert bool(looked) == (value != 1e37)


def test_documents_do_not_touch_each_other() -> None:
    segments = torch.arange(512) // 128
    q, k, v = (draw(1, 2, 512, 16, dtype=torch.float32) for _ in range(3))
    mask = masks.causal() & masks.segments(segments)
    want = attention(q, k, v, mask=mask, impl="native")
    k[:, :, 128:256] += 1
    v[:, :, 128:256] *= 7
    got = attention(q, k, v, mask=mask, impl="native")
    apart = segments != 1
    assert torch.equal(got[:, :, apart], want[:, :, apart])
    assert not torch.equal(got[:, :, ~apart], want[:, :, ~apart])


def test_what_is_live_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    kernel = native_tiles._kernel

    def counting(q: Any, k: Any, *rest: Any, **options: Any) -> Any:
        asked.append((q.shape[0] * q.shape[1], q.shape[2], k.shape[2]))
        return kernel(q, k, *rest, **options)

    monkeypatch.setattr(native_tiles, "_kernel", counting)
    q = draw(1, 1, 2048, D)
    with torch.no_grad():
        attention(q, q, q, mask=masks.causal() & masks.window(127), impl="native")
    entries = sum(tiles * rows * keys for tiles, rows, keys in asked)
    live = 2048 * 128 - 127 * 64
    assert live < entries < 2.1 * live, (live, entries)
    assert len(asked) == 3, "the first two tiles have fewer keys, all others are one call"
    assert {rows for _, rows, _ in asked} == {64}, "a wide window has taller tiles"
    asked.clear()
    with torch.no_grad():
        attention(q, q, q, mask=masks.causal() & masks.window(600), impl="native")
    assert {rows for _, rows, _ in asked} == {128}


@pytest.mark.parametrize("impl", ["native", "chunked"])
def test_a_mask_of_batches_has_a_map_for_each(impl: str) -> None:
    """Without operands, lengths and offset, too: the first batch says nothing of the others."""
    given = [draw(3, HQ, 700, D), draw(3, HK, 700, D), draw(3, HK, 700, D)]
    mask = attn_core.mask(lambda b, h, q, k: (k - q < 100 * b) & (q - k <= 300 - 70 * b))
    both = [found(given, each, mask=mask) for each in (impl, "reference")]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offsets", [[0, 1], [8, 24], [200, 150]])
@pytest.mark.parametrize("name", ["window", "of batches"])
def test_batches_with_windows_of_their_own(name: str, offsets: list[int]) -> None:
    """Offsets, or a mask that reads b: tiles alike along one batch are not alike across batches."""
    given = [draw(2, HQ, 512, D), draw(2, HK, 712, D), draw(2, HK, 712, D)]
    widths = masks.window(100) & masks.causal()
    if name != "window":
        widths = attn_core.mask(lambda b, h, q, k: (q >= k) & (q - k < 100 + 50 * b))
    options = {"mask": widths, "query_offset": torch.tensor(offsets)}
    both = [found(given, each, **options) for each in ("native", "reference")]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def documents(length: int, size: int) -> Any:
    return masks.causal() & masks.segments(np.arange(length) // size)


BANDS: dict[str, Any] = {
    "a window": masks.causal() & masks.window(100),
    "a window both ways": masks.window(70, 70),
    "a window of every other head": attn_core.mask(
        lambda b, h, q, k: (q >= k) & (q - k < 40 + 200 * (h % 2))
    ),
    "documents": documents(1300, 256),
    "documents by batch": masks.segments(torch.arange(1300) // torch.tensor([[256], [128]])),
    "chunks, all of them full": masks.chunks(128),
    "dilated": masks.dilated(3, 50) & masks.causal(),
}


@pytest.mark.parametrize("band", [0, 2**20, 2**24], ids=["one by one", "some", "all"])
@pytest.mark.parametrize("name", BANDS)
def test_tiles_alike_are_one_call(name: str, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_bands, "BAND", band)
    native_bands._slid.cache_clear()
    counted = []
    kernel = native_tiles._kernel
    monkeypatch.setattr(
        native_tiles, "_kernel", lambda q, *a, **o: counted.append(q.shape[0]) or kernel(q, *a, **o)
    )
    compare(arrays(1300, 1300), mask=BANDS[name])
    native_bands._slid.cache_clear()
    # The batch of 2 is one call for a single tile, and one each for many.
    assert (max(counted) > 2) == (band > 0), counted


def test_a_selection_is_shared_along_a_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []
    allowed = native_selections.Selections._allowed
    monkeypatch.setattr(
        native_selections.Selections,
        "_allowed",
        lambda self, tiles: evaluated.append(len(tiles)) or allowed(self, tiles),
    )
    x = draw(1, 1, 2048, D)
    with torch.no_grad():
        attention(x, x, x, mask=masks.causal() & masks.window(100), impl="native")
        assert sum(evaluated) == 1, "the first tiles see a part of what the others do"
        evaluated.clear()
        attention(x, x, x, mask=documents(2048, 256), impl="native")
        assert sum(evaluated) == 1
        evaluated.clear()
        shared = attn_core.mask(lambda b, h, q, k: (q >= k) & (q // 200 == k // 200))
        attention(x, x, x, mask=shared, impl="native")
        assert sum(evaluated) >= 16


PACKED = np.repeat(np.arange(7), [300, 1, 129, 300, 257, 300, 13])
RETURNING = np.repeat([0, 1, 0, 2], [300, 400, 500, 100])
SHORT = np.random.default_rng(5).integers(0, 2, 1300).cumsum()
PACKS: dict[str, tuple[Any, bool]] = {
    "of any length": (masks.causal() & masks.segments(PACKED), True),
    "the other way round": (masks.segments(PACKED) & masks.causal(), True),
    "all of each": (masks.segments(PACKED), True),
    "by batch": (masks.causal() & masks.segments(np.stack([PACKED, PACKED[::-1]])), True),
    "all batches alike": (masks.causal() & masks.segments(np.stack([PACKED, PACKED + 9])), True),
    "an id that comes back": (masks.causal() & masks.segments(RETURNING), False),
    "ids beyond int32": (masks.segments(torch.as_tensor(PACKED) * 2**32) & masks.causal(), True),
    "of 3 rows, one call": (masks.segments(np.arange(1300) // 3), True),
    "of few rows, many calls": (masks.segments(SHORT), False),
}


@pytest.mark.parametrize("name", PACKS)
def test_documents_are_cut_where_they_begin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[bool] = []
    of_documents = native_bands.of_documents

    def told(*given: Any) -> Any:
        got = of_documents(*given)
        cut.append(got is not None)
        return got

    monkeypatch.setattr(native_bands, "of_documents", told)
    mask, expected = PACKS[name]
    compare(arrays(1300, 1300), mask=mask, return_lse=True)
    assert set(cut) == {expected}


@pytest.mark.parametrize(
    "options", [{"kv_lengths": [1300, 700]}, {"query_offset": 1}, {"q_lengths": [9, 1300]}]
)
def test_documents_with_more_are_left_to_the_map(options: Any) -> None:
    ids = np.append(PACKED, [6, 6])
    compare(arrays(1300, 1300), mask=masks.causal() & masks.segments(ids), **options)
    compare(arrays(1300, 1302), mask=masks.causal() & masks.segments(ids), query_offset="end")


def test_logits_that_overflow_are_what_they_are_elsewhere() -> None:
    """The kernel says lse 0 of a row of -inf, and makes NaN of a hidden +inf."""
    q, v = torch.full((1, 1, 128, 2), 1e20), draw(1, 1, 4096, 2, dtype=torch.float32)
    k = torch.zeros(1, 1, 4096, 2)
    k[:, :, :3968] = -1e20
    got, want = (
        attention(q, k, v, mask=masks.causal(), query_offset="end", impl=impl)
        for impl in ("native", "reference")
    )
    torch.testing.assert_close(got, want)
    q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    q[0, 0, 0, 0], k[0, 0, 3, 0] = 1e35, 1e5
    out = attention(q, k, torch.ones(1, 1, 4, 2), mask=masks.prefix(3), impl="native")
    assert (out == 1).all()


def test_huge_keys_that_nobody_sees_overflow_nothing() -> None:
    q, k, v = arrays(300, 410)
    want = found([q, k, v], "native", mask=masks.causal(), query_offset=0)
    k[:, :, 301:], v[:, :, 301:] = 1e300, -1e300
    q[:, :, 200] = 1e10
    spoiled = found([q, k, v], "native", mask=masks.causal(), query_offset=0)
    assert all(x.isfinite().all() for x in spoiled)
    torch.testing.assert_close(spoiled[0][:, :, :200], want[0][:, :, :200])


@pytest.mark.parametrize("calls", [1, 6])
def test_short_batches_of_several_lengths_are_one_call(
    calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call for each costs more than looking at what others may not see; a long one does not."""
    asked: list[int] = []
    kernel = native_tiles._kernel
    monkeypatch.setattr(
        native_tiles, "_kernel", lambda q, *a, **o: asked.append(q.shape[0]) or kernel(q, *a, **o)
    )
    if calls > 1:
        monkeypatch.setattr(native_bands, "_CALL", 0)
    lengths = [300, 0, 1, 64, 65, 299]
    q, k, v = draw(6, HQ, 1, D), draw(6, HK, 300, D), draw(6, HK, 300, D)
    once = [6] if calls == 1 else [1] * 5  # of length 0 nothing is asked
    with torch.no_grad():
        attention(q, k, v, kv_lengths=lengths, impl="native")
        assert asked == once
        for b, length in enumerate(lengths):
            k[b, :, length:], v[b, :, length:] = torch.nan, torch.inf
        # Read in blocks, the poison of another's padding is seen, and the kernel is asked again.
        attention(q, k, v, kv_lengths=lengths, impl="native")
    assert asked == [*once, *once, *once]
    compare((q, k, v), kv_lengths=lengths)
    lengths = torch.tensor(lengths)
    compare((q, k, v), kv_lengths=lengths, mask=masks.causal(), query_offset=lengths - 1)


@pytest.mark.parametrize("mask", [None, masks.causal()])
def test_a_row_whose_logits_are_all_lost_has_no_sum(mask: Any) -> None:
    """The kernel says lse 0 of it."""
    q, k, v = (draw(1, 2, 100, 8, dtype=torch.float32) for _ in range(3))
    q[0, 0, 40], k[0, 0] = -1e30, 1e30
    out, lse, _ = attention(q, k, v, mask=mask, impl="native", return_lse=True)
    assert lse[0, 0, 40] == -torch.inf
    assert (out[0, 0, 40] == 0).all()
    assert lse[0, 1].isfinite().all()


def test_which_calls_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed over as they are, causal as causal: nothing of ours may stand between."""
    calls: list[bool] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def counting(*args: Any, is_causal: bool, **options: Any) -> Any:
        calls.append(is_causal)
        return own(*args, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    q, k = draw(1, 2, 64, D), draw(1, 2, 90, D)
    attention(q, q, q)
    attention(q, q, q, mask=masks.causal())
    attention(q[:, :, :1], k, k, mask=masks.causal(), query_offset="end")
    attention(q, k, k, mask=masks.window(200, 200), query_offset="start")
    assert calls == [False, True, False, False]
    attention(q, k, k, mask=masks.causal(), query_offset="end")
    attention(q, q, q, mask=masks.window(3))
    attention(q, q, q, bias=draw(64, 64))
    assert len(calls) == 4


def test_grouped_heads_are_refused_before_torch_2_9(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel went past the end of the keys: NaN, or the end of the process, by `"auto"` too."""
    monkeypatch.setattr(native, "_GROUPS", False)
    q, k = draw(1, 4, 37, D), draw(1, 2, 37, D)
    said = "as many heads as query before torch 2.9. Got Hq = 4 and Hk = 2"
    with pytest.raises(UnsupportedError, match=said):
        attention(q, k, k, impl="native")
    assert attn_core.explain(q, k, k).impl == "chunked"
    assert attn_core.explain(q, q, q).impl == "native"


@pytest.mark.parametrize("how", ["eager", "transform", "compiled"])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(40)])
def test_sixteen_bits_of_grouped_heads_keep_their_gradients(how: str, mask: Any) -> None:
    """The kernel adds 16 heads' gradients of one key in bfloat16; here they are added wide."""
    q, k, v = draw(1, 16, 256, 16), draw(1, 1, 256, 16), draw(1, 1, 256, 16)
    short = [x.to(torch.bfloat16) for x in (q, k, v)]
    g = draw(1, 16, 256, 16).to(torch.bfloat16)

    def loss(k: torch.Tensor) -> torch.Tensor:
        return (attention(short[0], k, short[2], mask=mask, impl="native") * g).sum()

    if how == "transform":
        got = torch.func.grad(loss)(short[1])
    else:
        call = torch.compile(loss, fullgraph=True, backend="aot_eager") if how != "eager" else loss
        leaf = short[1].clone().requires_grad_()
        call(leaf).backward()
        got = leaf.grad

    wide = [x.double() for x in (*short, g)]
    leaf = wide[1].clone().requires_grad_()
    (attention(wide[0], leaf, wide[2], mask=mask, impl="reference") * wide[3]).sum().backward()
    off = (got.double() - leaf.grad).norm() / leaf.grad.norm()
    # bfloat16 rounds by up to 2 ** -9; a sum of 16 kept in it is off by three times as much.
    assert off < 1.5 * 2.0**-9, off


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "score": ({"score": scores.softcap(2.0)}, "`score` must be left out"),
    "bias": ({"bias": draw(TQ, TK)}, "`bias` must be left out"),
    "sinks": ({"sinks": draw(HQ)}, "`sinks` must be left out"),
    "dropout": ({"dropout": attn_core.Dropout(0.1, 3)}, "`dropout` must be left out"),
    "weights": ({"return_weights": True}, "`return_weights` must be left out"),
    "width": ({"value": draw(B, HK, TK, 5)}, "Got D = 8 and Dv = 5"),
    "no keys": ({"key": draw(B, HK, 0, D), "value": draw(B, HK, 0, D)}, "must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name: str) -> None:
    options, text = REFUSED[name]
    q, k, v = arrays()
    call = {"query": q, "key": k, "value": v, "query_offset": 0, **options}
    with pytest.raises(UnsupportedError, match=text):
        attention(**call, impl="native")
    attention(**call)  # and "auto" passes it over


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_second_derivatives_name_the_reference() -> None:
    q, k, v = (x.clone().requires_grad_() for x in arrays(40, 40))
    for options in ({}, {"mask": masks.causal()}, {"mask": masks.window(5)}):
        (first,) = torch.autograd.grad(
            attention(q, k, v, impl="native", **options).sin().sum(), q, create_graph=True
        )
        with pytest.raises(UnsupportedError, match='impl="reference"'):
            torch.autograd.grad(first.sum(), q)
        with pytest.raises(UnsupportedError, match='impl="reference"'):
            jvp(lambda x: attention(x, k, v, impl="native", **options), (q,), (q,))  # noqa: B023
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q.detach(), q.detach())
            with pytest.raises(UnsupportedError, match='impl="reference"'):
                attention(dual, k.detach(), v.detach(), impl="native", **options)


@pytest.mark.parametrize("options", [{}, {"mask": masks.causal()}, {"mask": masks.window(70)}])
def test_transforms(options: Any) -> None:
    q, k, v = (torch.stack([x, x + 1]) for x in arrays(150, 150))
    f = {
        impl: vmap(grad(lambda q, k, v, i=impl: attention(q, k, v, impl=i, **options).sin().sum()))
        for impl in ("native", "reference")
    }
    torch.testing.assert_close(f["native"](q, k, v), f["reference"](q, k, v))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["plain", "documents", "lengths", "the statistics too"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own
def test_compiled(name: str, backend: str) -> None:
    given = arrays()
    call = torch.compile(
        lambda *x: attention(*x, impl="native", **CASES[name]), fullgraph=True, backend=backend
    )
    leaves = [x.clone().requires_grad_() for x in given]
    got = call(*leaves)
    got = got.out if isinstance(got, tuple) else got
    options = {n: x for n, x in CASES[name].items() if not n.startswith("return")}
    up = torch.as_tensor(np.random.default_rng(3).standard_normal(tuple(got.shape)))
    want = found(given, "reference", **options)
    for a, b in zip([got, *torch.autograd.grad(got, leaves, up)], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_every_run_gives_the_same_bits() -> None:
    given = [x.float() for x in arrays()]
    first = found(given, "native", **CASES["documents"])
    for _ in range(30):
        again = found(given, "native", **CASES["documents"])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_heads_than_a_grid_has_room_for() -> None:
    q = draw(300, 220, 3, D, dtype=torch.float32)
    options = {"mask": masks.causal(), "query_offset": -1}
    got, want = (attention(q, q, q, impl=impl, **options) for impl in ("native", "reference"))
    torch.testing.assert_close(got, want)


def test_a_document_of_one_row_has_no_gradient_of_its_logit() -> None:
    """Its weight is 1 whatever the logit: the kernel would leave a rounding of large values."""
    ids = np.minimum(np.arange(1300), 4)
    q, k, v = (x.float() for x in arrays(1300, 1300))
    _, *grads = found([q, k, v * 1e4], "native", mask=masks.segments(ids))
    assert all((g[..., :4, :] == 0).all() for g in grads[:2])


def test_a_long_document_is_cut_into_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each row sees all of it, what a call gives is bounded all the same."""
    monkeypatch.setattr(native_bands, "BAND", 2**16)
    calls: list[int] = []
    tiles = native_documents.Documents.tiles

    def told(self: Any, *given: Any) -> Any:
        got = list(tiles(self, *given))
        calls.extend(rows.stop - rows.start for rows, _ in got)
        return got

    monkeypatch.setattr(native_documents.Documents, "tiles", told)
    compare(arrays(1300, 1300), mask=masks.segments(np.arange(1300) // 1000))
    assert max(calls) <= 128


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0**-149])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_causal_by_a_scale_that_is_not_above_zero(how: str, scale: float) -> None:
    """The kernel's own causal hides by -inf before it scales: that gives +inf, or NaN."""
    for dtype, options in ((torch.float64, {"return_lse": True}), (torch.float32, {})):
        given = [x.to(dtype) for x in arrays(33, 33)]
        if how == "eager":
            got, want = (
                found(given, impl, mask=masks.causal(), scale=scale, **options)
                for impl in ("native", "reference")
            )
        else:
            call = torch.compile(
                lambda *x: attention(*x, mask=masks.causal(), scale=scale, impl="native"),
                fullgraph=True,
                backend="aot_eager",
            )
            want = [attention(*given, mask=masks.causal(), scale=scale, impl="reference")]
            got = [call(*given)]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_on_cuda_causal_needs_a_scale_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 8, 16, dtype=torch.float16)
    asked: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(native, "whole", lambda p, look=True: asked.append(p) or "full")
        attention(x, x, x, mask=masks.causal(), scale=0.75, impl="native")
    for scale, refused in ((0.5, False), (0.0, True), (-1.0, True)):
        reasons = native.refusals(replace(asked[0], device="cuda", scale=scale))
        assert any("a scale above 0" in reason for reason in reasons) == refused


EQUAL: dict[str, tuple[Any, Any]] = {
    "all": (None, lambda q, k: (q >= 0) & (k >= 0)),
    "causal": (masks.causal(), lambda q, k: q >= k),
    "a window": (masks.window(2, 2), lambda q, k: (q - k).abs() <= 2),
    "chunks": (masks.chunks(64), lambda q, k: q // 64 == k // 64),
}


@pytest.mark.parametrize("how", ["eager", "compiled", "transform"])
@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("logit", [2.0**10, 2.0**20, 2.0**30])
def test_large_logits_keep_their_weights(logit: float, name: str, how: str) -> None:
    """One float32 log-sum-exp forgets the sum: rows are then rebuilt from two numbers.

    Equal logits, so that every weight is known: one over the keys that the row may see.
    """
    n, (mask, sees) = 70, EQUAL[name]
    q = torch.full((1, 2, n, 16), (logit / 16) ** 0.5)
    v, up = (draw(1, 2, n, 16, dtype=torch.float32) for _ in range(2))

    def loss(v: torch.Tensor) -> torch.Tensor:
        return (attention(q, q, v, mask=mask, scale=1.0, impl="native") * up).sum()

    if how == "transform":
        got = grad(loss)(v)
    else:
        call = torch.compile(loss, fullgraph=True, backend="aot_eager") if how != "eager" else loss
        leaf = v.clone().requires_grad_()
        (got,) = torch.autograd.grad(call(leaf), leaf)
    at = torch.arange(n)
    allowed = sees(at[:, None], at[None])
    p = allowed.double() / allowed.sum(-1, keepdim=True)
    want = p.T @ up.double()
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


def test_large_logits_with_the_gradient_of_lse() -> None:
    q = torch.full((1, 1, 40, 16), 256.0)
    v = draw(1, 1, 40, 16, dtype=torch.float32).requires_grad_()
    out, lse, _ = attention(q, q, v, scale=1.0, impl="native", return_lse=True)
    (got,) = torch.autograd.grad(out.sum() + lse.sum(), v)
    torch.testing.assert_close(got, torch.ones_like(got))


@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        (torch.float64, 32.0),
        (torch.float32, 32.0),
        (torch.float16, 2.0**15),
        (torch.bfloat16, 2.0**18),
    ],
)
def test_which_log_sum_exps_are_coarse(dtype: Any, most: float) -> None:
    x = Operands(*[torch.zeros(1, 1, 4, 1, dtype=dtype)] * 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def coarse(*lse: float) -> bool:
        m = torch.tensor(lse, dtype=wide).view(1, 1, -1)
        return native_tiles.coarse(x, Saved(m, m, m, m)) is not None

    assert not coarse(0.0, most, -most)
    assert not coarse(torch.nan, torch.inf, -torch.inf, most)
    for big in (1.001 * most, -1.001 * most):
        assert coarse(0.0, big)
        assert coarse(torch.nan, big, torch.inf)


@pytest.mark.parametrize("t", [512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_of_a_document_leave_the_others_as_they_are(dtype: Any, t: int) -> None:
    """Bit for bit; those of the document itself are what chunked finds."""
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([150, 106, 200, t - 456]))
    mask = masks.segments(ids) & masks.causal()
    given = [draw(1, heads, t, 16, dtype=torch.float32).to(dtype) for heads in (4, 2, 2, 4)]

    def found(impl: str, *given: Any) -> list[Any]:
        leaves = [x.clone().requires_grad_() for x in given[:3]]
        out = attention(*leaves, mask=mask, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]

    before = found("native", *given)
    changed = [x.clone() for x in given]
    for x in changed:
        x[:, :, ids == 1] *= 2.0**10 if dtype == torch.bfloat16 else 8.0
    after = found("native", *changed)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, ids != 1], b[:, :, ids != 1])
        assert not torch.equal(a[:, :, ids == 1], b[:, :, ids == 1])
    ours = found("chunked", *changed)
    near = 2.0**-6 if dtype == torch.bfloat16 else 2e-5
    for a, b in zip(after, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=float(b.abs().max()) * near)


def test_ordinary_logits_are_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = native_tiles._kernel_backward
    monkeypatch.setattr(
        native_tiles, "_kernel_backward", lambda *a, **o: calls.append(1) or kernel(*a, **o)
    )
    given = arrays(200, 200)
    for options in ({}, {"mask": masks.causal()}, {"mask": masks.window(40)}):
        calls.clear()
        found(given, "native", **options)
        assert calls
        calls.clear()
        found([given[0] * 1e4, *given[1:]], "native", **options)
        assert not calls


def test_statistics_of_our_own_reach_the_kernel_whole() -> None:
    """Where a sum may have been lost the row has m and log l apart, and both are needed."""
    q, k = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    q[..., 0], k[..., 1] = 1e20, 1e20  # no logit is other than 0, but products might overflow
    v = draw(1, 1, 4, 2, dtype=torch.float32).requires_grad_()
    out = attention(q, k, v, mask=masks.causal(), impl="native", return_lse=True)[0]
    (got,) = torch.autograd.grad(out.sum(), v)
    want = torch.tensor([1 + 1 / 2 + 1 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 / 4, 1 / 3 + 1 / 4, 1 / 4])
    torch.testing.assert_close(got, want[:, None].expand(4, 2)[None, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lse_of_sixteen_bits_is_computed_in_float32(dtype: Any) -> None:
    """The kernel's own is good to 14 bits there."""
    given = [x.to(dtype) for x in arrays(64, 64)]
    with pytest.raises(UnsupportedError, match="`return_lse` must be left out"):
        attention(*given, impl="native", return_lse=True)
    got = attention(*given, return_lse=True).lse
    want = attention(*[x.double() for x in given], impl="reference", return_lse=True).lse
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6)
