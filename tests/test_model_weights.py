"""The plan of parameters, their first values, and files of weights."""

import dataclasses
import json
import math
import re
import struct

import numpy as np
import pytest

import attn_core
from attn_core import AdditiveConfig, AttentionConfig, TransformerConfig
from attn_core.model.initial import initial
from attn_core.model.parameters import Parameter, parameters
from attn_core.model.weights import checked, weights_for

LAYER = AttentionConfig(width=12, heads=4, kv_heads=2, value_width=5, key_input=7, out_width=6)
MODEL = TransformerConfig(
    kind="encoder-decoder", width=8, depth=1, heads=2, vocabulary=11, decoder_depth=2, hidden=10
)


def shapes(config):
    return {name: parameter.shape for name, parameter in parameters(config).items()}


def test_the_plan_of_a_layer():
    assert shapes(LAYER) == {
        "query.weight": (12, 12),
        "query.bias": (12,),
        "key.weight": (7, 6),
        "key.bias": (6,),
        "value.weight": (7, 10),
        "value.bias": (10,),
        "out.weight": (20, 6),
        "out.bias": (6,),
    }
    bare = AttentionConfig(12, 4, bias=False, out_bias=False, qk_norm="rms", gate=True)
    assert shapes(bare) == {
        "query.weight": (12, 12),
        "key.weight": (12, 12),
        "value.weight": (12, 12),
        "query_norm.scale": (3,),
        "key_norm.scale": (3,),
        "gate.weight": (12, 12),
        "out.weight": (12, 12),
    }
    assert "gate.bias" in shapes(AttentionConfig(12, 4, gate=True, out_bias=False))


def test_the_plan_of_a_model():
    found = shapes(MODEL)
    assert found["encoder.embedding.weight"] == (11, 8)
    assert found["encoder.0.attention.query.weight"] == (8, 8)
    assert found["decoder.1.cross.out.bias"] == (8,)
    assert found["decoder.1.feed.input.weight"] == (8, 10)
    assert found["decoder.0.cross_norm.scale"] == (8,)
    assert found["decoder.norm.bias"] == (8,)
    assert found["head.weight"] == (8, 11)
    assert not [name for name in found if name.startswith(("encoder.1", "decoder.2"))]
    assert not [name for name in found if name.startswith("encoder.0.cross")]
    spare = TransformerConfig(
        kind="encoder",
        width=8,
        depth=1,
        heads=2,
        inputs=3,
        norm="rms",
        bias=False,
        gated_hidden=True,
        norm_first=False,
        positions="learned",
        max_length=9,
    )
    assert list(shapes(spare)) == [
        "encoder.input.weight",
        "encoder.positions.weight",
        "encoder.0.attention.query.weight",
        "encoder.0.attention.key.weight",
        "encoder.0.attention.value.weight",
        "encoder.0.attention.out.weight",
        "encoder.0.attention_norm.scale",
        "encoder.0.feed.input.weight",
        "encoder.0.feed.gate.weight",
        "encoder.0.feed.output.weight",
        "encoder.0.feed_norm.scale",
    ]
    tied = TransformerConfig("decoder", 8, 1, 2, vocabulary=11, tie_embeddings=True)
    assert not [name for name in shapes(tied) if name.startswith("head")]
    pooled = TransformerConfig("encoder", 8, 1, 2, vocabulary=11, classes=3)
    assert shapes(pooled)["head.weight"] == (8, 3)


def test_first_values_are_xavier_and_depend_on_seed_and_name_alone():
    plan = {
        "a": Parameter((300, 200), "matrix"),
        "b": Parameter((300, 200), "matrix"),
        "t": Parameter((500, 50), "table"),
        "v": Parameter((400,), "vector"),
        "bias": Parameter((3,), "bias"),
        "scale": Parameter((3,), "scale"),
    }
    drawn = initial(plan, 5)
    for name, reach in {"a": math.sqrt(6 / 500), "t": math.sqrt(3 / 50)}.items():
        x = drawn[name]
        assert x.dtype == np.float32
        assert abs(x).max() <= reach
        # The standard deviation of 25000 uniform numbers is within 2 % of reach / sqrt(3).
        assert abs(x.std() / (reach / math.sqrt(3)) - 1) < 0.02
        assert abs(x.mean()) < 0.02 * reach
    assert abs(drawn["v"]).max() <= math.sqrt(6 / 401)
    assert drawn["bias"].tolist() == [0, 0, 0]
    assert drawn["scale"].tolist() == [1, 1, 1]
    assert not np.array_equal(drawn["a"], drawn["b"])
    assert not np.array_equal(drawn["a"], initial(plan, 6)["a"])
    assert np.array_equal(drawn["b"], initial({"b": plan["b"]}, 5)["b"])
    assert np.array_equal(drawn["a"], initial(plan, 5 + 2**64)["a"])
    with pytest.raises(TypeError, match="`seed` must be an int"):
        initial(plan, 0.5)


