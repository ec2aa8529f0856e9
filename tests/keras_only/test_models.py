"""Models of Keras against the judge of models, on whichever backend Keras runs.

`make test` runs this once for each: KERAS_BACKEND=tensorflow, jax and torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
from keras_support import BACKEND, Traced, array, gradients, tensor, tensors
from layer_cases import draw, weights_of, without
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
from attn_core import masks
from attn_core.backends.keras import Transformer
from attn_core.conformance import tolerance
from attn_core.model.initial import initial
from attn_core.model.parameters import parameters

ops = keras.ops
tf_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow alone")
keras_reads = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
# One class for every backend: all cases are asked on TensorFlow, whose models these are.
EACH = list(CASES) if BACKEND == "tensorflow" else ["everything", "ragged both", "classes"]


def model_of(case: Case, **options: Any) -> Transformer:
    model = Transformer(case.config, **options)
    model.load_weights(weights_of(model.plan))
    return model


def call(model: Any, case: Case, inputs: list[Any], **more: Any) -> Any:
    options = {"training": case.training, **tensors(case.call), **more}
    return model(*[tensor(x) for x in inputs], **options)


@pytest.mark.parametrize("name", EACH)
def test_forward(name: str) -> None:
    case = CASES[name]
    model, inputs = model_of(case), inputs_of(case)
    found = array(call(model, case, inputs))
    assert share(found, case, model.export_weights(), inputs) <= 1


def test_weights_of_every_block() -> None:
    case = CASES["everything"]
    model, inputs = model_of(case), inputs_of(case)
    seen = call(model, case, inputs, return_weights=True)
    assert np.allclose(array(seen.out), array(call(model, case, inputs)), rtol=0, atol=2e-5)
    assert list(seen.weights) == ["encoder", "decoder"]
    blocks = seen.weights["decoder"]
    assert [b.attention.shape[1:] for b in blocks] == [(2, 5, 5)] * 2
    assert [b.cross.shape[1:] for b in blocks] == [(2, 5, 7)] * 2


@pytest.mark.skipif(BACKEND == "jax", reason="Keras' cos and sin are of float32 there")
@pytest.mark.parametrize("name", GRADED)
def test_gradients(name: str) -> None:
    """Of every weight, along one random direction each."""
    case = CASES[name]
    model, inputs = model_of(case, dtype="float64"), inputs_of(case)
    options = {"training": case.training, **tensors(case.call)}
    wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
    leaves = [tensor(x) for x in wide]
    pull = draw(*model(*leaves, **options).shape, seed=9).astype(np.float64)
    found = gradients(model, leaves, pull, **options)
    weights, rng = model.export_weights(), np.random.default_rng(8)
    for name in model.plan:
        way = rng.standard_normal(found[name].shape)
        want = slope(case, weights, wide, pull, {name: way})
        spread = max(abs(found[name] * way).sum(), abs(pull).sum())
        doubt = (tolerance.JUDGE + tolerance.CAP["gradient"]["float64"]) * spread
        assert abs((found[name] * way).sum() - want) <= doubt, name


CHANGED = {
    "everything": ("kv_heads", "norm", "positions", "activation", "gated_hidden", "qk_norm"),
    "window in one block": ("window", "window_blocks"),
    "scale": ("scale",),
    "norms before and after": ("norm_out",),
    "normed embedding": ("norm_embedding",),
    "capped logits": ("logit_softcap",),
    "capped logits of a table": ("logit_softcap",),
    "capped classes": ("logit_softcap",),
    "types of tokens": ("token_types",),
    "norms after": ("norm_first",),
    "embeddings as they are": ("scale_embedding",),
    "hidden dropout alone": ("dropout",),
    "dropout of weights alone": ("attention_dropout",),
}


@tf_only
@pytest.mark.parametrize("name", CHANGED)
def test_every_option_changes_the_output(name: str) -> None:
    case = CASES[name]
    model, inputs = model_of(case), inputs_of(case)
    out, held = array(call(model, case, inputs)), weights_of(model.plan)
    for option in CHANGED[name]:
        left = without(case, option)
        other = Transformer(left.config)
        if {n: p.shape for n, p in other.plan.items() if n in held} != {
            n: p.shape for n, p in model.plan.items() if n in other.plan
        }:
            continue
        if not set(other.plan) <= set(held):
            continue
        other.load_weights({n: held[n] for n in other.plan})
        assert abs(array(call(other, left, inputs)) - out).max() > 1e-3, option
    for option in case.call:
        given = {n: x for n, x in case.call.items() if n != option}
        if option == "seed":
            given["seed"] = 3
        other = Case(case.config, given, case.training)
        assert abs(array(call(model, other, inputs)) - out).max() > 1e-3, option


def test_names_are_the_plans() -> None:
    more = ("norms before and after", "normed embedding", "types of tokens")
    for name in ("everything", "learned", "vectors to tokens", "classes", *more):
        model = Transformer(CASES[name].config, seed=4, name="m")
        paths = {"m/" + n.replace(".", "/") for n in model.plan}
        assert {v.path for v in model.trainable_variables} == paths
        want = initial(parameters(model.config), 4)
        for n, x in model.export_weights().items():
            assert np.array_equal(x, want[n])


@keras_reads
def test_a_part_that_was_replaced_is_named_before_anything_is_set() -> None:
    weights = Transformer({**ENCODER, "classes": 3}, seed=5).export_weights()
    wide = keras.layers.Dense(20)
    wide.build((None, ENCODER["width"]))
    other = Transformer({**ENCODER, "classes": 4}).head
    for part, words in (
        (wide, "`head.weight` must be a parameter .* Got none: the part has been replaced"),
        (other, r"`head.weight` must be a parameter of shape \(\d+, 3\) .* Got \(\d+, 4\)"),
    ):
        model = Transformer({**ENCODER, "classes": 3}, seed=1)
        model.head = part
        before = [array(x.value).copy() for x in model.variables]
        with pytest.raises(ValueError, match=words):
            model.load_weights(weights)
        after = [array(x.value) for x in model.variables]
        assert all(map(np.array_equal, before, after))


@keras_reads
def test_files_configs_and_graphs(tmp_path: Any) -> None:
    case = CASES["encoder-decoder"]
    model, inputs = model_of(case), inputs_of(case)
    want = array(call(model, case, inputs))
    attn_core.save_weights(tmp_path / "w", model)
    other = Transformer.from_config(model.get_config())
    assert other.config == model.config
    other.load_weights(tmp_path / "w")
    assert np.array_equal(array(call(other, case, inputs)), want)
    with pytest.raises(ValueError, match="Got another's, which differs"):
        Transformer(case.config, window=3).load_weights(tmp_path / "w")
    given, source = keras.Input((5,), dtype="int32"), keras.Input((7,), dtype="int32")
    graph = keras.Model([given, source], model(given, source))
    assert graph.output_shape == (None, 5, 11)
    graph.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    found = array(loaded([tensor(x) for x in inputs]))
    assert np.array_equal(found, want)


TOKENS = tensor(inputs_of(CASES["decoder"])[0])
SOURCE = tensor(inputs_of(CASES["encoder-decoder"])[1])
HOLDS = Transformer(BOTH)
HELD = HOLDS.make_cache(B, 9, source=SOURCE)
REFUSED = {
    "classes, and padding as a mask": (
        lambda: Transformer({**ENCODER, "classes": 3})(TOKENS, mask=np.ones((B, 1, 1, 5), bool)),
        r"`lengths` must say which rows count .* Got `mask` \(2, 1, 1, 5\)",
    ),
    "vectors": (lambda: Transformer(DECODER)(ops.zeros((B, 5, 1))), "int tokens"),
    "tokens for vectors": (
        lambda: Transformer(CASES["vectors"].config)(TOKENS),
        r"`given` must be vectors \(B, T, 6\), which this encoder reads. Got int32",
    ),
    "lengths of a source that is not given": (
        lambda: Transformer(DECODER)(TOKENS, source_lengths=np.array([1, 2])),
        "`source_lengths` must be left out",
    ),
    "lengths of a source beside a cache that holds it": (
        lambda: HOLDS(TOKENS, cache=HELD, source_lengths=np.array([1, 2])),
        "`source_lengths` must be left out",
    ),
    "lengths of a source for a decoder's cache": (
        lambda: Transformer(DECODER).make_cache(B, 9, source_lengths=np.array([1, 2])),
        "`source_lengths` must be left out",
    ),
    "lengths of a source in a graph": (
        lambda: Transformer(DECODER)(keras.Input((5,), dtype="int32"), source_lengths=[1, 2]),
        "`source_lengths` must be left out",
    ),
    "an empty prompt": (
        lambda: Transformer(DECODER).generate(TOKENS[:, :0], 2),
        "`prompt` must be int tokens",
    ),
    "steps below 0": (
        lambda: Transformer(DECODER).generate(TOKENS, -1),
        "`steps` must be at least 0. Got -1",
    ),
    "a stop that is no token": (
        lambda: Transformer(DECODER).generate(TOKENS, 2, stop=99),
        "`stop` must be below the vocabulary, .* Got 99",
    ),
    "lengths of another batch in a prompt": (
        lambda: Transformer(DECODER).generate(TOKENS, 2, lengths=np.array([1, 2, 3])),
        r"`lengths` must be an int or have shape \(B,\) = \(2,\). Got \(3,\)",
    ),
    "no source": (lambda: Transformer(BOTH)(TOKENS), "one of `source` and a cache .* Got neither"),
    "a stray source": (lambda: Transformer(DECODER)(TOKENS, SOURCE), "`source` must be left out"),
    "no seed": (
        lambda: Transformer({**DECODER, "dropout": 0.1})(TOKENS, training=True),
        "`seed` must be given in training",
    ),
    "too long": (
        lambda: Transformer({**DECODER, "positions": "learned", "max_length": 4})(TOKENS),
        "`given` must not be longer than `max_length` = 4",
    ),
    "another model's cache": (
        lambda: Transformer(DECODER)(
            TOKENS, cache=Transformer({**DECODER, "depth": 1}).make_cache(B, 9)
        ),
        "one of this model, of 2 blocks. Got 1",
    ),
    "a cache for an encoder": (lambda: Transformer(ENCODER).make_cache(B, 9), "must be left"),
    "a full cache": (
        lambda: Transformer(DECODER)(TOKENS, cache=Transformer(DECODER).make_cache(B, 4)),
        "Got 5 rows and 4 slots",
    ),
    "a mask of padding": (
        lambda: Transformer(CASES["vectors"].config)(keras.layers.Masking()(tensor(draw(B, 5, 6)))),
        "a padding mask of Keras must be left out: `lengths`",
    ),
    "weights in a graph": (
        lambda: Transformer(DECODER)(keras.Input((5,), dtype="int32"), return_weights=True),
        "`return_weights` must be left out in a graph",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    bad, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        bad()


MISTYPED = {
    "a layer's cache": (
        lambda: HOLDS(TOKENS, cache=HELD.blocks[0]),
        "`cache` must be a ModelCache, .* Got Cache",
    ),
    "the output that holds a cache": (
        lambda: HOLDS(TOKENS, cache=HOLDS(TOKENS, cache=HELD)),
        "`cache` must be a ModelCache, .* Got ModelOutput: its `.cache`",
    ),
    "steps": (lambda: Transformer(DECODER).generate(TOKENS, 2.0), "`steps` must be an int"),
    "stops": (lambda: Transformer(DECODER).generate(TOKENS, 2, stop=[1, 2]), "`stop` must be an"),
    "lengths of a prompt": (
        lambda: Transformer(DECODER).generate(TOKENS, 2, lengths=[1.5, 2.0]),
        "`lengths` must be integers. Got float32",
    ),
    "lengths of classes": (
        lambda: Transformer({**ENCODER, "classes": 3})(TOKENS, lengths=np.array([1.5, 2.0])),
        "`.*lengths` must be integers. Got float",
    ),
}


@pytest.mark.parametrize("name", MISTYPED)
def test_of_another_type(name: str) -> None:
    before = [array(x).copy() for x in keras.tree.flatten(HELD) if x is not None]
    bad, words = MISTYPED[name]
    with pytest.raises(TypeError, match=words):
        bad()
    after = [x for x in keras.tree.flatten(HELD) if x is not None]
    assert all(np.array_equal(array(x), y) for x, y in zip(after, before, strict=True))


@pytest.mark.parametrize("token", [-1, 11])
def test_a_token_beyond_the_vocabulary_is_named_or_gives_nan(token: int) -> None:
    """Named where the host holds the values; traced, its own row of the table is NaN."""
    model = Transformer(kind="encoder-decoder", width=8, depth=1, heads=2, vocabulary=11)
    good, bad = tensor(np.array([[1, 10, 3]], np.int32)), np.array([[1, token, 3]], np.int32)
    bad, words = tensor(bad), "must be within the vocabulary, from 0 to 10. Got "
    with pytest.raises(ValueError, match=f"`given` {words}{token}"):
        model(bad, good)
    with pytest.raises(ValueError, match=f"`source` {words}{token}"):
        model.generate(good, 2, source=bad)
    typed = Transformer({**ENCODER, "token_types": 2})
    with pytest.raises(ValueError, match="`types` must be within `token_types`, from 0 to 1"):
        typed(tensor(np.ones((1, 3), np.int32)), types=bad)
    assert np.isfinite(array(model(good, good))).all()
    run = Traced(model.decoder.embedding)
    found, want = array(run(bad)), array(run(good))
    assert np.isnan(found[0]).all(1).tolist() == [False, True, False]
    assert np.array_equal(found[:, ::2], want[:, ::2])
    assert np.isfinite(want).all()


# --- Step by step. --------------------------------------------------------------------------------

STEPPED = ["decoder", "encoder-decoder", "learned", "rotary", "alibi", "everything", "as Gemma"]
STEPPED = STEPPED if BACKEND == "tensorflow" else ["everything"]


@pytest.mark.parametrize("name", STEPPED)
def test_steps_give_what_one_call_gives(name: str) -> None:
    """Ragged, too: row 1 is two tokens shorter than row 0 all the way."""
    case = Case(CASES[name].config)
    model, inputs = model_of(case), inputs_of(case)
    full = array(call(model, case, inputs))
    assert share(full, case, model.export_weights(), inputs) <= 1
    given = inputs[0]
    options = {"source": inputs[1]} if len(inputs) > 1 else {}
    counts = np.array([3, 1], np.int32)
    found = model(given[:, :3], lengths=counts, cache=model.make_cache(B, 6, **options))
    for b in range(B):
        part = array(found.out)[b, : counts[b]]
        assert np.allclose(part, full[b, : counts[b]], rtol=0, atol=2e-5)
    for step in range(2):
        at = counts + step
        found = model(given[np.arange(B), at][:, None], cache=found.cache)
        assert np.allclose(array(found.out)[:, 0], full[np.arange(B), at], rtol=0, atol=2e-5)
    assert array(found.cache.blocks[0].lengths).tolist() == [5, 3]


def greedy(model: Any, tokens: list[int], steps: int, source: Any) -> list[int]:
    """The whole sequence again for every token."""
    for _ in range(steps):
        given = (np.array([tokens], np.int32), *([] if source is None else [source]))
        tokens = [*tokens, int(array(model(*given))[0, -1].argmax())]
    return tokens[-steps:]


@pytest.mark.parametrize("name", ["rotary", *["encoder-decoder"] * (BACKEND != "jax")])
def test_generate_is_greedy_and_traced_once_for_all_steps(name: str) -> None:
    case = Case(CASES[name].config)
    model, inputs = model_of(case), inputs_of(case)
    prompt, source, counts = inputs[0][:, :3], inputs[1], np.array([3, 2], np.int32)
    found = array(model.generate(prompt, 4, lengths=counts, source=source))
    assert found.shape == (B, 4)
    assert found.dtype == prompt.dtype
    for b in range(B):
        want = greedy(model, prompt[b, : counts[b]].tolist(), 4, source[b : b + 1])
        assert found[b].tolist() == want
    step = Traced(lambda tokens, cache: model(tokens, cache=cache, training=False))
    again = model.generate(prompt, 4, lengths=counts, source=source, step=step)
    assert np.array_equal(array(again), found)
    assert step.traces == 1
    stop = int(found[0, 1])
    stopped = array(model.generate(prompt, 4, lengths=counts, source=source, stop=stop))
    first = found[0].tolist().index(stop)
    assert stopped[0].tolist() == found[0, : first + 1].tolist() + [stop] * (3 - first)


@tf_only
@pytest.mark.parametrize("sizes", [(None, None), (2, None), (None, 3)], ids=str)
def test_generate_within_a_tf_function(sizes: tuple[Any, Any]) -> None:
    """Batch and length of the prompt unknown: one trace for every size."""
    import tensorflow as tf

    case = Case({**DECODER, "depth": 1, "positions": "rotary"})
    model, count = model_of(case), []

    @tf.function(
        input_signature=[tf.TensorSpec(sizes, tf.int32), tf.TensorSpec(sizes[:1], tf.int32)]
    )
    def run(prompt: Any, lengths: Any) -> Any:
        count.append(1)
        return model.generate(prompt, 3, lengths=lengths, stop=1)

    (prompt,) = inputs_of(case)
    for batch, rows in ((2, 3), (1, 5)):
        batch, rows = sizes[0] or batch, sizes[1] or rows
        given, lengths = tf.constant(prompt[:batch, :rows]), tf.constant([rows - 1, rows][:batch])
        want = model.generate(given, 3, lengths=lengths, stop=1)
        assert np.array_equal(run(given, lengths), want)
    assert len(count) == 1


def size_of(run: Any, *given: Any) -> int:
    """Operations in the graph of a function, those of its loops' bodies too."""
    if BACKEND == "jax":
        import jax

        return str(jax.make_jaxpr(run)(*given)).count("=")
    import tensorflow as tf

    graph = tf.function(run).get_concrete_function(*given).graph.as_graph_def()
    return len(graph.node) + sum(len(one.node_def) for one in graph.library.function)


