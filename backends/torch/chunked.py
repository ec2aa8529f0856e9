"""Query tiles against live key tiles: linear memory, forward and backward, for every option.

The block map of the mask says which tiles are live; only they are computed, and only the partial
ones evaluate the mask. The backward pass rebuilds each tile from the statistics (m, log l) of its
rows.

Tiles are a loop in Python that only real tensors can run. So there are two operators,
`attn_core::chunked_forward` and `attn_core::chunked_backward`, opaque to torch.compile and export,
which take tensors and, as text, what is static; called with tensors as they are, without a
compiler, the loop is run at once. An `autograd.Function` binds the two, and another one the second
so that whoever differentiates twice, or forwards, is told that only `reference` does: without it
an operator's tangents would silently be zero.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch.autograd import forward_ad

from attn_core.backends.torch import flops, native_tiles
from attn_core.backends.torch.arrays import autocasts
from attn_core.backends.torch.chunked_backward import Saved, Upstream, backward
from attn_core.backends.torch.chunked_forward import forward
from attn_core.backends.torch.chunked_parts import Ask, Work, operands_of, read, written
from attn_core.backends.torch.tiles import constant
from attn_core.backends.torch.unseen import unseen
from attn_core.registry import UnsupportedError
from attn_core.spec import WIDTH, AttentionOutput, Operands, Problem

Array = Any

# Of the flat arguments: query, key, value, bias, sinks, kv_lengths, q_lengths, query_offset, seed,
# then operands. What has a gradient: the first five and the score's.
_FIXED, _DIFFERENTIABLE = 9, 5
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)

# What torch.compiler.assume_constant_result does, without loading torch's compiler (and triton).
written._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refusals(p: Problem) -> list[str]:
    return transformed() or exported()


def transformed() -> list[str]:
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return ["torch.func inside torch.compile is not implemented. Got a transform in the graph."]
    return []


def exported() -> list[str]:
    """ONNX has no operator of ours; what `reference` computes by, it has."""
    if torch.compiler.is_compiling() and _for_onnx():
        return [
            'an ONNX graph must be made of impl="reference". Got an operator of attn-core\'s own.'
        ]
    return []


def _for_onnx() -> bool:
    # Who has not loaded the exporter is not within it.
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


_for_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(
    p: Problem, x: Operands, kernel: str = "", fast: bool = False, falls: bool = False
) -> AttentionOutput:
    """`kernel`, `fast` and `falls` as in `Ask`."""
    seed = x.seed
    if isinstance(seed, tuple):
        made = torch.tensor if torch.compiler.is_compiling() else constant
        seed = made(seed, dtype=torch.int64, device=x.query.device)
    rest = (x.kv_lengths, x.q_lengths, x.query_offset, seed, *x.mask, *x.score)
    given = (x.query, x.key, x.value, x.bias, x.sinks, *rest)
    if torch.compiler.is_compiling():
        mask, score = _plain(p.mask), _plain(p.score)
        extras = (p.return_lse, p.return_weights, kernel, fast, falls)
        text = written(p.layout, p.offset, p.rate, mask, score, len(x.mask), *extras)
        found = _forward_op(text, p.scale, *_packed(given))
    else:
        extras = (p.return_lse, p.return_weights, kernel, fast, falls)
        ask = Ask(p.layout, p.offset, p.rate, p.mask, p.score, len(x.mask), *extras)
        if _functionalized():
            found = _forward_op(ask.written(), p.scale, *_packed(given))
        elif _unwatched(given):
            found = _forward(ask, p.scale, given)
        else:
            found = _Attend.apply(ask, p.scale, len(x.mask), *given)
    return AttentionOutput(
        found[0], found[1] if p.return_lse else None, found[2] if p.return_weights else None
    )


def _functionalized() -> bool:
    """Whether torch.func.functionalize is at work, which knows operators alone.

    What differentiates an operator is a function again, so its derivatives are refused.
    """
    kinds = torch._C._functorch.TransformType
    stack = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    if kinds.Functionalize not in stack:
        return False
    if kinds.Grad in stack or kinds.Jvp in stack:
        raise _refused("derivatives by torch.func under torch.func.functionalize need")
    return True


def _unwatched(given: Sequence[Any]) -> bool:
    """Whether nobody differentiates, transforms or traces the call: it is made at once, which takes
    the host a fifth less time than by way of a function that could be differentiated."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return False
    return _real(given)


def sums_wide(group: int, dtype: str) -> bool:
    """Whether torch's kernel adds the gradients of a group of heads in the accumulation's dtype.

    Its CPU kernel adds them in the dtype of key and value.
    """
    return group == 1 or WIDTH[dtype] >= 32


