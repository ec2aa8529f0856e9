"""transformers' masks as rules: the same entries, no array of T x T, and an array to all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch_memory import peak

transformers = pytest.importorskip("transformers", minversion="5")

from transformers import masking_utils as theirs  # noqa: E402

from attn_core.backends.torch.compat_transformers_masks import Rule  # noqa: E402
from attn_core.compat.transformers import (  # noqa: E402
    attention_forward,
    attention_mask,
    register,
)

B, ROWS, KEYS = 2, 5, 9
IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 2, 2, 2, 2]])
PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 0, 1, 2, 3]])

FUNCTIONS: dict[str, tuple[Any, Callable[[int, int, int], bool]]] = {
    "causal": (theirs.causal_mask_function, lambda b, q, k: k <= q),
    "window": (theirs.sliding_window_causal_mask_function(3), lambda b, q, k: q - 3 < k <= q),
    "band": (
        theirs.sliding_window_bidirectional_mask_function(2),
        lambda b, q, k: abs(q - k) <= 2,
    ),
    "causal or near": (
        theirs.or_masks(
            theirs.causal_mask_function, theirs.sliding_window_bidirectional_overlay(1)
        ),
        lambda b, q, k: k <= q or abs(q - k) <= 1,
    ),
    "bidirectional": (theirs.bidirectional_mask_function, lambda b, q, k: True),
}
SEEN = torch.arange(KEYS + 4) < torch.tensor([12, 6])[:, None]
LEFT = torch.arange(KEYS + 4) >= torch.tensor([0, 5])[:, None]
PLACED: dict[str, dict[str, Any]] = {
    "no cache": {"q_length": KEYS},
    "behind a cache": {"q_offset": KEYS - ROWS},
    "behind a cache that slides": {"q_offset": KEYS - ROWS + 3, "kv_offset": 3},
    "in a static cache": {"q_offset": torch.tensor(2)},
}
PADDED = {"none": None, "right": SEEN, "left": LEFT, "right, and too short": SEEN[:, :7]}


def made(function: Any, padded: str = "none", **place: Any) -> Any:
    sizes = {"batch_size": B, "q_length": ROWS, "kv_length": KEYS, "mask_function": function}
    return attention_mask(**{**sizes, **place}, attention_mask=PADDED[padded])


def expected(sees: Any, padded: str, q_length: int = ROWS, q_offset: Any = 0, kv_offset: int = 0):
    """Entry by entry, (B, 1, rows, KEYS)."""
    found, seen = np.zeros((B, 1, q_length, KEYS), bool), PADDED[padded]
    for b, _, i, j in np.ndindex(found.shape):
        q, k = i + int(q_offset), j + kv_offset
        token = seen is None or (k < seen.shape[1] and bool(seen[b, k]))
        found[b, 0, i, j] = token and sees(b, q, k)
    return found


class Layer(torch.nn.Module):
    is_causal = True


def draw(*shape: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(shape).standard_normal(shape, np.float32))


def seen_by_attention(mask: Any, rows: int) -> np.ndarray:
    """The entries that have a weight, (B, 1, rows, KEYS)."""
    q, k = draw(B, 1, rows, 4), draw(B, 1, KEYS, 4)
    _, weights = attention_forward(Layer(), q, k, k, mask, return_weights=True)
    return (weights > 0).numpy()


@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_entries(name: str, place: str, padded: str) -> None:
    function, sees = FUNCTIONS[name]
    mask = made(function, padded, **PLACED[place])
    want = expected(sees, padded, **PLACED[place])
    if padded == "none" and (name == "bidirectional" or (name, place) == ("causal", "no cache")):
        assert mask is None
        return
    assert type(mask) is Rule
    assert tuple(mask.shape) == want.shape
    np.testing.assert_array_equal(seen_by_attention(mask, want.shape[2]), want)
    np.testing.assert_array_equal(mask.made(), want)


@pytest.mark.parametrize("inner", ["causal", "window"])
def test_packed_sequences(inner: str) -> None:
    """Positions begin anew within a row; a window is one of the sequence that it lies in."""
    function, sees = FUNCTIONS[inner]
    packed = theirs.packed_sequence_compatibility_function(function, PLACES, IDS)
    mask = made(packed, q_length=KEYS)
    assert type(mask) is Rule
    want = expected(lambda b, q, k: IDS[b, q] == IDS[b, k] and sees(b, q, k), "none", KEYS)
    np.testing.assert_array_equal(seen_by_attention(mask, KEYS), want)
    np.testing.assert_array_equal(mask.made(), want)


def test_what_it_does_not_know_is_an_array() -> None:
    odd = theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: k % 2 == 1)
    chunks = theirs.chunked_causal_mask_function(3, torch.zeros(B, dtype=torch.int64))
    for function, sees in (
        (odd, lambda b, q, k: k <= q and k % 2 == 1),
        (chunks, lambda b, q, k: k <= q and k // 3 == q // 3),
    ):
        mask = made(function, "right", q_length=KEYS)
        assert type(mask) is torch.Tensor
        np.testing.assert_array_equal(mask, expected(sees, "right", KEYS))
    # One row is no more than its keys.
    assert type(made(FUNCTIONS["causal"][0], "right", q_length=1, q_offset=8)) is torch.Tensor


def test_whoever_looks_sees_the_array() -> None:
    mask = made(FUNCTIONS["window"][0], "left", q_length=KEYS)
    array = mask.made()
    assert type(array) is torch.Tensor
    assert (mask.dtype, mask.ndim, mask.device.type) == (torch.bool, 4, "cpu")
    assert mask.contiguous() is mask
    assert "q - k <= 2" in repr(mask)
    other = draw(B, 1, KEYS, KEYS) > 0
    for look in (
        lambda x: x[:, :, 2:, :4],
        lambda x: x & other,
        lambda x: torch.where(x, 0.0, -torch.inf),
        lambda x: x.to(torch.float32).sum(-1),
        lambda x: x.expand(-1, 3, -1, -1),
        lambda x: x.clone(),
        lambda x: torch.cat([x, x]),
    ):
        found = look(mask)
        assert type(found) is torch.Tensor
        assert torch.equal(found, look(array))


def model(layers: int = 1, **options: Any) -> Any:
    register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20}
    config = transformers.MistralConfig(**sizes, **heads, pad_token_id=0, **options)
    config._attn_implementation = "attn_core"
    return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("window", [None, 64])
@torch.no_grad()
def test_memory_is_linear(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole model, padded on the left; with transformers' array it is not."""
    rows = 4096
    ours, tokens = model(sliding_window=window), torch.ones((1, rows), dtype=torch.int64)
    seen = torch.ones_like(tokens)
    seen[:, :100] = 0
    most = peak(lambda: ours(tokens, attention_mask=seen))
    assert most < rows * rows / 2  # half of a boolean mask
    dense = theirs.sdpa_mask
    monkeypatch.setitem(theirs.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "attn_core", dense)
    assert peak(lambda: ours(tokens, attention_mask=seen)) > rows * rows


def test_a_checkpointed_layer_and_a_compiled_model() -> None:
    """Both treat a mask as a tensor: the first saves it, the second makes it itself."""
    ours, tokens = model(layers=2, sliding_window=4), torch.arange(22).reshape(2, 11) % 20
    seen = (torch.arange(11) >= torch.tensor([0, 3])[:, None]).long()
    want = ours(tokens, attention_mask=seen).logits
    compiled = torch.compile(ours, backend="eager")(tokens, attention_mask=seen).logits
    torch.testing.assert_close(compiled[seen.bool()], want[seen.bool()], rtol=0, atol=1e-5)
    want[seen.bool()].square().mean().backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    for reentrant in (True, False):
        ours.zero_grad()
        ours.train()
        ours.activation_checkpointing_enable({"use_reentrant": reentrant})
        out = ours(tokens, attention_mask=seen, use_cache=False).logits
        out[seen.bool()].square().mean().backward()
        for gradient, p in zip(gradients, ours.parameters(), strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
