"""Packed documents, cut where they begin: no tile then sees two of them.

The block map knows tiles of one size only, and asks a mask with operands about each. Of the masks
that `masks.segments` writes, alone or with `masks.causal()`,

    ids[b, q] == ids[b, k]      and      q >= k

the ids themselves say it all where each is one run: every document is a square on the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from attn_core.backends.torch.chunked_parts import Span, Work, host
from attn_core.language.text import parse
from attn_core.language.tree import Tree

_LONG = 1024
"""Rows from which cutting pays; shorter calls of several batches are better asked together."""

_MASKS = {
    parse(text): causal
    for same in ("int0[q] == int0[k]", "int0[b, q] == int0[b, k]")
    for text, causal in (
        (same, False),
        (f"(q >= k) & ({same})", True),
        (f"({same}) & (q >= k)", True),
    )
}
"""Trees of documents, and whether they are causal within."""


class Documents(NamedTuple):
    """Where documents begin.

    Attributes:
        causal: whether a row sees its document up to itself, or all of it.
        starts: for each batch, or once for all of them: the first row of each, and the end.
    """

    causal: bool
    starts: Sequence[Sequence[int]]

    def tiles(
        self, starts: Sequence[int], tall: int, most: int
    ) -> Iterator[tuple[slice, list[Span]]]:
        """Tiles of at most `tall` rows, or of `most` where they see all, and what each sees."""
        for first, end in pairwise(starts):
            for at in range(first, end, tall if self.causal else most):
                if not self.causal:
                    # A row alone has a mask, of one entry: its weight is 1 whatever the logit.
                    span = Span(first, end, end - first > 1)
                    yield slice(at, min(at + most, end)), [span]
                    continue
                stop = min(at + tall, end)
                before = [Span(first, at, True)] if at > first else []
                yield slice(at, stop), [*before, Span(at, stop, False)]


def documents(w: Work) -> Documents | None:
    """The documents of a call; None where its mask is another, or an id comes back later."""
    ask, x = w.ask, w.x
    if ask.mask is None or not documented(ask.mask, ask.offset, w.q_len, w.k_len):
        return None
    if x.kv_lengths is not None or x.q_lengths is not None:
        return None
    ids = host(x.mask[0])
    if ids.shape not in ((w.q_len,), (w.batch, w.q_len)):
        return None
    starts: list[list[int]] = []
    for line in ids.reshape(-1, w.q_len):
        firsts = np.flatnonzero(line[1:] != line[:-1]) + 1
        if len(np.unique(line[firsts])) < len(firsts) or (line[firsts] == line[0]).any():
            return None
        starts.append([0, *firsts.tolist(), w.q_len])
    if all(each == starts[0] for each in starts):
        starts = starts[:1]
    return Documents(_MASKS[ask.mask], starts)


def causal(mask: Tree) -> bool:
    """Whether a row of these documents sees its own up to itself only."""
    return _MASKS[mask]


def documented(mask: Tree | None, offset: str, q_len: int, k_len: int) -> bool:
    """Whether a call of these sizes, without lengths, is cut so where its ids allow it."""
    return mask in _MASKS and offset != "given" and q_len == k_len >= _LONG
