"""`attn_core.explain` of JAX arrays: what runs, what it takes, and in which numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from explain_cases import FLOAT32, as_of_zeros, counted, keys_of, near, ran
from support import seen

import attn_core
from attn_core import Dropout, attention, explain, masks, registry, scores
from attn_core.backends.jax import chunked_tile

BACKEND = registry.load("jax")


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
    x = jnp.ones((1, 2, 20, 4))
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
    as_of_zeros("jax", monkeypatch)


def test_precision() -> None:
    x = jnp.ones((1, 1, 4, 2))
    assert explain(x, x, x).effective == FLOAT32
    assert explain(x, x, x, precision="fast").effective == (
        f'{FLOAT32}; TF32 or bfloat16 may be used: precision is "fast"'
    )
    half = x.astype(jnp.bfloat16)
    narrow = "bfloat16 multiplied as bfloat16, summed in float32"
    assert explain(half, half, half, impl="chunked").effective == narrow


def test_blocks_in_the_tiles_that_run() -> None:
    x = jnp.zeros((2, 4, 700, 8))
    mask = masks.segments(jnp.arange(700) // 90) & masks.causal()
    given = {"mask": mask, "kv_lengths": jnp.array([700, 100]), "impl": "chunked"}
    dense = seen(masks.segments(np.arange(700) // 90) & masks.causal(), (2, 4, 700, 700)).copy()
    dense[1, ..., 100:] = False
    counted(explain(x, x[:, :2], x[:, :2], **given), dense)


@pytest.mark.parametrize(
    ("more", "turn"),
    [
        ({"length": 1024}, (1, 1)),
        ({"length": 1024, "mask": masks.causal()}, (2, 4)),
        ({"length": 2048, "mask": masks.causal() & masks.window(left=511)}, (2, 4)),
        ({"length": 600, "mask": masks.causal(), "batch": 16}, (1, 4)),
        ({"length": 600, "mask": masks.causal(), "heads": 256}, (1, 1)),
        ({"length": 600, "kv_lengths": jnp.array([5, 600])}, (1, 4)),
        ({"length": 600, "mask": masks.causal(), "impl": "reference"}, None),
    ],
)
def test_so_many_batches_and_heads_are_computed_at_once(
    more: dict[str, Any], turn: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"impl": "chunked", **more}
    shape = (given.pop("batch", 2), given.pop("heads", 4), given.pop("length"), 8)
    found, logits = [], chunked_tile.logits

    def spy(
        p: Any, x: Any, g: Any, part: Any, at: Any, q: Any, k: Any, *rest: Any, **left: Any
    ) -> Any:
        found.append(k.shape[:2])
        return logits(p, x, g, part, at, q, k, *rest, **left)

    monkeypatch.setattr(chunked_tile, "logits", spy)
    x = jnp.zeros(shape)
    said = explain(x, x, x, **given)
    jax.eval_shape(lambda x: attention(x, x, x, **given), x)
    assert said.turn == turn
    assert set(found) == ({turn} if turn else set())
    if turn:
        assert f"{turn[1]} key head" in str(said)


def test_while_tracing_values_are_known_when_it_runs() -> None:
    found = []

    @jax.jit
    def traced(x: Any, lengths: Any) -> Any:
        found.append(explain(x, x, x, mask=masks.causal(), kv_lengths=lengths, impl="chunked"))
        found.append(explain(x, x, x, mask=masks.causal(), impl="chunked"))
        return x

    x = jnp.zeros((1, 2, 600, 8))
    traced(x, jnp.array([600]))
    unknown, known = found
    assert unknown.blocks is None
    assert "known when it runs" in str(unknown)
    assert unknown.forward
    outside = explain(x, x, x, mask=masks.causal(), impl="chunked")
    assert known == outside


def test_symbolic_sizes_are_known_when_it_runs() -> None:
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((1, 2, rows, 8), jnp.float32)
    found = []

    def traced(x: Any) -> Any:
        found.append(explain(x, x, x, mask=masks.causal(), query_offset=0))
        return x

    jax.export.export(jax.jit(traced))(x)
    said = found[0]
    assert said.shape["Tq"] is None
    assert (said.forward, said.backward, said.blocks) == (None, None, None)
    assert ("chunked", "refused") in [(c.name, c.verdict) for c in said.candidates]
    assert "Tq ?" in str(said)


# --- Bytes. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mask": masks.causal()},
        {"mask": masks.causal(), "dtype": jnp.bfloat16},
        {"mask": masks.causal(), "score": scores.softcap(30.0)},
        {"mask": masks.causal(), "kv_heads": 1},
        {"mask": masks.causal(), "layout": "BTHD"},
        {"mask": masks.causal(), "batch": 4, "heads": 16, "kv_heads": 4},
        {"mask": masks.causal(), "impl": "reference", "heads": 1},
        {"mask": masks.causal(), "query_offset": "end", "rows": 1, "keys": 8192, "batch": 4},
        {"mask": masks.causal(), "rows": 16384, "keys": 16384},
        {"mask": masks.causal(), "rows": 2047, "keys": 2049, "query_offset": 2},
        {"return_weights": True, "heads": 2},
        {"return_weights": True, "heads": 2, "keys": 2047, "score": scores.softcap(9.0)},
    ],
)
def test_estimates_are_near_what_xla_plans(more: dict[str, Any]) -> None:
    given: dict[str, Any] = {"impl": "chunked", **more}
    rows, keys = given.pop("rows", 2048), given.pop("keys", 2048)
    dtype, heads = given.pop("dtype", jnp.float32), given.pop("heads", 4)
    kv_heads, batch = given.pop("kv_heads", heads), given.pop("batch", 1)
    swapped = given.get("layout") == "BTHD"

    def like(count: int, length: int) -> Any:
        middle = (length, count) if swapped else (count, length)
        return jax.ShapeDtypeStruct((batch, *middle, 64), dtype)

    arrays = (like(heads, rows), like(kv_heads, keys), like(kv_heads, keys))
    found = []

    def forward(q: Any, k: Any, v: Any) -> Any:
        found.append(explain(q, k, v, **given))
        answer = attention(q, k, v, **given)
        return (answer.out, answer.weights) if given.get("return_weights") else (answer, None)

    def backward(q: Any, k: Any, v: Any, upstream: Any) -> Any:
        out, pull, weights = jax.vjp(forward, q, k, v, has_aux=True)
        return out, weights, pull(upstream)

    def planned(call: Any, *arrays: Any) -> int:
        plan = jax.jit(call).lower(*arrays).compile().memory_analysis()
        return int(plan.temp_size_in_bytes)

    measured = planned(forward, *arrays), planned(backward, *arrays, arrays[0])
    assert near(found[0].forward, measured[0])
    assert near(found[0].backward, measured[1])


def test_chunked_is_linear_and_reference_quadratic() -> None:
    def bytes_of(length: int, impl: str) -> tuple[int, int]:
        found = []
        x = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        jax.eval_shape(lambda x: found.append(explain(x, x, x, impl=impl)), x)
        assert found[0].forward
        assert found[0].backward
        return found[0].forward, found[0].backward

    short, middle, long = (bytes_of(n, "chunked") for n in (8192, 16384, 32768))
    for a, b, c in zip(short, middle, long, strict=True):
        assert c - b == 2 * (b - a) > 0
    for one, two in zip(bytes_of(4096, "reference"), bytes_of(8192, "reference"), strict=True):
        assert two == 4 * one


def test_the_flag_is_told() -> None:
    x = np.zeros((1, 1, 4, 2))
    with attn_core.use(backend="jax", impl="reference"):
        said = explain(x, x, x)
    assert (said.backend, said.backend_from, said.impl) == ("jax", "use", "reference")
    assert (said.dtype, said.asked, said.asked_by) == ("float64", "reference", "use")
