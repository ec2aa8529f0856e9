"""Short lines of a window, many at a time: what they compute, for what, what is said of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_core
from attn_core import attention, explain, masks
from attn_core.api import resolve
from attn_core.backends.jax import chunked_spans, chunked_tile

MASKS = {
    "window": masks.causal() & masks.window(left=126),
    "both sides": masks.window(100, 90),
    "dilated": masks.window(200, 0) & masks.dilated(3),
    "hollow": attn_core.mask(lambda b, h, q, k: (abs(q - k) < 60) & (q // 10 != 2) & (k % 7 != 3)),
    "documents": attn_core.mask(lambda b, h, q, k: (q // 200 == k // 200) & (k <= q)),
}
SHAPES = {
    "whole": (1, 4, 1024, 1024, 16, 16),
    "odd": (1, 8, 901, 1003, 16, 8),
    "fewer keys": (2, 4, 1003, 901, 8, 16),
    "many heads": (3, 12, 780, 780, 8, 8),
    "few heads": (4, 2, 1030, 1030, 8, 8),
}


def made(shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    batch, heads, q_len, k_len, width, v_width = shape
    rng = np.random.default_rng(seed)
    sizes = {"query": (q_len, width), "key": (k_len, width), "value": (k_len, v_width)}
    return {n: rng.standard_normal((batch, heads, *s)) for n, s in sizes.items()}


def floats(x: dict[str, np.ndarray]) -> dict[str, Any]:
    return {n: jnp.asarray(a, jnp.float32) for n, a in x.items()}


def lines(given: dict[str, Any]) -> Any:
    return chunked_spans.lines_of(resolve(given)[1].problem)


def same(found: Any, wanted: np.ndarray) -> None:
    """Sums of a few hundred products of normal numbers, of which weights sum to 1."""
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def wherever(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Short lines also where they save little."""
    monkeypatch.setattr(chunked_spans, "_LESS", 9.0)
    chunked_spans._lines.cache_clear()
    yield
    chunked_spans._lines.cache_clear()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference_in_float64(wherever: None, shape: str, name: str) -> None:
    x = made(SHAPES[shape])
    more = {"mask": MASKS[name], "query_offset": "end" if shape == "odd" else "start"}
    assert lines({**floats(x), **more}) is not None
    wanted = attention(**x, **more, impl="reference")
    same(jax.jit(partial(attention, **more, impl="chunked"))(**floats(x)), wanted)


def test_tokens_before_heads_and_no_trace() -> None:
    x = made(SHAPES["whole"])
    wanted = attention(**x, mask=MASKS["window"], impl="reference")
    turned = {n: a.swapaxes(1, 2) for n, a in floats(x).items()}
    assert lines({**turned, "mask": MASKS["window"], "layout": "BTHD"}) is not None
    found = attention(**turned, mask=MASKS["window"], layout="BTHD")
    same(found.swapaxes(1, 2), wanted)


def test_a_scale_is_honoured() -> None:
    x = made(SHAPES["whole"])
    for scale in (0.7, -2.0, 0.0):
        wanted = attention(**x, mask=MASKS["window"], scale=scale, impl="reference")
        same(attention(**floats(x), mask=MASKS["window"], scale=scale), wanted)


def test_what_nobody_sees_is_never_read(wherever: None) -> None:
    x = made(SHAPES["odd"])
    more = {"mask": MASKS["hollow"], "query_offset": "start"}
    assert lines({**floats(x), **more}) is not None
    wanted = attention(**x, **more, impl="reference")
    keys, rows = np.arange(1003) % 7 == 3, np.arange(901) // 10 == 2
    call = jax.jit(partial(attention, **more))
    for poison in (np.nan, np.inf, -np.inf):
        bad = {n: a.copy() for n, a in x.items()}
        bad["key"][:, :, keys] = bad["value"][:, :, keys] = poison
        bad["query"][:, :, rows] = poison
        found = np.asarray(call(**floats(bad)))
        same(found, wanted)
        assert (found[:, :, rows] == 0).all()


@pytest.mark.parametrize(
    ("which", "poison", "columns"),
    [("query", np.nan, 16), ("key", np.nan, 16), ("value", np.nan, 1), ("value", np.inf, 1)],
)
def test_what_a_row_sees_is_data(which: str, poison: float, columns: int) -> None:
    """Whoever sees it has what the formula makes of it; two tiles further nobody is touched."""
    x = made(SHAPES["whole"])
    call = jax.jit(partial(attention, mask=MASKS["window"]))
    clean = np.asarray(call(**floats(x)))
    x[which][0, 1, 500, 3] = poison
    found = np.asarray(call(**floats(x)))
    rows = slice(500, 501 if which == "query" else 627)
    broken = ~np.isfinite(found[0, 1])
    assert (broken[rows].sum(-1) == columns).all()
    far = np.ones(1024, bool)
    far[256:768] = False
    np.testing.assert_array_equal(found[:, :, far], clean[:, :, far])
    np.testing.assert_array_equal(found[:, [0, 2, 3]], clean[:, [0, 2, 3]])


def test_a_hidden_overflow_stays_hidden() -> None:
    """Two finite numbers whose product is not: the row that may not look does not know."""
    x = made(SHAPES["whole"])
    x["query"][0, 0, 100] = 1e30
    x["key"][0, 0, 101] = 1e30
    found = np.asarray(attention(**floats(x), mask=MASKS["window"]))
    assert np.isfinite(found[0, 0, 100]).all()


