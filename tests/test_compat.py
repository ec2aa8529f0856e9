"""Other libraries' masks and windows in our terms, on NumPy, against brute force."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from support import entries, seen

import attn_core
from attn_core import compat, masks

SHAPE = (2, 4, 6, 6)


@pytest.mark.parametrize("width", [1, 3, 6, 20])
def test_hf_window_counts_the_position_itself(width):
    found = seen(masks.causal() & compat.from_hf_window(width), SHAPE)
    assert found[0, 0, 5].sum() == min(width, 6)
    np.testing.assert_array_equal(found, entries(lambda b, h, q, k, i: q - width < k <= q, SHAPE))


@pytest.mark.parametrize(("given", "left", "right"), [(2, 2, 2), ((3, 0), 3, 0), ((-1, 2), -1, 2)])
def test_jax_window_counts_neighbours_of_both_sides(given, left, right):
    found = seen(compat.from_jax_window(given), SHAPE)
    np.testing.assert_array_equal(
        found, entries(lambda b, h, q, k, i: q - left <= k <= q + right, SHAPE)
    )


@pytest.mark.parametrize("given", [(2, 1), (-1, 1), (2, -1), (0, 0)])
def test_flash_window_is_unbounded_at_minus_one(given):
    left, right = [99 if side < 0 else side for side in given]
    found = seen(compat.from_flash_window(given), SHAPE)
    np.testing.assert_array_equal(
        found, entries(lambda b, h, q, k, i: q - left <= k <= q + right, SHAPE)
    )


def test_flash_window_without_bounds_is_no_mask():
    assert compat.from_flash_window((-1, -1)) is None


def test_masks_are_turned_over_or_not():
    hidden = np.random.default_rng(0).random((2, 4, 6, 6)) < 0.5
    np.testing.assert_array_equal(compat.from_transformer_engine_mask(hidden), ~hidden)
    np.testing.assert_array_equal(compat.from_keras_mask(hidden), hidden)
    np.testing.assert_array_equal(compat.from_keras_mask(hidden[:, 0])[:, 0], hidden[:, 0])
    tokens = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(compat.from_hf_mask(tokens)[:, 0, 0], tokens == 1)
    found = compat.from_torch_mha_mask(hidden.reshape(8, 6, 6), hidden[:, 0, 0], heads=4)
    assert set(found) == {"mask"}
    np.testing.assert_array_equal(found["mask"], ~hidden & ~hidden[:, :1, :1])


def test_added_and_boolean_masks_of_multihead_attention_stand_apart():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 4, 6, 8))
    added, padding = rng.standard_normal((6, 6)), np.zeros((2, 6), bool)
    padding[1, 3:] = True
    kwargs = compat.from_torch_mha_mask(added, padding, heads=4)
    found = attn_core.attention(query, query, query, **kwargs)
    want = attn_core.attention(query, query, query, bias=added, kv_lengths=[6, 3])
    np.testing.assert_allclose(found, want)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: compat.from_hf_window(0), ValueError, "must be at least 1"),
        (lambda: compat.from_flash_window(3), ValueError, "`window_size` must be"),
        (
            lambda: compat.from_torch_mha_mask(np.ones((6, 6, 6), bool), heads=0),
            ValueError,
            "`heads` must be at least 1. Got 0",
        ),
        (lambda: compat.from_hf_window(2.0), TypeError, "`sliding_window` must be an integer"),
        (lambda: compat.from_jax_window((1, 2, 3)), ValueError, "an int or"),
        (lambda: compat.from_jax_window(True), TypeError, "must be an integer. Got a bool"),
        (lambda: compat.from_flash_window((1,)), ValueError, "must be .left, right."),
        (lambda: compat.from_hf_mask(np.ones((2, 3, 4), int)), ValueError, "must be .B, Tk."),
        (lambda: compat.from_hf_mask(np.ones((2, 3))), TypeError, "added to the scores is `bias=`"),
        (lambda: compat.from_keras_mask(np.ones((2, 3))), ValueError, "must be .B, Tq, Tk."),
        (lambda: compat.from_hf_mask([[1, 1, 0]]), TypeError, "`attention_mask` must be an array"),
        (lambda: compat.from_keras_mask([[[True]]]), TypeError, "must be an array .* Got list"),
        (lambda: compat.from_transformer_engine_mask([[True]]), TypeError, "must be an array"),
        (
            lambda: compat.from_torch_mha_mask([[True]], heads=2),
            TypeError,
            "`attn_mask` must be an array of the library in which the mask is to be. Got list",
        ),
        (
            lambda: compat.from_torch_mha_mask(key_padding_mask=[[True]], heads=2),
            TypeError,
            "`key_padding_mask` must be an array",
        ),
        (
            lambda: compat.from_transformer_engine_mask(np.ones((2, 3))),
            TypeError,
            "must be boolean",
        ),
        (
            lambda: compat.from_torch_mha_mask(np.ones((6, 6, 6), bool), heads=4),
            ValueError,
            "must be .N . heads, L, S.",
        ),
        (
            lambda: compat.from_torch_mha_mask(np.ones((6, 6), int), heads=4),
            TypeError,
            "`attn_mask` must be boolean .True = masked.",
        ),
        (
            lambda: compat.from_torch_mha_mask(key_padding_mask=np.ones((1, 1, 6)), heads=4),
            ValueError,
            "`key_padding_mask` must be",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_door_that_is_not_there():
    with pytest.raises(AttributeError, match=r"attn_core\.compat has torch, jax, keras, flax"):
        compat.tensorflow  # noqa: B018


def test_a_missing_library_is_named(monkeypatch):
    import sys

    from attn_core.compat.opening import opening

    monkeypatch.setitem(sys.modules, "flax", None)
    with (
        pytest.raises(ImportError, match=r"compat\.flax needs flax, which is not installed"),
        opening("flax", "flax", "'attn-core[jax]'"),
    ):
        import flax  # noqa: F401


# Whole models of files --------------------------------------------------------------------------

FILES = """
import json, sys
from pathlib import Path
from attn_core import compat
folder = Path(sys.argv[1])
assert "ml_dtypes" not in sys.modules and "torch" not in sys.modules
found = compat.from_transformers(str(folder / "config.json"), folder / "model.safetensors")
print(found.config.dtype, *found.weights["decoder.norm.scale"].astype(float))
"""


def test_a_model_of_files_in_bfloat16(tmp_path):
    """Nothing has taught NumPy what bfloat16 is when the paths are given."""
    import ml_dtypes
    import transformers_cases as cases
    from safetensors.numpy import save_file

    held = {n: x.astype(ml_dtypes.bfloat16) for n, x in cases.weights(cases.GPT2).items()}
    plain = compat.from_transformers(cases.GPT2, held)
    constants = {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool)}
    save_file(held | constants, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(cases.GPT2))
    run = [sys.executable, "-c", FILES, str(tmp_path)]
    said = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    assert said[0] == "bfloat16"
    want = plain.weights["decoder.norm.scale"].astype(float)
    np.testing.assert_array_equal(np.array(said[1:], float), want)


def sharded(folder, arrays, shards=2):
    """A model in several files, and their index as transformers writes it."""
    from safetensors.numpy import save_file

    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        held = dict(list(arrays.items())[number::shards])
        save_file(held, folder / file)
        places.update(dict.fromkeys(held, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index, places


def test_a_model_of_several_files(tmp_path):
    import transformers_cases as cases

    arrays = cases.weights(cases.GPT2)
    constants = {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool)}
    index, _ = sharded(tmp_path, arrays | constants, shards=3)
    found, want = [compat.from_transformers(cases.GPT2, x) for x in (str(index), arrays)]
    assert found.config == want.config
    assert found.weights.keys() == want.weights.keys()
    for name, x in want.weights.items():
        np.testing.assert_array_equal(found.weights[name], x)


def test_indices_that_are_wrong(tmp_path):
    import transformers_cases as cases

    index, places = sharded(tmp_path, cases.weights(cases.GPT2))
    name, file = next(iter(places.items()))
    other = next(x for x in places.values() if x != file)

    def refused(error, words, told):
        index.write_text(told if isinstance(told, str) else json.dumps(told))
        with pytest.raises(error, match=words):
            compat.from_transformers(cases.GPT2, index)

    moved = {"weight_map": {**places, name: other}}
    refused(ValueError, f"{other} must hold {name!r}, as {index.name} says. Got none", moved)
    left = {"weight_map": {n: x for n, x in places.items() if n != name}}
    refused(ValueError, f"must name every array of its files. Got {name!r}", left)
    refused(ValueError, r"an index with a `weight_map` .* Got the keys 'model_type'", cases.GPT2)
    refused(ValueError, "an index with a `weight_map`", {"weight_map": {}})
    refused(ValueError, "must be complete JSON", '{"weight_map": {')
    for place in (f"../{file}", f"/tmp/{file}", 3):
        refused(ValueError, "must name files beside it", {"weight_map": {**places, name: place}})
    gone = {"weight_map": {**places, name: "pytorch_model.bin"}}
    refused(ValueError, "must name safetensors files. Got 'pytorch_model.bin'", gone)
    gone = {"weight_map": {**places, name: "model-00009.safetensors"}}
    refused(FileNotFoundError, "names model-00009.safetensors, which must lie beside", gone)
    index.unlink()
    with pytest.raises(FileNotFoundError):
        compat.from_transformers(cases.GPT2, index)


def test_what_is_no_config_of_transformers():
    with pytest.raises(TypeError, match=r"`config` must be the path of a config\.json, .* Got int"):
        compat.from_transformers(3, {})
    with pytest.raises(FileNotFoundError):
        compat.from_transformers("not/there/config.json", {})


def test_changes_may_not_gainsay_a_model():
    import transformers_cases as cases

    held = cases.weights(cases.LLAMA)
    found = compat.from_transformers(cases.LLAMA, held, heads=4, window=2, dropout=0.5)
    assert (found.config.heads, found.config.window, found.config.dropout) == (4, 2, 0.5)
    for change, words in (
        ({"heads": 2}, r"the original computes, but for dtype, .*, window\..* heads: 4, 2"),
        ({"kv_heads": 4}, "kv_heads: 2, 4"),
        ({"rotary_base": 7.0}, r"\(the original's, the given\): rotary_base: 50.0, 7.0"),
        ({"scale": 1.0}, "scale: 0.408.*, 1.0"),
        ({"logit_softcap": 3.0}, "logit_softcap: None, 3.0"),
        ({"dropuot": 0.5}, "Did you mean 'dropout'"),
    ):
        with pytest.raises(ValueError, match=words):
            compat.from_transformers(cases.LLAMA, held, **change)
    windowed = {**cases.LLAMA, "model_type": "mistral", "sliding_window": 4}
    with pytest.raises(ValueError, match="window: 3, 2"):
        compat.from_transformers(windowed, held, window=2)


def test_a_window_that_no_block_reads_is_none():
    import transformers_cases as cases

    told = {**cases.GEMMA2, "layer_types": ["full_attention"] * 2}
    assert compat.from_transformers(told, cases.weights(told)).config.window is None
