"""One tile: its positions, which of them are allowed, and the logits there.

A tile of rows and keys is 5-D, (B', Hk', G, rows, keys); for the products the first two axes are
folded into n, and the G heads of a group and their rows into M, (n, M, keys), so that keys and
values are never repeated. Where a span is full and nothing else can hide a key, `allowed` is None:
nothing is selected there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from attn_core.backends.torch.arrays import Reading
from attn_core.backends.torch.chunked_parts import Part, Span, Work
from attn_core.backends.torch.philox import keep_tile
from attn_core.language.duals import Derivative, differentiate
from attn_core.language.tree import Tree
from attn_core.language.values import drop_threshold

Array = Any

_LOG2E = 1.4426950408889634


class Logits(NamedTuple):
    """Of one tile: scaled scores with score and bias, and where they are allowed.

    Attributes:
        z: (n, M, keys); what it holds where nothing is allowed means nothing.
        allowed: boolean, 5-D, broadcasting to the tile; None where all is.
        slope: d score / d s, 5-D, or None without a score or where it was not asked for.
        sites: for each look-up of the score, (d score / d value, the indices of the value).
    """

    z: Array
    allowed: Array | None
    slope: Array | None = None
    sites: Sequence[tuple[Array, Sequence[Array]]] = ()


class Tile:
    """A tile of rows of a part: where it stands."""

    def __init__(self, w: Work, part: Part, rows: slice) -> None:
        self.w, self.part, self.rows = w, part, rows
        self.shape = (len(part.b), part.h.shape[1], w.group, rows.stop - rows.start)
        self.flat = (self.shape[0] * self.shape[1], self.shape[2] * self.shape[3])
        self._rows: dict[str, Array] = {}

    def folded(self, x: Array) -> Array:
        """(n, M, ...) of an array whose rows are (B, Hk, G, Tq, ...)."""
        x = x[self.part.batch, self.part.heads, :, self.rows]
        return x.reshape(*self.flat, *x.shape[4:])

    def put(self, x: Array, into: Array) -> None:
        """What `folded` takes out, put back."""
        place = into[self.part.batch, self.part.heads, :, self.rows]
        place.copy_(x.view(place.shape))

    def open(self, x: Array) -> Array:
        """(n, M, keys) as the 5-D tile: a view."""
        return x.view(*self.shape, x.shape[-1])

    def indices(self, span: Span) -> dict[str, Array]:
        ints = {"dtype": torch.int32, "device": self.w.device}
        if not self._rows:
            row = torch.arange(self.rows.start, self.rows.stop, **ints).view(1, 1, 1, -1, 1)
            q = row + self.part.offset
            self._rows = {"b": self.part.b, "h": self.part.h, "q": q, "row": row}
        k = torch.arange(span.start, span.stop, **ints).view(1, 1, 1, 1, -1)
        return {**self._rows, "k": k}

    def logits(
        self, q: Array, span: Span, number: int = 0, derivative: Derivative | None = None
    ) -> Logits:
        """The tile's logits over a span of keys, in the work's memory of that number."""
        w, x = self.w, self.w.x
        key = self.part.key[:, span.start : span.stop]
        z = w.room(number, *q.shape[:2], key.shape[1])
        torch.baddbmm(z, q, key.transpose(1, 2), beta=0, alpha=w.scale, out=z)
        if span.full and w.ask.score is None and w.bias is None:
            return Logits(z, None)
        index = self.indices(span)
        allowed = None if span.full else self._mask(index, span)
        if w.ask.score is None and w.bias is None:
            return Logits(z, allowed)
        tile = self.open(z)
        bias = None
        if w.bias is not None:
            bias = self.bias(w.bias, span).to(w.dtype)
            allowed = _narrowed(allowed, bias)
        slope, sites = None, []
        if w.ask.score is not None:
            if allowed is not None:
                tile.masked_fill_(~allowed, 0.0)
            guard = None if allowed is None else allowed.expand(tile.shape)
            tree = w.ask.score if derivative is None else derivative.tree
            reading = Reading(w.accumulation, x.score, w.device, guard)
            found = iter(reading.read(tree, {**index, "s": tile}, x.score))
            value = next(found)
            allowed = _narrowed(allowed, value)
            # Into memory of our own: it may be a table's entry, or of one axis only.
            tile.copy_(value)
            if derivative is not None:
                slope = next(found)
                for site in derivative.sites:
                    sites.append((next(found), [next(found) for _ in range(site.indices)]))
        if bias is not None:
            allowed = _narrowed(allowed, tile.add_(bias))
        return Logits(z, allowed, slope, sites)

    def bias(self, bias: Array, span: Span) -> Array:
        """The part of a bias, or of its gradient, that lies over the tile: a view."""
        cuts = (
            self.part.batch,
            self.part.heads,
            slice(None),
            self.rows,
            slice(span.start, span.stop),
        )
        return bias[
            tuple(c if n > 1 else slice(None) for c, n in zip(cuts, bias.shape, strict=True))
        ]

    def kept(self, span: Span) -> Array:
        """Dropout's mask over the tile."""
        index = self.indices(span)
        return keep_tile(
            drop_threshold(self.w.ask.rate),
            self.w.words,
            self.part.b,
            self.part.h,
            index["q"],
            span.start,
            span.stop - span.start,
        )

    def sinks(self) -> Array:
        """The sink of every row, (n, M, 1); padded rows have none."""
        w = self.w
        sinks = w.x.sinks.to(w.dtype).view(1, w.kv_heads, w.group, 1)[:, self.part.heads]
        sinks = sinks.expand(self.shape)
        if w.q_lengths is not None:
            row = torch.arange(self.rows.start, self.rows.stop, device=w.device)
            sinks = torch.where(row < self._per_batch(w.q_lengths)[..., 0], sinks, -torch.inf)
        return sinks.reshape(*self.flat, 1)

    def _mask(self, index: dict[str, Array], span: Span) -> Array | None:
        """Mask and lengths; broadcasts to the tile."""
        w, ask = self.w, self.w.ask
        found = []
        if ask.mask is not None:
            found += Reading(w.accumulation, w.x.mask, w.device).read(ask.mask, index, w.x.mask)
        if w.kv_lengths is not None:
            found.append(index["k"] < self._per_batch(w.kv_lengths))
        if w.q_lengths is not None:
            found.append(index["row"] < self._per_batch(w.q_lengths))
        allowed = found[0]
        for more in found[1:]:
            allowed = allowed & more
        return allowed.view((1,) * (5 - allowed.dim()) + allowed.shape)

    def _per_batch(self, lengths: Array) -> Array:
        return lengths if len(lengths) == 1 else lengths[self.part.batch]


