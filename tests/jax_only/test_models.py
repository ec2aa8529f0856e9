"""Models of JAX against the judge of models, and in every form JAX has."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import model_judge
import numpy as np
import pytest
from flax import nnx
from jax import export
from layer_cases import draw, weights_of, without
from layer_judge import kept
from model_cases import (
    BOTH,
    CASES,
    DECODER,
    ENCODER,
    GRADED,
    B,
    Case,
    inputs_of,
    share,
    slope,
)

import attn_core
from attn_core import AdditiveConfig, masks
from attn_core.backends.jax import AdditiveAttention, Transformer, models
from attn_core.compat import from_hf_mask
from attn_core.conformance import tolerance
from attn_core.model import additive
from attn_core.model.initial import initial


def model_of(case: Case, **options: Any) -> Transformer:
    model = Transformer({**case.config, **options})
    model.load_weights(weights_of(model.plan))
    (model.train if case.training else model.eval)()
    return model


def arrays(case: Case) -> dict[str, Any]:
    return {n: jnp.asarray(x) if n != "seed" else x for n, x in case.call.items()}


@partial(jax.jit, static_argnums=(0, 4))
def compiled(definition: Any, state: Any, inputs: list[Any], options: Any, fixed: Any) -> Any:
    """One program for all models of one configuration that are asked alike."""
    return nnx.merge(definition, state)(*inputs, **options, **dict(fixed))


def call(model: Any, case: Case, inputs: list[Any], **more: Any) -> Any:
    """Compiled: a model is many small operations. A seed is traced, where 32 bits hold it."""
    definition, state = nnx.split(model)
    options = {**arrays(case), **{n: x for n, x in more.items() if not isinstance(x, int)}}
    fixed = {n: x for n, x in more.items() if isinstance(x, int)}
    if "seed" in options:
        seed = options.pop("seed")
        (options if seed < 2**32 else fixed)["seed"] = jnp.uint32(seed) if seed < 2**32 else seed
    inputs = [jnp.asarray(x) for x in inputs]
    return compiled(definition, state, inputs, options, tuple(sorted(fixed.items())))


def flat(state: Any) -> dict[str, Any]:
    """A state's arrays by neutral name."""
    paths, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    return {".".join(str(key.key) for key in path): np.asarray(x) for path, x in paths}


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    case = CASES[name]
    model, inputs = model_of(case), inputs_of(case)
    seen = call(model, case, inputs, return_weights=True)
    assert share(seen.out, case, model.export_weights(), inputs) <= 1
    assert set(seen.weights) == set(model.config.stacks)


@pytest.mark.parametrize("name", GRADED)
def test_gradients(name: str) -> None:
    """Of every weight, along one random direction each."""
    case = CASES[name]
    with jax.enable_x64(True):
        model, inputs = model_of(case, dtype="float64"), inputs_of(case)
        inputs = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
        definition, state = nnx.split(model)
        given = [jnp.asarray(x) for x in inputs]

        def out(state: Any) -> Any:
            return nnx.merge(definition, state)(*given, **arrays(case))

        pull = draw(*jax.eval_shape(out, state).shape, seed=9).astype(np.float64)
        gradients = flat(jax.jit(jax.grad(lambda state: (pull * out(state)).sum()))(state))
    weights, rng = model.export_weights(), np.random.default_rng(8)
    assert set(gradients) == set(model.plan)
    for name, gradient in gradients.items():
        way = rng.standard_normal(gradient.shape)
        want = slope(case, weights, inputs, pull, {name: way})
        spread = max(abs(gradient * way).sum(), abs(pull).sum())
        doubt = (tolerance.JUDGE + tolerance.CAP["gradient"]["float64"]) * spread
        assert abs((gradient * way).sum() - want) <= doubt, name


