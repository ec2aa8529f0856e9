"""What a kernel is launched with, as types: for compiling it where there are no arrays.

A launch of arrays tells Triton the dtype of each pointer, which sizes and strides are 1 or can be
divided by 16, and which arguments are constants. Here the same is said of a sample, whose arrays
are aligned and lie row by row. Its sizes come in two kinds (`Job.even`), since the compiler needs
other registers for each:

    even    16 divides every size, and each query head has keys of its own: a group is 1
    odd     nothing is known of any size

Rows of a bias are multiples of 16 apart in both, since a bias is often padded so that 16 bytes of
it may be read at once. Where it is not, kernels are others, and of odd sizes they are compiled for
such rows too (`Job.loose`).

A cache that grows must not have its kernels compiled again and again. So forward is told nothing
of sizes but whether 16 divides the number of keys, and in decoding not even that unless there is a
bias; `combine`, `schedule` and `facts` are told nothing, and are there once, as "odd". Decoding has
as many rows in a tile as a group has queries, so that there are three of it (`Job.queries`):

    even              16 queries of a head: tiles of 16 rows
    odd               up to 16 queries, of as many heads as the table's tile has room for
    odd, one query    of 5 to 8 heads, in tiles of 16 rows: what a step of a model asks
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from triton import JITFunction, next_power_of_2
from triton.compiler import ASTSource

from attn_core.kernels import backward, bias, forward, rules, schedule, statistics, tile, weights
from attn_core.kernels.configs import Config
from attn_core.kernels.reach import Form, reach
from attn_core.kernels.samples import operands_of, tree_of
from attn_core.kernels.source import of_mask, of_score
from attn_core.language.duals import differentiate
from attn_core.language.neighbours import full_tiles_are_neighbours
from attn_core.language.tree import Tree

if TYPE_CHECKING:
    from attn_core.kernels.ahead import Job

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_OPERANDS = {"int": "*i32", "float": "*fp32", "bool": "*i8"}


class _Whole(NamedTuple):
    """An int that is known to be divided by 16."""

    kind: str = "i32"


class _Described(NamedTuple):
    """A tensor descriptor of tiles of a 4-D array."""

    kind: str


WHOLE = _Whole()
ROWS = (WHOLE, WHOLE, WHOLE, 1)
"""Strides of an array that lies row by row."""


def source(job: Job, config: Config) -> ASTSource:
    """What `triton.compile` takes, for one kernel.

    To the last word what a launch hands over, attributes that say nothing among them: so a launch
    finds in Triton's cache what has been compiled ahead of time (`hash_in_order`).
    """
    kernel, positional, constants = _ARGUMENTS[job.kernel](_Call(job, config))
    names = kernel.arg_names
    signature: dict[str, Any] = {}
    known: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for at, (name, given) in enumerate(zip(names, positional, strict=False)):
        if kernel.params[at].do_not_specialize:
            signature[name] = _told(given, (at,), known, {})
        else:
            signature[name] = _told(given, (at,), known, attributes)
    for name in names[len(positional) :]:
        signature[name] = "constexpr"
        known[(names.index(name),)] = told = constants.pop(name)
        if isinstance(told, str):
            attributes[(names.index(name),)] = []
    assert not constants, constants
    return ASTSource(kernel, signature, known, attributes)


@cache
def hash_in_order() -> None:
    """Has Triton hash every function of the kernels, in one order.

    A function's hash holds the constants of those that it calls only where they had a hash before
    it had: left alone, `d_query` has another one where it is the first kernel of a process.
    """
    for module in (rules, tile, forward, statistics, weights, backward, bias, schedule):
        for each in vars(module).values():
            if isinstance(each, JITFunction):
                each.cache_key  # noqa: B018 - it is kept


def _told(given: Any, at: tuple[int, ...], known: Any, attributes: Any) -> Any:
    """The type of an argument; what is known of it goes into the other two."""
    if isinstance(given, _Whole):
        attributes[at] = [["tt.divisibility", 16]]
        return given.kind
    if isinstance(given, _Described):
        return given.kind
    if isinstance(given, tuple):
        return tuple(_told(x, (*at, n), known, attributes) for n, x in enumerate(given))
    if given is None or given == 1:
        known[at] = given
        return "constexpr"
    if given.startswith("*"):
        attributes[at] = [["tt.divisibility", 16]]
    elif given == "i32":
        attributes[at] = []
    return given


class _Call:
    """What the kernels are told alike."""

    def __init__(self, job: Job, config: Config) -> None:
        sample = job.sample
        self.job, self.config, self.sample = job, config, sample
        self.mask, self.score = tree_of(sample.mask), tree_of(sample.score)
        self.array = f"*{_TYPES[job.dtype]}"
        self.none, self.size = "*i32", WHOLE if job.even else "i32"
        self.counts = (self.size, 1 if job.even else "i32", *[self.size] * 4)
        self.lengths = ("*i32", "*i32", "*i32")
        # A stride of 0 is a multiple of 16.
        self.length_strides: tuple[Any, ...]
        self.length_strides = (1, 1, WHOLE) if sample.lengths else (WHOLE, WHOLE, WHOLE)
        self.bias = self.array if sample.bias else self.none
        self.bias_strides = self.spanned("i32" if job.loose else WHOLE)
        self.sinks = "*fp32" if sample.sinks else self.none
        self.seed = "*i64" if sample.dropout else self.none
        threshold = "i32" if sample.dropout else WHOLE  # none is 0
        self.numbers = ("fp32", threshold, "fp32")
        self.mask_operands = arguments(self.mask, self.size)
        self.score_operands = arguments(self.score, self.size)
        self.arrays = (
            *(self.mask_operands, self.score_operands),
            *((self.bias,), self.bias_strides, (self.seed,)),
        )
        self.schedule = ("*i32", "*i32", "*i32")
        moved = [self.mask is not None and self.mask.reads(name) for name in "bh"]
        moved[0] = moved[0] or sample.lengths
        self.maps: tuple[Any, ...] = tuple(self.size if yes else WHOLE for yes in moved)
        self.pads = {
            "D": job.width,
            "DV": job.v_width,
            "PAD": max(16, next_power_of_2(job.width)),
            "PAD_V": max(16, next_power_of_2(job.v_width)),
        }
        self.options = {
            **self.pads,
            **of_mask(self.mask, forms(self.mask)),
            "KV_LENGTHS": sample.lengths,
            "Q_LENGTHS": sample.lengths,
            "DROPOUT": sample.dropout,
            "PRECISION": "ieee",
        }

    def spanned(self, stride: Any) -> tuple[Any, ...]:
        """Strides of an array of the bias' axes, given that of all but the keys'."""
        spans = (1 if axis == "k" else stride for axis in "bhqk")
        # Along an axis that it does not span it is 0.
        return tuple(
            n if axis in self.sample.bias else WHOLE for axis, n in zip("bhqk", spans, strict=True)
        )

    def tile(self, count: int, wide: str = "PAD", dtype: str = "") -> Any:
        """An array that is read by tiles of so many rows, of the job's dtype or another one."""
        held = dtype or self.array[1:]
        if not self.config.descriptors:
            return f"*{held}"
        return _Described(f"tensordesc<{held}[1, 1, {count}, {self.pads[wide]}]>")

    def runs(self, *along: str) -> bool:
        return self.mask is None or full_tiles_are_neighbours(self.mask, *along)


