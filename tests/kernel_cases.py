"""Problems of every option, for tests of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from kernel_calls import draw, ids

import attn_core
from attn_core import Dropout, masks, operand, scores

B, HQ, HK, TQ, TK, D = 2, 4, 2, 70, 90, 24
"""Over the ends of tiles of 64, of widths that no product takes as they are."""

QUERY, KEY, VALUE = draw(B, HQ, TQ, D), draw(B, HK, TK, D), draw(B, HK, TK, D)
SLOPES, TABLE, SINKS = draw(HQ).abs(), draw(16, HQ), draw(HQ)
FACTORS, ENDS = operand(draw(HQ, TQ, TK)), operand(draw(TK))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": masks.causal(), "query_offset": "end"},
    "window": {"mask": masks.window(9, 3), "query_offset": 5},
    "another width": {"value": draw(B, HK, TK, 40)},
    "documents": {
        "mask": masks.segments(ids(TQ, 20), ids(TK, 25)),
        "query_offset": 0,
    },
    "lengths": {
        "kv_lengths": [90, 13],
        "q_lengths": [70, 5],
        "mask": masks.causal(),
        "query_offset": "end",
    },
    "no keys": {"kv_lengths": [64, 0]},
    "every head its own": {
        "mask": attn_core.mask(lambda b, h, q, k: (q - k) % (h + 2) == b),
        "query_offset": 0,
    },
    "rows without keys": {
        "mask": attn_core.mask(lambda b, h, q, k: (q % 3 != 1) & (k > q)),
        "query_offset": 0,
    },
    "a bias to each": {"bias": draw(B, HQ, TQ, TK)},
    "one bias": {"bias": draw(TQ, TK), "mask": masks.causal(), "query_offset": 3},
    "a bias of rows": {"bias": draw(B, 1, TQ, 1)},
    "a bias of keys": {"bias": draw(1, HQ, 1, TK)},
    "a bias of one number": {"bias": draw(1, 1, 1, 1)},
    "a bias that hides": {"bias": torch.where(draw(TQ, TK) > 0.5, -torch.inf, draw(TQ, TK))},
    "sinks": {"sinks": SINKS, "kv_lengths": [64, 0], "q_lengths": [70, 3]},
    "softcap": {"score": scores.softcap(2.0)},
    "alibi": {"score": scores.alibi(SLOPES), "query_offset": 0, "mask": masks.causal()},
    "relative": {"score": scores.relative_bias(TABLE), "query_offset": 0},
    "a table": {"mask": masks.dense(draw(B, 1, TQ, TK) > 0)},
    "a table below 0": {"mask": masks.dense(draw(B, 1, TQ, TK) > 0), "scale": -0.3},
    "a table of rows": {"mask": masks.dense(draw(B, 1, TQ, 1) > -1)},
    "tables of a score": {
        "mask": masks.dense(draw(TQ, TK) > -1),
        "score": attn_core.score(lambda s, b, h, q, k: s * FACTORS[h, attn_core.row, k] + ENDS[k]),
        "bias": draw(1, HQ, TQ, TK),
    },
    "dropout": {"dropout": Dropout(0.3, 2**40 + 7), "query_offset": [3, 50]},
    "a scale below 0": {"scale": -0.3, "mask": masks.causal(), "query_offset": 0},
    "one query": {"query": draw(B, HQ, 1, D), "mask": masks.causal(), "query_offset": 40},
    "everything": {
        "mask": masks.causal(),
        "query_offset": "end",
        "bias": draw(1, HQ, TQ, TK),
        "score": scores.softcap(2.0).then(scores.alibi(SLOPES)),
        "sinks": SINKS,
        "kv_lengths": [90, 70],
        "dropout": Dropout(0.2, 5),
    },
}
