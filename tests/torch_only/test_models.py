"""Models of torch against the judge of models, and in every form torch has."""

from __future__ import annotations

import io
from typing import Any

import model_judge
import numpy as np
import pytest
import torch
from layer_cases import draw, weights_of, without
from layer_judge import kept
from model_cases import (
    BOTH,
    CASES,
    DECODER,
    ENCODER,
    GRADED,
    TYPES,
    B,
    Case,
    inputs_of,
    share,
    slope,
)
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import attn_core
from attn_core import AdditiveConfig, TransformerConfig, masks
from attn_core.backends.torch import AdditiveAttention, Transformer
from attn_core.compat import from_hf_mask
from attn_core.conformance import tolerance
from attn_core.model import additive
from attn_core.model.initial import initial
from attn_core.model.parameters import parameters


def model_of(case: Case, **options: Any) -> Transformer:
    model = Transformer({**case.config, **options})
    model.load_weights(weights_of(model.plan))
    return model.train(case.training)


def call(model: Any, case: Case, inputs: list[Any], **more: Any) -> Any:
    options = {n: torch.as_tensor(x) if n != "seed" else x for n, x in case.call.items()}
    return model(*[torch.as_tensor(x) for x in inputs], **options, **more)


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    case = CASES[name]
    model, inputs = model_of(case), inputs_of(case)
    found = call(model, case, inputs)
    assert share(found.detach(), case, model.export_weights(), inputs) <= 1
    seen = call(model, case, inputs, return_weights=True)
    assert torch.allclose(seen.out, found, rtol=0, atol=2e-5)
    assert list(seen.weights) == list(model.config.stacks)


@pytest.mark.parametrize("name", GRADED)
def test_gradients(name: str) -> None:
    """Of every weight, along one random direction each."""
    case = CASES[name]
    model, inputs = model_of(case, dtype="float64"), inputs_of(case)
    inputs = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
    out = call(model, case, inputs)
    pull = draw(*out.shape, seed=9).astype(np.float64)
    (torch.as_tensor(pull) * out).sum().backward()
    weights, rng = model.export_weights(), np.random.default_rng(8)
    for name, (_, kind) in model.plan.items():
        gradient = model.get_parameter(name).grad.numpy()
        gradient = gradient.T if kind == "matrix" else gradient
        way = rng.standard_normal(gradient.shape)
        want = slope(case, weights, inputs, pull, {name: way})
        spread = max(abs(gradient * way).sum(), abs(pull).sum())
        doubt = (tolerance.JUDGE + tolerance.CAP["gradient"]["float64"]) * spread
        assert abs((gradient * way).sum() - want) <= doubt, name


CHANGES = [name for name in CASES if name not in ("decoder", "encoder", "encoder-decoder")]


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_output(name: str) -> None:
    case = CASES[name]
    model, inputs = model_of(case), inputs_of(case)
    out = call(model, case, inputs)
    plain = {"decoder": DECODER, "encoder": ENCODER, "encoder-decoder": BOTH}[case.config["kind"]]
    for option in set(case.config) - set(plain) - {"classes", "inputs", "max_length"}:
        left = without(case, option)
        other = Transformer(left.config).train(case.training)
        # Positions that act inside have no weights; what else lacks some is seen by the plan.
        held = weights_of(model.plan)
        if not set(other.plan) <= set(held) or any(
            other.plan[n].shape != held[n].shape for n in other.plan
        ):
            continue
        other.load_weights({n: held[n] for n in other.plan})
        assert (call(other, left, inputs) - out).abs().max() > 1e-3, option
    for option in case.call:
        given = {n: x for n, x in case.call.items() if n != option}
        if option == "seed":
            given["seed"] = 3
        assert (call(model, Case(case.config, given), inputs) - out).abs().max() > 1e-3, option


