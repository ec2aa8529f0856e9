"""Masks and scores as words, for looking at kernels: what a user would write in Python.

    causal() & window(255)      ~prefix(16) | (q - k < 256) & (k % 2 == 0)      softcap(50)

Of the vocabulary whatever numbers say; where a mask or a score looks arrays up, stand-ins take
their places, since a device function depends on their ranks and kinds alone.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attn_core import masks, scores
from attn_core.config import nearest
from attn_core.language import expr
from attn_core.language.values import Mask, Score, mask, score

_FLAGS = np.zeros((2, 64), np.bool_)
_IDS = np.zeros((2, 64), np.int32)

MASKS: dict[str, Callable[..., Mask]] = {
    "causal": masks.causal,
    "window": masks.window,
    "prefix": masks.prefix,
    "dilated": masks.dilated,
    "chunks": masks.chunks,
    "segments": lambda: masks.segments(_IDS),
    "global_tokens": lambda n=None: masks.global_tokens(_FLAGS if n is None else n),
    "dense": lambda: masks.dense(np.zeros((2, 8, 64, 64), np.bool_)),
}
SCORES: dict[str, Callable[..., Score]] = {
    "softcap": scores.softcap,
    "alibi": lambda heads=8: scores.alibi(heads=heads),
    "relative_bias": lambda buckets=32, heads=8: scores.relative_bias(
        np.zeros((buckets, heads), np.float32)
    ),
}
_WORDS = {
    "abs": abs,
    "minimum": expr.minimum,
    "maximum": expr.maximum,
    "where": expr.where,
    "row": expr.row,
}
_MORE = {"exp": expr.exp, "log": expr.log, "tanh": expr.tanh}
_JOINED = (ast.BitAnd, ast.BitOr)


def mask_of(words: str) -> Mask:
    """The mask that the words say.

    Raises:
        ValueError: they are no mask.
    """
    return _mask(_parsed("mask", words).body, words)


def score_of(words: Sequence[str]) -> Score:
    """The scores that the words say, one after another.

    Raises:
        ValueError: they are no scores.
    """
    found: Score | None = None
    for said in words:
        node = _parsed("score", said).body
        name = _named(node)
        if name in SCORES:
            made = _called("score", SCORES[name], node, said)
        else:
            made = _written("score", score, _function(node, said, "s", **_MORE), said)
        found = made if found is None else found.then(made)
    if found is None:
        raise ValueError("`score` must be at least one. Got none.")
    return found


def _parsed(what: str, words: str) -> ast.Expression:
    try:
        return ast.parse(words.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"`{what}` must be an expression. Got {words!r}.") from error


def _named(node: ast.expr) -> str:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    return node.func.id if called else ""  # type: ignore[attr-defined]


def _mask(node: ast.expr, words: str) -> Mask:
    """Vocabulary and text may be joined: what is neither joined nor vocabulary is text."""
    if not any(_named(below) in MASKS for below in ast.walk(node) if isinstance(below, ast.expr)):
        return _written("mask", mask, _function(node, words), words)
    if isinstance(node, ast.BinOp) and isinstance(node.op, _JOINED):
        left, right = _mask(node.left, words), _mask(node.right, words)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand, words)
    name = _named(node)
    if name in MASKS:
        return _called("mask", MASKS[name], node, words)
    raise ValueError(
        f"`mask` must join masks by &, | and ~ alone. Got {ast.unparse(node)!r} in {words!r}."
    )


def _called(what: str, made: Callable[..., Any], node: ast.expr, words: str) -> Any:
    assert isinstance(node, ast.Call)
    try:
        given = [ast.literal_eval(argument) for argument in node.args]
        named = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        return made(*given, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{what}` must give {_named(node)} the numbers it takes. Got {words!r}: {error}"
        ) from error


def _function(node: ast.expr, words: str, *first: str, **more: Any) -> Callable[..., Any]:
    """What is traced: the text itself, over its indices and the few functions of the language."""
    known = {"b", "h", "q", "k", *first, *_WORDS, *more}
    for below in ast.walk(node):
        if isinstance(below, ast.Name) and below.id not in known:
            vocabulary = SCORES if first else MASKS
            if below.id in vocabulary:
                raise ValueError(
                    f"{below.id!r} must be called, as in Python: {below.id}(). Got {words!r}."
                )
            raise ValueError(
                f"{words!r} must speak of {', '.join(sorted(known))} or of "
                f"{', '.join(vocabulary)}. Got {below.id!r}."
                f"{nearest(below.id, tuple(vocabulary))}"
            )
        if isinstance(below, ast.Lambda):
            raise ValueError(
                f"{words!r} must be what a function of {', '.join([*first, 'b, h, q and k'])} "
                f"returns, as {ast.unparse(below.body)!r}. Got the function."
            )
        if isinstance(below, ast.Attribute | ast.Subscript):
            raise ValueError(
                f"{words!r} must look nothing up: there are no arrays here. "
                f"Got {ast.unparse(below)!r}."
            )
    names = [*first, "b", "h", "q", "k"]
    arguments = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
    body = ast.fix_missing_locations(ast.Expression(ast.Lambda(arguments, node)))
    made = eval(compile(body, "<words>", "eval"), {"__builtins__": {}, **_WORDS, **more})
    return made


def _written(what: str, trace: Callable[..., Any], function: Callable[..., Any], words: str) -> Any:
    try:
        return trace(function)
    except TypeError as error:
        raise ValueError(f"`{what}` must be of the language. Got {words!r}: {error}") from error
