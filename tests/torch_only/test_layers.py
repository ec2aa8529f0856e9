"""MultiHeadAttention of torch against the judge of layers, and in every form torch has."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import CASES, B, Case, draw, inputs_of, judged, share, slope, weights_of, without
from torch._dynamo.testing import CompileCounter

import attn_core
from attn_core import AttentionConfig, masks
from attn_core.backends.torch import MultiHeadAttention
from attn_core.backends.torch.layer_parts import HELD
from attn_core.conformance.tolerance import CAP, EPS, JUDGE
from attn_core.model.cache import Cache, LayerOutput
from attn_core.model.parameters import parameters


def layer_of(case: Case, **options: Any) -> MultiHeadAttention:
    layer = MultiHeadAttention(**{**case.config, **options})
    layer.load_weights(weights_of(layer.plan))
    return layer.train(case.training)


def tensors(given: dict[str, Any], dtype: Any = None) -> dict[str, Any]:
    made = {n: torch.as_tensor(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    if dtype is not None and "bias" in made:
        made["bias"] = made["bias"].to(dtype)
    return made


def call(layer: Any, case: Case, inputs: list[Any], **more: Any) -> Any:
    return layer(*[torch.as_tensor(x) for x in inputs], **tensors(case.call), **more)


# --- The judge. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_forward(name: str, impl: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case, impl=impl), inputs_of(case)
    found = call(layer, case, inputs, return_weights=True)
    weights = layer.export_weights()
    assert share(found.out.detach(), case, weights, inputs) <= 1
    assert share(found.weights.detach(), case, weights, inputs, "weights") <= 1
    assert found.cache is None
    alone = call(layer, case, inputs)
    assert share(alone.detach(), case, weights, inputs) <= 1


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    """Of every weight and input, along one random direction each."""
    case = CASES[name]
    layer, inputs = layer_of(case, dtype="float64"), inputs_of(case)
    given = [torch.as_tensor(x).double().requires_grad_() for x in inputs]
    out = layer(*given, **tensors(case.call, torch.float64))
    pull = draw(*out.shape, seed=9).astype(np.float64)
    (torch.as_tensor(pull) * out).sum().backward()
    weights, rng = layer.export_weights(), np.random.default_rng(8)
    plan = layer.plan
    found: dict[Any, Any] = {n: layer.get_parameter(n).grad.numpy() for n in plan}
    found = {n: g.T if plan[n].kind == "matrix" else g for n, g in found.items()}
    found |= {n: x.grad.numpy() for n, x in enumerate(given)}
    for name, gradient in found.items():
        way = rng.standard_normal(gradient.shape)
        want = slope(case, weights, inputs, pull, {name: way})
        # The judge's doubt is that of the suite; a gradient of zero, such as that of the keys'
        # bias where no position is read, is one of sums of the output.
        spread = max(abs(gradient * way).sum(), abs(pull).sum())
        doubt = (JUDGE + CAP["gradient"]["float64"]) * spread
        assert abs((gradient * way).sum() - want) <= doubt, name


def test_float32_gradients_are_those_of_float64() -> None:
    case = CASES["everything"]
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = layer_of(case, dtype=str(dtype).removeprefix("torch."))
        given = [torch.as_tensor(x).to(dtype) for x in inputs_of(case)]
        layer(*given, **tensors(case.call, dtype)).square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    for narrow, wide in zip(*found, strict=True):
        assert (narrow - wide).abs().max() <= CAP["gradient"]["float32"] * wide.abs().max()


CHANGES = [name for name in CASES if name not in ("self", "cross", "dropout in evaluation")]


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_output(name: str) -> None:
    """Each in turn at its default: an option that is accepted and ignored would stay unseen."""
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    out = call(layer, case, inputs)
    weights = layer.export_weights()
    shapes = ("kv_heads", "head_width", "value_width", "key_input", "value_input", "out_width")
    for option in case.config:
        if option in ("width", "heads", "dropout", "bias", "out_bias", *shapes):
            continue
        other = without(case, option)
        made = MultiHeadAttention(**other.config).train(case.training)
        made.load_weights({n: weights[n] for n in made.plan})
        assert (call(made, other, inputs) - out).abs().max() > 1e-3, option
    for option in case.call:
        if option == "seed":
            left: dict[str, Any] = {"seed": 3}
        else:
            left = {option: None}
        if option == "query_offset":
            left = {option: 0}
        other = Case(case.config, case.inputs, {**case.call, **left})
        assert (call(layer, other, inputs) - out).abs().max() > 1e-3, option


def test_biases_are_there_only_where_asked_for() -> None:
    names = set(MultiHeadAttention(width=8, heads=2, bias=False, gate=True).state_dict())
    assert names == {"query.weight", "key.weight", "value.weight", "gate.weight"} | {
        "out.weight",
        "out.bias",
    }


# --- Weights and first values. --------------------------------------------------------------------


def test_first_values_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two = MultiHeadAttention(width=8, heads=2), MultiHeadAttention(width=8, heads=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.query.weight, two.query.weight)
    three = MultiHeadAttention(width=8, heads=2, seed=1)
    assert not torch.equal(one.query.weight, three.query.weight)
    reach = (6 / 16) ** 0.5
    assert 0.8 * reach < one.query.weight.abs().max() <= reach


def test_export_and_load(tmp_path: Any) -> None:
    case = CASES["everything"]
    layer = layer_of(case)
    held = layer.export_weights()
    assert list(held) == list(parameters(layer.config))
    assert {n: x.shape for n, x in held.items()} == {n: p.shape for n, p in layer.plan.items()}
    held["out.bias"][:] = 0  # a copy
    assert layer.out.bias.abs().max() > 0
    attn_core.save_weights(tmp_path / "w", layer)
    other = MultiHeadAttention(**case.config, seed=5).train()
    other.load_weights(tmp_path / "w")
    inputs = inputs_of(case)
    assert torch.equal(call(layer, case, inputs), call(other, case, inputs))


def test_a_bad_load_changes_nothing(tmp_path: Any) -> None:
    layer = MultiHeadAttention(width=8, heads=2)
    before = copy.deepcopy(layer.state_dict())
    held = weights_of(layer.plan)
    attn_core.save_weights(tmp_path / "w", held, AttentionConfig(8, 4))
    (tmp_path / "cut").write_bytes((tmp_path / "w").read_bytes()[:-3])
    bad = [
        ({**held, "out.bias": np.zeros(3, np.float32)}, "`out.bias` must have shape"),
        ({n: x for n, x in held.items() if n != "out.bias"}, "Got none called 'out.bias'"),
        ({**held, "out.bais": held["out.bias"]}, "Did you mean 'out.bias'"),
        (tmp_path / "w", "heads: 2, 4"),
        (tmp_path / "cut", "complete safetensors file"),
    ]
    for source, words in bad:
        with pytest.raises(ValueError, match=words):
            layer.load_weights(source)
    assert all(torch.equal(x, before[n]) for n, x in layer.state_dict().items())


def test_torchs_own_state_is_refused() -> None:
    """Its names are the plan's, and its square matrices fit: transposed."""
    layer = MultiHeadAttention(width=8, heads=2)
    with pytest.raises(TypeError, match=r"`query.weight` must be a NumPy array.*torch.Tensor"):
        layer.load_weights(MultiHeadAttention(width=8, heads=2, seed=3).state_dict())