def test_names_are_the_plans() -> None:
    before = torch.get_rng_state()
    for case in CASES.values():
        model = Transformer(case.config, seed=4)
        assert set(model.state_dict()) == set(model.plan)
        want = initial(parameters(model.config), 4)
        for name, x in model.export_weights().items():
            assert np.array_equal(x, want[name])
    assert torch.equal(torch.get_rng_state(), before)


def test_files_and_build(tmp_path: Any) -> None:
    case = CASES["everything"]
    model = model_of(case)
    attn_core.save_weights(tmp_path / "w", model)
    loaded = attn_core.load_weights(tmp_path / "w")
    assert loaded.config == model.config
    other = attn_core.build(loaded.config, backend="torch", seed=9).train()
    other.load_weights(tmp_path / "w")
    inputs = inputs_of(case)
    assert torch.equal(call(other, case, inputs), call(model, case, inputs))
    with pytest.raises(ValueError, match="Got another's, which differs"):
        Transformer(case.config, window=3).load_weights(tmp_path / "w")


TOKENS = torch.as_tensor(inputs_of(CASES["decoder"])[0])
SOURCE = torch.as_tensor(inputs_of(CASES["encoder-decoder"])[1])
REFUSED = {
    "vectors for tokens": (lambda: Transformer(DECODER)(TOKENS[..., None] * 1.0), "int tokens"),
    "tokens for vectors": (
        lambda: Transformer(CASES["vectors"].config)(TOKENS),
        r"`given` must be vectors \(B, T, 6\), which this encoder reads. Got int32",
    ),
    "no source": (lambda: Transformer(BOTH)(TOKENS), "one of `source` and a cache .* Got neither"),
    "a stray source": (lambda: Transformer(DECODER)(TOKENS, SOURCE), "`source` must be left out"),
    "lengths of a source that is not given": (
        lambda: Transformer(DECODER)(TOKENS, source_lengths=[1, 2]),
        "`source_lengths` must be left out",
    ),
    "lengths of a source that the cache holds": (
        lambda: Transformer(BOTH)(
            TOKENS, cache=Transformer(BOTH).make_cache(B, 9, source=SOURCE), source_lengths=[1, 2]
        ),
        "`source_lengths` must be left out",
    ),
    "lengths of a source for a decoder's cache": (
        lambda: Transformer(DECODER).make_cache(B, 9, source_lengths=[1, 2]),
        "`source_lengths` must be left out",
    ),
    "an empty prompt": (
        lambda: Transformer(DECODER).generate(TOKENS[:, :0], 2),
        "`prompt` must be int tokens",
    ),
    "types that no table holds": (
        lambda: Transformer(ENCODER)(TOKENS, types=torch.as_tensor(TYPES)),
        "`types` must be left out in a model without `token_types`",
    ),
    "types of other tokens": (
        lambda: Transformer({**ENCODER, "token_types": 3})(
            TOKENS, types=torch.as_tensor(TYPES)[:, 1:]
        ),
        r"`types` must be ints \(B, T\) = \(2, 5\), one for each token. Got int32 of \(2, 4\)",
    ),
    "no seed": (
        lambda: Transformer({**DECODER, "dropout": 0.1})(TOKENS),
        "`seed` must be given in training",
    ),
    "too long": (
        lambda: Transformer({**DECODER, "positions": "learned", "max_length": 4})(TOKENS),
        "`given` must not be longer than `max_length` = 4",
    ),
    "too long a cache": (
        lambda: Transformer({**DECODER, "positions": "learned", "max_length": 4}).make_cache(B, 5),
        "`length` must not be longer than `max_length` = 4",
    ),
    "another model's cache": (
        lambda: Transformer(DECODER)(
            TOKENS, cache=Transformer({**DECODER, "depth": 1}).make_cache(B, 9)
        ),
        "one of this model, of 2 blocks. Got 1",
    ),
    "a cache for an encoder": (
        lambda: Transformer(ENCODER).make_cache(B, 9),
        "`cache` must be left",
    ),
    "an encoder that generates": (
        lambda: Transformer(ENCODER).generate(TOKENS, 2),
        "sees all at once: `make_cache` and `generate` are for decoders",
    ),
    "a source to be kept in training": (
        lambda: Transformer({**BOTH, "dropout": 0.1}).make_cache(B, 9, source=SOURCE),
        r"nothing is dropped and no seed is needed: call `\.eval\(\)`.* before `make_cache",
    ),
    "classes, and padding as a mask": (
        lambda: Transformer({**ENCODER, "classes": 3})(TOKENS, mask=from_hf_mask(TOKENS)),
        r"`lengths` must say which rows count .* Got `mask` \(2, 1, 1, 5\)",
    ),
    "classes, and one row of a mask": (
        lambda: Transformer({**ENCODER, "classes": 3})(TOKENS, mask=TOKENS[:1] != 0),
        r"`lengths` must say which rows count .* Got `mask` \(1, 5\)",
    ),
    "a full cache": (
        lambda: Transformer(DECODER)(TOKENS, cache=Transformer(DECODER).make_cache(B, 4)),
        "Got 5 rows and 4 slots",
    ),
}


