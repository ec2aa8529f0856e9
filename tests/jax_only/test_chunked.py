"""The chunked implementation over many tiles: small blocks, so that small arrays have many."""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_core
from attn_core import Dropout, masks, registry, scores
from attn_core.api import resolve
from attn_core.backends import jax as backend
from attn_core.backends.jax import chunked, chunked_parts, chunked_tile
from attn_core.registry import UnsupportedError

EXTRAS = {"return_lse": True, "return_weights": True}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 by 16, and compiled anew."""
    monkeypatch.setattr(chunked_parts, "_ROWS", 16)
    monkeypatch.setattr(chunked_parts, "_KEYS", 16)
    monkeypatch.setattr(chunked_parts, "_OPEN", 32)
    backend._HANDLERS["chunked"].clear_cache()
    yield
    backend._HANDLERS["chunked"].clear_cache()


def made(seed: int, *, batch: int = 2, heads: int = 4, kv: int = 2, q_len: int, k_len: int):
    """Arrays of float64, poisoned nowhere."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return backend.from_numpy(rng.standard_normal(shape))

    x = {
        "query": normal(batch, heads, q_len, 5),
        "key": normal(batch, kv, k_len, 5),
        "value": normal(batch, kv, k_len, 3),
    }
    return rng, normal, x


