"""Masks and scores as words of a command line: what a user would write in Python, or shorter.

    causal() & window(255)      causal & window:255      ~prefix:3 | (q - k < 256) & (k % 2 == 0)
    softcap(50)                 softcap:50               s - 0.5 * float(abs(q - k))

A name of the vocabulary stands with what it takes in parentheses or behind a colon, or bare where
it takes nothing; all else is text of the language (`attn_core.language.text`), in one's own
spacing. Who asks says which names there are: `explain` counts what a mask leaves of sizes alone,
where no array is; a device function depends on the ranks and kinds of arrays alone, so that
stand-ins (`STANDING`) take their places there.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attn_core import masks, scores
from attn_core.config import nearest
from attn_core.language import expr
from attn_core.language.values import Mask, Score, mask, score

Masks = Mapping[str, Callable[..., Mask]]
Scores = Mapping[str, Callable[..., Score]]

MASKS: Masks = {
    "causal": masks.causal,
    "window": masks.window,
    "prefix": masks.prefix,
    "dilated": masks.dilated,
    "global_tokens": masks.global_tokens,
    "chunks": masks.chunks,
}
"""Of the vocabulary whatever numbers say."""

_FLAGS = np.zeros((2, 64), np.bool_)
_IDS = np.zeros((2, 64), np.int32)

STANDING: Masks = {
    **MASKS,
    "global_tokens": lambda n=None: masks.global_tokens(_FLAGS if n is None else n),
    "segments": lambda: masks.segments(_IDS),
    "dense": lambda: masks.dense(np.zeros((2, 8, 64, 64), np.bool_)),
}
STANDING_SCORES: Scores = {
    "softcap": scores.softcap,
    "alibi": lambda heads=8: scores.alibi(heads=heads),
    "relative_bias": lambda buckets=32, heads=8: scores.relative_bias(
        np.zeros((buckets, heads), np.float32)
    ),
}


def scores_for(heads: int) -> Scores:
    """Those that numbers say: of slopes the paper's, for so many heads."""

    def alibi() -> Score:
        if heads > 2**20:  # a slope to each of them, in Python's numbers
            raise ValueError(f"`heads` must be 2**20 at most, for alibi of a shape. Got {heads}.")
        return scores.alibi(heads=heads)

    return {"softcap": scores.softcap, "alibi": alibi}


_EXAMPLES = {
    "window": "window:255",
    "prefix": "prefix:16",
    "dilated": "dilated:2",
    "global_tokens": "global_tokens:1",
    "chunks": "chunks:64",
    "softcap": "softcap:50",
}
_LOOKING = ("segments", "dense", "relative_bias")
"""What arrays say, for which only a device function has stand-ins."""

_EXPRESSIONS = {"mask": "'(q >= k) & (q - k < 256)' or 'causal & window:255'"}
_EXPRESSIONS["score"] = "'s * 0.5' or 'softcap:50'"


def _cast(kind: type) -> Callable[[Any], Any]:
    def made(x: Any) -> Any:
        return expr.cast(x, kind) if isinstance(x, expr.Traced) else kind(x)

    return made


_WORDS = {
    "abs": abs,
    "minimum": expr.minimum,
    "maximum": expr.maximum,
    "where": expr.where,
    "row": expr.row,
    "int": _cast(int),
    "float": _cast(float),
}
_MORE = {"exp": expr.exp, "log": expr.log, "tanh": expr.tanh}
_JOINED = (ast.BitAnd, ast.BitOr)
_KNOWN = (ast.Name, ast.Constant, ast.Call, ast.BinOp, ast.UnaryOp, ast.Compare)
_REFUSED = (ast.BoolOp, ast.IfExp)
"""What text of the language is made of; and what tracing refuses in better words."""

_SIGNS = (
    *(ast.BitAnd, ast.BitOr, ast.BitXor, ast.RShift),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
)


def mask_of(words: Sequence[str], vocabulary: Masks = MASKS) -> Mask | None:
    """The mask that the words say, all of which apply; None without any.

    Raises:
        ValueError: they are no masks.
    """
    found: Mask | None = None
    for said in words:
        first, node = _parsed("mask", said)
        try:
            made = _mask(first, node, said, vocabulary)
        except RecursionError as error:
            raise ValueError(
                f"`mask` must join fewer masks. Got {len(said)} characters of them."
            ) from error
        found = made if found is None else found & made
    return found


def score_of(words: Sequence[str], vocabulary: Scores) -> Score | None:
    """The scores that the words say, one after another; None without any.

    Raises:
        ValueError: they are no scores.
    """
    found: Score | None = None
    for said in words:
        first, node = _parsed("score", said)
        if _named(node) in vocabulary:
            made = _called("score", vocabulary, node, said)
        else:
            made = _written("score", score, first, node, said, vocabulary)
        found = made if found is None else found.then(made)
    return found


def _parsed(what: str, words: str) -> tuple[Sequence[ast.Assign], ast.expr]:
    """What is bound to names first, as in `x = q - k; (x >= 0) & (x < 9)`, and the expression."""
    behind = r"\b([^\W\d]\w*)\s*:\s*(-?[\d.]+(?:e[-+]?\d+)?(?:\s*,\s*-?\d+)*)?"
    for said in (words, re.sub(behind, r"\1(\2)", words)):
        try:
            return (), ast.parse(said.strip(), mode="eval").body
        except (SyntaxError, RecursionError, MemoryError, ValueError):
            continue
    try:
        *first, last = ast.parse(words.strip()).body
        if isinstance(last, ast.Expr) and all(_binds(each) for each in first):
            return first, last.value  # type: ignore[return-value]
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        pass  # as every other text that is none
    raise ValueError(
        f"`{what}` must be an expression of the language, such as {_EXPRESSIONS[what]}. "
        f"Got {words!r}."
    )


