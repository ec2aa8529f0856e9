"""The Triton reading against the NumPy reading: the same trees, the same tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support import host

import attn_core
from attn_core import masks, operand, score, scores
from attn_core.backends.numpy.arrays import Reading
from attn_core.backends.torch.triton_call import forms
from attn_core.kernels.source import function, split, written
from attn_core.language.duals import differentiate
from attn_core.language.values import mask

ROWS, KEYS = 16, 32
RNG = np.random.default_rng(3)


@triton.jit
def probe(
    first, q, k, s, operands,
    FUNCTION: tl.constexpr, SCORE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The results of a device function over one tile, as float32, one after the other."""
    rows, keys = tl.arange(0, M), tl.arange(0, N)
    one = tl.zeros((1, 1), tl.int32)
    at = rows[:, None] * N + keys[None, :]
    q_pos, k_pos = tl.load(q + rows)[:, None], tl.load(k + keys)[None, :]
    if SCORE:
        found = FUNCTION(one + 1, one + 2, q_pos, k_pos, rows[:, None], tl.load(s + at), operands)
    else:
        found = FUNCTION(one + 1, one + 2, q_pos, k_pos, rows[:, None], operands)
    for n in tl.static_range(len(found)):
        value = tl.broadcast_to(found[n].to(tl.float32), (M, N))
        tl.store(first + n * M * N + at, value)


def arguments(arrays: Sequence[np.ndarray]) -> tuple[Any, ...]:
    found: list[Any] = []
    for x in arrays:
        tensor = torch.from_numpy(np.ascontiguousarray(x))
        tensor = tensor.view(torch.int8) if tensor.dtype == torch.bool else tensor
        found += [tensor, *x.shape]
    return tuple(found)


