"""Kernels that do not compile: under "auto" a call goes on without them, by name it raises."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from kernel_calls import DEVICE, compare, draw, found
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import attn_core
from attn_core import Dropout, attention, explain, masks, registry, scores
from attn_core.backends.torch import triton_launch, unmade
from attn_core.spec import as_output

BACKEND = registry.load("torch")
B, HQ, HK, T, D = 2, 4, 2, 40, 16

NEXT = "native" if DEVICE == "cpu" else "chunked"
"""Who answers float32 where kernels do not: on a GPU torch's own takes 16 bits alone."""


class Unlaunchable:
    """Launches of some kernels end so; all are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wrong: dict[str, Any] = {}
        self.names: list[str] = []
        launch = triton_launch.launch

        def refusing(kernel: Any, *rest: Any, **options: Any) -> None:
            self.names.append(kernel.__name__)
            wrong = self.wrong.get(kernel.__name__)
            if callable(wrong):
                wrong()
            elif wrong is not None:
                raise wrong
            launch(kernel, *rest, **options)

        monkeypatch.setattr(triton_launch, "launch", refusing)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Unlaunchable]:
    """Our kernels are the first that "auto" asks, as on a GPU."""
    ranks = ("triton", "native", "chunked", "reference")
    monkeypatch.setattr(BACKEND, "ranked", lambda problem: ranks)
    unmade._found.clear()
    registry.forget()
    yield Unlaunchable(monkeypatch)
    unmade._found.clear()
    registry.forget()


def no_room() -> Exception:
    return OutOfResources(300_000, 232_448, "shared memory")


def given(**more: Any) -> dict[str, Any]:
    query, key = draw(B, HQ, T, D), draw(B, HK, T, D)
    return {"query": query, "key": key, "value": draw(B, HK, T, D), **more}


def automatic(**arguments: Any) -> Any:
    return as_output(attention(**arguments, return_lse=True))


CASES: dict[str, dict[str, Any]] = {
    "causal": {"mask": masks.causal()},
    "lengths": {"kv_lengths": [T, 7], "q_lengths": [T, 3], "query_offset": "end"},
    "everything": {
        "mask": masks.causal() & masks.window(20, 0),
        "score": scores.alibi(torch.tensor([0.5, 0.25, 0.1, 0.7], device=DEVICE)),
        "bias": torch.linspace(-1, 1, HQ * T * T, device=DEVICE).reshape(1, HQ, T, T),
        "sinks": torch.tensor([0.1, -1.0, 0.5, 2.0], device=DEVICE),
        "dropout": Dropout(0.3, 11),
    },
}


@pytest.mark.parametrize("kernel", ["forward", "delta", "d_keys", "d_query"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_come_all_the_same(
    name: str, kernel: str, launches: Unlaunchable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `compare` judges them, whichever kernel it is that there is none of."""
    launches.wrong = {kernel: no_room()}
    monkeypatch.setattr("kernel_calls.by_kernel", automatic)
    with pytest.warns(RuntimeWarning, match='kernels of impl="triton" must compile') as told:
        compare(given(**CASES[name]))
    # Others are raised again by pytest: of torch, which once says something of a thread of its own.
    (said,) = (str(each.message) for each in told if each.category is RuntimeWarning)
    assert "Required: 300000" in said
    what = "forward" if kernel == "forward" else "backward"
    assert f'attn_core: {what} of impl="triton": query ({B}, {HQ}, {T}, {D})' in said
    assert kernel in launches.names
    # It is asked once: what is known not to compile is not compiled again.
    asked = launches.names.count(kernel)
    launches.names.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(given(**CASES[name]))
    assert asked == 1
    assert kernel not in launches.names
    # And "auto" passes over what it is asked for, whoever needs no gradient but for those.
    x = given(**CASES[name])
    here = explain(**x).candidates[0]
    assert (here.name, here.verdict) == ("triton", "refused" if kernel == "forward" else "chosen")
    x["query"].requires_grad_()
    assert explain(**x).candidates[0].verdict == "refused"


@pytest.mark.parametrize("kernel", ["forward", "d_keys"])
@pytest.mark.parametrize("error", [no_room(), PTXASError("no such instruction")])
def test_by_name_it_raises_each_time(kernel: str, error: Any, launches: Unlaunchable) -> None:
    launches.wrong = {kernel: error}
    x = given(mask=masks.causal())
    up, up_lse = draw(B, HQ, T, D), draw(B, HQ, T)

    def named(**arguments: Any) -> Any:
        return as_output(attention(**arguments, return_lse=True, impl="triton"))

    with pytest.warns(RuntimeWarning):
        found(automatic, x, up, up_lse)
    for _ in range(2):
        with pytest.raises(type(error)):
            found(named, x, up, up_lse)
    with attn_core.use(impl="triton"), pytest.raises(type(error)):
        found(automatic, x, up, up_lse)