# What "everything" holds, other cases hold alone.
KINDS = {"decoder": DECODER, "encoder": ENCODER, "encoder-decoder": BOTH}
CHANGES = [name for name in CASES if name not in (*KINDS, "everything", "as Gemma", "as BERT")]


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_output(name: str) -> None:
    case = CASES[name]
    model, inputs = model_of(case), inputs_of(case)
    out = np.asarray(call(model, case, inputs))
    held = weights_of(model.plan)
    for option in set(case.config) - set(KINDS[case.config["kind"]]) - {"classes", "inputs"}:
        left = without(case, option)
        if option == "max_length":
            continue
        other = Transformer(left.config)
        (other.train if case.training else other.eval)()
        # Positions that act inside have no weights; what else lacks some is seen by the plan.
        if any(n not in held or held[n].shape != p.shape for n, p in other.plan.items()):
            continue
        other.load_weights({n: held[n] for n in other.plan})
        assert abs(np.asarray(call(other, left, inputs)) - out).max() > 1e-3, option
    for option in case.call:
        given = {n: x for n, x in case.call.items() if n != option}
        if option == "seed":
            given["seed"] = 3
        found = call(model, Case(case.config, given), inputs)
        assert abs(np.asarray(found) - out).max() > 1e-3, option


def test_names_are_the_plans() -> None:
    for case in CASES.values():
        model = Transformer(case.config, seed=4)
        held = flat(nnx.state(model))
        assert set(held) == set(model.plan)
        for name, x in initial(model.plan, 4).items():
            assert np.array_equal(held[name], x)


def test_files_and_build(tmp_path: Any) -> None:
    case = CASES["everything"]
    model = model_of(case)
    attn_core.save_weights(tmp_path / "w", model)
    loaded = attn_core.load_weights(tmp_path / "w")
    assert loaded.config == model.config
    other = attn_core.build(loaded.config, backend="jax", seed=9)
    other.load_weights(tmp_path / "w")
    inputs = inputs_of(case)
    assert np.array_equal(call(other, case, inputs), call(model, case, inputs))
    with pytest.raises(ValueError, match="Got another's, which differs"):
        Transformer(case.config, window=3).load_weights(tmp_path / "w")


TOKENS = jnp.asarray(inputs_of(CASES["decoder"])[0])
SOURCE = jnp.asarray(inputs_of(CASES["encoder-decoder"])[1])
LEARNED = {**DECODER, "positions": "learned", "max_length": 4}
REFUSED = {
    "vectors for tokens": (lambda: Transformer(DECODER)(TOKENS[..., None] * 1.0), "int tokens"),
    "tokens for vectors": (
        lambda: Transformer(CASES["vectors"].config)(TOKENS),
        r"`given` must be vectors \(B, T, 6\), which this encoder reads. Got int32",
    ),
    "no source": (lambda: Transformer(BOTH)(TOKENS), "one of `source` and a cache .* Got neither"),
    "a stray source": (lambda: Transformer(DECODER)(TOKENS, SOURCE), "`source` must be left out"),
    "lengths of a source that is not given": (
        lambda: Transformer(DECODER)(TOKENS, source_lengths=jnp.array([1, 2])),
        "`source_lengths` must be left out",
    ),
    "lengths of a source for a decoder's cache": (
        lambda: Transformer(DECODER).make_cache(B, 9, source_lengths=jnp.array([1, 2])),
        "`source_lengths` must be left out",
    ),
    "an empty prompt": (
        lambda: Transformer(DECODER).generate(TOKENS[:, :0], 2),
        "`prompt` must be int tokens",
    ),
    "no seed": (
        lambda: Transformer({**DECODER, "dropout": 0.1})(TOKENS),
        "`seed` must be given in training",
    ),
    "too long": (
        lambda: Transformer(LEARNED)(TOKENS),
        "`given` must not be longer than `max_length` = 4",
    ),
    "too long a cache": (
        lambda: Transformer(LEARNED).make_cache(B, 5),
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


def test_classes_take_a_mask_beside_lengths_or_by_row() -> None:
    """The mean is of the rows that lengths count; what a mask hides, it hides as keys."""
    model = Transformer({**ENCODER, "classes": 3})
    model.eval()
    padding = from_hf_mask(jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]))
    lengths, triangle = jnp.asarray([3, 4]), jnp.asarray(np.tri(5, dtype=bool))
    beside, alone = model(TOKENS, mask=padding, lengths=lengths), model(TOKENS, lengths=lengths)
    by_row, plain = model(TOKENS, mask=triangle), model(TOKENS)
    beside, alone, by_row, plain = [np.asarray(x) for x in (beside, alone, by_row, plain)]
    np.testing.assert_allclose(beside, alone, rtol=0, atol=1e-6)
    assert abs(by_row - plain).max() > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    bad, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        bad()