def test_a_layer_that_was_cast_loads_what_it_gives() -> None:
    for dtype in (torch.float64, torch.float16):
        layer = MultiHeadAttention(width=8, heads=2, seed=1).to(dtype)
        other = MultiHeadAttention(width=8, heads=2, seed=2).to(dtype)
        other.load_weights(layer.export_weights())
        assert torch.equal(other.key.weight, layer.key.weight)
    wide = MultiHeadAttention(width=8, heads=2).export_weights()
    with pytest.raises(TypeError, match="wider than the layer's dtype float16"):
        other.load_weights(wide)


def test_bfloat16_weights_go_out_and_in(tmp_path: Any) -> None:
    layer = MultiHeadAttention(width=8, heads=2, dtype="bfloat16", seed=4)
    assert layer.query.weight.dtype == torch.bfloat16
    attn_core.save_weights(tmp_path / "w", layer)
    other = MultiHeadAttention(width=8, heads=2, dtype="bfloat16")
    other.load_weights(tmp_path / "w")
    assert torch.equal(layer.query.weight, other.query.weight)


def test_build() -> None:
    config = AttentionConfig(8, 2, backend="torch")
    layer = attn_core.build(config, seed=3)
    assert isinstance(layer, MultiHeadAttention)
    assert torch.equal(layer.key.weight, MultiHeadAttention(config, seed=3).key.weight)
    assert attn_core.build(config, device="meta").key.weight.is_meta


