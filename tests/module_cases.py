"""Calls of the documents' `attention_module`, with what the judge of layers says of them.

Framework-free: a framework's test gives a function that makes its arrays of NumPy's, and one back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import layer_judge
import numpy as np
from layer_cases import draw, weights_of

from attn_core import AttentionConfig, masks
from attn_core.conformance import tolerance
from attn_core.model.parameters import parameters

TQ, TK = 5, 7


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        config: of the layer whose weights the parameters are.
        inputs: shapes of query, and of key and value where they are given.
        mask: of the call.
        call: what else a mapping is called with.
    """

    config: dict[str, Any]
    inputs: tuple[tuple[int, ...], ...]
    mask: np.ndarray | None = None
    call: dict[str, Any] = field(default_factory=dict)


def holes(*shape: int) -> np.ndarray:
    found = np.random.default_rng([7, *shape]).random(shape) < 0.6
    found[..., 1, :] = False  # a row that sees nothing
    return found


SIZES = {"width": 12, "heads": 4}
CASES: dict[str, Case] = {
    "self": Case(SIZES, ((2, TQ, 12),)),
    "cross, no batch": Case(SIZES, ((TQ, 12), (TK, 12)), draw(TQ, TK, seed=2)),
    "two leading dimensions": Case(SIZES, ((2, 3, TQ, 12), (2, 3, TK, 12)), holes(2, 1, 4, TQ, TK)),
    "an added mask by head": Case(SIZES, ((2, TQ, 12),), draw(1, 4, 1, TQ, seed=3)),
    "rows alike": Case(SIZES, ((2, TQ, 12),), np.arange(TQ) != 2),
    "everything": Case(
        {
            **SIZES,
            "kv_heads": 2,
            "head_width": 6,
            "value_width": 5,
            "out_width": 8,
            "key_input": 6,
            "value_input": 9,
            "bias": False,
        },
        ((2, TQ, 12), (2, TK, 6), (2, TK, 9)),
        holes(TQ, TK),
        {"scale": 0.9, "dropout_rate": 0.3, "seed": 11},
    ),
}


def given_of(case: Case) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The parameters, and the inputs."""
    weights = weights_of(parameters(AttentionConfig(**case.config)))
    return weights, [draw(*shape, seed=n) for n, shape in enumerate(case.inputs)]


def judged(case: Case, dtype: Any = np.float64) -> tuple[layer_judge.Judged, tuple[int, ...]]:
    """out and weights with their leading dimensions in one, and those dimensions."""
    weights, inputs = given_of(case)
    lead = inputs[0].shape[:-2]
    batch, heads, rows = math.prod(lead), case.config["heads"], inputs[0].shape[-2]
    options: dict[str, Any] = {}
    if case.mask is not None:
        full = (*lead, heads, rows, inputs[-1].shape[-2])
        mask = np.broadcast_to(case.mask, full).reshape(batch, *full[-3:])
        seen = mask if mask.dtype == bool else None
        options = {"bias": mask} if seen is None else {"sees": lambda b, h, q, k: seen[b, h, q, k]}
    config = dict(case.config)
    if "scale" in case.call:
        config["scale"] = case.call["scale"]
    if "dropout_rate" in case.call:
        config["dropout"] = rate = case.call["dropout_rate"]
        at = np.broadcast_to(np.arange(rows), (batch, rows))
        keys = inputs[-1].shape[-2]
        options["keep"] = layer_judge.kept(rate, case.call["seed"], 0, batch, heads, at, keys)
    folded = [x.reshape(batch, *x.shape[-2:]) for x in inputs]
    return layer_judge.layer(config, weights, *folded, dtype=dtype, **options), lead


def check(found: Any, case: Case, back: Callable[[Any], np.ndarray]) -> None:
    """What a framework answered is what the judge says, within what is allowed."""
    (want, lead), (plain, _) = judged(case), judged(case, np.float32)
    assert found._fields == ("out", "weights")
    for got, name in zip(found, found._fields, strict=True):
        one, other = getattr(want, name), getattr(plain, name)
        got = back(got)
        assert got.shape == (*lead, *one.shape[1:])
        got = got.reshape(one.shape)
        assert tolerance.share(got, one, other, "float32", "out", want.logit) <= 1, name


def changed(case: Case) -> list[Case]:
    """The case with each of its options left out in turn: every one must change the output."""
    made = [Case(case.config, case.inputs, None, case.call)] * (case.mask is not None)
    for gone in ("scale", "dropout_rate", "seed") * bool(case.call):
        left = {n: x for n, x in case.call.items() if n != gone}
        left |= {"seed": 3} if gone == "seed" else {}
        made.append(Case(case.config, case.inputs, case.mask, left))
    return made


def parted(held: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Parameters with some replaced, and those of None gone."""
    return {name: x for name, x in {**held, **changes}.items() if x is not None}


