"""Rules, positions, seeds, and the arithmetic of caches."""

import numpy as np
import pytest
from support import entries, scored, seen

from attn_core import AttentionConfig, Dropout, TransformerConfig, masks, scores
from attn_core.model import cache, calls, positions, seeds
from attn_core.model.rules import joined_mask, joined_score, rules

# --- rules -----------------------------------------------------------------------------------

SHAPE = (2, 4, 5, 7)


def test_masks_of_a_config_and_of_the_call_are_all_in_force():
    config = AttentionConfig(8, 4, causal=True, window=2, mask="k != 1")
    array = np.random.default_rng(0).random(SHAPE) < 0.7
    rule = lambda b, h, q, k, row: q >= k and q - k <= 2 and k != 1  # noqa: E731
    own = rules(config).mask
    assert np.array_equal(seen(own, SHAPE, 1), entries(rule, SHAPE, 1))
    both = lambda b, h, q, k, row: rule(b, h, q, k, row) and array[b, h, row, k]  # noqa: E731
    for given in (array, masks.dense(array)):
        found = seen(joined_mask(own, given), SHAPE, 1)
        assert np.array_equal(found, entries(both, SHAPE, 1))
    assert joined_mask(own, None) is own
    assert joined_mask(None, array) is array
    assert rules(AttentionConfig(8, 4)) == (None, None, None)


@pytest.mark.parametrize("wrong", [np.zeros((5, 7)), np.ones((2, 5, 7), bool), [[True]], "causal"])
def test_what_is_no_mask_goes_on_alone(wrong):
    """`attention` refuses it in its own words."""
    assert joined_mask(masks.causal(), wrong) is wrong


def test_scores_come_in_order():
    own = rules(AttentionConfig(8, 4, positions="alibi", softcap=3.0))
    s = np.random.default_rng(1).standard_normal(SHAPE)
    slopes = 2.0 ** (-2.0 * np.arange(1, 5))[None, :, None, None]
    away = abs(np.arange(5)[:, None] - np.arange(7))
    want = 3 * np.tanh(np.tanh(s - slopes * away) / 3)
    found = scored(joined_score(own, scores.softcap(1.0)), s)
    assert np.allclose(found, want, rtol=0, atol=1e-14)
    assert joined_score(own, 3) == 3
    assert joined_score(rules(AttentionConfig(8, 4)), None) is None


# --- positions -------------------------------------------------------------------------------


def angles(wheel, position, dtype):
    """The two lines of `positions`, in NumPy."""
    high, low = wheel.astype(np.int64)
    whole = np.asarray(position, np.int64)[..., None] * high
    wrapped = (whole + 2**31) % 2**32 - 2**31
    rest = np.asarray(position, dtype)[..., None] * low.astype(dtype)
    return wrapped.astype(dtype) * dtype(positions.TURN) + rest * dtype(positions.LOW)


@pytest.mark.parametrize("base", [10000.0, 5e5, 10.0])
def test_angles_are_right_at_any_position(base):
    wheel = positions.wheel(base, 64)
    assert wheel.dtype == np.int32
    assert wheel.shape == (2, 32)
    position = np.array([0, 1, 2, 17, 4096, 131072, 2**24 + 1, 2**28 - 1, -1, -5000])
    turns = base ** (-2.0 * np.arange(32) / 64)
    for dtype, within in ((np.float32, 2.0**-21), (np.float64, 2.0**-24)):
        found = angles(wheel, position, dtype).astype(np.float64)
        want = position[:, None] * turns
        assert abs(np.exp(1j * found) - np.exp(1j * want)).max() < within
    near = abs(position) < 5000
    exact = abs(np.exp(1j * angles(wheel, position, np.float64)) - np.exp(1j * want))[near]
    assert exact.max() < 1e-12


def test_float32_angles_are_why():
    """What the plain product is off by, far from the start."""
    plain = np.float32(131071) * np.float32(10000.0 ** (-2 / 64))
    assert abs(float(plain) - 131071 * 10000.0 ** (-2 / 64)) > 2.0**-21


