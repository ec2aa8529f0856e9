"""What is kept on a device, whoever asks; and what is left to launch in a call that finds it there.

There is no GPU in most places: a capture, and streams, are stood in for by what torch would say.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import get_ident
from typing import Any

import pytest
import torch
from kernel_calls import DEVICE, draw
from torch.utils._python_dispatch import TorchDispatchMode

import attn_core
from attn_core import attention, masks
from attn_core.backends.torch import (
    chunked,
    held,
    kept,
    triton_forward,
    triton_launch,
    triton_schedule,
)
from attn_core.backends.torch.kept import Kept

HERE = torch.device(DEVICE)
B, HQ, HK, T, D = 2, 4, 2, 100, 16
KEY, VALUE = draw(B, HK, T, D), draw(B, HK, T, D)


class Operations(TorchDispatchMode):
    """Names of what a device would be given to do: all but what makes room, looks elsewhere, or
    tells the allocator something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        ends = [x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)]
        room = str(function).startswith(("aten.empty", "aten.new_empty", "aten.record_stream"))
        views = isinstance(found, torch.Tensor) and found.untyped_storage()._cdata in ends
        ours = not str(function).startswith("aten")
        if not (room or views or ours):
            self.names.append(str(function))
        return found


class Counted:
    """What one call launches: kernels of ours, and operations of torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: list[str] = []
        # As tensors of no mode are: within an operator, which is opaque, no operation is seen.
        monkeypatch.setattr(chunked, "_real", lambda tensors: True)
        for name in ("launch", "prepare"):
            monkeypatch.setattr(triton_launch, name, self._counting(getattr(triton_launch, name)))

    def _counting(self, launch: Any) -> Any:
        def counted(kernel: Any, *rest: Any, **options: Any) -> None:
            self.kernels.append(kernel.__name__)
            # The interpreter's own way of computing is none of the device's work.
            with torch.utils._python_dispatch._disable_current_modes():
                launch(kernel, *rest, **options)

        return counted

    def call(self, **options: Any) -> tuple[list[str], list[str]]:
        self.kernels.clear()
        with Operations() as operations, torch.no_grad():
            attention(impl="triton", **options)
        return list(self.kernels), operations.names


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing kept, and nothing pinned by what is no graph."""
    pins = dict(kept._pins)
    triton_schedule._kept.clear()
    yield
    kept._pins.clear()
    kept._pins.update(pins)
    for keep in (triton_schedule._kept, triton_schedule._numbers):
        keep.clear()
        keep._pinned.clear()