MASKS = {
    "none": lambda rng, b, q, k: None,
    "causal": lambda rng, b, q, k: masks.causal(),
    "window": lambda rng, b, q, k: masks.window(9, 3),
    "segments": lambda rng, b, q, k: masks.segments(
        np.sort(rng.integers(0, 4, (b, max(q, k))), 1).astype(np.int32)
    ),
    "dense": lambda rng, b, q, k: masks.dense(rng.random((1, 4, q, k)) < 0.3),
    "dilated": lambda rng, b, q, k: masks.dilated(7) | masks.global_tokens(2),
    "heads": lambda rng, b, q, k: attn_core.mask(lambda b, h, q, k: (k - q) // 8 == h - 2),
}


def options(seed: int, q_len: int, k_len: int, batch: int = 2, heads: int = 4):
    """A few options at random, each about half of the time."""
    rng, normal, x = made(seed, batch=batch, heads=heads, q_len=q_len, k_len=k_len)
    name = list(MASKS)[seed % len(MASKS)]
    given: dict[str, Any] = {**x, "mask": MASKS[name](rng, batch, q_len, k_len)}
    given["query_offset"] = [
        "start",
        "end",
        backend.from_numpy(rng.integers(-5, 6, batch).astype(np.int32)),
    ][rng.integers(3)]
    pick = lambda: rng.random() < 0.5  # noqa: E731
    if pick():
        spans = [(batch, heads, q_len, k_len), (1, heads, q_len, 1), (batch, 1, 1, k_len)]
        spans += [(q_len, k_len), (1, 1, 1, 1), (1, heads, 1, k_len)]
        bias = np.array(normal(*spans[rng.integers(len(spans))]))
        if bias.shape[-1] == k_len and pick():
            bias[..., ::3] = -np.inf
        given["bias"] = backend.from_numpy(bias)
    if pick():
        given["sinks"] = normal(heads)
    if pick():
        table = attn_core.operand(normal(heads, 40))
        given["score"] = [
            scores.softcap(2.0),
            scores.alibi(normal(heads)),
            attn_core.score(lambda s, b, h, q, k: s * table[h, (q - k) % 40] + table[h, k // 2]),
        ][rng.integers(3)]
    if pick():
        given["kv_lengths"] = rng.integers(0, k_len + 1, batch)
    if pick():
        given["q_lengths"] = rng.integers(0, q_len + 1, batch)
    if pick():
        given["dropout"] = Dropout(0.3, int(rng.integers(2**40)))
    if pick():
        given["scale"] = 0.7
    if pick():
        given["layout"] = "BTHD"
        for key in ("query", "key", "value"):
            given[key] = backend.from_numpy(np.asarray(given[key]).swapaxes(1, 2))
    rows = (batch, heads, q_len)
    cotangents = {"out": normal(*rows, 3), "lse": normal(*rows), "weights": normal(*rows, k_len)}
    if given.get("layout") == "BTHD":
        cotangents["out"] = backend.from_numpy(np.asarray(cotangents["out"]).swapaxes(1, 2))
    return given, cotangents


def same(one: Any, other: Any, tolerance: float = 1e-10) -> None:
    flat, wanted = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(flat) == len(wanted)
    for a, b in zip(flat, wanted, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


SIZES = [(40, 56), (1, 33), (33, 1), (16, 17), (47, 15), (64, 64), (17, 49)]


# Each pair of sizes once; more draws of the same are slow tests.
@pytest.mark.parametrize(
    "seed", [*range(7), *[pytest.param(n, marks=pytest.mark.slow) for n in range(7, 21)]]
)
def test_options_at_random_agree_with_the_reference(seed):
    given, cotangents = options(seed, *SIZES[seed % len(SIZES)])
    found = {
        impl: backend.vjp(
            given, cotangents, "jit", partial(attn_core.attention, impl=impl, **EXTRAS)
        )
        for impl in ("chunked", "reference")
    }
    same(found["chunked"], found["reference"])


@pytest.mark.parametrize("level", [1, 2])
def test_a_turn_takes_fewer_batches_or_heads_where_tiles_are_large(monkeypatch, level):
    given, cotangents = options(36, 40, 56)
    call = partial(attn_core.attention, impl="chunked", **EXTRAS)
    together = backend.vjp(given, cotangents, "jit", call)
    monkeypatch.setattr(chunked_parts, "_AT_ONCE", 2**13 if level == 1 else 1)
    backend._HANDLERS["chunked"].clear_cache()
    levels = []
    cut_up = chunked_parts.cut_up

    def told(p, x):
        found = cut_up(p, x)
        levels.append(found.geometry.level)
        return found

    monkeypatch.setattr(chunked, "cut_up", told)
    same(backend.vjp(given, cotangents, "jit", call), together, 1e-12)
    assert set(levels) == {level}


def counted(monkeypatch, name: str, module: Any) -> Counter:
    """How often a function of a tile is run, compiled too."""
    runs: Counter = Counter()
    function = getattr(module, name)

    def told(*args, **kwargs):
        jax.debug.callback(lambda: runs.update([name]))
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, told)
    return runs


@pytest.mark.parametrize("traced", [False, True])
def test_empty_tiles_are_not_computed_and_full_ones_ask_no_mask(monkeypatch, traced):
    *_, x = made(0, q_len=64, k_len=64)
    offset = {"query_offset": jnp.int32(0)} if traced else {}
    tiles = counted(monkeypatch, "logits", chunked_tile)
    asked = counted(monkeypatch, "allowed", chunked_tile)

    def loss(x):
        return attn_core.attention(**x, mask=masks.causal(), impl="chunked", **offset).sum()

    with jax.enable_x64(True):
        jax.block_until_ready(jax.jit(loss)(x))
        jax.effects_barrier()
        # Of 4 x 4 tiles, 6 lie above the diagonal and 4 on it.
        assert (tiles["logits"], asked["allowed"]) == (10, 4)
        jax.block_until_ready(jax.jit(jax.grad(loss))(x))
        jax.effects_barrier()
        assert (tiles["logits"], asked["allowed"]) == (30, 12)


@pytest.mark.parametrize("mask", [masks.causal(), masks.causal() & masks.window(left=200)])
@pytest.mark.parametrize("backward", [False, True])
def test_a_mask_is_worked_out_once_for_a_tile(mask, backward):
    x = jax.ShapeDtypeStruct((1, 4, 2048, 8), jnp.float32)

    def attend(x):
        return attn_core.attention(x, x, x, mask=mask, impl="chunked").sum()

    call = jax.jit(jax.grad(attend) if backward else attend)
    text = call.lower(x).compile().as_text()
    # What compares rows with keys stands in one loop alone, and has no axis for the heads.
    compared = re.findall(r"= pred\[([\d,]+)\][^=]* compare\(.*direction=GE", text)
    assert len(compared) == 1 + backward
    assert all(shape.startswith("1,1,1,") for shape in compared)


def test_poison_in_tiles_that_nobody_sees_stays_there():
    _, normal, x = made(1, q_len=40, k_len=56)
    spoilt = {name: np.array(a) for name, a in x.items()}
    for name in ("key", "value"):
        spoilt[name][0, :, 30:] = np.nan
        spoilt[name][1, :, 5:] = np.inf
    spoilt["query"][:, :, 33:] = np.nan
    lengths = {"kv_lengths": [30, 5], "q_lengths": [33, 33]}
    upstream = np.array(normal(2, 4, 40, 3))
    clean = {"out": backend.from_numpy(upstream)}
    upstream[:, :, 33:] = np.inf
    dirty = {"out": backend.from_numpy(upstream)}
    call = partial(attn_core.attention, impl="chunked", mask=masks.window(20), **lengths)
    call = partial(call, query_offset="start")
    wanted = backend.vjp(x, clean, "jit", call)
    given = {name: backend.from_numpy(a) for name, a in spoilt.items()}
    found = backend.vjp(given, dirty, "jit", call)
    same(found, wanted, 0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(found[1]))


def test_one_packed_document_does_not_touch_another():
    _, _, x = made(2, q_len=64, k_len=64)
    ids = np.repeat(np.arange(4), 16).astype(np.int32)
    call = jax.jit(
        lambda **x: attn_core.attention(
            **x, mask=masks.segments(ids) & masks.causal(), impl="chunked"
        )
    )
    with jax.enable_x64(True):
        before = call(**x)
        moved = {name: a.at[:, :, 16:32].add(1.0) for name, a in x.items()}
        after = call(**moved)
    changed = np.any(np.asarray(before != after), (0, 1, 3))
    assert changed[16:32].all()
    assert not np.delete(changed, np.s_[16:32]).any()


def test_one_packed_document_does_not_touch_the_gradients_of_another():
    _, normal, x = made(2, q_len=64, k_len=64)
    ids = np.repeat(np.arange(4), 16).astype(np.int32)
    call = partial(attn_core.attention, mask=masks.segments(ids) & masks.causal(), impl="chunked")
    upstream = np.array(normal(2, 4, 64, 3))
    louder = upstream.copy()
    louder[:, :, 16:32] *= -3
    moved = {name: backend.from_numpy(np.array(a)) for name, a in x.items()}
    with jax.enable_x64(True):
        moved = {name: a.at[:, :, 16:32].add(1.0) for name, a in moved.items()}
    found = [
        backend.vjp(given, {"out": backend.from_numpy(up)}, "jit", call)
        for given, up in ((x, upstream), (moved, louder))
    ]
    for before, after in zip(*(jax.tree.leaves(f) for f in found), strict=True):
        changed = np.any(np.asarray(before) != np.asarray(after), (0, 1, 3))
        # The first row of a document sees itself alone: its query has no gradient.
        assert changed[17:32].all()
        assert not np.delete(changed, np.s_[16:32]).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_whose_logits_are_all_minus_infinity_sees_nothing(dtype, masked):
    """By a score; and where the products themselves go beyond float32, which float16 cannot."""
    _, _, x = made(6, q_len=20, k_len=40)
    x = {name: jnp.asarray(a, dtype) for name, a in x.items()}
    given = {"mask": masks.window(30, 30) if masked else None, "query_offset": 0}
    hidden = attn_core.score(lambda s, b, h, q, k: attn_core.where(q == 3, -float("inf"), s))
    calls = [{**x, "score": hidden}]
    if dtype != "float16":
        far = {**x, "query": x["query"].at[:, :, 3].set(-1e30), "key": jnp.abs(x["key"]) + 1}
        calls.append({**far, "key": far["key"] * 1e20, "scale": 1.0})
    for arrays in calls:
        got = attn_core.attention(**arrays, **given, impl="chunked", return_lse=True)
        assert np.isneginf(np.asarray(got.lse[:, :, 3])).all()
        assert not np.asarray(got.out[:, :, 3], np.float32).any()


def test_hidden_products_may_overflow():
    """In another tile and in the same one, to infinity and to NaN."""
    _, _, x = made(7, q_len=40, k_len=40)
    x = {name: jnp.asarray(a, jnp.float32) for name, a in x.items()}
    # Query 39, which is 0, alone sees key 39; all other products with that key overflow.
    loud = {
        **x,
        "query": (x["query"] * 1e20).at[:, :, 39].set(0.0),
        "key": (x["key"] * 1e-20).at[:, :, 39].set(3e38),
    }
    tame = {**loud, "key": loud["key"].at[:, :, 39].set(0.0)}

    def rows(query, key, value):
        out = attn_core.attention(query, key, value, mask=masks.causal(), impl="chunked")
        return out[:, :, :39]

    found = [jax.vjp(rows, *a.values()) for a in (loud, tame)]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    (far_q, _, far_v), (near_q, _, near_v) = (back(jnp.ones_like(out)) for out, back in found)
    np.testing.assert_array_equal(far_v[:, :, :39], near_v[:, :, :39])
    np.testing.assert_array_equal(far_q[:, :, :39], near_q[:, :, :39])


def test_it_is_bitwise_repeatable():
    given, cotangents = options(9, 40, 56)
    call = partial(attn_core.attention, impl="chunked", **EXTRAS)
    first = jax.tree.map(np.asarray, backend.vjp(given, cotangents, "eager", call))
    for _ in range(30):
        again = backend.vjp(given, cotangents, "eager", call)
        jax.tree.map(np.testing.assert_array_equal, again, first)


def test_weights_do_not_change_out():
    # Bits are promised for the code that XLA makes by default, whatever the other tests are run on.
    # That of JAX 0.12 has no such flag, and nothing sets it (tools/plain_code.py).
    flag = "xla_cpu_use_fusion_emitters"
    shipped = {flag: True} if flag in os.environ.get("XLA_FLAGS", "") else None
    given, _ = options(12, 40, 56)

    @partial(jax.jit, static_argnames="beside", compiler_options=shipped)
    def attend(given, beside):
        found = attn_core.attention(**given, impl="chunked", return_weights=beside)
        return found.out if beside else found

    np.testing.assert_array_equal(attend(given, False), attend(given, True))


def loss(query, key, value, **options):
    return (attn_core.attention(query, key, value, impl="chunked", **options) ** 2).sum()


@pytest.mark.parametrize("jit", [False, True])
def test_what_it_cannot_differentiate_it_refuses_by_name(jit):
    x = tuple(jnp.asarray(a, jnp.float32) for a in made(3, q_len=20, k_len=20)[2].values())
    maybe = jax.jit if jit else lambda f: f
    words = 'need impl="reference"'
    with pytest.raises(UnsupportedError, match=words):
        maybe(lambda *x: jax.jvp(loss, x, x))(*x)
    with pytest.raises(UnsupportedError, match=words):
        maybe(jax.jacfwd(loss))(*x)
    with pytest.raises(UnsupportedError, match=words):
        maybe(jax.vmap(lambda t: jax.jvp(lambda q: loss(q, *x[1:]), x[:1], (t,))))(x[0][None])
    with pytest.raises(UnsupportedError, match=words):
        maybe(jax.hessian(loss))(*x)
    with pytest.raises(UnsupportedError, match=words):
        maybe(jax.grad(lambda *x: (jax.grad(loss)(*x) ** 2).sum()))(*x)
    with pytest.raises(UnsupportedError, match=words):
        maybe(lambda *x: jax.jvp(jax.grad(loss), x, x))(*x)


@pytest.mark.parametrize("around", ["nothing", "checkpoint", "scan"])
def test_reverse_mode_under_vmap_is_not_taken_for_forward(around):
    query, key, value = (
        jnp.asarray(a, jnp.float32) for a in made(3, q_len=20, k_len=20)[2].values()
    )

    def each(scale):
        def of(q):
            return loss(q * scale, key, value)

        def two(q):
            return jax.lax.scan(lambda total, _: (total + of(q), None), 0.0, length=2)[0]

        call = {"nothing": of, "checkpoint": jax.checkpoint(of), "scan": two}[around]
        return jax.grad(call)(query)

    together = jax.vmap(each)(jnp.array([0.5, 2.0]))
    for got, scale in zip(together, (0.5, 2.0), strict=True):
        np.testing.assert_allclose(got, each(jnp.float32(scale)), rtol=2e-5, atol=2e-5)
    along = jax.jacrev(lambda q: (attn_core.attention(q, key, value) ** 2).sum((0, 1, 3)))(query)
    np.testing.assert_allclose(along.sum(0), jax.grad(loss)(query, key, value), atol=2e-4)


def test_vmap_gives_each_its_own_tiles():
    x = {name: jnp.asarray(a, jnp.float32) for name, a in made(4, q_len=40, k_len=40)[2].items()}
    lengths = jnp.array([[40, 3], [17, 0], [25, 33]], jnp.int32)
    together = jax.vmap(lambda n: jax.grad(loss)(*x.values(), kv_lengths=n))(lengths)
    for at, n in enumerate(lengths):
        alone = jax.grad(loss)(*x.values(), kv_lengths=n)
        np.testing.assert_allclose(together[at], alone, rtol=1e-5, atol=1e-5)


def test_temporary_memory_is_linear(monkeypatch):
    """Of forward and backward pass, as XLA plans it; with the tiles that users get."""
    monkeypatch.undo()
    backend._HANDLERS["chunked"].clear_cache()

    def temporaries(length: int) -> tuple[int, int]:
        shape = jax.ShapeDtypeStruct((1, 8, length, 64), jnp.float32)
        forward = partial(attn_core.attention, mask=masks.causal(), impl="chunked")
        backward = jax.grad(lambda q, k, v: forward(q, k, v).sum(), (0, 1, 2))
        found = [jax.jit(f).lower(shape, shape, shape).compile() for f in (forward, backward)]
        return tuple(f.memory_analysis().temp_size_in_bytes for f in found)

    short, middle, long = (temporaries(n) for n in (4096, 8192, 16384))
    for at in range(2):
        assert long[at] - middle[at] <= 2.2 * (middle[at] - short[at]) + 2**20
    # Not one array of them is (T, T): that alone would be 8 GiB.
    assert long[0] < 64e6
    assert long[1] < 256e6


def test_many_batches_and_heads():
    x = [
        backend.from_numpy(np.random.default_rng(i).standard_normal((8200, 8, 3, 2)))
        for i in range(3)
    ]
    found = attn_core.attention(*x, mask=masks.causal(), impl="chunked")
    wanted = attn_core.attention(*x, mask=masks.causal(), impl="reference")
    same(found, wanted)


def test_symbolic_sizes_are_refused_by_name():
    plan = registry.choose  # the plan is made from facts alone
    problem = chunked_problem(q_len=None)
    with pytest.raises(UnsupportedError, match="Tq must be known when the call is traced"):
        plan(backend, problem, "chunked")
    assert plan(backend, problem, "auto").impl == "reference"


def chunked_problem(**changes: Any) -> Any:
    from dataclasses import replace

    *_, x = made(0, q_len=4, k_len=4)
    _, plan, _ = attn_core.api.resolve(x)
    return replace(plan.problem, **changes)


def test_what_is_kept_for_the_backward_pass_is_linear():
    """Statistics kept for the backward pass are linear: out, m, log l and a flag."""
    *_, x = made(5, q_len=64, k_len=64)
    with jax.enable_x64(True):
        _, back = jax.eval_shape(lambda x: jax.vjp(lambda x: attn_core.attention(**x), x), x)
    kept = sum(int(np.prod(a.shape)) for a in jax.tree.leaves(back))
    inputs = sum(a.size for a in x.values())
    assert kept <= inputs + 2 * 4 * 64 * (3 + 3)


@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_a_scale_left_to_the_exponential_leaves_its_sign(scale):
    """Of 16 bits the maximum is taken before the scale, which turns it around where it is < 0."""
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(3 * rng.standard_normal((1, 2, 40, 8)), jnp.bfloat16) for _ in range(3))
    assert chunked_tile.later(problem_of(q, k, v, scale)) == 0.7
    got, want = (
        attn_core.attention(*(q, k, v), scale=scale, return_lse=True, impl=impl)
        for impl in ("chunked", "reference")
    )
    np.testing.assert_allclose(got.lse, want.lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(got.out, np.float32), np.asarray(want.out, np.float32), rtol=0.02, atol=0.02
    )


def problem_of(q: Any, k: Any, v: Any, scale: float) -> Any:
    _, plan, _ = resolve({"query": q, "key": k, "value": v, "scale": scale})
    return plan.problem


def softmax64(x: dict[str, Any], scale: float, allowed: np.ndarray) -> tuple[Any, Any, Any]:
    """(out, lse, gradient of value where out's is 1) in float64; heads are not grouped."""
    q, k, v = (np.asarray(a, np.float64) for a in x.values())
    s = np.where(allowed, scale * (q @ k.swapaxes(2, 3)), -np.inf)
    m = s.max(-1, keepdims=True)
    e = np.exp(s - m)
    weights = e / e.sum(-1, keepdims=True)
    pulled = np.broadcast_to(weights.sum(2)[..., None], v.shape)
    return weights @ v, (m + np.log(e.sum(-1, keepdims=True)))[..., 0], pulled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1e-50, 1e-30, 1e30, -1e30])
