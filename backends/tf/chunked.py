"""Query tiles against live key tiles: linear memory, forward and backward, for every option.

The block map of the mask says which tiles are live; only they are computed, and only the partial
ones evaluate the mask. The backward pass computes each tile again from the statistics (m, l) of its
rows. The loops are `tf.while_loop`s, bound by `tf.custom_gradient`; a derivative of the gradients,
and forward mode, raise.

In eager mode they run as `tf.function`s, one for each kind of problem: a second length of an axis
leaves that axis unknown, so that further ones trace nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import tensorflow as tf

from attn_core.backends.tf import (
    chunked_backward,
    chunked_forward,
    chunked_narrow,
    chunked_runs,
    chunked_spans,
    reference,
)
from attn_core.backends.tf.arrays import sizes
from attn_core.backends.tf.chunked_forward import Rows
from attn_core.backends.tf.chunked_grid import geometry, plan
from attn_core.backends.tf.chunked_parts import lay_out
from attn_core.registry import UnsupportedError
from attn_core.spec import AttentionOutput, Operands, Problem

Array = Any

_FIRST_ONLY = (
    'derivatives of derivatives, and forward mode, need impl="reference". Got impl="chunked", '
    "which has first derivatives only, by a tape."
)


def attend(p: Problem, x: Operands) -> AttentionOutput:
    if 0 in (p.batch, p.q_len, p.k_len):
        return reference.attend(p, x)
    if p.v_width == 0:
        # TensorFlow scatters nothing into rows of width 0. lse and weights are those of any value.
        value = tf.pad(x.value, ((0, 0), (0, 0), (0, 0), (0, 1)))
        wider = attend(replace(p, v_width=1), x._replace(value=value))
        return wider._replace(out=wider.out[..., :0])
    if isinstance(x.seed, tuple):
        x = x._replace(seed=tf.constant(x.seed, tf.uint64))
    if x.bias is not None and x.bias.shape.rank == 2:
        x = x._replace(bias=x.bias[None, None])
    for name in ("kv_lengths", "q_lengths", "query_offset"):
        given = getattr(x, name)
        if given is not None and given.shape.rank == 0:
            x = x._replace(**{name: given[None]})
    x = _agreed(p, x)
    leaves = tf.nest.flatten(x)
    present = [i for i, leaf in enumerate(leaves) if leaf is not None]

    def operands(flat: Sequence[Array]) -> Operands:
        filled = list(leaves)
        for i, tensor in zip(present, flat, strict=True):
            filled[i] = tensor
        packed: Operands = tf.nest.pack_sequence_as(x, filled)
        return packed

    names = ["out"] + ["lse"] * p.return_lse + ["weights"] * p.return_weights

    @tf.custom_gradient
    def run(*flat: Array) -> tuple[list[Array], Callable[..., list[Array | None]]]:
        # What is computed in here is hidden from tapes, which would keep every tile of it.
        hidden = operands([_hidden(a) for a in flat])
        rows = _compiled(_kind(p))[0](hidden) if tf.executing_eagerly() else _forward(p, hidden)
        # The logarithm of 0 is what a row without a sum has.
        lse = rows.m + tf.math.log(rows.total) if p.return_lse else None
        results = {"out": rows.out, "lse": lse, "weights": rows.weights}
        # Of these TensorFlow asks derivatives where two tapes are around a tf.function.
        saved = Rows(*[None if r is None else tf.stop_gradient(r) for r in rows])
        saved = saved._replace(weights=None)

        def pull(*cotangents: Array) -> list[Array | None]:
            return _gradients(p, operands, flat, saved, dict(zip(names, cotangents, strict=True)))

        return [_underivable(results[name]) for name in names], pull

    found = dict(zip(names, run(*[leaves[i] for i in present]), strict=True))
    return AttentionOutput(found["out"], found.get("lse"), found.get("weights"))


def _gradients(
    p: Problem,
    operands: Callable[[Sequence[Array]], Operands],
    flat: Sequence[Array],
    saved: Rows,
    cotangents: dict[str, Array],
) -> list[Array | None]:
    """Gradients of the operands, themselves without a derivative."""
    moving = [i for i, a in enumerate(flat) if a.dtype.is_floating]
    names = list(cotangents)

    @tf.custom_gradient
    def run(*given: Array) -> tuple[list[Array], Callable[..., Any]]:
        hidden = [_hidden(a) for a in given]
        x = operands(hidden[: len(flat)])
        pulled = dict(zip(names, hidden[len(flat) :], strict=True))
        asked = (pulled["out"], pulled.get("lse"), pulled.get("weights"))
        backward = _compiled(_kind(p))[1] if tf.executing_eagerly() else partial(_backward, p)
        found = backward(x, saved, asked)
        leaves = [_underivable(a) for a in tf.nest.flatten(found) if a is not None]

        def refuse(*_: Array) -> Any:
            raise UnsupportedError(_FIRST_ONLY)

        return leaves, refuse

    found = dict(zip(moving, run(*flat, *cotangents.values()), strict=True))
    return [found.get(i) for i in range(len(flat))]


def _hidden(x: Array) -> Array:
    """x, through which no tape follows: it would keep every tile."""
    # A tape that is itself in the graph passes by what nothing moves. Within tf.vectorized_map it
    # is to come as far as `_underivable`; elsewhere, two of them would differentiate the loops.
    mapped = not tf.executing_eagerly() and "loop_body" in tf.get_current_name_scope().split("/")
    return _underivable(x) if mapped else tf.stop_gradient(x)


def _underivable(x: Array) -> Array:
    """x, whose derivative is the one that `tf.custom_gradient` was given, or raises.

    tf.vectorized_map, and tape.jacobian, which is made of it, copy the operations of a graph and
    lose what `tf.custom_gradient` has said of them. A tape around these is to raise here, where it
    would else be told that nothing moves the result, and find gradients of 0.
    """
    if tf.executing_eagerly() or not x.dtype.is_floating:
        return tf.stop_gradient(x)
    try:
        return tf.raw_ops.PreventGradient(
            input=x,
            message="gradients of tf.vectorized_map and of tape.jacobian, by a tape around them, "
            'need impl="reference". Got impl="chunked", whose tape must be within.',
        )
    except LookupError as error:  # a ForwardAccumulator in the graph, which asks at once
        raise UnsupportedError(_FIRST_ONLY) from error


def _forward(p: Problem, x: Operands) -> Rows:
    narrow = chunked_narrow.spans(p)
    if narrow is not None:
        return chunked_spans.forward(p, x, narrow)
    mask = chunked_runs.possible(p)
    if mask is None:
        return _forward_of_grid(p, x)

    def grid() -> list[Array]:
        return list(_forward_of_grid(p, x)[:4])

    def runs(found: chunked_runs.Runs) -> list[Array]:
        return list(chunked_runs.forward(p, x, found)[:4])

    return Rows(*chunked_runs.either(p, mask, x, runs, grid))


def _forward_of_grid(p: Problem, x: Operands) -> Rows:
    g = geometry(p, x)
    inputs = lay_out(p, x, g)
    axis = 2 if p.layout == "BHTD" else 1
    size = (sizes(x.query)[0], sizes(x.query)[axis], sizes(x.key)[axis])
    return chunked_forward.forward(p, inputs, g, plan(p, inputs, g, x), x.sinks, size)


def _backward(p: Problem, x: Operands, rows: Rows, cotangents: Any) -> Operands:
    narrow = chunked_narrow.spans(p)
    if narrow is not None:
        return chunked_spans.backward(p, x, narrow, rows, cotangents)
    mask = chunked_runs.possible(p)
    if mask is None:
        return _backward_of_grid(p, x, rows, cotangents)

    def grid(m: Array, total: Array) -> list[Array]:
        kept = rows._replace(m=m, total=total)
        return list(_backward_of_grid(p, x, kept, cotangents)[:3])

    def runs(found: chunked_runs.Runs) -> list[Array]:
        return list(chunked_runs.backward(p, x, found, rows, cotangents)[:3])

    def elsewhere() -> list[Array]:
        """m and total, which a forward pass in runs, on another device, has left at 0."""
        kept = [rows.m, rows.total]
        if p.return_lse:
            return kept
        lost = tf.reduce_any(rows.alive & tf.equal(rows.total, 0))
        again: list[Array] = tf.cond(lost, lambda: list(_forward_of_grid(p, x)[1:3]), lambda: kept)
        return again

    given = [rows.m, rows.total]
    return Operands(*chunked_runs.either(p, mask, x, runs, grid, given, elsewhere))


def _backward_of_grid(p: Problem, x: Operands, rows: Rows, cotangents: Any) -> Operands:
    found = chunked_backward.backward(p, x, geometry(p, x), rows, cotangents)
    # Every float has a gradient: zeros for one that the score does not move by.
    score = tuple(
        tf.zeros_like(a) if d is None and a.dtype.is_floating else d
        for a, d in zip(x.score, found.score, strict=True)
    )
    return found._replace(score=score)


def _kind(p: Problem) -> Problem:
    """The problem without its sizes, which a tf.function reads off its arguments."""
    return replace(
        p, host=False, batch=None, q_len=None, k_len=None, mask_operands=(), score_operands=()
    )


@lru_cache(maxsize=128)
def _compiled(kind: Problem) -> tuple[Callable[..., Rows], Callable[..., Operands]]:
    """Forward and backward as functions of eager tensors."""

    def sized(x: Operands) -> Problem:
        axis = 2 if kind.layout == "BHTD" else 1
        batch = next((a.shape[0] for a in x[:3] if a.shape[0] is not None), None)
        k_len = x.key.shape[axis]
        if k_len is None:
            k_len = x.value.shape[axis]
        return replace(kind, batch=batch, q_len=x.query.shape[axis], k_len=k_len)

    def forward(x: Operands) -> Rows:
        return _forward(sized(x), x)

    def backward(x: Operands, rows: Rows, cotangents: Any) -> Operands:
        return _backward(sized(x), x, rows, cotangents)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        traced = tf.function(function, autograph=False, reduce_retracing=True)
        # Called by itself, a concrete function is not suspected of being retraced in a loop, which
        # TensorFlow counts over all problems together.
        return lambda *given: traced.get_concrete_function(*given)(*given)

    return compiled(forward), compiled(backward)


def _agreed(p: Problem, x: Operands) -> Operands:
    """What `check` could not hold against unknown sizes; tiles are filled up, and would hide it.

    The arrays are read after these checks: a graph runs what does not wait for them first, and an
    error about a slice says nothing.
    """
    axis = 2 if p.layout == "BHTD" else 1
    batch, q_len = sizes(x.query)[0], sizes(x.query)[axis]
    k_len = sizes(x.key)[axis]
    full = (batch, p.heads, q_len, k_len)
    reference.fit(p.mask, x.mask, full)
    reference.fit(p.score, x.score, full)
    wanted: list[tuple[str, Any, Any, bool]] = [
        ("key's B", sizes(x.key)[0], batch, False),
        ("value's B", sizes(x.value)[0], batch, False),
        ("value's Tk", sizes(x.value)[axis], k_len, False),
    ]
    if x.bias is not None:
        axes = zip(("B", "Hq", "Tq", "Tk"), sizes(x.bias), full, strict=True)
        wanted += [(f"bias's {name}", size, most, True) for name, size, most in axes]
    checks = []
    for name, size, most, one in wanted:
        if isinstance(size, int) and (isinstance(most, int) or (one and size == 1)):
            continue
        fits = tf.equal(size, most) | (tf.equal(size, 1) if one else False)
        checks.append(tf.debugging.Assert(fits, [f"{name} must fit", size, most]))
    checks = [check for check in checks if check is not None]
    if not checks:
        return x
    with tf.control_dependencies(checks):
        return x._replace(
            key=tf.identity(x.key),
            value=tf.identity(x.value),
            bias=None if x.bias is None else tf.identity(x.bias),
        )
