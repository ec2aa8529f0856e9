"""`attn_core.explain` of tensors: what runs, what it takes, and in which numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from explain_cases import FLOAT32, WIDENED, as_of_zeros, counted, keys_of, near, ran
from support import seen

import attn_core
from attn_core import Dropout, explain, masks, registry

BACKEND = registry.load("tf")


@pytest.mark.parametrize(
    "more",
    [
        {"mask": masks.causal()},
        {"impl": "reference"},
        {"impl": "chunked", "dropout": Dropout(0.1, 1), "return_weights": True},
    ],
)
def test_what_is_said_to_answer_answers(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tf.ones((1, 2, 20, 4))
    given = {"query": x, "key": x, "value": x, **more}
    said = explain(**given)
    assert ran(BACKEND, monkeypatch, **given) == [said.impl]
    assert [c.name for c in said.candidates] == list(BACKEND.IMPLEMENTATIONS)
    monkeypatch.setattr(BACKEND, "attend", None)
    assert explain(**given) == said
    assert keys_of(said)["backend_from"] == "array"


def test_of_sizes_alone_it_says_the_same_and_makes_no_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_of_zeros("tf", monkeypatch)


def test_precision() -> None:
    x = tf.ones((1, 1, 4, 2))
    assert explain(x, x, x).effective == FLOAT32
    half = tf.cast(x, tf.bfloat16)
    assert explain(half, half, half, impl="chunked").effective == WIDENED


def test_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = BACKEND.describe
    monkeypatch.setattr(BACKEND, "describe", lambda x, name: facts(x, name)._replace(device="gpu"))
    x = tf.ones((1, 1, 4, 2))
    switch = "tf.config.experimental.tensor_float_32_execution_enabled() is True"
    assert explain(x, x, x).effective == f"{FLOAT32}; TF32 may be used: {switch}"
    said = explain(x, x, x, precision="highest")
    assert said.impl is None
    assert {c.verdict for c in said.candidates} == {"refused"}


def test_blocks_in_the_tiles_that_run() -> None:
    x = tf.zeros((2, 4, 700, 8))
    mask = masks.segments(tf.range(700) // 90) & masks.causal()
    lengths = tf.Variable([700, 100])
    dense = seen(masks.segments(np.arange(700) // 90) & masks.causal(), (2, 4, 700, 700)).copy()
    dense[1, ..., 100:] = False
    key = x[:, :2]
    counted(explain(x, key, key, mask=mask, kv_lengths=lengths, impl="chunked"), dense)


def test_unknown_sizes_are_known_when_it_runs() -> None:
    found = []

    @tf.function(input_signature=[tf.TensorSpec([None, 2, None, 8])])
    def traced(x: Any) -> Any:
        found.append(explain(x, x, x, mask=masks.causal(), query_offset=0))
        return x

    traced(tf.zeros((1, 2, 30, 8)))
    said = found[0]
    assert list(said.shape.values()) == [None, 2, 2, None, None, 8, 8]
    assert said.impl == BACKEND.IMPLEMENTATIONS[0]
    assert (said.tiles, said.blocks, said.forward, said.backward) == (None,) * 4
    assert str(said).count("known when it runs") == 3


def test_values_that_are_traced_are_known_when_it_runs() -> None:
    found = []

    @tf.function
    def traced(x: Any, lengths: Any) -> Any:
        found.append(explain(x, x, x, mask=masks.causal(), kv_lengths=lengths, impl="chunked"))
        found.append(explain(x, x, x, mask=masks.causal(), impl="chunked"))
        return x

    x = tf.zeros((1, 2, 600, 8))
    traced(x, tf.constant([600]))
    unknown, known = found
    assert unknown.blocks is None
    assert unknown.forward
    assert known == explain(x, x, x, mask=masks.causal(), impl="chunked")


# --- Bytes. ---------------------------------------------------------------------------------------

MEASURE = """
import tensorflow as tf
from attn_core import attention, explain, masks