@pytest.mark.parametrize("name", ["causal", "window"])
def test_scales_of_any_size(scale, dtype, name):
    """Logits that all but vanish, and such that one key takes all: no tie comes near at 1e30."""
    rng = np.random.default_rng(9)
    x = {n: jnp.asarray(rng.standard_normal((1, 2, 40, 8)), dtype) for n in "qkv"}
    row, key = np.arange(40)[:, None], np.arange(40)
    given, allowed = {
        "causal": (masks.causal(), key <= row),
        "window": (masks.window(9, 3), (row - 9 <= key) & (key <= row + 3)),
    }[name]

    def call(*x):
        return attn_core.attention(*x, scale=scale, mask=given, impl="chunked", return_lse=True)[:2]

    (out, lse), back = jax.vjp(call, *x.values())
    gradients = back((jnp.ones_like(out), jnp.zeros_like(lse)))
    wanted_out, wanted_lse, wanted_v = softmax64(x, scale, allowed)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    for got, wanted in ((out, wanted_out), (gradients[2], wanted_v)):
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)
    if dtype != "float16" or abs(scale) < 1:
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_of_large_logits_the_largest_takes_all(scale):
    """1e12 of them, in 16 bits, where s z - s m rounded once is no longer the difference."""
    rng = np.random.default_rng(10)
    x = {n: jnp.asarray(rng.standard_normal((1, 2, 40, 8)), jnp.bfloat16) for n in "qkv"}
    x = {**x, "q": x["q"] * 1e6, "k": x["k"] * 1e6}

    def call(*x):
        return attn_core.attention(*x, scale=scale, mask=masks.causal(), impl="chunked")

    out, back = jax.vjp(call, *x.values())
    wanted, _, wanted_v = softmax64(x, scale, np.tril(np.ones((40, 40), bool)))
    d_v = back(jnp.ones_like(out))[2]
    for got, want in ((out, wanted), (d_v, wanted_v)):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-2, atol=1e-2)