def forms(tree: Tree | None) -> list[tuple[int, bool, bool]]:
    """(rank, whether boolean, whether it spans the keys) of each operand."""
    return [(rank, kind == "bool", True) for kind, rank in operands_of(tree)]


def arguments(tree: Tree | None, last: Any = "i32") -> tuple[Any, ...]:
    """Types of pointer and sizes of each operand."""
    found: list[Any] = []
    for kind, rank in operands_of(tree):
        found += [_OPERANDS[kind], *(["i32"] * rank)[1:], *[last] * (rank > 0)]
    return tuple(found)


_Made = tuple[Any, Sequence[Any], dict[str, Any]]


def _forward(c: _Call, rows: int = 0, pack: int = 1, split: bool = False) -> _Made:
    config, sample = c.config, c.sample
    out = "*fp32" if split else c.array
    positional = (
        *(c.array, c.tile(config.keys), c.tile(config.keys, "PAD_V"), out),
        *("*fp32", "*fp32", "*i8", c.bias, c.sinks, *c.lengths, c.seed, *c.schedule),
        *(c.mask_operands, c.score_operands, "fp32", "i32", "fp32"),
        *(ROWS, ROWS, ROWS, (WHOLE, *ROWS) if split else ROWS, c.bias_strides),
        *(c.length_strides, *["i32"] * 9),
    )
    plain = not (sample.score or sample.bias)
    return (
        forward.forward,
        positional,
        {
            **c.options,
            "M": rows or config.rows,
            "N": config.keys,
            "PACK": pack,
            "SPLIT": split,
            **of_score(c.score, forms(c.score)),
            "BIAS": bool(sample.bias),
            "WHOLE": c.job.even and (bool(sample.bias) or not split),
            "SINKS": sample.sinks and not split,
            "LATE": plain,
            "RUN": c.runs("k"),
            "DESCRIPTORS": config.descriptors,
        },
    )