def test_first_values_are_these():
    """Frozen: another NumPy, or another machine, must draw them too."""
    found = initial(parameters(AttentionConfig(4, 2)), 7)["query.weight"][0]
    assert found.tobytes().hex() == FROZEN


FROZEN = "cc8dd83e7499b7be4737fabe7b7c71be"


def test_additive_has_a_plan_too():
    assert shapes(AdditiveConfig(5, query_input=3, key_input=4)) == {
        "query.weight": (3, 5),
        "key.weight": (4, 5),
        "bias": (5,),
        "score": (5,),
    }


# --- files -----------------------------------------------------------------------------------


def weights(config, dtype="float32"):
    return {name: x.astype(dtype) for name, x in initial(parameters(config), 3).items()}


@pytest.mark.parametrize("config", [LAYER, MODEL])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_weights_go_into_a_file_and_back(config, dtype, tmp_path):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    saved = weights(config, dtype)
    attn_core.save_weights(tmp_path / "w.safetensors", saved, config)
    loaded = attn_core.load_weights(str(tmp_path / "w.safetensors"))
    assert loaded.config == dataclasses.replace(config, dtype=np.dtype(dtype).name)
    assert list(loaded.weights) == list(parameters(config))
    for name, x in saved.items():
        assert loaded.weights[name].dtype == x.dtype
        assert loaded.weights[name].tobytes() == x.tobytes()
        assert loaded.weights[name].flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_layer_saves_itself(tmp_path):
    class Layer:
        config = LAYER

        def export_weights(self):
            return weights(LAYER)

    attn_core.save_weights(tmp_path / "w", Layer())
    assert attn_core.load_weights(tmp_path / "w").config == LAYER
    kept = dataclasses.replace(LAYER, dropout=0.5, backend="jax", impl="chunked")
    attn_core.save_weights(tmp_path / "w", Layer(), kept)
    assert attn_core.load_weights(tmp_path / "w").config == dataclasses.replace(LAYER, dropout=0.5)


def test_a_config_that_is_not_the_layers_is_refused(tmp_path):
    """Its names and shapes are the layer's, and it would be read back as another layer."""

    class Layer:
        config = LAYER

        def export_weights(self):
            return weights(LAYER)

    (tmp_path / "w").write_bytes(b"before")
    other = dataclasses.replace(LAYER, causal=not LAYER.causal, scale=0.25)
    with pytest.raises(ValueError, match=r"`config` must be that of the layer.*causal: .*scale: "):
        attn_core.save_weights(tmp_path / "w", Layer(), other)
    with pytest.raises(TypeError, match=r"layer, AttentionConfig\. Got TransformerConfig"):
        attn_core.save_weights(tmp_path / "w", Layer(), MODEL)
    assert (tmp_path / "w").read_bytes() == b"before"


def test_what_is_written_belongs_to_no_framework_and_is_read_as_it_was_held(tmp_path):
    chosen = dataclasses.replace(LAYER, backend="tf", impl="reference")
    attn_core.save_weights(tmp_path / "w", weights(LAYER, "float64"), chosen)
    config = attn_core.load_weights(tmp_path / "w").config
    assert config == dataclasses.replace(LAYER, dtype="float64")
    found = weights_for(config, parameters(config), tmp_path / "w")
    assert found["out.bias"].dtype == np.float64
    mixed = {**weights(LAYER, "float16"), "out.bias": weights(LAYER)["out.bias"]}
    attn_core.save_weights(tmp_path / "w", mixed, LAYER)
    assert attn_core.load_weights(tmp_path / "w").config.dtype == "float32"


