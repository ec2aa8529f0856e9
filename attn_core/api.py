"""The public call: what a user reads, and the one way down.

backend  = registry.find(query)            the array's type decides; the flag for NumPy arrays
problem, operands = check.resolve(...)     raises here or never
plan     = registry.choose(backend, problem, impl)
backend.attend(plan, operands)
"""

from __future__ import annotations

from typing import Any, Literal, Never, TypedDict, TypeVar, Unpack, overload

from attn_core import check, registry
from attn_core.chosen import chosen, narrowed
from attn_core.language.values import Dropout, Mask, Score
from attn_core.spec import AttentionOutput, Operands, Problem
from attn_core.words import refuse_words

Array = TypeVar("Array")


class Options(TypedDict, total=False):
    """What `attention` takes by name besides what it returns, for type checkers."""

    mask: Mask | Any | None
    bias: Any | None
    score: Score | None
    scale: float | None
    sinks: Any | None
    kv_lengths: Any | None
    q_lengths: Any | None
    query_offset: Any | None
    dropout: Dropout | None
    layout: str
    precision: str | None
    impl: str


@overload
def attention(
    query: Array,
    key: Any,
    value: Any,
    *,
    return_lse: Literal[False] = False,
    return_weights: Literal[False] = False,
    **options: Unpack[Options],
) -> Array: ...
@overload
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    return_lse: Literal[True],
    return_weights: bool = False,
    **options: Unpack[Options],
) -> AttentionOutput: ...
@overload
def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    return_lse: bool = False,
    return_weights: Literal[True],
    **options: Unpack[Options],
) -> AttentionOutput: ...
@overload
def attention(
    query: Array,
    key: Any,
    value: Any,
    *,
    return_lse: bool = False,
    return_weights: bool = False,
    **options: Unpack[Options],
) -> Any: ...
def attention(
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
) -> Any:
    """Attention over arrays laid out (B, H, T, D); `layout="BTHD"` for (B, T, H, D).

        out = softmax(scale * Q K^T, then score, bias and mask) V

    Axes: B batch, Hq query heads, Hk key/value heads (query head h reads key head h // (Hq / Hk)),
    Tq queries, Tk keys, D query and key width, Dv value width. Query i stands at the absolute
    position q = i + query_offset.

    Args:
        query: (B, Hq, Tq, D), of torch, TensorFlow, JAX or NumPy. float64, float32, bfloat16 or
            float16; key and value have the same dtype. Accumulation is at least float32.
        key: (B, Hk, Tk, D).
        value: (B, Hk, Tk, Dv).
        mask: which keys a query may see, True = attend: a Mask (`attn_core.masks`,
            `attn_core.mask(fn)`) or a boolean array (Tq, Tk) or broadcasting to (B, Hq, Tq, Tk).
        bias: float array added to the score, (Tq, Tk) or broadcasting to (B, Hq, Tq, Tk); -inf
            hides a key, anything finite is data. Receives its gradient.
        score: a Score (`attn_core.scores`, `attn_core.score(fn)`) applied to the scaled product,
            before bias and mask.
        scale: host number; 1 / sqrt(D) when left out.
        sinks: float array (Hq,), a logit for each head that joins the softmax's denominator and
            has no value. -inf is no sink.
        kv_lengths: int or int array (B,): keys from there on are padding. Host values outside
            [0, Tk] raise, traced ones are clamped.
        q_lengths: int or int array (B,): queries from there on are padding; their out is 0,
            their lse -inf, and no gradient leaves them.
        query_offset: int, int array (B,), "start" (0) or "end" ((kv_lengths or Tk) - (q_lengths
            or Tq)). Needed where Tq and Tk differ, or are unknown, and mask or score reads q.
        dropout: Dropout(rate, seed), on the softmax weights; the same mask in every framework.
        layout: "BHTD" or "BTHD", of query, key, value and out. Mask, bias, lse and weights are
            (B, Hq, Tq, ...) in both.
        precision: None (the strictest that can be had for each operation), "highest" (float32 is
            float32, or a refusal) or "fast" (TF32 and the like are allowed).
        impl: the name of an implementation, which then answers or raises; or "auto", which leaves
            it to the flag (`attn_core.use`, config, ATTN_CORE_IMPL) and, where that is silent too,
            to the first that accepts.
        return_lse: also return the log of the softmax's denominator.
        return_weights: also return the softmax weights, before dropout.

    Returns:
        out, (B, Hq, Tq, Dv) in query's layout and dtype; or, when an extra is asked for,
        AttentionOutput(out, lse, weights). A row that may see no key gives out 0, weights 0 and
        lse = its sink, or -inf.

    Raises:
        TypeError, ValueError: an argument is not of its form; nothing has been computed.
        UnsupportedError: no implementation may answer, with every reason.
        ImportError: the backend that the flag names is missing or broken.

    Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762; grouped heads, Ainslie
    et al., arXiv 2305.13245; sinks, Xiao et al., arXiv 2309.17453.

    Example::

        out = attn_core.attention(query, key, value, mask=attn_core.masks.causal())
    """
    if foreign:
        refuse_words(attention, foreign)
    backend, host = registry.find(query)
    problem, operands = check.resolve(
        backend,
        host,
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        score=score,
        scale=scale,
        sinks=sinks,
        kv_lengths=kv_lengths,
        q_lengths=q_lengths,
        query_offset=query_offset,
        dropout=dropout,
        layout=layout,
        precision=precision,
        return_lse=return_lse,
        return_weights=return_weights,
    )
    plan = registry.choose(backend, problem, impl)
    output: AttentionOutput = backend.attend(plan, operands)
    return output if return_lse or return_weights else output.out