def _decode(c: _Call) -> _Made:
    if c.sample.lengths:
        c.length_strides = (1, 1, 1)
    if c.job.queries == 1:
        rows, pack = 16, 8
        # Of one row nothing is said of how far rows are apart: 0.
        c.bias_strides = (*c.bias_strides[:2], WHOLE, c.bias_strides[3])
    elif c.job.even:
        rows, pack = 16, 1
    else:
        rows, pack = c.config.rows, c.config.rows // 16
    return _forward(c, rows, pack, split=True)


def _combine(c: _Call) -> _Made:
    positional = (
        *("*fp32", "*fp32", "*fp32", c.array, "*fp32", "*fp32", "*i8", c.sinks, "*i32"),
        *(c.length_strides[1], ROWS, "i32", "i32", "i32"),
    )
    constants = {
        "DV": c.pads["DV"],
        "PAD_V": c.pads["PAD_V"],
        "N": c.config.keys,
        "SINKS": c.sample.sinks,
        "Q_LENGTHS": c.sample.lengths,
    }
    return forward.combine, positional, constants


def _delta(c: _Call) -> _Made:
    positional = (
        *(c.array, c.array, "*fp32", "*i8", "*fp32", "*fp32", ("*fp32",) * 4, ROWS, ROWS),
        *(c.size, c.size),
    )
    constants = {
        "DV": c.pads["DV"],
        "PAD_V": c.pads["PAD_V"],
        "M": c.config.rows,
        "LSE": c.sample.sinks,
    }
    return statistics.delta, positional, constants


def _gradient(c: _Call) -> tuple[Sequence[Any], dict[str, Any]]:
    derivative = None if c.score is None else differentiate(c.score)
    score = of_score(derivative and derivative.tree, forms(c.score))
    statistics = ("*fp32",) * 4
    return (
        (statistics, c.arrays, c.numbers, c.lengths),
        {**c.options, "M": c.config.rows, "N": c.config.keys, **score},
    )


def _read(c: _Call) -> tuple[Any, ...]:
    """query, key, value and d_out."""
    rows, keys = c.config.rows, c.config.keys
    return c.tile(rows), c.tile(keys), c.tile(keys, "PAD_V"), c.tile(rows, "PAD_V")