def both(
    tree: Any,
    arrays: Sequence[Any],
    *,
    q: Any = None,
    k: Any = None,
    s: np.ndarray | None = None,
    spans: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(found, wanted), each (results, ROWS, KEYS); floats wanted are computed in float64."""
    q = np.arange(ROWS, dtype=np.int32) + 5 if q is None else np.resize(np.int32(q), ROWS)
    k = np.arange(KEYS, dtype=np.int32) + 3 if k is None else np.resize(np.int32(k), KEYS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = host(tuple(arrays), "float32")
    form = tuple((x.ndim, x.dtype == bool, spans) for x in narrow)
    call = function(tree, form, s is not None).call
    out = torch.zeros(len(tree.results), ROWS, KEYS, device=device)
    logits = torch.zeros(ROWS, KEYS) if s is None else torch.from_numpy(s.astype(np.float32))
    given = [torch.from_numpy(q), torch.from_numpy(k), logits, *arguments(narrow)]
    given = [x.to(device) if isinstance(x, torch.Tensor) else x for x in given]
    options = {"FUNCTION": call, "SCORE": s is not None, "M": ROWS, "N": KEYS}
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy
        probe[(1,)](out, *given[:3], tuple(given[3:]), **options)
    index = {
        "b": np.int32([[1]]),
        "h": np.int32([[2]]),
        "q": q[:, None],
        "k": k[None, :],
        "row": np.arange(ROWS, dtype=np.int32)[:, None],
    }
    if s is not None:
        index["s"] = s.astype(np.float32).astype(np.float64)
    with np.errstate(all="ignore"):
        wanted = Reading("float64").read(tree, index, host(tuple(arrays), "float64"))
    return out.cpu().numpy(), np.stack(
        [np.broadcast_to(w, (ROWS, KEYS)).astype(np.float64) for w in wanted]
    )


MASKS: dict[str, Any] = {
    "causal": masks.causal(),
    "window": masks.window(3, 2),
    "not prefix": ~masks.prefix(np.int32([4, 9])),
    "segments": masks.segments(np.arange(40) // 7),
    "dilated": masks.dilated(3, left=9),
    "global": masks.global_tokens(np.arange(40) % 11 == 4),
    "chunks": masks.chunks(6),
    "dense": masks.dense(RNG.random((2, 4, 25, 40)) < 0.5),
    "dense of one entry": masks.dense(np.array([[True]])),
    "blocks": masks.blocks(RNG.random((5, 7)) < 0.5, 6),
    "nothing": mask(lambda b, h, q, k: k != k),
    "constant": mask(lambda b, h, q, k: q * 0 == 0),
    "by head": mask(lambda b, h, q, k: (q - k) % (h + 2) == b),
    "signs": mask(lambda b, h, q, k: (q - k) // 3 != (k - q) % -4),
    "shifts": mask(lambda b, h, q, k: ((q - 9) >> (k - 8)) < 0),
    "row": mask(lambda b, h, q, k: attn_core.row >= k - 3),
    "look-ups of look-ups": masks.segments(np.arange(40) // 7, np.arange(50) % 6),
    "int64": masks.segments(np.arange(40, dtype=np.int64) // 9),
    "int8": masks.segments((np.arange(40) // 9).astype(np.int8)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    made = MASKS[name]
    found, wanted = both(made.tree, made.arrays)
    np.testing.assert_array_equal(found, wanted)
    if name not in ("nothing", "constant", "dense of one entry"):
        assert 0 < wanted.sum() < wanted.size


INTS = [-9, -8, -7, -3, -2, -1, 0, 1, 2, 3, 5, 7, 8, 64, 2**31 - 1, -(2**31)]
INTEGER: dict[str, Any] = {
    "//": lambda q, k: q // k,
    "%": lambda q, k: q % k,
    "constant //": lambda q, k: 7 // k - q // -3,
    ">>": lambda q, k: q >> k,
    "minimum": attn_core.minimum,
    "maximum": attn_core.maximum,
    "abs": lambda q, k: abs(q // 2) - k // 4,
    "where": lambda q, k: attn_core.where(q > k, q, k // 2),
    "==": lambda q, k: (q == k) ^ (q < k),
    "and or not": lambda q, k: ((q < 3) & ~(k >= 0)) | (q == -9),
}


@pytest.mark.parametrize("name", INTEGER)
def test_integers(name: str) -> None:
    """Exact, at the ends of int32 too: compared by halves, which a float32 holds."""
    rule = INTEGER[name]
    for half in (lambda x: x >> 16, lambda x: x % 65536):
        made = score(
            lambda s, b, h, q, k, half=half: s + half(attn_core.cast(rule(q, k), int)),
        )
        for shift in range(len(INTS)):
            k = np.resize(np.roll(INTS, shift), KEYS)
            found, wanted = both(made.tree, made.arrays, q=INTS, k=k, s=np.zeros((ROWS, KEYS)))
            np.testing.assert_array_equal(found, wanted)


TABLE = operand(RNG.standard_normal((4, 40)).astype(np.float32))
SCORES: dict[str, Any] = {
    "softcap": scores.softcap(3.0),
    "alibi": scores.alibi(np.float64([0.5, 0.25, 0.125])),
    "relative": scores.relative_bias(np.float64(RNG.standard_normal((16, 4)))),
    "t5": scores.softcap(2.0).then(scores.alibi(np.float64([0.5, 0.25, 0.125]))),
    "table": score(lambda s, b, h, q, k: s * TABLE[h, k] + q),
    "exp log": score(lambda s, b, h, q, k: attn_core.log(1 + attn_core.exp(-abs(s)))),
    "division": score(lambda s, b, h, q, k: s / (k - 7) + s // 0.7 - s % -0.3),
    "extremes": score(lambda s, b, h, q, k: attn_core.minimum(s, 0.5) * attn_core.maximum(s, -0.2)),
    "casts": score(lambda s, b, h, q, k: s + attn_core.cast(s * 3, int) % 5),
    "infinite": score(lambda s, b, h, q, k: attn_core.where(q < k, -float("inf"), s)),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_and_their_derivatives(name: str) -> None:
    made = SCORES[name]
    s = RNG.standard_normal((ROWS, KEYS)) * 3
    for tree in (made.tree, differentiate(made.tree).tree):
        found, wanted = both(tree, made.arrays, s=s)
        # Some ten roundings of float32 apart.
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6)
    assert np.ptp(wanted) > 0


def test_small_and_large_arguments_of_tanh() -> None:
    made = score(lambda s, b, h, q, k: attn_core.tanh(s))
    s = np.resize(np.r_[0.0, 10.0 ** np.linspace(-30, 30, 200), np.linspace(0.2, 0.4, 56)], 512)
    s = np.float32(s * np.resize([1, -1], 512)).reshape(ROWS, KEYS)
    found, wanted = both(made.tree, made.arrays, s=s)
    # A GPU's exp and its division are two units off each, where NumPy's are rounded.
    rtol = 1e-6 if torch.cuda.is_available() else 4e-7
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=0)


@pytest.mark.parametrize("divisor", [50.0, -3.0, 0.1, 2.0**-30, 2.0**90, 1e-30, 0.0])
def test_division_by_a_constant(divisor: float) -> None:
    """A constant has an inverse, and what it leaves corrects it; an extreme one is divided by."""
    made = score(lambda s, b, h, q, k: s / divisor)
    s = np.resize(np.r_[0.0, 10.0 ** np.linspace(-20, 30, 256), np.inf, np.nan], (ROWS, KEYS))
    s = np.float32(s * np.resize([1, -1, 1], s.shape))
    found = np.squeeze(both(made.tree, made.arrays, s=s)[0], 0)
    with np.errstate(all="ignore"):
        wanted = s / np.float32(divisor) if divisor else np.zeros_like(s)
    near = np.isinf(wanted) | (np.abs(wanted) < 1e-30)  # overflown or nearly nothing
    np.testing.assert_allclose(found[~near], wanted[~near], rtol=2e-7)
    np.testing.assert_array_equal(np.sign(found[near]), np.sign(wanted[near]))
    assert ("rules.over" in written(made.tree, (), True)) == (
        divisor in (50.0, -3.0, 0.1, 2.0**-30)
    )


def test_floats_that_are_no_numbers() -> None:
    """Casts saturate and take NaN to 0; NaN passes through what it passes through elsewhere."""
    special = np.float32([np.nan, np.inf, -np.inf, 3e9, -3e9, 2**31, -(2**31), 1.5, -1.5, 0.0])
    s = np.resize(special, (ROWS, KEYS))
    for rule in (
        lambda s: attn_core.cast(attn_core.cast(s, int), float),
        lambda s: attn_core.minimum(s, 1.0),
        lambda s: attn_core.maximum(s, -1.0),
        lambda s: s / 0.0,
        abs,
        attn_core.exp,
    ):
        made = score(lambda s, b, h, q, k, rule=rule: rule(s))
        found, wanted = both(made.tree, made.arrays, s=s)
        np.testing.assert_allclose(found, np.float32(wanted), rtol=1e-6)


def test_equal_trees_are_one_function_and_the_source_is_what_it_says() -> None:
    first, second = masks.window(3, 2), masks.window(3, 2)
    assert function(first.tree, ()).call is function(second.tree, ()).call
    other = masks.window(4, 2)
    assert function(other.tree, ()).call is not function(first.tree, ()).call
    source = written(masks.causal().tree, ())
    assert "q >= k" in source
    assert source == function(masks.causal().tree, ()).source


def test_an_error_names_the_line() -> None:
    """What fails in generated code is quoted from it."""
    import inspect

    call = function(masks.causal().tree, ()).call
    lines, _ = inspect.getsourcelines(call.fn)
    assert "".join(lines) == written(masks.causal().tree, ())


@pytest.mark.parametrize("kind", [bool, float])
def test_a_table_of_rows_and_keys_that_spans_the_keys_is_read_as_it_lies(kind: type) -> None:
    """Without a clamp of each key, by which no two lie side by side; beyond its end it is 0."""
    first = 3  # of the keys
    table = (RNG.random((2, 4, 25, first + KEYS - 2)) < 0.5).astype(kind)
    held = operand(table)
    if kind is bool:
        made: Any = mask(lambda b, h, q, k: held[b, h, q, k])
    else:
        made = score(lambda s, b, h, q, k: s * 0.0 + held[b, h, attn_core.row, k])
    s = None if kind is bool else np.ones((ROWS, KEYS))
    told = {spans: ((4, kind is bool, spans),) for spans in (False, True)}
    as_it_lies, clamped = (
        written(made.tree, told[spans], kind is float) for spans in (True, False)
    )
    assert as_it_lies != clamped
    assert as_it_lies.count("maximum") + 1 == clamped.count("maximum") == 4
    (found,), (wanted,) = both(made.tree, made.arrays, s=s, spans=True)
    np.testing.assert_array_equal(found[:, :-2], np.float32(wanted[:, :-2]))
    assert not found[:, -2:].any()
    # Whatever else it is looked up by is clamped as ever.
    (found,), (wanted,) = both(made.tree, made.arrays, s=s, spans=True, q=np.arange(ROWS) * 9 - 40)
    np.testing.assert_array_equal(found[:, :-2], np.float32(wanted[:, :-2]))


def test_an_array_spans_the_keys_by_its_last_axis() -> None:
    arrays = [torch.zeros(3, 90) > 0, torch.zeros(90, 1), torch.zeros(91), torch.zeros(())]
    told = [(2, True, True), (2, False, False), (1, False, True), (0, False, False)]
    assert forms(arrays, 90) == told


_TABLE, _LONG = RNG.standard_normal((25, 40)), RNG.standard_normal(90)


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (lambda s, b, h, q, k: s + operand(_TABLE)[q, k] * operand(_LONG)[q - k + 40], 2),
        (lambda s, b, h, q, k: attn_core.tanh(s * operand(_LONG)[attn_core.cast(s, int)]), 0),
        (lambda s, b, h, q, k: s + operand(_LONG)[attn_core.cast(operand(_TABLE)[q, k], int)], 1),
        (lambda s, b, h, q, k: s * operand(_LONG)[q] + operand(_LONG)[k], 0),
        (
            lambda s, b, h, q, k: (
                operand(_LONG)[attn_core.cast(s, int) + 9] * operand(_TABLE)[q, k]
            ),
            1,
        ),
    ],
)
def test_what_a_score_looks_up_before_there_is_an_s(rule: Any, count: int) -> None:
    """In two parts it and its derivative are what they are in one."""
    made = score(rule)
    s = RNG.standard_normal((ROWS, KEYS)) * 3
    index: dict[str, Any] = {"b": np.int32([[1]]), "h": np.int32([[2]]), "s": s}
    index["q"], index["k"] = np.arange(ROWS)[:, None] + 5, np.arange(KEYS)[None, :] + 3
    index["row"] = index["q"] - 5
    for tree in (made.tree, differentiate(made.tree).tree):
        looks, rest = split(tree)
        arrays, looked = host(tuple(made.arrays), "float64"), {}
        if looks is not None:
            assert not looks.reads("s")
            found = Reading("float64").read(looks, index, arrays)
            looked = {f"looked[{n}]": x for n, x in enumerate(found)}
        # A derivative says by which index, too, so that it takes what that was looked up from.
        assert len(looked) == count or (tree is not made.tree and len(looked) > count > 0)
        parts = Reading("float64").read(rest, {**index, **looked}, arrays)
        whole = Reading("float64").read(tree, index, arrays)
        for part, one in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(part, one)