def _plain(tree: Any) -> tuple[Any, ...] | None:
    """A tree in plain numbers: of a mask that is an argument of what is compiled they are none."""
    if tree is None:
        return None
    steps = []
    for op, kind, args, value in tree.steps:
        value = index(value) if isinstance(value, int) else value
        steps.append((op, kind, tuple([index(at) for at in args]), value))
    return tuple(steps), tuple([index(at) for at in tree.results])


# --- The two operators. ---------------------------------------------------------------------------


# One argument for each: of a list with None in it torch does not know which entries need gradients.
_GIVEN = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks, Tensor? kv_lengths, "
    "Tensor? q_lengths, Tensor? query_offset, Tensor? seed, Tensor[] operands"
)
_UPSTREAM = "Tensor[] saved, Tensor? d_out, Tensor? d_lse, Tensor? d_weights"


@torch.library.custom_op(
    "attn_core::chunked_forward",
    mutates_args=(),
    schema=f"(str ask, float scale, {_GIVEN})"
    " -> (Tensor out, Tensor lse, Tensor weights, Tensor m, Tensor log_l, Tensor alive)",
)
def _forward_op(ask: str, scale: float, *given: Any) -> tuple[Array, ...]:
    """As `chunked_forward.forward`, in memory as each reads: a compiler was promised that."""
    return tuple([a.contiguous() for a in _forward(read(ask), scale, _flat(given))])


@torch.library.custom_op(
    "attn_core::chunked_backward",
    mutates_args=(),
    schema=f"(str ask, float scale, bool[] wanted, {_GIVEN}, {_UPSTREAM}) -> Tensor[]",
)
def _backward_op(ask: str, scale: float, wanted: Sequence[bool], *given: Any) -> list[Array]:
    """As `chunked_backward.backward`, in memory as each reads: a compiler was promised that."""
    saved, *upstream = given[_FIXED + 1 :]
    found = _backward(read(ask), scale, wanted, _flat(given), saved, upstream)
    return [g.contiguous() for g in found]


def _launched(ask: Ask, given: Sequence[Any]) -> Ask:
    """As it is asked, but that no kernel is launched on arrays that hold nothing.

    Kernels of ours leave them to the loop; of torch's fused one, which refuses them, only those
    come here whose sizes a compiler knows as it runs.
    """
    empty = ask.kernel and 0 in (*given[0].shape, *given[1].shape)
    return replace(ask, kernel="") if empty else ask


@unseen
def _forward(ask: Ask, scale: float, given: Sequence[Any]) -> tuple[Array, ...]:
    ask = _launched(ask, given)
    x = operands_of(ask, _beside(given))
    with _without_autocast(given[0]):
        if ask.kernel == "triton":
            from attn_core.backends.torch import triton_forward, unmade

            launched = unmade.unless(
                "forward", ask, x, lambda: triton_forward.forward(ask, scale, x)
            )
            if launched is not None:
                return launched
            ask = replace(ask, kernel="")
        found = native_tiles.forward(ask, scale, x) if ask.kernel else None
        if found is not None:
            return found
        return forward(Work(ask, scale, x))


@unseen
def _backward(
    ask: Ask,
    scale: float,
    wanted: Sequence[bool],
    given: Sequence[Any],
    saved: Sequence[Array],
    upstream: Sequence[Array | None],
) -> list[Array]:
    ask = _launched(ask, given)
    out, lse, weights = upstream
    # A compiler may hand over zeros, of no shape, for what was never returned.
    up = Upstream(out, lse if ask.lse else None, weights if ask.weights else None)
    x = operands_of(ask, _beside(given))
    axis = ask.layout.index("H")
    group = x.query.shape[axis] // x.key.shape[axis]
    with _without_autocast(given[0]):
        if ask.kernel == "triton":
            from attn_core.backends.torch import triton_backward, unmade

            launched = unmade.unless(
                *("backward", ask, x),
                lambda: triton_backward.backward(ask, scale, x, Saved(*saved), up, wanted),
            )
            if launched is not None:
                return launched
            ask = replace(ask, kernel="")
        kernel = ask.kernel and sums_wide(group, str(x.query.dtype).removeprefix("torch."))
        w, rows = Work(ask, scale, x), Saved(*saved)
        coarse = native_tiles.coarse(x, rows) if ask.kernel else None
        found = None
        # Where a mask looks something up, as of packed documents, rows that are coarse leave the
        # others as they are: no document's gradients tell what stands in another.
        if coarse is None or (x.mask and not coarse.all()):
            if kernel and up.lse is None and up.out is not None:
                fine = rows if coarse is None else rows.only(~coarse)
                found = native_tiles.backward(ask, scale, x, fine, up.out, wanted)
            if found is not None and coarse is None:
                return found
        if coarse is not None:
            found_out, _, _, *statistics = forward(w)
            again = Saved(found_out, *statistics)
            if found is not None:
                rows = again.only(coarse)
            else:
                rows = rows.replaced(again, coarse, axis) if x.mask else again
        more = backward(w, rows, up, wanted)
        return more if found is None else [a + b for a, b in zip(found, more, strict=True)]


