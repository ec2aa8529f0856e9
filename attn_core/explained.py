"""What `attention` would do with these arguments, and why, without doing it.

    attn_core.explain(query, key, value, mask=attn_core.masks.causal())

tells the implementation that answers and who asked for it, the reasons of those that do not, the
blocks that the mask leaves alive, the memory that is taken beside arguments and results, and the
numbers in which products are taken. The words are the same in every framework: a backend only hands
over an `Account`, sizes and names, and sentences are made here and in `explain_text`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Never

from attn_core import api, config, explain_text, registry
from attn_core.explain_blocks import NOMINAL, Blocks, count
from attn_core.language.text import text
from attn_core.language.tree import Tree
from attn_core.language.values import Dropout, Mask, Score
from attn_core.registry import UnsupportedError
from attn_core.spec import Account, Operands, Problem
from attn_core.words import refuse_words


@dataclass(frozen=True)
class Candidate:
    """An implementation and what becomes of it.

    Attributes:
        name: of the implementation.
        verdict: "chosen", "would answer" or "refused".
        reasons: sentences, empty unless it is refused.
    """

    name: str
    verdict: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `attn_core.explain` found. Prints as text, in rich as a table; `as_dict()` is JSON.

    Attributes:
        backend: name of the backend that computes.
        backend_from: why that one: "array" (its framework's array came in), "use", "config",
            "environment", or "default" (NumPy arrays, and nobody has said anything).
        device: kind of device.
        dtype: of query, key and value as they are computed with (autocast has been applied).
        accumulation: dtype of logits, softmax and sums.
        layout: "BHTD" or "BTHD".
        shape: B, Hq, Hk, Tq, Tk, D and Dv; None where a size is known only when it runs.
        scale: the multiplier of the dot products.
        impl: the implementation that answers; None where none may.
        asked: the implementation that was asked for, or "auto".
        asked_by: "argument", "use", "config", "environment", or "auto" where nobody asked.
        candidates: every implementation of the backend, the best first.
        mask, score: as text of the language, None without.
        operands: the arrays that mask and score look up, as text: "mask int0: int32 (2, 7)".
        options: whatever else was given, as text.
        tiles: rows and keys of the implementation's tiles; None where it has none.
        together: so many of them, side by side in a row, are computed as one.
        turn: of so many batches and key heads at a time; None where nobody says.
        blocks: live blocks in tiles of that size, or in `explain_blocks.NOMINAL` ones where the
            implementation has none; None where they are known only when it runs.
        forward: estimated bytes of a forward pass beside arguments and results; None if unknown.
        backward: the same of a forward and a backward pass together, beside gradients too.
        precision: what was asked for: None, "highest" or "fast".
        effective: the numbers in which products are taken and sums are kept; None without impl.
    """

    backend: str
    backend_from: str
    device: str
    dtype: str
    accumulation: str
    layout: str
    shape: dict[str, int | None]
    scale: float
    impl: str | None
    asked: str
    asked_by: str
    candidates: tuple[Candidate, ...]
    mask: str | None
    score: str | None
    operands: tuple[str, ...]
    options: tuple[str, ...]
    tiles: tuple[int, int] | None
    together: int
    turn: tuple[int, int] | None
    blocks: Blocks | None
    forward: int | None
    backward: int | None
    precision: str | None
    effective: str | None

    def as_dict(self) -> dict[str, Any]:
        """The same in plain dicts, lists, strings and numbers."""
        found: dict[str, Any] = explain_text.plain(asdict(self))
        if self.blocks is not None:
            found["blocks"]["live_share"] = self.blocks.live_share
        return found

    def __str__(self) -> str:
        return explain_text.lines(self)

    def __rich__(self) -> Any:
        return explain_text.table(self)


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Mask | Any | None = None,
    bias: Any | None = None,
    score: Score | None = None,
    scale: float | None = None,
    sinks: Any | None = None,
    kv_lengths: Any | None = None,
    q_lengths: Any | None = None,
    query_offset: Any | None = None,
    dropout: Dropout | None = None,
    layout: str = "BHTD",
    precision: str | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    return_weights: bool = False,
    **foreign: Never,
) -> Report:
    """What `attn_core.attention` would do with the same arguments; nothing is computed.

    Arguments are those of `attention`, and may be traced: inside jax.jit or a tf.function the
    report is made while tracing, and says of what depends on values that it is known when it runs.
    The values of masks' operands, lengths and offsets are read, which waits for a device.

    Returns:
        A Report: `print` it, hand it to rich, or take `as_dict()`. Its `impl` is None where no
        implementation may answer, and `attention` would raise UnsupportedError.

    Raises:
        TypeError, ValueError, ImportError: as `attention`.

    Example::

        print(attn_core.explain(query, key, value, mask=attn_core.masks.causal()))
    """
    arguments = dict(locals())  # nothing else is local yet
    if arguments.pop("foreign"):
        refuse_words(explain, foreign)
    backend, p, x, impl = api.stated(arguments)
    asked, asked_by = impl, "argument"
    if config.check_impl(impl) == "auto":
        asked, asked_by = config.get("impl") or "auto", config.origin("impl") or "auto"
    try:
        chosen = registry.choose(backend, p, impl).impl
    except UnsupportedError:
        chosen = None
    account = None if chosen is None else backend.account(p, chosen)
    return Report(
        backend=p.backend,
        backend_from=(config.origin("backend") or "default") if p.host else "array",
        device=p.device,
        dtype=p.dtype,
        accumulation=p.accumulation,
        layout=p.layout,
        shape={
            "B": p.batch,
            "Hq": p.heads,
            "Hk": p.kv_heads,
            "Tq": p.q_len,
            "Tk": p.k_len,
            "D": p.width,
            "Dv": p.v_width,
        },
        scale=p.scale,
        impl=chosen,
        asked=asked,
        asked_by=asked_by,
        candidates=_candidates(backend, p, chosen, asked),
        mask=None if p.mask is None else text(p.mask),
        score=None if p.score is None else text(p.score),
        operands=(
            *_operands("mask", p.mask, p.mask_operands),
            *_operands("score", p.score, p.score_operands),
        ),
        options=_options(p, x),
        tiles=None if account is None else account.tiles,
        together=1 if account is None else account.together,
        turn=None if account is None else account.turn,
        blocks=count(backend, p, x, (account and account.tiles) or NOMINAL),
        forward=None if account is None else account.forward,
        backward=None if account is None else account.backward,
        precision=p.precision,
        effective=None if account is None else _effective(p, account),
    )


