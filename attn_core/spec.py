"""The spec: what attention means here, and the record that says which attention is asked for.

For query row i of batch b and query head h, standing at absolute position q = i + query_offset[b],
and key position k, with Hq = G * Hk so that query head h reads key head h // G::

    s = scale * (Q[b,h,i] . K[b,h//G,k])            scale defaults to 1 / sqrt(D)
    s = score(s, b, h, q, k)                        optional
    s = s + bias[b,h,i,k]                           optional
    allowed = mask(b, h, q, k) and k < kv_lengths[b] and i < q_lengths[b] and s > -inf
    p = exp(s) / (sum over allowed of exp(s) + exp(sinks[h]))
    p = p * keep(seed, b, h, q, k) / (1 - rate)     optional dropout
    out[b,h,i] = sum over allowed of p . V[b,h//G,k]
    lse[b,h,i] = log(sum over allowed of exp(s) + exp(sinks[h]))

What libraries decide differently is decided here, once:

- A boolean mask is True = attend. A mask selects, it never adds a large negative number; a finite
  bias is data however large, and a bias or score of -inf makes its key not allowed.
- A row with no allowed key gives out 0, weights 0 and lse = its sink, or -inf without one; the
  only gradient that leaves it is d lse / d sink = 1. A sink of -inf is no sink.
- A padded query row (i >= q_lengths) gives out 0, weights 0, lse -inf even with sinks, and no
  gradient whatever comes from upstream.
- NaN or Inf where nothing may look (keys and values that no query of their group may see, query
  rows that may see no key and what flows back into them, bias, score and operand values at
  positions not allowed) reaches no output and no gradient. A NaN at an allowed position is data
  and passes through: "s > -inf" above is a comparison of numbers, and NaN is not one.
- Alignment is stated, never guessed: `query_offset` is an int, an int array (B,), "start" (0) or
  "end" ((kv_lengths or Tk) - (q_lengths or Tq)). It may be left out only where Tq = Tk is known
  when the call is traced, or where nothing but dropout reads q.
- Mask, bias, lengths and -inf all apply (AND).

Accumulation is at least float32; float64 stays float64. q, k and v share one dtype, `out` and
`weights` have it too, lse has the accumulation dtype, and each gradient has its input's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from attn_core.language.tree import Tree

DTYPES = ("float64", "float32", "bfloat16", "float16")
LAYOUTS = ("BHTD", "BTHD")
PRECISIONS = (None, "highest", "fast")
IMPLEMENTATIONS = ("reference", "chunked", "native", "triton")
"""Implementation names, alike in every backend. Which a backend has is its own list."""

FAR = 2**28
"""Positions lie within +-FAR, so that a few of them added up are an int32 still.

