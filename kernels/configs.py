"""How large a tile is, and how many warps share it: chosen by what is static, not by what is held.

    choose("forward", "sm_90", width=128, v_width=128, dtype="bfloat16", mask_class=MASK)

Asked in this order, and the first entry that fits answers:

    yours      what `attn-core bench tune` measured and wrote, at `user_file()`
    shipped    configs.toml beside this file; every entry says where it comes from
    default    the last lines of that table: small tiles that any GPU has room for

Nothing is tuned inside a call: the two files are read once, and what they say of a problem is the
same for every call. A user's file that cannot be read is left aside, with a warning that says why.

`attn-core kernels configs` shows what is in force.
"""

from __future__ import annotations

import os
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

DECODE = "decode"
"""`forward` where queries are few: heads packed, keys split."""

FUSED = "fused"
"""`d_keys` where it adds dQ by atomics on its way: it has tiles of its own."""

KEYS, PARTS = "d_keys", ("d_value", "d_key")
"""The kernel `d_keys` where it makes dK and dV at once; where it makes one of them, it has tiles of
its own for each."""

KERNELS = ("forward", DECODE, "combine", "delta", KEYS, *PARTS, "d_query", FUSED, "d_bias")

CLASSES = ("none", "positions", "mask", "score", "table", "dropout", "bias", "more", "loose")
NONE, POSITIONS, MASK, SCORE, TABLE, DROPOUT, BIAS, MORE, LOOSE = CLASSES
"""What a tile costs beside its products: nothing; a mask of positions alone; one that looks arrays
up, or lengths; a score, with any mask; an array that a mask or score looks up at every entry, by
row and key at once; dropout, with a mask of positions at most; a bias, with a mask at most that
looks up no such array; bias or dropout with anything more; and any bias that is read number by
number, since 16 do not divide where its rows begin. An entry of `more` is one of `bias` and of
`loose`, too."""

VARIABLE = "ATTN_CORE_KERNEL_CONFIGS"
"""The environment variable that names another file of yours."""

ANY = "any"
"""In the place of an architecture: every one."""

_tried: list[Entry] = []
_fused: bool | None = None
_apart: bool | None = None
_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}
DTYPES = tuple(_BITS)


@dataclass(frozen=True)
class Config:
    """The shape of a launch.

    Attributes:
        rows: queries of a tile (of `decode` at most: it takes as many as its rows need; `combine`
            takes one).
        keys: keys of a tile; of `combine` the parts of a row that are read together.
        warps, stages: as Triton means them.
        descriptors: whether tiles are read through tensor descriptors (TMA) where they may be.
        registers: that a thread may have at most, where the assembler, left alone, is content with
            fewer and spills; 0 leaves it alone. Of NVIDIA's GPUs.
        instead: of `fused` alone: whether it runs in the place of `d_keys` and `d_query`. That is
            for a measurement to say; where torch asks for one order of sums it never does.
        programs: of `decode` alone: to each multiprocessor, about, before keys are not split
            further.
        apart: of `d_keys` alone: whether `d_value` and `d_key` run in its place. That is five
            products instead of four, each with half of the sums to hold, and so in larger tiles.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    instead: bool = False
    apart: bool = False
    registers: int = 0
    programs: int = 2

    @property
    def launch(self) -> dict[str, int]:
        """What a launch is given beside its arguments.

        A product and a sum are one operation where kernels do not say otherwise. Triton leaves that
        to a variable of the environment, and from 3.10 on will not do it unless it is told to.
        """
        found = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return {**found, "maxnreg": self.registers} if self.registers else found

    @property
    def compiled(self) -> tuple[int | bool, ...]:
        """What the compiler knows of it: how many programs there are is none of that, nor is who
        runs in whose place."""
        apart = ("programs", "apart")
        return tuple(getattr(self, each.name) for each in fields(self) if each.name not in apart)


PREPARING = ("schedule", "facts", "reduced")
"""Kernels that work out what others are told. They have no products, and no entry in a table."""

PREPARED = Config(0, 0, 8, 1)
"""How those are launched; the tiles that a schedule is of are another kernel's."""


