"""Questions to the JAX backend, what the judge is asked instead, and how the answers compare."""

import numpy as np

import attn_core
from attn_core import masks, reference, registry, scores
from attn_core.language.values import Dropout

backend = registry.load("jax")

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 3, 2
FULL = (B, HQ, TQ, TK)
b, h, i, k = np.ogrid[:B, :HQ, :TQ, :TK]
NAN = float("nan")


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(*shape, seed=0, dtype=np.float32):
    return rng(seed).standard_normal(shape).astype(dtype)


def inputs(heads=HQ, kv_heads=HK, q_len=TQ, k_len=TK, batch=B, dtype=np.float32):
    return {
        "query": normal(batch, heads, q_len, D, seed=1, dtype=dtype),
        "key": normal(batch, kv_heads, k_len, D, seed=2, dtype=dtype),
        "value": normal(batch, kv_heads, k_len, DV, seed=3, dtype=dtype),
    }


PLAIN = inputs()


# Cases: a name, what attn_core is given, and what the judge is given instead where they differ ----

IDS = np.array([[0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 1, 1]])
SLOPES = normal(HQ, seed=4)
TABLE = normal(9, HQ, seed=5)
T5 = normal(8, HQ, seed=6)
BIAS = normal(*FULL, seed=7)
SINKS = normal(HQ, seed=8)
DENSE = rng(9).random(FULL) < 0.6
TILES = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], bool)
EDGES = np.array([[0, 1], [0, 6], [2, 2], [4, 0], [4, 5], [4, 6]])
EDGE = np.zeros((TQ, TK), bool)
EDGE[EDGES[:, 0], EDGES[:, 1]] = True
HIDING = np.where(DENSE, BIAS, -np.inf).astype(np.float32)
LARGE = BIAS.copy()
LARGE[..., 0], LARGE[..., 1], LARGE[..., 2] = -1e4, -1e9, np.finfo(np.float32).min
LARGE[:, :, 1], LARGE[:, :, 3, 4] = np.finfo(np.float32).min, 1e4
OFFSETS = np.array([2, -1])
AT_2 = {"query_offset": 2}
EMPTY_ROWS = DENSE.copy()
EMPTY_ROWS[0, 1, 2], EMPTY_ROWS[1, :, 4] = False, False


def t5(distance):
    """T5's buckets written out for 8 buckets, bidirectional, max_distance 5."""
    away = np.abs(distance)
    far = 2 + (np.log(np.maximum(away, 1) / 2) / np.log(5 / 2) * 2).astype(int)
    return np.where(away < 2, away, np.minimum(far, 3)) + np.where(distance > 0, 4, 0)


def case(given, **judged):
    return given, {**{n: x for n, x in given.items() if n not in ("mask", "score")}, **judged}


def q(offset):
    return i + np.reshape(offset, (-1, 1, 1, 1))


def seen(**judged):
    return {"mask": np.broadcast_to(judged["mask"], FULL)}