A length or offset that is not known when a call is traced counts as FAR, and a traced offset is
clamped to it; a host offset beyond it is refused.
"""

WIDTH = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}


class Facts(NamedTuple):
    """What a backend says of an array: unknown dimensions are None (tf.function)."""

    shape: tuple[int | None, ...]
    dtype: str
    device: str
    needs_grad: bool = False
    place: int = 0


@dataclass(frozen=True)
class Problem:
    """Everything static about one call: hashable, without arrays, equal for equal questions.

    Two calls with the same Problem get the same plan. Whatever may change from step to step (an
    int offset, lengths, a seed, parameters) is an operand and appears only as present or not.

    Attributes:
        backend: name of the backend that computes.
        host: NumPy came in, so NumPy goes out.
        device: kind of device, as the framework names it ("cpu", "cuda", "gpu", "tpu").
        dtype: of query, key and value.
        layout: "BHTD" or "BTHD".
        batch, q_len, k_len: B, Tq, Tk; None where the framework does not know them yet.
        heads, kv_heads, width, v_width: Hq, Hk, D, Dv.
        scale: the multiplier of the dot products.
        mask, score: trees, or None.
        mask_operands, score_operands: (dtype, shape) of each operand.
        bias: for each axis of (B, Hq, Tq, Tk) whether the bias spans it; None without bias.
        bias_dtype, sinks_dtype: their dtypes, None without.
        kv_lengths, q_lengths: whether they are given.
        offset: "zero", "given" or "end".
        rate: dropout rate, 0.0 without dropout.
        precision: None, "highest" or "fast".
        return_lse, return_weights: the extras asked for.
        needs_grad: whether the framework records gradients (torch knows; elsewhere False).
        place: which device of its kind, where that may decide (torch's GPUs); elsewhere 0.
    """

    backend: str
    host: bool
    device: str
    dtype: str
    layout: str
    batch: int | None
    q_len: int | None
    k_len: int | None
    heads: int
    kv_heads: int
    width: int
    v_width: int
    scale: float
    mask: Tree | None
    mask_operands: tuple[tuple[str, tuple[int | None, ...]], ...]
    score: Tree | None
    score_operands: tuple[tuple[str, tuple[int | None, ...]], ...]
    bias: tuple[bool, ...] | None
    bias_dtype: str | None
    sinks_dtype: str | None
    kv_lengths: bool
    q_lengths: bool
    offset: str
    rate: float
    precision: str | None
    return_lse: bool
    return_weights: bool
    needs_grad: bool
    place: int = 0

    @property
    def accumulation(self) -> str:
        """dtype of QK^T, s, softmax, PV sums and lse."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.heads // self.kv_heads


class Operands(NamedTuple):
    """The arrays of one call, in the order in which the spec names them; None where not given.

    Lengths and offset are int arrays of the framework, or tuples of host ints (one that holds for
    all, or B of them); seed is a host pair of words or an array; operands of mask and score may
    be host arrays or tables. `map_host` turns what is on the host into a backend's arrays.
    """

    query: Any
    key: Any
    value: Any
    bias: Any = None
    sinks: Any = None
    kv_lengths: Any = None
    q_lengths: Any = None
    query_offset: Any = None
    seed: Any = None
    mask: tuple[Any, ...] = ()
    score: tuple[Any, ...] = ()

    def map_host(self, array: Callable[[Any], Any]) -> Operands:
        """Every operand through `array`, which leaves alone what is the framework's already.

        A seed stays a host pair where it is one: its words are constants of Philox's key.
        """
        return Operands(
            query=array(self.query),
            key=array(self.key),
            value=array(self.value),
            bias=array(self.bias),
            sinks=array(self.sinks),
            kv_lengths=array(self.kv_lengths),
            q_lengths=array(self.q_lengths),
            query_offset=array(self.query_offset),
            seed=self.seed if isinstance(self.seed, tuple) else array(self.seed),
            mask=tuple([array(x) for x in self.mask]),
            score=tuple([array(x) for x in self.score]),
        )


class AttentionOutput(NamedTuple):
    """What `attention` returns when an extra is asked for; what was not asked for is None.

    Attributes:
        out: (B, Hq, Tq, Dv), or (B, Tq, Hq, Dv) in layout "BTHD"; dtype of query.
        lse: (B, Hq, Tq), natural log, accumulation dtype, differentiable.
        weights: (B, Hq, Tq, Tk), per head, after softmax and before dropout; dtype of query.
    """

    out: Any
    lse: Any = None
    weights: Any = None


def as_output(answer: Any) -> AttentionOutput:
    """An AttentionOutput around what an attention returned: an array, or (out, lse, weights)."""
    if isinstance(answer, AttentionOutput):
        return answer
    return AttentionOutput(*answer) if isinstance(answer, tuple) else AttentionOutput(answer)


class Plan(NamedTuple):
    """A decision: which implementation answers, and why the ones before it do not.

    Attributes:
        auto: whether "auto" has chosen it, and nobody asked for it by name.
    """

    problem: Problem
    impl: str
    refused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    auto: bool = False


class Account(NamedTuple):
    """What an implementation would spend on a problem, and in which numbers it multiplies.

    Bytes are those that stand beside arguments, results and gradients at the peak. They are
    estimates, within a factor of two where sequences are long; None where a size is not known yet.

    Attributes:
        tiles: rows and keys of a tile; None where nothing is cut into tiles, or nobody knows how.
        forward: bytes of a forward pass.
        backward: bytes of a forward and a backward pass together.
        products: the dtype in which the two products are multiplied.
        lowered: what else a switch allows for them, and the switch: ("TF32", "... is True").
        together: tiles of a row that are one product, where a row takes its live keys at once.
        turn: batches and key heads whose tiles are one product; None where nobody says.
    """

    tiles: tuple[int, int] | None
    forward: int | None
    backward: int | None
    products: str
    lowered: tuple[str, str] | None = None
    together: int = 1
    turn: tuple[int, int] | None = None
