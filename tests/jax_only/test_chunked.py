"""The chunked implementation over many tiles: small blocks, so that small arrays have many."""

from __future__ import annotations

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


@pytest.mark.parametrize("seed", range(21))
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


def test_it_is_bitwise_repeatable():
    given, cotangents = options(9, 40, 56)
    call = partial(attn_core.attention, impl="chunked", **EXTRAS)
    first = jax.tree.map(np.asarray, backend.vjp(given, cotangents, "eager", call))
    for _ in range(30):
        again = backend.vjp(given, cotangents, "eager", call)
        jax.tree.map(np.testing.assert_array_equal, again, first)


def test_weights_do_not_change_out():
    given, _ = options(12, 40, 56)
    alone = attn_core.attention(**given, impl="chunked")
    beside = attn_core.attention(**given, impl="chunked", return_weights=True)
    np.testing.assert_array_equal(alone, beside.out)


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
        maybe(jax.hessian(loss))(*x)
    with pytest.raises(UnsupportedError, match=words):
        maybe(jax.grad(lambda *x: (jax.grad(loss)(*x) ** 2).sum()))(*x)
    with pytest.raises(UnsupportedError, match=words):
        maybe(lambda *x: jax.jvp(jax.grad(loss), x, x))(*x)


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
def test_a_scale_left_to_the_exponential_is_only_a_positive_one(scale):
    """Of 16 bits the maximum is taken before the scale, which turns it around where it is < 0."""
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(3 * rng.standard_normal((1, 2, 40, 8)), jnp.bfloat16) for _ in range(3))
    assert (chunked_tile.later(problem_of(q, k, v, scale)) == scale) is (scale > 0)
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