def test_a_layers_cache_is_none_of_a_models() -> None:
    model = Transformer(DECODER)
    with pytest.raises(TypeError, match=r"`cache` must be a ModelCache, .* Got Cache"):
        model(TOKENS, cache=model.make_cache(B, 9).blocks[0])


def test_generate_as_far_as_positions_go() -> None:
    """The last token is made, and not read: it needs no position."""
    model = Transformer({**DECODER, "positions": "learned", "max_length": 7})
    assert model.generate(TOKENS, 3).shape == (B, 3)
    with pytest.raises(ValueError, match=r"`steps` must be at most .*`max_length` = 7"):
        model.generate(TOKENS, 4)


def test_a_token_beyond_the_table_is_loud() -> None:
    model = model_of(Case({**DECODER, "impl": "reference"}))
    for token in (-1, 11):
        out = call(model, Case({}), [TOKENS.at[0, 4].set(token)])
        assert jnp.isnan(out[0, 4]).all()
        assert not jnp.isnan(out[1]).any()


# --- Step by step. --------------------------------------------------------------------------------

STEPPED = [
    *("decoder", "encoder-decoder", "learned", "rotary", "alibi", "window", "everything"),
    "as Gemma",
]


@pytest.mark.parametrize("name", STEPPED)
def test_steps_give_what_one_call_gives(name: str) -> None:
    """Ragged, too: row 1 is two tokens shorter than row 0 all the way; one trace for all steps."""
    case = Case(CASES[name].config)
    model, inputs = model_of(case), inputs_of(case)
    given, *source = [jnp.asarray(x) for x in inputs]
    full = call(model, case, inputs)
    assert share(full, case, model.export_weights(), inputs) <= 1
    definition, state = nnx.split(model)
    traces = []

    @jax.jit
    def step(state: Any, tokens: Any, cache: Any, lengths: Any) -> Any:
        traces.append(tokens.shape)
        return nnx.merge(definition, state)(tokens, lengths=lengths, cache=cache)

    cache = model.make_cache(B, 6, source=source[0] if source else None)
    counts = np.array([3, 1])
    found = step(state, given[:, :3], cache, jnp.asarray(counts))
    for b in range(B):
        part = found.out[b, : counts[b]]
        assert np.allclose(part, full[b, : counts[b]], rtol=0, atol=2e-5)
    for i in range(2):
        at = counts + i
        found = step(state, given[np.arange(B), at][:, None], found.cache, None)
        assert np.allclose(found.out[:, 0], full[np.arange(B), at], rtol=0, atol=2e-5)
    assert found.cache.blocks[0].lengths.tolist() == [5, 3]
    assert traces == [(B, 3), (B, 1)]


def greedy(model: Any, tokens: list[int], steps: int, source: Any) -> list[int]:
    """The whole sequence again for every token, padded so that one program reads them all."""
    definition, state = nnx.split(model)
    size = len(tokens) + steps
    run = jax.jit(lambda state, *given: nnx.merge(definition, state)(*given))
    for _ in range(steps):
        given = jnp.array([[*tokens, *[0] * (size - len(tokens))]])
        out = run(state, given, *([] if source is None else [source]))
        tokens = [*tokens, int(out[0, len(tokens) - 1].argmax())]
    return tokens[-steps:]


@pytest.mark.parametrize("name", ["encoder-decoder", "rotary", "learned"])
def test_generate_is_greedy_and_one_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(CASES[name].config)
    model, inputs = model_of(case), inputs_of(case)
    prompt, *source = [jnp.asarray(x) for x in inputs]
    prompt, options = prompt[:, :3], {"source": source[0]} if source else {}
    counts, traces = jnp.array([3, 2]), []
    count = models.Stack.__call__
    monkeypatch.setattr(
        models.Stack, "__call__", lambda self, *a, **k: traces.append(0) or count(self, *a, **k)
    )
    found = model.generate(prompt, 5, lengths=counts, **options)
    made = len(traces)
    assert made == 2 + len(source)  # the source, the prompt, and the body of the loop
    assert np.array_equal(model.generate(prompt, 5, lengths=[3, 2], **options), found)
    model.generate(prompt + 1, 5, lengths=counts, **options)
    assert len(traces) == made
    assert found.shape == (B, 5)
    assert found.dtype == prompt.dtype
    for b in range(B):
        mine = source[0][b : b + 1] if source else None
        assert found[b].tolist() == greedy(model, prompt[b, : int(counts[b])].tolist(), 5, mine)
    stop = int(found[0, 1])
    stopped = model.generate(prompt, 5, lengths=counts, stop=stop, **options)
    first = found[0].tolist().index(stop)
    assert stopped[0].tolist() == found[0, : first + 1].tolist() + [stop] * (4 - first)
    assert model.generate(prompt, 1, lengths=counts, **options).tolist() == found[:, :1].tolist()


