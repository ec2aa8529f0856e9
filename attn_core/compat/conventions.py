"""Other libraries' masks and windows in our terms: True = attend, neighbours besides oneself.

Each function is named after where the argument comes from, since the same array means opposite
things in different libraries. Masks come back as the array library's own arrays, or as keyword
arguments of `attn_core.attention`; windows come back as Masks, to be combined with `&`.

| source | its convention |
|---|---|
| torch `nn.MultiheadAttention` | True = masked; float is added; rank 3 is (N * heads, L, S) |
| Transformer Engine | True = masked |
| transformers, a tokenizer's `attention_mask` | (B, Tk), 1 = a token, 0 = padding |
| Keras layers' `attention_mask` | True = attend, rank 3 is (B, Tq, Tk) |
| transformers' `sliding_window` | total width, the position itself included |
| jax.nn's `local_window_size` | (left, right) neighbours, inclusive; an int is both |
| FlashAttention's `window_size` | (left, right) neighbours, inclusive; -1 is unbounded |
"""

from __future__ import annotations

from operator import index
from typing import Any

from attn_core import masks
from attn_core.language.values import Mask, mask


def from_torch_mha_mask(
    attn_mask: Any | None = None, key_padding_mask: Any | None = None, *, heads: int
) -> dict[str, Any]:
    """The two masks of `torch.nn.MultiheadAttention` as keyword arguments of `attention`.

        attn_core.attention(q, k, v, **from_torch_mha_mask(attn_mask, key_padding_mask, heads=8))

    Args:
        attn_mask: (L, S) or (N * heads, L, S); boolean, True = masked, or a float that is added.
        key_padding_mask: (N, S) or (S,); boolean, True = padding, or a float that is added.
        heads: Hq, by which the first axis of a rank-3 attn_mask is divided.

    Returns:
        {"mask": ..., "bias": ...}, without what is not needed: boolean masks are turned over and
        combined, float masks are summed.

    Raises:
        TypeError, ValueError: a mask is no array, neither boolean nor float, or not of such a
            shape.
    """
    found: dict[str, Any] = {}
    if _int("heads", heads) < 1:
        raise ValueError(f"`heads` must be at least 1. Got {heads}.")
    if attn_mask is not None:
        shape = _shape("attn_mask", attn_mask)
        if len(shape) == 3:
            if shape[0] % heads:
                raise ValueError(
                    f"`attn_mask` of rank 3 must be (N * heads, L, S) with heads = {heads}. "
                    f"Got {shape}."
                )
            attn_mask = attn_mask.reshape((shape[0] // heads, heads, *shape[1:]))
        elif len(shape) != 2:
            raise ValueError(f"`attn_mask` must be (L, S) or (N * heads, L, S). Got {shape}.")
        _put(found, "attn_mask", attn_mask)
    if key_padding_mask is not None:
        shape = _shape("key_padding_mask", key_padding_mask)
        if len(shape) not in (1, 2):
            raise ValueError(f"`key_padding_mask` must be (N, S) or (S,). Got {shape}.")
        batch = shape[0] if len(shape) == 2 else 1
        _put(found, "key_padding_mask", key_padding_mask.reshape((batch, 1, 1, shape[-1])))
    return found


def _shape(name: str, given: Any) -> tuple[Any, ...]:
    """The shape of an array, whose library is the one in which the mask comes back."""
    if not hasattr(given, "shape") or not hasattr(given, "dtype"):
        raise TypeError(
            f"`{name}` must be an array of the library in which the mask is to be. "
            f"Got {type(given).__name__}."
        )
    return tuple(given.shape)


def _put(found: dict[str, Any], name: str, given: Any) -> None:
    dtype = str(given.dtype)
    if "bool" in dtype:
        seen = ~given
        found["mask"] = found["mask"] & seen if "mask" in found else seen
    elif "float" in dtype:
        found["bias"] = found["bias"] + given if "bias" in found else given
    else:
        raise TypeError(
            f"`{name}` must be boolean (True = masked) or floating point (added). Got {dtype}."
        )


def from_transformer_engine_mask(attention_mask: Any) -> Any:
    """Transformer Engine's boolean mask, True = masked, turned over: True = attend.

    Raises:
        TypeError: it is no boolean array.
    """
    _shape("attention_mask", attention_mask)
    if "bool" not in str(attention_mask.dtype):
        raise TypeError(f"`attention_mask` must be boolean. Got {attention_mask.dtype}.")
    return ~attention_mask


def from_hf_mask(attention_mask: Any) -> Any:
    """A tokenizer's `attention_mask`, (B, Tk) of 1 and 0, as a boolean mask (B, 1, 1, Tk).

    Where padding stands at the end of every row, `kv_lengths=attention_mask.sum(-1)` says the same
    without an array of masks.

    Raises:
        TypeError: it is no array of booleans or integers.
        ValueError: it is not of rank 2.
    """
    shape = _shape("attention_mask", attention_mask)
    if len(shape) != 2:
        raise ValueError(f"`attention_mask` must be (B, Tk), 1 = a token. Got {shape}.")
    if "float" in str(attention_mask.dtype):
        raise TypeError(
            "`attention_mask` must be boolean or integer, 1 = a token. "
            f"Got {attention_mask.dtype}; a mask that is added to the scores is `bias=`."
        )
    return (attention_mask != 0)[:, None, None, :]


def from_keras_mask(attention_mask: Any) -> Any:
    """The `attention_mask` of Keras layers, (B, Tq, Tk) or (B, 1 or heads, Tq, Tk), True = attend.

    Keras reads rank 3 with the batch first; here, as in torch and jax.nn, an array of rank 3 would
    start with the heads, so `attention` refuses it.

    Raises:
        TypeError: it is no array.
        ValueError: it is not of rank 3 or 4.
    """
    shape = _shape("attention_mask", attention_mask)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"`attention_mask` must be (B, Tq, Tk) or (B, heads, Tq, Tk). Got {shape}."
        )
    seen = attention_mask if "bool" in str(attention_mask.dtype) else attention_mask != 0
    return seen[:, None] if len(shape) == 3 else seen


def from_hf_window(sliding_window: int) -> Mask:
    """transformers' `sliding_window`: the total width, the position itself included.

        q - sliding_window < k

    Causal models use it as `masks.causal() & from_hf_window(sliding_window)`.

    Raises:
        TypeError, ValueError: it is no int of at least 1.
    """
    width = _int("sliding_window", sliding_window)
    if width < 1:
        raise ValueError(f"`sliding_window` must be at least 1, the position itself. Got {width}.")
    return masks.window(left=width - 1)


def from_jax_window(local_window_size: int | tuple[int, int]) -> Mask:
    """jax.nn's `local_window_size`: (left, right) neighbours, inclusive; an int is both.

    A negative bound, which jax.nn takes too, leaves out the position itself and nearer neighbours.

    Raises:
        TypeError, ValueError: it is neither an int nor two.
    """
    if isinstance(local_window_size, (tuple, list)):
        if len(local_window_size) != 2:
            raise ValueError(
                f"`local_window_size` must be an int or (left, right). Got {local_window_size}."
            )
        left, right = [_int("local_window_size", x) for x in local_window_size]
    else:
        left = right = _int("local_window_size", local_window_size)
    return mask(lambda b, h, q, k: (q - k <= left) & (k - q <= right))


def from_flash_window(window_size: tuple[int, int]) -> Mask | None:
    """FlashAttention's `window_size`: (left, right) neighbours, inclusive; -1 is unbounded.

    None where both are unbounded. FlashAttention aligns at the end: `query_offset="end"`.

    Raises:
        TypeError, ValueError: it is not two ints.
    """
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"`window_size` must be (left, right). Got {window_size}.")
    left, right = [_int("window_size", x) for x in window_size]
    sides = [None if side < 0 else side for side in (left, right)]
    return None if sides == [None, None] else masks.window(*sides)


def _int(name: str, x: Any) -> int:
    if isinstance(x, bool):
        raise TypeError(f"`{name}` must be an integer. Got a bool.")
    try:
        return index(x)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer. Got {type(x).__name__}.") from None