@pytest.fixture
def counted(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.fixture
def capture(fresh: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a graph is captured, as a list of one answer."""
    now = [False]
    monkeypatch.setattr(kept, "capturing", lambda device: now[0])
    return now


QUERY = draw(B, HQ, 1, D)
STATIC: dict[str, dict[str, Any]] = {
    "decode": {"query": QUERY},
    "decode, wherever it stands": {"query": QUERY, "query_offset": 7},
    "causal decode": {"query": QUERY, "mask": masks.causal(), "query_offset": "end"},
    "causal": {"query": draw(B, HQ, T, D), "mask": masks.causal()},
    "causal, from 0": {"query": draw(B, HQ, T, D), "mask": masks.causal(), "query_offset": 0},
    "window": {"query": draw(B, HQ, T, D), "mask": masks.window(30, 0)},
}


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", STATIC)
def test_what_sizes_alone_say_is_launched_once(
    name: str, splits: int, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a call is its kernel, and nothing else at all: nor is it inside of a graph."""
    few = "decode" in name
    monkeypatch.setattr(triton_forward, "splits", lambda *sizes: splits)
    given = {"key": KEY, "value": VALUE, **STATIC[name]}
    kernels, _ = counted.call(**given)
    assert kernels[0] == "schedule"
    want = ["forward", "combine"] if few and splits > 1 else ["forward"]
    assert counted.call(**given) == (want, [])
    monkeypatch.setattr(kept, "capturing", lambda device: True)
    assert counted.call(**given) == (want, [])


def test_operations_of_torch_are_seen(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests below say is not there."""
    forward = triton_forward.forward

    def more(*given: Any) -> Any:
        torch.arange(5, device=HERE).cumsum(0)
        return forward(*given)

    given = {"key": KEY, "value": VALUE, **STATIC["causal"]}
    counted.call(**given)
    assert counted.call(**given) == (["forward"], [])
    monkeypatch.setattr(triton_forward, "forward", more)
    planted = ["aten.arange.default", "aten.cumsum.default"]
    assert counted.call(**given) == (["forward"], planted)


def test_what_tensors_say_is_few_launches(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every call, since it may be another thing each time; it was 267 for documents."""
    # On a GPU one query's keys would be shared out, whose parts `combine` puts together.
    monkeypatch.setattr(triton_forward, "splits", lambda *sizes: 1)
    triton_schedule.number(0, torch.empty(0, device=HERE).device)  # made once, and kept
    ids = torch.arange(T, device=HERE) // 30
    lengths = torch.tensor([T, 40], dtype=torch.int32, device=HERE)
    query = draw(B, HQ, T, D)
    table = torch.ones(T, T, dtype=torch.bool, device=HERE).tril()
    for more, want in (
        ({"mask": masks.segments(ids)}, ["schedule", "forward"]),
        ({"mask": masks.segments(ids) & masks.causal()}, ["schedule", "forward"]),
        ({"kv_lengths": lengths}, ["facts", "schedule", "forward"]),
        (
            {"kv_lengths": lengths, "mask": masks.causal(), "query_offset": "end"},
            ["facts", "schedule", "forward"],
        ),
        (
            {"query_offset": lengths, "mask": masks.causal(), "query": QUERY},
            ["facts", "schedule", "forward"],
        ),
        ({"mask": masks.dense(table)}, ["reduced", "schedule", "forward"]),
    ):
        for _ in range(2):
            given = {"query": query, "key": KEY, "value": VALUE, **more}
            assert counted.call(**given) == (want, [])


def test_backward_is_few_launches(counted: Counted) -> None:
    ids = torch.arange(T, device=HERE) // 30
    leaves = [draw(B, HQ, T, D).requires_grad_(), KEY.clone().requires_grad_()]
    out = attention(*leaves, VALUE, mask=masks.segments(ids) & masks.causal(), impl="triton")
    up = torch.ones_like(out)
    counted.kernels.clear()
    with Operations() as operations:
        torch.autograd.grad(out, leaves, up)
    assert counted.kernels == ["delta", "schedule", "d_keys", "schedule", "d_query"]
    assert len(operations.names) <= 2, operations.names


def test_a_capture_makes_what_is_not_there_and_keeps_none_of_it(capture: list[bool]) -> None:
    keep, made = Kept(2), []

    def make() -> torch.Tensor:
        made.append(torch.ones(3, device=HERE))
        return made[-1]

    capture[0] = True
    first, second = (keep.of("a", HERE, make) for _ in range(2))
    assert first is made[0]
    assert second is made[1]
    assert len(keep) == 0
    capture[0] = False
    third = keep.of("a", HERE, make)
    assert third is made[2]
    assert keep.of("a", HERE, make) is third
    capture[0] = True
    assert keep.of("a", HERE, make) is third
    assert len(made) == 3


def test_what_a_graph_reads_is_never_let_go(
    capture: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Kept(2)
    make = lambda: (torch.ones(3, device=HERE), torch.zeros(1, device=HERE))  # noqa: E731
    first, second = (keep.of(name, HERE, make) for name in "ab")
    capture[0] = True
    assert keep.of("a", HERE, make) is first
    capture[0] = False
    for name in "cdef":
        keep.of(name, HERE, make)
    keep.clear()
    assert keep.of("a", HERE, make) is first
    assert keep.of("b", HERE, make) is not second
    # Where there is no more room for what graphs read, they make it.
    monkeypatch.setattr(kept, "PINNED", kept._held() + 15)
    other = keep.of("g", HERE, make)
    capture[0] = True
    assert keep.of("g", HERE, make) is not other
    assert keep.of("a", HERE, make) is first


def test_the_last_used_stay(capture: list[bool]) -> None:
    keep, make = Kept(2), lambda: torch.ones(1, device=HERE)
    first = keep.of("a", HERE, make)
    second = keep.of("b", HERE, make)
    assert keep.of("a", HERE, make) is first
    keep.of("c", HERE, make)
    assert keep.of("a", HERE, make) is first
    assert keep.of("b", HERE, make) is not second


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waited = number, 0

    def synchronize(self) -> None:
        self.waited += 1


def test_every_stream_that_reads_is_known_to_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is not there: made apart from all else, waited for, recorded once each."""
    mine, yours, told, here = Stream(7), [Stream(1)], [], get_ident()
    place: list[Any] = []

    class There(torch.Tensor):
        def record_stream(self, stream: Any) -> None:
            told.append(stream.cuda_stream)

    class Inside:
        """A device, then a stream: of a stream alone torch would touch the thread's own device."""

        def __init__(self, where: Any) -> None:
            self.where = where

        def __enter__(self) -> None:
            place.append(self.where)

        def __exit__(self, *rest: Any) -> None:
            place.pop()

    def make() -> Any:
        assert place == [gpu, mine]
        assert get_ident() != here, "an allocator that gives this thread memory of a graph"
        inner = keep.of("inner", gpu, lambda: torch.ones(2).as_subclass(There))
        return inner.clone()

    monkeypatch.setattr(kept, "capturing", lambda device: False)
    monkeypatch.setattr(kept, "_stream", lambda device: mine)
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    monkeypatch.setattr(torch.cuda, "device", Inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: yours[0])
    keep, gpu = Kept(4), torch.device("cuda", 0)
    first = keep.of("a", gpu, make)
    assert mine.waited == 2, "for what it is made of, and for itself"
    told.clear()
    for number in (1, 2, 1, 2):
        yours[0] = Stream(number)
        assert keep.of("a", gpu, make) is first
    assert told == [2]
    assert mine.waited == 2


def test_schedules_are_kept_for_a_mask_of_ids_that_the_host_holds(counted: Counted) -> None:
    ids = torch.arange(T).numpy() // 30
    mask = masks.segments(held.copy(ids, HERE)) & masks.causal()
    given = {"query": draw(B, HQ, T, D), "key": KEY, "value": VALUE, "mask": mask}
    assert counted.call(**given)[0] == ["schedule", "forward"]
    assert counted.call(**given) == (["forward"], [])
    other = attn_core.Mask(mask.tree, tuple(x.clone() for x in mask.arrays))
    assert counted.call(**{**given, "mask": other}) == (["schedule", "forward"], [])


gpu = pytest.mark.skipif(DEVICE == "cpu", reason="captures a graph, on streams of a GPU")


@gpu
@pytest.mark.parametrize("warm", [False, True])
def test_a_graph_replays_what_was_kept(warm: bool, fresh: None) -> None:
    """Warmed up on a stream of one's own, as torch asks for, or captured first of all."""
    query = draw(B, HQ, T, D)
    given = {"mask": masks.window(17, 0), "impl": "triton"}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        attention(query, KEY, VALUE, **given)
    torch.cuda.current_stream().wait_stream(stream)
    if not warm:  # the kernels are compiled, which no capture allows, and that is all
        triton_schedule._kept.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = attention(query, KEY, VALUE, **given)
    assert len(triton_schedule._kept._pinned) == warm
    for seed in range(3):
        query.copy_(torch.randn(query.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        want = attention(query, KEY, VALUE, mask=given["mask"], impl="reference")
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        triton_schedule._kept.clear()


@gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
# Torch captures one on purpose, where its trees of graphs begin.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty. This usually means:UserWarning")
def test_what_is_compiled_for_graphs_reads_what_was_kept(fresh: None) -> None:
    """Torch warms up in memory that its replays write to, where nothing may be kept."""
    query = draw(B, HQ, T, D)

    def f(q: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, KEY, VALUE, mask=masks.window(23, 0), impl="triton") + 1

    compiled = torch.compile(f, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(5):
            query.copy_(torch.randn(query.shape, generator=torch.Generator().manual_seed(seed)))
            torch.testing.assert_close(compiled(query).clone(), f(query), rtol=1e-5, atol=1e-5)
