"""The arguments of a call on their way through Keras, which looks into them, names and rewrites."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
from keras import ops

from attn_core import masks
from attn_core.backends.keras.tensors import tensor
from attn_core.language.text import parse, text
from attn_core.language.values import Mask, Score
from attn_core.model.cache import Memory
from attn_core.model.words import check_words


@keras.saving.register_keras_serializable(package="attn_core")
class Leaf:
    """A Mask or Score on its way through Keras, which would look for tensors within.

    Keras saves a graph with the arguments of its calls: a mask is saved as its text.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def get_config(self) -> dict[str, Any]:
        if not isinstance(self.value, Mask) or self.value.arrays:
            raise ValueError(
                "a graph that is saved must hold no score and no mask with arrays in its calls, "
                "only masks that are a text: give such a one to the model as an input, or to the "
                f"layer's config. Got {self.value!r}."
            )
        return {"mask": text(self.value.tree)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Leaf:
        return cls(Mask(parse(config["mask"])))


def leaf(x: Any) -> Any:
    """An argument as Keras is to see it: NumPy's arrays as tensors."""
    return Leaf(x) if isinstance(x, (Mask, Score)) else tensor(x)


def bare(x: Any) -> Any:
    """The argument again."""
    return x.value if isinstance(x, Leaf) else x


def check_graph(seed: Any = None, **given: Any) -> None:
    """What a call of KerasTensors hands on to the call of tensors: no tensor of theirs is within.

    Keras puts tensors in the place of arguments that are KerasTensors, and looks into no Mask.
    """
    if isinstance(seed, keras.KerasTensor):
        raise ValueError(
            "`seed` must be a number in a graph of KerasTensors, or an array that is known when it "
            "is built: an Input has a batch, and a seed has none. Got a KerasTensor."
        )
    for name, x in given.items():
        arrays = x.value.arrays if isinstance(x, Leaf) else ()
        if any(isinstance(array, keras.KerasTensor) for array in arrays):
            raise ValueError(
                f"`{name}` must hold arrays that are known when a graph of KerasTensors is built. "
                "Got one of KerasTensors: give a boolean array of allowed pairs as `mask` itself, "
                "`kv_lengths` or a `bias`, or build the rule in the `call` of a layer of your own."
            )


def with_mask(options: dict[str, Any], mask: Any) -> dict[str, Any]:
    """The options of a call with its `mask` as `attention_mask`.

    Keras writes a mask of padding down as `mask` where a call has an argument of that name, and
    gives it to that name again: so no `call` here has one.
    """
    if mask is not None and options.get("attention_mask") is not None:
        raise ValueError(
            "`mask` and `attention_mask` must not both be given: they are two names of one "
            "argument. Got both."
        )
    mask = options.pop("attention_mask", None) if mask is None else mask
    return options if mask is None else {**options, "attention_mask": leaf(mask)}


def padding_of(x: Any) -> Any:
    """The mask of padding that Keras has put on a tensor, boolean (B, T); None without one.

    Keras hands it to `query_mask` itself, but where query is the only tensor of a call.
    """
    return getattr(x, "_keras_mask", None)


def padding_mask(query: Any, key: Any, value: Any, source: Any) -> Mask | None:
    """What masks of padding that Keras hands on let see, as one mask; None where there are none."""
    if source is None:
        key = query if key is None else key
    found = None
    for given, columns in ((query, False), (key, True), (value, True)):
        if given is None or isinstance(given, Memory):
            continue
        if len(given.shape) != 2:
            raise ValueError(
                f"a padding mask of Keras must have shape (B, T). Got {tuple(given.shape)}."
            )
        given = ops.cast(given, "bool")
        part = masks.dense(given[:, None, None, :] if columns else given[:, None, :, None])
        found = part if found is None else found & part
    return found


def in_our_words(call: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's `__call__`, which says of what `call` does not take how that is called here."""

    @wraps(call)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        check_words(type(self).__name__, self.words, options)
        return call(self, *args, **options)

    return as_is(checked)


def as_is(method: Any) -> Any:
    """Mark a method as AutoGraph marks what it does not rewrite."""
    method.autograph_info__ = None
    return method
