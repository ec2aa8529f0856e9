"""Weights of Keras' layers, in the plain float64 layer."""

from __future__ import annotations

from typing import Any

import compat_layers as layers
import keras
import numpy as np
import pytest

from attn_core.compat.keras import from_group_query_attention, from_multi_head_attention

# Of torch's tensors Keras asks NumPy for a copy in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

X, Y, Z = layers.draw(0, 2, 5, 12), layers.draw(1, 2, 7, 10), layers.draw(2, 2, 7, 6)
RAGGED = np.array([7, 4])
SEEN = np.broadcast_to((np.arange(7) < RAGGED[:, None])[:, None, :], (2, 5, 7))


def made(layer: Any, *inputs: np.ndarray) -> Any:
    """Built, with every weight drawn: biases start at 0, where none of them could be lost."""
    layer(*inputs)
    for n, variable in enumerate(layer.weights):
        if "kernel" in variable.path or "bias" in variable.path:
            variable.assign(0.4 * layers.draw(n, *variable.shape))
    return layer


def array(x: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(x)


STOCK = {
    "plain": {},
    "wide values": {"value_dim": 5, "output_shape": 9},
    "no bias": {"use_bias": False},
    "gate": {"use_gate": True},
}


@pytest.mark.parametrize("options", STOCK.values(), ids=STOCK)
def test_multi_head_attention(options, tmp_path):
    layer = made(keras.layers.MultiHeadAttention(4, 3, dropout=0.25, **options), X, Z, Y)
    found = from_multi_head_attention(layer)
    assert found.config.dropout == 0.25
    its = array(layer(X, Z, Y, attention_mask=SEEN))
    shares = layers.used(found, {"its": its}, X, Y, Z, kv_lengths=RAGGED)
    assert layers.within(shares), shares
    layers.written(found, tmp_path / "x.safetensors")


@pytest.mark.parametrize("options", [{}, {"use_gate": True, "use_bias": False}])
def test_grouped_query_attention(options):
    layer = made(keras.layers.GroupQueryAttention(3, 4, 2, **options), X, Z, Y)
    found = from_group_query_attention(layer)
    assert (found.config.heads, found.config.kv_heads) == (4, 2)
    its = array(layer(X, Z, Y, attention_mask=SEEN))
    shares = layers.used(found, {"its": its}, X, Y, Z, kv_lengths=RAGGED)
    assert layers.within(shares), shares


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_windows_and_causal(window, causal):
    layer = made(keras.layers.MultiHeadAttention(4, 3, sliding_window=window), X, X)
    found = from_multi_head_attention(layer, causal=causal)
    its = array(layer(X, X, use_causal_mask=causal))
    wide = 99 if window is None else window

    def sees(b: int, h: int, q: int, k: int) -> bool:
        return abs(q - k) < wide

    assert layers.within(layers.used(found, {"its": its}, X, sees=sees))
    assert (found.config.mask is None) == (window is None)


def test_what_no_config_says_is_refused():
    unbuilt = keras.layers.MultiHeadAttention(4, 3)
    with pytest.raises(ValueError, match="`layer` must be built"):
        from_multi_head_attention(unbuilt)
    with pytest.raises(TypeError, match=r"must be a keras\.layers\.GroupQueryAttention"):
        from_group_query_attention(unbuilt)
    with pytest.raises(TypeError, match=r"must be a keras\.layers\.MultiHeadAttention"):
        from_multi_head_attention(keras.layers.Dense(3))

    class Other(keras.layers.MultiHeadAttention):
        """What it computes, nobody knows."""

    with pytest.raises(TypeError, match=r"must be a keras\.layers\.MultiHead.* Got Other"):
        from_multi_head_attention(Other(4, 3))
    image = layers.draw(3, 2, 4, 5, 12)
    spread = keras.layers.MultiHeadAttention(4, 3, attention_axes=(1, 2))
    spread(image, image)
    with pytest.raises(ValueError, match="`attention_axes` of keras' MultiHeadAttention"):
        from_multi_head_attention(spread)
    several = keras.layers.MultiHeadAttention(4, 3, output_shape=(2, 6))
    several(X, X)
    with pytest.raises(ValueError, match="`output_shape` of MultiHeadAttention must be left out"):
        from_multi_head_attention(several)


def test_changes_may_not_gainsay_a_layer():
    """heads=2 would cut the same matrices into other heads."""
    layer = made(keras.layers.MultiHeadAttention(4, 3), X, Z, Y)
    assert from_multi_head_attention(layer, heads=4, causal=True).config.causal
    for change in ({"heads": 2}, {"scale": 1.0}, {"bias": False}):
        with pytest.raises(ValueError, match=f"what the original computes.*{next(iter(change))}: "):
            from_multi_head_attention(layer, **change)