# --- Which tiles. ---------------------------------------------------------------------------------


def tiles_for(mask: Any, length: int = 8192, **more: Any) -> tuple[int, int]:
    x = jax.ShapeDtypeStruct((1, 2, length, 8), jnp.float32)
    found = []

    def traced(x: Any) -> Any:
        _, plan, _ = resolve({"query": x, "key": x, "value": x, "mask": mask, **more})
        found.append(chunked_parts.tiles_of(plan.problem))
        return x

    jax.eval_shape(traced, x)
    return found[0][0], found[0][2]


def test_narrow_windows_have_finer_tiles(monkeypatch):
    monkeypatch.undo()

    def window(reach):
        return masks.causal() & masks.window(left=reach - 1)

    for narrow in (window(1), window(256), window(512), masks.window(100, 100)):
        assert tiles_for(narrow) == (128, 128)
    ids = jnp.arange(8192, dtype=jnp.int32) // 100
    by_head = attn_core.mask(lambda b, h, q, k: abs(q - k) < 100 * h)
    assert tiles_for(None) == (1024, 1024)
    assert tiles_for(None, kv_lengths=5) == (512, 256)
    wide = (masks.causal(), window(1024), window(4096), masks.segments(ids), by_head)
    for large in wide:
        assert tiles_for(large) == (512, 256)
    # An offset that is only known when it runs; so few rows that nothing is to be gained.
    assert tiles_for(window(256), query_offset=jnp.int32(0)) == (512, 256)
    assert tiles_for(window(256), length=1024) == (512, 256)
    for length in (1537, 2048, 5000):
        assert tiles_for(masks.causal(), length)[0] > 256