def call(q, k, v, both):
    with tf.GradientTape() as tape:
        if both:
            tape.watch([q, k, v])
        out = attention(q, k, v, mask=masks.causal(), impl="chunked")
    return (out, *tape.gradient(out, [q, k, v])) if both else (out,)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def arrays(length):
    return [tf.random.normal((1, 4, length, 64)) for _ in range(3)]

for length in (600, 520):
    call(*arrays(length), True), call(*arrays(length), False)
given = arrays(2048)
said = explain(*given, mask=masks.causal(), impl="chunked")
for both, estimate in ((False, said.forward), (True, said.backward)):
    open("/proc/self/clear_refs", "w").write("5")  # forgets the highest
    before = status("VmRSS")
    results = call(*given, both)
    kept = sum(x.shape.num_elements() * x.dtype.size for x in results)
    print(estimate, status("VmHWM") - before - kept)
    del results
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_estimates_are_near_what_is_resident() -> None:
    # Whatever is freed goes back at once, so that what is resident is what is held.
    plain = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    plain |= {"TF_DISABLE_MKL": "1", "TF_ENABLE_ONEDNN_OPTS": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **plain},
    )
    for line in done.stdout.splitlines():
        estimate, measured = map(int, line.split())
        assert near(estimate, measured), line


PEAK = """
import numpy as np
import tensorflow as tf
from attn_core import attention, explain, masks

MASK = masks.segments(np.arange(2048) // 512)

def call(q, k, v):
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        out = attention(q, k, v, mask=MASK, impl="chunked")
    return out, tape.gradient(out, [q, k, v])

def forward(q, k, v):
    return attention(q, k, v, mask=MASK, impl="chunked")

for dtype in ("float32", "bfloat16"):
    given = [tf.cast(tf.random.normal((1, 4, 2048, 64)), dtype) for _ in range(3)]
    said = explain(*given, mask=MASK, impl="chunked")
    for function, estimate in ((forward, said.forward), (call, said.backward)):
        made = tf.function(function, autograph=False)
        made(*given)
        peaks = []
        for _ in range(8):
            before = tf.config.experimental.get_memory_info("CPU:0")["current"]
            tf.config.experimental.reset_memory_stats("CPU:0")
            results = made(*given)
            kept = sum(x.shape.num_elements() * x.dtype.size for x in tf.nest.flatten(results))
            peaks.append(tf.config.experimental.get_memory_info("CPU:0")["peak"] - before - kept)
            del results
        print(estimate, max(peaks), dtype)
"""


def test_estimates_of_documents_are_near_what_runs_take() -> None:
    # How many documents are worked at once is the threads' luck: one call may hold half of the
    # next one's. What a call may need is the most that several held.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4
    for line in done.stdout.splitlines():
        estimate, measured = map(int, line.split()[:2])
        assert near(estimate, measured), line


def test_chunked_is_linear_and_reference_quadratic() -> None:
    def bytes_of(length: int, impl: str) -> tuple[int, int]:
        found = []
        spec = tf.TensorSpec((1, 2, length, 16))
        tf.function(lambda x: found.append(explain(x, x, x, impl=impl))).get_concrete_function(spec)
        assert found[0].forward
        assert found[0].backward
        return found[0].forward, found[0].backward

    short, middle, long = (bytes_of(n, "chunked") for n in (8192, 16384, 32768))
    for a, b, c in zip(short, middle, long, strict=True):
        assert c - b == 2 * (b - a) > 0
    for one, two in zip(bytes_of(4096, "reference"), bytes_of(8192, "reference"), strict=True):
        assert two == 4 * one


def test_the_flag_is_told() -> None:
    x = np.zeros((1, 1, 4, 2), "float32")
    with attn_core.use(backend="tf", impl="reference"):
        said = explain(x, x, x)
    assert (said.backend, said.backend_from, said.impl) == ("tf", "use", "reference")
    assert (said.asked, said.asked_by) == ("reference", "use")