def _beside(given: Sequence[Any]) -> list[Any]:
    """Everything on the device of query: single numbers may have come from the host.

    torch's own operations take such a number along as an argument; so does adding it to 0, which
    waits for nothing. Kernels and look-ups need it on the device. Of unsigned integers torch adds
    bytes alone; as int64 a number of 64 bits keeps them all.
    """
    device = given[0].device

    def moved(x: Array) -> Array:
        x = x.to(torch.int64) if x.dtype in _UNSIGNED else x
        return torch.zeros((), dtype=x.dtype, device=device) + x

    return [x if x is None or x.device == device else moved(x) for x in given]


def _without_autocast(x: Array) -> Any:
    kind = x.device.type
    if autocasts(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@_forward_op.register_fake
def _(ask: str, scale: float, query: Array, key: Array, value: Array, *rest: Any) -> Any:
    asked = read(ask)
    first = asked.layout == "BHTD"
    batch, *middle = query.shape[:3]
    heads, q_len = middle if first else reversed(middle)
    rows = (batch, heads, q_len)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    m = query.new_empty(rows, dtype=dtype)
    return (
        query.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(rows if asked.lse else (0,), dtype=dtype),
        query.new_empty((*rows, key.shape[2 if first else 1]) if asked.weights else (0,)),
        m,
        torch.empty_like(m),
        query.new_empty(rows, dtype=torch.bool),
    )


@_backward_op.register_fake
def _(ask: str, scale: float, wanted: Sequence[bool], *given: Any) -> Any:
    flat = _flat(given)
    places = (*flat[:_DIFFERENTIABLE], *flat[_FIXED + read(ask).masks :])
    return [x.new_empty(x.shape) for x, yes in zip(places, wanted, strict=True) if yes]


def _looped(call: Any) -> Any:
    """The rule of vmap: once for each example, since masks and dropout count the batch."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, tuple[int, ...]]:
        # Of no examples the results have shapes all the same: those of one that is made up.
        some = args if info.batch_size else _first(args, in_dims)
        each = [call(*_select(some, in_dims, n)) for n in range(max(1, info.batch_size))]
        found = tuple([torch.stack(x)[: info.batch_size] for x in zip(*each, strict=True)])
        return (list(found) if isinstance(each[0], list) else found), (0,) * len(found)

    return rule


def _select(x: Any, dim: Any, n: int) -> Any:
    if isinstance(x, (tuple, list)):
        return [_select(y, d, n) for y, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, n)


def _first(x: Any, dim: Any) -> Any:
    """Arguments of one example, zeros, in the place of none."""
    if isinstance(x, (tuple, list)):
        return [_first(y, d) for y, d in zip(x, dim, strict=True)]
    if dim is None:
        return x
    return x.new_zeros([1 if axis == dim else n for axis, n in enumerate(x.shape)])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ask, scale, *given = inputs
    out, _, _, *rows = output
    ctx.static = (ask, scale, read(ask).masks)
    ctx.save_for_backward(*_flat(given), out, *rows)
    ctx.mark_non_differentiable(*rows)
    ctx.set_materialize_grads(False)


def _pull(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
    ask, scale, masks = ctx.static
    *given, out, m, log_l, alive = ctx.saved_tensors
    needed = _flat(ctx.needs_input_grad[2:])
    wanted = [*needed[:_DIFFERENTIABLE], *needed[_FIXED + masks :]]
    saved = [out, m, log_l, alive]
    found = _backward_op(ask, scale, wanted, *_packed(given), saved, *upstream[:3])
    grads = _spread(found, wanted, masks)
    return None, None, *grads[:_FIXED], grads[_FIXED:]


def _pull_twice(ctx: Any, *upstream: Any) -> Any:
    raise _refused("derivatives of derivatives need")


# Where a compiler sees the operators themselves; it refuses second derivatives on its own.
_forward_op.register_autograd(_pull, setup_context=_keep)
_backward_op.register_autograd(_pull_twice)
_forward_op.register_vmap(_looped(_forward_op))
_backward_op.register_vmap(_looped(_backward_op))


# --- What binds them. -----------------------------------------------------------------------------


class _Attend(torch.autograd.Function):
    """Arguments: the Ask, scale, the number of the mask's operands, then the tensors."""

    @staticmethod
    def forward(ask: Ask, scale: float, masks: int, *given: Any) -> tuple[Array, ...]:
        if _real(given):
            return _forward(ask, scale, given)
        flops.counted()
        return _forward_op(ask.written(), scale, *_packed(given))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ask, scale, masks, *given = inputs
        out, _, _, *rows = output
        ctx.static = (ask, scale, masks)
        ctx.save_for_backward(*given, out, *rows)
        ctx.mark_non_differentiable(*rows)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        ask, scale, masks = ctx.static
        *given, out, m, log_l, alive = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        wanted = [*needed[:_DIFFERENTIABLE], *needed[_FIXED + masks :]]
        saved, up = [out, m, log_l, alive], upstream[:3]
        if torch.compiler.is_compiling():  # of all that there is this pass alone
            found = _backward_op(ask.written(), scale, wanted, *_packed(given), saved, *up)
        else:
            found = _Pull.apply(ask, scale, wanted, *saved, *up, *given)
        return None, None, None, *_spread(found, wanted, masks)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _refused("forward-mode derivatives need")

    @staticmethod
    @unseen
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _looped(_Attend.apply)(info, in_dims, *args)


class _Pull(torch.autograd.Function):
    """Arguments: the Ask, scale, wanted, four saved, three upstream, then the tensors."""

    @staticmethod
    @unseen
    def forward(ask: Ask, scale: float, wanted: Sequence[bool], *tensors: Any) -> tuple[Array, ...]:
        if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors):
            return _grads_batched(ask, scale, wanted, tensors)
        saved, up, given = tensors[:4], tensors[4:7], tensors[7:]
        if _real(tensors):
            return tuple(_backward(ask, scale, wanted, given, saved, up))
        flops.counted()
        return tuple(_backward_op(ask.written(), scale, wanted, *_packed(given), list(saved), *up))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise _refused("derivatives of derivatives need")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _refused("derivatives of derivatives need")

    @staticmethod
    @unseen
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _looped(_Pull.apply)(info, in_dims, *args)


