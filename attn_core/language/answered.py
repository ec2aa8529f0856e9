"""Comparisons that torch.compile answers in place of an expression.

What it compiles may hold a symbol for a size or a number. Torch 2.13 compares a symbol with
anything but numbers by itself and asks no expression: `k < n` ends in an error of its own, but
`k == n` is False and `k != n` True without a word, another mask than was written. Such an answer
stands on the tape as a constant of its kind, and one comparison fewer was asked for than the
function's code has. So it is found where the function itself compares; not beside a comparison that
is run several times, in a loop, nor in a function that it calls.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

from attn_core.language.tree import Tape

_ANSWERS = (("==", "eq", "False"), ("!=", "ne", "True"))


def refuse_answered(fn: Callable[..., Any], tape: Tape) -> None:
    """Whether what `fn` wrote lacks a comparison that torch.compile has answered.

    Raises:
        TypeError: it does, with the spelling that works.
    """
    while isinstance(fn, partial):
        fn = fn.func
    said = [step.value for step in tape.steps if step.op == "const" and step.kind == "bool"]
    if not said:
        return
    for sign, op, answer in _ANSWERS:
        if answer in said and _fewer(getattr(fn, "__code__", None), sign, tape.compared[op]):
            raise TypeError(
                f"an expression must not be compared by `{sign}` with a size or a number that may "
                f"change from call to call within torch.compile, which takes it for {answer}. "
                f"Write `k - n {sign} 0` for `k {sign} n`, or take n = operator.index(n) before; "
                f"what compares values of Python's stands outside the function. "
                f"Got the constant {answer}."
            )


def _fewer(code: Any, sign: str, there: int) -> bool:
    """Whether torch.compile runs this, and fewer comparisons are there than the code has."""
    if sys._getframe(1).f_globals.get("__name__") == __name__ or not isinstance(code, CodeType):
        return False
    return there < _written(code, sign)


# torch.compile runs this for itself while it traces, as it does whatever is marked so (it is what
# torch.compiler.assume_constant_result says of a function); its caller is then no longer this file.
setattr(_fewer, "_dynamo_marked_constant", True)  # noqa: B010


def _written(code: CodeType, sign: str) -> int:
    """How often these instructions, and those of functions within, compare by this sign: a number,
    as far as one can see, and no text."""
    found, last = 0, (None, None)
    for each in dis.get_instructions(code):
        if each.opname == "COMPARE_OP" and each.argval == sign:
            found += not any(isinstance(value, str) for value in last)
        last = (last[1], each.argval if each.opname == "LOAD_CONST" else None)
    return found + sum(_written(c, sign) for c in code.co_consts if isinstance(c, CodeType))