@pytest.mark.skipif(BACKEND == "torch", reason="torch.compile unrolls every loop of Python")
def test_generate_traced_does_not_grow_with_its_steps() -> None:
    case = Case({**BOTH, "depth": 1, "positions": "rotary"})
    model, (given, source) = model_of(case), [tensor(x) for x in inputs_of(case)]

    def run(steps: int) -> Any:
        return lambda prompt, source: model.generate(prompt, steps, source=source)

    sizes = {steps: size_of(run(steps), given, source) for steps in (2, 3, 40)}
    # How a cache is cut up may add an operation; one step has a hundred and more.
    assert max(sizes.values()) <= min(sizes.values()) + 5, sizes
    traced = array(Traced(run(7))(given, source))
    assert np.array_equal(traced, array(run(7)(given, source)))
    for b in range(B):
        tokens = array(given)[b].tolist()
        assert traced[b].tolist() == greedy(model, tokens, 7, array(source)[b : b + 1])


@cache
def generating(rows: int) -> Traced:
    """Of so many rows: one program for all lengths, which nobody reads."""
    model = Transformer({**DECODER, "positions": "rotary"}, seed=3)
    return Traced(lambda prompt, lengths: model.generate(prompt, 4, lengths=lengths))


@pytest.mark.skipif(BACKEND == "torch", reason="generation is not traced there")
@pytest.mark.parametrize("lengths", [[5, 0], [0, 5], [9, 2], [-3, 9]])
def test_generate_of_lengths_that_nobody_read_never_reads_another_row(lengths: list[int]) -> None:
    """Traced and out of range: each row of the batch answers as it would on its own."""
    told = np.array(lengths, np.int32)
    found = array(generating(B)(TOKENS, tensor(told)))
    alone = [array(generating(1)(TOKENS[b : b + 1], tensor(told[b : b + 1])))[0] for b in range(B)]
    assert np.array_equal(found, np.stack(alone))
    other = tensor(np.concatenate([array(TOKENS)[:1], (array(TOKENS)[1:] + 1) % 7]))
    assert np.array_equal(array(generating(B)(other, tensor(told)))[0], found[0])
    assert generating(B).traces == generating(1).traces == 1


