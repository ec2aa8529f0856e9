"""Whole models of transformers, in our Transformer and in the plain float64 one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import transformers_cases as cases
from transformers_cases import CONFIGS, LENGTHS, T, inside, padding, shares, tokens, types

transformers = pytest.importorskip("transformers", minversion="5")

import attn_core  # noqa: E402
from attn_core import compat  # noqa: E402
from attn_core.compat.defaults import ALIASES, DEFAULTS  # noqa: E402
from attn_core.compat.models import from_transformers  # noqa: E402
from attn_core.compat.transformers import from_model  # noqa: E402

DECODERS = [name for name in CONFIGS if not name.startswith("bert")]


def theirs(name: str) -> Any:
    """transformers' own model of the case's arrays: every name and shape is theirs."""
    told = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(told.pop("model_type"), **told)
    config._attn_implementation = "eager"
    if name.startswith("bert"):
        model = transformers.BertModel(config, add_pooling_layer=False)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    held = {n: torch.as_tensor(x) for n, x in cases.weights(CONFIGS[name]).items()}
    model.load_state_dict(held, strict=True)
    return model.eval()


def ours(found: Any, **options: Any) -> Any:
    model = attn_core.build(found.config, backend="torch", **options)
    model.load_weights(found.weights)
    return model.eval()


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_outputs(name: str, side: str) -> None:
    original, given = theirs(name), torch.as_tensor(tokens())
    seen, more, told = padding(side), {}, None
    if name.startswith("bert"):
        told = types(CONFIGS[name])
        more = {"token_type_ids": torch.as_tensor(told).long()}
    its = original(given.long(), attention_mask=torch.as_tensor(seen), **more)
    its = its.last_hidden_state if name.startswith("bert") else its.logits
    call: dict[str, Any] = {} if told is None else {"types": torch.as_tensor(told)}
    if side == "right":
        call["lengths"] = torch.as_tensor(LENGTHS)
    if side == "left":
        call["mask"] = compat.from_hf_mask(torch.as_tensor(seen))
    found = from_model(original)
    mine = ours(found)(given, **call)
    used = shares(
        CONFIGS[name], cases.weights(CONFIGS[name]), seen, {"its": its, "ours": mine}, told
    )
    assert inside(used), used


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_arrays_alone_say_the_same(name: str) -> None:
    """What transformers' object says, and what its config.json would."""
    found, held = from_model(theirs(name)), cases.weights(CONFIGS[name])
    again = from_transformers(CONFIGS[name], held)
    assert again.config == found.config
    assert list(again.weights) == list(found.weights)
    for word, x in again.weights.items():
        np.testing.assert_array_equal(x, found.weights[word])
        assert not any(np.shares_memory(x, y) for y in held.values())


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_generation(name: str) -> None:
    """Step by step with a cache: transformers' tokens, and the logits of one call."""
    original, prompt = theirs(name), torch.as_tensor(tokens()[:, :4])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    its = original.generate(prompt.long(), attention_mask=torch.ones_like(prompt), **options)
    model = ours(from_model(original))
    mine = model.generate(prompt, 6)
    assert torch.equal(mine, its[:, 4:].to(mine.dtype))
    assert len(set(its[:, 4:].flatten().tolist())) > 2
    whole = torch.cat([prompt, mine], 1)
    full, cache = model(whole), model.make_cache(len(prompt), whole.shape[1])
    for at in range(whole.shape[1]):
        found = model(whole[:, at : at + 1], cache=cache)
        cache = found.cache
        torch.testing.assert_close(found.out[:, 0], full[:, at], rtol=0, atol=3e-5)


def changed(name: str, **fields: Any) -> Any:
    config = {**CONFIGS[name], **fields}
    return from_transformers(config, cases.weights(config))