def weights(
    query: Array,
    key: Any,
    *,
    heads: Any | None = None,
    queries: Any | None = None,
    mask: Mask | Any | None = None,
    bias: Any | None = None,
    score: Score | None = None,
    scale: float | None = None,
    sinks: Any | None = None,
    kv_lengths: Any | None = None,
    q_lengths: Any | None = None,
    query_offset: Any | None = None,
    layout: str = "BHTD",
    precision: str | None = None,
    impl: str = "auto",
    **foreign: Never,
) -> Array:
    """Softmax weights of chosen heads and query rows: what they attend to.

        weights[b, n, i, k] = softmax over k of row queries[i] of head heads[n]

    They are what `attention(..., return_weights=True)` gives there, at O(chosen * Tk) time and
    memory, since a row's softmax depends on no other row. Differentiable.

    Args:
        query, key: (B, Hq, Tq, D) and (B, Hk, Tk, D), in `layout`.
        heads: an int or host ints, the query heads; all when left out.
        queries: an int or host ints, rows of the query array (not absolute positions); all when
            left out, and the result is then as large as all weights are.
        The others are those of `attention`.

    Returns:
        (B, len(heads), len(queries), Tk), dtype of query, in every layout. Rows that may see no
        key, and padded rows, are 0.

    Raises:
        TypeError, ValueError: an argument is not of its form, or a head or row is not there.
        UnsupportedError, ImportError: as in `attention`.

    Example::

        attn_core.weights(query, key, mask=attn_core.masks.causal(), heads=[0, 3], queries=[7])
    """
    if foreign:
        refuse_words(weights, foreign)
    backend, host = registry.find(query)
    problem, operands = check.resolve(
        backend,
        host,
        query,
        key,
        key,
        mask=mask,
        bias=bias,
        score=score,
        scale=scale,
        sinks=sinks,
        kv_lengths=kv_lengths,
        q_lengths=q_lengths,
        query_offset=query_offset,
        dropout=None,
        layout=layout,
        precision=precision,
        return_lse=False,
        return_weights=True,
    )
    picked = chosen("heads", heads, problem.heads, "Hq")
    rows = chosen("queries", queries, problem.q_len, "Tq")
    take = registry.load("numpy").take if host else backend.take
    found: Any = attention(**narrowed(problem, operands, picked, rows, take), impl=impl)
    taken: Array = found.weights
    return taken


def resolve(arguments: dict[str, Any]) -> tuple[Any, Any, Operands]:
    """Backend, plan and operands of a call to `attention`, for backends' own `vjp`."""
    backend, problem, operands, impl = stated(arguments)
    return backend, registry.choose(backend, problem, impl), operands


def stated(arguments: dict[str, Any]) -> tuple[Any, Problem, Operands, str]:
    """Backend, problem, operands and `impl` of a call to `attention`; nothing is chosen yet."""
    options = {**_DEFAULTS, **arguments}
    impl = options.pop("impl")
    backend, host = registry.find(options["query"])
    problem, operands = check.resolve(backend, host, **options)
    return backend, problem, operands, impl


_DEFAULTS: dict[str, Any] = dict(attention.__kwdefaults__ or {})