CASES = {
    "scale": case({"scale": 0.7}),
    "scale zero": case({"scale": 0}),
    "causal start": case(
        {"mask": masks.causal(), "query_offset": "start"}, query_offset="start", mask=(i >= k)[0, 0]
    ),
    "causal end": case(
        {"mask": masks.causal(), "query_offset": "end"}, mask=(i + TK - TQ >= k)[0, 0]
    ),
    "causal int": case({"mask": masks.causal(), "query_offset": -2}, mask=(i - 2 >= k)[0, 0]),
    "causal array": case(
        {"mask": masks.causal(), "query_offset": OFFSETS},
        mask=np.broadcast_to(q(OFFSETS) >= k, (B, 1, TQ, TK)),
    ),
    "end with lengths": case(
        {
            "mask": masks.causal(),
            "query_offset": "end",
            "kv_lengths": np.array([6, 3]),
            "q_lengths": np.array([2, 5]),
        },
        mask=np.broadcast_to(q([4, -2]) >= k, (B, 1, TQ, TK)),
    ),
    "window": case(
        {"mask": masks.window(2, 1), **AT_2}, mask=((i + 2 - k <= 2) & (k - i - 2 <= 1))[0, 0]
    ),
    "prefix": case(
        {"mask": masks.causal() | masks.prefix(np.array([3, 5])), "query_offset": 0},
        mask=np.broadcast_to((i >= k) | (k < np.reshape([3, 5], (B, 1, 1, 1))), (B, 1, TQ, TK)),
    ),
    "segments": case(
        {"mask": masks.segments(IDS), **AT_2},
        mask=IDS[:, None, 2 : 2 + TQ, None] == IDS[:, None, None],
    ),
    "segments apart": case(
        {"mask": masks.segments(IDS[:, :TQ], IDS)},
        mask=IDS[:, None, :TQ, None] == IDS[:, None, None],
    ),
    "lengths mask": case(
        {"mask": masks.lengths([4, 7], [5, 2])},
        mask=np.broadcast_to(
            (k < np.reshape([4, 7], (B, 1, 1, 1))) & (i < np.reshape([5, 2], (B, 1, 1, 1))),
            (B, 1, TQ, TK),
        ),
    ),
    "dilated": case({"mask": masks.dilated(3), **AT_2}, mask=((i + 2 - k) % 3 == 0)[0, 0]),
    "global": case(
        {"mask": masks.global_tokens(IDS[0] == 1) | masks.window(0, 0), **AT_2},
        mask=(np.isin(i + 2, (2, 3)) | np.isin(k, (2, 3)) | (i + 2 == k))[0, 0],
    ),
    "chunks": case({"mask": masks.chunks(3), **AT_2}, mask=((i + 2) // 3 == k // 3)[0, 0]),
    "chunks before zero": case(
        {"mask": masks.chunks(3), "query_offset": -3}, mask=((i - 3) // 3 == k // 3)[0, 0]
    ),
    "dense": case({"mask": masks.dense(DENSE[0, 0])}, mask=DENSE[0, 0]),
    "boolean": case({"mask": DENSE}, mask=DENSE),
    "empty rows": case({"mask": EMPTY_ROWS}, mask=EMPTY_ROWS),
    "nothing seen": case({"mask": np.zeros((TQ, TK), bool)}, mask=np.zeros((TQ, TK), bool)),
    "blocks": case(
        {"mask": masks.blocks(TILES, 2), "query_offset": 0}, mask=TILES[i // 2, k // 2][0, 0]
    ),
    "graph": case({"mask": masks.graph(EDGES, (TQ, TK)), "query_offset": 0}, mask=EDGE),
    "arithmetic": case(
        {
            "mask": attn_core.mask(
                lambda b, h, q, k: (
                    (((q - k) % -3 == -1) ^ ((q * k) // (h - 1) > 2))
                    | (attn_core.minimum(q, k) == attn_core.row - b)
                )
            ),
            "query_offset": 0,
        },
        mask=(
            ((i - k) % -3 == -1) ^ (np.where(h == 1, 0, (i * k) // np.where(h == 1, 1, h - 1)) > 2)
        )
        | (np.minimum(i, k) == i - b),
    ),
    "bias": case({"bias": BIAS}),
    "bias rank 2": case({"bias": BIAS[0, 0]}),
    "bias by key": case({"bias": BIAS[:, :1, :1]}),
    "bias by row": case({"bias": BIAS[:1, :, :, :1]}),
    "bias hides": case({"bias": HIDING}),
    "bias large": case({"bias": LARGE}),
    "softcap": case(
        {"score": scores.softcap(0.8)}, score=lambda s, b, h, q, k: 0.8 * np.tanh(s / 0.8)
    ),
    "alibi": case(
        {"score": scores.alibi(SLOPES), **AT_2},
        score=lambda s, b, h, q, k, t: s - t[h] * abs(q - k),
        operands=(SLOPES,),
    ),
    "alibi of the paper": case(
        {"score": scores.alibi(heads=HQ), **AT_2},
        score=lambda s, b, h, q, k, t: s - t[h] * abs(q - k),
        operands=(2.0 ** (-2.0 * np.arange(1, 5)),),
    ),
    "clipped": case(
        {"score": scores.relative_bias(TABLE, buckets="clipped"), **AT_2},
        score=lambda s, b, h, q, k, t: s + t[np.clip(k - q, -4, 4) + 4, h],
        operands=(TABLE,),
    ),
    "t5": case(
        {"score": scores.relative_bias(T5, max_distance=5), **AT_2},
        score=lambda s, b, h, q, k, t: s + t[t5(k - q), h],
        operands=(T5,),
    ),
    "then": case(
        {"score": scores.alibi(SLOPES).then(scores.softcap(1.5)), **AT_2},
        score=lambda s, b, h, q, k, t: 1.5 * np.tanh((s - t[h] * abs(q - k)) / 1.5),
        operands=(SLOPES,),
    ),
    "score of everything": case(
        {
            "score": attn_core.score(
                lambda s, b, h, q, k: attn_core.where(
                    (q + k) % 5 == 4,
                    -np.inf,
                    attn_core.exp(attn_core.minimum(s, 0.5)) * attn_core.log(1.0 + abs(s) + b)
                    + s / (h + 1),
                )
            ),
            **AT_2,
        },
        score=lambda s, b, h, q, k: np.where(
            (q + k) % 5 == 4,
            -np.inf,
            np.exp(np.minimum(s, 0.5)) * np.log(1.0 + abs(s) + b) + s / (h + 1),
        ),
    ),
    "sinks": case({"sinks": SINKS}),
    "sinks of none": case(
        {"sinks": np.where(SINKS < 0, -np.inf, SINKS).astype(np.float32), "mask": EMPTY_ROWS},
        mask=EMPTY_ROWS,
    ),
    "kv_lengths": case({"kv_lengths": np.array([0, 5])}),
    "kv_lengths for all": case({"kv_lengths": 3}),
    "q_lengths": case({"q_lengths": np.array([0, 3])}),
    "padding with sinks": case(
        {"sinks": SINKS, "kv_lengths": np.array([0, 5]), "q_lengths": np.array([5, 3])}
    ),
    "dropout": case({"dropout": Dropout(0.4, 2**40 + 7)}, dropout=(0.4, 2**40 + 7)),
    "dropout behind": case(
        {"dropout": Dropout(0.4, -3), "query_offset": np.array([-9, 4])}, dropout=(0.4, -3)
    ),
    "all at once": case(
        {
            "mask": masks.window(4) & masks.segments(IDS),
            "bias": BIAS[:1, :, :, :],
            "score": scores.alibi(SLOPES),
            "scale": 0.6,
            "sinks": SINKS,
            "kv_lengths": np.array([6, 7]),
            "q_lengths": np.array([5, 4]),
            "query_offset": np.array([1, 2]),
            "dropout": Dropout(0.3, (5, 6)),
        },
        mask=np.stack(
            [
                (i + o - k <= 4)[0, 0] & (IDS[n, o : o + TQ, None] == IDS[n, None, :])
                for n, o in enumerate((1, 2))
            ]
        )[:, None],
        score=lambda s, b, h, q, k, t: s - t[h] * abs(q - k),
        operands=(SLOPES,),
        dropout=(0.3, 5 + 6 * 2**32),
    ),
}

ALL, ALL_JUDGED = CASES["all at once"]
CAUSAL = (i >= k)[0, 0]

ODD_SHAPES = {
    "one key head": inputs(3, 1),
    "as many key heads": inputs(3, 3),
    "no batch": inputs(batch=0),
    "no queries": inputs(q_len=0),
    "no keys": inputs(k_len=0),
    "nothing at all": inputs(q_len=0, k_len=0, batch=0),
}


# Comparing ----------------------------------------------------------------------------------------


def arrays(given, dtype=np.float32):
    """Query, key, value, bias and sinks as JAX arrays, and the rest as it is."""
    named = ("query", "key", "value", "bias", "sinks")
    return {n: backend.from_numpy(x.astype(dtype)) if n in named else x for n, x in given.items()}


def cotangents(shapes, dtype=np.float32, seed=20):
    made = {n: normal(*s, seed=seed + j) for j, (n, s) in enumerate(sorted(shapes.items()))}
    wide = np.float64 if dtype == np.float64 else np.float32
    return {n: x.astype(wide if n == "lse" else dtype) for n, x in made.items()}


def judge(given, cotangent, **options):
    output = reference.attention(**given, **options)
    pulled = {f"d_{n}": x.astype(np.float64) for n, x in cotangent.items()}
    return output, reference.gradients(**given, **options, **pulled)


def close(name, found, wanted, tolerance=2e-5, rounding=0.0):
    found = np.asarray(found)
    assert found.shape == wanted.shape, name
    found = found.astype(np.float64)
    infinite = np.isneginf(wanted)
    assert np.array_equal(np.isneginf(found), infinite), name
    found, wanted = np.where(infinite, 0, found), np.where(infinite, 0, wanted)
    allowed = tolerance * max(1.0, np.abs(wanted).max(initial=0.0)) + rounding * np.abs(wanted)
    # Written so that a NaN fails.
    assert (np.abs(found - wanted) <= allowed).all(), (name, np.abs(found - wanted).max())


def agree(output, gradients, judged, judged_gradients, **tolerance):
    for name in ("out", "lse", "weights"):
        close(name, getattr(output, name), getattr(judged, name), **tolerance)
    for name, gradient in gradients.items():
        if name != "score":
            close("d " + name, gradient, judged_gradients[name], **tolerance)
            continue
        assert len(gradient) == len(judged_gradients["operands"])
        for found, wanted in zip(gradient, judged_gradients["operands"], strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                close("d operand", found, wanted, **tolerance)


EXTRAS = {"return_lse": True, "return_weights": True}


def shapes_of(given, layout="BHTD"):
    """Shapes of out, lse and weights of inputs in layout BHTD."""
    batch, heads, rows, _ = given["query"].shape
    keys, width = given["value"].shape[2:]
    out = (batch, heads, rows, width) if layout == "BHTD" else (batch, rows, heads, width)
    return {"out": out, "lse": (batch, heads, rows), "weights": (batch, heads, rows, keys)}
