"""The kernels behind `impl="triton"`: operators, transforms, autocast, switches, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_calls import DEVICE, alike, compare, described, draw
from torch.func import grad, hessian, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import attn_core
from attn_core import Dropout, UnsupportedError, attention, explain, masks, registry, scores
from attn_core.backends.torch import (
    chunked,
    held,
    kept,
    triton_backward,
    triton_forward,
    triton_launch,
    triton_schedule,
)
from attn_core.backends.torch.chunked_backward import Saved, Upstream
from attn_core.backends.torch.chunked_parts import Ask, read
from attn_core.backends.torch.tiles import Tiles
from attn_core.conformance import run
from attn_core.kernels import configs, interpreter
from attn_core.language.rules import HOST, Rules
from attn_core.spec import Operands

B, HQ, HK, TQ, TK, D = 2, 4, 2, 20, 23, 8
QUERY, KEY, VALUE = draw(B, HQ, TQ, D), draw(B, HK, TK, D), draw(B, HK, TK, D)
SLOPES, SINKS, TABLE = draw(HQ).abs(), draw(HQ), draw(16, HQ)
BACKEND = registry.load("torch")

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="looks into what is interpreted")


def call(*arrays: Any, **options: Any) -> Any:
    return attention(*(arrays or (QUERY, KEY, VALUE)), impl="triton", **options)


def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The kernels launched from now on and what was compiled into them."""
    found: list[tuple[str, dict[str, Any]]] = []
    launch = triton_launch.launch

    def spy(kernel: Any, programs: int, shape: Any, *args: Any, **options: Any) -> None:
        found.append((kernel.__name__, options))
        launch(kernel, programs, shape, *args, **options)

    monkeypatch.setattr(triton_launch, "launch", spy)
    return found


# --- Who answers. ---------------------------------------------------------------------------------


