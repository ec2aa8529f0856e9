"""Mask, Score and Dropout: frozen values that carry a tree and the arrays it looks up.

`mask(fn)` and `score(fn)` run the function once and keep what it computed. The values compose:
masks with `&`, `|` and `~`, scores with `a.then(b)`. They are pytrees in torch and JAX and carry
TensorFlow's flattening protocol, so they can be arguments of compiled functions; two that are
equal in everything but array values share one trace.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

import numpy as np

from attn_core.language.answered import refuse_answered
from attn_core.language.expr import Expr, Outside, position, set_tape, tape_is_set
from attn_core.language.operands import Table
from attn_core.language.text import text
from attn_core.language.tree import Tape, Tree

MASK_INDICES = ("b", "h", "q", "k")
SCORE_INDICES = ("s", "b", "h", "q", "k")

_watchers: list[Callable[[], None]] = []


def on_use(watcher: Callable[[], None]) -> None:
    """Call `watcher` whenever a Mask, Score or Dropout is made (the registry hooks in here)."""
    _watchers.append(watcher)


def _announce() -> None:
    for watcher in _watchers:
        watcher()


def trace(fn: Callable[..., Any], names: tuple[str, ...]) -> tuple[Tape, int]:
    """Run `fn` on expressions; the tape it wrote and the position of what it returned.

    Expressions know their tape. Of what has none (`row + 1`, `table[()]`) the thread must know it;
    but within a checkpoint torch.compile lets nothing change that stands outside. So the thread is
    told only where a function turns out to need it, which then runs again.
    """
    own = 1 if getattr(fn, "__self__", None) is not None else 0  # of a method, itself
    given = _reordered(getattr(fn, "__code__", None), names, own)
    if given:
        raise TypeError(f"`fn` must be fn({', '.join(names)}), in this order. Got fn({given}).")
    if not tape_is_set():
        try:
            return _run(fn, names, Tape())
        except Outside:
            pass
    tape = Tape()
    previous = set_tape(tape)
    try:
        return _run(fn, names, tape)
    finally:
        set_tape(previous)


def _reordered(code: Any, names: tuple[str, ...], own: int) -> str:
    """The function's own arguments, where they are these and stand in another order; else ""."""
    if not isinstance(code, CodeType):
        return ""
    given = code.co_varnames[own : code.co_argcount]
    return ", ".join(given) if given != names and sorted(given) == sorted(names) else ""


# torch.compile runs this for itself while it traces (torch.compiler.assume_constant_result).
setattr(_reordered, "_dynamo_marked_constant", True)  # noqa: B010


def _run(fn: Callable[..., Any], names: tuple[str, ...], tape: Tape) -> tuple[Tape, int]:
    try:
        result = fn(*[Expr(tape, tape.index(name)) for name in names])
        return tape, position(tape, result)
    except Outside:
        raise  # before torch.compile comes to what it cannot read: where an error was raised
    except (TypeError, IndexError, ValueError, AttributeError) as error:
        if _ours(error):
            raise
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            # Raised by the call itself, before a line of `fn` was run.
            raise TypeError(_not_called(fn, names, error)) from error
        # Frameworks word it in many ways when an expression meets one of their arrays.
        said = str(error).rstrip(". ")
        raise TypeError(
            f"tracing {_name(fn)} as fn({', '.join(names)}) failed: {said}. If it indexes or "
            "computes with an array, wrap that outside the function, "
            "`table = attn_core.operand(array)`, and look it up as `table[q]`. The functions an "
            "expression has are abs, attn_core.minimum, maximum, where and cast, and in a score "
            "attn_core.exp, log and tanh."
        ) from error


def _not_called(fn: Any, names: tuple[str, ...], error: BaseException) -> str:
    """Why `fn` could not be called: it is no function, or takes other arguments."""
    wanted = f"`fn` must be a function fn({', '.join(names)})"
    if callable(fn):
        return f"{wanted}. Got {_name(fn)}: {error}."
    hint = ""
    if hasattr(fn, "dtype"):
        hint = "; a boolean array is wrapped by attn_core.masks.dense(array)"
    elif isinstance(fn, (Mask, Score)):
        hint = ", which needs no wrapping"
    return f"{wanted}. Got {type(fn).__name__}{hint}."


