"""What a call of a layer must be, from shapes alone: None in a shape is a size not known yet.

Sizes of heads, masks, scores, bias and lengths are checked where they always are, by `attention`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_core.check_arrays import fits, show
from attn_core.model import fields
from attn_core.model.additive import AdditiveConfig
from attn_core.model.config import AttentionConfig
from attn_core.model.transformer import TransformerConfig

Shape = tuple[Any, ...]


def check_inputs(config: AttentionConfig, query: Shape, key: Shape | None, value: Shape) -> None:
    """The three inputs, (B, T, width) each; key is None where a Memory stands for both."""
    s = config.sizes
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
    elif len(shape) != 2 or "int" not in dtype:
        raise ValueError(
            f"`{name}` must be int tokens (B, T), which this {stack} reads. "
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
    if len(shape) != 2 or not fits(shape, given) or "int" not in dtype:
        raise ValueError(
            f"`types` must be ints (B, T) = {show(given)}, one for each token. "
            f"Got {dtype} of {show(shape)}."
        )


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
            raise ValueError("`cache` must be left out in an encoder, which sees all at once.")
    elif source == bool(kept):
        got = "both" if source else "neither"
        raise ValueError(
            "one of `source` and a cache that holds it (`make_cache(.., source=)`) must be given "
            f"to an encoder-decoder. Got {got}."
        )


def check_prompt(config: TransformerConfig, prompt: Shape, steps: Any, stop: Any) -> None:
    """What generation starts from, how far it goes, and after which token it repeats that one."""
    if stop is not None:
        fields.count("stop", stop, 0)
        if config.vocabulary is not None and stop >= config.vocabulary:
            raise ValueError(
                f"`stop` must be below the vocabulary, {config.vocabulary}. Got {stop}."
            )
    fields.count("steps", steps, 0)
    if len(prompt) != 2 or prompt[1] == 0:
        raise ValueError(f"`prompt` must be int tokens (B, T), T at least 1. Got {show(prompt)}.")


def check_blocks(config: TransformerConfig, stack: str, blocks: int, size: Any) -> None:
    """A model's cache has a cache for each block, none longer than the positions there are."""
    if blocks != config.blocks(stack):
        raise ValueError(
            f"`cache` must be one of this model, of {config.blocks(stack)} blocks. Got {blocks}."
        )
    check_length(config, "cache", size)