# --- Forms. ---------------------------------------------------------------------------------------


def test_export_round_trip() -> None:
    model = model_of(CASES["decoder"], impl="reference")
    definition, state = nnx.split(model)
    weights, tree = jax.tree.flatten(state)
    rows = export.symbolic_shape("rows")[0]
    given = (
        [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights],
        jax.ShapeDtypeStruct((B, rows), jnp.int32),
    )
    run = jax.jit(lambda weights, x: nnx.merge(definition, tree.unflatten(weights))(x))
    loaded = export.deserialize(export.export(run)(*given).serialize())
    for length in (5, 12):
        tokens = jnp.arange(2 * length, dtype=jnp.int32).reshape(2, length) % 11
        assert np.allclose(loaded.call(weights, tokens), run(weights, tokens), atol=1e-5)


def test_a_training_step_drops_by_its_number() -> None:
    case = CASES["dropout"]
    model, inputs = model_of(case), inputs_of(case)
    traces = []

    @nnx.jit
    def step(model: Any, given: Any, seed: Any) -> Any:
        traces.append(seed.shape)
        return model(*given, seed=seed)

    given = [jnp.asarray(x) for x in inputs]
    one, two = [step(model, given, jnp.int32(n)) for n in (1, 2)]
    assert np.array_equal(one, step(model, given, jnp.int32(1)))
    assert abs(one - two).max() > 1e-3
    assert len(traces) == 1
    model.eval()
    assert abs(step(model, given, jnp.int32(1)) - one).max() > 1e-3
    assert len(traces) == 2
    assert np.array_equal(step(model, given, jnp.int32(1)), step(model, given, jnp.int32(3)))


def test_documents_in_one_row() -> None:
    """A mask of the call goes to self-attention: two packed sequences do not see each other."""
    model = model_of(Case({**DECODER, "positions": "none"}))
    parts = [call(model, Case({}), [x]) for x in (TOKENS[:, :3], TOKENS[:, 3:])]
    packed = call(model, Case({}), [TOKENS], mask=masks.segments(jnp.array([0, 0, 0, 1, 1])))
    assert np.allclose(packed, np.concatenate(parts, 1), atol=1e-5)
    assert abs(packed - call(model, Case({}), [TOKENS])).max() > 1e-2


# --- Additive attention. --------------------------------------------------------------------------

Q, K, V = draw(B, 5, 6), draw(B, 7, 4, seed=1), draw(B, 7, 3, seed=2)
SEES = np.random.default_rng(4).random((B, 5, 7)) < 0.6
SEES[1, 2] = False
TILES = {"one tile": 2**22, "tiles of two": 2**8, "of one row": 1}
tiles = pytest.mark.parametrize("pairs", TILES.values(), ids=TILES)


def additive_of(**options: Any) -> AdditiveAttention:
    layer = AdditiveAttention(width=9, query_input=6, key_input=4, **options)
    layer.load_weights(weights_of(layer.plan))
    return layer


def near(got: Any, weights: Any, *args: Any, **options: Any) -> bool:
    want, _ = model_judge.additive(weights, *args, **options)
    plain, _ = model_judge.additive(weights, *args, dtype=np.float32, **options)
    return tolerance.share(np.asarray(got), want, plain, "float32", "out", 3.0) <= 1


