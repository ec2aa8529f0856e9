"""How turns are taken, and what they read and write: a while_loop and its TensorArrays.

Tracing takes its time by operations, and most calls of short lengths are one tile: where that is
known there is no loop and no array of tiles, but the one turn and the one tile, by the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

Array = Any


def static(shape: Sequence[Any]) -> tf.TensorShape:
    """What is known of a shape when the call is traced."""
    return tf.TensorShape([n if isinstance(n, int) else None for n in shape])


def alone(count: Any) -> bool:
    """Whether there is one tile, as is known when the call is traced."""
    return isinstance(count, int) and count == 1


class Single(NamedTuple):
    """One tile, with the words of a TensorArray."""

    tile: Array

    def write(self, _: Array, tile: Array) -> Single:
        return Single(tile)

    def read(self, _: Array) -> Array:
        return self.tile

    def stack(self) -> Array:
        return tf.stack([self.tile])


def fresh(count: Any, shape: Sequence[Any], dtype: Any) -> Any:
    """A TensorArray of tiles, each to be written before it is read."""
    if alone(count):
        return Single(None)
    return tf.TensorArray(dtype, count, element_shape=static(shape))


def blank(count: Any, shape: Sequence[Any], dtype: Any) -> Any:
    """A TensorArray of zeros, to be added to. They are one tile until something else is written."""
    zeros = tf.zeros(shape, dtype)
    if alone(count):
        return Single(zeros)
    empty = fresh(count, shape, dtype)
    return loop(0, count, lambda n, carry: (carry[0].write(n, zeros),), (empty,))[0]


SIDE_BY_SIDE = 2
"""Turns of spans and of runs under way: what one leaves to a single core, the next one fills up.

Measured, two of 4 MB of logits take 0.8 to 0.9 of the time of one of 8 MB; two of 8 MB are no
faster than two of 4 where there is a backward pass.
"""


def loop(
    start: Any, stop: Any, body: Any, carry: Sequence[Any], together: int = 1
) -> tuple[Any, ...]:
    """`carry = body(t, carry)` for t = start, ..., stop - 1.

    Args:
        together: how many turns may be under way. One, as a rule: each holds tiles of its own.
    """
    if isinstance(start, int) and isinstance(stop, int) and stop - start == 1:
        return tuple(body(start, tuple(carry)))

    def step(t: Array, *now: Any) -> tuple[Any, ...]:
        new = body(t, now)
        for x, before in zip(tf.nest.flatten(new), tf.nest.flatten(now), strict=True):
            if isinstance(x, tf.Tensor):
                x.set_shape(before.shape)
        return (t + 1, *new)

    found = tf.while_loop(
        lambda t, *_: t < stop,
        step,
        (tf.constant(start) if isinstance(start, int) else start, *carry),
        parallel_iterations=together,
    )
    return tuple(found[1:])
