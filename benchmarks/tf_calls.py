"""TensorFlow's subjects, and TensorFlow's way of differentiating.

    tf:IMPL             attn_core.attention(impl=IMPL) in a tf.function of known shapes
    tf-unknown:IMPL     the same with batch and lengths unknown when it is traced
    tf-floor            the two products of every live tile of `chunked`, in a loop: no attention;
                        of a window's spans and of documents' runs, as many as a turn takes

A tape lives inside a tf.function, so a backward pass cannot be called by itself; "both" can. Calls
are concrete functions, which return when their results are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from attn_core import registry
from attn_core.benchmarks import calls, memory
from attn_core.benchmarks.calls import Attend, Call, Made, Refused, tiling
from attn_core.benchmarks.cases import Case


def ours(impl: str, *, unknown: bool = False) -> Made:
    """attn_core.attention with that implementation."""

    def made(case: Case) -> Attend:
        if unknown and case.mask == "documents":
            raise Refused("documents are given for a known length.")
        # Where lengths are not known, a mask that reads q must be told where queries stand.
        start = {"query_offset": "start"} if unknown and case.mask != "full" else {}
        return calls.ours("tf", impl, case, **start)

    return made


RUN = 128
"""Rows that see one run of keys."""
AT_ONCE = (2**22, 2)
"""Bytes that the logits of a turn of `chunked` may take, in spans and in runs, and how many turns
are under way.
"""


def floor(case: Case, direction: str) -> Call:
    """All live tiles, one after the other, at rows and keys that change; or turns of wide ones."""
    calls.forward_only("tf-floor", direction)
    t = tiling(case, "tf")
    heads = case.batch * case.heads
    arrays = case.arrays()
    if t.span:
        return _turns(arrays, heads, case, (t.rows, t.keys), AT_ONCE)
    run = (RUN, case.reach)
    if case.mask == "documents" and not (case.length % run[1] or run[1] % run[0]):
        return _turns(arrays, heads, case, run, AT_ONCE)

    def tiles(name: str, size: int) -> Any:
        x = tf.reshape(tf.constant(arrays[name]), (heads, case.length // size, size, case.width))
        return tf.transpose(x, (1, 0, 2, 3))

    given = [tiles("query", t.rows), tiles("key", t.keys), tiles("value", t.keys)]

    def products(q: Any, k: Any, v: Any) -> Any:
        def tile(n: Any, total: Any) -> tuple[Any, Any]:
            rows, keys, values = (tf.gather(x, n % x.shape[0]) for x in (q, k, v))
            return n + 1, total + tf.matmul(tf.matmul(rows, keys, transpose_b=True), values)

        start = (tf.constant(0), tf.zeros((heads, t.rows, case.width), q.dtype))
        return tf.while_loop(lambda n, total: n < t.live, tile, start, parallel_iterations=1)[1]

    return _looped(products, given)


def _turns(
    arrays: Any, heads: int, case: Case, tile: tuple[int, int], at_once: tuple[int, int]
) -> Call:
    """One tile to every `rows` queries, of all the keys that they see, side by side.

    Each turn is one product of a batch of them, whose logits have room in so many bytes.
    """
    (rows, keys), (room, together) = tile, at_once
    count = heads * (case.length // rows)
    fits = room // (rows * keys * 4)
    height = max(n for n in range(1, count + 1) if count % n == 0 and (n <= fits or n == 1))
    q, k, v = (
        tf.reshape(tf.constant(arrays[name]), (heads, case.length, case.width))
        for name in ("query", "key", "value")
    )

    def seen(x: Any) -> Any:
        if case.mask == "documents":
            each = tf.reshape(x, (-1, keys, case.width))
            return tf.repeat(each, keys // rows, 0)
        return tf.signal.frame(x, keys, rows, pad_end=True, axis=1)

    sizes = ((q, rows), (seen(k), keys), (seen(v), keys))
    given = [tf.reshape(x, (count // height, height, size, case.width)) for x, size in sizes]

    def products(q: Any, k: Any, v: Any) -> Any:
        def turn(n: Any, total: Any) -> tuple[Any, Any]:
            return n + 1, total + tf.matmul(tf.matmul(q[n], k[n], transpose_b=True), v[n])

        start = (tf.constant(0), tf.zeros(q.shape[1:], q.dtype))
        count = q.shape[0]
        return tf.while_loop(lambda n, total: n < count, turn, start, parallel_iterations=together)[
            1
        ]

    return _looped(products, given)


def _looped(products: Any, given: list[Any]) -> Call:
    function: Any = tf.function(products, autograph=False)
    concrete = function.get_concrete_function(*given)
    return Call(lambda: concrete(*given), lambda arrays: {})


FUNCTIONS: dict[str, Made] = {}


def prepared(name: str, attend: Attend, case: Case, direction: str) -> Call:
    """The function in that direction, on the case's arrays; traced here."""
    if direction == "backward":
        raise Refused("a tape gives no backward pass alone; ask for both.")
    backend = registry.load("tf")
    names = ("query", "key", "value", "cotangent")
    unknown = name.startswith("tf-unknown")
    dtype = {"float32": tf.float32, "bfloat16": tf.bfloat16}[case.dtype]

    def spec(name: str) -> Any:
        batch, heads, length, width = case.sizes(name)
        return tf.TensorSpec(
            (None, heads, None, width) if unknown else (batch, heads, length, width), dtype
        )

    def forward(q: Any, k: Any, v: Any, upstream: Any) -> tuple[Any, ...]:
        return (attend(q, k, v),)

    def both(q: Any, k: Any, v: Any, upstream: Any) -> tuple[Any, ...]:
        with tf.GradientTape() as tape:
            tape.watch((q, k, v))
            out = attend(q, k, v)
        return (out, *tape.gradient(out, (q, k, v), upstream))

    function: Any = tf.function(
        forward if direction == "forward" else both,
        autograph=False,
        input_signature=[spec(n) for n in names],
    )
    concrete = function.get_concrete_function()
    arrays = case.arrays()
    given = [backend.from_numpy(arrays[n]) for n in names]
    del arrays

    def answer(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = concrete(*[backend.from_numpy(arrays[n]) for n in names])
        keys = ("out",) if direction == "forward" else ("out", "query", "key", "value")
        return {n: backend.to_numpy(x) for n, x in zip(keys, found, strict=True)}

    def warm() -> Any:
        small = case.small()
        if unknown:
            arrays = small.arrays()
            return concrete(*[backend.from_numpy(arrays[n]) for n in names])
        return prepared(name, attend, small, direction).run()

    def run() -> Any:
        return concrete(*given)

    def planned() -> int:
        return memory.pooled(run, calls.results_bytes(case, direction), _in_use, _most_used)

    return Call(run, answer, planned, warm)


def _in_use() -> int:
    """Bytes of the pool that are in use; from here on the most is counted."""
    tf.config.experimental.reset_memory_stats("CPU:0")
    return int(tf.config.experimental.get_memory_info("CPU:0")["current"])


def _most_used() -> int:
    return int(tf.config.experimental.get_memory_info("CPU:0")["peak"])
