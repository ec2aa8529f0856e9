"""torch's subjects on a CUDA device, by exact entry point, and how they are timed.

    torch:triton                attn_core.attention(impl="triton")
    torch:triton+dropout        the same, dropping a tenth
    torch:triton+deterministic  the same, under torch.use_deterministic_algorithms(True)
    torch:triton+split, +fused  the same, its backward pass in this way, whatever the table says
    ... +together, +apart       the same, dK and dV in one launch or in one each
    torch-sdpa-cudnn            scaled_dot_product_attention, pinned to SDPBackend.CUDNN_ATTENTION
    torch-sdpa-flash            the same, pinned to SDPBackend.FLASH_ATTENTION
    torch-sdpa                  the same, with the backend that torch prefers
    torch-flex                  flex_attention under torch.compile
    copy                        a copy of as many bytes as the case's keys and values

A sample is the mean of some calls, each between two events of the device, with its second-level
cache swept before. The device then waits for a while, so that the host, which needs some hundred
microseconds for a call, has said all there is to do: of a short call its own time would be seen.
Before the first call of a sample it waits longer, for a host that has been idle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_core
from attn_core.benchmarks import gpu_cases
from attn_core.benchmarks.calls import Refused as Refused
from attn_core.benchmarks.calls import in_words
from attn_core.benchmarks.cases import MASKS
from attn_core.benchmarks.gpu_cases import GpuCase
from attn_core.conformance import subject

_SWEPT = 256 * 2**20
"""Bytes written between calls: more than any second-level cache holds."""

_AHEAD = 2_000_000
"""Cycles that the device waits before each call, about a millisecond."""

_LEAD = 10_000_000
"""And before the first of a sample: about five. Where it waited one, an H200's host came too late
for the first calls, and short ones of ours took up to twice as long as others of the same run."""

_BACKENDS = {
    gpu_cases.CUDNN: SDPBackend.CUDNN_ATTENTION,
    gpu_cases.FLASH: SDPBackend.FLASH_ATTENTION,
}


class Prepared(NamedTuple):
    """A subject, a case and a direction on the device.

    Attributes:
        run: one call.
        answer: the same on these arrays, results in NumPy.
    """

    run: Callable[[], Any]
    answer: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def facts() -> dict[str, Any]:
    """What the device is, and what stands behind it."""
    major, minor = torch.cuda.get_device_capability()
    cudnn = torch.backends.cudnn.version()
    return {
        "gpu": torch.cuda.get_device_name(),
        "architecture": f"sm_{major}{minor}",
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
    }


def available() -> bool:
    return bool(torch.cuda.is_available())


def answers() -> bool:
    """Whether the device still does: after some errors it never does again in this process."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except Exception:  # whatever it raises, it is no answer
        return False