def exponential(x: Array) -> Array:
    """exp(x) in the place of x, which is a logit less its row's maximum.

    Through exp2, which torch computes in half the time; the product costs an error of x units in
    the last place, where exp(x) is that much smaller than 1.
    """
    return x.mul_(_LOG2E).exp2_()


def seen(x: Array, allowed: Array | None, tile: Tile) -> Array:
    """Keys or values (n, keys, X), those that no row of the tile may see replaced by 0."""
    if allowed is None:
        return x
    some = allowed.any(3).any(2)
    some = some.expand(*tile.shape[:2], x.shape[1]).reshape(*x.shape[:2], 1)
    return torch.where(some, x, 0.0)


def hide(x: Array, allowed: Array | None, tile: Tile, fill: float) -> None:
    """Write `fill` over x (n, M, keys) where nothing is allowed."""
    if allowed is not None:
        tile.open(x).masked_fill_(~allowed, fill)


@lru_cache(maxsize=256)
def slopes(score: Tree, tables: bool) -> Derivative:
    """The derivative of a score, of its tables too only where they are asked for."""
    found = differentiate(score)
    if tables:
        return found
    # Steps only read earlier ones: what nobody reads is dropped from the end backwards.
    tree, results = found.tree, found.tree.results[:2]
    needed = set(results)
    for at in reversed(range(len(tree.steps))):
        if at in needed:
            needed.update(tree.steps[at].args)
    kept = sorted(needed)
    place = {at: new for new, at in enumerate(kept)}
    steps = [tree.steps[at] for at in kept]
    steps = [step._replace(args=tuple(place[a] for a in step.args)) for step in steps]
    return Derivative(Tree(tuple(steps), tuple(place[at] for at in results)), ())


def _narrowed(allowed: Array | None, x: Array) -> Array | None:
    """`allowed` where x is not -inf; NaN is data."""
    live = x != -torch.inf
    if allowed is None:
        # Asking is cheap on a CPU, and spares the tile every selection; on a device it would wait.
        return None if x.device.type == "cpu" and live.all() else live
    return allowed & live