def test_transposed_arrays_are_written_as_they_are_read(tmp_path):
    saved = weights(LAYER)
    saved["key.weight"] = np.ascontiguousarray(saved["key.weight"].T).T
    assert not saved["key.weight"].flags.c_contiguous
    attn_core.save_weights(tmp_path / "w", saved, LAYER)
    found = attn_core.load_weights(tmp_path / "w").weights
    assert np.array_equal(found["key.weight"], saved["key.weight"])


@pytest.fixture
def path(tmp_path):
    attn_core.save_weights(tmp_path / "w", weights(LAYER), LAYER)
    return tmp_path / "w"


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 700, -1, -400])
def test_a_truncated_file(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"must be a complete safetensors file. Got"):
        attn_core.load_weights(path)


def test_bytes_that_are_no_file_of_weights(path):
    path.write_bytes(b"\x89PNG" + bytes(500))
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        attn_core.load_weights(path)
    with pytest.raises(FileNotFoundError):
        attn_core.load_weights(path.with_name("none"))


def rewritten(path, change):
    """The file with its header changed: the bytes of the arrays stay."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


HEADERS = {
    "later version": (
        lambda h: h["__metadata__"].update(format="attn-core/2"),
        "in the format 'attn-core/1', as `save_weights` writes them. Got 'attn-core/2'",
    ),
    "no version": (lambda h: h.pop("__metadata__"), "Got None"),
    "metadata of nothing": (lambda h: h.update(__metadata__=None), "Got None"),
    "a bottomless config": (
        lambda h: h["__metadata__"].update(config="[" * 100000),
        "must hold the config of its weights",
    ),
    "no config": (lambda h: h["__metadata__"].pop("config"), "must hold the config of its weights"),
    "unknown field": (
        lambda h: h["__metadata__"].update(config='{"attention": {"width": 3, "haeds": 1}}'),
        "Did you mean 'heads'?",
    ),
    "unknown kind": (
        lambda h: h["__metadata__"].update(config='{"convolution": {}}'),
        "one of attention, additive, transformer",
    ),
    "wrong shape": (
        lambda h: h["key.weight"].update(shape=[6, 7]),
        "`key.weight` must have shape (7, 6). Got (6, 7)",
    ),
    "wrong dtype": (
        lambda h: h["key.bias"].update(dtype="I32"),
        "'key.bias' of .* must be one of F64, F32, F16, BF16. Got I32",
    ),
    "renamed": (
        lambda h: h.update({"key.wieght": h.pop("key.weight")}),
        "Got 'key.wieght'. Did you mean 'key.weight'?",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_wrong_headers(path, name):
    change, words = HEADERS[name]
    rewritten(path, change)
    with pytest.raises(ValueError, match=re.sub(r"([()?])", r"\\\1", words)):
        attn_core.load_weights(path)


def test_saving_leaves_other_files_alone(tmp_path):
    (tmp_path / "w.part").write_bytes(b"somebody's")
    attn_core.save_weights(tmp_path / "w", weights(LAYER), LAYER)
    assert (tmp_path / "w.part").read_bytes() == b"somebody's"
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_into_no_folder_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`path` must lie in a folder .* make .*none first"
    ):
        attn_core.save_weights(tmp_path / "none" / "w", weights(LAYER), LAYER)


def test_saving_the_wrong_weights_writes_nothing(tmp_path):
    (tmp_path / "w").write_bytes(b"before")
    short = weights(LAYER)
    del short["out.bias"]
    with pytest.raises(ValueError, match=r"Got none called 'out.bias'"):
        attn_core.save_weights(tmp_path / "w", short, LAYER)
    assert (tmp_path / "w").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_layer_may_be_given(path):
    plan = parameters(LAYER)
    given = weights(LAYER)
    assert list(weights_for(LAYER, plan, dict(reversed(given.items())))) == list(plan)
    assert list(weights_for(LAYER, plan, path)) == list(plan)
    with pytest.raises(TypeError, match=r"`weights` must be a mapping .* Got list"):
        weights_for(LAYER, plan, [1])
    with pytest.raises(ValueError, match=r"Got 'head.weight' and 75 more"):
        weights_for(LAYER, plan, {"head.weight": 0, **weights(MODEL)})
    with pytest.raises(ValueError, match=r"`query.bias` must have shape \(12,\). Got \(11,\)"):
        weights_for(LAYER, plan, {**given, "query.bias": np.zeros(11, np.float32)})
    with pytest.raises(TypeError, match=r"`query.bias` must be one of float64.* Got int64"):
        weights_for(LAYER, plan, {**given, "query.bias": np.zeros(12, np.int64)})


def test_nothing_is_narrowed_silently():
    plan = parameters(LAYER)
    assert weights_for(LAYER, plan, weights(LAYER, "float16"))["out.bias"].dtype == np.float16
    with pytest.raises(TypeError, match="must not be wider than the layer's dtype float32"):
        weights_for(LAYER, plan, weights(LAYER, "float64"))


def test_a_layer_that_was_cast_is_given_what_it_holds():
    plan = parameters(LAYER)
    wide, narrow = dict.fromkeys(plan, "float64"), dict.fromkeys(plan, "float16")
    assert weights_for(LAYER, plan, weights(LAYER, "float64"), wide)["out.bias"].dtype == np.float64
    with pytest.raises(TypeError, match="must not be wider than the layer's dtype float16"):
        weights_for(LAYER, plan, weights(LAYER), narrow)


def test_a_frameworks_own_arrays_are_refused():
    """torch's matrices would fit where they are square, and lie the other way round."""

    class Tensor:
        shape, dtype = (12,), np.dtype("float32")

        def __array__(self, dtype=None, copy=None):
            return np.zeros(12, np.float32)

    with pytest.raises(TypeError, match=r"`query.bias` must be a NumPy array.*Tensor; a framework"):
        weights_for(LAYER, parameters(LAYER), {**weights(LAYER), "query.bias": Tensor()})