class Entry(NamedTuple):
    """A line of a table: whom it is for, what it says, and how that is known.

    Attributes:
        on: architectures, or `ANY`.
        widths: padded widths, of the wider of query and value; empty for all.
        bits: of a number of query; 0 for all.
        classes: some of `CLASSES`; empty for all.
        source: "compiled clean: ..." or "measured on ...".
        origin: "yours" or "shipped".
        refused: of `fused` alone: why it never runs there, or "".
    """

    kernel: str
    on: tuple[str, ...]
    widths: tuple[int, ...]
    bits: int
    classes: tuple[str, ...]
    config: Config
    source: str
    origin: str
    refused: str = ""

    def fits(self, kernel: str, architecture: str, width: int, bits: int, mask_class: str) -> bool:
        named = {MORE, mask_class} if mask_class in (BIAS, LOOSE) else {mask_class}
        return (
            self.kernel == kernel
            and (architecture in self.on or ANY in self.on)
            and (not self.widths or width in self.widths)
            and self.bits in (0, bits)
            and (not self.classes or not named.isdisjoint(self.classes))
        )


def class_of(
    *,
    mask: bool,
    positions: bool = False,
    score: bool,
    table: bool = False,
    bias: bool = False,
    loose: bool = False,
    dropout: bool = False,
) -> str:
    """The class of a problem.

    Args:
        mask: whether it has a mask or lengths.
        positions: whether its mask is of positions alone: no operands, and no lengths.
        score, bias, dropout: whether it has them.
        table: whether mask or score look an array up at every entry (`looks_up_entries`).
        loose: whether there is a bias whose rows begin anywhere.
    """
    if bias and loose:
        return LOOSE
    if bias and not (score or table or dropout):
        return BIAS
    if bias or (dropout and (score or (mask and not positions))):
        return MORE
    if dropout or table:
        return DROPOUT if dropout else TABLE
    if score:
        return SCORE
    if mask:
        return POSITIONS if positions else MASK
    return NONE


def choose(
    kernel: str, architecture: str, width: int, v_width: int, dtype: str, mask_class: str
) -> Config:
    """The configuration of a launch.

    Args:
        kernel: one of `KERNELS`.
        architecture: "sm_90", "gfx942", "interpreter"; one that no table knows gets the default.
        width, v_width: D and Dv.
        dtype: of query: float32, bfloat16 or float16.
        mask_class: one of `CLASSES`.
    """
    found = explain(kernel, architecture, width, v_width, dtype, mask_class)
    if kernel == FUSED and _fused is not None:
        return replace(found.config, instead=_fused and not found.refused)
    if kernel == KEYS and _apart is not None:
        return replace(found.config, apart=_apart)
    return found.config


@contextmanager
def fusing(yes: bool) -> Iterator[None]:
    """Fused or split, whatever the tables say is faster: for who compares them, in a process alone.

    Where it is `refused`, fused does not run for that.
    """
    global _fused
    before, _fused = _fused, yes
    try:
        yield
    finally:
        _fused = before


@contextmanager
def parting(yes: bool) -> Iterator[None]:
    """dK and dV by a launch each, or by one, whatever the tables say: as `fusing`."""
    global _apart
    before, _apart = _apart, yes
    try:
        yield
    finally:
        _apart = before


def idle(
    kernel: str, architecture: str, width: int, v_width: int, dtype: str, mask_class: str
) -> str:
    """Why no call launches this kernel there, or ""."""
    about = (architecture, width, v_width, dtype, mask_class)
    if kernel in (KEYS, *PARTS):
        apart = explain(KEYS, *about).config.apart
        if kernel == KEYS and apart:
            return f"{' and '.join(PARTS)} run in its place"
        if kernel in PARTS and not apart:
            return f"{KEYS} makes both at once"
    return explain(kernel, *about).refused


def explain(
    kernel: str, architecture: str, width: int, v_width: int, dtype: str, mask_class: str
) -> Entry:
    """The entry that `choose` goes by."""
    return _answering(kernel, architecture, width, v_width, dtype, mask_class)


