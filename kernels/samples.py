"""What kernels are compiled for ahead of time: problems by name, as text of the language.

Of each kind that users ask for there is one, and one of everything at once, which needs the most
registers of all. They stand for a class of configurations each (`configs.CLASSES`).
"""

from __future__ import annotations

from typing import NamedTuple

from attn_core.kernels.configs import class_of
from attn_core.language.text import parse
from attn_core.language.tree import Tree, looks_up_entries


class Sample(NamedTuple):
    """A problem without its sizes.

    Attributes:
        mask, score: text of the language, "" for none.
        bias: the axes that it spans, of "bhqk"; "" for none.
        lengths: whether each batch has lengths of its own, of keys and of rows.
    """

    name: str
    mask: str = ""
    score: str = ""
    bias: str = ""
    sinks: bool = False
    lengths: bool = False
    dropout: bool = False

    @property
    def mask_class(self) -> str:
        return class_of(
            mask=bool(self.mask or self.lengths),
            positions=not (self.lengths or operands_of(tree_of(self.mask))),
            score=bool(self.score),
            table=any(looks_up_entries(tree_of(words)) for words in (self.mask, self.score)),
            bias=bool(self.bias),
            dropout=self.dropout,
        )


_DISTANCE = "abs(q - k)"
_BUCKETS = " + ".join(f"int({_DISTANCE} >= {n})" for n in (12, 16, 23, 32, 46, 64, 91))
_DOCUMENTS = "(int0[b, q] == int0[b, k]) & (q >= k)"
_CAPPED_SLOPES = f"50.0 * tanh(s / 50.0) - float0[h] * float({_DISTANCE})"
_RELATIVE = f"s + float0[minimum({_DISTANCE}, 8) + {_BUCKETS} + where(k > q, 16, 0), h]"

SAMPLES = {
    sample.name: sample
    for sample in (
        Sample("plain"),
        Sample("causal", "q >= k"),
        Sample("window", "(q >= k) & (q - k <= 1023)"),
        Sample("documents", _DOCUMENTS, lengths=True),
        Sample("table", "bool0[b, h, row, k]"),
        Sample("softcap", "q >= k", score="50.0 * tanh(s / 50.0)"),
        Sample("alibi", "q >= k", score=f"s - float0[h] * float({_DISTANCE})", sinks=True),
        Sample("relative", score=_RELATIVE),
        Sample("scored documents", _DOCUMENTS, score=_CAPPED_SLOPES, sinks=True, lengths=True),
        Sample("bias", "q >= k", bias="hqk"),
        Sample("biased documents", _DOCUMENTS, bias="bhqk", sinks=True, lengths=True),
        Sample("dropout", "q >= k", dropout=True),
        Sample(
            "everything",
            _DOCUMENTS,
            score=_CAPPED_SLOPES,
            bias="bhqk",
            sinks=True,
            lengths=True,
            dropout=True,
        ),
    )
}

FEW = (
    *("plain", "causal", "documents", "scored documents", "table"),
    *("dropout", "biased documents", "everything"),
)
"""One of each class: what CI compiles."""


def tree_of(text: str) -> Tree | None:
    return parse(text) if text else None


def operands_of(tree: Tree | None) -> tuple[tuple[str, int], ...]:
    """(kind, rank) of each operand that the tree looks up."""
    found: dict[int, tuple[str, int]] = {}
    for step in tree.steps if tree is not None else ():
        if step.op == "lookup":
            found[int(step.value or 0)] = step.kind, len(step.args)
    return tuple(found[number] for number in range(len(found)))