def _grads_batched(
    ask: Ask, scale: float, wanted: Sequence[bool], tensors: Sequence[Any]
) -> tuple[Array, ...]:
    """The gradients under `torch.autograd.grad(..., is_grads_batched=True)`.

    It maps with a vmap older than torch.func's, which asks no Function for a rule.
    """
    torch._C._vmapmode_increment_nesting()
    level = torch._C._vmapmode_decrement_nesting()
    batched = torch._C._functorch.is_legacy_batchedtensor
    mapped = [x is not None and batched(x) for x in tensors]
    # The size given counts only for what this level does not map, and then that is mapped too.
    pairs = list(zip(tensors, mapped, strict=True))
    count = max(len(torch._remove_batch_dim(x, level, 1, 0)) for x, yes in pairs if yes)
    each = [torch._remove_batch_dim(x, level, count, 0) if yes else x for x, yes in pairs]
    torch._C._vmapmode_decrement_nesting()
    try:
        found = [
            _Pull.apply(
                ask, scale, wanted, *_select(each, [0 if yes else None for yes in mapped], n)
            )
            for n in range(count)
        ]
    finally:
        torch._C._vmapmode_increment_nesting()
    return tuple(torch._add_batch_dim(torch.stack(x), 0, level) for x in zip(*found, strict=True))


def _refused(what: str) -> UnsupportedError:
    return UnsupportedError(
        f'{what} impl="reference". Got one that has the first derivative only, backwards: '
        "chunked, native or triton."
    )


def _packed(given: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors as an operator takes them: the operands are one list."""
    return (*given[:_FIXED], list(given[_FIXED:]))


def _flat(given: Sequence[Any]) -> tuple[Any, ...]:
    """And back, whatever follows."""
    return (*given[:_FIXED], *given[_FIXED])


def _spread(found: Sequence[Array], wanted: Sequence[bool], masks: int) -> list[Array | None]:
    """Gradients where their tensors stood, None for the others."""
    each = iter(found)
    grads = [next(each) if yes else None for yes in wanted]
    between = [None] * (_FIXED - _DIFFERENTIABLE + masks)
    return [*grads[:_DIFFERENTIABLE], *between, *grads[_DIFFERENTIABLE:]]


def _real(tensors: Sequence[Any]) -> bool:
    """Whether these hold numbers that a loop in Python may read, and no mode wants to see it.

    Of an imaginary part of a conjugate memory holds the negative, which operators see to.
    """
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(
        x is None or (type(x) in _PLAIN and not x.is_meta and not x.is_neg()) for x in tensors
    )