def prepared(name: str, case: GpuCase, direction: str, drawn: bool = False) -> Prepared:
    """The subject on the case's arrays.

    Args:
        drawn: by the device itself, in no time: such numbers are for timing alone.

    Raises:
        Refused: it is not for this case, or not here.
    """
    if name == gpu_cases.COPY:
        return _copy(case)
    attend, scope = _attend(name, case), _scope(name)
    names = ("query", "key", "value")

    def made(tensors: Mapping[str, Any]) -> Callable[[], Any]:
        leaves = [tensors[n].detach().requires_grad_(direction != "forward") for n in names]
        upstream = tensors["cotangent"]

        def forward() -> Any:
            with scope():
                return (attend(*leaves),)

        if direction == "forward":
            return forward
        (out,) = forward()

        def backward() -> Any:
            with scope():
                return torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        return backward

    def answer(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = made(_moved(arrays))()
        keys = ("out",) if direction == "forward" else names
        back = attn_core.registry.load("torch").to_numpy
        return {n: back(x.detach().cpu()) for n, x in zip(keys, found, strict=True)}

    return Prepared(made(_drawn(case) if drawn else _moved(case.arrays())), answer)


def warmed(name: str, case: GpuCase, direction: str) -> Callable[[], Any]:
    """One call of the subject on numbers that the device draws; compiled, and called before."""
    run = prepared(name, case, direction, drawn=True).run
    for _ in range(2):
        run()
    return run


def _drawn(case: GpuCase) -> dict[str, Any]:
    dice = torch.Generator("cuda").manual_seed(case.length)
    dtype = getattr(torch, case.dtype)
    return {
        name: torch.randn(case.sizes(name), generator=dice, device="cuda", dtype=dtype)
        for name in ("query", "key", "value", "cotangent")
    }


def _moved(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    there = attn_core.registry.load("torch").from_numpy
    return {n: there(x).cuda() for n, x in arrays.items()}


def _attend(name: str, case: GpuCase) -> Callable[..., Any]:
    if name in _BACKENDS or name == gpu_cases.SDPA:
        in_words(name, case, "full", "causal")
        causal, grouped = case.mask == "causal", bool(case.kv_heads)

        def pinned(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(_BACKENDS[name]) if name in _BACKENDS else nullcontext():
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return pinned
    if name == gpu_cases.FLEX:
        from attn_core.benchmarks import torch_calls

        in_words(name, case, *MASKS)
        return torch_calls.flex(case, "cuda")
    if not name.startswith(gpu_cases.OURS):
        known = ", ".join(gpu_cases.SUBJECTS)
        raise ValueError(f"a subject must be one of {known}. Got {name!r}.")
    dropped = name == gpu_cases.DROPOUT
    options: dict[str, Any] = {"dropout": attn_core.Dropout(0.1, 7)} if dropped else {}
    mask = case.language()
    # A query of few stands at its own position, or they end where keys do.
    offset: Any = 0 if case.rows != case.length else None
    if case.end:
        offset = "end"
    if case.kv_lengths:
        options["kv_lengths"] = torch.tensor(case.kv_lengths, dtype=torch.int32).cuda()

    def ours(q: Any, k: Any, v: Any) -> Any:
        return attn_core.attention(
            q, k, v, mask=mask, query_offset=offset, impl="triton", **options
        )

    return ours


class _Deterministic:
    """torch's own switch, for the length of a call."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *error: Any) -> None:
        torch.use_deterministic_algorithms(self.before)


def _scope(name: str) -> Callable[[], Any]:
    from attn_core.kernels import configs

    scopes: dict[str, Callable[[], Any]] = {
        gpu_cases.DETERMINISTIC: _Deterministic,
        gpu_cases.SPLIT: lambda: configs.fusing(False),
        gpu_cases.FUSED: lambda: configs.fusing(True),
        gpu_cases.TOGETHER: lambda: configs.parting(False),
        gpu_cases.APART: lambda: configs.parting(True),
    }
    return scopes.get(name, nullcontext)


def _copy(case: GpuCase) -> Prepared:
    source = torch.zeros(case.cache_bytes, dtype=torch.uint8, device="cuda")
    into = torch.empty_like(source)
    return Prepared(lambda: into.copy_(source), lambda arrays: {})


class Timer:
    """Times calls by the device's own clock."""

    def __init__(self) -> None:
        self.swept = torch.empty(_SWEPT, dtype=torch.uint8, device="cuda")

    def sample(self, run: Callable[[], Any], repeats: int) -> float:
        """Milliseconds per call."""
        pairs = []
        torch.cuda._sleep(_LEAD)
        for _ in range(repeats):
            self.swept.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(_AHEAD)
            pair[0].record()
            run()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in pairs) / repeats


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph: of a short one the host's own time would be all that is seen."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# --- For the conformance suite: its arrays are on the host. ---------------------------------------


def _there(x: Any) -> Any:
    return x.cuda() if isinstance(x, torch.Tensor) else x


@subject("torch", dtypes=("float32", "bfloat16", "float16"))
def triton(
    query: Any, key: Any, value: Any, mask: Any = None, bias: Any = None, scale: Any = None,
    causal: bool = False, window: Any = None, query_offset: Any = None, softcap: Any = None,
    slopes: Any = None, sinks: Any = None, kv_lengths: Any = None, q_lengths: Any = None,
    dropout: Any = None, layout: str = "BHTD",
) -> Any:  # fmt: skip
    """attention(impl="triton") on the device; copies there and back are differentiated too."""
    made: Any = None if mask is None else attn_core.masks.dense(_there(mask))
    words = [attn_core.masks.causal()] if causal else []
    words += [attn_core.masks.window(*window)] if window is not None else []
    for word in words:
        made = word if made is None else made & word
    score = None if softcap is None else attn_core.scores.softcap(softcap)
    if slopes is not None:
        score = attn_core.scores.alibi(_there(slopes))
    found = attn_core.attention(
        *(_there(x) for x in (query, key, value)),
        mask=made,
        bias=_there(bias),
        score=score,
        scale=scale,
        sinks=_there(sinks),
        kv_lengths=_there(kv_lengths),
        q_lengths=_there(q_lengths),
        query_offset=0 if query_offset is None else _there(query_offset),
        dropout=None if dropout is None else attn_core.Dropout(*dropout),
        layout=layout,
        impl="triton",
        return_lse=True,
    )
    return found.out.cpu(), found.lse.cpu(), None