def _ours(error: BaseException) -> bool:
    """Whether the language itself raised the error, and so has worded it already."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None or at.tb_frame.f_code is _run.__code__:
        return False
    return str(at.tb_frame.f_globals.get("__name__")).startswith("attn_core.language.")


def _name(fn: Any) -> str:
    return f"`{getattr(fn, '__name__', type(fn).__name__)}`"


Fixed = tuple[Table | None, ...]


def flatten(value: Mask | Score) -> tuple[tuple[Any, ...], tuple[Tree, Fixed]]:
    """The arrays that a pytree carries, and what is static beside them.

    A table of floats has no dtype of its own and would lose digits as an array of one, so it
    stays with the tree; other tables become NumPy arrays, whose values do not retrace.
    """
    held = value.arrays
    fixed = tuple([a if isinstance(a, Table) and a.kind == "float" else None for a in held])
    kept = [a for a, f in zip(held, fixed, strict=True) if f is None]
    return tuple([a.numpy() if isinstance(a, Table) else a for a in kept]), (value.tree, fixed)


def unflatten(kind: type, static: tuple[Tree, Fixed], arrays: Any) -> Any:
    """The Mask or Score again, around whatever a framework hands back."""
    tree, fixed = static
    rest = iter(arrays)
    return kind(tree, tuple([next(rest) if f is None else f for f in fixed]))


def _same(one: Mask | Score, other: Any) -> bool:
    """Whether both say the same, of numbers alone.

    An array may be written to between two masks, and a program that was compiled for the first may
    hold what stood in it: of arrays only the mask itself is the same.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return NotImplemented
    if one.tree != other.tree or len(one.arrays) != len(other.arrays):
        return False
    return all(
        # As text, in which 0.0 is not -0.0.
        isinstance(a, Table) and isinstance(b, Table) and repr(a.values) == repr(b.values)
        for a, b in zip(one.arrays, other.arrays, strict=True)
    )


class Mask:
    """Which keys a query may see: True = attend.

    Made by `attn_core.mask` or `attn_core.masks`; composes with `&`, `|`, `~`. `tree` is static,
    `arrays` are the operands it looks up. Two are equal that say the same, where
    they look up no arrays but lists of numbers.

    A row that may see no key has out 0 and weights 0, and its only gradient is that of a sink.
    """

    __slots__ = ("arrays", "tree")
    tree: Tree
    arrays: tuple[Any, ...]

    def __init__(self, tree: Tree, arrays: tuple[Any, ...] = ()) -> None:
        if callable(tree):
            raise TypeError("`tree` must be a Tree. Got a function: write attn_core.mask(fn).")
        self.tree = tree
        self.arrays = tuple(arrays)

    def _join(self, op: str, *others: Any) -> Mask:
        for other in others:
            if not isinstance(other, Mask):
                raise TypeError(
                    "a mask must be combined with masks; wrap a boolean array as "
                    f"attn_core.masks.dense(array). Got {type(other).__name__}."
                )
        tape = Tape()
        parts = [tape.replay(part.tree, part.arrays) for part in (self, *others)]
        return Mask(*tape.finish(tape.apply(op, *parts)))

    def __and__(self, other: Any) -> Mask:
        return self._join("and", other)

    def __or__(self, other: Any) -> Mask:
        return self._join("or", other)

    def __xor__(self, other: Any) -> Mask:
        return self._join("xor", other)

    def __invert__(self) -> Mask:
        return self._join("not")

    __rand__ = __and__
    __ror__ = __or__
    __array_ufunc__ = None

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value. Combine masks with `&`, `|` and `~`.")

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    def __hash__(self) -> int:
        return hash(self.tree)

    def __repr__(self) -> str:
        return f"mask({text(self.tree)})"

    def __tf_flatten__(self) -> tuple[Any, Any]:
        arrays, static = flatten(self)
        return static, arrays

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, arrays: Any) -> Mask:
        made: Mask = unflatten(cls, metadata, arrays)
        return made


