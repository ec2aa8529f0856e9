"""The cases: named, seeded, framework-free questions about speed and memory.

A case is a shape, a dtype and one of four masks; they are the suite's plain attention at the sizes
at which time matters, and named in its way. Each mask is a range of keys to every query row, so
that everything about it can be counted and judged without the language:

    full            [0, T)
    causal          [0, i]
    window          [i - reach + 1, i]          the last `reach` keys, itself among them
    documents       [i // reach * reach, i]     causal within documents of `reach` tokens

and of each, in a case with `kv_lengths`, what lies before the length of the batch's own keys.

Who is asked stands with the case: subjects by the names of `subjects.py`, directions by

    forward         out, from arrays that need no gradient
    backward        the gradients of query, key and value alone, from a forward pass that is over
    both            out and its gradients, in one go

A subject may be asked with another mask, `jax:auto@causal` or `jax:auto@window-512`: it then takes
turns with the others of its case, and the two can be compared like any two.

TensorFlow's tape does not hand out a backward pass that could be called by itself, so there "both"
stands against the "both" of others; a ratio always has the same direction on both of its sides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from attn_core import masks
from attn_core.config import nearest
from attn_core.conformance.questions import numpy_dtype
from attn_core.language.values import Mask

MASKS = ("full", "causal", "window", "documents")
DIRECTIONS = ("forward", "backward", "both")
WINDOWS = (128, 256, 512, 1024, 2048, 4096)
DENSE = ((2048, 64), (4096, 64), (2048, 128))
"""T and D of the dense cases."""

LENGTHS = (4096, 8192, 16384)
"""Sequence lengths at which temporaries are measured; each is twice the one before."""

LONG = 65536
"""Tokens of which all logits would be 137 GB: whoever answers keeps none."""

BLOCK = 128
"""Rows and keys of the blocks in which live entries are counted: the finest tile in use."""


@dataclass(frozen=True)
class Case:
    """A named question.

    Attributes:
        name: unique; says mask, length, width and dtype.
        length: T, of keys, and of queries too where `queries` says nothing else.
        width: D, of queries, keys and values alike.
        mask: one of MASKS.
        reach: keys of a window, or tokens of a document.
        subjects: who is asked.
        directions: what of them.
        measure: "time", "memory" (peak temporaries) or "first" (what the first call costs).
        shrunk: by how much length and reach have been divided.
        queries: of them, where there are not T; 0 is T. Query i still stands at position i.
        kv_lengths: of each batch, the keys that are there; the others are padding. All, if empty.
    """

    name: str
    length: int
    width: int = 64
    heads: int = 8
    batch: int = 1
    dtype: str = "float32"
    mask: str = "full"
    reach: int = 0
    subjects: tuple[str, ...] = ()
    directions: tuple[str, ...] = DIRECTIONS
    measure: str = "time"
    shrunk: int = 1
    queries: int = 0
    kv_lengths: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.queries or self.length

    def sizes(self, name: str) -> tuple[int, int, int, int]:
        """(B, H, T, D) of query, key, value or out; a gradient is as large as its argument."""
        count = self.length if name in ("key", "value") else self.rows
        return self.batch, self.heads, count, self.width

    def keys(self, rows: np.ndarray, batch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The first key that each of these rows sees, and the first beyond the last."""
        first, beyond = np.zeros_like(rows), rows + 1
        if self.mask == "full":
            beyond = np.full_like(rows, self.length)
        elif self.mask == "window":
            first = np.maximum(rows - self.reach + 1, 0)
        elif self.mask == "documents":
            first = rows // self.reach * self.reach
        if self.kv_lengths:
            beyond = np.minimum(beyond, self.kv_lengths[batch])
        return np.minimum(first, beyond), beyond

    def dense(self, rows: np.ndarray, batch: int = 0) -> np.ndarray:
        """Which keys these rows see, boolean (rows, T), made without the language."""
        first, beyond = self.keys(rows, batch)
        key = np.arange(self.length)
        return (first[:, None] <= key) & (key < beyond[:, None])

    def language(self) -> Mask | None:
        """The same mask in the language."""
        if self.mask == "causal":
            return masks.causal()
        if self.mask == "window":
            return masks.causal() & masks.window(left=self.reach - 1)
        if self.mask == "documents":
            return masks.causal() & masks.segments(self.documents())
        return None

    def documents(self) -> np.ndarray:
        """The document of every token, int32 (T,)."""
        return (np.arange(self.length) // self.reach).astype(np.int32)

    @property
    def entries(self) -> int:
        """Live entries of one head, in all batches."""
        ranges = [self.keys(np.arange(self.rows), b) for b in range(self.batch)]
        return sum(int((beyond - first).sum()) for first, beyond in ranges)

    @property
    def blocks(self) -> int:
        """Blocks of BLOCK x BLOCK of one head of the first batch that hold a live entry.

        Ranges of neighbouring rows meet, so the blocks of a row of blocks are a range too.
        """
        first, beyond = self.keys(np.arange(self.rows))
        starts = np.arange(0, self.rows, BLOCK)
        low = np.minimum.reduceat(first, starts) // BLOCK
        high = -(-np.maximum.reduceat(beyond, starts) // BLOCK)
        return int((high - low).sum())

    def operations(self, direction: str) -> float:
        """Useful floating-point operations: two matmuls forward and five backward, on live entries.

        Those that a subject computes beside them, such as a masked half, do not count for it.
        """
        matmuls = {"forward": 2, "backward": 5, "both": 7}[direction]
        return 2.0 * matmuls * self.heads * self.entries * self.width

    def arrays(self) -> dict[str, np.ndarray]:
        """query, key, value and the cotangent of out, (B, H, T, D); equal for equal names."""
        rng = np.random.default_rng(np.random.SeedSequence([ord(c) for c in self.name]))
        dtype = numpy_dtype(self.dtype)
        return {
            name: rng.standard_normal(self.sizes(name), np.float32).astype(dtype)
            for name in ("query", "key", "value", "cotangent")
        }

    def asked_of(self, subject: str) -> Case:
        """The case as this subject is asked it: with its own mask where its name has one.

        Raises:
            ValueError: what follows the @ is no mask.
        """
        _, other, given = subject.partition("@")
        if not other:
            return self
        mask, _, reach = given.partition("-")
        if mask not in MASKS or (mask in ("full", "causal")) == reach.isdecimal():
            raise ValueError(
                "a subject's mask must be full, causal, window-<keys> or documents-<tokens>. "
                f"Got {given!r}."
            )
        return replace(self, mask=mask, reach=max(int(reach or 0) // self.shrunk, 1))

    def small(self) -> Case:
        """The same case at a sixteenth of its length, for a look at whether everything runs."""
        if self.length < 1024:
            return self
        return replace(
            self,
            length=self.length // 16,
            reach=max(self.reach // 16, 1),
            queries=-(-self.queries // 16),
            kv_lengths=tuple(max(n // 16, 1) for n in self.kv_lengths),
            shrunk=16,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Case:
        """The case that `as_dict` described, also after a journey through JSON."""
        given: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()
        }
        return cls(**given)


_OURS = ("torch:auto", "jax:auto", "tf:auto")
_PEERS: tuple[str, ...] = ("torch-sdpa", "torch-sdpa-flash", "matmul")
# One length is enough to see how far off these are, and they are slow; so is jax.nn.
_SLOW = ("torch-sdpa-math", "torch-flex", "keras-torch", "keras-tf", "keras-jax", "onnxruntime")
# What a framework's own operations cost on the tiles that are live, with nothing between them.
_FLOORS = ("torch-floor", "jax-floor", "tf-floor")
# What `auto` chooses among, by name, so that what it gains or loses can be told.
_NAMED = tuple(
    f"{name}:{impl}" for name in ("torch", "jax", "tf") for impl in ("chunked", "native")
)


def _dense() -> list[Case]:
    found = []
    for mask in ("full", "causal"):
        for length, width in DENSE:
            for dtype in ("float32", "bfloat16"):
                asked: tuple[str, ...] = ("torch:auto", "jax:auto", *_PEERS)
                if length == 2048:
                    # One is asked twice over: what the method itself gets wrong.
                    asked += (again(mask), "jax-nn")
                if dtype == "float32":
                    asked += ("tf:auto", "tf-unknown:auto")
                if (length, width, dtype) == (2048, 64, "float32"):
                    asked += (*_NAMED, *_SLOW)
                name = f"{mask}-T{length}-D{width}-{dtype}"
                found.append(Case(name, length, width, dtype=dtype, mask=mask, subjects=asked))
    return found


def _sparse() -> list[Case]:
    """At T 8192, each framework beside its own causal attention there."""
    asked = tuple(f"{name}{other}" for name in _OURS for other in ("", "@causal"))
    asked += ("torch-flex", "matmul")
    window = Case("window-256-T8192-D64-float32", 8192, mask="window", reach=256, subjects=asked)
    documents = replace(
        window, name="documents-16x512-T8192-D64-float32", mask="documents", reach=512
    )
    every = tuple(f"{name}@window-{reach}" for name in _OURS for reach in WINDOWS)
    sweep = Case(
        *("windows-T8192-D64-float32", 8192),
        mask="causal",
        subjects=every,
        directions=("forward",),
    )
    return [window, documents, sweep]


def _floors() -> list[Case]:
    """What attention costs beside what its products alone cost: where the time goes.

    Forward passes of every framework, and JAX's backward pass of what is sparse.
    """
    found = []
    for mask, length, reach in (
        ("full", 2048, 0),
        ("causal", 2048, 0),
        ("window", 8192, 256),
        ("documents", 8192, 512),
    ):
        # Beside the causal floor at that length: what share of work the bare products reach.
        # Beside jax.nn: how many times as fast as that they are.
        more = tuple(causal_floor(x) for x in ("torch", "jax", "tf")) if reach else ("jax-nn",)
        found.append(
            Case(
                f"floor-{mask}-T{length}-D64-float32",
                length,
                mask=mask,
                reach=reach,
                subjects=(*_OURS, *_FLOORS, "matmul", *more),
                directions=("forward",),
            )
        )
        if reach:
            found.append(
                replace(
                    found[-1],
                    name=f"floor-backward-{mask}-T{length}-D64-float32",
                    subjects=("jax:auto", "jax-floor", causal_floor("jax")),
                    directions=("backward",),
                )
            )
    beside = ("jax:auto", "jax-floor", "jax-nn", "matmul")
    for mask in ("full", "causal"):
        for length, width in DENSE:
            for dtype in ("float32", "bfloat16"):
                if length == 2048 and (width, dtype) != (64, "float32"):
                    found.append(
                        Case(
                            f"floor-{mask}-T{length}-D{width}-{dtype}",
                            *(length, width),
                            dtype=dtype,
                            mask=mask,
                            subjects=beside,
                            directions=("forward",),
                        )
                    )
    return found


def again(mask: str) -> str:
    """torch SDPA once more, by another name: asked with the mask that its case has anyway."""
    return f"torch-sdpa@{mask}"


def causal_floor(framework: str) -> str:
    """The floor under a framework's causal attention; torch's is its kernel, called directly."""
    return "torch-sdpa@causal" if framework == "torch" else f"{framework}-floor@causal"


def _tiny() -> list[Case]:
    asked = ("torch:auto", "torch:chunked", "torch-sdpa")
    return [Case("tiny-T4-D8-float32", 4, 8, heads=2, subjects=asked, directions=("forward",))]


def _memory() -> list[Case]:
    long = Case(
        f"memory-causal-T{LONG}-D64-float32",
        LONG,
        mask="causal",
        subjects=_OURS,
        # A pass there and back of everybody: TensorFlow hands out none that goes back alone.
        directions=("backward", "both"),
        measure="memory",
    )
    found = [
        Case(
            f"memory-{mask}-T{length}-D64-float32",
            length,
            mask=mask,
            subjects=(*_OURS, "tf-unknown:auto", "torch-sdpa-flash"),
            measure="memory",
        )
        for mask in ("full", "causal")
        for length in LENGTHS
    ]
    return [*found, long]


def _lengths() -> list[Case]:
    """Batches whose keys are of uneven lengths: a step of decoding, and a padded prefill."""
    asked = (*_OURS, "tf-unknown:auto", *_NAMED, "torch-sdpa", "jax-nn", "matmul")
    # Spread evenly, from nearly nothing to all there is.
    spread = tuple(32 * n for n in range(1, 65))
    decode = Case(
        *("decode-lengths-B64-T2048-D64-float32", 2048),
        batch=64,
        queries=1,
        kv_lengths=spread,
        subjects=asked,
        directions=("forward",),
    )
    prefill = Case(
        *("prefill-lengths-B4-T1024-D64-float32", 1024),
        batch=4,
        mask="causal",
        kv_lengths=(1024, 700, 389, 97),
        subjects=asked,
    )
    return [decode, prefill]


def _first() -> list[Case]:
    return [
        Case(
            f"first-{mask}-T4096-D64-float32",
            4096,
            mask=mask,
            subjects=("jax:auto", "jax-nn"),
            directions=("forward", "both"),
            measure="first",
        )
        for mask in ("full", "causal")
    ]


CASES: tuple[Case, ...] = (
    *(*_dense(), *_sparse(), *_floors(), *_lengths(), *_tiny(), *_memory(), *_first()),
)
BY_NAME = {case.name: case for case in CASES}


def named(patterns: list[str]) -> list[Case]:
    """Cases whose name is a pattern, or holds one; all without patterns.

    Raises:
        ValueError: no case is called that.
    """
    if not patterns:
        return list(CASES)
    found = [
        case
        for case in CASES
        if any(p == case.name or (p not in BY_NAME and p in case.name) for p in patterns)
    ]
    if not found:
        raise ValueError(
            f"`case` must name a case or a part of one. Got {', '.join(patterns)}."
            f"{nearest(patterns[0], tuple(BY_NAME))}"
        )
    return found
