"""Mask, Score and Dropout as pytrees of torch: they cross torch.compile, vmap and export."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree

from attn_core.language.operands import Table
from attn_core.language.text import parse, text
from attn_core.language.values import Dropout, Mask, Score, flatten, rebuild_dropout, unflatten


def register() -> None:
    """Once, when the backend is loaded. A tree is written to a file as its text."""
    for kind in (Mask, Score):
        _pytree.register_pytree_node(
            kind,
            _split,
            lambda arrays, static, kind=kind: unflatten(kind, static, arrays),
            serialized_type_name=f"attn_core.{kind.__name__}",
            to_dumpable_context=_written,
            from_dumpable_context=_read,
            flatten_with_keys_fn=_split_with_keys,
        )
    _pytree.register_pytree_node(
        Dropout,
        _flatten,
        _unflatten,
        serialized_type_name="attn_core.Dropout",
        flatten_with_keys_fn=_flatten_with_keys,
    )


def _split(value: Mask | Score) -> tuple[list[Any], Any]:
    arrays, static = flatten(value)
    return list(arrays), static


def _split_with_keys(value: Mask | Score) -> tuple[list[Any], Any]:
    arrays, static = flatten(value)
    return _keyed(arrays), static


def _written(static: Any) -> Any:
    tree, fixed = static
    return [text(tree), [f and [list(f.values), list(f.shape)] for f in fixed]]


def _read(written: Any) -> Any:
    source, fixed = written
    tables = [f and Table(tuple(f[0]), tuple(f[1]), "float") for f in fixed]
    return parse(source), tuple(tables)


def _flatten(dropout: Dropout) -> tuple[list[Any], float]:
    seed = dropout.seed
    return (list(seed) if isinstance(seed, tuple) else [seed]), dropout.rate


def _flatten_with_keys(dropout: Dropout) -> tuple[list[Any], float]:
    words, rate = _flatten(dropout)
    return _keyed(words), rate


def _keyed(arrays: Any) -> list[Any]:
    return [(_pytree.SequenceKey(i), x) for i, x in enumerate(arrays)]


def _unflatten(words: Any, rate: float) -> Dropout:
    words = list(words)
    return rebuild_dropout(rate, tuple(words) if len(words) == 2 else words[0])