# --- Calls that are refused, before anything is computed. -----------------------------------------

PLAIN = MultiHeadAttention(width=12, heads=4)
X = torch.as_tensor(draw(B, 5, 12))
REFUSED = {
    "a value alone, which Keras takes for the key": (
        lambda: PLAIN(X, value=X),
        ValueError,
        "`key` must be given where `value` is. .* `layer\\(query, source\\)`",
    ),
    "rank": (lambda: PLAIN(X[0]), ValueError, r"`query` must have shape \(B, T, 12\). Got \(5, 12"),
    "width": (lambda: PLAIN(X[..., :8]), ValueError, r"`query` must have shape"),
    "key rows": (lambda: PLAIN(X, X, X[:, :3]), ValueError, "as many rows as `key`"),
    "stock polarity": (
        lambda: PLAIN(X, mask=torch.zeros(5, 5)),
        TypeError,
        "`mask` must be boolean, True = attend. Got float32",
    ),
    "stock polarity beside causal": (
        lambda: MultiHeadAttention(width=12, heads=4, causal=True)(X, mask=torch.zeros(5, 5)),
        TypeError,
        "`mask` must be boolean, True = attend. Got float32",
    ),
    "a mask of rank 3": (
        lambda: MultiHeadAttention(width=12, heads=4, causal=True)(X, mask=X[:, :, :5] > 0),
        ValueError,
        "rank 2",
    ),
    "a mask of another size": (
        lambda: MultiHeadAttention(width=12, heads=4, causal=True)(X, mask=X[0, :4, :4] > 0),
        ValueError,
        "must broadcast to",
    ),
    "no seed": (
        lambda: MultiHeadAttention(width=12, heads=4, dropout=0.1)(X),
        ValueError,
        "`seed` must be given in training with dropout",
    ),
    "a site below the first": (
        lambda: MultiHeadAttention(width=12, heads=4, site=-1),
        ValueError,
        "`site` must be at least 0. Got -1",
    ),
    "a float seed": (
        lambda: MultiHeadAttention(width=12, heads=4, dropout=0.1)(X, seed=0.5),
        TypeError,
        "`seed` must be an int",
    ),
    "positions": (
        lambda: PLAIN(X, positions=torch.arange(5)),
        ValueError,
        "`positions` must be left out but for self-attention with rotary",
    ),
    "positions that are no integers": (
        lambda: MultiHeadAttention(width=12, heads=2, positions="rotary")(X, positions=X[0, :, 0]),
        TypeError,
        "`positions` must be integers. Got float32",
    ),
    "lengths of another batch beside a cache": (
        lambda: PLAIN(X, cache=PLAIN.make_cache(B, 9), q_lengths=[1, 2, 3]),
        ValueError,
        r"`q_lengths` must be an int or have shape \(B,\)",
    ),
    "rotary without an offset": (
        lambda: MultiHeadAttention(width=12, heads=2, positions="rotary")(X, X[:, :3]),
        ValueError,
        "`query_offset` must be given where Tq and Tk",
    ),
    "another layer's cache": (
        lambda: PLAIN(X, cache=MultiHeadAttention(width=12, heads=2).make_cache(B, 9)),
        ValueError,
        "`cache` must be one of this layer and batch",
    ),
    "the output that holds a cache": (
        lambda: PLAIN(X, cache=PLAIN(X, cache=PLAIN.make_cache(B, 9))),
        TypeError,
        "`cache` must be a Cache, .* Got LayerOutput: its `.cache`",
    ),
    "a small cache": (
        lambda: PLAIN(X, cache=PLAIN.make_cache(B, 4)),
        ValueError,
        "Got 5 rows and 4 slots",
    ),
    "an offset beside a cache": (
        lambda: PLAIN(X, cache=PLAIN.make_cache(B, 9), query_offset=1),
        ValueError,
        "`query_offset` must be left out with a cache",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    bad, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        bad()


# --- Caches. --------------------------------------------------------------------------------------

CACHED = {
    "plain": {},
    "rotary": {"positions": "rotary", "head_width": 6, "rotary_pairs": "interleaved"},
    "alibi": {"positions": "alibi"},
    "grouped, windowed": {"kv_heads": 2, "window": 3, "softcap": 2.0, "value_width": 5},
    "normed and gated": {"qk_norm": "rms", "gate": True, "positions": "rotary", "head_width": 4},
}
ROWS, SLOTS = 9, 11


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 1, 1, 3], [9], [6, 0, 3]], ids=str)
def test_steps_give_what_one_call_gives(name: str, cuts: list[int]) -> None:
    case = Case({"width": 12, "heads": 4, "causal": True, **CACHED[name]}, ((B, ROWS, 12),))
    layer, inputs = layer_of(case), inputs_of(case)
    cache, outs, start = layer.make_cache(B, SLOTS), [], 0
    for rows in cuts:
        found = layer(torch.as_tensor(inputs[0][:, start : start + rows]), cache=cache)
        assert isinstance(found, LayerOutput)
        outs.append(found.out.detach())
        cache, start = found.cache, start + rows
    assert cache.lengths.tolist() == [ROWS] * B
    assert share(torch.cat(outs, 1), case, layer.export_weights(), inputs) <= 1