def test_kernels_come_early_on_a_gpu_and_last_where_they_are_interpreted() -> None:
    """There torch's own is asked first where queries are many; of float32 it answers none."""
    said, few = explain(QUERY, KEY, VALUE), explain(QUERY[:, :, :3], KEY, VALUE)
    masked = explain(QUERY, KEY, VALUE, mask=masks.window(9, 3), query_offset=0)
    many, step, banded = ([c.name for c in told.candidates] for told in (said, few, masked))
    if DEVICE == "cpu":
        assert (said.impl, many[-1], step[-1], banded[-1]) == ("native", *["triton"] * 3)
    else:
        assert many[:2] == banded[:2] == ["native", "triton"]
        assert step[:2] == ["triton", "native"]
        assert said.impl == few.impl == masked.impl == "triton"
    for told in (said, few, masked):
        verdicts = {c.verdict for c in told.candidates if c.name == "triton"}
        assert verdicts <= {"chosen", "would answer"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": (
        {n: x.double() for n, x in (("query", QUERY), ("key", KEY), ("value", VALUE))},
        "the dtype must be one of float32, bfloat16, float16. Got float64.",
    ),
    "weights": ({"return_weights": True}, "`return_weights` must be left out"),
    "a wide head": (
        {"query": draw(1, 1, 3, 264), "key": draw(1, 1, 3, 264), "value": draw(1, 1, 3, 8)},
        "D and Dv must be at most 256. Got 264 and 8.",
    ),
    "a wide value": (
        {"query": draw(1, 1, 3, 8), "key": draw(1, 1, 3, 8), "value": draw(1, 1, 3, 257)},
        "D and Dv must be at most 256. Got 8 and 257.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    more, reason = REFUSED[name]
    given = {"query": QUERY, "key": KEY, "value": VALUE, **more}
    with pytest.raises(UnsupportedError, match=r"impl='triton'") as raised:
        attention(**given, impl="triton")
    assert f"triton: {reason}" in str(raised.value)
    assert attention(**given) is not None  # the others go on


@interpreted
def test_bfloat16_is_refused_where_the_interpreter_takes_it_for_an_integer(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """An interpreter whose functions are other ones than those that are replaced."""
    request.addfinalizer(registry.forget)
    x = QUERY.bfloat16()
    assert attention(x, x, x, impl="triton").dtype == torch.bfloat16
    monkeypatch.setattr(interpreter, "BFLOAT16", False)
    registry.forget()
    with pytest.raises(UnsupportedError, match=r"which takes bfloat16 for an integer\."):
        attention(x, x, x, impl="triton")


@pytest.mark.parametrize("width", [1, 16, 24, 72, 200, 256])
def test_widths(width: int) -> None:
    given = draw(1, 2, 5, width), draw(1, 2, 9, width), draw(1, 2, 9, max(1, width // 2))
    want = attention(*[x.double() for x in given], impl="reference")
    torch.testing.assert_close(call(*given).double(), want, rtol=0, atol=3e-6)


@interpreted
def test_the_suite_judges_it_on_out_and_lse() -> None:
    cases = ["heads-gqa-6-2", "mask-causal", "sinks-mixed-float16", "heads-gqa-6-2-bfloat16"]
    found = {v.case: v for v in run(["torch:triton"], cases=cases)}
    assert {n: v.status for n, v in found.items()} == dict.fromkeys(cases, "passed")
    assert set(found["mask-causal"].shares) == {"out", "lse", "d_query", "d_key", "d_value"}


# --- The operators. -------------------------------------------------------------------------------

OPCHECK: dict[str, Any] = {
    "plain": lambda: (Ask("BHTD", "zero", 0.0, None, None, 0, False, False, "triton"), {}),
    "everything": lambda: (
        Ask(
            *("BTHD", "end", 0.25),
            masks.segments(torch.arange(TK) // 9).tree,
            scores.alibi(SLOPES).tree,
            *(1, True, False, "triton", True),
        ),
        {
            "bias": draw(1, HQ, 1, TK),
            "sinks": SINKS.clone(),
            "kv_lengths": torch.tensor([TK, 3], device=DEVICE),
            "q_lengths": torch.tensor([TQ, 2], device=DEVICE),
            "seed": torch.tensor([3, 4], device=DEVICE),
            "operands": [torch.arange(TK, device=DEVICE) // 9, SLOPES.clone()],
        },
    ),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name: str) -> None:
    ask, more = OPCHECK[name]()
    assert read(ask.written()) == ask
    given = [x.clone() for x in (QUERY, KEY, VALUE)]
    if ask.layout == "BTHD":
        given = [x.transpose(1, 2).contiguous() for x in given]
    names = ("bias", "sinks", "kv_lengths", "q_lengths", "query_offset", "seed")
    operands = more.get("operands", [])
    inputs = [*given, *[more.get(n) for n in names], operands]
    out, lse, _, *rows = chunked._forward_op(ask.written(), 0.35, *inputs)
    floats = [
        x is not None and x.is_floating_point() for x in (*inputs[:5], *operands[ask.masks :])
    ]
    upstream = [torch.randn_like(out), torch.randn_like(lse) if ask.lse else None, None]
    backward = (ask.written(), 0.35, floats, *inputs, [out, *rows], *upstream)
    torch.library.opcheck(chunked._backward_op, backward)
    leaves = [x.requires_grad_() if y else x for x, y in zip(inputs[:5], floats, strict=False)]
    torch.library.opcheck(chunked._forward_op, (ask.written(), 0.35, *leaves, *inputs[5:]))


def test_compiled_whole() -> None:
    def loss(q: Any, k: Any, v: Any, bias: Any, slopes: Any) -> Any:
        options = {"mask": masks.causal(), "query_offset": "end", "return_lse": True}
        out, lse, _ = call(q, k, v, bias=bias, score=scores.alibi(slopes), **options)
        return out.square().sum() + lse.sum()

    given = [x.clone().requires_grad_() for x in (QUERY, KEY, VALUE, draw(TQ, TK), SLOPES)]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*given), given)
    want = torch.autograd.grad(loss(*given), given)
    for x, one, other in zip(given, got, want, strict=True):
        # What a score looks up is added by atomics: on a GPU no two runs share their order.
        off = 1e-5 if x is given[-1] and DEVICE != "cpu" else 0
        torch.testing.assert_close(one, other, rtol=off, atol=off)
        assert other.abs().max() > 1e-3


@pytest.mark.parametrize("count", [3, 0])
def test_as_many_keys_as_a_selection_leaves(count: int) -> None:
    """How many is known as a compiled call runs; of none no kernel has anything to read."""

    def loss(q: Any, k: Any, keep: Any) -> Any:
        some = k[:, :, keep.nonzero()[:, 0]]
        torch._check(some.shape[2] < 100)
        out, lse, _ = call(q, some, some, query_offset=0, return_lse=True)
        return out.square().sum() + torch.where(lse > -torch.inf, lse, 0.0).sum()

    torch._dynamo.reset()
    keep = torch.arange(TK, device=DEVICE) < count
    given = [QUERY.clone().requires_grad_(), KEY.clone().requires_grad_()]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*given, keep)
    some = given[1][:, :, :count]
    out, lse, _ = attention(given[0], some, some, query_offset=0, impl="reference", return_lse=True)
    want = out.square().sum() + torch.where(lse > -torch.inf, lse, 0.0).sum()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(found, given), torch.autograd.grad(want, given), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_vmap_and_per_sample_gradients() -> None:
    many = draw(3, B, HQ, TQ, D)
    f = lambda q: call(q, KEY, VALUE, mask=masks.causal(), query_offset="end")  # noqa: E731
    alike(vmap(f)(many), torch.stack([f(q) for q in many]))
    loss = grad(lambda q: f(q).square().sum())
    alike(vmap(loss)(many), torch.stack([loss(q) for q in many]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_second_derivatives_name_the_reference() -> None:
    f = lambda q: call(q, KEY, VALUE).square().sum()  # noqa: E731
    for refused in (
        lambda: jvp(f, (QUERY,), (QUERY,)),
        lambda: hessian(f)(QUERY),
        lambda: grad(lambda q: grad(f)(q).sum())(QUERY),
    ):
        with pytest.raises(UnsupportedError, match='impl="reference"'):
            refused()
    leaf = QUERY.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    with pytest.raises(UnsupportedError, match='impl="reference"'):
        torch.autograd.grad(first.sum(), leaf)


def test_autocast_casts_as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autocast(DEVICE, torch.float16):
        found = call()
    assert found.dtype == torch.float16
    assert torch.equal(found, call(*[x.half() for x in (QUERY, KEY, VALUE)]))


# --- Switches. ------------------------------------------------------------------------------------


def test_tf32_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = seen(monkeypatch)
    for precision, said in ((None, "ieee"), ("highest", "ieee"), ("fast", "tf32")):
        launched.clear()
        leaf = QUERY.clone().requires_grad_()
        out = call(leaf, KEY, VALUE, precision=precision)
        out.sum().backward()
        products = {n: o["PRECISION"] for n, o in launched if "PRECISION" in o}
        assert set(products) == {"forward", "d_query"}
        assert set(products.values()) == {said}
        report = explain(QUERY, KEY, VALUE, impl="triton", precision=precision)
        assert ("TF32" in str(report.effective)) == (precision == "fast")


def test_highest_does_not_depend_on_torchs_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert call(precision="highest") is not None
    with pytest.raises(UnsupportedError, match="which is the caller's to set"):
        attention(QUERY, KEY, VALUE, impl="chunked", precision="highest")


@pytest.fixture
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tables(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, bool]:
    """The gradient of a table, and whether a kernel added it up by atomics."""
    launched = seen(monkeypatch)
    table = TABLE.clone().requires_grad_()
    query = QUERY.clone().requires_grad_()
    out = call(query, KEY, VALUE, score=scores.relative_bias(table), query_offset=0)
    _, found = torch.autograd.grad(out.square().sum(), (query, table))
    return found, any(options.get("SITES") for _, options in launched)


def test_deterministic_algorithms_leave_atomics_out(
    deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, atomics = tables(monkeypatch)
    assert not atomics
    torch.use_deterministic_algorithms(False)
    other, atomics = tables(monkeypatch)
    assert atomics
    torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)
    assert found.abs().max() > 1e-2


@pytest.mark.parametrize("fused", [False, True])
def test_tables_that_want_no_gradient_are_given_no_room_for_one(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table may be as large as all logits together; and ids never want one."""
    made: list[tuple[int, ...]] = []
    zeros = torch.zeros

    def spy(*args: Any, **options: Any) -> torch.Tensor:
        found = zeros(*args, **options)
        made.append(tuple(found.shape))
        return found

    monkeypatch.setattr(torch, "zeros", spy)
    given, slopes = draw(B, HQ, TQ, TK), SLOPES.clone().requires_grad_()
    ids = torch.arange(TK, device=DEVICE)
    table, places, each = (attn_core.operand(x) for x in (given, ids, slopes))
    plain = attn_core.score(lambda s, b, h, q, k: s + table[b, h, attn_core.row, k])
    placed = attn_core.score(lambda s, b, h, q, k: s - each[h] * (places[k] > 3))
    leaves = [x.clone().requires_grad_() for x in (QUERY, KEY, VALUE)]
    with configs.fusing(fused):
        call(*leaves, score=plain).sum().backward()
        assert given.shape not in made
        call(*leaves, score=placed).sum().backward()
    assert ids.shape not in made
    assert slopes.shape in made


# --- What goes wrong says where. ------------------------------------------------------------------


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_an_error_of_the_framework_says_which_problem(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = QUERY.clone().requires_grad_()

    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    ask = lambda: call(leaf, KEY, VALUE, mask=masks.causal(), query_offset=0)  # noqa: E731
    if which == "backward":
        ask = ask().sum().backward
    monkeypatch.setattr(triton_launch, "launch", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        ask()
    (note,) = raised.value.__notes__
    assert note == (
        f'attn_core: {which} of impl="triton": query (2, 4, 20, 8), key (2, 2, 23, 8), '
        f"value (2, 2, 23, 8), float32 in BHTD on {QUERY.device}; mask q >= k"
    )


# --- On which device, and on which stream. --------------------------------------------------------


def documents(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """out and every gradient, by a mask that the host holds, so that all that is kept is read."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    mask = masks.segments(np.arange(TK) // 9) & masks.causal()
    out = call(*leaves, mask=mask, query_offset="end")
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs streams of a GPU")
def test_on_a_stream_of_ones_own() -> None:
    """Nothing is read elsewhere, before it is there: the stream is busy when the call is made."""
    want = documents(2 * QUERY, KEY, VALUE)
    triton_schedule._kept.clear()
    held._kept.clear()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        got = documents(2 * QUERY, KEY, VALUE)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(got, want, strict=True):
        alike(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_tensors_device_whichever_is_current() -> None:
    want = documents(QUERY, KEY, VALUE)
    there = torch.device("cuda", 1 - torch.cuda.current_device())
    got = documents(*[x.to(there) for x in (QUERY, KEY, VALUE)])
    assert torch.cuda.current_device() != there.index
    for a, b in zip(got, want, strict=True):
        assert a.device == there
        alike(a.to(b.device), b)


# --- Nothing waits for the device. ----------------------------------------------------------------


class _Copies(TorchDispatchMode):
    """Refuses what would wait for a device, or may not stand in a CUDA graph: copies to or from
    the host, and reading a value."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in (*args, found) if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in tensors}
        assert kinds <= {"meta"}, f"{function} on {kinds}"
        assert "_local_scalar_dense" not in str(function)
        assert "nonzero" not in str(function)
        return found


CAPTURED: dict[str, Any] = {
    "causal": (masks.causal(), None, {}),
    "window, offsets": (masks.window(9, 0), None, {"query_offset": "ints"}),
    "documents": (masks.segments(torch.arange(700) // 90) & masks.causal(), None, {}),
    "lengths": (masks.causal(), None, {"kv_lengths": "ints", "q_lengths": "ints"}),
    "every head its own": (
        attn_core.mask(lambda b, h, q, k: (q - k) % (h + 2) == b),
        None,
        {"query_offset": "ints"},
    ),
    "a table of tiles": (masks.blocks(torch.ones(3, 3, dtype=torch.bool), 300), None, {}),
    "a limit": (
        attn_core.mask(lambda b, h, q, k: q - k <= attn_core.operand(torch.tensor(9))[()]),
        None,
        {"query_offset": "ints"},
    ),
    "a score, dropout": (None, scores.relative_bias(draw(16, 4)), {"seed": "words"}),
    "one query": (masks.causal(), None, {"rows": 1, "kv_lengths": "ints"}),
}


@interpreted
@pytest.mark.parametrize("name", CAPTURED)
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that hold nothing, everything but the launches themselves."""
    mask, score, more = CAPTURED[name]
    kernels: list[str] = []

    def launch(kernel: Any, *rest: Any, **options: Any) -> None:
        kernels.append(kernel.__name__)

    def copied(x: Any, *rest: Any, **options: Any) -> Any:
        assert isinstance(x, torch.Tensor), "a tensor made of what is on the host"
        return x.to(options["device"])

    monkeypatch.setattr(triton_launch, "launch", launch)
    monkeypatch.setattr(triton_launch, "prepare", lambda kernel, *rest, **options: None)
    monkeypatch.setattr(kept, "capturing", lambda device: True)
    for name_of in ("tensor", "as_tensor", "asarray", "from_numpy"):
        monkeypatch.setattr(torch, name_of, copied)
    monkeypatch.setattr(triton_launch, "processors", lambda device: 132)
    device = torch.device("meta")
    rows = more.get("rows", 700)
    query, up = (torch.empty(2, 4, rows, 16, device=device) for _ in range(2))
    key, value = (torch.empty(2, 2, 700, 16, device=device) for _ in range(2))
    given = {
        n: torch.empty(2, dtype=torch.int64, device=device) for n, x in more.items() if n != "rows"
    }
    arrays = [
        tuple(torch.empty(a.shape, dtype=a.dtype, device=device) for a in table)
        for table in (() if part is None else part.arrays for part in (mask, score))
    ]
    x = Operands(query, key, value, mask=arrays[0], score=arrays[1])._replace(**given)
    offset = "given" if "query_offset" in more else "end"
    rate = 0.3 if "seed" in more else 0.0
    trees = [None if part is None else part.tree for part in (mask, score)]
    ask = Ask("BHTD", offset, rate, *trees, len(arrays[0]), True, False, "triton")
    with _Copies():
        out, _, _, *saved = triton_forward.forward(ask, 0.25, x)
        upstream = Upstream(up, None, None)
        wanted = [True, True, True, False, False, *[True] * len(arrays[1])]
        triton_backward.backward(ask, 0.25, x, Saved(out, *saved), upstream, wanted)
        with pytest.raises(AssertionError, match="cpu"):
            torch.ones(2).to(device)
        with pytest.raises(AssertionError, match="host"):
            torch.as_tensor(5, device=device)
    assert set(kernels) >= {"forward", "delta", "d_keys", "d_query"}


@interpreted
def test_single_numbers_of_the_host_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed, an offset, a length or an operand may be a tensor on the CPU: no kernel reads one."""
    places: set[str] = set()

    def look(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            places.add(x.device.type)
        for y in x if isinstance(x, (tuple, list)) else ():
            look(y)

    monkeypatch.setattr(triton_launch, "launch", lambda kernel, n, shape, *args, **more: look(args))
    monkeypatch.setattr(triton_launch, "prepare", lambda kernel, n, *args, **more: look(args))
    limit, cap = torch.tensor(9), torch.tensor(2.0)
    mask = attn_core.mask(lambda b, h, q, k: q - k <= attn_core.operand(limit)[()])
    score = scores.softcap(cap)
    arrays = [torch.empty(2, 4, 90, 16, device="meta") for _ in range(3)]
    ask = Ask("BHTD", "given", 0.3, mask.tree, score.tree, 1, False, False, "triton")
    numbers = [torch.tensor(n) for n in (80, 70, 5, 2**40)]
    given = [*arrays, None, None, *numbers, limit, cap]
    out, _, _, *saved = chunked._forward(ask, 0.25, given)
    wanted = [True, True, True, False, False, True]
    chunked._backward(ask, 0.25, wanted, given, (out, *saved), (out, None, None))
    assert places == {"meta"}


def test_sums_of_bounds_are_those_of_every_other_library() -> None:
    """At the ends of int32, where adding in 32 bits would wrap."""
    ends = [-(2**31), -(2**31) + 1, -7, -1, 0, 1, 9, 2**31 - 2, 2**31 - 1]
    x, y = (n.reshape(-1) for n in np.meshgrid(ends, ends))
    host, device = Rules(HOST), Rules(Tiles(DEVICE))
    for what in ("plus", "minus"):
        found = getattr(device, what)(*(Tiles(DEVICE).index(n) for n in (x, y)))
        exact = x + y if what == "plus" else x - y
        assert found.tolist() == np.clip(exact, ends[0], ends[-1]).tolist()
        assert found.tolist() == getattr(host, what)(x, y).tolist()
        for a in ends:
            for b in ends:  # numbers are added on the host
                numbers = getattr(device, what)(device.number(a), device.number(b))
                exact = a + b if what == "plus" else a - b
                assert int(numbers) == min(max(exact, ends[0]), ends[-1])


def test_dropout_of_a_host_seed_and_of_a_tensor_are_one() -> None:
    one = call(dropout=Dropout(0.4, 2**40 + 7), query_offset=0)
    seed = torch.tensor(2**40 + 7, device=DEVICE)
    assert torch.equal(one, call(dropout=Dropout(0.4, seed), query_offset=0))
    assert not torch.equal(one, call(dropout=Dropout(0.4, 8), query_offset=0))


@pytest.mark.skipif(not described(), reason="tensor descriptors are Hopper's and later GPUs'")
@pytest.mark.parametrize("queries", [1, 90])
def test_tiles_through_descriptors(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, choose = seen(monkeypatch), triton_launch.config

    def config(*about: Any) -> Any:
        return replace(choose(*about), descriptors=True)

    given = {
        "query": draw(B, HQ, queries, 24),
        "key": draw(B, HK, 90, 24),
        "value": draw(B, HK, 90, 40),
        "mask": masks.causal(),
        "query_offset": "end",
        "kv_lengths": [90, 70],
    }
    monkeypatch.setattr(triton_launch, "config", config)
    compare(given)
    assert {o["DESCRIPTORS"] for _, o in launched if "DESCRIPTORS" in o} == {True}
    launched.clear()
    # Steps of 12 bytes, and entries apart: by pointers.
    for x in (draw(B, HK, 90, 3), draw(B, HK, 90, 32)[..., ::2]):
        query = draw(B, HQ, queries, x.shape[3])
        compare({**given, "query": query, "key": x, "value": x})
    # And values of no columns, of which lse alone is asked: there is no descriptor of no entries.
    compare({**given, "value": draw(B, HK, 90, 32)[..., :0]})
    assert {o["DESCRIPTORS"] for _, o in launched if "DESCRIPTORS" in o} == {False}


def test_strides_of_every_kind() -> None:
    want = call()
    for given in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (QUERY, KEY, VALUE)],
        [torch.stack([x, x], -1)[..., 1] for x in (QUERY, KEY, VALUE)],
        [x.flip(0).flip(0)[:, :, :, :] for x in (QUERY, KEY, VALUE)],
        [QUERY, KEY[:1].expand(B, -1, -1, -1), VALUE[:1].expand(B, -1, -1, -1)],
    ):
        got = call(*given)
        if given[0] is QUERY:
            want = call(QUERY, given[1].contiguous(), given[2].contiguous())
        alike(got, want)


def test_what_memory_holds_the_negative_of() -> None:
    """The imaginary part of a conjugate, forward and backward: as query, and from upstream."""
    query, up = (torch.complex(draw(B, HQ, TQ, D), draw(B, HQ, TQ, D)).conj().imag for _ in "ab")
    found = []
    for q, g in ((query, up), (query.clone(), up.clone())):
        leaf = q.detach().requires_grad_()
        out = call(leaf, KEY, VALUE)
        found.append((out, *torch.autograd.grad(out, leaf, g)))
    assert query.is_neg()
    assert not query.clone().is_neg()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_columns_that_stand_far_apart(layout: str, tmp_path: Path) -> None:
    """So far that in 32 bits the last one would lie before the first: forward and backward."""
    width, rows, step = 24, 5, 2**31 // 20
    # A file with holes: pages that nobody writes to take no room.
    room = torch.from_file(
        str(tmp_path / "room"), shared=True, size=width * step, dtype=torch.float16
    )
    order = (1, 2) if layout == "BHTD" else (2, 1)
    sizes, strides = [1, 0, 0, width], [1, 0, 0, step]
    for axis, (n, stride) in zip(order, ((2, 1), (rows, 2)), strict=True):
        sizes[axis], strides[axis] = n, stride
    near = [draw(*sizes).half() for _ in range(4)]
    far = [room.as_strided(sizes, strides, 4096 * n) for n in range(4)]
    for a, b in zip(far, near, strict=True):
        a.copy_(b)
    found = []
    for arrays in (far, near):
        leaves = [x.detach().requires_grad_() for x in arrays[:3]]
        out = call(*leaves, layout=layout, mask=masks.causal(), query_offset=0)
        found.append([out, *torch.autograd.grad(out, leaves, arrays[3])])
    assert far[0].stride()[-1] == step
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@interpreted
def test_one_step_between_columns_beyond_32_bits(tmp_path: Path) -> None:
    width, step = 3, 2**31 + 8
    room = torch.from_file(
        str(tmp_path / "room"), shared=True, size=width * step, dtype=torch.float16
    )
    near = draw(1, 1, 5, width).half()
    far = room.as_strided(near.shape, (1, 1, 1, step))
    far.copy_(near)
    assert torch.equal(call(far, far, far), call(near, near, near))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("inside", [True, False])
def test_transforms_beside_a_compiler_that_may_break_graphs(inside: bool) -> None:
    """Behind the break Dynamo compiles frame by frame, and must not meet what launches kernels."""

    def compiled(f: Any) -> Any:
        return torch.compile(f, backend="aot_eager")

    def attended(query: torch.Tensor, impl: str = "triton") -> torch.Tensor:
        return attention(query, KEY, VALUE, mask=masks.causal(), query_offset="end", impl=impl)

    def total(query: torch.Tensor, impl: str = "triton") -> torch.Tensor:
        return attended(query, impl).square().sum()

    def both(transform: Any, f: Any) -> Any:
        return compiled(transform(f)) if inside else transform(compiled(f))

    torch._dynamo.reset()
    torch.testing.assert_close(both(grad, total)(QUERY), grad(total)(QUERY, "reference"))
    two = torch.stack([QUERY, 2 * QUERY])
    want = torch.stack([attended(query, "reference") for query in two])
    torch.testing.assert_close(both(vmap, attended)(two), want)
    with pytest.raises(UnsupportedError, match='need impl="reference"'):
        both(lambda f: lambda query: jvp(f, (query,), (query,)), attended)(QUERY)