def refused(make: Callable[[np.ndarray], Any], layer: Any) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> arguments of a call that is refused, and what the message says."""
    weights, (x,) = given_of(CASES["self"])
    held, query = {name: make(w) for name, w in weights.items()}, make(x)
    plain = {"query": query, "parameters": held, "heads": 4}
    thin = make(np.zeros((12, 10), np.float32))
    return {
        "no heads": ({"query": query, "parameters": held}, "`heads` must be given"),
        "other heads": ({**plain, "heads": 5}, "a multiple of heads, 5. Got 12"),
        "no parameters": ({"query": query, "parameters": None}, "a MultiHeadAttention, or a map"),
        "a name of no part": (
            {**plain, "parameters": parted(held, **{"qeury.bias": held["key.bias"]})},
            r"Got 'qeury.bias'. Did you mean 'query.bias'\?",
        ),
        "a part missing": (
            {**plain, "parameters": parted(held, **{"out.weight": None})},
            r"'out.weight', a matrix \(in, out\). Got none",
        ),
        "one bias missing": (
            {**plain, "parameters": parted(held, **{"key.bias": None})},
            r"'key.bias' of shape \(12,\). Got none",
        ),
        "keys of part of a head": (
            {**plain, "parameters": parted(held, **{"key.weight": thin})},
            "a multiple of the width of a head, 3. Got 10",
        ),
        "a wider parameter": (
            {**plain, "parameters": parted(held, **{"out.bias": make(np.zeros(12, np.float16))})},
            "`out.bias` must be of the query's dtype, float32. Got float16",
        ),
        "a list in the parameters": (
            {**plain, "parameters": parted(held, **{"out.bias": [0.0] * 12})},
            "`out.bias` of `parameters` must be",
        ),
        "no query": ({**plain, "query": None}, "`query` must be .* Got NoneType"),
        "a list": ({**plain, "query": x.tolist()}, "`query` must be"),
        "another width": (
            {**plain, "query": query[..., :8]},
            r"`query` must have shape \(B, T, 12",
        ),
        "another lead": ({**plain, "key": query[0]}, r"`key` must have the leading dimensions"),
        "a vector": ({**plain, "query": query[0, 0]}, "`query` must have rank 2 or more"),
        "a mask without heads": (
            {**plain, "mask": make(np.ones((2, TQ, TQ), bool))},
            r"`mask` must have rank 2 \(Tq, Tk\) or 4",
        ),
        "a mask of ints": (
            {**plain, "mask": make(np.ones((TQ, TQ), np.int32))},
            "where 0 hides, write `mask != 0`",
        ),
        "a mask of another size": (
            {**plain, "mask": make(np.ones((TQ, TK), bool))},
            r"`mask` must broadcast to",
        ),
        "a mask of keys that count": (
            {**plain, "mask": make(np.ones((2, TQ), bool))},
            r"Got \(2, 5\): write `\[:, None, None, :\]` after it if it says which keys count",
        ),
        "a Mask": (
            {**plain, "mask": masks.causal()},
            "`mask` must be an array.* Got Mask; it is for a layer, which is called with it",
        ),
        "num_heads": ({**plain, "num_heads": 4}, "Got `num_heads`, which is here: `heads=`"),
        "is_causal": ({**plain, "is_causal": True}, "Got `is_causal`, .* in the config of a layer"),
        "q": ({**plain, "q": query}, "Got `q`, which is here: `query`"),
        "dropout without a seed": ({**plain, "dropout_rate": 0.1}, "`seed` must be given"),
        **{
            f"{name} beside a layer": (
                {"query": query, "parameters": layer, name: x},
                f"`{name}` must be left out beside a layer",
            )
            for name, x in (("heads", 4), ("scale", 1.0), ("dropout_rate", 0.1))
        },
    }


REFUSED = (
    *("no heads", "other heads", "no parameters", "a name of no part", "a part missing"),
    *("one bias missing", "keys of part of a head", "a wider parameter"),
    *(
        "a list in the parameters",
        "no query",
        "a list",
        "another width",
        "another lead",
        "a vector",
    ),
    *("a mask without heads", "a mask of ints", "a mask of another size"),
    *("a mask of keys that count", "a Mask", "num_heads", "is_causal", "q"),
    *("dropout without a seed", "heads beside a layer", "scale beside a layer"),
    "dropout_rate beside a layer",
)