def test_explain_says_why(launches: Unlaunchable) -> None:
    launches.wrong = {"forward": no_room()}
    x = given(mask=masks.causal())
    assert explain(**x).impl == "triton"
    with pytest.warns(RuntimeWarning):
        attention(**x)
    report = explain(**x)
    first = report.candidates[0]
    assert (report.impl, first.name, first.verdict) == (NEXT, "triton", "refused")
    (reason,) = first.reasons
    assert reason.startswith("its kernels must compile for this problem. Got OutOfResources:")
    assert reason.endswith("Hardware limit: 232448. Reducing block sizes or `num_stages` may help. "
                           "in an earlier forward pass.")  # fmt: skip
    assert explain(**x, impl="triton").impl == "triton"
    # Another length is the same question; another mask, dtype or width is not.
    shorter = {n: a[:, :, :30] if torch.is_tensor(a) else a for n, a in x.items()}
    assert explain(**shorter).impl == NEXT
    for more in (
        {"mask": masks.window(4, 0)},
        {"mask": None},
        {"sinks": draw(HQ)},
        {n: x[n].half() for n in ("query", "key", "value")},
        {"value": draw(B, HK, T, D + 8)},
        {"query": x["query"][:, :, :9], "query_offset": "end"},
        {"query": x["query"][:, :HK]},
        {"precision": "fast"},
    ):
        assert explain(**{**x, **more}).impl == "triton", more


def test_what_fails_going_back_is_asked_where_nobody_goes_back(launches: Unlaunchable) -> None:
    launches.wrong = {"d_keys": no_room()}
    x = given(mask=masks.causal())
    learnt = {**x, "query": x["query"].requires_grad_()}
    learnt["key"] = x["key"].requires_grad_()
    with pytest.warns(RuntimeWarning):
        attention(**learnt).sum().backward()
    assert explain(**learnt).impl == NEXT
    assert explain(**{n: a.detach() if torch.is_tensor(a) else a for n, a in x.items()}).impl == (
        "triton"
    )


def from_a_launch() -> None:
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def from_the_allocator() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("wrong", [from_a_launch, from_the_allocator])
@pytest.mark.parametrize("kernel", ["forward", "delta"])
def test_what_has_been_compiled_and_fails_is_raised(
    kernel: str, wrong: Any, launches: Unlaunchable
) -> None:
    launches.wrong = {kernel: wrong}
    x = given(mask=masks.causal())
    x["query"].requires_grad_()
    with pytest.raises(RuntimeError) as raised:
        attention(**x).sum().backward()
    assert 'of impl="triton"' in "".join(raised.value.__notes__)
    assert unmade._found == {}


def test_whatever_the_compiler_raises_is_its_own(launches: Unlaunchable) -> None:
    """A pass of it fails with RuntimeError, a tool with CalledProcessError."""

    def compiling() -> None:
        triton.compile("nowhere/to_be.found")

    launches.wrong = {"forward": compiling}
    x = given()
    with pytest.warns(RuntimeWarning, match="must compile"):
        got = attention(**x)
    torch.testing.assert_close(got, attention(**x, impl="reference"))
    assert triton_launch.uncompiled(CompilationError(None, None, "a type"))


@pytest.mark.parametrize("kernel", ["forward", "d_query"])
def test_compiled_by_torch_it_falls_as_it_runs(kernel: str, launches: Unlaunchable) -> None:
    launches.wrong = {kernel: no_room()}
    x = given()
    leaves = [x[name].requires_grad_() for name in ("query", "key", "value")]
    torch._dynamo.reset()
    call = torch.compile(
        lambda q, k, v: attention(q, k, v, mask=masks.causal()),
        fullgraph=True,
        backend="aot_eager",
    )
    up = draw(B, HQ, T, D)
    want = attention(*leaves, mask=masks.causal(), impl="reference")
    pulled = torch.autograd.grad(want, leaves, up)

    def both() -> list[torch.Tensor]:
        got = call(*leaves)
        return [got, *torch.autograd.grad(got, leaves, up)]

    with pytest.warns(RuntimeWarning, match="must compile"):
        answers = both()
    for a, b in zip(answers, (want, *pulled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    launches.names.clear()
    both()
    assert kernel not in launches.names