class Score:
    """A change of the scaled score before bias, mask and softmax: s becomes score(s, b, h, q, k).

    Made by `attn_core.score` or `attn_core.scores`; `a.then(b)` applies a first. `tree` is static,
    `arrays` are the operands it looks up, and float ones receive gradients.
    """

    __slots__ = ("arrays", "tree")
    tree: Tree
    arrays: tuple[Any, ...]

    def __init__(self, tree: Tree, arrays: tuple[Any, ...] = ()) -> None:
        if callable(tree):
            raise TypeError("`tree` must be a Tree. Got a function: write attn_core.score(fn).")
        self.tree = tree
        self.arrays = tuple(arrays)

    def then(self, other: Score) -> Score:
        """The score that applies `self` first and `other` to its result."""
        given: Any = other
        if not isinstance(given, Score):
            hint = ": write attn_core.score(fn)" if callable(given) else ""
            raise TypeError(f"`other` must be a score. Got {type(given).__name__}{hint}.")
        tape = Tape()
        first = tape.replay(self.tree, self.arrays)
        return Score(*tape.finish(tape.replay(other.tree, other.arrays, bind={"s": first})))

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    def __hash__(self) -> int:
        return hash(self.tree)

    def __repr__(self) -> str:
        return f"score({text(self.tree)})"

    def __tf_flatten__(self) -> tuple[Any, Any]:
        arrays, static = flatten(self)
        return static, arrays

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, arrays: Any) -> Score:
        made: Score = unflatten(cls, metadata, arrays)
        return made


class Dropout:
    """Zero each softmax weight with probability `rate` and scale the rest by 1 / (1 - rate).

    The mask is Philox4x32-10 on (k // 4, q, h, b) under `seed`: the same, bit for bit, in every
    framework, on every device and under every tiling. `b` and `h` index the arrays passed in, so
    under vmap or shard_map give each part its own seed.

    Args:
        rate: host float, 0 <= rate < 1; the share of weights that is dropped.
        seed: Python int (taken mod 2**64), an integer scalar array, or a uint32 pair (low, high).
            It is an operand: changing it does not retrace. (torch.compile may compile a Python
            int once or twice more before it makes it dynamic; a tensor it compiles once.)

    Raises:
        TypeError: `rate` is no host number, or `seed` is left out or no integer.
        ValueError: `rate` is outside [0, 1), or a word of a pair is no uint32.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), of Philox.
    """

    __slots__ = ("rate", "seed")
    rate: float
    seed: Any

    def __init__(self, rate: float, seed: Any = None) -> None:
        if isinstance(rate, bool) or not isinstance(rate, (int, float, np.floating, np.integer)):
            raise TypeError(f"`rate` must be a host float. Got {type(rate).__name__}.")
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"`rate` must be at least 0 and below 1. Got {rate}.")
        if seed is None:
            raise TypeError(
                "`seed` must be given, as Dropout(rate, seed): nothing here draws from a global "
                "generator. Got no seed."
            )
        # torch.compile makes a symbol of a rate that is an argument of what it compiles, and where
        # one is a key of a set it takes its value: a rate is written into the mask's programme.
        (self.rate,) = {float(rate)}
        self.seed = _seed(seed)
        _announce()

    @property
    def threshold(self) -> int:
        """An entry is kept when its Philox word is at least this."""
        return drop_threshold(self.rate)

    def __repr__(self) -> str:
        return f"Dropout(rate={self.rate}, seed={self.seed})"

    def __tf_flatten__(self) -> tuple[Any, Any]:
        return (self.rate,), (seed_array(self.seed),)

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, components: Any) -> Dropout:
        return rebuild_dropout(metadata[0], components[0])


def drop_threshold(rate: float) -> int:
    """min(round(rate * 2**32), 2**32 - 1): a Philox word below it is dropped."""
    return min(round(rate * 2**32), 2**32 - 1)