def test_a_layers_cache_is_none_of_a_models() -> None:
    model = Transformer(DECODER)
    with pytest.raises(TypeError, match=r"`cache` must be a ModelCache, .* Got Cache"):
        model(TOKENS, cache=model.make_cache(B, 9).blocks[0])


def test_classes_take_a_mask_beside_lengths_or_by_row() -> None:
    """The mean is of the rows that lengths count; what a mask hides, it hides as keys."""
    model = Transformer({**ENCODER, "classes": 3})
    model.eval()
    padding = from_hf_mask(torch.as_tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]))
    lengths, triangle = torch.as_tensor([3, 4]), torch.as_tensor(np.tri(5, dtype=bool))
    beside, alone = model(TOKENS, mask=padding, lengths=lengths), model(TOKENS, lengths=lengths)
    by_row, plain = model(TOKENS, mask=triangle), model(TOKENS)
    beside, alone, by_row, plain = [x.detach().numpy() for x in (beside, alone, by_row, plain)]
    np.testing.assert_allclose(beside, alone, rtol=0, atol=1e-6)
    assert abs(by_row - plain).max() > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    bad, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        bad()


# --- Step by step. --------------------------------------------------------------------------------

STEPPED = [
    *("decoder", "encoder-decoder", "learned", "rotary", "alibi", "window", "everything"),
    "as Gemma",
]


@pytest.mark.parametrize("name", STEPPED)
def test_steps_give_what_one_call_gives(name: str) -> None:
    """Ragged, too: row 1 is two tokens shorter than row 0 all the way."""
    case = Case(CASES[name].config)
    model, inputs = model_of(case).eval(), inputs_of(case)
    given, *source = [torch.as_tensor(x) for x in inputs]
    full = model(given, *source)
    assert share(full.detach(), case, model.export_weights(), inputs) <= 1
    options = {"source": source[0]} if source else {}
    cache = model.make_cache(B, 6, **options)
    counts = torch.tensor([3, 1])
    found = model(given[:, :3], lengths=counts, cache=cache)
    for b in range(B):
        part = found.out[b, : counts[b]]
        assert torch.allclose(part, full[b, : counts[b]], rtol=0, atol=2e-5)
    for step in range(2):
        at = counts + step
        tokens = given[torch.arange(B), at][:, None]
        found = model(tokens, cache=found.cache)
        want = full[torch.arange(B), at]
        assert torch.allclose(found.out[:, 0], want, rtol=0, atol=2e-5)
    assert found.cache.blocks[0].lengths.tolist() == [5, 3]


def greedy(model: Any, tokens: list[int], steps: int, source: Any, stop: Any = None) -> list[int]:
    """The whole sequence again for every token."""
    for _ in range(steps):
        given = (torch.tensor([tokens]), *([] if source is None else [source]))
        token = int(model(*given)[0, -1].argmax())
        tokens = [*tokens, tokens[-1] if stop is not None and tokens[-1] == stop else token]
    return tokens[-steps:]