def test_generate_as_far_as_positions_go() -> None:
    """The last token is made, and not read: it needs no position."""
    model = Transformer({**DECODER, "positions": "learned", "max_length": 7})
    found = array(model.generate(TOKENS, 3))
    for steps in (0, 1, 2):
        assert np.array_equal(array(model.generate(TOKENS, steps)), found[:, :steps])
    with pytest.raises(ValueError, match=r"`steps` must be at most .*`max_length` = 7"):
        model.generate(TOKENS, 4)


# --- Forms. ---------------------------------------------------------------------------------------


def test_mixed_policy() -> None:
    case = CASES["encoder-decoder"]
    model, inputs = model_of(case, dtype="mixed_bfloat16"), inputs_of(case)
    assert {v.dtype for v in model.variables} == {"float32"}
    found, want = call(model, case, inputs), array(call(model_of(case), case, inputs))
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    gap = abs(array(found).astype(np.float32) - want).max()
    assert 0 < gap < 0.05 * abs(want).max()


def test_documents_in_one_row() -> None:
    """A mask of the call goes to self-attention: two packed sequences do not see each other."""
    model = model_of(Case({**DECODER, "positions": None}))
    apart = np.concatenate([array(model(TOKENS[:, :3])), array(model(TOKENS[:, 3:]))], 1)
    packed = array(model(TOKENS, mask=masks.segments(np.array([0, 0, 0, 1, 1]))))
    assert np.allclose(packed, apart, atol=1e-5)
    assert abs(packed - array(model(TOKENS))).max() > 1e-2


@tf_only
def test_unknown_sizes_and_saved_model(tmp_path: Any) -> None:
    import tensorflow as tf

    model = model_of(Case(CASES["ragged both"].config), impl="reference")
    spec = tf.TensorSpec([None, None], tf.int32)

    class Module(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        @tf.function(input_signature=[spec, spec, tf.TensorSpec([None], tf.int32)])
        def run(self, given: Any, source: Any, lengths: Any) -> Any:
            return self.model(given, source, lengths=lengths)

    tf.saved_model.save(Module(), str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    given, source = inputs_of(CASES["encoder-decoder"])
    for rows in (5, 3):
        lengths = tf.constant([rows, 2])
        want = model(given[:, :rows], source, lengths=lengths)
        got = loaded.run(tf.constant(given[:, :rows]), tf.constant(source), lengths)
        assert np.allclose(got, want, rtol=0, atol=1e-5)
