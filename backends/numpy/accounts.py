"""What the implementation spends: bytes beside arguments and results, and in which numbers."""

from __future__ import annotations

from attn_core.footprint import reading, sizes
from attn_core.language.duals import differentiate
from attn_core.spec import WIDTH, Account, Problem

_PHILOX = 20
"""Bytes of an entry of dropout's mask while it is made: words and their products are uint64."""


def account(p: Problem, impl: str) -> Account:
    batch, q_len, k_len = sizes(p) or (0, 0, 0)  # NumPy knows every size
    wide = WIDTH[p.accumulation] // 8
    entries = batch * p.heads * q_len * k_len
    whole = {"b": batch, "h": p.heads, "row": q_len, "k": k_len}
    mask, score = reading(p.mask, whole, wide), reading(p.score, whole, wide)
    slope = 0 if p.score is None else reading(differentiate(p.score).tree, whole, wide)
    # Arrays of all entries that are held at once: NumPy fuses nothing.
    plain = (11 * wide // 2 + (_PHILOX if p.rate else 0) + (wide if p.bias else 0)) * entries
    return Account(None, plain + mask + score, plain + mask + slope, p.accumulation)
