"""Chunked attention in torch, against the reference implementation in float64 and by its costs.

Sizes go over several tiles: conformance, whose sizes are small, sees a single one.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

import attn_core
from attn_core import Dropout, UnsupportedError, attention, masks, scores
from attn_core.backends.torch import chunked, chunked_parts, chunked_tile
from attn_core.backends.torch.arrays import Reading
from attn_core.backends.torch.chunked_parts import Ask, read
from attn_core.backends.torch.philox import words

RNG = np.random.default_rng(17)


def draw(*shape: int, dtype: Any = torch.float64) -> torch.Tensor:
    return torch.as_tensor(RNG.standard_normal(shape)).to(dtype)


def ints(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.as_tensor(RNG.integers(low, high, shape))


# --- Against the reference, over several tiles. ---------------------------------------------------

B, HQ, HK, TQ, TK, D, DV = 2, 4, 2, 540, 770, 8, 6


def arrays(rows: int = TQ, keys: int = TK, **sizes: int) -> dict[str, torch.Tensor]:
    b, hq, hk = (sizes.get(n, m) for n, m in (("b", B), ("hq", HQ), ("hk", HK)))
    shapes = {"query": (b, hq, rows, D), "key": (b, hk, keys, D), "value": (b, hk, keys, DV)}
    return {name: draw(*shape) for name, shape in shapes.items()}


def found(impl: str, given: dict[str, Any], leaves: list[torch.Tensor], call: Any) -> list[Any]:
    """Outputs and gradients of everything, from one cotangent each, drawn alike."""
    got = call(given, impl)
    got = [x for x in got if x is not None] if isinstance(got, tuple) else [got]
    draws = np.random.default_rng(3)
    pulled = [torch.as_tensor(draws.standard_normal(tuple(x.shape))).to(x.dtype) for x in got]
    gradients = torch.autograd.grad(got, leaves, pulled, allow_unused=True)
    filled = [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)
    ]
    return [x.detach() for x in got] + filled


def compare(given: dict[str, Any], extras: bool = True, **options: Any) -> None:
    """Options may hold functions of leaves, so that a score's tables get gradients too."""
    tables = list(options.pop("tables", ()))
    score = options.pop("score", None)
    made = {n: x.clone().requires_grad_() for n, x in given.items()}
    for name in ("bias", "sinks"):
        if options.get(name) is not None:
            made[name] = options.pop(name).clone().requires_grad_()
    tables = [t.clone().requires_grad_() for t in tables]
    if score is not None:
        options["score"] = score(*tables)
    if extras:
        options = {"return_lse": True, "return_weights": True, **options}

    def call(made: dict[str, Any], impl: str) -> Any:
        return attention(**made, **options, impl=impl)

    leaves = [*made.values(), *tables]
    want, got = (found(impl, made, leaves, call) for impl in ("reference", "chunked"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def table(*shape: int) -> torch.Tensor:
    return draw(*shape).abs() + 0.1


CASES: dict[str, Any] = {
    "plain": dict,
    "causal": lambda: {"mask": masks.causal(), "query_offset": "end"},
    "window": lambda: {"mask": masks.window(100, 3), "query_offset": -5},
    "rows without keys": lambda: {"mask": masks.causal(), "query_offset": -400},
    "lengths": lambda: {"kv_lengths": [770, 0], "q_lengths": [257, 540], "sinks": draw(HQ)},
    "traced lengths, causal": lambda: {
        "kv_lengths": torch.tensor([769, 300]),
        "q_lengths": torch.tensor([2000, 257]),
        "mask": masks.causal(),
        "query_offset": "end",
    },
    "offsets": lambda: {"mask": masks.causal(), "query_offset": torch.tensor([-300, 150])},
    "documents": lambda: {
        "mask": masks.segments(ints(0, 4, B, TK).sort(-1).values) & masks.causal(),
        "query_offset": 0,
    },
    "a dense mask": lambda: {"mask": ints(0, 2, B, HQ, TQ, TK) == 1},
    "a mask of heads": lambda: {
        "mask": attn_core.mask(lambda b, h, q, k: (k - q) % 512 < 100 * h + 100),
        "query_offset": 0,
    },
    "sparse tiles": lambda: {"mask": masks.blocks(RNG.random((5, 7)) < 0.3, (128, 128))},
    "sinks": lambda: {"sinks": torch.cat([draw(HQ - 1), torch.tensor([-torch.inf])])},
    "a full bias": lambda: {"bias": draw(B, HQ, TQ, TK)},
    "a bias of keys": lambda: {"bias": draw(B, 1, 1, TK)},
    "a bias of heads and rows": lambda: {"bias": draw(1, HQ, TQ, 1)},
    "a bias of rank 2 that hides": lambda: {
        "bias": torch.where(draw(TQ, TK) > 1, -torch.inf, draw(TQ, TK))
    },
    "softcap": lambda: {"score": lambda: scores.softcap(2.0), "mask": masks.causal()},
    "alibi": lambda: {"score": scores.alibi, "tables": [table(HQ)], "mask": masks.window(300, 20)},
    "buckets": lambda: {"score": scores.relative_bias, "tables": [draw(32, HQ)]},
    "a score that hides": lambda: {
        "score": lambda t: attn_core.score(
            lambda s, b, h, q, k: attn_core.where(
                (q + k) % 3 == h, float("-inf"), s * attn_core.operand(t)[h, k]
            )
        ),
        "tables": [table(HQ, TK)],
        "sinks": draw(HQ),
    },
    "a score without s": lambda: {
        "score": lambda t: attn_core.score(lambda s, b, h, q, k: attn_core.operand(t)[k]),
        "tables": [draw(TK)],
    },
    "dropout": lambda: {"dropout": Dropout(0.3, 2**40 + 7), "mask": masks.causal()},
    "everything": lambda: {
        "bias": draw(1, HQ, 1, TK),
        "sinks": draw(HQ),
        "score": lambda t: scores.alibi(t).then(scores.softcap(3.0)),
        "tables": [table(HQ)],
        "mask": masks.causal() & masks.window(left=300),
        "query_offset": "end",
        "q_lengths": [540, 300],
        "kv_lengths": [600, 770],
        "dropout": Dropout(0.2, torch.tensor(-3)),
    },
}


def options_of(name: str) -> dict[str, Any]:
    options = CASES[name]()
    if "query_offset" not in options and name not in ("dropout", "a dense mask"):
        options["query_offset"] = 0
    return options | ({"query_offset": 5} if name == "dropout" else {})


@pytest.mark.parametrize("name", CASES)
def test_over_several_tiles(name: str) -> None:
    compare(arrays(), **options_of(name))


@pytest.mark.parametrize("name", ["causal", "everything", "a full bias", "a mask of heads"])
def test_the_other_layout(name: str) -> None:
    given = {n: x.transpose(1, 2).contiguous() for n, x in arrays().items()}
    compare(given, **options_of(name), layout="BTHD")


@pytest.mark.parametrize("seed", range(24))
def test_random_combinations(seed: int) -> None:
    """Options drawn at random; sizes at and about the borders of tiles."""
    rng = np.random.default_rng(seed)
    sizes = [0, 1, 5, 8, 127, 255, 256, 257, 511, 513, 530]
    rows, keys = (int(rng.choice(sizes[seed % 2 :])) for _ in range(2))
    hk, group, b = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 8])), int(rng.choice([1, 3]))
    hq = hk * group

    def some(value: Any) -> Any:
        return value() if rng.random() < 0.4 else None

    options: dict[str, Any] = {
        "sinks": some(lambda: draw(hq)),
        "bias": some(lambda: draw(*[n if rng.random() < 0.5 else 1 for n in (b, hq, rows, keys)])),
        "kv_lengths": some(lambda: torch.as_tensor(rng.integers(0, keys + 1, b))),
        "q_lengths": some(lambda: torch.as_tensor(rng.integers(0, rows + 1, b))),
        "dropout": some(lambda: Dropout(0.25, seed)),
        "mask": some(
            lambda: [
                masks.causal(),
                masks.window(70, 9),
                masks.causal() | masks.prefix(20),
                masks.dilated(3),
                masks.chunks(100),
            ][seed % 5]
        ),
        "query_offset": ["end", "start", -7, torch.as_tensor(rng.integers(-50, 50, b))][seed % 4],
    }
    if rng.random() < 0.5:
        options |= {"score": scores.alibi, "tables": [table(hq)]}
    given = arrays(rows, keys, b=b, hq=hq, hk=hk)
    if rows and keys:
        compare(given, **options)
    else:
        tables, score = options.pop("tables", ()), options.pop("score", None)
        options = {n: x for n, x in options.items() if x is not None}
        if score is not None:
            options["score"] = score(*tables)
        leaves = [x.requires_grad_() for x in given.values()]
        got, want = (
            attention(**given, **options, return_lse=True, impl=impl)
            for impl in ("chunked", "reference")
        )
        torch.testing.assert_close(got[:2], want[:2])
        for x in torch.autograd.grad(got.out.sum(), leaves):
            assert not x.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_dtypes(dtype: Any) -> None:
    given = {n: x.to(dtype) for n, x in arrays(600, 700).items()}
    leaves = [x.clone().requires_grad_() for x in given.values()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    asked = {"mask": masks.causal(), "query_offset": "end", "bias": draw(HQ, 1, 1)[None].to(dtype)}
    out = attention(*leaves, **asked, impl="chunked")
    exact = attention(*wide, **asked | {"bias": asked["bias"].double()}, impl="reference")
    up = draw(*out.shape)
    got = [out, *torch.autograd.grad(out, leaves, up.to(dtype))]
    want = [exact, *torch.autograd.grad(exact, wide, up.to(dtype).double())]
    tolerance = (40 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item()
        )


def test_weights_do_not_change_out() -> None:
    given = arrays(600, 700)
    options = {"mask": masks.causal(), "query_offset": "end", "dropout": Dropout(0.1, 3)}
    plain = attention(**given, **options)
    full = attention(**given, **options, return_weights=True, return_lse=True)
    assert torch.equal(plain, full.out)


def test_every_run_gives_the_same_bits() -> None:
    given = {n: x.float() for n, x in arrays().items()}
    slopes = table(HQ).float()

    def run() -> list[Any]:
        leaves = [x.clone().requires_grad_() for x in (*given.values(), slopes)]
        score = scores.alibi(leaves[-1])
        out = attention(*leaves[:3], score=score, mask=masks.window(300, 9), query_offset=0)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_huge_logits_are_rebuilt() -> None:
    """Rows of -1e9 biases: one number m + log l could not hold them."""
    given = {n: x.float() for n, x in arrays(300, 600).items()}
    leaves = [x.requires_grad_() for x in given.values()]
    bias = torch.full((1, 1, 300, 1), -1e9)
    out = attention(*leaves, bias=bias, return_lse=True)
    for a, b in zip(
        torch.autograd.grad(out.out.square().sum(), leaves),
        torch.autograd.grad(attention(*leaves, bias=bias, impl="reference").square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_poison_stays_where_nobody_looks() -> None:
    clean = arrays(600, 700)
    spoilt = {n: x.clone() for n, x in clean.items()}
    spoilt["query"][:, :, :40] = torch.nan  # stand before every key
    spoilt["key"][:, :, 640:] = torch.inf  # behind every query
    spoilt["value"][:, :, 640:] = torch.nan
    bias = draw(1, 1, 600, 700)
    hidden = torch.arange(700) > torch.arange(600)[:, None] - 40
    spoilt_bias = torch.where(hidden, torch.nan, bias)
    results = []
    for given, b in ((clean, bias), (spoilt, spoilt_bias)):
        leaves = [x.clone().requires_grad_() for x in (*given.values(), b)]
        got = attention(
            *leaves[:3],
            bias=leaves[3],
            score=scores.softcap(3.0),
            mask=masks.causal(),
            query_offset=-40,
            kv_lengths=640,
            return_lse=True,
            return_weights=True,
        )
        up = [torch.ones_like(x) for x in got]
        if given is spoilt:
            up[0][:, :, :40], up[1][:, :, :40] = torch.nan, torch.inf
            up[2][hidden.expand(up[2].shape)] = torch.nan
        results.append([*got, *torch.autograd.grad(got, leaves, up)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- Which tiles are computed, and what they cost. ------------------------------------------------


class Count:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles, self.masks, self.keys = 0, 0, 0
        logits, mask = chunked_tile.Tile.logits, chunked_tile.Tile._mask

        def counted(tile: Any, q: Any, span: Any, *rest: Any, **more: Any) -> Any:
            self.tiles += 1
            self.keys += (span.stop - span.start) * (tile.rows.stop - tile.rows.start)
            return logits(tile, q, span, *rest, **more)

        def masked(tile: Any, index: Any, span: Any) -> Any:
            self.masks += 1
            return mask(tile, index, span)

        monkeypatch.setattr(chunked_tile.Tile, "logits", counted)
        monkeypatch.setattr(chunked_tile.Tile, "_mask", masked)


def run_both_ways(**options: Any) -> None:
    given = {n: x.float().requires_grad_() for n, x in arrays(2048, 2048, b=1, hq=1, hk=1).items()}
    attention(**given, **options, impl="chunked").sum().backward()


def test_empty_tiles_are_not_computed_and_full_ones_read_no_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = chunked_parts._BLOCK
    rows = 2048 // block
    count = Count(monkeypatch)
    run_both_ways(mask=masks.causal())
    assert count.masks == 2 * rows, "the diagonal, forward and backward"
    assert count.keys == 2 * (rows * (rows + 1) // 2) * block**2
    count = Count(monkeypatch)
    run_both_ways(kv_lengths=[block])
    assert (count.masks, count.keys) == (0, 2 * 2048 * block)
    count = Count(monkeypatch)
    run_both_ways(mask=attn_core.mask(lambda b, h, q, k: q < -1))
    assert (count.masks, count.keys) == (0, 0)
    count = Count(monkeypatch)
    run_both_ways(mask=masks.segments(torch.arange(2048) // block))
    assert count.keys == 2 * 2048 * block


def test_full_tiles_never_read_the_mask_as_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = Reading.read

    def counted(self: Any, tree: Any, *rest: Any) -> Any:
        reads.append(tree)
        return original(self, tree, *rest)

    monkeypatch.setattr(Reading, "read", counted)
    run_both_ways(mask=masks.prefix(2048), query_offset=0)
    assert not reads


MEMORY = """
import resource, sys, torch
from attn_core import attention, masks
length = int(sys.argv[1])
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
small = [x[:, :, :64] for x in (q, k, v)]
attention(*small, mask=masks.causal()).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention(q, k, v, mask=masks.causal(), impl="chunked").sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear() -> None:
    """Peak KiB of forward and backward: the logits alone would be 128 and 512 MiB."""

    def peak(length: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(length)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert peak(4096) < 40 * 1024
    assert peak(8192) < 60 * 1024


# --- The operators, and what differentiates them. -------------------------------------------------


def small(**options: Any) -> dict[str, Any]:
    return {**{n: x.float() for n, x in arrays(5, 7).items()}, **options}


OPCHECK: dict[str, Any] = {
    "plain": lambda: (Ask("BHTD", "zero", 0.0, None, None, 0, False, False), {}),
    "everything": lambda: (
        Ask(
            "BTHD",
            "end",
            0.25,
            masks.segments(ints(0, 2, 9)).tree,
            scores.alibi(table(HQ)).tree,
            1,
            True,
            True,
        ),
        {
            "bias": draw(1, HQ, 1, 7).float(),
            "sinks": draw(HQ).float(),
            "kv_lengths": torch.tensor([7, 3]),
            "q_lengths": torch.tensor([5, 2]),
            "seed": torch.tensor([3, 4]),
            "operands": [ints(0, 2, 9), table(HQ).float()],
        },
    ),
}


# torch 2.15 itself looks at the gradient of a clone, and hides the warning where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name: str) -> None:
    ask, more = OPCHECK[name]()
    given = list(small().values())
    if ask.layout == "BTHD":
        given = [x.transpose(1, 2).contiguous() for x in given]
    names = ("bias", "sinks", "kv_lengths", "q_lengths", "query_offset", "seed")
    operands = more.get("operands", [])
    inputs = [*given, *[more.get(n) for n in names], operands]
    scale = 0.35
    out, lse, weights, *rows = chunked._forward_op(ask.written(), scale, *inputs)
    floats = [
        x is not None and x.is_floating_point() for x in (*inputs[:5], *operands[ask.masks :])
    ]
    upstream = [torch.randn_like(out), torch.randn_like(lse) if ask.lse else None]
    upstream.append(torch.randn_like(weights) if ask.weights else None)
    backward = (ask.written(), scale, floats, *inputs, [out, *rows], *upstream)
    torch.library.opcheck(chunked._backward_op, backward)
    leaves = [x.requires_grad_() if y else x for x, y in zip(inputs[:5], floats, strict=False)]
    forward = (ask.written(), scale, *leaves, *inputs[5:])
    torch.library.opcheck(chunked._forward_op, forward)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int64"])
def test_a_number_of_the_host_goes_along_to_a_gpu(kind: str) -> None:
    # No device is equal to its name: what stands there is taken for one of another device.
    there, number = SimpleNamespace(device="cpu"), int(torch.iinfo(getattr(torch, kind)).max) - 1
    _, moved = chunked._beside([there, torch.tensor(number, dtype=getattr(torch, kind))])
    assert [int(word) for word in words(moved)] == [number % 2**32, number // 2**32]


def test_an_ask_is_read_back_from_its_text() -> None:
    for _, (ask, _) in [(n, make()) for n, make in OPCHECK.items()]:
        assert read(ask.written()) == ask


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_nobody_differentiates_is_called_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers; and a function that can be differentiated wherever somebody might."""
    made: list[str] = []
    apply = chunked._Attend.apply

    def counted(*args: Any) -> Any:
        made.append("a function")
        return apply(*args)

    monkeypatch.setattr(chunked._Attend, "apply", counted)
    q, k, v = small().values()
    leaf = v.clone().requires_grad_()
    at_once = attention(q, k, v, impl="chunked")
    with torch.no_grad():
        assert torch.equal(attention(q, k, leaf, impl="chunked"), at_once)
    with torch.inference_mode():
        assert torch.equal(attention(q, k, leaf, impl="chunked"), at_once)
    assert made == []
    watched = attention(q, k, leaf, impl="chunked")
    assert torch.equal(watched, at_once)
    assert (made, watched.requires_grad, at_once.requires_grad) == (["a function"], True, False)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(UnsupportedError, match="forward-mode"):
            attention(dual, k, v, impl="chunked")
    with torch.no_grad():
        each = torch.vmap(lambda q: attention(q, k, v, impl="chunked"))(torch.stack([q, 2 * q]))
    assert torch.equal(each[0], at_once)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_second_derivatives_name_the_reference() -> None:
    q, k, v = small().values()
    call = lambda q: attention(q, k, v, impl="chunked").square().sum()  # noqa: E731
    for refused in (
        lambda: jvp(call, (q,), (q,)),
        lambda: hessian(call)(q),
        lambda: grad(lambda q: grad(call)(q).sum())(q),
    ):
        with pytest.raises(UnsupportedError, match='impl="reference"'):
            refused()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(UnsupportedError, match='impl="reference"'):
            attention(dual, k, v)
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
    with pytest.raises(UnsupportedError, match='impl="reference"'):
        torch.autograd.grad(first.sum(), leaf)


def test_first_derivatives_by_gradcheck() -> None:
    given = [x.double().requires_grad_() for x in small().values()]
    more = [draw(1, HQ, 1, 7).requires_grad_(), draw(HQ).requires_grad_()]
    slopes = table(HQ).requires_grad_()

    def call(q: Any, k: Any, v: Any, bias: Any, sinks: Any, slopes: Any) -> Any:
        got = attention(
            *(q, k, v),
            bias=bias,
            sinks=sinks,
            score=scores.alibi(slopes),
            mask=masks.causal(),
            query_offset="end",
            dropout=Dropout(0.3, 4),
            return_lse=True,
            return_weights=True,
        )
        return tuple(got)

    args = (*given, *more, slopes)
    assert torch.autograd.gradcheck(call, args, check_batched_grad=True, fast_mode=True)


def test_transforms() -> None:
    """vmap of gradients, with in_dims of every kind, against a loop."""
    given = small()
    many = draw(3, *given["query"].shape).float()
    lengths = torch.tensor([[7, 2], [3, 0], [1, 7]])

    def loss(q: Any, k: Any, n: Any) -> Any:
        options = {"mask": masks.causal(), "query_offset": "end", "dropout": Dropout(0.2, 1)}
        got = attention(q, k, given["value"], kv_lengths=n, **options, impl="chunked")
        return got.square().sum()

    each = grad(loss, argnums=(0, 1))
    got = vmap(each, in_dims=(0, None, 0))(many, given["key"], lengths)
    for i in range(3):
        want = each(many[i], given["key"], lengths[i])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[i], b)
            assert b.abs().max() > 1e-3


@pytest.mark.parametrize("wanted", [(n,) for n in range(6)] + [(0, 2), (1, 5), (3, 4)], ids=str)
def test_only_what_is_asked_for(wanted: tuple[int, ...]) -> None:
    given = [x.double() for x in small().values()]
    given += [draw(1, HQ, 5, 1), draw(HQ), table(HQ)]

    def run(needed: tuple[int, ...]) -> dict[int, torch.Tensor]:
        leaves = [x.clone().requires_grad_(n in needed) for n, x in enumerate(given)]
        q, k, v, bias, sinks, slopes = leaves
        score = scores.alibi(slopes)
        options = {"bias": bias, "sinks": sinks, "score": score, "query_offset": 0}
        attention(q, k, v, **options, impl="chunked").square().sum().backward()
        assert all(leaves[n].grad is None for n in range(6) if n not in needed)
        return {n: leaves[n].grad for n in needed}

    everything = run(tuple(range(6)))
    for n, x in run(wanted).items():
        assert torch.equal(x, everything[n])


def test_the_extras_alone_have_gradients() -> None:
    for name in ("lse", "weights"):
        results, given = [], small()
        for impl in ("chunked", "reference"):
            leaves = [x.double().requires_grad_() for x in given.values()]
            got = attention(*leaves, return_lse=True, return_weights=True, impl=impl)
            picked = getattr(got, name)
            up = torch.linspace(-1, 1, picked.numel(), dtype=picked.dtype).view(picked.shape)
            results.append(torch.autograd.grad(picked, leaves[:2], up))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
            assert b.abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own
def test_compiled(backend: str, dynamic: bool) -> None:
    """Forward and backward at two lengths, the second of several tiles, with one operator each."""
    torch._dynamo.reset()
    slopes = table(HQ).float()

    def call(q: Any, k: Any, v: Any, slopes: Any, n: Any) -> Any:
        options = {"mask": masks.causal(), "query_offset": "end", "kv_lengths": n}
        score, drop = scores.alibi(slopes), Dropout(0.1, 3)
        return attention(q, k, v, score=score, dropout=drop, **options, impl="chunked")

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows, keys in ((5, 7), (300, 530)):
        given = [x.float() for x in arrays(rows, keys).values()]
        lengths = torch.tensor([keys, keys // 2])
        results = []
        for f in (compiled, call):
            leaves = [x.clone().requires_grad_() for x in (*given, slopes)]
            out = f(*leaves, lengths)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_transform_inside_compile_is_left_to_the_reference() -> None:
    torch._dynamo.reset()
    q, k, v = small().values()

    def slope(impl: str) -> Any:
        return lambda q: grad(lambda q: attention(q, k, v, impl=impl).square().sum())(q)

    got = torch.compile(slope("auto"), fullgraph=True, backend="aot_eager")(q)
    torch.testing.assert_close(got, slope("chunked")(q))
    with pytest.raises(Exception, match=r"torch\.func inside torch\.compile"):
        torch.compile(slope("chunked"), fullgraph=True, backend="aot_eager")(q)


def test_no_compiler_is_loaded_by_a_plain_call() -> None:
    code = """
import sys, torch
from attn_core import attention, masks
x = torch.randn(1, 2, 5, 4, requires_grad=True)
attention(x, x, x, mask=masks.causal(), impl="chunked").sum().backward()
assert not {"triton", "torch._dynamo"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_weight_of_one_leaves_no_gradient_of_its_logit() -> None:
    """Out was rounded to 16 bits after dropout rescaled it, so that delta is not quite dP."""
    given = {n: draw(2, 2, 300, 8, dtype=torch.bfloat16) for n in ("query", "key", "value")}
    options = {"mask": masks.window(0, 0), "dropout": Dropout(0.3, 7), "impl": "chunked"}
    leaves = [x.clone().requires_grad_() for x in given.values()]
    out = attention(*leaves, **options)
    assert out.any()
    d_query, d_key, d_value = torch.autograd.grad(out.float().sin().sum(), leaves)
    assert not d_query.any()
    assert not d_key.any()
    assert d_value.any()
    # What flows back by lse does: there the logit is all of it.
    out, lse, _ = attention(*leaves, **options, return_lse=True)
    both = torch.autograd.grad(out.float().sin().sum() + lse.sum(), leaves[:2])
    alone = torch.autograd.grad(
        attention(*leaves, **options, return_lse=True).lse.sum(), leaves[:2]
    )
    for a, b in zip(both, alone, strict=True):
        assert a.any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("offset", ["start", "each"])
def test_no_batch_and_a_map_for_each(heads: int, offset: str) -> None:
    """A mask that tells both batches and heads apart, of which there are none to tell apart."""
    q, k = draw(0, heads, 257, 4).requires_grad_(), draw(0, 2, 65, 4)
    mask = attn_core.mask(lambda b, h, q, k: (q >= k) & (b + h < 1))
    start: Any = "start" if offset == "start" else torch.zeros(0, dtype=torch.int32)
    out = attention(q, k, k, mask=mask, query_offset=start, impl="chunked")
    assert out.shape == (0, heads, 257, 4)
    (got,) = torch.autograd.grad(out.sum(), q)
    assert got.shape == q.shape