def _candidates(backend: Any, p: Problem, chosen: str | None, asked: str) -> tuple[Candidate, ...]:
    names = list(backend.ranked(p))
    if asked not in ("auto", *names):
        names.insert(0, asked)
    found = []
    for name in names:
        reasons = registry.refusals(backend, p, name, asked)
        verdict = "refused" if reasons else "chosen" if name == chosen else "would answer"
        found.append(Candidate(name, verdict, reasons))
    return tuple(found)


def _operands(
    what: str, tree: Tree | None, signature: tuple[tuple[str, tuple[int | None, ...]], ...]
) -> tuple[str, ...]:
    """The looked up arrays by the names that they have in the text."""
    kinds = {} if tree is None else {s.value: s.kind for s in tree.steps if s.op == "lookup"}
    return tuple(
        f"{what} {kinds[number]}{number}: {dtype} {explain_text.shape(sizes)}"
        for number, (dtype, sizes) in enumerate(signature)
        if number in kinds
    )


def _options(p: Problem, x: Operands) -> tuple[str, ...]:
    found = []
    if p.bias is not None:
        axes = ("B", "Hq", "Tq", "Tk")
        names = [name if spans else "1" for name, spans in zip(axes, p.bias, strict=True)]
        found.append(f"bias ({', '.join(names)}) {p.bias_dtype}")
    if p.sinks_dtype is not None:
        found.append(f"sinks {p.sinks_dtype}")
    found += [name for name in ("kv_lengths", "q_lengths") if getattr(p, name)]
    if p.offset == "end":
        found.append('query_offset "end"')
    elif p.offset == "given":
        known = isinstance(x.query_offset, tuple) and len(x.query_offset) == 1
        found.append(f"query_offset {x.query_offset[0]}" if known else "query_offset")
    if p.rate:
        found.append(f"dropout {p.rate:g}")
    found += [name for name in ("return_lse", "return_weights") if getattr(p, name)]
    return tuple(found)


def _effective(p: Problem, account: Account) -> str:
    said = f"{p.dtype} multiplied as {account.products}, summed in {p.accumulation}"
    if account.lowered is None:
        return said
    formats, switch = account.lowered
    return f"{said}; {formats} may be used: {switch}"
