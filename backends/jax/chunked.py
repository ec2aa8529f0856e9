"""Query tiles against live key tiles: linear memory, forward and backward, for every option.

The block map of the mask says which tiles are live; only they are computed, and only the partial
ones evaluate the mask. The backward pass rebuilds each tile from the statistics (m, log l) of its
rows. `jax.custom_vjp` binds the two; a second derivative, and forward mode, raise.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attn_core.backends.jax import chunked_backward, chunked_forward, chunked_spans, reference
from attn_core.backends.jax.arrays import is_wide, x64
from attn_core.backends.jax.chunked_parts import (
    cut_up,
    lay_out,
    line_of,
    over_parts,
    padded_bias,
    whole,
)
from attn_core.backends.jax.chunked_tile import Part, kept_back, numbers
from attn_core.backends.jax.cuts import Cuts
from attn_core.backends.jax.meshes import axes_of, spread
from attn_core.backends.jax.orders import once, reverse_only
from attn_core.backends.jax.partitions import by_devices
from attn_core.spec import AttentionOutput, Operands, Problem

Array = Any


def refusals(p: Problem) -> list[str]:
    unknown = [n for n, size in (("B", p.batch), ("Tq", p.q_len), ("Tk", p.k_len)) if size is None]
    if unknown:
        names = ", ".join(unknown)
        return [f"{names} must be known when the call is traced. Got a symbolic size."]
    return []


def attend(p: Problem, x: Operands) -> AttentionOutput:
    if 0 in (p.batch, p.q_len, p.k_len):
        return reference.attend(p, x)
    if x.bias is not None:
        x = x._replace(bias=x.bias.reshape((1,) * (4 - x.bias.ndim) + x.bias.shape))
    return _attend(p, reverse_only(spread(axes_of(x), x)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(p: Problem, x: Operands) -> AttentionOutput:
    def results(cuts: Cuts) -> Any:
        return None, cuts.results

    found: AttentionOutput = by_devices(_answer, p, x, None, results)
    return found


def _answer(p: Problem, x: Operands, _: None) -> AttentionOutput:
    lines = chunked_spans.lines_of(p)
    return _rows(p, x, None)[0] if lines is None else chunked_spans.attend(p, x, lines)


def _rows(p: Problem, x: Operands, _: None) -> tuple[AttentionOutput, Any]:
    """The answer, and of every row m, log l and whether it is alive, (B, Hq, Tq)."""
    cut = cut_up(p, x)
    g, schedule = cut.geometry, cut.schedule
    filled = x if x.bias is None else x._replace(bias=padded_bias(p, g, x.bias))

    def turn(part: Part, _: Any, at: Any, carry: None) -> tuple[None, chunked_forward.Rows]:
        return carry, chunked_forward.forward(p, filled, g, part, line_of(schedule, at))

    _, rows = over_parts(p, g, lay_out(p, x, g), (), turn, None)
    out, m, log_l, alive = (whole(p, a) for a in rows[:4])
    out = numbers(p, out)
    lse = jnp.where(log_l == jnp.inf, -jnp.inf, m * kept_back(p) + log_l) if p.return_lse else None
    weights = None
    if p.return_weights:
        weights = numbers(p, whole(p, rows.weights)[..., : p.k_len])
    laid = out if p.layout == "BHTD" else out.swapaxes(1, 2)
    return AttentionOutput(laid, lse, weights), (m, log_l, alive)


def _forward(p: Problem, x: Operands) -> tuple[AttentionOutput, Any]:
    def results(cuts: Cuts) -> Any:
        return None, (cuts.results, (cuts.rows,) * 3)

    # Of this JAX wants a derivative if it wants a second one, which there is not.
    found, rows = by_devices(_rows, p, once(x), None, results)
    return found, (x, found.out, *rows)


def _gradients(p: Problem, x: Operands, more: Any) -> Operands:
    return chunked_backward.backward(p, x, *more)


def _pull(p: Problem, saved: Any, cotangents: AttentionOutput) -> tuple[Operands]:
    def alongs(cuts: Cuts) -> Any:
        rows = (cuts.rows,) * 3
        upstream = AttentionOutput(
            *[None if x is None else a for x, a in zip(cotangents, cuts.results, strict=True)]
        )
        more = cuts.results.out, *rows, upstream
        return more, cuts.gradients

    # JAX calls this after `attend` has returned, with x64 as it is around the caller.
    with x64(any(is_wide(a) for a in jax.tree_util.tree_leaves((saved, cotangents)))):
        (x, *more), cotangents = once((saved, cotangents))
        return (by_devices(_gradients, p, x, (*more, cotangents), alongs),)


_attend.defvjp(_forward, _pull)
