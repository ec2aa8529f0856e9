"""Configs of layers and models: from files and back, and every number refused that is wrong."""

import dataclasses
import json

import numpy as np
import pytest

import attn_core
from attn_core import AdditiveConfig, AttentionConfig, TransformerConfig, masks
from attn_core.model import positions
from attn_core.model.build import read_config
from attn_core.model.config import Sizes
from attn_core.model.parameters import parameters

LAYER = {"width": 24, "heads": 6}
MODEL = {"kind": "encoder-decoder", "width": 24, "depth": 2, "heads": 4, "vocabulary": 11}
FULL = AttentionConfig(
    width=24,
    heads=6,
    kv_heads=2,
    head_width=8,
    value_width=5,
    key_input=10,
    value_input=7,
    out_width=9,
    bias=False,
    out_bias=False,
    qk_norm="rms",
    norm_epsilon=1e-5,
    positions="rotary",
    rotary_base=5e5,
    rotary_fraction=0.5,
    rotary_pairs="interleaved",
    gate=True,
    causal=True,
    window=3,
    softcap=30,
    mask="(q - k < 4) | (k < 2)",
    scale=0.25,
    dropout=0.1,
    dtype="bfloat16",
    backend="jax",
    impl="chunked",
)


def test_sizes_that_are_left_out_follow_from_the_others():
    assert AttentionConfig(**LAYER).sizes == Sizes(24, 6, 6, 4, 4, 24, 24, 24)
    assert AttentionConfig(**LAYER, key_input=5).sizes == Sizes(24, 6, 6, 4, 4, 5, 5, 24)
    assert FULL.sizes == Sizes(24, 6, 2, 8, 5, 10, 7, 9)
    assert AttentionConfig(width=7, heads=2, head_width=3).sizes.head == 3


def written(config, suffix):
    """The config as a person might write the file."""
    held = config.to_mapping()
    if suffix == ".json":
        return json.dumps(held)
    if suffix == ".toml":
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in held.items())
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in held.items())


EVERY = [
    FULL,
    AttentionConfig(**LAYER),
    TransformerConfig(**MODEL),
    TransformerConfig(**MODEL, positions=None, dropout=0.1, attention_dropout=0.0),
    TransformerConfig(**{**MODEL, "kind": "encoder"}, classes=3, positions="learned", max_length=9),
]


