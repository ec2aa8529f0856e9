"""What is replaced of Triton's interpreter: what it works out once is what Triton works out every
time, and bfloat16 is what torch says it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_calls import by_kernel, draw, found
from kernel_cases import CASES, HK, HQ, TK, TQ, B, D
from triton.language import core
from triton.runtime import interpreter

import attn_core.kernels.interpreter

if not (triton.knobs.runtime.interpret and triton.__version__.startswith("3.6.")):
    pytest.skip("nothing of Triton is replaced here", allow_module_level=True)

from attn_core.kernels import interpreter_bfloat16 as bfloat16
from attn_core.kernels.interpreter_once import ONCE, PLAIN

assert attn_core.kernels.interpreter  # imported for what it does

SCALARS = (tl.int1, tl.int8, tl.uint8, tl.int32, tl.uint32, tl.int64, tl.uint64)
SCALARS += (tl.float16, tl.bfloat16, tl.float32, tl.float64)
ENTRIES = (
    *SCALARS,
    tl.pointer_type(tl.float32),
    tl.pointer_type(tl.float32, const=True),
    tl.pointer_type(tl.float32, 3),
)
SIZES = ([16], [1, 16], [16, 1], [4, 2, 8], core.tuple([core.constexpr(16), core.constexpr(2)]))


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for (owner, name), slow in PLAIN.items():
        monkeypatch.setattr(owner, name, slow)


def told(entries: Any, sizes: Any) -> list[Any]:
    """Of a type and of a tensor of it, all that they say."""
    kind = tl.block_type(entries, sizes)
    said = [kind, kind.element_ty, kind.name, kind.numel, *kind.shape, type(kind.shape)]
    for of in (kind, entries):
        handle = interpreter.TensorHandle(np.zeros(1, np.int8), tl.int8)
        x = tl.tensor(handle, of)
        assert x.handle is handle
        said += [x.type, x.dtype, x.numel.value, str(x.shape.type), str(x)]
        said += [n.value for n in x.shape]
    said += [interpreter._get_np_dtype(kind), interpreter._get_np_dtype(entries)]
    return said


@pytest.mark.parametrize("entries", ENTRIES, ids=str)
def test_types_are_tritons(entries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [told(entries, sizes) for sizes in SIZES]
    again = [told(entries, sizes) for sizes in SIZES]
    plain(monkeypatch)
    assert first == again == [told(entries, sizes) for sizes in SIZES]


@pytest.mark.parametrize("sizes", [[], [3], [2.0], [2**30]], ids=str)
def test_what_is_no_shape_is_refused_in_tritons_words(
    sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tl.block_type(tl.float32, [2])  # which 2.0 must not be taken for
    words = []
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)) as raised:
            tl.block_type(tl.float32, sizes)
        words.append(str(raised.value))
        plain(monkeypatch)
    assert words[0] == words[1]


@pytest.mark.parametrize("name", ["everything", "relative", "documents"])
def test_kernels_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, out and gradients; and the language is left as it was."""
    given = {"query": draw(B, HQ, TQ, D), "key": draw(B, HK, TK, D), "value": draw(B, HK, TK, D)}
    up, up_lse = draw(B, HQ, TQ, D), draw(B, HQ, TQ)
    assert all(getattr(*where) is quick for where, quick in ONCE.items())
    once = found(by_kernel, {**given, **CASES[name]}, up, up_lse)
    assert core.is_builtin(tl.add)
    assert core.is_builtin(core.tensor.__add__)
    plain(monkeypatch)
    each = found(by_kernel, {**given, **CASES[name]}, up, up_lse)
    assert core.is_builtin(tl.add)
    assert all(torch.equal(a, b) for a, b in zip(once, each, strict=True))


# --- bfloat16. ------------------------------------------------------------------------------------


def every_half() -> torch.Tensor:
    """Each of bfloat16's 65,536 numbers."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def between() -> torch.Tensor:
    """float32 halfway between neighbours, a bit to either side, and NaN whose payload is low."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int64)[:, None] << 16
    bits = bits + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return bits.flatten().to(torch.int32).view(torch.float32)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Bit for bit, but for which NaN it is."""
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    bits = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    assert torch.equal(*(torch.where(x.isnan(), 0.0, x).view(bits) for x in (a, b)))


@triton.jit
def converting(x, out, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    for x, dtype in ((every_half(), torch.float32), (between(), torch.bfloat16)):
        out = torch.empty_like(x, dtype=dtype)
        converting[(len(x) // 2**14,)](x, out, 2**14)
        same(out, x.to(dtype))


@triton.jit
def multiplying(x, y, out, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(x + i * N + j), tl.load(y + i * N + j)
    b = tl.where(i < 9, b, 0.0)
    start = tl.full((N, N), 1.0, tl.float32)
    tl.store(out + i * N + j, tl.dot(a, tl.trans(b), start))


def test_bfloat16_is_multiplied_as_numbers() -> None:
    """Small whole numbers, of which nothing is rounded."""
    x, y = (torch.randint(-100, 100, (16, 16)).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    multiplying[(1,)](x, y, out, 16)
    y = torch.cat([y[:9], torch.zeros(7, 16, dtype=y.dtype)])
    assert torch.equal(out, (1 + x.double() @ y.double().T).float())


@triton.jit
def computing(x, out, WHAT: tl.constexpr):
    number = tl.load(x + tl.arange(0, 16))
    if WHAT == "sum":
        tl.store(out, tl.sum(number, 0).to(tl.float32))
    elif WHAT == "add":
        tl.store(out + tl.arange(0, 16), (number + number).to(tl.float32))
    elif WHAT == "floor":
        tl.store(out + tl.arange(0, 16), tl.floor(number.to(tl.float32)))
    elif WHAT == "less":
        tl.store(out + tl.arange(0, 16), (number < number).to(tl.float32))


@pytest.mark.parametrize("what", ["sum", "add", "less"])
def test_what_would_take_bfloat16_for_an_integer_is_refused(what: str) -> None:
    x, out = torch.arange(16.0).bfloat16(), torch.zeros(16)
    computing[(1,)](x, out, "floor")
    assert torch.equal(out, x.float())
    with pytest.raises(Exception, match=r"bfloat16 must be float32 before anything but tl\.dot"):
        computing[(1,)](x, out, what)


def test_where_a_function_is_missing_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(vars(interpreter.InterpreterBuilder))
    monkeypatch.setattr(bfloat16, "RIGHT", False)
    bfloat16.replace()
    assert dict(vars(interpreter.InterpreterBuilder)) == before
