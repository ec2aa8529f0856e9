"""Every score of the vocabulary against loops and formulas written from its paper."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from support import offsets, scored

import attn_core
from attn_core import scores

SHAPE = (2, 5, 6, 8)
rng = np.random.default_rng(11)
S = rng.standard_normal(SHAPE) * 4


def loops(rule, s=S, offset=0):
    """rule(s, b, h, q, k) on Python numbers."""
    shift = offsets(offset, s.shape[0])
    out = np.empty(s.shape)
    for b, h, i, k in np.ndindex(*s.shape):
        out[b, h, i, k] = rule(float(s[b, h, i, k]), b, h, i + shift[b], k)
    return out


def check(made, rule, offset=0, s=S):
    np.testing.assert_allclose(scored(made, s, offset), loops(rule, s, offset), rtol=1e-13)
    single = scored(made, s.astype("float32"), offset)
    np.testing.assert_allclose(single, loops(rule, s, offset), rtol=1e-5, atol=1e-5)


# Softcap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [0.5, 2, 50.0, np.float32(2), np.array(3.0), np.int64(4)])
def test_softcap(cap):
    c = float(cap)
    check(scores.softcap(cap), lambda s, b, h, q, k: c * math.tanh(s / c))


def test_softcap_bounds_and_is_the_identity_near_zero():
    found = scored(
        scores.softcap(30.0), np.array([-1e9, -1e-3, 0.0, 1e-3, 1e9]).reshape(1, 1, 1, 5)
    )
    assert found.ravel() == pytest.approx([-30.0, -1e-3, 0.0, 1e-3, 30.0])


def test_softcap_comes_before_bias():
    x = np.ones((1, 1, 1, 1))
    two = np.ones((1, 1, 2, 1)) * np.array([[3.0], [0.0]])
    bias = np.array([[0.0, 5.0]])
    out = attn_core.attention(
        x, two, two, score=scores.softcap(1.0), bias=bias, scale=1.0, return_lse=True
    )
    assert out.lse.item() == pytest.approx(math.log(math.exp(math.tanh(3.0)) + math.exp(5.0)))


# ALiBi -----------------------------------------------------------------------------------------


def paper_slopes(n):
    """`get_slopes` as Press et al. published it."""

    def power_of_two(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return power_of_two(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_two(closest) + paper_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20, 24, 32, 33, 64, 71, 128])
def test_alibi_has_the_papers_slopes(heads):
    s = np.zeros((1, heads, 1, 2))
    found = scored(scores.alibi(heads=heads), s)
    np.testing.assert_allclose(-found[0, :, 0, 1], paper_slopes(heads), rtol=1e-14)
    assert (found[0, :, 0, 0] == 0).all()


@pytest.mark.parametrize("offset", [0, 3, -4, [2, -1]], ids=str)
def test_alibi(offset):
    slopes = rng.standard_normal(5)
    for given in (slopes, slopes.tolist(), tuple(slopes)):
        check(
            scores.alibi(given),
            lambda s, b, h, q, k: s - float(slopes[h]) * (q - k if q > k else k - q),
            offset,
        )


# Relative bias ---------------------------------------------------------------------------------


def t5_bucket(relative, bidirectional, buckets, max_distance):
    """T5's `_relative_position_bucket` on one position, with the logarithm exact.

    relative = memory position - query position. floor(log(n / e) / log(m / e) * w) is the largest
    j with (n / e) ** w >= (m / e) ** j, which rational numbers decide without rounding.
    """
    found, n = 0, -relative
    if bidirectional:
        buckets //= 2
        found += buckets if n < 0 else 0
        n = abs(n)
    else:
        n = max(n, 0)
    max_exact = buckets // 2
    if n < max_exact:
        return found + n
    wide = buckets - max_exact
    there, step = Fraction(n, max_exact) ** wide, Fraction(max_distance, max_exact)
    j = 0
    while j < wide and there >= step ** (j + 1):
        j += 1
    return found + min(max_exact + j, buckets - 1)


def t5_bucket_float(relative, bidirectional, buckets, max_distance):
    """The same as it is published, in float64; None where rounding decides."""
    found, n = 0, -relative
    if bidirectional:
        buckets //= 2
        found += (n < 0) * buckets
        n = abs(n)
    else:
        n = max(n, 0)
    max_exact = buckets // 2
    if n < max_exact:
        return found + n
    value = math.log(n / max_exact) / math.log(max_distance / max_exact) * (buckets - max_exact)
    if abs(value - round(value)) < 1e-9:
        return None
    return found + min(max_exact + int(value), buckets - 1)


T5 = [
    (buckets, bidirectional, distance)
    for buckets in (4, 6, 8, 32, 64)
    for bidirectional in (True, False)
    for distance in (17, 20, 100, 128, 1000)
    if distance > buckets // (4 if bidirectional else 2)
]


def buckets_of(made, count, reach):
    """The bucket read for each k - q in [-reach, reach], from a table that holds its own rows."""
    s = np.zeros((1, 1, 1, 2 * reach + 1))
    return scored(made, s, reach).astype(int).ravel()


@pytest.mark.parametrize(("buckets", "bidirectional", "distance"), T5)
def test_t5_buckets(buckets, bidirectional, distance):
    table = np.arange(buckets, dtype=float)[:, None]
    made = scores.relative_bias(table, bidirectional=bidirectional, max_distance=distance)
    reach = distance + 40
    found = buckets_of(made, buckets, reach).tolist()
    relative = range(-reach, reach + 1)
    arguments = (bidirectional, buckets, distance)
    assert found == [t5_bucket(r, *arguments) for r in relative]
    published = [t5_bucket_float(r, *arguments) for r in relative]
    apart = [
        (r, x, y)
        for r, x, y in zip(relative, found, published, strict=True)
        if y is not None and x != y
    ]
    assert not apart
    assert sum(y is None for y in published) < 60
    # Every bucket but one is used: a bidirectional bucket half + 0 would be a key at distance 0.
    half = buckets // 2
    if distance >= 100:
        assert set(found) == set(range(buckets)) - ({half} if bidirectional else set())


def test_t5_defaults_are_the_papers():
    made = scores.relative_bias(np.arange(32.0)[:, None])
    found = buckets_of(made, 32, 300)
    assert found.tolist() == [t5_bucket(r, True, 32, 128) for r in range(-300, 301)]
    far = [found[300 - n] for n in (0, 1, 7, 8, 11, 12, 16, 23, 32, 64, 91, 127, 128, 300)]
    assert far == [0, 1, 7, 8, 8, 9, 10, 11, 12, 14, 15, 15, 15, 15]


@pytest.mark.parametrize("offset", [0, 3, -4, [2, -1]], ids=str)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_adds_the_bias_of_each_head(offset, bidirectional):
    table = rng.standard_normal((8, 5))
    check(
        scores.relative_bias(table, bidirectional=bidirectional, max_distance=10),
        lambda s, b, h, q, k: s + float(table[t5_bucket(k - q, bidirectional, 8, 10), h]),
        offset,
    )


@pytest.mark.parametrize("offset", [0, 3, -4, [2, -1]], ids=str)
@pytest.mark.parametrize("reach", [0, 1, 3, 20])
def test_clipped(offset, reach):
    table = rng.standard_normal((2 * reach + 1, 5))

    def rule(s, b, h, q, k):
        return s + float(table[max(-reach, min(k - q, reach)) + reach, h])

    check(scores.relative_bias(table, buckets="clipped"), rule, offset)
    check(scores.relative_bias(table.tolist(), buckets="clipped"), rule, offset)


# Composition -----------------------------------------------------------------------------------


def test_then_applies_from_left_to_right():
    slopes = rng.random(5)
    alibi, cap = scores.alibi(slopes), scores.softcap(2.0)

    def add(s, h, q, k):
        return s - float(slopes[h]) * abs(q - k)

    check(alibi.then(cap), lambda s, b, h, q, k: 2 * math.tanh(add(s, h, q, k) / 2))
    check(cap.then(alibi), lambda s, b, h, q, k: add(2 * math.tanh(s / 2), h, q, k))
    assert not np.allclose(scored(alibi.then(cap), S), scored(cap.then(alibi), S))


def test_then_is_associative_and_keeps_operands_apart():
    one, two = rng.random(5), rng.random((3, 5))
    a, b, c = scores.alibi(one), scores.softcap(2.0), scores.relative_bias(two, buckets="clipped")
    assert a.then(b).then(c).tree == a.then(b.then(c)).tree
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert [x is y for x, y in zip(left.arrays, right.arrays, strict=True)] == [True, True]
    assert (scored(left, S) == scored(right, S)).all()
    assert len(a.then(a).arrays) == 1
    check(a.then(a), lambda s, b, h, q, k: s - 2 * float(one[h]) * abs(q - k))


def test_then_of_a_score_that_ignores_s():
    flat = attn_core.score(lambda s, b, h, q, k: q - k)
    check(scores.softcap(1.0).then(flat), lambda s, b, h, q, k: q - k)
    check(flat.then(scores.softcap(1.0)), lambda s, b, h, q, k: math.tanh(q - k))


# Bad input -------------------------------------------------------------------------------------

REFUSED = {
    "cap zero": (lambda: scores.softcap(0.0), ValueError, "`cap` must be positive"),
    "cap negative": (lambda: scores.softcap(-1), ValueError, "`cap` must be positive"),
    "cap negative float32": (lambda: scores.softcap(np.float32(-1)), ValueError, "`cap` must be"),
    "cap nan": (lambda: scores.softcap(math.nan), ValueError, "`cap` must be positive"),
    "cap infinite": (lambda: scores.softcap(math.inf), ValueError, "and finite. Got inf"),
    "cap string": (lambda: scores.softcap("50"), TypeError, "Got str"),
    "cap vector": (lambda: scores.softcap(np.ones(3)), TypeError, "operand"),
    "alibi nothing": (lambda: scores.alibi(), TypeError, "one of `slopes` and `heads`"),
    "alibi both": (lambda: scores.alibi([0.5], heads=1), TypeError, "one of `slopes` and `heads`"),
    "alibi heads": (lambda: scores.alibi(heads=0), ValueError, "`heads` must be at least 1. Got 0"),
    "alibi int": (lambda: scores.alibi(8), TypeError, "`slopes` must be a float array"),
    "alibi ints": (lambda: scores.alibi([1, 2]), TypeError, "`slopes` must be a float array"),
    "alibi rank": (lambda: scores.alibi(np.ones((1, 2))), TypeError, "shape (Hq,)"),
    "table ints": (
        lambda: scores.relative_bias(np.ones((4, 2), int)),
        TypeError,
        "`table` must be a float array (buckets, Hq)",
    ),
    "table rank": (lambda: scores.relative_bias(np.ones(8)), TypeError, "(buckets, Hq)"),
    "table odd": (lambda: scores.relative_bias(np.ones((7, 2))), ValueError, "Got 7 buckets"),
    "table small": (lambda: scores.relative_bias(np.ones((2, 2))), ValueError, "Got 2 buckets"),
    "table distance": (
        lambda: scores.relative_bias(np.ones((32, 2)), max_distance=8),
        ValueError,
        "`max_distance` exceed",
    ),
    "table clipped even": (
        lambda: scores.relative_bias(np.ones((4, 2)), buckets="clipped"),
        ValueError,
        "2 n + 1 buckets",
    ),
    "cap text": (lambda: scores.softcap("5"), TypeError, "a scalar array. Got str"),
    "cap list": (lambda: scores.softcap([5.0]), TypeError, "a scalar array. Got list"),
    "cap bool": (lambda: scores.softcap(True), TypeError, "a scalar array. Got bool"),
    "buckets": (
        lambda: scores.relative_bias(np.ones((8, 2)), buckets="swin"),
        ValueError,
        '`buckets` must be "t5" or "clipped". Got \'swin\'',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error
    assert words in str(caught.value)