@pytest.mark.parametrize("change", [lambda x: x.astype(">f4"), lambda x: x[::-1], lambda x: x.T])
def test_every_array_is_one_that_any_framework_takes(change):
    given = {"a": change(np.arange(16, dtype=np.float32).reshape(4, 4))}
    found = checked({"a": Parameter((4, 4), "matrix")}, given, None)["a"]
    assert found.flags.c_contiguous
    assert found.dtype.isnative
    assert np.array_equal(found, given["a"])


@pytest.mark.parametrize(
    ("ours", "files"),
    [
        (AttentionConfig(12, 4), AttentionConfig(12, 4, kv_heads=4, head_width=3, value_width=3)),
        (
            AttentionConfig(12, 4),
            AttentionConfig(12, 4, key_input=12, value_input=12, out_width=12),
        ),
        (AttentionConfig(16, 4), AttentionConfig(16, 4, scale=0.5)),
        (AdditiveConfig(5), AdditiveConfig(5, query_input=5, key_input=5)),
        (
            MODEL,
            TransformerConfig.of(
                MODEL,
                depth=9,
                encoder_depth=1,
                kv_heads=2,
                head_width=4,
                final_norm=True,
                source_vocabulary=11,
            ),
        ),
    ],
)
def test_what_is_left_out_means_what_is_written_out(ours, files, tmp_path):
    attn_core.save_weights(tmp_path / "w", weights(files), files)
    assert weights_for(ours, parameters(ours), tmp_path / "w")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": "rotary", "head_width": 2}, "positions: None, 'rotary'"),
        ({"scale": 0.25}, "scale: .*, 0.25"),
        (
            {"qk_norm": "rms", "norm_epsilon": 1e-5},
            "norm_epsilon: 1e-06, 1e-05; qk_norm: None, 'rms'",
        ),
    ],
)
def test_what_means_another_thing_is_told(change, words, tmp_path):
    other = AttentionConfig(**{**LAYER.to_mapping(), **change})
    attn_core.save_weights(tmp_path / "w", weights(other), other)
    with pytest.raises(ValueError, match=words):
        weights_for(LAYER, parameters(LAYER), tmp_path / "w")


def test_weights_of_another_model(path, tmp_path):
    """Of the same shapes, but another meaning: the config tells them apart."""
    other = AttentionConfig(**{**LAYER.to_mapping(), "causal": True, "window": 3})
    with pytest.raises(ValueError, match=r"causal: True, False; window: 3, None"):
        weights_for(other, parameters(other), path)
    same = AttentionConfig(**{**LAYER.to_mapping(), "dropout": 0.5, "impl": "chunked"})
    assert weights_for(same, parameters(same), path)
    attn_core.save_weights(tmp_path / "m", weights(MODEL), MODEL)
    with pytest.raises(ValueError, match=r"a config `attention`. Got `transformer`"):
        weights_for(LAYER, parameters(LAYER), tmp_path / "m")