@lru_cache(maxsize=1024)
def _answering(
    kernel: str, architecture: str, width: int, v_width: int, dtype: str, mask_class: str
) -> Entry:
    padded = max(16, 1 << (max(width, v_width) - 1).bit_length())
    for entry in all_entries():
        if entry.fits(kernel, architecture, padded, _BITS[dtype], mask_class):
            return entry
    raise LookupError(
        f"The shipped table must have an entry for every launch of {', '.join(KERNELS)}. "
        f"Got {kernel}, {architecture}, width {padded}, {dtype}, {mask_class}."
    )


def all_entries() -> tuple[Entry, ...]:
    """In the order in which they are asked."""
    return (*_tried, *yours(), *shipped())


@contextmanager
def trying(entry: Entry) -> Iterator[None]:
    """Ask this one first: for who measures it, alone in a process."""
    _tried.insert(0, entry)
    _answering.cache_clear()
    try:
        yield
    finally:
        _tried.remove(entry)
        _answering.cache_clear()


def user_file() -> Path:
    """Where your own entries live: $ATTN_CORE_KERNEL_CONFIGS, else in the user's configuration."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "attn-core" / "kernels.toml"


@lru_cache(maxsize=1)
def shipped() -> tuple[Entry, ...]:
    """The entries of configs.toml, in its order."""
    text = (Path(__file__).parent / "configs.toml").read_text("utf-8")
    return read(text, "shipped")


@lru_cache(maxsize=1)
def yours() -> tuple[Entry, ...]:
    """The entries of the user's file; none where there is none."""
    try:
        return standing()
    except ValueError as error:
        warnings.warn(f"{error} The file is left aside.", RuntimeWarning, stacklevel=2)
        return ()


def standing() -> tuple[Entry, ...]:
    """What the user's file holds as it stands, all of it; none where there is none.

    Raises:
        ValueError: it cannot be read, or an entry is not what it must be.
    """
    path = user_file()
    try:
        return read(path.read_text("utf-8"), "yours")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} must hold kernel configurations as `attn-core bench tune` writes them. "
            f"Got {str(error).removesuffix('.')}."
        ) from error


def forget() -> None:
    """Read the files again at the next question: for who has just written one."""
    yours.cache_clear()
    _answering.cache_clear()


# --- A table as text. -----------------------------------------------------------------------------

_POWERS = {
    "rows": (16, 256),
    "keys": (16, 256),
    "warps": (1, 32),
}


