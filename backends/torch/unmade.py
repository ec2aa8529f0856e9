"""Kernels that turn out not to compile: under "auto" the call goes on without them.

The probe compiles a few kernels; what a mask or a score makes of them is compiled when a call first
asks for it, within the operator. Where that fails and "auto" had chosen them, `chunked` answers in
their place, from the same rows of m and log l, and the question is remembered: it is not compiled
again, "auto" passes kernels over for it, and `explain` says why. Where `impl="triton"` was asked
for, the error is raised, each time. So is every other error: what runs out of memory or fails as it
runs has been compiled.

A question is all that decides what is compiled but sizes: whoever has asked once need not wait for
a compiler that fails again with every length of a prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from attn_core import registry
from attn_core.backends.torch.chunked_parts import Ask
from attn_core.backends.torch.forks import Alone
from attn_core.backends.torch.triton import FEW
from attn_core.language.tree import Tree
from attn_core.spec import Operands, Problem

_T = TypeVar("_T")


class Question(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        device: "cuda:0".
        widths: D and Dv.
        few: whether there are as few queries as in decoding.
        packed: whether query heads share key heads.
        given: whether there are a bias, sinks, lengths of keys and of rows, dropout.
        fast: whether float32 may be multiplied as TF32.
    """

    device: str
    dtype: str
    widths: tuple[int, int]
    few: bool
    packed: bool
    mask: Tree | None
    score: Tree | None
    given: tuple[bool, ...]
    fast: bool


_found: dict[tuple[str, Question], str] = {}
"""By pass, "forward" or "backward", and question: what the compiler said."""

_LOCK = Alone()


def reasons(p: Problem) -> list[str]:
    """Why "auto" passes kernels over for this problem: what an earlier call found.

    While torch.compile traces nothing is read: what is compiled falls by itself, as it runs.
    """
    if torch.compiler.is_compiling() or not _found:
        return []
    passes = ("forward", "backward") if p.needs_grad else ("forward",)
    asked = question(p)
    said = [(what, _found.get((what, asked))) for what in passes]
    return [
        f"its kernels must compile for this problem. Got {error} in an earlier {what} pass."
        for what, error in said
        if error
    ]


def question(p: Problem) -> Question:
    """Of a call that nobody has made yet."""
    return Question(
        f"{p.device}:{p.place}" if p.device == "cuda" else p.device,
        p.dtype,
        (p.width, p.v_width),
        (p.q_len or 0) <= FEW,
        p.group > 1,
        p.mask,
        p.score,
        (p.bias is not None, p.sinks_dtype is not None, p.kv_lengths, p.q_lengths, p.rate > 0),
        p.precision == "fast",
    )


def asked(ask: Ask, x: Operands) -> Question:
    """The same of a call within the operator."""
    q_len, heads = (x.query.shape[ask.layout.index(axis)] for axis in "TH")
    beside = (x.bias, x.sinks, x.kv_lengths, x.q_lengths)
    return Question(
        str(x.query.device),
        str(x.query.dtype).removeprefix("torch."),
        (x.query.shape[3], x.value.shape[3]),
        q_len <= FEW,
        heads > x.key.shape[ask.layout.index("H")],
        ask.mask,
        ask.score,
        (*[given is not None for given in beside], ask.rate > 0),
        ask.fast,
    )


def unless(what: str, ask: Ask, x: Operands, run: Callable[[], _T]) -> _T | None:
    """What `run` gives, the forward or backward pass by kernels; None where they do not compile.

    Raises:
        Exception: whatever it raises, if kernels were asked for by name, or have been compiled.
    """
    if not ask.falls:
        return run()
    if _found and (what, asked(ask, x)) in _found:
        return None
    from attn_core.backends.torch import triton_launch

    try:
        return run()
    except Exception as error:
        if not triton_launch.uncompiled(error):
            raise
        _remember(what, asked(ask, x), error)
        return None


def _remember(what: str, question: Question, error: Exception) -> None:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if len(said) > 400:
        # A compiler shows the source first, and says last what is wrong with it.
        said = f"{said[:150]} ... {said[-250:]}"
    with _LOCK.held():
        known = (what, question) in _found
        _found[what, question] = said
    registry.forget()
    if not known:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        warnings.warn(
            f'kernels of impl="triton" must compile where "auto" asks them; chunked answers in '
            f'their place from here on, and impl="triton" raises the error. Got {said}{notes}',
            RuntimeWarning,
            stacklevel=2,
        )