def test_how_many_channels_turn():
    assert positions.turned(AttentionConfig(16, 2)) == 0
    assert positions.turned(AttentionConfig(16, 2, positions="rotary")) == 8
    assert positions.turned(AttentionConfig(16, 2, positions="rotary", rotary_fraction=0.25)) == 2


def test_where_rotary_rows_stand():
    keys, rows = np.array([7, 3]), np.array([5, 2])
    assert positions.offset(None, None, None, 4, 4) == 0
    assert positions.offset("start", keys, rows, 5, 7) == 0
    assert positions.offset("end", None, None, 5, 7) == 2
    assert positions.offset("end", keys, rows, 5, 7).tolist() == [2, 1]
    assert positions.offset("end", keys, None, 5, 7).tolist() == [2, -2]
    assert positions.offset(3, keys, rows, 5, 7) == 3
    for sizes in ((5, 7), (None, None), (5, None)):
        with pytest.raises(ValueError, match="`query_offset` must be given where Tq and Tk"):
            positions.offset(None, None, None, *sizes)
    with pytest.raises(ValueError, match="Got 'End'"):
        positions.offset("End", None, None, 5, 7)


# --- seeds -----------------------------------------------------------------------------------


def test_every_place_that_drops_has_a_number_of_its_own():
    config = TransformerConfig("encoder-decoder", 8, 2, 2, vocabulary=5, decoder_depth=1)
    found = seeds.sites(config)
    assert sorted(found.values()) == list(range(len(found)))
    assert list(found) == [
        "encoder.embedding",
        "encoder.0.attention.weights",
        "encoder.0.attention",
        "encoder.0.feed",
        "encoder.1.attention.weights",
        "encoder.1.attention",
        "encoder.1.feed",
        "decoder.embedding",
        "decoder.0.attention.weights",
        "decoder.0.attention",
        "decoder.0.cross.weights",
        "decoder.0.cross",
        "decoder.0.feed",
    ]


def test_seeds_of_a_step():
    assert seeds.step_seed(7) == (7, 0)
    assert seeds.step_seed(-1) == (2**32 - 1, 2**32 - 1)
    assert seeds.step_seed(np.int64(2**40 + 3)) == (3, 2**8)
    assert seeds.step_seed(2**64 + 3) == seeds.step_seed(3)
    assert type(seeds.step_seed(np.array(5, np.uint8))[0]) is int
    assert Dropout(0.1, seeds.key((9, 0), 4)).seed == (9, 4)  # below 2**32 the seed and the site
    keys = {
        seeds.key(seeds.step_seed(run << 32 | 7), site) for run in range(99) for site in range(99)
    }
    assert len(keys) == 99 * 99  # runs side by side, and no two of their places alike
    assert seeds.key((0, 2**32 - 1), 2**20)[1] == ((2**32 - 1) * seeds.MIX + 2**20) % 2**32
    assert (2**32 - 1) * seeds.MIX + 2**32 < 2**63  # in an int64
    for wrong in (True, 1.5, "1", np.array(1.5)):
        with pytest.raises(TypeError, match="`seed` must be an int or an integer scalar array"):
            seeds.step_seed(wrong)
    with pytest.raises(ValueError, match="`seed` must be given in training with dropout"):
        seeds.step_seed(None)
    with pytest.raises(ValueError, match=r"one number for the whole step. Got shape \(2,\)"):
        seeds.step_seed(np.array([1, 2], np.uint32))


# --- caches ----------------------------------------------------------------------------------