def test_no_rows_at_all() -> None:
    """Of positions that are given, and into a cache, which stays as it was."""
    layer = MultiHeadAttention(width=12, heads=2, positions="rotary")
    assert layer(X[:, :0], positions=torch.zeros(0, dtype=torch.int32)).shape == (B, 0, 12)
    cache = layer(X, cache=layer.make_cache(B, 9), q_lengths=[3, 0]).cache
    found = layer(X[:, :0], cache=cache)
    assert found.out.shape == (B, 0, 12)
    assert all(torch.equal(x, y) for x, y in zip(found.cache, cache, strict=True))


@pytest.mark.parametrize("name", CACHED)
def test_ragged_batches(name: str) -> None:
    """Two sequences of unequal lengths, prefilled together and then continued row by row."""
    case = Case({"width": 12, "heads": 4, "causal": True, **CACHED[name]}, ((B, ROWS, 12),))
    layer, (x,) = layer_of(case), inputs_of(case)
    weights, want = layer.export_weights(), judged(case, layer.export_weights(), [x]).out
    counts = np.array([5, 2])
    padded = x[:, :5].copy()
    padded[1, 2:] = np.nan  # padding must reach nobody
    cache = layer.make_cache(B, SLOTS)
    found = layer(torch.as_tensor(padded), cache=cache, q_lengths=torch.as_tensor(counts))
    assert found.cache.lengths.tolist() == [5, 2]
    got = {b: [found.out[b, : counts[b]].detach()] for b in range(B)}
    for step in range(4):
        cache = found.cache
        rows = np.stack([x[b, counts[b] + step] for b in range(B)])[:, None]
        found = layer(torch.as_tensor(rows), cache=cache)
        for b in range(B):
            got[b].append(found.out[b].detach())
    for b in range(B):
        rows = torch.cat(got[b])
        one = Case(case.config, ((1, len(rows), 12),))
        assert share(rows[None], one, weights, [x[b : b + 1, : len(rows)]]) <= 1
        assert np.allclose(rows, want[b, : len(rows)], atol=1e-4)


