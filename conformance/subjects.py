"""Subjects: what the suite judges. Ours, a peer's, or a function of your own.

A subject is a function of one framework's arrays. What it offers is read off its signature::

    from attn_core.conformance import subject

    @subject("torch")
    def mine(query, key, value, mask=None, scale=None):
        ...
        return out

`attn-core conformance run --subject package.module:mine` judges it: forward, and backward by the
framework's own differentiation. The parameters that are understood, beside query, key and value:

    mask          boolean (B, Hq, Tq, Tk), True = attend: mask and lengths, made dense
    bias          float, broadcasting to (B, Hq, Tq, Tk)
    scale         host number; always given when there
    causal        bool; q >= k is the whole mask (or, beside window, all the rest of it)
    window        (left, right) neighbours besides the position itself, None is unbounded
    query_offset  int array (B,): q = i + query_offset
    softcap       float c: c * tanh(s / c) before bias and mask
    slopes        float (Hq,): s - slopes[h] * |q - k|, ALiBi
    sinks         float (Hq,)
    kv_lengths    int array (B,)
    q_lengths     int array (B,)
    dropout       (rate, seed) of the spec's Philox mask
    layout        "BHTD" or "BTHD"

It returns out, or (out, lse, weights) with None for what it has not. A case that needs what is not
there is `not offered`, which is never a pass. Lengths fall back on `mask`, a layout on "BHTD".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from attn_core.config import BACKENDS, nearest
from attn_core.conformance.questions import Question
from attn_core.language.values import Mask, Score

OPTIONS = (
    *("mask", "bias", "scale", "causal", "window", "query_offset", "softcap", "slopes"),
    *("sinks", "kv_lengths", "q_lengths", "dropout", "layout"),
)
PARTIAL = {"native": ("return_lse", "return_weights"), "triton": ("return_weights",)}
"""Our implementations that call kernels, which cannot answer every problem, and what not each can
return: those are asked for the rest.
"""

_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Subject:
    """A function to judge, and what it says of itself.

    Attributes:
        name: for reports.
        framework: "numpy", "torch", "tf" or "jax": whose arrays it takes.
        function: called with keyword arguments.
        offers: the options it takes.
        dtypes: those it takes.
        grouped: whether Hk may be less than Hq.
        widths: whether Dv may differ from D.
        alone: words, such as causal, that it does not take beside a mask or bias.
        either: options of which it takes one at a time.
        backward: whether it can be differentiated; outputs alone are judged otherwise.
    """

    name: str
    framework: str
    function: Callable[..., Any]
    offers: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = _DTYPES
    grouped: bool = True
    widths: bool = True
    alone: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    backward: bool = True

    def put(self, asked: Question) -> tuple[dict[str, Any], str]:
        """The case's arguments in this subject's terms; and what is missing, if anything is."""
        judge, size = asked.judge, asked.size
        if asked.dtype not in self.dtypes:
            return {}, f"dtype {asked.dtype}"
        call = {name: asked.call[name] for name in ("query", "key", "value")}
        if asked.layout == "BTHD":
            if "layout" not in self.offers:
                return {}, "layout BTHD"
            call["layout"] = "BTHD"
        if "scale" in self.offers:
            call["scale"] = float(judge.get("scale", size.width**-0.5))
        elif "scale" in judge:
            return {}, "scale"
        for name in ("bias", "sinks", "dropout"):
            if name in judge:
                if name not in self.offers:
                    return {}, name
                call[name] = judge[name]
        missing = self._score(asked, call) or self._mask(asked, call)
        both = [name for name in self.either if name in call]
        if not missing and len(both) > 1:
            missing = " beside ".join(both)
        return call, missing

    def _score(self, asked: Question, call: dict[str, Any]) -> str:
        if "score" not in asked.judge:
            return ""
        for name in ("softcap", "slopes"):
            if name in asked.meaning and name in self.offers:
                call[name] = asked.meaning[name]
                return ""
        return "score"

    def _mask(self, asked: Question, call: dict[str, Any]) -> str:
        """Structure where the subject has words for it, and one dense mask for all the rest."""
        judge, size = asked.judge, asked.size
        dense = judge.get("mask")
        folded = [n for n in ("kv_lengths", "q_lengths") if n in judge and n not in self.offers]
        words: dict[str, Any] = {
            name: asked.meaning[name] for name in ("causal", "window") if name in asked.meaning
        }
        beside = folded or "bias" in call
        if words and set(words) <= self.offers and not (beside and set(words) & {*self.alone}):
            call |= words
            dense = None
        offset = np.broadcast_to(np.asarray(judge.get("query_offset", 0)), (size.batch,))
        if "query_offset" in self.offers:
            call["query_offset"] = offset.astype(np.int32)
        positions = {
            "kv_lengths": np.arange(size.k_len),
            "q_lengths": np.arange(size.q_len)[:, None],
        }
        for name, at in positions.items():
            if name not in judge:
                continue
            lengths = np.broadcast_to(np.asarray(judge[name]), (size.batch,))
            if name in self.offers:
                call[name] = lengths.astype(np.int32)
            elif name == "q_lengths" and "sinks" in judge:
                return name  # an empty row has its sink for lse, a padded one has not
            else:
                inside = at < lengths[:, None, None, None]
                dense = inside if dense is None else dense & inside
        if dense is not None:
            if "mask" not in self.offers:
                return "mask"
            full = (size.batch, size.heads, size.q_len, size.k_len)
            call["mask"] = np.array(np.broadcast_to(dense, full))
        return ""


@dataclass(frozen=True)
class Ours(Subject):
    """One of our backends: it is asked in its own words, and offers everything.

    But for those implementations that call a kernel: they may refuse, and are not asked for the
    weights, which a kernel never has.
    """

    options: dict[str, Any] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """Whether it may refuse a problem: kernels cannot answer every one."""
        return self.options.get("impl") in PARTIAL

    def put(self, asked: Question) -> tuple[dict[str, Any], str]:
        call = {**asked.call, **self.options}
        lacks = PARTIAL.get(str(self.options.get("impl")), ())
        return {n: x for n, x in call.items() if n not in lacks}, ""


def subject(
    framework: str,
    *,
    name: str | None = None,
    dtypes: tuple[str, ...] = _DTYPES,
    grouped: bool = True,
    widths: bool = True,
    alone: tuple[str, ...] = (),
    either: tuple[str, ...] = (),
    backward: bool = True,
) -> Callable[[Callable[..., Any]], Subject]:
    """Make a function a subject; see the head of this file for the parameters it may have.

    Args:
        framework: "numpy", "torch", "tf" or "jax": whose arrays the function takes.
        name: for reports; the function's own when left out.
        dtypes: the dtypes it takes.
        grouped: whether it takes fewer key heads than query heads.
        widths: whether values may be of another width than keys.
        alone: words, such as "causal", that it does not take beside a mask or bias; beside one,
            they become part of the mask.
        either: options of which it takes one at a time, such as ("softcap", "sinks"); a case that
            needs two of them is not offered.
        backward: whether it can be differentiated; outputs alone are judged otherwise.

    Raises:
        TypeError: the function lacks query, key or value, has a parameter that is no option, or
            takes one by place alone.
        ValueError: an unknown framework.
    """
    if framework not in BACKENDS:
        raise ValueError(
            f"`framework` must be one of {', '.join(BACKENDS)}. Got {framework!r}."
            f"{nearest(framework, BACKENDS)}"
        )

    def made(function: Callable[..., Any]) -> Subject:
        parameters = list(inspect.signature(function).parameters.values())
        named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        fixed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if fixed:
            raise TypeError(
                f"the parameters of a subject must be taken by name. Got {fixed}, positional only."
            )
        for wanted in ("query", "key", "value"):
            if wanted not in named:
                raise TypeError(
                    f"a subject must have the parameters query, key and value. Got {named}."
                )
        for given in named[3:]:
            if given not in OPTIONS:
                raise TypeError(
                    f"the parameters of a subject must be among {', '.join(OPTIONS)}. "
                    f"Got {given!r}.{nearest(given, OPTIONS)}"
                )
        return Subject(
            name=name or function.__name__,
            framework=framework,
            function=function,
            offers=frozenset(named[3:]),
            dtypes=dtypes,
            grouped=grouped,
            widths=widths,
            alone=alone,
            either=either,
            backward=backward,
        )

    return made


def find(spec: str) -> Subject:
    """The subject of that name: a backend ("jax", or "jax:reference" for one implementation), a
    shipped peer ("torch-sdpa"), or "package.module:function".

    Raises:
        ValueError: nothing is called that.
        ImportError: its module cannot be imported.
        TypeError: it is no subject.
    """
    head, _, tail = spec.partition(":")
    if head in BACKENDS:
        from attn_core.api import attention

        options = {"impl": tail} if tail else {}
        # A framework's own kernel wants values as wide as keys.
        return Ours(spec, head, attention, widths=tail != "native", options=options)
    if not tail:
        from attn_core.conformance.peers import PEERS

        if spec in PEERS:
            return PEERS[spec]()
        known = (*BACKENDS, *PEERS)
        raise ValueError(
            f"a subject must be one of {', '.join(known)}, or package.module:function. "
            f"Got {spec!r}.{nearest(spec, known)}"
        )
    module = import_module(head)
    if not hasattr(module, tail):
        known = tuple(n for n, x in vars(module).items() if isinstance(x, Subject))
        raise ValueError(f"{head} must have a subject {tail!r}. Got none.{nearest(tail, known)}")
    found = getattr(module, tail)
    if not isinstance(found, Subject):
        raise TypeError(
            f"{spec!r} must be a function under @attn_core.conformance.subject(framework). "
            f"Got {type(found).__name__}."
        )
    return found


def arrays(backend: Any, call: dict[str, Any], traced: bool) -> dict[str, Any]:
    """A call's NumPy arrays, masks and scores in the backend's arrays.

    Lengths and offsets stay host values in eager calls and are traced in compiled ones.
    """
    return {name: _into(backend, name, x, traced) for name, x in call.items()}


def _into(backend: Any, name: str, x: Any, traced: bool) -> Any:
    if isinstance(x, (Mask, Score)):
        held = [backend.from_numpy(a) if isinstance(a, np.ndarray) else a for a in x.arrays]
        return type(x)(x.tree, tuple(held))
    if name in ("kv_lengths", "q_lengths", "query_offset") and not isinstance(x, str):
        return backend.from_numpy(np.asarray(x, np.int32)) if traced else x
    return backend.from_numpy(x) if isinstance(x, np.ndarray) else x