def read(text: str, origin: str) -> tuple[Entry, ...]:
    """The entries of a table.

    Raises:
        ValueError: it is no TOML, or an entry is not what it must be.
    """
    table = tomllib.loads(text)
    entries = table.pop("entries", [])
    if table or not isinstance(entries, list):
        got = ", ".join(table) or f"entries = {entries!r}"
        raise ValueError(f"`entries` must be a list, and all that there is. Got {got}.")
    found = []
    for number, raw in enumerate(entries, 1):
        try:
            found.append(_entry(raw, origin))
        except ValueError as error:
            raise ValueError(f"entry {number} of {len(entries)}: {error}") from error
    return tuple(found)


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Put these entries into a file, at once or not at all."""
    lines = ["# Kernel configurations measured on this machine: `attn-core bench tune`.", ""]
    lines += ["entries = ["]
    lines += [f"    {spelled(entry)}," for entry in entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text("\n".join([*lines, "]", ""]), "utf-8")
    beside.replace(path)


def spelled(entry: Entry) -> str:
    """An entry as a line of a table."""
    parts = [f'kernel = "{entry.kernel}"', f"on = {_list(entry.on)}"]
    if entry.widths:
        parts.append(f"widths = {list(entry.widths)}")
    if entry.bits:
        parts.append(f"bits = {entry.bits}")
    if entry.classes:
        parts.append(f"classes = {_list(entry.classes)}")
    c = entry.config
    parts += [f"rows = {c.rows}, keys = {c.keys}, warps = {c.warps}, stages = {c.stages}"]
    parts += [f"registers = {c.registers}"] if c.registers else []
    parts += [f"programs = {c.programs}"] if entry.kernel == DECODE else []
    parts += [f"{name} = true" for name in _SWITCHES if getattr(c, name)]
    for name, said in (("refused", entry.refused), ("source", entry.source)):
        escaped = said.replace("\\", "\\\\").replace('"', '\\"')
        parts += [f'{name} = "{escaped}"'] if said or name == "source" else []
    return "{ " + ", ".join(parts) + " }"


def _list(words: Iterable[str]) -> str:
    return "[" + ", ".join(f'"{word}"' for word in words) + "]"


def _entry(raw: Any, origin: str) -> Entry:
    if not isinstance(raw, Mapping):
        raise ValueError(f"An entry must be a table of names and values. Got {raw!r}.")
    known = {"kernel", "on", "widths", "bits", "classes", "source", "refused", "registers"}
    known |= {*_NUMBERS, *_SWITCHES, "programs"}
    odd = sorted(set(raw) - known)
    missing = sorted({"kernel", "on", "source", *_NUMBERS} - set(raw))
    if odd or missing:
        wrong = [f"{name} beside" for name in odd] + [f"no {name}" for name in missing]
        raise ValueError(
            f"An entry must have {', '.join(sorted(known))}. Got {', '.join(wrong)} in {dict(raw)}."
        )
    if raw["kernel"] not in KERNELS:
        raise ValueError(f"`kernel` must be one of {', '.join(KERNELS)}. Got {raw['kernel']!r}.")
    for name, kind in (("on", str), ("widths", int), ("classes", str)):
        many = raw.get(name, [])
        if not (isinstance(many, list) and all(isinstance(each, kind) for each in many)):
            raise ValueError(f"`{name}` must be a list of {kind.__name__}. Got {many!r}.")
    if raw.get("bits", 0) not in (0, *_BITS.values()):
        raise ValueError(f"`bits` must be 16 or 32, or left out for both. Got {raw['bits']!r}.")
    for name, (least, most) in _POWERS.items():
        n = raw[name]
        if not (isinstance(n, int) and least <= n <= most and n & (n - 1) == 0):
            raise ValueError(
                f"`{name}` must be a power of two from {least} to {most}. Got {n!r} in {dict(raw)}."
            )
    if not (isinstance(raw["stages"], int) and 1 <= raw["stages"] <= 8):
        raise ValueError(f"`stages` must be an int from 1 to 8. Got {raw['stages']!r}.")
    registers = raw.get("registers", 0)
    if not (isinstance(registers, int) and registers in (0, *range(64, 256, 8), 255)):
        raise ValueError(
            f"`registers` must be 255, or a multiple of 8 from 64 on. Got {registers!r}."
        )
    if registers and not all(on.startswith("sm_") for on in raw["on"]):
        raise ValueError(f"`registers` must be of NVIDIA's GPUs alone. Got {raw['on']!r}.")
    programs = raw.get("programs", Config.programs)
    if not (isinstance(programs, int) and 1 <= programs <= 16):
        raise ValueError(f"`programs` must be an int from 1 to 16. Got {programs!r}.")
    if "programs" in raw and raw["kernel"] != DECODE:
        raise ValueError(f"`programs` must be of kernel {DECODE}. Got it of {raw['kernel']!r}.")
    classes = tuple(raw.get("classes", ()))
    if not set(classes) <= set(CLASSES):
        raise ValueError(f"`classes` must be some of {', '.join(CLASSES)}. Got {list(classes)}.")
    for name in _SWITCHES:
        if not isinstance(raw.get(name, False), bool):
            raise ValueError(f"`{name}` must be true or false. Got {raw[name]!r} in {dict(raw)}.")
    for name, kernel in (("instead", FUSED), ("refused", FUSED), ("apart", KEYS)):
        if raw.get(name) and raw["kernel"] != kernel:
            raise ValueError(f"`{name}` must be of kernel {kernel}. Got it of {raw['kernel']!r}.")
    if raw.get("instead") and raw.get("refused"):
        raise ValueError(f"one of `instead` and `refused` must be left out. Got {dict(raw)}.")
    config = Config(
        **{name: raw[name] for name in _NUMBERS},
        **{name: raw.get(name, False) for name in _SWITCHES},
        registers=registers,
        programs=programs,
    )
    return Entry(
        raw["kernel"],
        tuple(raw["on"]),
        tuple(raw.get("widths", ())),
        raw.get("bits", 0),
        classes,
        config,
        str(raw["source"]),
        origin,
        str(raw.get("refused", "")),
    )


_NUMBERS = ("rows", "keys", "warps", "stages")
_SWITCHES = ("descriptors", "instead", "apart")