def test_a_full_cache_is_refused_before_anything_changes() -> None:
    cache = PLAIN(X, cache=PLAIN.make_cache(B, 6), q_lengths=[5, 2]).cache
    held = [x.clone() for x in cache]
    with pytest.raises(ValueError, match="Got 2 for row 0 of the batch, in which 5 of 6 slots"):
        PLAIN(X[:, :2], cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(cache, held, strict=True))
    assert PLAIN(X[:, :2], cache=cache, q_lengths=[1, 2]).cache.lengths.tolist() == [6, 4]


@torch.no_grad()
def test_a_full_cache_answers_nan_where_it_is_traced() -> None:
    step = torch.compile(PLAIN, fullgraph=True, backend="eager")
    cache = PLAIN(X, cache=PLAIN.make_cache(B, 6), q_lengths=[5, 2]).cache
    found = step(X[:, :2], cache=cache)
    assert found.out[0].isnan().all()
    alone = PLAIN(X[1:, :2], cache=Cache(*[x[1:] for x in cache])).out
    assert torch.allclose(found.out[1:], alone, rtol=0, atol=1e-6)
    again = step(X[:, :1], cache=found.cache)
    assert again.out[0].isnan().all()
    assert not again.out[1].isnan().any()


def test_a_cache_of_16_bits() -> None:
    layer = MultiHeadAttention(width=12, heads=4, causal=True)
    cache = layer.make_cache(B, 6, dtype="bfloat16")
    found = layer(X, cache=cache)
    assert found.cache.key.dtype == torch.bfloat16
    assert found.out.dtype == torch.float32
    assert 0 < (found.out - layer(X)).abs().max() < 8 * EPS["bfloat16"]


def test_gradients_flow_through_a_cache() -> None:
    layer = MultiHeadAttention(width=12, heads=4, causal=True, dtype="float64")
    x = X.double().requires_grad_()
    first = layer(x[:, :3], cache=layer.make_cache(B, 6))
    second = layer(x[:, 3:], cache=first.cache)
    both = torch.cat([first.out, second.out], 1).square().sum()
    got, want = torch.autograd.grad(both, x)[0], torch.autograd.grad(layer(x).square().sum(), x)[0]
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_a_memory_is_the_source_projected_once() -> None:
    layer = MultiHeadAttention(width=12, heads=4, key_input=6, positions="rotary", head_width=4)
    source = torch.as_tensor(draw(B, 7, 6))
    lengths = torch.tensor([7, 3])
    memory = layer.memory(source, lengths=lengths)
    want = layer(X, source, kv_lengths=lengths, query_offset=1)
    assert torch.equal(layer(X, memory, query_offset=1), want)
    assert (layer(X, layer.memory(source), query_offset=1) - want).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`kv_lengths` must be left out where `key` is a Memory"):
        layer(X, memory, kv_lengths=lengths, query_offset=1)
    with pytest.raises(ValueError, match="`key` must be one of this layer"):
        PLAIN(X, memory._replace(key=memory.key[..., :2]))


# --- Every form of torch. -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    want = call(layer, case, inputs)
    for _ in range(2):
        assert torch.equal(call(compiled, case, inputs), want)
    assert counter.frame_count == 1


