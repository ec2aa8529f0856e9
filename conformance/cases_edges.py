"""Cases at the edge of what floats hold: finite inputs whose hidden products are beyond them.

A mask that selects never sees what it hides. One that adds a large negative number, takes a
maximum first, or multiplies by 0 afterwards, meets inf - inf or 0 * inf here. Query rows are a
times as large, the keys that they see a times as small, so that every visible logit is ordinary;
hidden keys are so large that their products overflow float32 on the way, or nearly do.
"""

from __future__ import annotations

import numpy as np

from attn_core import masks
from attn_core.conformance.questions import (
    Case,
    Change,
    Question,
    Shape,
    biased,
    offset,
    plain,
    sunk,
)

_CAUSAL = plain(masks.causal, lambda b, h, q, k, i: k <= q, causal=True)
_SQUARE = Shape(q_len=7)
_ROW = 3
"""The row that a bias hides."""


def _last_key(product: float) -> Change:
    """The last key's products with all rows but the last are about that large.

    The last row sees it, so the key is data, and no sweeping clean of keys is of any help: that row
    is as small as the key is large.
    """

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        rows, keys = np.full(size.q_len, 1e14), np.full(size.k_len, 1e-14)
        keys[-1] = product / 1e14
        rows[-1] = 1 / keys[-1]
        _resize(x, rows, keys, overflow=product > 1e38)

    return change


def _unseen_keys(product: float) -> Change:
    """The products of all rows with the keys beyond the last row are about that large."""

    def change(x: Question, rng: np.random.Generator, size: Shape) -> None:
        rows, keys = np.full(size.q_len, 1e14), np.full(size.k_len, 1e-14)
        keys[size.q_len :] = product / 1e14
        _resize(x, rows, keys, overflow=product > 1e38)

    return change


def _resize(x: Question, rows: np.ndarray, keys: np.ndarray, overflow: bool) -> None:
    if x.dtype == "float16":
        # Its products cannot leave float32, in which they are summed: what fits is asked.
        rows, keys = (10 ** (np.log10(n) / 8) for n in (rows, keys))
    for name, sizes in (("query", rows), ("key", keys)):
        array = x.call[name]
        x.call[name] = x.judge[name] = (array * sizes[:, None]).astype(array.dtype)
    if x.dtype != "float16":
        q, k = (x.call[name].astype(np.float32) for name in ("query", "key"))
        with np.errstate(all="ignore"):
            products = q @ np.repeat(k, q.shape[1] // k.shape[1], 1).swapaxes(-1, -2)
        seen = np.broadcast_to(x.judge["mask"], products.shape)
        assert np.abs(products[seen]).max() < 100, "what is seen must be ordinary"
        assert np.isfinite(products[~seen]).all() != overflow, "what is hidden must be as said"


def _hides_row(bias: np.ndarray) -> np.ndarray:
    bias = bias.copy()
    bias[:, :, _ROW] = -np.inf
    return bias


EDGES: tuple[Case, ...] = (
    Case("edge-overflow-hidden", (_CAUSAL, _last_key(1e39)), _SQUARE),
    Case("edge-overflow-unseen", (offset("start"), _CAUSAL, _unseen_keys(1e40))),
    Case("edge-huge-hidden", (_CAUSAL, _last_key(1e37)), _SQUARE),
    Case("edge-huge-unseen", (offset("start"), _CAUSAL, _unseen_keys(1e37))),
    Case("edge-bias-row", (biased(0, 1, 2, 3, fill=_hides_row),)),
    Case("edge-bias-row-causal", (_CAUSAL, biased(1, 2, 3, fill=_hides_row)), _SQUARE),
    Case("edge-bias-row-sinks", (biased(2, 3, fill=_hides_row), sunk())),
)