@pytest.mark.parametrize("name", ["decoder", "encoder-decoder", "rotary", "learned"])
def test_generate_is_greedy(name: str) -> None:
    case = Case(CASES[name].config)
    model, inputs = model_of(case).eval(), inputs_of(case)
    prompt, *source = [torch.as_tensor(x) for x in inputs]
    prompt, options = prompt[:, :3], {"source": source[0]} if source else {}
    counts = torch.tensor([3, 2])
    found = model.generate(prompt, 5, lengths=counts, **options)
    assert found.shape == (B, 5)
    assert found.dtype == prompt.dtype
    for b in range(B):
        mine = source[0][b : b + 1] if source else None
        assert found[b].tolist() == greedy(model, prompt[b, : counts[b]].tolist(), 5, mine)
    stop = int(found[0, 1])
    stopped = model.generate(prompt, 5, lengths=counts, stop=stop, **options)
    first = found[0].tolist().index(stop)
    assert stopped[0].tolist() == found[0, : first + 1].tolist() + [stop] * (4 - first)


@torch.no_grad()
def test_generate_as_far_as_positions_go() -> None:
    """The last token is made, and not read: it needs no position."""
    model = Transformer({**DECODER, "positions": "learned", "max_length": 8}).eval()
    assert model.generate(TOKENS, 4).shape == (B, 4)
    assert model.generate(TOKENS, 0).shape == (B, 0)
    with pytest.raises(ValueError, match=r"`steps` must be at most .*`max_length` = 8"):
        model.generate(TOKENS, 5)


def test_generate_compiles_once_for_the_prompt_and_once_for_all_steps() -> None:
    torch._dynamo.reset()
    case = Case(CASES["everything"].config)
    model, inputs = model_of(case).eval(), inputs_of(case)
    prompt, source = [torch.as_tensor(x) for x in inputs]
    want = model.generate(prompt, 6, source=source)
    counter = CompileCounter()
    model.compile(fullgraph=True, backend=counter)
    assert torch.equal(model.generate(prompt, 6, source=source), want)
    assert counter.frame_count == 2
    assert torch.equal(model.generate(prompt, 6, source=source), want)
    assert counter.frame_count == 2


# --- Forms. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["everything", "dropout", "as Gemma", "as BERT", "learned"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    model, inputs = model_of(case), inputs_of(case)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for f in (model, compiled):
        model.zero_grad()
        out = call(f, case, inputs)
        out.square().sum().backward()
        found.append([out.detach(), *[p.grad.clone() for p in model.parameters()]])
    for a, b in zip(*found, strict=True):
        cap = tolerance.CAP["gradient"]["float32"]
        assert torch.allclose(a, b, rtol=0, atol=cap * max(1.0, float(a.abs().max())))


def test_autocast() -> None:
    case = CASES["encoder-decoder"]
    model, inputs = model_of(case), inputs_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(model, case, inputs)
    want = call(model, case, inputs)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned"])
@pytest.mark.parametrize("way", ["emptied", "skipped", "context", "assigned"])
def test_weights_alone_make_a_model_of_one_on_meta(way: str, positions: str) -> None:
    config = TransformerConfig.of(
        DECODER, positions=positions, max_length=9 if positions == "learned" else None
    )
    whole = Transformer(config, seed=3).eval()
    if way == "skipped":
        model = torch.nn.utils.skip_init(Transformer, config)
    elif way == "context":
        with torch.device("meta"):
            model = Transformer(config).to_empty(device="cpu")
    else:
        model = attn_core.build(config, backend="torch", device="meta")
        model = model if way == "assigned" else model.to_empty(device="cpu")
    if way == "emptied":
        model.load_weights(whole.export_weights())
    else:
        model.load_state_dict(whole.state_dict(), assign=way == "assigned")
    assert not list(model.buffers())
    assert torch.equal(model.eval()(TOKENS), whole(TOKENS))


