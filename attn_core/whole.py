"""Which problems a fused kernel without masks answers as it is: all keys, or plain causal.

Frameworks' own kernels agree with the spec about these two and about nothing else: with Tq and Tk
equal, their causal is ours however they align it, no row is empty and no key is hidden from all.
"""

from __future__ import annotations

from functools import lru_cache

from attn_core.blocks import FULL, block_map
from attn_core.language.text import parse
from attn_core.language.tree import Tree
from attn_core.spec import Problem

CAUSAL = parse("q >= k")
"""The tree of `masks.causal()`."""


def whole(p: Problem, look: bool = True) -> str | None:
    """ "full" (every row sees every key), "causal" (row i sees the keys up to i), or None.

    It says None wherever that depends on an operand or an unknown size.

    Args:
        look: whether a mask of another form may be read through, to find out whether it hides
            anything: a single query at the end of its keys, for one, sees all of them.
    """
    if p.kv_lengths or p.q_lengths:
        return None
    if p.mask is None:
        return "full"
    if p.offset == "given" or p.q_len is None or p.k_len is None:
        return None
    if p.mask == CAUSAL and p.q_len == p.k_len:
        return "causal"
    if p.mask_operands or not look:
        return None
    start = p.k_len - p.q_len if p.offset == "end" else 0
    return "full" if _hides_nothing(p.mask, p.q_len, p.k_len, p.batch, p.heads, start) else None


def beside(p: Problem, kernel: str) -> list[str]:
    """Refusals of what fused kernels know nothing of: they make `out` of query, key and value."""
    reasons = [
        f"`{name}` must be left out for {kernel}. Got {got}."
        for name, given, got in (
            ("score", p.score, "one"),
            ("bias", p.bias, "one"),
            ("sinks", p.sinks_dtype, "some"),
            ("dropout", p.rate, f"a rate of {p.rate:g}"),
            ("return_weights", p.return_weights, "True"),
        )
        if given
    ]
    if p.width != p.v_width:
        reasons.append(
            f"value must be as wide as query and key for {kernel}. "
            f"Got D = {p.width} and Dv = {p.v_width}."
        )
    if 0 in (p.batch, p.q_len, p.k_len):
        reasons.append(f"B, Tq and Tk must be at least 1. Got {p.batch}, {p.q_len}, {p.k_len}.")
    return reasons


@lru_cache(maxsize=256)
def _hides_nothing(
    mask: Tree, q_len: int, k_len: int, batch: int | None, heads: int, start: int
) -> bool:
    if (batch is None and mask.reads("b")) or 0 in (q_len, k_len):
        return False
    found = block_map(
        mask,
        q_len=q_len,
        k_len=k_len,
        block_q=q_len,
        block_k=k_len,
        batch=batch or 1,
        heads=heads,
        offsets=start,
    )
    return bool((found.dense() == FULL).all())
