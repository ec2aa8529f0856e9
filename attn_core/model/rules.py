"""The masks and scores that a config stands for, joined with those of a call.

mask    causal AND window AND the config's text AND the call's own
score   alibi, then the call's own, then softcap
"""

from __future__ import annotations

from typing import Any, NamedTuple

from attn_core import masks, scores
from attn_core.language.text import parse
from attn_core.language.tree import Tape
from attn_core.language.values import Mask, Score
from attn_core.model.config import AttentionConfig


class Rules(NamedTuple):
    """What a layer's config says of every call; made once, with the layer."""

    mask: Mask | None
    alibi: Score | None
    softcap: Score | None


def rules(config: AttentionConfig) -> Rules:
    """The masks and scores of a config."""
    parts = []
    if config.causal:
        parts.append(masks.causal())
    if config.window is not None:
        parts.append(masks.window(left=config.window))
    if config.mask is not None:
        parts.append(Mask(parse(config.mask)))
    mask = None
    for part in parts:
        mask = part if mask is None else mask & part
    return Rules(
        mask,
        scores.alibi(heads=config.heads) if config.positions == "alibi" else None,
        None if config.softcap is None else scores.softcap(float(config.softcap)),
    )


def joined_mask(own: Mask | None, given: Any) -> Any:
    """Both masks. What is no mask goes on alone, for `attention` to refuse in its own words."""
    if own is None or given is None:
        return own if given is None else given
    if not isinstance(given, Mask):
        shape = getattr(given, "shape", None)
        if shape is None or "bool" not in str(getattr(given, "dtype", "")):
            return given
        if len(shape) not in (2, 4):
            return given
        given = masks.dense(given)
    return given & own


def at_rows(mask: Mask, start: Any, rows: int = 0) -> Mask:
    """The mask of a tile of rows: row 0 of the tile is row `start` of the whole.

    start is an int, or an int scalar array between 0 and `rows`.
    """
    tape = Tape()
    if isinstance(start, int):
        first = tape.const(start)
    else:
        first = tape.apply("maximum", tape.lookup(start, "int", ()), tape.const(0))
        first = tape.apply("minimum", first, tape.const(rows))
    row = tape.apply("add", tape.index("row"), first)
    return Mask(*tape.finish(tape.replay(mask.tree, mask.arrays, {"row": row})))


def joined_score(own: Rules, given: Any) -> Any:
    """The three scores, one after the other."""
    if given is not None and not isinstance(given, Score):
        return given
    found = None
    for part in (own.alibi, given, own.softcap):
        if part is not None:
            found = part if found is None else found.then(part)
    return found
