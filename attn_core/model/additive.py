"""AdditiveConfig: attention by a small network instead of a dot product (Bahdanau et al.).

    s[i, j] = score . tanh(query_i Wq + key_j Wk + bias)         summed over A = `width` channels
    out_i = sum over allowed j of softmax(s)[i, j] value_j

Every pair has A numbers, which no framework may hold all at once: rows are computed `tile` at a
time, forward and again backward, so that at most PAIRS numbers live. Masks, lengths, dropout and
rows that see nothing mean what they mean in `attn_core.attention`, which is asked with s as its
bias.

Source: Bahdanau, Cho and Bengio, arXiv 1409.0473.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from attn_core.config import check_impl
from attn_core.model import fields
from attn_core.model.config import ROOMS, Config
from attn_core.spec import DTYPES

PAIRS = 2**22
"""Numbers of a tile: rows * keys * width, for the whole batch; one row at least."""


class AdditiveSizes(NamedTuple):
    """The sizes of the layer, none left open: of the two inputs, and A."""

    query_input: int
    key_input: int
    width: int


@dataclass(frozen=True)
class AdditiveConfig(Config):
    """Additive attention; the module's docstring has the formula.

    Attributes:
        width: A, of the network between query and key.
        query_input, key_input: widths of the inputs; A where left out.
        causal: a query sees the keys up to its own position.
        dropout: rate on the weights, in training.
        dtype, backend, impl: as in AttentionConfig.

    Raises:
        TypeError, ValueError: a field is not what it must be.
    """

    TABLE: ClassVar[str] = "additive"

    width: int
    query_input: int | None = None
    key_input: int | None = None
    causal: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    backend: str | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        self.plain()
        fields.count("width", self.width)
        for name in ("query_input", "key_input"):
            if getattr(self, name) is not None:
                fields.count(name, getattr(self, name))
        fields.flag("causal", self.causal)
        fields.rate("dropout", self.dropout)
        fields.choice("dtype", self.dtype, DTYPES)
        if self.backend is not None:
            fields.choice("backend", self.backend, ROOMS)
        check_impl(self.impl)

    @property
    def sizes(self) -> AdditiveSizes:
        """The sizes, none left open."""
        given = (self.query_input or self.width, self.key_input or self.width)
        return AdditiveSizes(*given, self.width)

    def meaning(self) -> dict[str, Any]:
        """`to_mapping` with what was left open filled in."""
        return {**self.to_mapping(), **self.sizes._asdict()}


def tile(batch: int, keys: int, width: int) -> int:
    """Rows that are computed at a time."""
    return max(1, PAIRS // max(1, batch * keys * width))