def test_compiled_with_gradients() -> None:
    torch._dynamo.reset()
    case = CASES["everything"]
    layer, inputs = layer_of(case), inputs_of(case)
    found = []
    for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        call(f, case, inputs).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=CAP["gradient"]["float32"] * float(a.abs().max()))


@torch.no_grad()
def test_a_decoding_loop_compiles_twice_at_most() -> None:
    """Once for the prompt, once for a step, whatever the lengths."""
    torch._dynamo.reset()
    layer = MultiHeadAttention(width=12, heads=2, causal=True, positions="rotary").eval()
    counter = CompileCounter()
    step = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.as_tensor(draw(B, 9, 12))
    cache, outs = layer.make_cache(B, 9), []
    for start, stop in [(0, 3), *[(i, i + 1) for i in range(3, 9)]]:
        found = step(x[:, start:stop], cache=cache)
        cache = found.cache
        outs.append(found.out)
    assert counter.frame_count == 2
    assert torch.allclose(torch.cat(outs, 1), layer(x), rtol=0, atol=1e-6)


def test_a_seed_that_changes_compiles_once_as_a_tensor() -> None:
    torch._dynamo.reset()
    layer = layer_of(CASES["dropout"])
    counter = CompileCounter()
    step = torch.compile(layer, fullgraph=True, backend=counter)
    outs = []
    for seed in (0, 7, 2**32 - 1, -1, 2**40 + 7, 2**63 - 1):
        outs.append(step(X, seed=torch.tensor(seed)))
        assert torch.equal(outs[-1], layer(X, seed=seed))
    assert counter.frame_count == 1
    for one, other in ((0, 1), (2, 3), (1, 4)):  # every word of a seed is read
        assert not torch.equal(outs[one], outs[other])