@tiles
def test_additive(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", pairs)
    layer = additive_of()
    weights, t = layer.export_weights(), [jnp.asarray(x) for x in (Q, K, V)]
    everything = np.ones((B, 5, 7), bool)
    assert near(layer(*t), weights, Q, K, V, everything)
    found = layer(*t, mask=jnp.asarray(SEES[:, None]), return_weights=True)
    assert near(found.out, weights, Q, K, V, SEES)
    _, shares = model_judge.additive(weights, Q, K, V, SEES)
    assert np.allclose(found.weights[:, 0], shares, atol=1e-6)
    dense = layer(*t, mask=masks.dense(jnp.asarray(SEES[:, None])))
    assert np.allclose(dense, found.out, rtol=0, atol=1e-6)
    one = layer(*t, mask=jnp.asarray(SEES[:, None, :1]))
    assert near(one, weights, Q, K, V, np.broadcast_to(SEES[:, :1], SEES.shape))
    ends = np.arange(7) < np.array([4, 7])[:, None, None]
    rows = np.arange(5)[:, None] < np.array([5, 2])[:, None, None]
    got = layer(*t, kv_lengths=[4, 7], q_lengths=jnp.array([5, 2]))
    assert near(got, weights, Q, K, V, ends & rows)
    causal = np.arange(7) <= np.arange(5)[:, None] + np.array([1, -1])[:, None, None]
    got = additive_of(causal=True)(*t, query_offset=jnp.array([1, -1]))
    assert near(got, weights, Q, K, V, causal)
    keep = kept(0.3, 5, 2, B, 1, np.broadcast_to(np.arange(5), (B, 5)), 7)[:, 0]
    got = additive_of(dropout=0.3, site=2)(*t, seed=5)
    assert near(got, weights, Q, K, V, everything, keep=keep, rate=0.3)


@pytest.mark.parametrize("pairs", [2**22, 2**8], ids=["one tile", "tiles"])
def test_additive_gradients(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "PAIRS", pairs)
    pull = draw(B, 5, 3, seed=9).astype(np.float64)
    with jax.enable_x64(True):
        layer = additive_of(dtype="float64")
        definition, state = nnx.split(layer)
        mask = jnp.asarray(SEES[:, None])

        @jax.jit
        def slopes(state: Any, t: Any) -> Any:
            def loss(state: Any, t: Any) -> Any:
                return (pull * nnx.merge(definition, state)(*t, mask=mask)).sum()

            return jax.grad(loss, (0, 1))(state, t)

        of_state, of_inputs = slopes(state, [jnp.asarray(x, jnp.float64) for x in (Q, K, V)])
    found = {**flat(of_state), **dict(zip("qkv", map(np.asarray, of_inputs), strict=True))}
    held = {**layer.export_weights(), "q": Q, "k": K, "v": V}
    rng = np.random.default_rng(8)
    for name, x in held.items():
        gradient, way = found[name], rng.standard_normal(x.shape)

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


def test_additive_memory_is_linear() -> None:
    """Nothing of the size of all pairs is made, forward or backward: what XLA reserves says so."""
    layer = AdditiveAttention(width=16)
    definition, state = nnx.split(layer)
    run = jax.jit(jax.grad(lambda state, x: (nnx.merge(definition, state)(x, x) ** 2).sum()))
    sizes = {}
    for rows in (1024, 2048):
        x = jax.ShapeDtypeStruct((1, rows, 16), jnp.float32)
        sizes[rows] = run.lower(state, x).compile().memory_analysis().temp_size_in_bytes
    # Float32, of which a few tiles live at once; all pairs would be 64 and 256 MiB each.
    assert sizes[1024] <= 6 * 4 * additive.PAIRS
    assert sizes[2048] <= 1.2 * sizes[1024]


def test_additive_refuses() -> None:
    layer, t = additive_of(), [jnp.asarray(x) for x in (Q, K, V)]
    for bad, error, words in [
        (lambda: layer(t[1], t[1]), ValueError, r"`query` must have shape \(B, T, 6\)"),
        (lambda: layer(t[0], t[1], t[2][:, :3]), ValueError, "`value` must have shape"),
        (lambda: layer(*t, mask=jnp.zeros((5, 7))), TypeError, "`mask` must be boolean"),
        (lambda: layer(*t, mask=jnp.ones((6, 7), bool)), ValueError, "with Tq = 5. Got"),
        (lambda: additive_of(causal=True)(*t), ValueError, "`query_offset` must be given"),
        (lambda: additive_of(dropout=0.1)(*t), ValueError, "`seed` must be given"),
    ]:
        with pytest.raises(error, match=words):
            bad()
    assert isinstance(attn_core.build(AdditiveConfig(4), backend="jax"), AdditiveAttention)