def test_export_round_trip() -> None:
    case = CASES["decoder"]
    model, inputs = model_of(case, impl="reference").eval(), inputs_of(case)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (torch.as_tensor(inputs[0]),), dynamic_shapes=({1: rows},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (5, 12):
        tokens = torch.arange(2 * length, dtype=torch.int32).reshape(2, length) % 11
        assert torch.allclose(loaded(tokens), model(tokens), atol=1e-5)


def test_a_training_step_drops_by_its_number() -> None:
    case = CASES["dropout"]
    model, inputs = model_of(case), inputs_of(case)
    given = [torch.as_tensor(x) for x in inputs]
    one, two = model(*given, seed=1), model(*given, seed=torch.tensor(2))
    assert torch.equal(one, model(*given, seed=torch.tensor(1)))
    assert (one - two).abs().max() > 1e-3
    assert torch.equal(model.eval()(*given), model(*given, seed=3))


def test_documents_in_one_row() -> None:
    """A mask of the call goes to self-attention: two packed sequences do not see each other."""
    model = model_of(Case({**DECODER, "positions": None})).eval()
    apart = torch.cat([model(TOKENS[:, :3]), model(TOKENS[:, 3:])], 1)
    ids = torch.tensor([0, 0, 0, 1, 1])
    packed = model(TOKENS, mask=masks.segments(ids))
    assert torch.allclose(packed, apart, atol=1e-5)
    assert (packed - model(TOKENS)).abs().max() > 1e-2


# --- Additive attention. --------------------------------------------------------------------------

Q, K, V = draw(B, 5, 6), draw(B, 7, 4, seed=1), draw(B, 7, 3, seed=2)
SEES = np.random.default_rng(4).random((B, 5, 7)) < 0.6
SEES[1, 2] = False


def additive_of(**options: Any) -> AdditiveAttention:
    layer = AdditiveAttention(width=9, query_input=6, key_input=4, **options)
    layer.load_weights(weights_of(layer.plan))
    return layer


def near(got: Any, weights: Any, *args: Any, **options: Any) -> bool:
    want, _ = model_judge.additive(weights, *args, **options)
    plain, _ = model_judge.additive(weights, *args, dtype=np.float32, **options)
    return tolerance.share(got.detach().numpy(), want, plain, "float32", "out", 3.0) <= 1


@pytest.mark.parametrize("pairs", [2**22, 2**8, 1], ids=["one tile", "tiles of two", "of one row"])
def test_additive(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", pairs)
    layer = additive_of()
    weights, t = layer.export_weights(), [torch.as_tensor(x) for x in (Q, K, V)]
    everything = np.ones((B, 5, 7), bool)
    assert near(layer(*t), weights, Q, K, V, everything)
    found = layer(*t, mask=torch.as_tensor(SEES[:, None]), return_weights=True)
    assert near(found.out, weights, Q, K, V, SEES)
    _, shares = model_judge.additive(weights, Q, K, V, SEES)
    assert np.allclose(found.weights[:, 0].detach(), shares, atol=1e-6)
    dense = layer(*t, mask=masks.dense(torch.as_tensor(SEES[:, None])))
    assert torch.equal(dense, found.out)
    ends = np.arange(7) < np.array([4, 7])[:, None, None]
    rows = np.arange(5)[:, None] < np.array([5, 2])[:, None, None]
    got = layer(*t, kv_lengths=[4, 7], q_lengths=torch.tensor([5, 2]))
    assert near(got, weights, Q, K, V, ends & rows)
    causal = np.arange(7) <= np.arange(5)[:, None] + np.array([1, -1])[:, None, None]
    got = additive_of(causal=True)(*t, query_offset=torch.tensor([1, -1]))
    assert near(got, weights, Q, K, V, causal)
    keep = kept(0.3, 5, 2, B, 1, np.broadcast_to(np.arange(5), (B, 5)), 7)[:, 0]
    got = additive_of(dropout=0.3, site=2)(*t, seed=5)
    assert near(got, weights, Q, K, V, everything, keep=keep, rate=0.3)


@pytest.mark.parametrize("pairs", [2**22, 2**8], ids=["one tile", "tiles"])
def test_additive_gradients(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", pairs)
    layer = additive_of(dtype="float64")
    t = [torch.as_tensor(x).double().requires_grad_() for x in (Q, K, V)]
    pull = draw(B, 5, 3, seed=9).astype(np.float64)
    out = layer(*t, mask=torch.as_tensor(SEES[:, None]))
    (torch.as_tensor(pull) * out).sum().backward()
    held = {**layer.export_weights(), "q": Q, "k": K, "v": V}
    rng = np.random.default_rng(8)
    for name, x in held.items():
        leaf = t["qkv".index(name)] if name in "qkv" else layer.get_parameter(name)
        gradient = leaf.grad.numpy()
        gradient = gradient.T if name.endswith(".weight") else gradient
        way = rng.standard_normal(x.shape)

        def loss(step: float, name: str = name, way: Any = way) -> float:
            moved = {
                n: x.astype(np.float64) + (step * way if n == name else 0) for n, x in held.items()
            }
            inputs = [moved.pop(n) for n in "qkv"]
            return float((pull * model_judge.additive(moved, *inputs, SEES)[0]).sum())

        h = 2.0**-12
        once, half = (loss(h) - loss(-h)) / (2 * h), (loss(h / 2) - loss(-h / 2)) / h
        spread = max(abs(gradient * way).sum(), abs(pull).sum())
        doubt = (tolerance.JUDGE + tolerance.CAP["gradient"]["float64"]) * spread
        assert abs((gradient * way).sum() - (4 * half - once) / 3) <= doubt, name


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = f(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return found


def test_additive_memory_is_linear() -> None:
    """Nothing of the size of all pairs is made, forward or backward."""
    layer = AdditiveAttention(width=16)
    rows = 1024
    x = torch.randn(1, rows, 16, requires_grad=True)
    with Largest() as seen:
        layer(x, x).square().sum().backward()
    assert seen.most <= additive.PAIRS
    assert seen.most < rows * rows * 16 / 2
    assert x.grad is not None


def test_a_mask_of_other_rows_is_refused_before_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", 1)
    layer, t = additive_of(), [torch.as_tensor(x) for x in (Q, K, V)]
    with pytest.raises(ValueError, match="`mask` must broadcast to"):
        layer(*t, mask=torch.ones(Q.shape[1] + 2, K.shape[1], dtype=torch.bool))


def test_additive_refuses() -> None:
    layer, t = additive_of(), [torch.as_tensor(x) for x in (Q, K, V)]
    for bad, error, words in [
        (lambda: layer(t[1], t[1]), ValueError, r"`query` must have shape \(B, T, 6\)"),
        (lambda: layer(t[0], t[1], t[2][:, :3]), ValueError, "`value` must have shape"),
        (lambda: layer(*t, mask=torch.zeros(5, 7)), TypeError, "`mask` must be boolean"),
        (lambda: additive_of(causal=True)(*t), ValueError, "`query_offset` must be given"),
        (lambda: layer(*t, q_lengths=[1.5, 2.0]), TypeError, "`q_lengths` must be integers"),
        (lambda: layer(*t, query_offset=0.5), TypeError, "`query_offset` must be integers"),
        (lambda: additive_of(dropout=0.1)(*t), ValueError, "`seed` must be given"),
    ]:
        with pytest.raises(error, match=words):
            bad()
    assert isinstance(attn_core.build(AdditiveConfig(4), backend="torch"), AdditiveAttention)
    assert TransformerConfig.TABLE == "transformer"


def test_additive_compiled() -> None:
    torch._dynamo.reset()
    layer, t = additive_of(), [torch.as_tensor(x) for x in (Q, K, V)]
    mask = torch.as_tensor(SEES[:, None])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*t, mask=mask), layer(*t, mask=mask), atol=1e-6)