CHANGES = {
    "the scale": ("gpt2", {"scale_attn_weights": False}),
    "the norm's epsilon": ("llama", {"rms_norm_eps": 1e-1}),
    "the rotary base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}),
    "the window": ("mistral", {"sliding_window": 3}),
    "the window's blocks": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    "the scores' cap": ("gemma2", {"attn_logit_softcapping": None}),
    "the logits' cap": ("gemma2", {"final_logit_softcapping": None}),
    "the scale of queries": ("gemma2", {"query_pre_attn_scalar": 5}),
    "the activation": ("bert", {"hidden_act": "gelu_new"}),
}


@pytest.mark.parametrize("what", CHANGES)
@torch.no_grad()
def test_every_field_changes_the_output(what: str) -> None:
    name, fields = CHANGES[what]
    given = torch.as_tensor(tokens())
    least = 1e-5 if what == "the activation" else 1e-3  # the two gelus are that close
    one, two = ours(changed(name))(given), ours(changed(name, **fields))(given)
    assert (one - two).abs().max() > least


def test_as_old_files_say_it() -> None:
    """`rope_theta` beside `rope_scaling`, no layer types, constants among the weights."""
    old = {
        n: x for n, x in CONFIGS["gemma2"].items() if n not in ("rope_parameters", "layer_types")
    }
    held = cases.weights(CONFIGS["gemma2"])
    held = {n.removeprefix("model."): x for n, x in held.items() if n != "lm_head.weight"}
    held["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    found = from_transformers({**old, "rope_theta": 50.0, "rope_scaling": None}, held)
    assert found.config == changed("gemma2").config
    held = cases.weights(CONFIGS["gpt2"])
    held["transformer.h.0.attn.bias"] = np.ones((1, 1, 4, 4), bool)
    held["transformer.h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    assert from_transformers(CONFIGS["gpt2"], held).config == changed("gpt2").config


def test_the_norms_of_old_bert_files() -> None:
    """LayerNorm.gamma and .beta, as TensorFlow calls them, in bert-base's own file."""
    held, old = cases.weights(CONFIGS["bert"]), {}
    for name, x in held.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = x
    assert sum("gamma" in name for name in old) == 5
    found, want = from_transformers(CONFIGS["bert"], old), from_transformers(CONFIGS["bert"], held)
    assert {name: x.tolist() for name, x in found.weights.items()} == {
        name: x.tolist() for name, x in want.weights.items()
    }
    with pytest.raises(ValueError, match=r"must hold 'embeddings.LayerNorm.weight' once"):
        from_transformers(CONFIGS["bert"], {**held, **old})


CLASSES = {
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "gemma2": transformers.Gemma2Config,
    "bert": transformers.BertConfig,
}
# What transformers' classes of today do not hold: of older files, or another family's alone.
ELSEWHERE = {
    "llama": {"rope_scaling", "rope_theta", "partial_rotary_factor"},
    "bert": {"position_embedding_type"},
}
ELSEWHERE["mistral"] = {*ELSEWHERE["llama"], "attention_bias", "mlp_bias", "layer_types"}
ELSEWHERE["gemma2"] = {*ELSEWHERE["llama"], "mlp_bias"}


@pytest.mark.parametrize("family", CLASSES)
def test_the_defaults_are_those_of_transformers(family: str) -> None:
    """Of every field that is read: `_Original.get` looks each up in this table."""
    stated = {field.name: field.default for field in dataclasses.fields(CLASSES[family])}
    ours = DEFAULTS[family]
    assert set(ours) - set(stated) == ELSEWHERE.get(family, set())
    assert {name: ours[name] for name in set(ours) & set(stated)} == {
        name: stated[name] for name in set(ours) & set(stated)
    }
    assert ALIASES.get(family, {}) == (CLASSES[family].attribute_map or {})
    if family != "gpt2" and family != "bert":
        angles = CLASSES[family]().rope_parameters
        assert angles == {"rope_type": "default", "rope_theta": ours["rope_theta"]}


SHORT = {
    "gpt2": {"vocab_size": 23, "n_positions": 12, "n_embd": 24, "n_layer": 2},
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 4},
    "mistral": {"num_hidden_layers": 2, "num_attention_heads": 8},
    "gemma2": {"num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 4},
    "bert": {"num_hidden_layers": 2, "max_position_embeddings": 12, "num_attention_heads": 4},
}
for family in ("llama", "mistral", "gemma2", "bert"):
    SHORT[family] |= {"vocab_size": 23, "hidden_size": 32, "intermediate_size": 20}
SHORT["gpt2, by other names"] = {
    "vocab_size": 23,
    "max_position_embeddings": 12,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("case", SHORT)
@torch.no_grad()
def test_a_short_config_means_what_transformers_takes_it_for(case: str) -> None:
    family = case.split(",")[0]
    whole = CLASSES[family](**SHORT[case]).to_dict()
    held = cases.weights(whole)
    found = from_transformers({"model_type": family, **SHORT[case]}, held)
    config = CLASSES[family](**SHORT[case])
    if family == "bert":
        original = transformers.BertModel(config, add_pooling_layer=False)
    else:
        original = transformers.AutoModelForCausalLM.from_config(config)
    original.load_state_dict({n: torch.as_tensor(x) for n, x in held.items()}, strict=True)
    assert found.config.differences(from_model(original).config, ()) == []
    given, seen = torch.as_tensor(tokens()), padding("none")
    told = np.zeros_like(tokens()) if family == "bert" else None
    its = original.eval()(given.long())
    its = its.last_hidden_state if family == "bert" else its.logits
    mine = ours(found)(given)
    used = shares(whole, held, seen, {"its": its, "ours": mine}, told)
    assert inside(used), used


def test_null_is_none_and_no_default() -> None:
    off = changed("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (off.config.softcap, off.config.logit_softcap) == (None, None)
    assert changed("mistral", sliding_window=None).config.window is None
    with pytest.raises(
        ValueError, match=r"`rms_norm_eps` of a config of llama must be given\. Got"
    ):
        changed("llama", rms_norm_eps=None)


def test_two_names_of_one_field_must_agree() -> None:
    assert changed("gpt2", num_attention_heads=3).config == changed("gpt2").config
    with pytest.raises(ValueError, match=r"`num_attention_heads` .* another name of `n_head`"):
        changed("gpt2", num_attention_heads=4)


def test_fields_may_be_given() -> None:
    config = {**CONFIGS["gpt2"], "resid_pdrop": 0.1}
    found = from_transformers(config, cases.weights(config), dropout=0.2, impl="chunked")
    assert (found.config.dropout, found.config.impl) == (0.2, "chunked")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@torch.no_grad()
def test_dtypes_are_kept(name: str, dtype: torch.dtype) -> None:
    original = theirs(name).to(dtype)
    found = from_model(original)
    assert found.config.dtype == str(dtype).removeprefix("torch.")
    its, mine = (
        original(torch.as_tensor(tokens()).long()).logits,
        ours(found)(torch.as_tensor(tokens())),
    )
    assert mine.dtype == its.dtype
    # In a model of float64 transformers' rms norms and angles are of float32.
    atol = 1e-5 if dtype == torch.float64 else 0.06 * float(its.abs().max())
    torch.testing.assert_close(mine, its, rtol=0, atol=atol)


def weights_with(name: str, **more: Any) -> Any:
    return from_transformers(CONFIGS[name], {**cases.weights(CONFIGS[name]), **more})


ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "another family": (
        lambda: from_transformers({"model_type": "gemma3"}, {}),
        ValueError,
        "`model_type` must be one of gpt2, .* Got 'gemma3'. Did you mean 'gemma2'",
    ),
    "scaled angles": (
        lambda: changed("llama", rope_parameters=ROPE),
        ValueError,
        "`rope_type` of a config of llama must be 'default'.* Got 'llama3'",
    ),
    "scaled angles in an old file": (
        lambda: changed(
            "llama", rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}
        ),
        ValueError,
        "`rope_type` of a config of llama must be 'default'.* Got 'linear'",
    ),
    "part of the channels": (
        lambda: changed("llama", rope_parameters={"rope_theta": 9.0, "partial_rotary_factor": 0.5}),
        ValueError,
        "`partial_rotary_factor` of a config of llama must be 1.0",
    ),
    "a scale by layer": (
        lambda: changed("gpt2", scale_attn_by_inverse_layer_idx=True),
        ValueError,
        "`scale_attn_by_inverse_layer_idx` of a config of gpt2 must be False",
    ),
    "two rates of dropout": (
        lambda: changed("gpt2", embd_pdrop=0.1),
        ValueError,
        "`embd_pdrop` of a config of gpt2 must be 0.0: both are `dropout` here",
    ),
    "both directions": (
        lambda: changed("gemma2", use_bidirectional_attention=True),
        ValueError,
        "`use_bidirectional_attention` of a config of gemma2 must be False",
    ),
    "another kind of layer": (
        lambda: changed("gemma2", layer_types=["chunked_attention", "full_attention"]),
        ValueError,
        "`layer_types` of a config of gemma2 must be .* Got 'chunked_attention'",
    ),
    "too few kinds of layers": (
        lambda: changed("gemma2", layer_types=["full_attention"]),
        ValueError,
        r"`len\(layer_types\)` of a config of gemma2 must be 2: one for each block. Got 1",
    ),
    "a decoder of BERT's": (
        lambda: changed("bert", is_decoder=True),
        ValueError,
        "`is_decoder` of a config of bert must be False",
    ),
    "relative positions": (
        lambda: changed("bert", position_embedding_type="relative_key"),
        ValueError,
        "`position_embedding_type` of a config of bert must be 'absolute'",
    ),
    "an activation": (
        lambda: changed("llama", hidden_act="relu2"),
        ValueError,
        "`hidden_act` of a config of llama must be one of relu, .* Got 'relu2'. Did you mean",
    ),
    "no size": (
        lambda: changed("llama", vocab_size=None),
        ValueError,
        "`vocab_size` of a config of llama must be given",
    ),
    "a weight that nothing reads": (
        lambda: weights_with("bert", **{"pooler.dense.weight": np.zeros((2, 2), np.float32)}),
        ValueError,
        "`weights` must hold what .* Got 'pooler.dense.weight', which nothing reads",
    ),
    "a head that is not the table": (
        lambda: weights_with("gpt2", **{"lm_head.weight": np.zeros((23, 12), np.float32)}),
        ValueError,
        "`lm_head.weight` must be the embeddings' table",
    ),
    "two dtypes": (
        lambda: weights_with("gpt2", **{"lm_head.weight": np.zeros((23, 12))}),
        TypeError,
        "must share one dtype. Got float32, float64",
    ),
    "a tensor": (
        lambda: weights_with("gpt2", **{"lm_head.weight": torch.zeros(3)}),
        TypeError,
        "`lm_head.weight` must be a NumPy array. Got torch.Tensor",
    ),
    "another model": (
        lambda: from_model(transformers.GPT2Model(transformers.GPT2Config(n_embd=12, n_layer=0))),
        TypeError,
        r"`model` must be one of transformers' GPT2LMHeadModel, .* Got .*\.GPT2Model",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    bad, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        bad()


def test_a_weight_that_is_missing_is_refused() -> None:
    held = cases.weights(CONFIGS["llama"])
    del held["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"must hold 'layers.1.mlp.up_proj.weight'. Got none"):
        from_transformers(CONFIGS["llama"], held)


def test_a_weight_of_another_shape_is_refused() -> None:
    held = cases.weights(CONFIGS["llama"])
    held["model.layers.1.mlp.up_proj.weight"] = np.zeros((20, 15), np.float32)
    with pytest.raises(
        ValueError, match=r"`decoder.1.feed.input.weight` must have shape \(16, 20\)"
    ):
        from_transformers(CONFIGS["llama"], held)


def test_no_more_positions_than_there_are() -> None:
    model = ours(changed("gpt2"))
    with pytest.raises(ValueError, match="must not be longer than `max_length` = 12"):
        model(torch.zeros((1, T + 4), dtype=torch.int32))