def _seed(seed: Any) -> Any:
    """A host seed becomes the pair (low, high) of its words; an array stays what it is."""
    if isinstance(seed, bool):
        raise TypeError("`seed` must be an integer. Got a bool.")
    if isinstance(seed, (int, np.integer)):
        # Word by word: torch.compile may hold a symbol here, and inductor knows none beyond int64.
        value = int(seed)
        return (value % 2**32, value // 2**32 % 2**32)
    if isinstance(seed, (tuple, list)):
        if len(seed) != 2 or not all(isinstance(word, (int, np.integer)) for word in seed):
            raise TypeError(f"a `seed` pair must be two integers (low, high). Got {seed!r}.")
        if not all(0 <= int(word) < 2**32 for word in seed):
            raise ValueError(f"the words of a `seed` pair must be uint32. Got {seed!r}.")
        return (int(seed[0]), int(seed[1]))
    if not hasattr(seed, "dtype"):
        raise TypeError(
            "`seed` must be an int, an integer scalar array or a uint32 pair. "
            f"Got {type(seed).__name__}."
        )
    name, shape = str(seed.dtype), tuple(seed.shape)
    if "int" not in name:
        key = "; of a key of JAX take jax.random.key_data(key)" if name.startswith("key<") else ""
        raise TypeError(f"`seed` must hold integers. Got dtype {name}{key}.")
    if shape not in ((), (2,)):
        raise ValueError(f"`seed` must be a scalar or a pair of shape (2,). Got shape {shape}.")
    if shape == (2,) and "uint32" not in name:
        raise TypeError(f"a `seed` pair must be uint32 words (low, high). Got dtype {name}.")
    if isinstance(seed, np.ndarray):
        # A host value: taken whole here, so that no backend can narrow it later.
        return _seed(int(seed) if shape == () else (int(seed[0]), int(seed[1])))
    return seed


def seed_array(seed: Any) -> Any:
    """The leaf that carries a seed across a jit boundary: host pairs as two uint32 words."""
    return np.array(seed, np.uint32) if isinstance(seed, tuple) else seed


def rebuild_dropout(rate: float, seed: Any) -> Dropout:
    """A Dropout around whatever a framework hands back while unflattening: nothing is checked."""
    dropout = object.__new__(Dropout)
    dropout.rate = rate
    dropout.seed = seed
    return dropout


def mask(fn: Callable[..., Any]) -> Mask:
    """The mask that `fn(b, h, q, k)` computes; True = attend.

    The function runs once, now, on expressions: b (batch), h (query head), q (absolute query
    position) and k (key position), all int32. Use `&`, `|`, `~`, comparisons, integer arithmetic
    with `//` and `%` that floor, `abs`, attn_core.minimum, maximum, where, and look-ups in
    `attn_core.operand(array)`. Later changes of what it closed over are not seen.

    Raises:
        TypeError: for floats (they round differently from framework to framework), for Python
            constructs that would decide at trace time, and for b, h, q and k in another order.

    Example::

        attn_core.mask(lambda b, h, q, k: (q >= k) & ((q - k < 256) | (k < 4)))
    """
    tape, at = trace(fn, MASK_INDICES)
    refuse_answered(fn, tape)
    if tape.kind(at) != "bool":
        raise TypeError(
            f"a mask must return a condition such as `q >= k`. Got a value of kind {tape.kind(at)}."
        )
    tree, arrays = tape.finish(at)
    for step in tree.steps:
        if step.kind == "float":
            what = f"`{step.op}`" if step.op not in ("const", "lookup", "cast") else "a float"
            raise TypeError(
                f"a mask must hold integer and boolean arithmetic only, since floats round "
                f"differently from framework to framework. Got {what} in {text(tree)}."
            )
    _announce()
    return Mask(tree, arrays)


def score(fn: Callable[..., Any]) -> Score:
    """The score that `fn(s, b, h, q, k)` computes from the scaled score s.

    The function runs once, now, on expressions: s is the scaled logit in the accumulation dtype
    (at least float32), the indices are int32 as in `attn_core.mask`. Float operands it looks up
    receive gradients.

    Raises:
        TypeError: it returns a condition, or holds Python that would decide at trace time.

    Example::

        slopes = attn_core.operand(array)
        attn_core.score(lambda s, b, h, q, k: s - slopes[h] * abs(q - k))
    """
    tape, at = trace(fn, SCORE_INDICES)
    refuse_answered(fn, tape)
    if tape.kind(at) == "bool":
        raise TypeError("a score must return a number. Got a condition; did you mean a mask?")
    tree, arrays = tape.finish(tape.cast(at, "float"))
    _announce()
    return Score(tree, arrays)