def _tables(c: _Call) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(sites of the score, where their gradients are added)."""
    sites = () if c.score is None else differentiate(c.score).sites
    held = operands_of(c.score)
    places: list[Any] = []
    for site in sites:
        places += ["*fp32", *["i32"] * held[site.operand][1]]
    return backward.sites_of(site.indices for site in sites), tuple(places)


def _d_keys(c: _Call, key: bool = True, value: bool = True, fused: bool = False) -> _Made:
    told, constants = _gradient(c)
    sites, places = _tables(c) if fused else ((), ())
    statistics, arrays, numbers, lengths = told
    dq = c.tile(c.config.rows, dtype="fp32") if fused else None
    dk, dv = c.array if key else None, c.array if value else None
    positional = (
        *(*_read(c), dk, dv, dq, statistics, arrays, numbers, lengths),
        *(c.schedule, (ROWS,) * (7 if fused else 6), places),
        *(c.length_strides, c.maps, *c.counts),
    )
    more = {
        "BIAS": bool(c.sample.bias),
        "KEY": key,
        "VALUE": value,
        "SITES": sites,
        "FUSED": fused,
        "ALONE": c.job.even,
        "RUN": c.runs("q", "row"),
        "DESCRIPTORS": c.config.descriptors,
    }
    return backward.d_keys, positional, {**constants, **more}


def _d_key(c: _Call) -> _Made:
    return _d_keys(c, value=False)


def _d_value(c: _Call) -> _Made:
    return _d_keys(c, key=False)


def _fused(c: _Call) -> _Made:
    return _d_keys(c, fused=True)


def _d_query(c: _Call) -> _Made:
    told, constants = _gradient(c)
    sites, places = _tables(c)
    keys = c.config.keys
    positional = (
        *(c.array, c.tile(keys), c.tile(keys, "PAD_V"), c.array, c.array, *told, c.schedule),
        *((ROWS,) * 5, places),
        *(c.length_strides, c.maps, *c.counts),
    )
    more = {
        "BIAS": bool(c.sample.bias),
        "SITES": sites,
        "RUN": c.runs("k"),
        "DESCRIPTORS": c.config.descriptors,
    }
    return backward.d_query, positional, {**constants, **more}


def _d_bias(c: _Call) -> _Made:
    told, constants = _gradient(c)
    positional = (
        # The gradient has no gaps, wherever the bias has some.
        *(*[c.array] * 4, "*fp32", *told, (ROWS,) * 4, c.spanned(c.size)),
        *(c.length_strides, c.size, *c.counts),
    )
    spans = zip(("B", "H", "ROWS", "KEYS"), "bhqk", strict=True)
    return (
        bias.d_bias,
        positional,
        {**constants, **{name: axis in c.sample.bias for name, axis in spans}},
    )


def _schedule(c: _Call) -> _Made:
    tile, lengths = (c.config.rows, c.config.keys), (c.sample.lengths,) * 2
    held = operands_of(c.mask)
    forms = tuple(Form((False,) * rank, kind == "bool") for kind, rank in held)
    found = reach(c.mask, forms, tile, lengths)
    assert found is not None, c.sample.name
    given = list(c.mask_operands)
    for table in found.reduced:
        kind, rank = held[table.number]
        given += [_OPERANDS[kind], _OPERANDS[kind], *["i32"] * rank]
    positional = (*(*c.schedule, tuple(given), c.lengths, c.length_strides, *["i32"] * 8),)
    constants = {
        "REACH": found.call,
        "M": tile[0],
        "N": tile[1],
        "COUNT": min(128, schedule.AT_ONCE // found.entries),
        "ONCE": False,
        "COLUMNS": False,
        "KV_LENGTHS": lengths[0],
        "Q_LENGTHS": lengths[1],
    }
    return schedule.schedule, positional, constants


def _facts(c: _Call) -> _Made:
    positional = (*("*i32", "*i64", "*i32", "*i32"), (1, 1, 1), *["i32"] * 5)
    names = ("KV_LENGTHS", "Q_LENGTHS", "OFFSETS", "END")
    constants = {"FAR": 2**28, **dict.fromkeys(names, True), "COUNT": 128}
    return schedule.facts, positional, constants


def _reduced(c: _Call) -> _Made:
    tall, wide = c.config.rows, c.config.keys
    constants = {"TALL": tall, "WIDE": wide, "AT_ONCE": max(1, schedule.OF_TABLES // wide)}
    return schedule.reduced, (*["*i8"] * 3, *[c.size] * 4), constants


_ARGUMENTS = {
    "forward": _forward,
    "decode": _decode,
    "combine": _combine,
    "delta": _delta,
    "d_keys": _d_keys,
    "d_key": _d_key,
    "d_value": _d_value,
    "d_query": _d_query,
    "fused": _fused,
    "d_bias": _d_bias,
    "schedule": _schedule,
    "facts": _facts,
    "reduced": _reduced,
}