def _binds(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and all(isinstance(to, ast.Name) for to in node.targets)


def _named(node: ast.expr) -> str:
    named = node.func if isinstance(node, ast.Call) else node
    return named.id if isinstance(named, ast.Name) else ""


def _mask(first: Sequence[ast.Assign], node: ast.expr, words: str, vocabulary: Masks) -> Mask:
    """Vocabulary and text may be joined: what is neither joined nor vocabulary is text."""
    below = [each for each in ast.walk(node) if isinstance(each, ast.expr)]
    if first or not any(_named(each) in vocabulary for each in below):
        return _written("mask", mask, first, node, words, vocabulary)
    if isinstance(node, ast.BinOp) and isinstance(node.op, _JOINED):
        left, right = (_mask((), side, words, vocabulary) for side in (node.left, node.right))
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask((), node.operand, words, vocabulary)
    if _named(node) in vocabulary:
        return _called("mask", vocabulary, node, words)
    raise ValueError(
        f"`mask` must join masks by &, | and ~ alone. Got {ast.unparse(node)!r} in {words!r}."
    )


def _called(what: str, vocabulary: Mapping[str, Callable[..., Any]], node: Any, words: str) -> Any:
    name = _named(node)
    arguments, keywords = (node.args, node.keywords) if isinstance(node, ast.Call) else ((), ())
    try:
        given = [ast.literal_eval(argument) for argument in arguments]
        named = {str(word.arg): ast.literal_eval(word.value) for word in keywords}
        inspect.signature(vocabulary[name]).bind(*given, **named)
        return vocabulary[name](*given, **named)
    except (TypeError, ValueError, MemoryError) as error:
        raise ValueError(
            f"`{what}` must give {name} the numbers it takes, as {_EXAMPLES.get(name, name)}. "
            f"Got {words!r}: {error}"
        ) from error


def _written(
    what: str,
    trace: Callable[..., Any],
    first: Sequence[ast.Assign],
    node: ast.expr,
    words: str,
    vocabulary: Mapping[str, object],
) -> Any:
    """What is traced: the text itself, over its indices and the few functions of the language."""
    indices = ["b", "h", "q", "k"] if what == "mask" else ["s", "b", "h", "q", "k"]
    functions = _WORDS if what == "mask" else {**_WORDS, **_MORE}
    known = {*indices, *functions}
    for part in (*first, node):
        value = part.value if isinstance(part, ast.Assign) else part
        infinite = [given for each in ast.walk(value) for given in _infinite(each)]
        for below in ast.walk(value):
            if below not in infinite:
                _check(what, below, words, known, vocabulary)
        if isinstance(part, ast.Assign):  # known from here on
            known |= {to.id for to in part.targets if isinstance(to, ast.Name)}
    arguments = ast.arguments([], [ast.arg(name) for name in indices], None, [], [], None, [])
    body: list[ast.stmt] = [*first, ast.Return(node)]
    whole = ast.parse("def made(): pass")
    whole.body[0].args, whole.body[0].body = arguments, body  # type: ignore[attr-defined]
    space: dict[str, Any] = {"__builtins__": {}, **functions}
    try:
        exec(compile(ast.fix_missing_locations(whole), "<words>", "exec"), space)
        return trace(space["made"])
    except (TypeError, ValueError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"`{what}` must be of the language. Got {words!r}: {error}") from error


def _check(
    what: str, node: ast.AST, words: str, known: set[str], vocabulary: Mapping[str, object]
) -> None:
    """Raises ValueError for what is no text of the language."""
    if isinstance(node, ast.Name) and node.id in vocabulary:
        raise ValueError(f"`{what}` must not have {node.id} within other text. Got {words!r}.")
    looked = isinstance(node, ast.Attribute | ast.Subscript)
    if looked or (isinstance(node, ast.Name) and node.id in _LOOKING):
        raise ValueError(
            f"`{what}` must look no array up: there is none here. "
            f"Got {ast.unparse(node)!r} in {words!r}."
        )
    if isinstance(node, ast.Name) and node.id not in known:
        raise ValueError(
            f"`{what}` must speak of {', '.join(sorted(known))} or of {', '.join(vocabulary)}. "
            f"Got {node.id!r} in {words!r}.{nearest(node.id, tuple(vocabulary))}"
        )
    if isinstance(node, ast.Lambda):
        raise ValueError(
            f"`{what}` must be what a function returns, as {ast.unparse(node.body)!r}. "
            "Got the function."
        )
    if isinstance(node, ast.expr) and not _of_language(node):
        raise ValueError(
            f"`{what}` must be of the language. Got {ast.unparse(node)!r} in {words!r}, which is "
            "no expression of it."
        )


def _infinite(node: ast.AST) -> list[ast.expr]:
    """What float takes that is no number: the "inf" of float("inf"), the one text within a text."""
    if not isinstance(node, ast.Call) or _named(node) != "float" or len(node.args) != 1:
        return []
    (given,) = node.args
    infinite = isinstance(given, ast.Constant) and given.value in ("inf", "-inf", "nan")
    return [given] if infinite else []


def _of_language(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (bool, int, float)
    if isinstance(node, ast.Call):
        return bool(_named(node)) and not node.keywords
    if isinstance(node, ast.Compare):
        return not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, _SIGNS)
    return isinstance(node, (*_KNOWN, *_REFUSED))
