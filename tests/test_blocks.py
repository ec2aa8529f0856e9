"""Block maps against brute force: never a live tile missed, none kept dead where we promise it."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from attn_core import masks
from attn_core.blocks import BlockMap, block_grid, block_map, block_ranges
from attn_core.language import expr
from attn_core.language.intervals import HOST, check_range
from attn_core.language.neighbours import full_tiles_are_neighbours
from attn_core.language.operands import operand
from attn_core.language.values import Mask, mask

# A mask as nested tuples, so that it can be written in the language and, apart from it, computed
# entry by entry with NumPy.

_INTS = ("add", "sub", "mul", "floordiv", "mod", "minimum", "maximum", "shift", "bits")
_COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")
_TABLES = {  # name: shape, with the index kinds that suit it
    "one": (9,),
    "two": (2, 7),
    "wide": (5, 11),
    "flags": (8,),
    "grid": (1, 6, 9),
}


def _integers(depth: int) -> st.SearchStrategy[Any]:
    leaf = st.one_of(
        st.sampled_from([("q",), ("k",), ("q",), ("k",), ("row",), ("b",), ("h",)]),
        st.integers(-7, 9).map(lambda c: ("const", c)),
    )
    if not depth:
        return leaf
    below = _integers(depth - 1)
    return st.one_of(
        leaf,
        st.tuples(st.sampled_from(_INTS), below, below),
        st.tuples(st.just("abs"), below),
        st.tuples(st.just("where"), _conditions(depth - 1), below, below),
        st.tuples(st.just("int"), _conditions(depth - 1)),
        st.tuples(st.just("one"), below),
        st.tuples(st.just("two"), below, below),
        st.tuples(st.just("wide"), below, below),
    )


def _conditions(depth: int) -> st.SearchStrategy[Any]:
    below = _integers(max(depth - 1, 0))
    leaf = st.tuples(st.sampled_from(_COMPARE), below, below)
    if not depth:
        return leaf
    inner = _conditions(depth - 1)
    return st.one_of(
        leaf,
        st.tuples(
            st.sampled_from(("and", "or", "and", "or", "xor", "same", "differ")), inner, inner
        ),
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("where"), inner, inner, inner),
        st.tuples(st.just("flags"), below),
        st.tuples(st.just("grid"), below, below, below),
    )


def _bounds() -> st.SearchStrategy[Any]:
    """Difference constraints, as they stand and negated; x != y is none, it is a hole."""
    form = st.sampled_from([("q",), ("k",), ("row",), ("sub", ("q",), ("k",))])
    sides = st.tuples(form, st.integers(-6, 12).map(lambda c: ("const", c)))
    ends = st.one_of(sides, st.just((("q",), ("k",))), sides.map(lambda pair: pair[::-1]))
    bound = st.tuples(st.sampled_from(_COMPARE[:5]), ends).map(lambda made: (made[0], *made[1]))
    return st.one_of(
        bound, bound.filter(lambda made: made[0] != "eq").map(lambda made: ("not", made))
    )


def _conjunctions() -> st.SearchStrategy[Any]:
    """Constraints that narrow a tile, and a literal that is read over what they leave of it."""
    place = st.sampled_from([("q",), ("k",), ("row",), ("sub", ("q",), ("k",))])
    some = st.integers(-5, 11).map(lambda c: ("const", c))
    value = st.one_of(
        place,
        st.tuples(st.just("one"), place),
        st.tuples(st.just("wide"), place, place),
        st.tuples(st.sampled_from(("mod", "floordiv")), place, some),
    )
    literal = st.one_of(
        st.tuples(st.sampled_from(_COMPARE), value, st.one_of(value, some)),
        st.tuples(st.just("flags"), place),
        st.tuples(st.just("not"), st.tuples(st.just("flags"), place)),
    )

    def joined(op: str, parts: list[Any]) -> Any:
        whole = parts[0]
        for part in parts[1:]:
            whole = (op, whole, part)
        return whole

    term = st.tuples(st.lists(_bounds(), min_size=1, max_size=3), literal).map(
        lambda made: joined("and", [*made[0], made[1]])
    )
    whole = st.lists(term, min_size=1, max_size=2).map(lambda terms: joined("or", terms))
    return st.one_of(whole, whole, whole.map(lambda made: ("not", made)))


def _written(node: Any, env: dict[str, Any], tables: dict[str, Any]) -> Any:
    """The description in the language."""
    op, *args = node
    if op in ("q", "k", "b", "h", "row"):
        return env[op]
    if op == "const":
        # As an expression, since two constants would be Python's own arithmetic.
        return env["b"] * 0 + args[0] if abs(args[0]) > 6 else args[0]
    x = [_written(arg, env, tables) for arg in args]
    if op in tables:
        return tables[op][
            tuple(i if isinstance(i, expr.Expr) else expr.maximum(env["b"] * 0, i) for i in x)
        ]
    names = {"shift": "rshift", "bits": "and", "same": "eq", "differ": "ne"}
    if op == "int":
        return expr.cast(x[0], int)
    return expr.apply(names.get(op, op), *x)


def _computed(node: Any, env: dict[str, Any], tables: dict[str, np.ndarray]) -> Any:
    """The description entry by entry."""
    op, *args = node
    if op in ("q", "k", "b", "h", "row"):
        return env[op]
    if op == "const":
        return np.int64(args[0])
    x = [_computed(arg, env, tables) for arg in args]
    if op in tables:
        at = [np.clip(i, 0, size - 1) for i, size in zip(x, tables[op].shape, strict=True)]
        found = tables[op][tuple(at)]
        return found if found.dtype == np.bool_ else found.astype(np.int64)
    if op == "int":
        return np.where(x[0], np.int64(1), np.int64(0))
    if op in ("floordiv", "mod"):
        safe = np.where(x[1] == 0, 1, x[1])
        return np.where(x[1] == 0, 0, x[0] // safe if op == "floordiv" else x[0] % safe)
    functions: dict[str, Any] = {
        "add": lambda a, c: a + c,
        "sub": lambda a, c: a - c,
        "mul": lambda a, c: a * c,
        "minimum": np.minimum,
        "maximum": np.maximum,
        "shift": lambda a, c: a >> np.clip(c, 0, 31),
        "bits": lambda a, c: a & c,
        "abs": np.abs,
        "where": np.where,
        "lt": lambda a, c: a < c,
        "le": lambda a, c: a <= c,
        "gt": lambda a, c: a > c,
        "ge": lambda a, c: a >= c,
        "eq": lambda a, c: a == c,
        "ne": lambda a, c: a != c,
        "and": lambda a, c: a & c,
        "or": lambda a, c: a | c,
        "xor": lambda a, c: a ^ c,
        "same": lambda a, c: a == c,
        "differ": lambda a, c: a != c,
        "not": np.logical_not,
    }
    return functions[op](*x)


def _entries(fn: Any, sizes: dict[str, Any]) -> np.ndarray:
    """(B, H, Tq, Tk) of `fn(b, h, q, k, row)` and the lengths."""
    batch, heads = sizes.get("batch", 1), sizes.get("heads", 1)
    shape = (batch, heads, sizes["q_len"], sizes["k_len"])
    b, h, row, k = np.ogrid[tuple(slice(n) for n in shape)]

    def column(name: str, default: Any) -> np.ndarray:
        given = sizes.get(name)
        return np.asarray(default if given is None else given, np.int64).reshape(-1, 1, 1, 1)

    q = row + column("offsets", 0)
    allowed = np.broadcast_to(fn(b, h, q, k, row), shape)
    allowed = allowed & (k < column("kv_lengths", sizes["k_len"]))
    return allowed & (row < column("q_lengths", sizes["q_len"]))


def _tiles(allowed: np.ndarray, sizes: dict[str, Any], all_of: bool = False) -> np.ndarray:
    block_q, block_k = sizes["block_q"], sizes["block_k"]
    reduce = np.logical_and if all_of else np.logical_or
    for axis, block in ((2, block_q), (3, block_k)):
        allowed = reduce.reduceat(allowed, np.arange(0, allowed.shape[axis], block), axis=axis)
    return allowed


def _check(found: BlockMap, allowed: np.ndarray, sizes: dict[str, Any], exact: bool) -> None:
    live, whole = _tiles(allowed, sizes), _tiles(allowed, sizes, all_of=True)
    status = np.broadcast_to(found.dense(), live.shape)
    assert not (live & (status == 0)).any(), "a live tile was missed"
    assert not ((status == 2) & ~whole).any(), "a tile called full is not"
    if exact:
        assert not ((status > 0) & ~live).any(), "a dead tile was kept"


@st.composite
def _sizes(draw: Any, least: int = 1, batch: int = 2) -> dict[str, Any]:
    q_len, k_len = draw(st.integers(least, 21)), draw(st.integers(least, 21))
    kinds = st.sampled_from(["none", "int", "array"])
    kind = draw(kinds)
    per_batch = [st.integers(-9, 9), st.integers(0, k_len), st.integers(0, q_len)]
    drawn = [draw(st.lists(x, min_size=batch, max_size=batch)) for x in per_batch]
    return {
        "q_len": q_len,
        "k_len": k_len,
        "block_q": draw(st.integers(1, 8)),
        "block_k": draw(st.integers(1, 8)),
        "batch": batch,
        "heads": 2,
        "offsets": {"none": 0, "int": drawn[0][0], "array": np.array(drawn[0])}[kind],
        "kv_lengths": np.array(drawn[1]) if draw(st.booleans()) else None,
        "q_lengths": np.array(drawn[2]) if draw(st.booleans()) else None,
    }


@pytest.mark.parametrize("kind", ["any", "conjunctions"])
@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_mask_keeps_every_live_tile(kind: str, data: Any) -> None:
    description = data.draw(_conditions(3) if kind == "any" else _conjunctions())
    sizes = data.draw(_sizes())
    seed = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = {name: seed.integers(-5, 12, shape) for name, shape in _TABLES.items()}
    arrays["flags"], arrays["grid"] = arrays["flags"] > 3, arrays["grid"] > 8
    tables = {
        name: operand(array, None if array.dtype == np.bool_ else (-5, 11))
        for name, array in arrays.items()
    }
    try:
        built = mask(
            lambda b, h, q, k: _written(
                description, {"b": b, "h": h, "q": q, "k": k, "row": expr.row}, tables
            )
        )
    except TypeError:
        assume(False)
    bounds = {"b": (0, 1), "h": (0, 1), "q": (-9, 30), "k": (0, 21), "row": (0, 21)}
    try:
        check_range(built.tree, bounds)
    except ValueError:
        assume(False)

    def plain(b: Any, h: Any, q: Any, k: Any, row: Any) -> Any:
        return _computed(description, {"b": b, "h": h, "q": q, "k": k, "row": row}, arrays)

    found = block_map(built.tree, built.arrays, **sizes)
    _check(found, _entries(plain, sizes), sizes, exact=False)
    grid = block_grid(HOST, built.tree, built.arrays, **sizes)
    np.testing.assert_array_equal(grid, np.broadcast_to(found.dense(), grid.shape))
    full = found.dense() == 2
    if full_tiles_are_neighbours(built.tree, "k"):
        assert _gapless(full)
    if full_tiles_are_neighbours(built.tree, "q", "row"):
        assert _gapless(full.swapaxes(2, 3))


def _gapless(full: np.ndarray) -> bool:
    """Whether along the last axis all that are set are neighbours."""
    before = np.zeros_like(full[..., :1])
    begun = np.diff(full.astype(np.int8), axis=-1, prepend=before.astype(np.int8)) == 1
    return bool((begun.sum(-1) <= 1).all())


def _clip(ids: np.ndarray, b: Any, at: Any) -> Any:
    at = np.clip(at, 0, ids.shape[-1] - 1)
    return ids[at] if ids.ndim == 1 else ids[b, at]


@st.composite
def _promised(draw: Any) -> tuple[Mask, Any, bool]:
    """A mask of which no dead tile is kept, as the language and as a plain function."""
    n, m = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    rate = draw(st.integers(1, 6))
    steps = draw(st.lists(st.integers(0, 2), min_size=42, max_size=42))
    ids = np.cumsum(steps).reshape(2, 21)
    per_batch = np.array([n, m], np.int32)
    flags = np.array(steps[:21]) == 2
    made = draw(
        st.sampled_from(
            [
                (masks.causal(), lambda b, h, q, k, row: q >= k),
                (masks.window(n), lambda b, h, q, k, row: q - k <= n),
                (masks.window(n, m), lambda b, h, q, k, row: (q - k <= n) & (k - q <= m)),
                (masks.prefix(n), lambda b, h, q, k, row: k < n),
                (masks.prefix(per_batch), lambda b, h, q, k, row: k < per_batch[b]),
                (masks.chunks(rate), lambda b, h, q, k, row: q // rate == k // rate),
                (
                    masks.segments(ids[0]),
                    lambda b, h, q, k, row: _clip(ids[0], b, q) == _clip(ids[0], b, k),
                ),
                (
                    masks.segments(ids),
                    lambda b, h, q, k, row: _clip(ids, b, q) == _clip(ids, b, k),
                ),
                (
                    masks.dilated(rate, left=n, right=0),
                    lambda b, h, q, k, row: ((q - k) % rate == 0) & (q - k <= n * rate) & (q >= k),
                ),
                (
                    masks.dilated(rate, n, m),
                    lambda b, h, q, k, row: (
                        ((q - k) % rate == 0) & (q - k <= n * rate) & (k - q <= m * rate)
                    ),
                ),
                (masks.dilated(rate), lambda b, h, q, k, row: (q - k) % rate == 0),
                (masks.global_tokens(n), lambda b, h, q, k, row: ((q >= 0) & (q < n)) | (k < n)),
                (
                    masks.global_tokens(flags),
                    lambda b, h, q, k, row: _clip(flags, b, q) | _clip(flags, b, k),
                ),
                (masks.lengths(per_batch), lambda b, h, q, k, row: k < per_batch[b]),
                (masks.lengths(q=per_batch), lambda b, h, q, k, row: row < per_batch[b]),
            ]
        )
    )
    causal = draw(st.booleans())
    built, plain = made
    if not causal:
        return built, plain, causal
    return built & masks.causal(), lambda b, h, q, k, row: plain(b, h, q, k, row) & (q >= k), causal


@given(_promised(), _sizes())
@settings(max_examples=400, deadline=None)
def test_no_dead_tile_is_kept(made: Any, sizes: dict[str, Any]) -> None:
    built, plain, _ = made
    found = block_map(built.tree, built.arrays, **sizes)
    _check(found, _entries(plain, sizes), sizes, exact=True)


@given(st.lists(_bounds(), min_size=2, max_size=4), _sizes())
@settings(max_examples=300, deadline=None)
def test_difference_constraints_are_exact_together(parts: list[Any], sizes: Any) -> None:
    description = parts[0]
    for part in parts[1:]:
        description = ("and", description, part)
    built = mask(
        lambda b, h, q, k: _written(
            description, {"b": b, "h": h, "q": q, "k": k, "row": expr.row}, {}
        )
    )

    def plain(b: Any, h: Any, q: Any, k: Any, row: Any) -> Any:
        return _computed(description, {"b": b, "h": h, "q": q, "k": k, "row": row}, {})

    found = block_map(built.tree, built.arrays, **sizes)
    _check(found, _entries(plain, sizes), sizes, exact=True)


@given(_promised(), _sizes())
@settings(max_examples=100, deadline=None)
def test_ranges_lists_and_rows_say_the_same(made: Any, sizes: dict[str, Any]) -> None:
    built, _, _ = made
    found = block_map(built.tree, built.arrays, **sizes)
    dense = found.dense()
    again = np.zeros_like(dense)
    for b, h, i, tiles in found.rows():
        for j, full in tiles:
            again[b, h, i, j] = 2 if full else 1
    np.testing.assert_array_equal(again, dense)
    assert found.live_count == (dense > 0).sum()
    assert found.full_count == (dense == 2).sum()
    assert found.live_share == pytest.approx((dense > 0).mean())
    *ends, contiguous = block_ranges(HOST, dense.astype(np.int64))
    assert (found.kind == "ranges") == bool(contiguous.all())
    if found.kind == "ranges":
        for name, end in zip(("start", "stop", "full_start", "full_stop"), ends, strict=True):
            stored = getattr(found, name)
            assert stored.dtype == np.int32
            np.testing.assert_array_equal(stored, end)
        assert (found.start <= found.full_start).all()
        assert (found.full_stop <= found.stop).all()


def test_full_where_everything_is_allowed() -> None:
    found = block_map(None, q_len=10, k_len=7, block_q=4, block_k=4)
    assert found.kind == "ranges"
    assert (found.dense() == 2).all()
    found = block_map(masks.causal().tree, q_len=12, k_len=12, block_q=4, block_k=4)
    np.testing.assert_array_equal(found.dense()[0, 0], [[1, 0, 0], [2, 1, 0], [2, 2, 1]])


def test_a_tile_cut_by_a_length_is_partial() -> None:
    found = block_map(
        None, q_len=8, k_len=8, block_q=4, block_k=4, batch=3, kv_lengths=np.array([8, 5, 0])
    )
    np.testing.assert_array_equal(found.dense()[:, 0, 0], [[2, 2], [2, 1], [0, 0]])


@pytest.mark.parametrize(
    ("built", "given", "extents"),
    [
        (masks.causal(), {}, (1, 1)),
        (masks.causal(), {"offsets": np.array([0, 4, 8])}, (3, 1)),
        (masks.prefix(np.array([1, 2, 3])), {}, (3, 1)),
        (mask(lambda b, h, q, k: q - k <= 4 * h), {}, (1, 2)),
        (masks.dense(np.ones((8, 8), bool)), {"offsets": np.array([0, 4, 8])}, (1, 1)),
        (masks.causal(), {"kv_lengths": np.array([3, 4, 5])}, (3, 1)),
    ],
)
def test_the_map_is_as_small_as_what_it_depends_on(built: Mask, given: Any, extents: Any) -> None:
    found = block_map(
        built.tree, built.arrays, q_len=8, k_len=8, block_q=4, block_k=4, batch=3, heads=2, **given
    )
    assert (found.batch, found.heads) == extents


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 5), (5, 0), (0, 0)])
def test_empty_axes(q_len: int, k_len: int) -> None:
    sizes = {"q_len": q_len, "k_len": k_len, "block_q": 2, "block_k": 2}
    found = block_map(masks.causal().tree, **sizes)
    assert found.live_count == 0
    assert found.live_share == 0.0
    grid = block_grid(HOST, masks.causal().tree, **sizes)
    assert grid.shape == found.dense().shape
    assert block_ranges(HOST, grid)[0].shape == grid.shape[:-1]


def test_irregular_masks_are_exact_at_their_own_tile_size() -> None:
    rng = np.random.default_rng(3)
    table = rng.random((6, 7)) < 0.4
    found = block_map(
        (built := masks.blocks(table, 16)).tree,
        built.arrays,
        q_len=96,
        k_len=112,
        block_q=16,
        block_k=16,
    )
    np.testing.assert_array_equal(found.dense()[0, 0], np.where(table, 2, 0))
    dense = rng.random((1, 2, 50, 70)) < 0.02
    sizes = {"q_len": 50, "k_len": 70, "block_q": 8, "block_k": 24, "heads": 2}
    built = masks.dense(dense)
    found = block_map(built.tree, built.arrays, **sizes)
    _check(found, dense, sizes, exact=True)
    edges = rng.integers(0, 200, (60, 2))
    built = masks.graph(edges, 200)
    sizes = {"q_len": 200, "k_len": 200, "block_q": 32, "block_k": 64}
    allowed = np.zeros((1, 1, 200, 200), bool)
    allowed[0, 0, edges[:, 0], edges[:, 1]] = True
    _check(block_map(built.tree, built.arrays, **sizes), allowed, sizes, exact=True)


def test_a_million_causal_tokens() -> None:
    sizes = {"q_len": 10**6, "k_len": 10**6, "block_q": 128, "block_k": 128}
    tree = masks.causal().tree
    took = []
    for _ in range(3):
        began = time.process_time()
        found = block_map(tree, **sizes)
        took.append(time.process_time() - began)
    assert min(took) < 1.0
    tracemalloc.start()
    try:
        found = block_map(tree, **sizes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    rows = -(-(10**6) // 128)
    assert found.kind == "ranges"
    assert found.live_count == rows * (rows + 1) // 2
    # 10**6 is no multiple of 128, and the last tile is cut on both sides alike.
    assert found.full_count == rows * (rows - 1) // 2


def test_bad_tile_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"`block_q` and `block_k` must be at least 1. Got"):
        block_map(None, q_len=4, k_len=4, block_q=0, block_k=4)
