"""AttentionConfig: everything static about one attention layer, in numbers and words.

For inputs x_q (B, Tq, E), x_k (B, Tk, Ek) and x_v (B, Tk, Ev), with `heads` query heads and
`kv_heads` key heads of width D, and values of width Dv::

    q = x_q Wq + bq    k = x_k Wk + bk    v = x_v Wv + bv       cut into heads, heads slowest
    q, k = norm(q), norm(k)                                     qk_norm="rms"
    q, k = turned by their positions                            positions="rotary"
    s = scale q . k;  s = s - slope[h] |i - j|;  s = user's score;  s = softcap tanh(s / softcap)
    o = softmax over what causal, window, mask and the call's own masks all allow, times v
    o = o * sigmoid(x_q Wg + bg)                                gate=True
    out = o Wo + bo

Every number is checked here, when the config is made, and nowhere again. A field that nothing
reads, since another one switches it off, must keep its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from attn_core.config import as_mapping, check_impl, near, nearest, read, settings_of
from attn_core.language.text import parse, text
from attn_core.language.tree import Tree
from attn_core.language.values import Mask
from attn_core.model import fields
from attn_core.spec import DTYPES

ROOMS = ("torch", "tf", "jax")
"""Backends that have layers."""
ROTARY = ("rotary_base", "rotary_fraction", "rotary_pairs")
"""Fields that rotary positions alone read."""


class Sizes(NamedTuple):
    """The sizes of a layer, none left open.

    Attributes:
        width: E, of the query's input.
        heads, kv_heads: Hq, Hk.
        head, value: D and Dv, of one head.
        key_input, value_input: Ek and Ev.
        out: of the output.
    """

    width: int
    heads: int
    kv_heads: int
    head: int
    value: int
    key_input: int
    value_input: int
    out: int


STOCK = {
    "embed_dim": "width",
    "num_heads": "heads",
    "key_dim": "head_width",
    "value_dim": "value_width",
    "kdim": "key_input",
    "vdim": "value_input",
    "num_query_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "output_shape": "out_width",
    "use_bias": "bias",
    "is_causal": "causal",
    "use_causal_mask": "causal",
    "dropout_rate": "dropout",
    "units": "width",
}
"""What the frameworks' own layers call a field."""


def _meant(key: Any, known: Iterable[str]) -> str:
    names = tuple(known)
    close = STOCK.get(key) if isinstance(key, str) else None
    return f" Did you mean {close!r}?" if close in names else nearest(key, names)


def _check_beside(held: Mapping[str, Any], table: str, known: Iterable[str]) -> None:
    """Beside a table stand other tables: a value there is one that nobody would read."""
    for key, value in held.items():
        tables = value if isinstance(value, list) and value else [value]
        if key in known or not all(isinstance(one, Mapping) for one in tables):
            raise ValueError(
                "a config must hold its fields in one place, and beside their table other tables "
                f"only. Got the table `{table}` and {key!r} beside it."
                f"{'' if key in known else _meant(key, known)}"
            )
        if near(key, "attn_core"):
            raise ValueError(
                f"a config must say `backend` and `impl` in the table `attn_core`. Got {key!r}. "
                "Did you mean 'attn_core'?"
            )


