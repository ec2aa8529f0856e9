"""Every mask of the vocabulary against loops written from what its docstring says."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from support import entries, seen

import attn_core
from attn_core import masks

SHAPE = (2, 3, 7, 9)
OFFSETS: list[Any] = [0, 2, -3, 40, [1, -2]]

rng = np.random.default_rng(7)
each_offset = pytest.mark.parametrize("offset", OFFSETS, ids=str)


def check(mask, rule, offset=0, shape=SHAPE):
    """The mask's tree, and attention's own weights through it, against the rule."""
    wanted = entries(rule, shape, offset)
    assert (seen(mask, shape, offset) == wanted).all()
    batch, heads, rows, keys = shape
    query = np.zeros((batch, heads, rows, 2), "float32")
    key = np.zeros((batch, heads, keys, 2), "float32")
    start = np.array(offset) if np.ndim(offset) else offset
    weights = attn_core.attention(
        query, key, key, mask=mask, query_offset=start, return_weights=True
    ).weights
    assert ((weights > 0) == wanted).all()
    return wanted


@each_offset
def test_causal(offset):
    check(masks.causal(), lambda b, h, q, k, row: k <= q, offset)


@each_offset
@pytest.mark.parametrize("left", [0, 1, 2, 8, 9, 10**6, None])
@pytest.mark.parametrize("right", [0, 1, 2, 8, 9, 10**6, None])
def test_window_counts_neighbours(left, right, offset):
    if left is None and right is None:
        return
    before = float("inf") if left is None else left
    after = float("inf") if right is None else right

    def rule(b, h, q, k, row):
        return (k == q) or (k < q and q - k <= before) or (k > q and k - q <= after)

    check(masks.window(left, right), rule, offset)


def test_a_window_of_total_width_w_that_ends_at_the_query():
    wanted = check(
        masks.causal() & masks.window(left=3 - 1), lambda b, h, q, k, row: k in (q - 2, q - 1, q)
    )
    assert wanted[0, 0].sum(-1).tolist() == [1, 2, 3, 3, 3, 3, 3]


@each_offset
@pytest.mark.parametrize("length", [0, 1, 5, 9, 50, np.int64(4)])
def test_prefix(length, offset):
    check(masks.prefix(length), lambda b, h, q, k, row: k < length, offset)


@each_offset
@pytest.mark.parametrize("make", [list, np.array, lambda x: np.array(x, np.uint8)])
def test_prefix_per_batch(make, offset):
    held = [0, 5]
    check(masks.prefix(make(held)), lambda b, h, q, k, row: k < held[b], offset)


@each_offset
def test_prefix_language_model(offset):
    check(
        masks.causal() | masks.prefix(np.array([2, 4])),
        lambda b, h, q, k, row: k <= q or k < [2, 4][b],
        offset,
    )


@each_offset
def test_lengths(offset):
    kv, qs = [4, 9], [7, 2]
    check(masks.lengths(kv=np.array(kv)), lambda b, h, q, k, row: k < kv[b], offset)
    check(masks.lengths(q=qs), lambda b, h, q, k, row: row < qs[b], offset)
    check(masks.lengths(kv, qs), lambda b, h, q, k, row: k < kv[b] and row < qs[b], offset)


@pytest.mark.parametrize("offset", [0, 2, [1, 2]], ids=str)
def test_segments_by_position(offset):
    one = rng.integers(0, 3, 9)
    check(masks.segments(one), lambda b, h, q, k, row: one[q] == one[k], offset)
    two = np.sort(rng.integers(0, 3, (2, 9)), 1)
    check(masks.segments(two), lambda b, h, q, k, row: two[b, q] == two[b, k], offset)
    check(masks.segments(two.tolist()), lambda b, h, q, k, row: two[b, q] == two[b, k], offset)
    shared = two[:1]
    check(masks.segments(shared), lambda b, h, q, k, row: shared[0, q] == shared[0, k], offset)


def test_segments_are_compared_by_value_and_sign():
    ids = np.array([-1, -1, 2**31 - 1, 0, -(2**31), 0, -1, 7, 7])
    check(masks.segments(ids), lambda b, h, q, k, row: ids[q] == ids[k])


@each_offset
def test_segments_of_queries_and_keys_apart_are_read_by_row(offset):
    queries, keys = rng.integers(0, 3, 7), rng.integers(0, 3, 9)
    queries2, keys2 = rng.integers(0, 3, (2, 7)), rng.integers(0, 3, (2, 9))
    for q_ids in (queries, queries2):
        for k_ids in (keys, keys2):
            q_all = np.broadcast_to(q_ids, (2, 7))
            k_all = np.broadcast_to(k_ids, (2, 9))
            check(
                masks.segments(q_ids, k_ids),
                lambda b, h, q, k, row, x=q_all, y=k_all: x[b, row] == y[b, k],
                offset,
            )


@each_offset
@pytest.mark.parametrize("rate", [1, 2, 3, 20])
@pytest.mark.parametrize(("left", "right"), [(None, None), (0, 0), (2, None), (None, 1), (1, 2)])
def test_dilated(rate, left, right, offset):
    def rule(b, h, q, k, row):
        before = [q - rate * n for n in range((100 if left is None else left) + 1)]
        after = [q + rate * n for n in range((100 if right is None else right) + 1)]
        return k in before or k in after

    check(masks.dilated(rate, left, right), rule, offset)


@pytest.mark.parametrize("offset", [0, 2, 40, [1, 0]], ids=str)
@pytest.mark.parametrize("n", [0, 1, 3, 9, 100])
def test_the_first_tokens_are_global(n, offset):
    first = set(range(n))
    check(masks.global_tokens(n), lambda b, h, q, k, row: q in first or k in first, offset)


@pytest.mark.parametrize("offset", [0, 2, [1, 0]], ids=str)
def test_chosen_tokens_are_global(offset):
    one, two = rng.random(9) < 0.3, rng.random((2, 9)) < 0.3
    check(masks.global_tokens(one), lambda b, h, q, k, row: one[q] or one[k], offset)
    check(masks.global_tokens(one.tolist()), lambda b, h, q, k, row: one[q] or one[k], offset)
    check(masks.global_tokens(two), lambda b, h, q, k, row: two[b, q] or two[b, k], offset)


@each_offset
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_chunks(size, offset):
    def rule(b, h, q, k, row):
        start = q
        while start % size:
            start -= 1
        return start <= k < start + size

    check(masks.chunks(size), rule, offset)


@each_offset
@pytest.mark.parametrize(
    "shape",
    [(7, 9), (1, 9), (7, 1), (1, 1), (2, 3, 7, 9), (1, 3, 7, 9), (2, 1, 1, 9), (1, 1, 7, 1)],
)
def test_dense_is_read_by_row(shape, offset):
    array = rng.random(shape) < 0.5
    full = np.broadcast_to(array, SHAPE)
    wanted = check(masks.dense(array), lambda b, h, q, k, row: full[b, h, row, k], offset)
    query = np.zeros((2, 3, 7, 2), "float32")
    key = np.zeros((2, 3, 9, 2), "float32")
    got = attn_core.attention(query, key, key, mask=array, return_weights=True).weights
    assert ((got > 0) == wanted).all()


def test_dense_of_lists_and_of_strided_arrays():
    array = rng.random((9, 14)) < 0.5
    strided = array.T[::2]
    check(masks.dense(strided), lambda b, h, q, k, row: strided[row, k])
    check(masks.dense(strided.tolist()), lambda b, h, q, k, row: strided[row, k])


@pytest.mark.parametrize("offset", [0, 2, [1, 0]], ids=str)
@pytest.mark.parametrize("size", [1, 2, (2, 3), (5, 1)])
@pytest.mark.parametrize("lead", [(), (2, 3), (1, 3), (2, 1), (1, 1)])
def test_blocks(size, lead, offset):
    tall, wide = size if isinstance(size, tuple) else (size, size)
    table = rng.random((*lead, -(-9 // tall), -(-9 // wide))) < 0.5
    full = np.broadcast_to(table, (2, 3, *table.shape[-2:]))
    check(
        masks.blocks(table, size),
        lambda b, h, q, k, row: full[b, h, q // tall, k // wide],
        offset,
    )


# Graphs ----------------------------------------------------------------------------------------


def graph_rule(pairs, symmetric=False):
    edges = {(int(q), int(k)) for q, k in pairs}
    if symmetric:
        edges |= {(k, q) for q, k in edges}
    return lambda b, h, q, k, row: (q, k) in edges


def pairs_of(count, tall, wide, seed=0):
    drawn = np.random.default_rng(seed)
    return np.stack([drawn.integers(0, tall, count), drawn.integers(0, wide, count)], 1)


@each_offset
@pytest.mark.parametrize("symmetric", [False, True])
def test_graph_of_pairs(symmetric, offset):
    pairs = pairs_of(25, 9, 9)
    made = masks.graph(pairs, 9, symmetric=symmetric)
    wanted = check(made, graph_rule(pairs, symmetric), offset)
    assert wanted.any() or offset == 40


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65, 100])
@pytest.mark.parametrize("symmetric", [False, True])
def test_graph_of_every_size(size, symmetric):
    pairs = pairs_of(3 * size, size, size, size)
    pairs = np.concatenate([pairs, pairs[:2], [[size - 1, size - 1], [0, size - 1]]])
    made = masks.graph(pairs, size, symmetric=symmetric)
    check(made, graph_rule(pairs, symmetric), 0, (1, 1, size + 3, size + 5))


@each_offset
def test_graph_of_an_adjacency_that_is_not_square(offset):
    adjacency = rng.random((40, 70)) < 0.1
    pairs = np.argwhere(adjacency)
    shape = (1, 2, 45, 75)
    offset = offset[:1] if isinstance(offset, list) else offset
    check(masks.graph(adjacency), graph_rule(pairs), offset, shape)
    check(masks.graph(pairs, (40, 70)), graph_rule(pairs), offset, shape)
    check(masks.graph(adjacency.tolist()), graph_rule(pairs), offset, shape)
    check(masks.graph(adjacency, symmetric=True), graph_rule(pairs, True), offset, shape)


@pytest.mark.parametrize(
    "edges", [[], np.zeros((0, 2), int), np.zeros((5, 5), bool), np.zeros((0, 0), bool)], ids=len
)
def test_graph_without_edges(edges):
    shape = None if isinstance(edges, np.ndarray) and edges.dtype == bool else 5
    check(masks.graph(edges, shape), lambda *_: False)
    check(masks.graph(edges, shape, symmetric=True), lambda *_: False)


def test_graph_of_lists_and_full_tiles():
    check(masks.graph([(0, 1), (1, 0), (0, 1)], 3), graph_rule([(0, 1), (1, 0)]))
    full = np.ones((64, 64), bool)
    check(masks.graph(full), lambda b, h, q, k, row: True, 0, (1, 1, 64, 64))


def test_graph_memory_is_two_level():
    made = masks.graph(pairs_of(50, 10_000, 10_000), 10_000)
    assert sum(a.nbytes for a in made.arrays) <= 4 * (10_000 // 32 + 1) ** 2 + 128 * 51


# Composition -----------------------------------------------------------------------------------

PARTS = {
    "causal": (masks.causal(), lambda b, h, q, k, row: q >= k),
    "window": (masks.window(2, 1), lambda b, h, q, k, row: -1 <= q - k <= 2),
    "prefix": (masks.prefix([2, 4]), lambda b, h, q, k, row: k < [2, 4][b]),
    "dilated": (masks.dilated(3), lambda b, h, q, k, row: (q - k) % 3 == 0),
    "chunks": (masks.chunks(4), lambda b, h, q, k, row: q // 4 == k // 4),
    "head": (attn_core.mask(lambda b, h, q, k: h == 1), lambda b, h, q, k, row: h == 1),
    "row": (
        attn_core.mask(lambda b, h, q, k: attn_core.row > k),
        lambda b, h, q, k, row: row > k,
    ),
    "graph": (masks.graph([(0, 1), (3, 2), (5, 5)], 9), graph_rule([(0, 1), (3, 2), (5, 5)])),
}


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.sampled_from(sorted(PARTS)),
        lambda below: st.one_of(
            st.tuples(st.sampled_from("&|^"), below, below), st.tuples(st.just("~"), below)
        ),
        max_leaves=6,
    ),
    st.sampled_from(OFFSETS),
)
def test_composition(node, offset):
    def build(node):
        if isinstance(node, str):
            return PARTS[node]
        if node[0] == "~":
            mask, rule = build(node[1])
            return ~mask, lambda *at: not rule(*at)
        (x, f), (y, g) = build(node[1]), build(node[2])
        if node[0] == "&":
            return x & y, lambda *at: f(*at) and g(*at)
        if node[0] == "|":
            return x | y, lambda *at: f(*at) or g(*at)
        return x ^ y, lambda *at: f(*at) != g(*at)

    mask, rule = build(node)
    check(mask, rule, offset)


def test_bigbird():
    size, local, first = 2, 1, 1
    drawn = rng.random((5, 5)) < 0.2
    made = (
        masks.blocks(drawn, size)
        | attn_core.mask(lambda b, h, q, k: abs(q // size - k // size) <= local)
        | masks.global_tokens(first * size)
    )

    def rule(b, h, q, k, row):
        near = abs(q // size - k // size) <= local
        return drawn[q // size, k // size] or near or q < first * size or k < first * size

    check(made, rule)


# Bad input -------------------------------------------------------------------------------------

REFUSED = {
    "window none": (lambda: masks.window(), TypeError, "`left` or `right` must be given"),
    "window negative": (
        lambda: masks.window(-1),
        ValueError,
        "`left` must not be negative. Got -1",
    ),
    "window right": (lambda: masks.window(right=-2), ValueError, "`right` must not be negative"),
    "window float": (
        lambda: masks.window(1.0),
        TypeError,
        "`left` must be a Python int. Got float",
    ),
    "window bool": (lambda: masks.window(True), TypeError, "`left` must be a Python int. Got bool"),
    "window array": (lambda: masks.window(np.array(3)), TypeError, "`left` must be a Python int"),
    "prefix negative": (lambda: masks.prefix(-1), ValueError, "`length` must not be negative"),
    "prefix float": (lambda: masks.prefix(1.5), TypeError, "`length` must be an integer array"),
    "prefix bool": (lambda: masks.prefix(True), TypeError, "`length` must be"),
    "prefix floats": (lambda: masks.prefix([1.0]), TypeError, "`length` must be an integer array"),
    "prefix matrix": (lambda: masks.prefix([[1]]), TypeError, "`length` must be an integer array"),
    "lengths none": (lambda: masks.lengths(), TypeError, "`kv` or `q` must be given"),
    "lengths int": (lambda: masks.lengths(3), TypeError, "`kv` must be an integer array"),
    "lengths bools": (lambda: masks.lengths(q=[True]), TypeError, "`q` must be an integer array"),
    "segments floats": (lambda: masks.segments([0.0]), TypeError, "`ids` must be an integer array"),
    "segments rank": (
        lambda: masks.segments(np.zeros((1, 1, 2), int)),
        TypeError,
        "`ids` must be an integer array (T,) or (B, T)",
    ),
    "segments keys": (lambda: masks.segments([0], [0.5]), TypeError, "`kv_ids` must be an integer"),
    "dilated zero": (lambda: masks.dilated(0), ValueError, "`rate` must be at least 1. Got 0"),
    "dilated float": (lambda: masks.dilated(2.0), TypeError, "`rate` must be a Python int"),
    "dilated left": (lambda: masks.dilated(2, -1), ValueError, "`left` must not be negative"),
    "global negative": (
        lambda: masks.global_tokens(-1),
        ValueError,
        "`tokens` must not be negative",
    ),
    "global ints": (lambda: masks.global_tokens([1, 0]), TypeError, "`tokens` must be boolean"),
    "global rank": (
        lambda: masks.global_tokens(np.ones((1, 1, 1), bool)),
        ValueError,
        "`tokens` must have rank 1 or 2",
    ),
    "chunks zero": (lambda: masks.chunks(0), ValueError, "`size` must be at least 1. Got 0"),
    "chunks float": (lambda: masks.chunks(2.0), TypeError, "`size` must be a Python int"),
    "dense ints": (lambda: masks.dense(np.ones((2, 2), int)), TypeError, "`array` must be boolean"),
    "dense floats": (lambda: masks.dense(np.ones((2, 2))), TypeError, "is `bias=`"),
    "dense rank 1": (lambda: masks.dense(np.ones(2, bool)), ValueError, "must have rank"),
    "dense rank 3": (lambda: masks.dense(np.ones((2, 3, 3), bool)), ValueError, "`array[:, None]`"),
    "dense rank 3 heads": (
        lambda: masks.dense(np.ones((2, 3, 3), bool)),
        ValueError,
        "`array[None]`",
    ),
    "dense function": (lambda: masks.dense(lambda: 1), TypeError, "must be a list"),
    "blocks ints": (lambda: masks.blocks([[1]], 2), TypeError, "`table` must be boolean"),
    "blocks rank": (lambda: masks.blocks([True], 2), ValueError, "`table` must have rank 2 or 4"),
    "blocks size": (lambda: masks.blocks([[True]], 0), ValueError, "`size` must be at least 1"),
    "blocks float": (lambda: masks.blocks([[True]], 2.0), TypeError, "`size` must be a Python int"),
    "graph no shape": (lambda: masks.graph([(0, 1)]), TypeError, "`shape` must be given"),
    "graph outside": (lambda: masks.graph([(0, 5)], 5), ValueError, "`edges` must lie within"),
    "graph negative": (lambda: masks.graph([(-1, 0)], 5), ValueError, "`edges` must lie within"),
    "graph triples": (
        lambda: masks.graph([(0, 1, 2)], 5),
        TypeError,
        "`edges` must be integer pairs",
    ),
    "graph floats": (
        lambda: masks.graph([(0.0, 1.0)], 5),
        TypeError,
        "`edges` must be integer pairs",
    ),
    "graph ints": (
        lambda: masks.graph(np.ones((5, 5), int), 5),
        TypeError,
        "or a boolean adjacency (Tq, Tk)",
    ),
    "graph other": (lambda: masks.graph("edges", 5), TypeError, "`edges` must be a NumPy array"),
    "graph shape disagrees": (
        lambda: masks.graph(np.ones((5, 5), bool), (5, 6)),
        ValueError,
        "`shape` must be the adjacency's, (5, 5). Got (5, 6)",
    ),
    "graph shape float": (lambda: masks.graph([(0, 1)], 5.0), TypeError, "`shape` must be"),
    "graph shape of one": (lambda: masks.graph([(0, 1)], (5,)), TypeError, "`shape` must be"),
    "graph shape of floats": (
        lambda: masks.graph([(0, 1)], (5.5, 5)),
        TypeError,
        "`shape` must be",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error
    assert words in str(caught.value)
