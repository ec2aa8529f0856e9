"""What reports say alike in every framework, and block counts from dense masks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from attn_core import attention, registry
from attn_core.explain_shapes import report
from attn_core.explained import Report

KEYS = (
    *("backend", "backend_from", "device", "dtype", "accumulation", "layout", "shape", "scale"),
    *("impl", "asked", "asked_by", "candidates", "mask", "score", "operands", "options"),
    *("tiles", "together", "turn", "blocks", "forward", "backward", "precision", "effective"),
)
SHAPE = ("B", "Hq", "Hk", "Tq", "Tk", "D", "Dv")
FLOAT32 = "float32 multiplied as float32, summed in float32"
WIDENED = "bfloat16 multiplied as float32, summed in float32"
FACTOR = 2
"""How far an estimate may be from what is measured, either way, where T is at least 2048."""


def ran(backend: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[str]:
    """The implementations of a backend that attention runs with these arguments."""
    names: list[str] = []
    for name, handler in list(backend._HANDLERS.items()):

        def spy(p: Any, x: Any, name: str = name, handler: Any = handler) -> Any:
            names.append(name)
            return handler(p, x)

        monkeypatch.setitem(backend._HANDLERS, name, spy)
    attention(**given)
    return names


OUTLINED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("2,4,300,16", {"mask": ["causal"]}),
    ("2,4,300,16", {"kv_heads": 2, "keys": 500, "query_offset": "end", "mask": ["window:99"]}),
    ("2,4,300,16", {"bias": "1,4,1,300", "sinks": True, "score": ["alibi"], "layout": "BTHD"}),
    ("2,4,300,16", {"kv_lengths": "200,300", "q_lengths": "100", "dropout": 0.5}),
    ("1,4,2100,64", {"mask": ["causal", "window:63"], "value_width": 32, "dtype": "bfloat16"}),
    ("1,2,70,8", {"dtype": "float64", "precision": "highest", "return_lse": True}),
    ("1,2,70,8", {"dtype": "float16", "impl": "reference", "return_weights": True}),
    ("1,1,1,8", {"keys": 4096, "impl": "native"}),
    ("0,2,70,8", {"mask": ["causal"]}),
)
"""Sizes and options of `explain_shapes.report`."""


def as_of_zeros(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of outlines is what would be said of arrays; and of these none is made."""
    backend = registry.load(name)

    def made(function: Any, shapes: Any, dtype: str) -> Any:
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        return function(*[backend.from_numpy(np.zeros(shape, kind)) for shape in shapes])

    for shape, options in OUTLINED:
        said = report(name, shape, **options)
        with monkeypatch.context() as patched:
            patched.setattr(backend, "outline", made)
            assert report(name, shape, **options) == said
    # 164 GB to each array, and 400 TB to the bias.
    more = {"bias": "10000000,10000000", "sinks": True, "mask": ["causal"]}
    assert report(name, "1,32,10000000,128", impl="reference", **more).impl == "reference"


def near(estimate: int | None, measured: int) -> bool:
    assert estimate is not None
    return measured / FACTOR <= estimate <= measured * FACTOR


def counted(report: Report, dense: np.ndarray) -> None:
    """The report's blocks are those of this dense mask, (B, Hq, Tq, Tk)."""
    b = report.blocks
    assert b is not None
    if report.tiles is not None:
        assert (b.block_q, b.block_k) == report.tiles
    # Maps that are one for all batches or heads say that all are alike.
    assert (dense == dense[: b.batches].repeat(len(dense) // b.batches, 0)).all()
    some = full = entries = excess_free = 0
    kept = dense[: b.batches, : b.heads]
    tiles = kept.shape[0] * kept.shape[1] * b.rows * b.columns
    for i in range(b.rows):
        for j in range(b.columns):
            tile = kept[
                :,
                :,
                i * b.block_q : (i + 1) * b.block_q,
                j * b.block_k : (j + 1) * b.block_k,
            ]
            flat = tile.reshape(*kept.shape[:2], -1)
            some += int(flat.any(-1).sum())
            full += int(flat.all(-1).sum())
            entries += int(flat.any(-1).sum()) * flat.shape[-1]
            excess_free += int(flat.sum())
    assert (b.total, b.total) == (tiles, b.full + b.partial + b.empty)
    assert b.full <= full
    assert b.excess == b.full + b.partial - some
    if b.excess == 0:
        assert b.allowed_share == excess_free / max(1, entries)


def live(report: Report) -> tuple[int, int, int]:
    assert report.blocks is not None
    return report.blocks.full, report.blocks.partial, report.blocks.empty


def keys_of(report: Report) -> dict[str, Any]:
    """The report's dict, whose keys are the same everywhere."""
    found = report.as_dict()
    assert tuple(found) == KEYS
    assert tuple(found["shape"]) == SHAPE
    return found