def test_finer_tiles_agree_with_the_reference(monkeypatch):
    monkeypatch.setattr(chunked_parts, "_FINE", 8)
    _, normal, x = made(11, q_len=70, k_len=90)
    mask = masks.causal() & masks.window(left=3)
    given = {**x, "mask": mask, "query_offset": "end"}
    wanted = {"out": normal(2, 4, 70, 3)}
    _, plan, _ = resolve(given)
    assert chunked_parts.tiles_of(plan.problem)[::2] == (8, 8)
    found = [
        backend.vjp(given, wanted, "jit", partial(attn_core.attention, impl=impl))
        for impl in ("chunked", "reference")
    ]
    same(*found)


@pytest.mark.parametrize(("group", "length"), [(3, 25), (3, 81), (5, 27), (7, 89)])
def test_groups_whose_tiles_are_no_multiple_of_8(group, length):
    """They have 10, 6 or 4 rows, or a multiple of 8; and none begins beyond the end."""
    _, normal, x = made(12, heads=group, kv=1, q_len=length, k_len=40)
    given = {**x, "query_offset": "start"}
    p = resolve(given)[1].problem
    assert chunked_parts._open(p)
    block, rows, *_ = chunked_parts.tiles_of(p)
    assert (rows - 1) * block < length <= rows * block
    wanted = {"out": normal(2, group, length, 3), "lse": normal(2, group, length)}
    found = [
        backend.vjp(given, wanted, "jit", partial(attn_core.attention, impl=impl, return_lse=True))
        for impl in ("chunked", "reference")
    ]
    same(*found)


