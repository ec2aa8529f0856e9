"""torch.compile(fullgraph=True) and torch.export: what recompiles, what may be traced, no warnings.

Warnings are errors in these tests, so each of them also says that nothing warned.
"""

from __future__ import annotations

import io
import operator
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import attn_core
from attn_core import Dropout, Mask, attention, masks, scores
from attn_core.backends.torch import scaled_dot_product_attention

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 5, 7, 8, 6
RNG = np.random.default_rng(11)


def draw(*shape: int) -> torch.Tensor:
    return torch.as_tensor(RNG.standard_normal(shape), dtype=torch.float32)


def ints(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.as_tensor(RNG.integers(low, high, shape))


q, k, v = draw(B, HQ, TQ, D), draw(B, HK, TK, D), draw(B, HK, TK, DV)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(f: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounter]:
    counter = CompileCounter()
    return torch.compile(f, fullgraph=True, backend=counter, **options), counter


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def frames(f: Callable[..., Any], calls: list[tuple[Any, ...]], **options: Any) -> list[int]:
    """Compilations so far after each call; every one agrees with eager, and no two are alike."""
    g, counter = compiled(f, **options)
    counts, seen = [], []
    for call in calls:
        found = g(*call)
        same(found, f(*call))
        assert not any(x.shape == found.shape and torch.equal(x, found) for x in seen)
        seen.append(found)
        counts.append(counter.frame_count)
    return counts


# --- First use of the package inside a compiled function. -----------------------------------------

FIRST = {
    "mask made inside": """
        def f(q, k, v):
            mask = attn_core.masks.causal() & attn_core.mask(lambda b, h, q, k: q - k < 3)
            score = attn_core.scores.softcap(3.0).then(attn_core.scores.alibi(heads=4))
            drop = attn_core.Dropout(0.3, 2**40 + 7)
            more = {"score": score, "query_offset": "end", "dropout": drop}
            return attn_core.attention(q, k, v, mask=mask, **more)
    """,
    "mask made outside": """
        mask = attn_core.masks.causal() & attn_core.masks.segments(np.array([0, 0, 1, 1, 1, 2, 2]))
        def f(q, k, v):
            return attn_core.attention(q, k, v, mask=mask, query_offset=2)
    """,
    "the documents' function": """
        def f(q, k, v):
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            sdpa = attn_core.backends.torch.scaled_dot_product_attention
            return sdpa(q, k, v, k.new_ones(5, 7) != 0, 0.2, scale=1.0, seed=-3)
    """,
}


@pytest.mark.parametrize("name", FIRST)
def test_first_use_is_compiled_once(name: str) -> None:
    """Backends are loaded at first use, which compiled code must not take for its inputs."""
    body = "\n".join(line[8:] for line in FIRST[name].splitlines())
    code = f"""
import sys, numpy as np, torch, attn_core
from torch._dynamo.testing import CompileCounter
{"import attn_core.backends.torch" if "documents" in name else ""}
{body}
q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
counter = CompileCounter()
g = torch.compile(f, fullgraph=True, backend=counter)
got, _ = g(q, k, v), g(q + 1, k, v)
assert counter.frame_count == 1, counter.frame_count
want = f(q, k, v)
assert (got - want).abs().max() < 2e-6 and want.abs().max() > 0.1
assert not {{"tensorflow", "jax", "keras"}} & set(sys.modules)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
    assert done.stderr == ""


# --- What recompiles. -----------------------------------------------------------------------------


def masked(m: Any, q: Any, k: Any, v: Any) -> Any:
    return attention(q, k, v, mask=m, query_offset=1)


def segments(kind: Callable[[Any], Any]) -> Mask:
    return masks.segments(kind(RNG.integers(0, 3, (B, TK)))) & masks.causal()


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray], ids=["tensor", "numpy"])
def test_masks_with_other_values_do_not_recompile_and_other_trees_do(kind: Any) -> None:
    same_tree = [(segments(kind), q, k, v) for _ in range(4)]
    others = [masks.window(1, i) & m for i in (1, 2) for m in (segments(kind),)]
    more = [(m, q, k, v) for m in others]
    assert frames(masked, same_tree + more + [(segments(kind), q, k, v)]) == [1, 1, 1, 1, 2, 3, 3]


def test_trees_of_many_lengths_as_one_argument() -> None:
    """Numbers in a tree are never taken for something that changes from call to call."""
    ids = [ints(0, 3, B, TK) for _ in range(4)]
    mask = masks.segments(ids[0])
    calls = [mask]
    for i in (1, 2, 3):
        mask = mask | (masks.segments(ids[i]) & masks.window(i, i))
        calls.append(mask)
    calls.append(masks.segments(ids[0], ids[1]) if TQ == TK else masks.causal())
    assert frames(masked, [(m, q, k, v) for m in calls])[-1] == len(calls)


def test_scores_with_other_values_do_not_recompile_and_other_trees_do() -> None:
    def f(score: Any, q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, score=score, query_offset=1)

    made = [scores.alibi(draw(HQ)).then(scores.softcap(2.0)) for _ in range(3)]
    made += [scores.alibi(draw(HQ)).then(scores.softcap(3.0))]
    assert frames(f, [(score, q, k, v) for score in made]) == [1, 1, 1, 2]


SEEDS = [5, 6, 7, 2**40 + 7, -1, 0, 1, 2**32, 2**63, 2**64 - 2]


def test_seeds_as_tensors_do_not_recompile() -> None:
    f = lambda d, q, k, v: attention(q, k, v, dropout=d)  # noqa: E731
    seeds = [torch.tensor(seed) for seed in SEEDS[:8]]
    assert frames(f, [(Dropout(0.3, seed), q, k, v) for seed in seeds]) == [1] * 8
    pairs = [torch.tensor([3, i], dtype=torch.uint32) for i in (4, 5, 2**32 - 1)]
    assert frames(f, [(Dropout(0.3, pair), q, k, v) for pair in pairs]) == [1] * 3


def test_seeds_as_python_ints_soon_stop_recompiling() -> None:
    """torch.compile takes an int for a constant until it changes, and each word is one."""
    f = lambda d, q, k, v: attention(q, k, v, dropout=d)  # noqa: E731
    assert frames(f, [(Dropout(0.3, seed), q, k, v) for seed in SEEDS])[-1] <= 3
    g = lambda s, q, k, v: attention(q, k, v, dropout=Dropout(0.3, s))  # noqa: E731
    small = [seed for seed in SEEDS if seed < 2**63]  # Python ints beyond are none of torch's
    assert frames(g, [(seed, q, k, v) for seed in small])[-1] <= 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_rates_scales_and_caps_may_be_arguments(dynamic: Any) -> None:
    """There a number may be a symbol; rates and caps are of the programme, and take its value."""
    rated = lambda rate, q, k, v: attention(q, k, v, dropout=Dropout(rate, 3))  # noqa: E731
    calls = [(x, q, k, v) for x in (0.5, 0.25, 0.75)]
    assert frames(rated, calls, dynamic=dynamic) == [1, 2, 3]
    scaled = lambda scale, q, k, v: attention(q, k, v, scale=scale)  # noqa: E731
    assert frames(scaled, calls, dynamic=dynamic)[-1] <= 3
    capped = lambda cap, q, k, v: attention(q, k, v, score=scores.softcap(cap))  # noqa: E731
    assert frames(capped, calls, dynamic=dynamic) == [1, 2, 3]


def test_a_learnt_cap_is_an_argument() -> None:
    cap = torch.tensor(2.0, requires_grad=True)

    def f(cap: Any) -> Any:
        return attention(q, k, v, score=scores.softcap(cap))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = [torch.autograd.grad(g(cap).square().sum(), cap)[0] for g in (compiled, f)]
    assert want.abs() > 1e-3
    torch.testing.assert_close(got, want)
    assert frames(f, [(torch.tensor(x),) for x in (0.5, 2.0, 3.0)]) == [1, 1, 1]


# --- Symbolic shapes. -----------------------------------------------------------------------------

LENGTHS = [(5, 7), (9, 8), (17, 40), (33, 35), (3, 4)]


def arrays(rows: int, keys: int) -> tuple[torch.Tensor, ...]:
    return draw(B, HQ, rows, D), draw(B, HK, keys, D), draw(B, HK, keys, DV)


@pytest.mark.parametrize("dynamic", [None, True])
def test_five_lengths_of_self_attention_compile_twice_at_most(dynamic: Any) -> None:
    """Without query_offset: that Tq and Tk are equal is known, though not what they are."""
    calls = [arrays(n, n) for n, _ in LENGTHS]
    f = lambda q, k, v: attention(q, k, v, mask=masks.causal())  # noqa: E731
    assert frames(f, calls, dynamic=dynamic)[-1] <= 2
    g = lambda x: attention(x, x, x, mask=masks.causal())  # noqa: E731
    assert frames(g, [(draw(B, HQ, n, D),) for n, _ in LENGTHS], dynamic=dynamic)[-1] <= 2


def test_five_lengths_with_everything_on_compile_twice() -> None:
    def f(q: Any, k: Any, v: Any, n: Any, slopes: Any) -> Any:
        mask = masks.causal() & masks.window(left=9) ^ masks.dilated(3, left=1)
        options = {"score": scores.alibi(slopes), "dropout": Dropout(0.2, 9)}
        return attention(q, k, v, mask=mask, query_offset="end", kv_lengths=n, **options)

    calls = [(*arrays(t, s), torch.tensor([s, s // 2]), draw(HQ)) for t, s in LENGTHS]
    assert frames(f, calls)[-1] <= 2


def test_an_import_between_two_calls_does_not_recompile() -> None:
    """Making a mask asks which frameworks are imported; compiled code must not depend on that."""
    f = lambda q: attention(q, k, v, mask=masks.causal(), query_offset=0)  # noqa: E731
    g, counter = compiled(f)
    g(q)
    sys.modules["attn_core_tests_a_new_module"] = sys
    try:
        g(q)
    finally:
        del sys.modules["attn_core_tests_a_new_module"]
    assert counter.frame_count == 1


def test_inverting_inside_needs_its_name() -> None:
    """torch 2.13 does not trace `~` of anything of ours; made outside, or spelled out, it works.

    Later versions do (2.15).
    """
    f = lambda q: attention(q, k, v, mask=~masks.causal(), query_offset=0)  # noqa: E731
    try:
        out, said = compiled(f)[0](q), "`invert`"
    except torch._dynamo.exc.Unsupported as refused:
        out, said = f(q), str(refused)
    assert "`invert`" in said
    same(out, f(q))
    g = lambda q: attention(q, k, v, mask=masks.causal().__invert__(), query_offset=0)  # noqa: E731
    same(compiled(g)[0](q), f(q))


def test_whether_a_device_has_autocast_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.9 cannot: every call that was compiled there ended so."""
    own = torch._dynamo.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", own)
    f = lambda q: attention(q, k, v, kv_lengths=5, impl="reference")  # noqa: E731
    same(compiled(f)[0](q), f(q))
    f = lambda q: attention(q, k, v, kv_lengths=5)  # noqa: E731
    same(compiled(f)[0](q), f(q))


def test_end_and_equal_lengths_share_one_compilation() -> None:
    f = lambda q, k, v: attention(q, k, v, mask=masks.causal(), query_offset="end")  # noqa: E731
    calls = [arrays(t, s) for t, s in [*LENGTHS, (6, 6), (11, 11)]]
    assert frames(f, calls, dynamic=True)[-1] == 1


def test_batches_compile_twice_at_most() -> None:
    def f(q: Any, k: Any, v: Any, n: Any) -> Any:
        return attention(q, k, v, kv_lengths=n, dropout=Dropout(0.2, 9))

    calls = [(draw(b, HQ, TQ, D), draw(b, HK, TK, D), draw(b, HK, TK, DV)) for b in (2, 3, 5, 8)]
    assert frames(f, [(*x, ints(0, TK, len(x[0]))) for x in calls])[-1] <= 2


def test_a_decoding_loop_compiles_twice_at_most() -> None:
    f = lambda q, k, v: attention(q, k, v, mask=masks.causal(), query_offset="end")  # noqa: E731
    assert frames(f, [arrays(1, n) for n in range(5, 10)])[-1] <= 2
    g = lambda q, k, v, at: attention(q, k, v, mask=masks.causal(), query_offset=at)  # noqa: E731
    assert frames(g, [(q, k, v, at) for at in (0, 1, 2, 3, 4, 5, -3)])[-1] <= 3


def test_arithmetic_that_may_leave_int32_is_still_checked() -> None:
    """Such a tree asks for the sizes: it is compiled anew for each, and refused where too large."""
    mask = attn_core.mask(lambda b, h, q, k: q * k < 20)
    f = lambda q, k, v: attention(q, k, v, mask=mask, query_offset="end")  # noqa: E731
    assert frames(f, [arrays(t, s) for t, s in LENGTHS[:3]], dynamic=True) == [1, 2, 3]
    steep = attn_core.mask(lambda b, h, q, k: q * 2**27 >= k)
    h = lambda q, k, v: attention(q, k, v, mask=steep, query_offset="end")  # noqa: E731
    short = arrays(5, 7)
    same(compiled(h, dynamic=True)[0](*short), h(*short))
    for call in (h, compiled(h, dynamic=True)[0]):
        with pytest.raises(Exception, match="int32"):
            call(*arrays(18, 18))


# --- What may be traced, and what may stay on the host. -------------------------------------------

TRACED = {
    "lengths": (
        lambda x: attention(
            q, k, v, kv_lengths=x[0], q_lengths=x[1], mask=masks.causal(), query_offset="end"
        ),
        [torch.tensor([[7, 3], [5, 2]]), torch.tensor([[1, 9], [-1, 4]])],
    ),
    "offsets": (
        lambda x: attention(q, k, v, mask=masks.causal(), query_offset=x),
        [torch.tensor([-1, 2]), torch.tensor([3, 4])],
    ),
    "lists of lengths": (
        lambda x: attention(
            *(q + x, k, v),
            kv_lengths=[7, 3],
            q_lengths=(5, 2),
            mask=masks.causal(),
            query_offset=[1, -2],
        ),
        [draw(1), draw(1)],
    ),
    "NumPy lengths": (
        lambda x: attention(q, k, v, kv_lengths=x),
        [np.array([7, 3]), np.array([2, 0])],
    ),
    "a NumPy mask": (
        lambda x: attention(q, k, v, mask=x),
        [RNG.random((TQ, TK)) < 0.5, RNG.random((TQ, TK)) < 0.5],
    ),
    "operands made inside": (
        lambda x: attention(
            q, k, v, mask=masks.segments(x), score=scores.alibi(heads=HQ), query_offset=0
        ),
        [ints(0, 3, TK), ints(0, 3, TK)],
    ),
    "a captured scalar": (
        lambda x: attention(
            q, k, v, mask=attn_core.mask(lambda b, h, q, k: q - k < x), query_offset="end"
        ),
        [torch.tensor(1), torch.tensor(3)],
    ),
    "lists in a mask": (
        lambda x: attention(
            q + x, k, v, mask=masks.lengths([3, 7]) & masks.global_tokens(2), query_offset=0
        ),
        [draw(1), draw(1)],
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_values_compile_once(name: str) -> None:
    f, values = TRACED[name]
    assert frames(f, [(x,) for x in values]) == [1, 1]


@pytest.mark.parametrize("where", ["closure", "argument"])
def test_a_graph_crosses_compile(where: str) -> None:
    """Its tables are NumPy arrays, which torch.compile shows without their dtype."""
    mask = masks.graph(RNG.random((TQ, TK)) < 0.5) | masks.segments(np.arange(TK, dtype=np.uint8))
    f = lambda m, q: attention(q, k, v, mask=m, query_offset="start")  # noqa: E731
    if where == "closure":
        assert frames(lambda q: f(mask, q), [(q,), (q + 1,)]) == [1, 1]
    else:
        assert frames(f, [(mask, q), (mask, q + 1)]) == [1, 1]


def test_transforms_inside_compile() -> None:
    tree = masks.segments(ints(0, 3, B, TK)).tree
    many = Mask(tree, (ints(0, 3, 3, B, TK),))

    def f(m: Any, q: Any, k: Any) -> Any:
        one = lambda m, q: attention(q, k, v, mask=m, query_offset=1)  # noqa: E731
        slope = torch.func.grad(
            lambda q: attention(q, k, v, mask=masks.causal(), query_offset=0).sum()
        )
        return torch.func.vmap(one, in_dims=(0, None))(m, q) + slope(q)[..., :DV]

    assert frames(f, [(many, q, k), (many, q + 1, k)]) == [1, 1]


def test_errors_keep_their_words() -> None:
    f = lambda q, k, v: attention(q, k, v, mask=masks.causal())  # noqa: E731
    with pytest.raises(Exception, match="`query_offset` must be given where Tq and Tk"):
        compiled(f)[0](q, k, v)
    with pytest.raises(Exception, match="`bias` must broadcast to"):
        compiled(lambda q: attention(q, k, v, bias=q.new_zeros(4, 7)))[0](q)


def test_the_flag_is_read_when_traced() -> None:
    def f(q: Any) -> Any:
        with attn_core.use(impl="reference"):
            return attention(q, k, v)

    assert frames(f, [(q,), (q + 1,)]) == [1, 1]
    with pytest.raises(Exception, match="native"), attn_core.use(impl="native"):
        compiled(lambda q: attention(q, k, v, impl="auto"))[0](q)


# --- Backward. ------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Projections, a learnt bucket table, learnt sinks and a learnt bias of a broadcast shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.project = torch.nn.Linear(16, 3 * 16)
        self.table = torch.nn.Parameter(torch.randn(8, HQ))
        self.sinks = torch.nn.Parameter(torch.randn(HQ))
        self.bias = torch.nn.Parameter(torch.randn(shape))

    def forward(self, x: Any, n: Any, seed: Any) -> Any:
        heads = [y.unflatten(-1, (HQ, 4)) for y in self.project(x).chunk(3, -1)]
        out = attention(
            *heads,
            layout="BTHD",
            mask=masks.causal(),
            bias=self.bias,
            score=scores.relative_bias(self.table).then(scores.softcap(5.0)),
            sinks=self.sinks,
            kv_lengths=n,
            dropout=Dropout(0.1, seed),
        )
        return out.flatten(-2)


def train(layer: Layer, call: Any, rows: int) -> list[torch.Tensor]:
    x = torch.randn(B, rows, 16, generator=torch.Generator().manual_seed(rows)).requires_grad_()
    loss = call(x, torch.tensor([rows, 2]), torch.tensor(rows)).square().sum()
    wanted = [x, *layer.parameters()]
    return [loss, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("shape", [(1, HQ, 1, 1), (5, 1), (B, 1, 5, 5), (1, 1)], ids=str)
def test_a_module_trains(shape: tuple[int, ...]) -> None:
    layer = Layer(shape)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    for got, want in zip(train(layer, call, 5), train(layer, layer, 5), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert want.abs().max() > 1e-4


def test_a_module_trains_at_five_lengths() -> None:
    layer, counter = Layer((1, HQ, 1, 1)), CompileCounterWithBackend("aot_eager")
    call = torch.compile(layer, fullgraph=True, backend=counter)
    for rows in (5, 9, 17, 6, 30):
        for got, want in zip(train(layer, call, rows), train(layer, layer, rows), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own
def test_inductor_trains() -> None:
    layer = Layer((1, HQ, 1, 1))
    call = torch.compile(layer, fullgraph=True, backend="inductor", dynamic=True)
    for rows in (5, 12):
        for got, want in zip(train(layer, call, rows), train(layer, layer, rows), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own
def test_inductor_in_bfloat16_with_rows_that_see_nothing() -> None:
    def f(q: Any, k: Any, v: Any, m: Any) -> Any:
        got = attention(
            q,
            k,
            v,
            mask=m,
            query_offset=-2,
            dropout=Dropout(0.4, -9),
            return_lse=True,
            kv_lengths=[7, 0],
        )
        return got.out, got.lse

    half = [x.bfloat16() for x in (q, k, v)]
    mask = masks.causal() & masks.segments(ints(0, 2, TK))
    got = torch.compile(f, fullgraph=True, backend="inductor")(*half, mask)
    want = f(*half, mask)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    assert (got[0][:, :, :2] == 0).all()
    assert (got[0] == 0).eq(want[0] == 0).all(), "the dropout masks differ"
    assert (want[0] != 0).any()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor_draws_the_same_dropout() -> None:
    """int64 products that overflow are undefined in its C++, and once dropped other keys here."""

    def f(q: Any, seed: Any, at: Any) -> Any:
        eye = torch.eye(TK).expand(B, HQ, TK, TK)
        made = [(Dropout(0.4, seed), at), (Dropout(0.4, -9), -2)]
        return [
            attention(q, torch.zeros(B, HQ, TK, D), eye, dropout=d, query_offset=o) != 0
            for d, o in made
        ]

    call = (torch.zeros(B, HQ, TQ, D), torch.tensor(-(2**40)), torch.tensor([-7, 2**27]))
    got = torch.compile(f, fullgraph=True, backend="inductor")(*call)
    for one, want in zip(got, f(*call), strict=True):
        assert torch.equal(one, want)
        assert 0 < want.float().mean() < 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("impl", ["chunked", "reference", "the documents' function"])
def test_inductor_takes_python_ints_for_seeds(impl: str) -> None:
    """From the second step on they are symbols, of which its C++ knows no number beyond int64."""
    eye, zeros = torch.eye(6).expand(1, 2, 6, 6), torch.zeros(1, 2, 6, 4)

    def f(q: Any, step: int) -> Any:
        if impl.startswith("the"):
            return scaled_dot_product_attention(q, zeros, eye, None, 0.4, seed=step) != 0
        return attention(q, zeros, eye, dropout=Dropout(0.4, step), impl=impl) != 0

    # Of `reference` its C++ takes long to compile: once is enough, with symbols from the first.
    first = True if impl == "reference" else None
    call, seen = torch.compile(f, fullgraph=True, backend="inductor", dynamic=first), []
    for step in (3, 4, -5, 2**40 + 7):
        got = call(zeros, step)
        assert torch.equal(got, f(zeros, step))
        assert not any(torch.equal(got, x) for x in seen)
        seen.append(got)


# --- Autocast and export. -------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where: str) -> None:
    def plain(q: Any) -> Any:
        return attention(q, k, v, return_lse=True)[:2]

    def cast(q: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(q)

    want = cast(q)
    if where == "inside":
        got = compiled(cast)[0](q)
    else:
        g, counter = compiled(plain)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = g(q)
        assert g(q)[0].dtype == torch.float32
        assert counter.frame_count == 2
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


class Exported(torch.nn.Module):
    def forward(self, q: Any, k: Any, v: Any, mask: Any, dropout: Any) -> Any:
        return attention(q, k, v, mask=mask, dropout=dropout, query_offset="end")


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_mask_and_dropout_as_inputs(strict: bool) -> None:
    def inputs(seed: int) -> tuple[Any, ...]:
        return masks.segments(ints(0, 3, B, TK)) & masks.causal(), Dropout(0.3, torch.tensor(seed))

    program = torch.export.export(Exported(), (q, k, v, *inputs(4)), strict=strict)
    others = inputs(5)
    same(program.module()(q + 1, k, v, *others), Exported()(q + 1, k, v, *others))


def test_export_with_symbolic_lengths_through_a_file() -> None:
    class Causal(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            mask = masks.causal() & masks.window(left=9)
            return attention(q, k, v, mask=mask, query_offset="end", dropout=Dropout(0.3, 5))

    free = {2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Causal(), (q, k, v), dynamic_shapes=(free, free, free))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for rows, keys in ((5, 7), (9, 20), (30, 20)):
        call = arrays(rows, keys)
        same(loaded.module()(*call), Causal()(*call))


def test_a_bound_that_comes_from_a_shape_is_a_constant_of_the_mask():
    def call(x: Any) -> Any:
        return attention(x, x, x, mask=masks.causal() & masks.window(x.shape[2] // 2))

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for length in (4, 6, 9):
        x = torch.randn(1, 2, length, 3)
        torch.testing.assert_close(compiled(x), call(x))


def where(c: Any, x: Any, y: Any) -> Any:
    return attn_core.where(c, x, y)


SIZED_MASKS = {
    "k < n": lambda n: lambda b, h, q, k: (q >= k) | (k - n < 0),
    "n > k": lambda n: lambda b, h, q, k: (q >= k) | (n - k > 0),
    "q - k < n": lambda n: lambda b, h, q, k: q - k - n < 0,
    "k == n": lambda n: lambda b, h, q, k: (q >= k) | (k - n == 0) | (n + 1 - k == 0),
    "arithmetic": lambda n: lambda b, h, q, k: (k % n == 1) | (n // (k + 1) == 1) | (k >> n == q),
    "bits": lambda n: lambda b, h, q, k: (q >= k) | (k & n == 1) | (n & k == 2),
    "within": lambda n: lambda b, h, q, k: (q >= k) | (k < operator.index(n)),
    "taken before": lambda n: (
        lambda n: lambda b, h, q, k: (q >= k) | (k < n) | (n == k) | (n - q > k)
    )(operator.index(n)),
    "a default": lambda n: (lambda n: lambda b, h, q, k, n=n: (q >= k) | (k <= n))(
        operator.index(n)
    ),
}
SIZED_SCORES = {
    "products": lambda n: lambda s, b, h, q, k: s * n + n * s - n / (s * s + 9) - s / n,
    "where": lambda n: lambda s, b, h, q, k: where(q - k - n < 0, s, n),
    "a float": lambda n: lambda s, b, h, q, k: where(s - n / 8 < 0, s, n / 8),
    "taken before": lambda n: (lambda n: lambda s, b, h, q, k: where(q - k < n, s, s / n))(
        operator.index(n)
    ),
}


@pytest.mark.parametrize("name", [*SIZED_MASKS, *[f"score: {x}" for x in SIZED_SCORES]])
def test_what_a_function_of_ones_own_may_do_with_a_size_or_an_int(name: str) -> None:
    """What SPEC 17 says to write; the names are those of what is meant."""

    def of_size(x: Any) -> Any:
        return call(x, x.shape[2] // 2)

    def call(x: Any, n: int) -> Any:
        if name.startswith("score: "):
            return attention(x, x, x, score=attn_core.score(SIZED_SCORES[name[7:]](n)))
        return attention(x, x, x, mask=attn_core.mask(SIZED_MASKS[name](n)))

    xs = [draw(1, 2, length, 3) for length in (6, 8, 10)]
    assert frames(of_size, [(x,) for x in xs])[-1] <= 3
    assert frames(call, [(xs[1], n) for n in (2, 3, 5)])[-1] <= 3


ANSWERED = {
    "k == n": lambda n: attn_core.mask(lambda b, h, q, k: (q >= k) | (k == n)),
    "n == k": lambda n: attn_core.mask(lambda b, h, q, k: (q >= k) | (n == k) | (q == 1)),
    "k != n": lambda n: attn_core.mask(lambda b, h, q, k: (q >= k) & (k != n)),
    "alone": lambda n: attn_core.mask(lambda b, h, q, k: k == n),
    "a default": lambda n: attn_core.mask(lambda b, h, q, k, n=n: (k == n) ^ (q >= k)),
    "score": lambda n: attn_core.score(lambda s, b, h, q, k: where(k == n, 0.0, s)),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_an_equality_that_torch_answers_by_itself_is_refused(name: str) -> None:
    """Torch 2.13 takes `k == n` for False where n is a symbol; a later one may ask us instead."""
    option = "score" if name == "score" else "mask"

    def f(x: Any, n: int) -> Any:
        return attention(x, x, x, **{option: ANSWERED[name](n)})

    g, x = compiled(f)[0], draw(1, 2, 7, 3)
    for n in (2, 3, 5):
        try:
            said, found = "", g(x, n)
        except torch._dynamo.exc.Unsupported as refused:
            said, found = str(refused), f(x, n)
        same(found, f(x, n))
        sign = "!=" if "!" in name else "=="
        assert not said or (n > 2 and f"Write `k - n {sign} 0` for" in said)


def test_a_symbol_of_export_is_refused_and_its_value_is_taken() -> None:
    class Sized(torch.nn.Module):
        def __init__(self, value: Callable[[Any], Any]) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Any) -> Any:
            n = self.value(x.shape[2])
            mine = attn_core.mask(lambda b, h, q, k: (q >= k) | (k == n - 1))
            return attention(x, x, x, mask=mine)

    def export(value: Callable[[Any], Any]) -> Any:
        free = ({2: torch.export.Dim.AUTO},)
        return torch.export.export(Sized(value), (x,), dynamic_shapes=free, strict=False)

    x = draw(1, 2, 7, 3)
    with pytest.raises(TypeError, match=r"Got SymInt: take its value outside, operator.index\(x\)"):
        export(lambda n: n)
    same(export(operator.index).module()(x), Sized(int)(x))


def test_an_order_that_torch_answers_by_itself_ends_in_the_error_that_is_named() -> None:
    def f(x: Any, n: int) -> Any:
        return attention(x, x, x, mask=attn_core.mask(lambda b, h, q, k: (q >= k) | (k < int(n))))

    g, x = compiled(f)[0], draw(1, 2, 7, 3)
    same(g(x, 2), f(x, 2))
    try:
        said, found = "", g(x, 3)  # as it may be in a later version
    except torch._dynamo.exc.InternalTorchDynamoError as error:
        said, found = str(error), f(x, 3)
    same(found, f(x, 3))
    assert not said or "'<' not supported between instances of 'object' and 'NoneType'" in said


def test_constants_and_equalities_of_ones_own_are_compiled() -> None:
    """True and False that were written stand beside `==`, which is not taken for answered."""
    ids = attn_core.operand([0, 0, 1, 1, 1])

    def f(x: Any, both: bool) -> Any:
        mine = attn_core.mask(lambda b, h, q, k: (ids[q] == ids[k]) | both | False)
        return attention(x, x, x, mask=mine & attn_core.mask(lambda b, h, q, k: True))

    assert frames(f, [(draw(1, 2, 5, 3), both) for both in (False, True)]) == [1, 2]


@pytest.mark.parametrize("way", ["texts", "twice"])
def test_equalities_of_pythons_own_are_no_answers(way: str) -> None:
    """A text is compared by Python, and what stands there twice was asked for twice."""
    mode = "strict"

    def texts(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) | (mode == "full") | ("full" == mode)  # noqa: SIM300

    def twice(b: Any, h: Any, q: Any, k: Any) -> Any:
        where = attn_core.where
        return where(k == 0, True, where((k == 0) | (q == k), False, True))

    def f(x: Any) -> Any:
        mine = attn_core.mask(texts if way == "texts" else twice)
        return attention(x, x, x, mask=mine, query_offset=0)

    x = draw(1, 2, 5, 3)
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), f(x))


def test_a_partial_is_looked_through_for_what_it_compares() -> None:
    def fn(n: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k == n) | (q == k)

    def f(x: Any, n: int) -> Any:
        return attention(x, x, x, mask=attn_core.mask(partial(fn, n)), query_offset=0)

    x = draw(1, 2, 5, 3)
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, 3), f(x, 3))
    with pytest.raises(Exception, match="must not be compared by `==` with a size or a number"):
        compiled(x, 4)


def test_a_float_table_keeps_its_digits_across_a_transform():
    score = scores.alibi(heads=3)
    x = torch.randn(2, 1, 3, 4, 5, dtype=torch.float64)
    want = torch.stack([attention(y, y, y, score=score) for y in x])
    got = torch.func.vmap(lambda y, s: attention(y, y, y, score=s), in_dims=(0, None))(x, score)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
