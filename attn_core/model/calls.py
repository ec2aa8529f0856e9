"""What a call of a layer must be, from shapes alone: None in a shape is a size not known yet.

Sizes of heads, masks, scores, bias and lengths are checked where they always are, by `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attn_core.check_arrays import fits, show
from attn_core.language.text import text
from attn_core.language.tree import Tree
from attn_core.language.values import Mask
from attn_core.model import fields
from attn_core.model.additive import AdditiveConfig
from attn_core.model.config import AttentionConfig, Sizes
from attn_core.model.transformer import TransformerConfig
from attn_core.registry import instead
from attn_core.spec import DTYPES

Shape = tuple[Any, ...]
TOKENS = ("int32", "int64")
"""Dtypes of tokens: narrower ones look nothing up in torch, and cannot hold every answer."""


def check_given(make: str, **given: Any) -> None:
    """What is read is an array, and no list: `make` is what makes one of it."""
    for name, x in given.items():
        if x is None:
            continue
        words = instead(x, name) if type(x).__name__ in ("RaggedTensor", "SparseTensor") else ""
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            words = f": {make}({name}) makes one"
        if words:
            raise TypeError(
                f"`{name}` must be an array. Got {type(x).__module__}.{type(x).__name__}{words}."
            )


def check_inputs(s: Sizes, query: Shape, key: Shape | None, value: Shape) -> None:
    """The three inputs, (B, T, width) each; key is None where a Memory stands for both."""
    _input("query", query, s.width, None)
    if key is not None:
        _input("key", key, s.key_input, query)
        _input("value", value, s.value_input, query)
        if not fits(value[1:2], key[1:2]):
            raise ValueError(
                f"`value` must have as many rows as `key`, {key[1]}. Got {show(value)}."
            )


def _input(name: str, shape: Shape, width: int, query: Shape | None) -> None:
    if len(shape) != 3 or not fits(shape[-1:], (width,)):
        raise ValueError(f"`{name}` must have shape (B, T, {width}). Got {show(shape)}.")
    if query is not None and not fits(shape[:1], query[:1]):
        raise ValueError(f"`{name}` must have the batch of `query`, {query[0]}. Got {show(shape)}.")


def check_additive(config: AdditiveConfig, query: Shape, key: Shape, value: Shape) -> None:
    """The three inputs of additive attention; values may have any width."""
    s = config.sizes
    _input("query", query, s.query_input, None)
    _input("key", key, s.key_input, query)
    if len(value) != 3 or not fits(value[:2], key[:2]):
        raise ValueError(
            f"`value` must have shape (B, Tk, Dv), B and Tk those of `key`. Got {show(value)}."
        )


def check_rows(mask: Any, rows: Any) -> None:
    """A mask array that is cut into tiles of rows: one row for each query, or one for all."""
    given = tuple(getattr(mask, "shape", ()))
    if len(given) in (2, 4) and not fits(given[-2:-1], (rows,)) and given[-2] != 1:
        raise ValueError(f"`mask` must broadcast to (B, 1, Tq, Tk) with Tq = {rows}. Got {given}.")


def check_kept(name: str, config: AttentionConfig, key: Shape, value: Shape, query: Shape) -> None:
    """A Cache's or Memory's arrays, for this layer and batch."""
    s = config.sizes
    wanted = (query[0], None, s.kv_heads)
    if not fits(key, (*wanted, s.head)) or not fits(value, (*wanted, s.value)):
        raise ValueError(
            f"`{name}` must be one of this layer and batch: keys (B, S, Hk, D) = "
            f"({query[0]}, S, {s.kv_heads}, {s.head}) and values of width {s.value}. "
            f"Got {show(key)} and {show(value)}."
        )


def check_slots(batch: Any, length: Any) -> None:
    """The sizes of an empty cache, none negative; those that are not known yet are left alone."""
    for name, size in (("batch", batch), ("length", length)):
        if isinstance(size, (int, float, np.number)):
            fields.count(name, size, 0)


def cache_dtype(given: Any, own: Mapping[str, Any]) -> str:
    """The word of the floats that a cache holds; of integers it would cut off what it is given.

    own: the framework's own dtypes by their words.
    """
    same = [word for word, dtype in own.items() if given is dtype or given == dtype]
    word = given if isinstance(given, str) else same[0] if same else str(given)
    fields.choice("dtype", word, DTYPES)
    return word


def check_kind(name: str, given: Any, kind: type) -> None:
    """A cache, and not the output that holds it, nor a model's for a layer's."""
    if not isinstance(given, kind):
        raise TypeError(
            f"`{name}` must be a {kind.__name__}, as `make_cache` gives it. "
            f"Got {type(given).__name__}{'' if not hasattr(given, 'cache') else ': its `.cache`'}."
        )


def check_cached(query: Shape, key: Shape, size: Any, kv_lengths: Any, query_offset: Any) -> None:
    """What goes with a cache: the cache itself says how long it is, and where the rows stand."""
    for name, given in (("kv_lengths", kv_lengths), ("query_offset", query_offset)):
        if given is not None:
            raise ValueError(
                f"`{name}` must be left out with a cache, whose lengths say it. "
                f"Got {type(given).__name__}."
            )
    if not fits(key[1:2], query[1:2]):
        raise ValueError(
            f"`key` must have the rows of `query`, {query[1]}, where a cache holds those before "
            f"them. Got {show(key)}."
        )
    if query[1] is not None and size is not None and query[1] > size:
        raise ValueError(
            f"`cache` must have room for the new rows. Got {query[1]} rows and {size} slots."
        )


def check_positions(config: AttentionConfig, shape: Shape, query: Shape, own: bool) -> None:
    """`positions` of a call: (T,) or (B, T), read by rotary self-attention alone."""
    if config.positions != "rotary" or not own:
        raise ValueError(
            "`positions` must be left out but for self-attention with rotary positions: nothing "
            f"else reads them. Got shape {show(shape)}."
        )
    if not (fits(shape, query[1:2]) or fits(shape, query[:2])):
        raise ValueError(
            f"`positions` must have shape (T,) or (B, T) = {show(query[:2])}. Got {show(shape)}."
        )


def check_lengths(name: str, shape: Shape, query: Shape) -> None:
    """One length for all, or one for each row of the batch."""
    if len(shape) and not fits(shape, query[:1]):
        raise ValueError(
            f"`{name}` must be an int or have shape (B,) = {show(query[:1])}. Got {show(shape)}."
        )


def check_counts(name: str, given: Any, read: Shape) -> None:
    """The lengths of what a model reads, (B, T, ..), as `attention` takes them under other names.

    Numbers on the host lie within T; arrays of a framework are held within it.
    """
    if given is None:
        return
    numbers = (int, float, np.number)
    if isinstance(given, (list, tuple)) and not all(isinstance(x, numbers) for x in given):
        return  # of arrays, or nested: `attention` reads them
    found = np.asarray(given) if isinstance(given, (int, float, list, tuple)) else given
    kind = str(getattr(found.dtype, "name", found.dtype)).split(".")[-1]
    if "int" not in kind:
        raise TypeError(f"`{name}` must be integers. Got {kind}.")
    check_lengths(name, tuple(found.shape), read)
    check_reach(name, given, 0, read[1], lambda _: False)


def check_keyed(key: Any, value: Any) -> None:
    """A value has a key. Flax refuses one without, and Keras takes it for the key."""
    if key is None and value is not None:
        raise ValueError(
            "`key` must be given where `value` is. Got a value alone: `layer(query, source)` takes "
            "the source for both, as Keras' own layer does with a value. The order here is query, "
            "key, value; there it is query, value, key."
        )


def check_memory(value: Any, kv_lengths: Any, cache: Any) -> None:
    """What goes with a Memory: nothing that it says itself."""
    for name, given in (("value", value), ("cache", cache)):
        if given is not None:
            raise ValueError(
                f"`{name}` must be left out where `key` is a Memory. Got {type(given).__name__}."
            )
    if kv_lengths is not None:
        raise ValueError("`kv_lengths` must be left out where `key` is a Memory, which has them.")


def check_read(config: TransformerConfig, stack: str, name: str, shape: Shape, dtype: str) -> None:
    """What a stack reads: int tokens (B, T), or vectors (B, T, inputs)."""
    if config.tokens(stack) is None:
        if len(shape) != 3 or not fits(shape[-1:], (config.inputs,)) or "float" not in dtype:
            raise ValueError(
                f"`{name}` must be vectors (B, T, {config.inputs}), which this {stack} reads. "
                f"Got {dtype} of {show(shape)}."
            )
    elif len(shape) != 2 or dtype not in TOKENS:
        raise ValueError(
            f"`{name}` must be int tokens (B, T), which this {stack} reads, {' or '.join(TOKENS)}. "
            f"Got {dtype} of {show(shape)}."
        )
    check_length(config, name, shape[1])


def check_length(config: TransformerConfig, name: str, length: Any) -> None:
    """Learned positions have a row for each position, and no more."""
    if config.max_length is not None and length is not None and length > config.max_length:
        raise ValueError(
            f"`{name}` must not be longer than `max_length` = {config.max_length}, the table of "
            f"learned positions. Got {length}."
        )


def check_tokens(
    name: str, tokens: np.ndarray | None, rows: int | None, of: str = "the vocabulary"
) -> None:
    """Tokens are rows of their table, where the host holds their values.

    tokens: None where it does not: nobody waits for a device. rows: None where no table is read.
    """
    if tokens is None or rows is None or not tokens.size:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= rows:
        raise ValueError(
            f"`{name}` must be within {of}, from 0 to {rows - 1}. Got {low if low < 0 else high}."
        )


def check_types(config: TransformerConfig, shape: Shape, dtype: str, given: Shape) -> None:
    """The types of the tokens that an encoder reads, int like those."""
    if config.token_types is None:
        raise ValueError(
            f"`types` must be left out in a model without `token_types`. Got shape {show(shape)}."
        )
    if len(shape) != 2 or not fits(shape, given) or dtype not in TOKENS:
        raise ValueError(
            f"`types` must be ints (B, T) = {show(given)}, one for each token. "
            f"Got {dtype} of {show(shape)}."
        )


def check_classes(config: TransformerConfig, mask: Any, lengths: Any, given: Shape) -> None:
    """Classes are read off the mean of the rows that `lengths` counts, and a mask counts none.

    An array that hides the same keys from every row and head, as `from_hf_mask` gives it, hides
    padding, also as a Mask and beside others: without lengths its rows would be averaged in. A rule
    that reads no array is no padding.
    """
    if config.classes is None or lengths is not None or fits(given[1:2], (1,)):
        return
    if isinstance(mask, Mask):
        parts = _conjuncts(mask.tree, mask.tree.results[0])
        found = text(mask.tree) if any(_hides_padding(mask, part) for part in parts) else None
    else:
        hidden = tuple(getattr(mask, "shape", ()))
        alike = len(hidden) in (2, 4) and all(size == 1 for size in hidden[-3:-1])
        found = show(hidden) if alike else None
    if found is not None:
        raise ValueError(
            "`lengths` must say which rows count in a model with `classes`, whose mean reads them: "
            f"a mask hides keys alone. Got `mask` {found}, the same keys for every row, and no "
            "lengths; padding must stand at the end."
        )


def _conjuncts(tree: Tree, at: int) -> list[int]:
    """The conditions that must all hold where the one at `at` does."""
    step = tree.steps[at]
    if step.op != "and" or step.kind != "bool":
        return [at]
    return [part for arg in step.args for part in _conjuncts(tree, arg)]


def _hides_padding(mask: Mask, at: int) -> bool:
    """Whether the condition at `at` looks an array up, and says the same of every row and head."""
    read, open_, seen, arrays = set(), [at], set(), False
    while open_:
        at = open_.pop()
        if at in seen:
            continue
        seen.add(at)
        step = mask.tree.steps[at]
        args = list(step.args)
        if step.op == "index":
            read.add(step.value)
        elif step.op == "lookup":
            arrays, sizes = True, mask.arrays[int(step.value or 0)].shape
            args = [arg for arg, size in zip(args, sizes, strict=True) if size != 1]
        open_ += args
    return arrays and "k" in read and not read & {"row", "q", "h"}


def check_source(
    config: TransformerConfig, source: bool, kept: bool | None, lengths: Any = None
) -> None:
    """An encoder's source: needed once in an encoder-decoder, and by nothing else.

    source: whether it is given. kept: whether the cache holds it; None without a cache.
    lengths: of the source, which go with it.
    """
    if lengths is not None and not source:
        raise ValueError(
            "`source_lengths` must be left out where no `source` is given: a cache that holds one "
            f"holds its lengths. Got {type(lengths).__name__}."
        )
    if config.kind != "encoder-decoder":
        if source:
            raise ValueError(f"`source` must be left out in a model of kind {config.kind!r}.")
        if kept is not None and config.kind == "encoder":
            raise ValueError(
                "`cache` must be left out in an encoder, which sees all at once: `make_cache` and "
                "`generate` are for decoders."
            )
    elif source == bool(kept):
        got = "both" if source else "neither"
        raise ValueError(
            "one of `source` and a cache that holds it (`make_cache(.., source=)`) must be given "
            f"to an encoder-decoder. Got {got}."
        )


def check_prompt(
    config: TransformerConfig,
    prompt: Shape,
    steps: Any,
    stop: Any,
    dtype: str = "int32",
    tokens: np.ndarray | None = None,
) -> None:
    """What generation starts from, how far it goes, and after which token it repeats that one.

    tokens: the prompt, where the host holds its values.
    """
    if stop is not None:
        fields.count("stop", stop, 0)
        if config.vocabulary is not None and stop >= config.vocabulary:
            raise ValueError(
                f"`stop` must be below the vocabulary, {config.vocabulary}. Got {stop}."
            )
    fields.count("steps", steps, 0)
    if len(prompt) != 2 or prompt[1] == 0 or dtype not in TOKENS:
        raise ValueError(
            f"`prompt` must be int tokens (B, T), {' or '.join(TOKENS)}, T at least 1. "
            f"Got {show(prompt)} of {dtype}."
        )
    check_length(config, "prompt", prompt[1])
    if config.max_length is not None and prompt[1] is not None:
        most = config.max_length - prompt[1] + 1  # the last token that is made is not read
        if steps > most:
            raise ValueError(
                f"`steps` must be at most {most} after {prompt[1]} tokens, where `max_length` = "
                f"{config.max_length} positions are learned. Got {steps}."
            )
    check_tokens("prompt", tokens, config.vocabulary)


def check_reach(
    name: str, given: Any, least: int, most: int | None, known: Callable[[Any], bool]
) -> None:
    """Lengths lie within [least, most], where their numbers can be read.

    known: whether a framework's array can be read; where it cannot, the caller clamps.
    """
    if given is None:
        return
    if not isinstance(given, (int, list, tuple, np.integer, np.ndarray)):
        if not known(given):
            return
        given = given.tolist() if hasattr(given, "tolist") else given.numpy().tolist()
    given = given if isinstance(given, (list, tuple)) else np.ravel(given).tolist()
    for value in given:
        if not isinstance(value, (int, np.integer)):
            continue  # of an array that cannot be read here, or refused for its dtype
        high = most is not None and value > most
        if value < least or high:
            reach = f"at least {least}" if most is None else f"within [{least}, {most}]"
            raise ValueError(f"`{name}` must be {reach} for every row of the batch. Got {value}.")


def check_int32(name: str, least: int, most: int) -> None:
    """The least and most of integers that are given are numbers in which positions are computed."""
    for value in (least, most):
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"`{name}` must be within int32, as positions are. Got {value}.")


def check_blocks(config: TransformerConfig, stack: str, keys: list[Shape], given: Shape) -> None:
    """A model's cache has a cache for each block, of this batch, and no more than its positions.

    keys: the shapes of the blocks' keys. given: the shape of what the stack reads.
    """
    if len(keys) != config.blocks(stack):
        raise ValueError(
            f"`cache` must be one of this model, of {config.blocks(stack)} blocks. Got {len(keys)}."
        )
    for key in keys:
        if not fits(key[:1], given[:1]):
            raise ValueError(f"`cache` must be one of this batch, {given[0]}. Got {key[0]}.")
    check_length(config, "cache", keys[0][1])