def test_filling_a_cache_is_what_a_loop_does():
    rng = np.random.default_rng(2)
    size, most = 9, 4
    lengths, counts = np.array([0, 3, 8, 5], np.int32), np.array([4, 0, 1, 2], np.int32)
    held, new = rng.random((4, size)), rng.random((4, most))
    rows, slots = np.arange(most, dtype=np.int32), np.arange(size, dtype=np.int32)
    found = cache.filling(lengths, counts, rows, slots, size)
    got = np.where(found.written, np.take_along_axis(new, found.source.clip(0, most - 1), 1), held)
    want = held.copy()
    for b in range(4):
        for i in range(counts[b]):
            want[b, lengths[b] + i] = new[b, i]
            assert found.positions[b, i] == lengths[b] + i
    assert np.array_equal(got, want)
    assert found.lengths.tolist() == [4, 3, 9, 7]
    assert not found.full.any()
    assert all(x.dtype == np.int32 for x in (found.positions, found.source, found.lengths))


def test_a_cache_without_room():
    lengths, counts = np.array([0, 3], np.int32), np.array([4, 2], np.int32)
    ints = np.arange(4, dtype=np.int32)
    assert cache.filling(lengths, counts, ints, ints, 4).full.tolist() == [False, True]
    cache.check_room(lengths, counts, 5)
    with pytest.raises(ValueError, match="Got 2 for row 1 of the batch, in which 3 of 4 slots are"):
        cache.check_room(lengths, counts, 4)


# --- calls -----------------------------------------------------------------------------------

CONFIG = AttentionConfig(8, 2, kv_heads=1, key_input=6, value_input=5)
DECODER = TransformerConfig("decoder", 8, 1, 2, vocabulary=5)
LEARNED = TransformerConfig("decoder", 8, 1, 2, vocabulary=5, positions="learned", max_length=7)
BOTH = TransformerConfig("encoder-decoder", 8, 1, 2, vocabulary=5)
Q, K, V = (2, 3, 8), (2, 4, 6), (2, 4, 5)