@pytest.mark.parametrize("name", ["self", "rotary", "qk_norm", "gate"])
def test_autocast_computes_as_torchs_own_layers_do(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(layer, case, inputs, return_weights=True)
    assert found.out.dtype == found.weights.dtype == torch.bfloat16
    want = judged(case, layer.export_weights(), inputs)
    gap = np.abs(found.out.detach().float().numpy() - want.out).max()
    # Three products, each rounded to bfloat16, lie between.
    assert 0 < gap < 3 * CAP["out"]["bfloat16"] * np.abs(want.out).max()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode
def test_functional_calls_and_transforms() -> None:
    layer = MultiHeadAttention(width=12, heads=4, impl="reference", causal=True).eval()
    held = dict(layer.named_parameters())

    def loss(held: Any, x: Any) -> Any:
        return torch.func.functional_call(layer, held, (x,)).square().sum()

    one = torch.func.grad(loss)(held, X[:1])
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(held, X[:, None])
    for name, gradient in one.items():
        assert torch.allclose(each[name][0], gradient, atol=1e-5)
        assert name == "key.bias" or not torch.allclose(each[name][1], gradient, atol=1e-2)
    _, tangent = torch.func.jvp(layer, (X,), (torch.ones_like(X),))
    step = 2.0**-8
    near = (layer(X + step) - layer(X - step)) / (2 * step)
    assert torch.allclose(tangent, near, atol=1e-3)


def test_vmap_over_caches() -> None:
    """Lengths that a transform hides are traced ones."""
    layer = MultiHeadAttention(width=12, heads=4, impl="reference", causal=True).eval()
    cache = layer(X[:, :3], cache=layer.make_cache(B, 6)).cache
    split = Cache(*[x[:, None] for x in cache])
    f = torch.func.vmap(lambda x, c: layer(x, cache=c).out)
    assert torch.allclose(
        f(X[:, None, 3:], split)[:, 0], layer(X[:, 3:], cache=cache).out, atol=1e-6
    )


@pytest.mark.parametrize("name", ["everything", "alibi", "a mask array"])
def test_copies_and_pickles(name: str) -> None:
    case = CASES[name]
    layer, inputs = layer_of(case), inputs_of(case)
    want = call(layer, case, inputs)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    others.append(torch.load(file, weights_only=False))
    for other in others:
        assert torch.equal(call(other, case, inputs), want)
    fresh = MultiHeadAttention(**case.config, seed=9).train(case.training)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(call(fresh, case, inputs), want)


def test_moved_to_another_dtype() -> None:
    """Positions are integers, which a cast of the module leaves alone."""
    case = CASES["rotary at positions"]
    layer, inputs = layer_of(case), inputs_of(case)
    wide = call(layer, case, inputs)
    layer = layer.to(torch.bfloat16)
    found = call(layer, case, [torch.as_tensor(x).bfloat16() for x in inputs])
    assert found.dtype == torch.bfloat16
    assert (found.float() - wide).abs().max() < 3 * CAP["out"]["bfloat16"] * wide.abs().max()


def test_shapes_on_the_meta_device() -> None:
    layer = MultiHeadAttention(width=12, heads=2, positions="rotary", device="meta")
    found = layer(X.to("meta"), return_weights=True)
    assert found.out.is_meta
    assert (found.out.shape, found.weights.shape) == (X.shape, (B, 2, 5, 5))


@pytest.mark.parametrize("form", ["eager", "compiled", "transformed"])
def test_the_turns_of_a_first_call_serve_every_other(form: str) -> None:
    layer = MultiHeadAttention(width=12, heads=2, rotary_base=77.0, positions="rotary").eval()
    want = layer(X)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return layer(x).square().sum()

    HELD.clear()
    torch._dynamo.reset()
    if form == "eager":
        with torch.inference_mode():
            layer(X)
    elif form == "compiled":
        torch.compile(layer, fullgraph=True, backend="aot_eager")(X)
    else:
        torch.func.grad(loss)(X)
    (held,) = HELD.values()
    assert not held.is_inference()
    assert not torch._C._functorch.is_functorch_wrapped_tensor(held)
    x = X.clone().requires_grad_()
    assert torch.equal(layer(x), want)
    loss(x).backward()
    assert torch.equal(x.grad, torch.func.grad(loss)(X))


@pytest.mark.parametrize("strict", [False, True])
def test_export_round_trip(strict: bool) -> None:
    case = CASES["everything"]
    # Of folded heads and unknown sizes torch's other tracer guards on strides.
    fields = {"impl": "reference"} if strict else {"impl": "reference", "kv_heads": 4}
    layer, inputs = layer_of(case, **fields).eval(), inputs_of(case)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(
        layer,
        (torch.as_tensor(inputs[0]),),
        {"q_lengths": torch.tensor([5, 3])},
        dynamic_shapes={"query": {1: rows}, "q_lengths": {}},
        strict=strict,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (5, 9):
        x = torch.as_tensor(draw(B, rows, 12))
        lengths = torch.tensor([rows - 1, 2])
        assert torch.allclose(loaded(x, q_lengths=lengths), layer(x, q_lengths=lengths), atol=1e-6)


def test_export_with_a_cache() -> None:
    layer = MultiHeadAttention(width=12, heads=4, impl="reference", causal=True).eval()
    cache = layer.make_cache(B, 6)
    program = torch.export.export(layer, (X[:, :1],), {"cache": cache}).module()
    for t in range(3):
        found = layer(X[:, t : t + 1], cache=cache)
        other = program(X[:, t : t + 1], cache=cache)
        assert torch.allclose(other.out, found.out, atol=1e-6)
        assert torch.equal(other.cache.lengths, found.cache.lengths)
        cache = found.cache


def test_a_mask_of_a_call_under_compile() -> None:
    torch._dynamo.reset()
    layer = MultiHeadAttention(width=12, heads=4, causal=True).eval()
    f = torch.compile(lambda x, m: layer(x, mask=m), fullgraph=True, backend="eager")
    m = masks.segments(torch.tensor([0, 0, 1, 1, 1]))
    assert torch.equal(f(X, m), layer(X, mask=m))