def test_documents_know_nothing_of_each_other() -> None:
    x = made(SHAPES["whole"])
    before = np.asarray(attention(**floats(x), mask=MASKS["documents"]))
    for a in x.values():
        a[:, :, 400:600] = np.random.default_rng(9).standard_normal(a[:, :, 400:600].shape) * 9
    after = np.asarray(attention(**floats(x), mask=MASKS["documents"]))
    others = np.r_[:400, 600:1024]
    np.testing.assert_array_equal(before[:, :, others], after[:, :, others])
    assert (before[:, :, 400:600] != after[:, :, 400:600]).any()


def test_the_same_each_time() -> None:
    x = floats(made(SHAPES["many heads"]))
    call = jax.jit(partial(attention, mask=MASKS["window"]))
    first = np.asarray(call(**x))
    for _ in range(30):
        np.testing.assert_array_equal(np.asarray(call(**x)), first)


def test_the_gradient_is_that_of_the_reference() -> None:
    """It takes another way, and must come out the same; a second one raises."""
    x = made((1, 4, 900, 900, 8, 8))
    mask = MASKS["window"]

    def loss(x: Any, impl: str) -> Any:
        return (attention(**x, mask=mask, impl=impl) ** 2).sum()

    got, want = (jax.grad(loss)(floats(x), impl) for impl in ("chunked", "reference"))
    for name in x:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=2e-5)
    with pytest.raises(Exception, match="reference"):
        jax.grad(lambda x: jax.grad(loss)(x, "chunked")["query"].sum())(floats(x))


def test_what_else_is_asked_for_takes_another_way() -> None:
    x = floats(made(SHAPES["whole"]))
    window = {"mask": MASKS["window"]}
    assert lines({**x, **window}) is not None
    for more in (
        {"return_lse": True},
        {"return_weights": True},
        {"bias": jnp.zeros((1024, 1024))},
        {"score": attn_core.scores.softcap(9.0)},
        {"dropout": attn_core.Dropout(0.1, 1)},
        {"sinks": jnp.zeros(4)},
        {"kv_lengths": 1000},
        {"query_offset": jnp.int32(0)},
        {"mask": masks.causal()},
        {"mask": masks.causal() & masks.window(left=511)},
        {"mask": masks.segments(jnp.arange(1024) // 100)},
        {"mask": None},
    ):
        assert lines({**x, **window, **more}) is None, more
    one = {n: a[:, :1] for n, a in x.items()}
    assert lines({**one, **window}) is None
    assert lines({**x, "key": one["key"], "value": one["value"], **window}) is None
    assert lines({**{n: a.astype(jnp.bfloat16) for n, a in x.items()}, **window}) is None
    short = {n: a[:, :, :512] for n, a in x.items()}
    assert lines({**short, **window}) is None


def test_turns_hold_every_line_once_but_for_the_last() -> None:
    x = floats(made((1, 8, 1100, 1100, 4, 4)))
    found = lines({**x, "mask": MASKS["window"]})
    rows = found.rows.ravel()
    g = found.geometry
    assert found.rows.shape == found.keys.shape == (3, 3)
    np.testing.assert_array_equal(np.unique(rows), np.arange(g.rows) * g.block_q)
    assert (rows[g.rows :] == rows[g.rows - 1]).all()
    ends = np.minimum(rows + g.block_q, 1100)
    assert (found.keys.ravel() <= np.maximum(rows - 126, 0)).all()
    assert (found.keys.ravel() + g.block_k >= ends).all()


@pytest.mark.parametrize(
    ("shape", "turn"),
    [((1, 8), (1, 8)), ((2, 8), (2, 8)), ((3, 12), (1, 12)), ((4, 2), (4, 2)), ((1, 40), (1, 20))],
)
def test_explain_tells_of_the_lines(
    shape: tuple[int, int], turn: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, mask = jnp.zeros((*shape, 2048, 8)), masks.causal() & masks.window(left=255)
    said = explain(x, x, x, mask=mask)
    assert (said.tiles, said.together, said.turn) == ((128, 128), 3, turn)
    assert "3 of a row at a time" in str(said)
    found, dot = [], chunked_tile.dot

    def spy(p: Any, a: Any, b: Any, contract: Any) -> Any:
        found.append((a.shape[1:3], b.shape[1:3]))
        return dot(p, a, b, contract)

    monkeypatch.setattr(chunked_tile, "dot", spy)
    jax.eval_shape(lambda x: attention(x, x, x, mask=mask), x)
    heads = turn[0] * turn[1]
    assert set(found) == {((heads, 128), (heads, 384))}


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 8, 4096, 64), "BHTD"), ((2, 32, 2048, 64), "BHTD"), ((1, 8, 2000, 64), "BTHD")],
)
def test_memory_is_about_what_is_said(shape: tuple[int, ...], layout: Any) -> None:
    batch, heads, length, width = shape
    order = (batch, length, heads, width) if layout == "BTHD" else shape
    x = jax.ShapeDtypeStruct(order, jnp.float32)
    said = []

    def call(q: Any, k: Any, v: Any) -> Any:
        given = {"mask": masks.causal() & masks.window(left=255), "layout": layout}
        said.append(explain(q, k, v, **given))
        return attention(q, k, v, **given)

    plan = jax.jit(call).lower(x, x, x).compile().memory_analysis()
    assert said[0].forward / 2 <= plan.temp_size_in_bytes <= 2 * said[0].forward