CALLS = {
    "rank": (lambda: calls.check_inputs(CONFIG, (3, 8), K, V), r"`query` .* \(B, T, 8\). Got"),
    "width": (lambda: calls.check_inputs(CONFIG, (2, 3, 6), K, V), "`query` must have shape"),
    "key width": (lambda: calls.check_inputs(CONFIG, Q, (2, 4, 8), V), r"`key` .* \(B, T, 6\)"),
    "value": (lambda: calls.check_inputs(CONFIG, Q, K, K), r"`value` must have shape \(B, T, 5\)"),
    "batch": (lambda: calls.check_inputs(CONFIG, Q, (3, 4, 6), V), "the batch of `query`, 2"),
    "rows": (lambda: calls.check_inputs(CONFIG, Q, K, (2, 3, 5)), "as many rows as `key`, 4"),
    "cache of another layer": (
        lambda: calls.check_kept("cache", CONFIG, (2, 9, 2, 4), (2, 9, 1, 4), Q),
        r"`cache` must be one of this layer and batch: keys \(B, S, Hk, D\) = \(2, S, 1, 4\)",
    ),
    "cache of another batch": (
        lambda: calls.check_kept("cache", CONFIG, (3, 9, 1, 4), (3, 9, 1, 4), Q),
        "of this layer and batch",
    ),
    "lengths beside a cache": (
        lambda: calls.check_cached(Q, Q, 9, [1, 2], None),
        "`kv_lengths` must be left out with a cache",
    ),
    "offset beside a cache": (
        lambda: calls.check_cached(Q, Q, 9, None, 0),
        "`query_offset` must be left out with a cache",
    ),
    "other rows beside a cache": (
        lambda: calls.check_cached(Q, (2, 4, 8), 9, None, None),
        "`key` must have the rows of `query`, 3",
    ),
    "more rows than slots": (
        lambda: calls.check_cached(Q, Q, 2, None, None),
        "room for the new rows. Got 3 rows and 2 slots",
    ),
    "positions that nothing reads": (
        lambda: calls.check_positions(CONFIG, (3,), Q, True),
        "`positions` must be left out but for self-attention with rotary",
    ),
    "lengths of another batch": (
        lambda: calls.check_lengths("q_lengths", (3,), Q),
        r"`q_lengths` must be an int or have shape \(B,\) = \(2,\). Got \(3,\)",
    ),
    "lengths of a source that is not given": (
        lambda: calls.check_source(DECODER, False, None, [1]),
        "`source_lengths` must be left out where no `source` is given",
    ),
    "lengths of a source that a cache holds": (
        lambda: calls.check_source(BOTH, False, True, [1]),
        "`source_lengths` must be left out where no `source` is given",
    ),
    "an empty prompt": (
        lambda: calls.check_prompt(DECODER, (2, 0), 3, None),
        r"T at least 1. Got \(2, 0\)",
    ),
    "a prompt of vectors": (
        lambda: calls.check_prompt(DECODER, (2, 3, 4), 3, None),
        "`prompt` must be int",
    ),
    "a prompt past the learned positions": (
        lambda: calls.check_prompt(LEARNED, (2, 8), 0, None),
        "`prompt` must not be longer than `max_length` = 7.*Got 8",
    ),
    "steps past the learned positions": (
        lambda: calls.check_prompt(LEARNED, (2, 5), 4, None),
        "`steps` must be at most 3 after 5 tokens, where `max_length` = 7.*Got 4",
    ),
    "steps back": (
        lambda: calls.check_prompt(DECODER, (2, 3), -1, None),
        "`steps` must be at least 0. Got -1",
    ),
    "a stop that is no int": (
        lambda: calls.check_prompt(DECODER, (2, 3), 1, 1.5),
        "`stop` must be an int. Got 1.5",
    ),
    "a stop for each row": (
        lambda: calls.check_prompt(DECODER, (2, 3), 1, [1, 2]),
        r"`stop` must be an int. Got \[1, 2\]",
    ),
    "a stop that is no token": (
        lambda: calls.check_prompt(DECODER, (2, 3), 1, DECODER.vocabulary),
        "`stop` must be below the vocabulary",
    ),
    "a stop below all tokens": (
        lambda: calls.check_prompt(DECODER, (2, 3), 1, -1),
        "`stop` must be at least 0. Got -1",
    ),
    "what a call returned as the cache": (
        lambda: calls.check_kind("cache", cache.LayerOutput(1), cache.Cache),
        "`cache` must be a Cache, as `make_cache` gives it. Got LayerOutput",
    ),
    "value beside a memory": (
        lambda: calls.check_memory(3, None, None),
        "`value` must be left out where `key` is a Memory",
    ),
    "cache beside a memory": (lambda: calls.check_memory(None, None, 3), "`cache` must be left"),
    "lengths beside a memory": (lambda: calls.check_memory(None, 3, None), "`kv_lengths` must be"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls(name):
    call, words = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_right_calls_and_unknown_sizes():
    calls.check_inputs(CONFIG, Q, K, V)
    calls.check_inputs(CONFIG, (None, None, 8), (2, None, 6), (None, 7, 5))
    calls.check_kept("cache", CONFIG, (2, 9, 1, 4), (2, 9, 1, 4), Q)
    calls.check_cached((None, None, 8), (2, None, 8), 9, None, None)
    for shape in ((), (2,)):
        calls.check_lengths("q_lengths", shape, Q)
    calls.check_source(BOTH, True, None, [1])
    calls.check_prompt(DECODER, (None, 3), 0, None)
    for stop in (0, np.int64(DECODER.vocabulary - 1)):
        calls.check_prompt(DECODER, (2, 3), 1, stop)
    rotary = AttentionConfig(8, 2, positions="rotary")
    calls.check_positions(rotary, (3,), Q, True)
    calls.check_positions(rotary, (2, 3), Q, True)
    for shape, own in (((3,), False), ((4,), True), ((1, 3), True)):
        with pytest.raises(ValueError, match="`positions` must"):
            calls.check_positions(rotary, shape, Q, own)