@pytest.mark.parametrize("config", EVERY)
@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".yml", ".json"])
def test_a_config_goes_into_a_file_and_back(config, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_text(written(config, suffix))
    assert type(config).load(path) == config
    assert type(config).load(str(path)) == config
    assert read_config(path) == config


@pytest.mark.parametrize("config", EVERY)
def test_a_config_goes_into_a_mapping_and_back(config):
    held = config.to_mapping()
    assert None not in held.values()
    assert type(config).load(held) == config
    assert read_config({config.TABLE: held, "training": {"steps": 3}}) == config
    assert hash(type(config).load(held)) == hash(config)


def test_every_field_is_written_down():
    """A field that did not travel would come back as its default."""
    names = {field.name for field in dataclasses.fields(AttentionConfig)}
    assert set(FULL.to_mapping()) == names
    for field in dataclasses.fields(AttentionConfig):
        assert getattr(FULL, field.name) != field.default


@pytest.mark.parametrize(
    ("kind", "held", "words"),
    [
        (AttentionConfig, {**LAYER, "kv_head": 2}, "Got 'kv_head'. Did you mean 'kv_heads'?"),
        (AttentionConfig, {**LAYER, "droput": 0.1}, "Did you mean 'dropout'?"),
        (AttentionConfig, {**LAYER, "zzz": 1}, "must hold its fields only. Got 'zzz'."),
        (TransformerConfig, {**MODEL, "layers": 3}, "Got 'layers'."),
        (TransformerConfig, {**MODEL, "activaton": "relu"}, "Did you mean 'activation'?"),
        (AttentionConfig, {"attention": 3}, "`attention` of a config must be a mapping. Got int"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(kind, held, words):
    with pytest.raises(ValueError) as caught:
        kind.load(held)
    assert words in str(caught.value)


def test_fields_by_name_are_refused_with_the_nearest_and_with_our_word():
    for call, words in (
        (lambda: AttentionConfig(width=8, heads=2, kv_head=1), "Did you mean 'kv_heads'"),
        (lambda: TransformerConfig(**MODEL, dropuot=0.1), "Did you mean 'dropout'"),
        (
            lambda: AttentionConfig(embed_dim=8, num_heads=2),
            "Did you mean 'width'",
        ),
        (lambda: AttentionConfig.load({"num_heads": 2}), "Did you mean 'heads'"),
        (lambda: AttentionConfig(width=8, num_query_heads=2), "Did you mean 'heads'"),
        (lambda: AttentionConfig(width=8, heads=2, output_shape=6), "Did you mean 'out_width'"),
        (lambda: AttentionConfig.of(width=8, heads=2, is_causal=True), "Did you mean 'causal'"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_fields_beside_their_table_are_refused():
    held = {"attention": LAYER, "additive": {"width": 3}, "training": {"dropuot": 3}}
    assert AttentionConfig.load({**held, "stages": [{"steps": 3}]}) == AttentionConfig(**LAYER)
    with pytest.raises(ValueError, match="Got the table `attention` and 'causal' beside it"):
        AttentionConfig.load({**held, "causal": True})


def test_values_beside_a_table_are_refused_with_the_nearest(tmp_path):
    """Nobody would read them: a rate of dropout that is misspelt, above its table, is no rate."""
    path = tmp_path / "model.toml"
    path.write_text("dropuot = 0.5\n[attention]\nwidth = 24\nheads = 6\n")
    held = {"attention": LAYER}
    for source, words in (
        (path, "and 'dropuot' beside it. Did you mean 'dropout'?"),
        ({**held, "backedn": "jax"}, "and 'backedn' beside it. Did you mean 'backend'?"),
        ({**held, "num_heads": 3}, "and 'num_heads' beside it. Did you mean 'heads'?"),
        ({**held, "title": "a"}, "other tables only. Got the table `attention` and 'title' beside"),
        ({**held, "stages": []}, "and 'stages' beside it."),
        ({**held, "attn-core": {"backend": "jax"}}, "Got 'attn-core'. Did you mean 'attn_core'?"),
    ):
        for door in (AttentionConfig.load, AttentionConfig.of, read_config):
            with pytest.raises(ValueError) as caught:
                door(source)
            assert words in str(caught.value)


DOORS = {
    "load": AttentionConfig.load,
    "of": AttentionConfig.of,
    "of with a field": lambda source: AttentionConfig.of(source, heads=6),
    "build": read_config,
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_the_table_of_the_flag_says_the_same_at_every_door(door, tmp_path):
    said = {"attn_core": {"backend": "jax", "impl": "reference"}}
    want = AttentionConfig(**LAYER, backend="jax", impl="reference")
    path = tmp_path / "model.toml"
    path.write_text(
        '[attn_core]\nbackend = "jax"\nimpl = "reference"\n[attention]\nwidth = 24\nheads = 6\n'
    )
    for source in (path, {**said, "attention": LAYER}, {**said, **LAYER}):
        assert door(source) == want
    assert AttentionConfig.of(path, impl="chunked").impl == "chunked"
    for table, words in (
        ({"backedn": "jax"}, "Did you mean 'backend'"),
        ({"impl": "refrence"}, "Did you mean 'reference'"),
        ({"backend": "torch"}, "`backend` must be the same.*Got 'jax' and 'torch'"),
        (3, "`attn_core` of a config must be a mapping"),
    ):
        with pytest.raises(ValueError, match=words):
            door({"attention": {**LAYER, "backend": "jax"}, "attn_core": table})


def test_the_table_of_another_config_is_named(tmp_path):
    path = tmp_path / "model.toml"
    path.write_text('attn_core = {backend = "jax"}\n[transformer]\nkind = "encoder"\n')
    with pytest.raises(ValueError, match=r"must hold the table `attention`, .* `transformer`\.$"):
        AttentionConfig.load(path)
    with pytest.raises(ValueError, match=r"must hold the table `transformer`, .* `attention`\.$"):
        TransformerConfig.load({"attention": {"width": 8, "heads": 2}})


def test_a_backend_without_layers_names_those_that_have_them():
    with pytest.raises(attn_core.UnsupportedError, match=r"no MultiHeadAttention.* torch, tf, jax"):
        attn_core.build({"width": 8, "heads": 2}, backend="numpy")


def test_a_table_that_nobody_knows_is_refused_with_the_nearest():
    for held in ({"transfomer": MODEL}, {"attn_core": {}, "Transformer": MODEL}):
        with pytest.raises(ValueError, match="Did you mean 'transformer'"):
            read_config(held)


def test_numpys_scalars_become_pythons():
    """int8 would overflow in heads * head_width, and bool_ is no bool."""
    found = AttentionConfig(
        width=np.int8(16), heads=np.int8(16), head_width=np.int8(16), causal=np.True_,
        softcap=np.float32(30), dtype=np.str_("float32"),
    )  # fmt: skip
    assert found == AttentionConfig(16, 16, head_width=16, causal=True, softcap=30.0)
    kinds = {type(x) for x in found.to_mapping().values()}
    assert kinds == {int, bool, float, str}
    assert parameters(found)["query.weight"].shape == (16, 256)
    assert type(AdditiveConfig(np.int32(3)).width) is int
    assert type(TransformerConfig(**{**MODEL, "width": np.int64(24)}).width) is int


@pytest.mark.parametrize(("fraction", "head", "turned"), [(0.28, 50, 14), (0.14, 100, 14)])
def test_a_fraction_of_channels_may_be_rounded(fraction, head, turned):
    """0.28 * 50 is 14.000000000000002."""
    assert fraction * head != turned
    config = AttentionConfig(8, 2, head_width=head, positions="rotary", rotary_fraction=fraction)
    assert positions.turned(config) == turned


def test_a_default_that_nothing_reads_may_be_written_out():
    """As `to_mapping` does."""
    config = AttentionConfig(**LAYER, rotary_base=10000, rotary_pairs="half", norm_epsilon=1e-6)
    assert config == AttentionConfig(**LAYER)
    held = {**MODEL, "kind": "encoder", "vocabulary": None, "inputs": 3}
    assert TransformerConfig(**held, scale_embedding=True) == TransformerConfig(**held)


def test_a_field_without_a_default_must_be_there():
    with pytest.raises(TypeError, match=r"must hold 'heads'. Got none"):
        AttentionConfig.load({"width": 3})


WRONG = {
    "width is a float": ({"width": 24.0}, TypeError, "`width` must be an int. Got 24.0"),
    "width is true": ({"width": True}, TypeError, "`width` must be an int. Got True"),
    "no heads": ({"heads": 0}, ValueError, "`heads` must be at least 1. Got 0"),
    "heads do not divide": ({"heads": 5}, ValueError, "multiple of `heads` where `head_width`"),
    "kv_heads do not divide": ({"kv_heads": 4}, ValueError, "Got heads=6 and kv_heads=4"),
    "head_width": ({"head_width": -1}, ValueError, "`head_width` must be at least 1"),
    "value_width": ({"value_width": 0}, ValueError, "`value_width` must be at least 1"),
    "key_input": ({"key_input": 0}, ValueError, "`key_input` must be at least 1"),
    "bias": ({"bias": 1}, TypeError, "`bias` must be true or false. Got 1"),
    "qk_norm": ({"qk_norm": "layer"}, ValueError, "`qk_norm` must be one of None, rms"),
    "epsilon": ({"norm_epsilon": 0}, ValueError, "`norm_epsilon` must be above 0. Got 0"),
    "positions": ({"positions": "rotray"}, ValueError, "Did you mean 'rotary'?"),
    "odd rotary": (
        {"positions": "rotary", "head_width": 5},
        ValueError,
        "an even number of a head's channels turn, since they turn in pairs. Got 1.0 of head",
    ),
    "fraction": ({"positions": "rotary", "rotary_fraction": 1.5}, ValueError, "at most 1"),
    "base": ({"positions": "rotary", "rotary_base": 1}, ValueError, "`rotary_base` must be above"),
    "base that nothing reads": ({"rotary_base": "x"}, TypeError, "`rotary_base` must be a number"),
    "fraction that nothing reads": ({"rotary_fraction": 0}, ValueError, "must be above 0. Got 0"),
    "nothing turns": (
        {"positions": "rotary", "rotary_fraction": 1e-9},
        ValueError,
        "an even number of a head's channels",
    ),
    "pairs": ({"rotary_pairs": "halves"}, ValueError, "Did you mean 'half'?"),
    "window": ({"window": -1}, ValueError, "`window` must be at least 0. Got -1"),
    "softcap": ({"softcap": 0.0}, ValueError, "`softcap` must be above 0. Got 0.0"),
    "scale": ({"scale": float("inf")}, ValueError, "`scale` must be finite. Got inf"),
    "dropout": ({"dropout": 1}, ValueError, "`dropout` must be at least 0 and below 1. Got 1"),
    "dtype": ({"dtype": "float8"}, ValueError, "`dtype` must be one of float64, float32"),
    "backend": ({"backend": "troch"}, ValueError, "Did you mean 'torch'?"),
    "backend without layers": ({"backend": "numpy"}, ValueError, "one of torch, tf, jax"),
    "impl": ({"impl": "fast"}, ValueError, "`impl` must be one of auto"),
    "mask is no mask": ({"mask": "q + k"}, ValueError, "must be a condition of integers"),
    "mask of a score": ({"mask": "s > k"}, ValueError, "must be a condition of integers"),
    "mask of arrays": ({"mask": "int0[q] == 1"}, ValueError, "without arrays"),
    "two masks": ({"mask": "q >= k, k > 2"}, ValueError, "must be a condition of integers"),
    "mask of rows": ({"mask": "row >= k"}, ValueError, "positions, q, and not of rows of a call"),
    "mask of rows, made": (
        {"mask": attn_core.mask(lambda b, h, q, k: attn_core.row >= k)},
        ValueError,
        "positions, q, and not of rows of a call",
    ),
    "bases that nothing reads": (
        {"rotary_base": 100.0},
        ValueError,
        "`rotary_base` must be left out where `positions` is not 'rotary'. Got 100.0 and",
    ),
    "fractions that nothing reads": (
        {"positions": "alibi", "rotary_fraction": 0.5},
        ValueError,
        "`rotary_fraction` must be left out where `positions` is not 'rotary'",
    ),
    "pairs that nothing reads": (
        {"rotary_pairs": "interleaved"},
        ValueError,
        "`rotary_pairs` must be left out where `positions` is not 'rotary'",
    ),
    "epsilon that nothing reads": (
        {"norm_epsilon": 1e-5},
        ValueError,
        "`norm_epsilon` must be left out where `qk_norm` is not 'rms'. Got 1e-05 and qk_norm=None",
    ),
    "mask is no text": ({"mask": "q >="}, ValueError, "in the language of masks, such as"),
    "mask is a number": ({"mask": 3}, TypeError, "`mask` must be text of the language. Got int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_of_a_layer(name):
    field, error, words = WRONG[name]
    with pytest.raises(error) as caught:
        AttentionConfig(**{**LAYER, **field})
    assert words in str(caught.value)


WRONG_MODELS = {
    "kind": ({"kind": "encodr"}, ValueError, "Did you mean 'encoder'?"),
    "depth": ({"depth": 0}, ValueError, "`depth` must be at least 1"),
    "heads": ({"heads": 5}, ValueError, "multiple of `heads`"),
    "hidden": ({"hidden": 1.5}, TypeError, "`hidden` must be an int"),
    "activation": ({"activation": "swish"}, ValueError, "`activation` must be one of relu, gelu"),
    "vocabulary": ({"vocabulary": None}, ValueError, "`vocabulary` must be given in a model of"),
    "nothing to read": ({"kind": "encoder", "vocabulary": None}, ValueError, "one of `vocabulary`"),
    "two to read": ({"kind": "encoder", "inputs": 3}, ValueError, "one of `vocabulary` and"),
    "two sources": ({"inputs": 3, "source_vocabulary": 4}, ValueError, "one of `source_vocab"),
    "decoder of vectors": ({"kind": "decoder", "inputs": 3}, ValueError, "`inputs` must be left"),
    "decoder with classes": ({"classes": 3}, ValueError, "`classes` must be left out in a model"),
    "encoder that ties": (
        {"kind": "encoder", "tie_embeddings": True},
        ValueError,
        "`tie_embeddings` must be left out in a model of kind 'encoder'. Got True",
    ),
    "depth of the other": ({"kind": "encoder", "decoder_depth": 1}, ValueError, "`decoder_depth`"),
    "learned without a length": ({"positions": "learned"}, ValueError, "`max_length` must be"),
    "length that nothing reads": ({"max_length": 9}, ValueError, "`max_length` must be given with"),
    "base that nothing reads": (
        {"rotary_base": 100.0},
        ValueError,
        "`rotary_base` must be left out where `positions` is not 'rotary'. Got 100.0 and",
    ),
    "scaled embeddings that are none": (
        {"kind": "encoder", "vocabulary": None, "inputs": 3, "scale_embedding": False},
        ValueError,
        "`scale_embedding` must be left out where `inputs` takes the place of tokens",
    ),
    "odd sines": ({"width": 25, "heads": 5}, ValueError, "`width` must be even with"),
    "attention_dropout": ({"attention_dropout": -0.1}, ValueError, "`attention_dropout` must be"),
    "window": ({"window": 2.5}, TypeError, "`window` must be an int"),
    "softcap": ({"softcap": -1}, ValueError, "`softcap` must be above 0"),
    "scale": ({"scale": float("nan")}, ValueError, "`scale` must be finite"),
    "norm_out": ({"norm_out": 1}, TypeError, "`norm_out` must be true or false"),
    "norm_embedding": ({"norm_embedding": "yes"}, TypeError, "`norm_embedding` must be true or"),
    "logit_softcap": ({"logit_softcap": 0}, ValueError, "`logit_softcap` must be above 0"),
    "cap without logits": (
        {"kind": "encoder", "logit_softcap": 2.0},
        ValueError,
        "`logit_softcap` must be left out in an encoder without `classes`",
    ),
    "types of a decoder": ({"token_types": 2}, ValueError, "`token_types` must be left out in a"),
    "types of vectors": (
        {"kind": "encoder", "inputs": 3, "vocabulary": None, "token_types": 2},
        ValueError,
        "`token_types` must be left out where an encoder reads vectors",
    ),
    "blocks without a window": ({"window_blocks": [0]}, ValueError, "left out without a `window`"),
    "blocks that are no list": (
        {"window": 2, "window_blocks": 1},
        TypeError,
        "`window_blocks` must be a list of ints. Got 1",
    ),
    "blocks that are not there": (
        {"window": 2, "window_blocks": [0, 2]},
        ValueError,
        "`window_blocks` must be ascending numbers, each below 2. Got [0, 2]",
    ),
    "a window in no block": (
        {"window": 1, "window_blocks": []},
        ValueError,
        "`window_blocks` must name a block, or `window` be left out, which none would read",
    ),
    "blocks named twice": ({"window": 2, "window_blocks": [1, 1]}, ValueError, "be ascending"),
    "rotary": ({"positions": "rotary", "head_width": 3}, ValueError, "turn in pairs"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_wrong_fields_of_a_model(name):
    field, error, words = WRONG_MODELS[name]
    with pytest.raises(error) as caught:
        TransformerConfig(**{**MODEL, **field})
    assert words in str(caught.value)


def test_a_mask_is_text_however_it_is_spaced():
    one = AttentionConfig(**LAYER, mask="(q-k<4)|(k<2)")
    assert one == AttentionConfig(
        **LAYER, mask=attn_core.mask(lambda b, h, q, k: (q - k < 4) | (k < 2))
    )
    assert one.mask == "(q - k < 4) | (k < 2)"
    with pytest.raises(ValueError, match="must look no array up"):
        AttentionConfig(**LAYER, mask=masks.prefix([3, 4]))


def test_a_config_with_other_fields_on_top():
    assert AttentionConfig.of(FULL) is FULL
    assert AttentionConfig.of(FULL, kv_heads=None).kv_heads is None
    assert AttentionConfig.of(width=8, heads=2) == AttentionConfig(8, 2)
    assert AttentionConfig.of({"width": 8, "heads": 2}, heads=4) == AttentionConfig(8, 4)
    with pytest.raises(ValueError, match=r"Got 'heds'. Did you mean 'heads'"):
        AttentionConfig.of(FULL, heds=2)
    with pytest.raises(TypeError, match="`config` must be AttentionConfig, a path or a mapping"):
        AttentionConfig.of(TransformerConfig(**MODEL))


def test_what_a_models_attention_is():
    config = TransformerConfig(**MODEL, positions="rotary", window=2, dropout=0.2)
    encoder, decoder = config.attention("encoder"), config.attention("decoder")
    cross = config.attention("decoder", cross=True)
    assert (encoder.causal, decoder.causal, cross.causal) == (False, True, False)
    assert (encoder.mask, encoder.window) == ("(q - k <= 2) & (k - q <= 2)", None)
    assert (decoder.mask, decoder.window) == (None, 2)
    assert (cross.mask, cross.window, cross.positions) == (None, None, None)
    assert encoder.positions == decoder.positions == "rotary"
    assert encoder.dropout == 0.2
    assert TransformerConfig(**MODEL, attention_dropout=0.0).attention("encoder").dropout == 0.0
    turned = {**MODEL, "positions": "rotary", "rotary_base": 100.0, "rotary_pairs": "interleaved"}
    config = TransformerConfig(**turned, qk_norm="rms", norm_epsilon=1e-5)
    encoder, cross = config.attention("encoder"), config.attention("decoder", cross=True)
    assert (encoder.rotary_base, encoder.rotary_pairs) == (100.0, "interleaved")
    assert (cross.rotary_base, cross.rotary_pairs) == (10000.0, "half")
    assert encoder.norm_epsilon == cross.norm_epsilon == 1e-5
    assert TransformerConfig(**MODEL, norm_epsilon=1e-5).attention("encoder").norm_epsilon == 1e-6
    sizes = TransformerConfig(**MODEL, encoder_depth=3, source_vocabulary=5, hidden=7)
    assert (sizes.blocks("encoder"), sizes.blocks("decoder")) == (3, 2)
    assert (sizes.tokens("encoder"), sizes.tokens("decoder")) == (5, 11)
    assert (sizes.hidden_width, config.hidden_width) == (7, 96)


def test_a_window_of_some_blocks():
    config = TransformerConfig(**MODEL, window=2, window_blocks=[1], scale=0.5)
    assert config.window_blocks == (1,)
    assert [config.attention("decoder", number=n).window for n in (0, 1)] == [None, 2]
    assert [config.attention("encoder", number=n).mask is None for n in (0, 1)] == [True, False]
    assert config.attention("decoder", cross=True, number=1).window is None
    assert config.attention("decoder", cross=True).scale == 0.5
    assert config.to_mapping()["window_blocks"] == [1]  # as TOML, YAML and JSON have lists
    assert TransformerConfig.load(config.to_mapping()) == config
    assert hash(config) == hash(TransformerConfig.load(config.to_mapping()))
    every = TransformerConfig(**MODEL, window=2, window_blocks=[0, 1])
    assert not every.differences(TransformerConfig(**MODEL, window=2), ())
    assert every.differences(TransformerConfig(**MODEL, window=2, window_blocks=[1]), ()) == [
        "window_blocks: [0, 1], [1]"
    ]


# --- build -----------------------------------------------------------------------------------


def test_build_needs_a_backend(monkeypatch):
    monkeypatch.delenv("ATTN_CORE_BACKEND", raising=False)
    with pytest.raises(ValueError, match="`backend` must be named to build a layer, one of torch"):
        attn_core.build(AttentionConfig(**LAYER))
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        attn_core.build(AttentionConfig(**LAYER), backend="toch")


def test_build_refuses_a_backend_without_layers():
    for kind, config in (("MultiHeadAttention", LAYER), ("Transformer", MODEL)):
        with (
            pytest.raises(attn_core.UnsupportedError, match=f"'numpy' has no {kind}"),
            attn_core.use(backend="numpy"),
        ):
            attn_core.build(config)


def test_build_names_the_extra_of_a_missing_framework(monkeypatch):
    """Before anything is built: the loader fails as it does where torch is not installed."""
    from attn_core import registry

    def missing():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setitem(registry._LOADERS, "torch", missing)
    monkeypatch.delitem(registry._loaded, "torch", raising=False)
    with pytest.raises(ImportError, match=r"not installed: pip install 'attn-core\[torch\]'"):
        attn_core.build(AttentionConfig(**LAYER, backend="torch"))


def test_build_names_the_extra_of_missing_layers(monkeypatch):
    from attn_core import registry

    class Backend:
        def __getattr__(self, name):
            raise ModuleNotFoundError("No module named 'flax'", name="flax")

    monkeypatch.setitem(registry._loaded, "jax", Backend())
    with pytest.raises(ImportError, match=r"need flax, which is not installed: pip install 'attn"):
        attn_core.build(AttentionConfig(**LAYER, backend="jax"))


def test_build_asks_the_call_then_the_config_then_the_flag(monkeypatch):
    from attn_core import registry

    class Backend:
        def __init__(self, name):
            self.MultiHeadAttention = lambda config, seed: (name, config, seed)

    for name in ("torch", "jax", "tf"):
        monkeypatch.setitem(registry._loaded, name, Backend(name))
    silent, spoken = AttentionConfig(**LAYER), AttentionConfig(**LAYER, backend="jax")
    with attn_core.use(backend="tf"):
        assert attn_core.build(silent, seed=3) == ("tf", silent, 3)
        assert attn_core.build(spoken)[0] == "jax"
        assert attn_core.build(spoken, backend="torch")[0] == "torch"


def test_the_table_of_the_flag_says_what_a_config_leaves_open(tmp_path, monkeypatch):
    from attn_core import registry

    class Backend:
        MultiHeadAttention = staticmethod(lambda config, seed: ("torch", config.impl))

    monkeypatch.setitem(registry._loaded, "torch", Backend())
    monkeypatch.delenv("ATTN_CORE_BACKEND", raising=False)
    path = tmp_path / "model.toml"
    path.write_text(
        '[attn_core]\nbackend = "torch"\nimpl = "reference"\n[attention]\nwidth = 8\nheads = 2'
    )
    assert attn_core.build(path) == ("torch", "reference")
    said = {"attn_core": {"backend": "torch"}}
    assert attn_core.build({**LAYER, **said}) == ("torch", "auto")
    assert read_config({**LAYER, **said}) == AttentionConfig(**LAYER, backend="torch")
    for held, words in (
        ({**LAYER, "backend": "jax", **said}, "`backend` must be the same.*Got 'jax' and 'torch'"),
        ({**LAYER, "attn_core": {"backnd": "jax"}}, "Did you mean 'backend'"),
        ({**LAYER, "attn_core": {"backend": "jxa"}}, "Did you mean 'jax'"),
        ({**LAYER, "attn_core": 3}, "`attn_core` of a config must be a mapping"),
    ):
        with pytest.raises(ValueError, match=words):
            read_config(held)


def test_build_reads_either_kind_and_not_both(tmp_path):
    assert read_config({"attention": LAYER}) == AttentionConfig(**LAYER)
    assert read_config(MODEL) == TransformerConfig(**MODEL)
    with pytest.raises(ValueError, match="one of the tables attention, additive, transformer"):
        read_config({"attention": LAYER, "transformer": MODEL})
    with pytest.raises(TypeError, match="`config` must be an AttentionConfig"):
        read_config(3)