@pytest.mark.parametrize("length", [9, 64])
def test_values_of_width_0_leave_the_other_gradients(length):
    """`out` holds nothing then; lse and the weights are those of any value."""
    given, cotangents = options(3, length, length)
    for name, x in (("value", given), ("out", cotangents)):
        x[name] = x[name][..., :0]
    found = [
        backend.vjp(given, cotangents, "jit", partial(attn_core.attention, impl=impl, **EXTRAS))
        for impl in ("chunked", "reference")
    ]
    assert found[0][1]["value"].shape == given["value"].shape
    assert np.asarray(found[0][1]["query"]).any()
    same(*found)


# --- Spans: all that a row of tiles sees, at once. ------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
    """Spans of 16 rows in steps of 8 keys, and not too long for so few."""
    sizes = {"_ROWS": 64, "_KEYS": 32, "_SPAN_LINE": 16, "_SPAN_STEP": 8, "_SPAN_LONGEST": 48}
    for name, size in sizes.items():
        monkeypatch.setattr(chunked_parts, name, size)
    chunked_parts._spans.cache_clear()
    yield
    chunked_parts._spans.cache_clear()


SPANNED = {
    "window": masks.causal() & masks.window(left=3),
    "around": masks.window(5, 6),
    "dilated": masks.window(11, 0) & masks.dilated(3),
    "hollow": attn_core.mask(lambda b, h, q, k: (abs(q - k) < 8) & (q // 10 != 2)),
}


def asked(given: Any) -> Any:
    return resolve(given)[1].problem


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", SPANNED)
@pytest.mark.parametrize("offset", ["start", "end"])
@pytest.mark.parametrize("lengths", [(64, 64), (70, 93), (90, 61)])
def test_spans_hold_all_that_is_live(narrow, lengths, offset, name, columns):
    *_, x = made(0, q_len=lengths[0], k_len=lengths[1])
    p = asked({**x, "mask": SPANNED[name], "query_offset": offset})
    found = chunked_parts.spans_of(p, columns)
    assert found is not None
    shift = 0 if offset == "start" else lengths[1] - lengths[0]
    q, k = np.arange(lengths[0])[:, None] + shift, np.arange(lengths[1])
    near = {
        "window": (k <= q) & (q - k <= 3),
        "around": (q - k <= 5) & (k - q <= 6),
        "dilated": (k <= q) & (q - k <= 11) & ((q - k) % 3 == 0),
        "hollow": (abs(q - k) < 8) & (q // 10 != 2),
    }[name]
    near = near.T if columns else near
    assert found.lines * found.line >= near.shape[0]
    assert found.steps * found.step >= near.shape[1]
    for line, start in enumerate(found.starts[:, 0]):
        assert 0 <= start <= found.steps - found.width
        left = near[line * found.line : (line + 1) * found.line].copy()
        left[:, start * found.step : (start + found.width) * found.step] = False
        assert not left.any()


@pytest.mark.parametrize("seed", range(8))
def test_spans_agree_with_the_reference(narrow, seed):
    q_len, k_len = [(64, 64), (70, 93), (90, 61)][seed % 3]
    given, cotangents = options(seed, q_len, k_len)
    if not isinstance(given["query_offset"], str):
        given["query_offset"] = "end"
    given["mask"] = list(SPANNED.values())[seed % len(SPANNED)]
    for name in ("kv_lengths", "q_lengths"):
        given.pop(name, None)
    del cotangents["weights"]
    if seed % 2:
        given["mask"] = given["mask"] & attn_core.mask(lambda b, h, q, k: k % 7 != 3)
        for name in ("key", "value"):
            poisoned = np.array(given[name])
            axis = 1 if given.get("layout") == "BTHD" else 2
            poisoned.swapaxes(0, axis)[3::7] = np.nan
            given[name] = backend.from_numpy(poisoned)
    assert chunked_parts.spans_of(asked({**given, "return_lse": True}), False) is not None
    found = [
        backend.vjp(
            given, cotangents, "jit", partial(attn_core.attention, impl=impl, return_lse=True)
        )
        for impl in ("chunked", "reference")
    ]
    same(*found)


def test_spans_are_for_masks_that_are_known_and_narrow(monkeypatch):
    monkeypatch.undo()
    chunked_parts._spans.cache_clear()
    x = jax.ShapeDtypeStruct((1, 2, 8192, 8), jnp.float32)
    found = {}

    def width(mask: Any, **more: Any) -> Any:
        def traced(x: Any) -> Any:
            p = asked({"query": x, "key": x, "value": x, "mask": mask, **more})
            found["spans"] = [chunked_parts.spans_of(p, columns) for columns in (False, True)]
            return x

        jax.eval_shape(traced, x)
        return [None if s is None else (s.line, s.step * s.width) for s in found["spans"]]

    def window(reach):
        return masks.causal() & masks.window(left=reach - 1)

    assert width(window(256)) == [(256, 512)] * 2
    assert width(window(1)) == [(256, 256)] * 2
    assert width(window(512)) == [(256, 768)] * 2
    ids = jnp.arange(8192, dtype=jnp.int32) // 100
    by_head = attn_core.mask(lambda b, h, q, k: abs(q - k) < 100 * h)
    for mask in (None, masks.causal(), window(1024), masks.segments(ids), by_head):
        assert width(mask) == [None, None]
    none = {"query_offset": jnp.int32(0)}, {"kv_lengths": 5}, {"return_weights": True}
    for more in none:
        assert width(window(256), **more) == [None, None]


def test_spans_of_several_batches_in_bfloat16():
    """At full size: XLA's CPU has no product of them that it would make of a turned one."""
    rng = np.random.default_rng(3)
    x = [jnp.asarray(rng.standard_normal((2, 4, 1024, 16)), jnp.bfloat16) for _ in range(3)]
    mask = masks.causal() & masks.window(left=126)
    found = []
    for impl in ("chunked", "reference"):
        call = partial(attn_core.attention, mask=mask, impl=impl)
        out, pull = jax.vjp(call, *x)
        found.append([np.asarray(a, np.float32) for a in (out, *pull(jnp.ones_like(out)))])
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("more", ["tiles", "spans", "bias"])
def test_rows_that_fill_up_a_tile_see_no_poison(narrow, more):
    """More keys than rows: those beyond are seen by the rows alone that there are not."""
    _, normal, x = made(5, q_len=70, k_len=93)
    given: dict[str, Any] = {**x, "mask": masks.causal(), "query_offset": "start"}
    hidden = np.arange(93) >= 70
    if more == "spans":
        given["mask"] = masks.causal() & masks.window(left=8)
    if more == "bias":
        hidden = np.arange(93) == 40
        bias = np.array(normal(1, 1, 70, 93))
        bias[..., hidden] = -np.inf
        given = {**x, "bias": backend.from_numpy(bias)}
    for name in ("key", "value"):
        poisoned = np.array(x[name])
        poisoned[:, :, hidden] = np.nan
        given[name] = backend.from_numpy(poisoned)
    wanted = {"out": normal(2, 4, 70, 3)}
    found = [
        backend.vjp(given, wanted, "jit", partial(attn_core.attention, impl=impl))
        for impl in ("chunked", "reference")
    ]
    assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves(found[0]))
    same(*found)
