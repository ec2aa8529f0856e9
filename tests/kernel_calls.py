"""The kernels and the reference asked the same thing, for tests of kernels."""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from typing import Any

import torch

import attn_core
from attn_core import attention
from attn_core.backends.torch import triton_launch
from attn_core.conformance import tolerance
from attn_core.kernels import configs
from attn_core.spec import as_output

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_RNG = torch.Generator().manual_seed(11)


def described() -> bool:
    """Whether kernels can read through tensor descriptors here: interpreted, or on Hopper."""
    return DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)


def begin(name: str) -> None:
    """Begin to draw anew: a test's numbers are its own, whichever came before it in its process."""
    _RNG.manual_seed(zlib.crc32(name.encode()))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_RNG).to(DEVICE)


def ids(count: int, each: int) -> torch.Tensor:
    """Documents of `each` positions."""
    return torch.arange(count, device=DEVICE) // each


def by_kernel(**arguments: Any) -> Any:
    return as_output(attention(**arguments, return_lse=True, impl="triton"))


def by_reference(**arguments: Any) -> Any:
    return as_output(attention(**arguments, return_lse=True, impl="reference"))


def found(call: Any, given: dict[str, Any], up: torch.Tensor, up_lse: torch.Tensor) -> list[Any]:
    """out, lse and the gradients of whatever has one."""
    given = dict(given)
    leaves = []
    for name in ("query", "key", "value", "bias", "sinks"):
        if name in given:
            given[name] = given[name].detach().requires_grad_()
            leaves.append(given[name])
    if "score" in given:
        tables = [t.detach().requires_grad_() for t in given["score"].arrays]
        given["score"] = type(given["score"])(given["score"].tree, tuple(tables))
        leaves += tables
    output = call(**given)
    finite = output.lse.isfinite()
    loss = (output.out * up).sum() + torch.where(finite, output.lse * up_lse, 0.0).sum()
    return [output.out.detach(), output.lse.detach(), *torch.autograd.grad(loss, leaves)]


def tiles(stack: ExitStack, **of: configs.Config) -> None:
    """These tiles for these kernels, here and now, whatever the dtype."""
    here = triton_launch.architecture(torch.device(DEVICE))
    for kernel, config in of.items():
        entry = configs.Entry(kernel, (here,), (), 0, (), config, "a test", "yours")
        stack.enter_context(configs.trying(entry))


HALVES = (torch.float16, torch.bfloat16)


def narrowed(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Whatever is floating point in this dtype."""
    floats = (n for n, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point())
    return given | {n: given[n].to(dtype) for n in floats}


def widened(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.double()
    if isinstance(x, attn_core.Score):
        return type(x)(x.tree, tuple(widened(t) for t in x.arrays))
    return x


def alike(a: torch.Tensor, b: torch.Tensor) -> None:
    """The same, bit for bit where kernels are interpreted.

    Compiled, what is laid out otherwise in memory is another kernel, which may add up in another
    order.
    """
    if DEVICE == "cpu":
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def compare(given: dict[str, Any]) -> None:
    """The kernels' outputs and gradients are the reference's in float64, as far as sums round.

    The suite's rule and its table (`conformance/tolerance.py`): twice the error of the reference in
    the dtype itself, on the same device, plus a floor, and below a cap. Both are of the largest
    entry of each result, or of 1 where that is more: of this size is what is summed here, and 16
    units in its last place cover sums of 256 terms as well, whose roundings grow as their root.
    """
    batch, heads, rows = given["query"].shape[:3]
    if given.get("layout") == "BTHD":
        heads, rows = rows, heads
    up_lse = draw(batch, heads, rows)
    shape = (*given["query"].shape[:3], given["value"].shape[3])
    up = draw(*shape).to(given["query"].dtype)
    got = found(by_kernel, given, up, up_lse)
    wide = {name: widened(x) for name, x in given.items()}
    want = found(by_reference, wide, up.double(), up_lse.double())
    plain = found(by_reference, given, up, up_lse)
    dtype = str(given["query"].dtype).removeprefix("torch.")
    for n, (a, b, c) in enumerate(zip(got, want, plain, strict=True)):
        spread = off = 0.0
        if b.isfinite().any():
            spread = float(b[b.isfinite()].abs().max())
            off = float((c.double() - b)[b.isfinite()].abs().max())
        allowed = bound(off, max(1.0, spread), dtype, "out" if n < 2 else "gradient")
        torch.testing.assert_close(a.double(), b, rtol=0, atol=allowed)


def bound(off: float, spread: float, dtype: str, direction: str) -> float:
    """What the suite's table allows where a plain computation is `off`."""
    floor = tolerance.FLOOR[dtype] * spread
    return min(2 * off + floor, max(floor, tolerance.CAP[direction][dtype] * spread))