class Config:
    """What both configs can do: be loaded, written down, and changed in a few fields."""

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Fields by name are known ones: a dataclass alone names none that is near."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in given:
            if key not in known:
                raise TypeError(
                    f"{cls.__name__} must be given its fields only. "
                    f"Got {key!r}.{_meant(key, known)}"
                )
        return super().__new__(cls)

    TABLE: ClassVar[str]
    WORDS: ClassVar[tuple[str, ...]] = ()
    """Fields whose default is not None and that may be None: "none" in a file."""

    @classmethod
    def load(cls, source: str | PathLike[str] | Mapping[str, Any]) -> Self:
        """The config that a TOML, YAML or JSON file, or a mapping, holds.

        The fields stand at the top, or in a table (`attention`, `additive`, `transformer`) beside
        which other tables may stand, and nothing else. The table `attn_core`, beside either, says
        `backend` and `impl` where the fields leave them open. YAML needs `attn-core[yaml]`.

        Raises:
            ValueError: an unknown key, with the nearest known one; a value out of its range; a
                table `attn_core` that says another thing than the fields.
            TypeError: a value of the wrong kind, or a field missing that has no default.
        """
        held = dict(source) if isinstance(source, Mapping) else read(Path(source))
        said = settings_of(as_mapping(held.pop("attn_core", {}), "`attn_core` of a config"))
        known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if cls.TABLE in held:
            own = as_mapping(held.pop(cls.TABLE), f"`{cls.TABLE}` of a config")
            _check_beside(held, cls.TABLE, known)
            held = own
        elif tables := [kind.TABLE for kind in Config.__subclasses__() if kind.TABLE in held]:
            raise ValueError(
                f"a config of {cls.__name__} must hold the table `{cls.TABLE}`, or its fields at "
                f"the top. Got the table `{tables[0]}`."
            )
        for key in held:
            if key not in known:
                raise ValueError(
                    f"a config of {cls.__name__} must hold its fields only. "
                    f"Got {key!r}.{_meant(key, known)}"
                )
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in held:
                raise TypeError(f"a config of {cls.__name__} must hold {name!r}. Got none.")
        for name in cls.WORDS:
            if held.get(name) == "none":
                held[name] = None
        return cls(**held)._with_settings(said)

    def _with_settings(self, said: Mapping[str, str | None]) -> Self:
        """The config with the settings that stand beside it, which may not gainsay it."""
        found = {name: value for name, value in said.items() if value is not None}
        for name, value in found.items():
            own = getattr(self, name)
            if own not in (None, "auto", value):
                raise ValueError(
                    f"`{name}` must be the same in a config and in the table `attn_core` beside "
                    f"it. Got {own!r} and {value!r}."
                )
        return dataclasses.replace(self, **found) if found else self  # type: ignore[type-var]

    @classmethod
    def of(cls, given: Any = None, **options: Any) -> Self:
        """A config that is given (made already, a path or a mapping), with `options` on top."""
        if given is None:
            return cls.load(options)
        made = given if isinstance(given, cls) else None
        if made is None:
            if isinstance(given, Config) or not isinstance(given, (str, PathLike, Mapping)):
                raise TypeError(
                    f"`config` must be {cls.__name__}, a path or a mapping. "
                    f"Got {type(given).__name__}."
                )
            made = cls.load(given)
        return cls.load({**made.to_mapping(), **options}) if options else made

    def to_mapping(self) -> dict[str, Any]:
        """The fields that are not None, as numbers and words; `load` gives the config back."""
        found = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None or field.name in self.WORDS:
                value = list(value) if isinstance(value, tuple) else value
                found[field.name] = "none" if value is None else value
        return found

    def meaning(self) -> dict[str, Any]:
        """`to_mapping` with what was left open filled in, without what nothing reads.

        Two configs that mean the same say the same here.
        """
        raise NotImplementedError

    def differences(self, other: Any, free: tuple[str, ...]) -> list[str]:
        """The fields, but for those in `free`, in which two configs differ, as "name: a, b"."""
        mine, theirs = self.meaning(), other.meaning()
        names = [name for name in {**mine, **theirs} if name not in free]
        return [
            f"{name}: {mine.get(name)!r}, {theirs.get(name)!r}"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]

    def plain(self) -> None:
        """NumPy's scalars as Python's, which do not overflow and can be written down."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                self.set(field.name, value.item())

    def set(self, name: str, value: Any) -> None:
        """Write a field once more while the config is being made (it is frozen)."""
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class AttentionConfig(Config):
    """One attention layer; the module's docstring has the formula.

    Attributes:
        width: E, of the query's input, and of the output where `out_width` is left out.
        heads: query heads.
        kv_heads: key heads, which divide `heads`; as many where left out.
        head_width: D; width / heads where left out.
        value_width: Dv, of one head; D where left out.
        key_input, value_input: widths of the sources in cross-attention; E, and the key's.
        out_width: of the output; E where left out.
        bias: of the projections of query, key, value and gate.
        out_bias: of the projection of the output.
        qk_norm: None, or "rms": x / sqrt(mean(x**2) + norm_epsilon) * scale for each head's query
            and key, one scale (D,) for all heads (arXiv 2302.05442, in the form of Qwen 3).
        norm_epsilon: of qk_norm, and left out without it.
        positions: None, "rotary" (arXiv 2104.09864) or "alibi" (arXiv 2108.12409).
        rotary_base, rotary_fraction: channel pair j of R = fraction * D channels turns by
            base**(-2 j / R) radians a position; the other channels stay. These and the next are
            left out where positions are not "rotary".
        rotary_pairs: "half" pairs channel j with j + R / 2, "interleaved" 2 j with 2 j + 1.
        gate: multiply the heads' output by sigmoid(query's input @ Wg) (arXiv 2505.06708).
        causal: a query sees the keys up to its own position.
        window: neighbours before the query that it sees, besides its own position.
        softcap: c * tanh(s / c), after alibi and the call's own score.
        mask: a mask of the language without arrays, as text ("(q - k <= 2) | (k < 4)") or a Mask.
        scale: of the dot products; 1 / sqrt(D) where left out.
        dropout: rate on the weights, in training.
        dtype: of the parameters.
        backend: whose layer `build` gives; the flag's where left out.
        impl: of the attention, as in `attn_core.attention`.

    Raises:
        TypeError, ValueError: a field is not what it must be.
    """

    TABLE: ClassVar[str] = "attention"

    width: int
    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    value_width: int | None = None
    key_input: int | None = None
    value_input: int | None = None
    out_width: int | None = None
    bias: bool = True
    out_bias: bool = True
    qk_norm: str | None = None
    norm_epsilon: float = 1e-6
    positions: str | None = None
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    rotary_pairs: str = "half"
    gate: bool = False
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: str | None = None
    scale: float | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    backend: str | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        self.plain()
        fields.count("width", self.width)
        fields.heads(self.heads, self.kv_heads)
        fields.head_width(self.width, self.heads, self.head_width)
        for name in ("value_width", "key_input", "value_input", "out_width"):
            if getattr(self, name) is not None:
                fields.count(name, getattr(self, name))
        for name in ("bias", "out_bias", "gate", "causal"):
            fields.flag(name, getattr(self, name))
        fields.choice("qk_norm", self.qk_norm, (None, "rms"))
        fields.number("norm_epsilon", self.norm_epsilon, 0.0)
        fields.choice("positions", self.positions, (None, "rotary", "alibi"))
        fields.choice("rotary_pairs", self.rotary_pairs, ("half", "interleaved"))
        fields.number("rotary_base", self.rotary_base, 1.0)
        fields.number("rotary_fraction", self.rotary_fraction, 0.0)
        if self.positions == "rotary":
            fields.rotary(self.rotary_fraction, self.sizes.head)
        else:
            fields.unread(self, ROTARY, "positions", "rotary")
        if self.qk_norm is None:
            fields.unread(self, ("norm_epsilon",), "qk_norm", "rms")
        if self.window is not None:
            fields.count("window", self.window, 0)
        if self.softcap is not None:
            fields.number("softcap", self.softcap, 0.0)
        if self.scale is not None:
            fields.number("scale", self.scale, float("-inf"))
        if self.mask is not None:
            self.set("mask", written(self.mask))
        fields.rate("dropout", self.dropout)
        fields.choice("dtype", self.dtype, DTYPES)
        if self.backend is not None:
            fields.choice("backend", self.backend, ROOMS)
        check_impl(self.impl)

    @property
    def sizes(self) -> Sizes:
        """The sizes, none left open."""
        head = self.head_width or self.width // self.heads
        key_input = self.key_input or self.width
        return Sizes(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head=head,
            value=self.value_width or head,
            key_input=key_input,
            value_input=self.value_input or key_input,
            out=self.out_width or self.width,
        )

    def meaning(self) -> dict[str, Any]:
        """`to_mapping` with what was left open filled in."""
        s = self.sizes
        return {
            **self.to_mapping(),
            "kv_heads": s.kv_heads,
            "head_width": s.head,
            "value_width": s.value,
            "key_input": s.key_input,
            "value_input": s.value_input,
            "out_width": s.out,
            "scale": s.head**-0.5 if self.scale is None else self.scale,
        }


def written(mask: Any) -> str:
    """A mask without arrays as the text that the language prints."""
    if isinstance(mask, Mask):
        if mask.arrays:
            raise ValueError(
                "`mask` of a config must look no array up; such a mask goes with the call. "
                f"Got {mask}."
            )
        return _lasting(mask.tree)
    if not isinstance(mask, str):
        raise TypeError(f"`mask` must be text of the language. Got {type(mask).__name__}.")
    try:
        tree = parse(mask, exact=False)
    except ValueError as error:
        raise ValueError(
            "`mask` must be a condition on b, h, q and k in the language of masks, such as "
            f"'(q >= k) & (q - k < 256)'. Got {mask!r}."
        ) from error
    wrong = [step for step in tree.steps if step.op == "lookup" or step.kind == "float"]
    one = len(tree.results) == 1 and tree.steps[tree.results[0]].kind == "bool"
    if wrong or tree.reads("s") or not one:
        raise ValueError(
            "`mask` must be a condition of integers on b, h, q and k, without arrays. "
            f"Got {mask!r}."
        )
    return _lasting(tree)


def _lasting(tree: Tree) -> str:
    """A mask's text, if it says the same of a query whichever call brings it."""
    if tree.reads("row"):
        raise ValueError(
            "`mask` of a config must speak of positions, q, and not of rows of a call: step by "
            f"step every query is row 0. Got {text(tree)!r}."
        )
    return text(tree)
