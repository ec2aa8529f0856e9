"""What the interpreter works out once is what Triton works out every time."""

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
