"""Cases whose shapes are their point: around the tiles of implementations, and as in models.

Everything else about them is also asked in the small cases of `cases.py`.
"""

from __future__ import annotations

from attn_core import masks
from attn_core.conformance import vocabulary
from attn_core.conformance.questions import (
    Case,
    Shape,
    biased,
    dropped,
    given,
    masked,
    offset,
    plain,
    poisoned,
    scored,
    sunk,
)

END = offset("end")
CAUSAL = plain(masks.causal, lambda b, h, q, k, i: k <= q, causal=True)
WINDOW = plain(
    lambda: masks.causal() & masks.window(left=2),
    lambda b, h, q, k, i: 0 <= q - k <= 2,
    causal=True,
    window=(2, None),
)
SOFTCAP = scored(vocabulary.softcap, softcap=1.5)


def tiles() -> list[Case]:
    """Lengths around the tiles that implementations cut attention into, and common head widths."""
    few = Shape(batch=1, heads=2, kv_heads=1, width=64, v_width=64)
    wide = few._replace(width=128, v_width=128)
    packed = masked(vocabulary.packed_causal)
    return [
        Case("tiles-63-65", (END, CAUSAL), few._replace(q_len=63, k_len=65)),
        Case(
            "tiles-64-129", (biased(1, 2, 3), sunk([0.5, -1.0])), few._replace(q_len=64, k_len=129)
        ),
        Case("tiles-128-127", (END, WINDOW), wide._replace(q_len=128, k_len=127)),
        Case(
            "tiles-130-poison",
            (given(kv_lengths=[70]), poisoned("key", "value")),
            few._replace(q_len=130, k_len=130),
        ),
        Case("tiles-257-300", (END, CAUSAL, SOFTCAP), few._replace(q_len=257, k_len=300)),
        Case("tiles-300-packed", (packed,), few._replace(q_len=300, k_len=300)),
        Case(
            "tiles-1-513",
            (offset("end", [399]), WINDOW, given(kv_lengths=[400])),
            few._replace(q_len=1, k_len=513),
        ),
        Case("tiles-520-dropout", (dropped(0.25, 9),), few._replace(q_len=520, k_len=520)),
    ]


def models() -> list[Case]:
    """Attention as it is called in models people run, small."""
    full = Shape(batch=2, heads=4, kv_heads=4, q_len=17, k_len=17, width=16, v_width=16)
    grouped = full._replace(heads=8, kv_heads=2)
    decode = grouped._replace(q_len=1, k_len=19)
    documents = masked(vocabulary.packed_causal)
    return [
        Case("model-gpt2", (CAUSAL,), full),
        Case("model-bert-padded", (given(kv_lengths=[17, 9]),), full),
        Case("model-llama-prefill", (CAUSAL,), grouped),
        Case(
            "model-llama-decode",
            (offset("end", [18, 10]), CAUSAL, given(kv_lengths=[19, 11])),
            decode,
        ),
        Case("model-gemma2", (WINDOW, scored(vocabulary.softcap_50, softcap=50.0)), grouped),
        Case("model-gpt-oss", (WINDOW, sunk()), grouped),
        Case("model-t5", (offset("start"), scored(vocabulary.t5(True)), given(scale=1.0)), full),
        Case("model-vit", (), full._replace(q_len=26, k_len=26)),
        Case("model-packed", (documents,), full),
        Case(
            "model-transformer-cross",
            (given(kv_lengths=[13, 6], q_lengths=[17, 11]),),
            full._replace(k_len=13),
        ),
    ]
