"""Weights of torch's and transformers' layers, in our layer and in the plain float64 one."""

from __future__ import annotations

from typing import Any

import compat_layers as layers
import numpy as np
import pytest
import torch

from attn_core import compat
from attn_core.backends.torch.layers import MultiHeadAttention
from attn_core.compat.torch import from_multihead_attention
from attn_core.model.weights import load_weights

RAGGED = np.array([7, 4])


def ours(found: Any, *inputs: Any, **call: Any) -> Any:
    layer = MultiHeadAttention(found.config)
    layer.load_weights(found.weights)
    with torch.no_grad():
        return layer.eval()(*[torch.tensor(x) for x in inputs], **call)


STOCK = {
    "plain": {},
    "no bias": {"bias": False},
    "other sources": {"kdim": 10, "vdim": 6},
    "key source": {"kdim": 10, "vdim": 10, "bias": False},
}


def stock(**options: Any) -> torch.nn.MultiheadAttention:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(12, 4, batch_first=True, **options).eval()
    with torch.no_grad():  # biases start at 0, where none of them could be lost
        for parameter in layer.parameters():
            parameter.normal_(0, 0.4)
    return layer


@pytest.mark.parametrize("options", STOCK.values(), ids=STOCK)
def test_multihead_attention(options, tmp_path):
    module = stock(**options)
    found = from_multihead_attention(module)
    x = layers.draw(0, 2, 5, 12)
    key = layers.draw(1, 2, 7, options.get("kdim", 12))
    value = layers.draw(2, 2, 7, options.get("vdim", 12))
    padding = np.arange(7) >= RAGGED[:, None]
    with torch.no_grad():
        its, weights = module(
            *[torch.tensor(a) for a in (x, key, value)],
            key_padding_mask=torch.tensor(padding),
            average_attn_weights=False,
        )
    mine = ours(found, x, key, value, kv_lengths=[7, 4], return_weights=True)
    shares = layers.used(found, {"its": its, "ours": mine.out}, x, key, value, kv_lengths=RAGGED)
    assert layers.within(shares), shares
    torch.testing.assert_close(mine.weights, weights)
    layers.written(found, tmp_path / "x.safetensors")
    again = load_weights(tmp_path / "x.safetensors")
    assert again.config == found.config
    np.testing.assert_array_equal(again.weights["key.weight"], found.weights["key.weight"])


def test_multihead_attention_causal():
    module, x = stock(), layers.draw(0, 2, 5, 12)
    found = from_multihead_attention(module, causal=True)
    hidden = torch.nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        its, _ = module(*[torch.tensor(x)] * 3, attn_mask=hidden, is_causal=True)
    shares = layers.used(found, {"its": its, "ours": ours(found, x)}, x)
    assert layers.within(shares), shares


def test_changes_may_not_gainsay_a_layer():
    """heads=2 would cut the same matrices into other heads."""
    module = torch.nn.MultiheadAttention(16, 4, dropout=1.0)  # no rate of ours, unless one is given
    given = {"dtype": "float64", "dropout": 0.5, "backend": "jax", "impl": "chunked"}
    hiding = {"causal": True, "window": 3, "mask": "k < 4"}
    found = from_multihead_attention(module, heads=4, head_width=4, **given, **hiding).config
    assert {name: getattr(found, name) for name in (*given, *hiding)} == {**given, **hiding}
    for change, words in (
        ({"heads": 2}, "heads: 4, 2; .*head_width: 4, 8"),
        ({"scale": 1.0}, "scale: 0.5, 1.0"),
        ({"softcap": 2.0}, "softcap: None, 2.0"),
        ({"positions": "alibi"}, "positions: None, 'alibi'"),
        ({"out_bias": False}, "out_bias: True, False"),
    ):
        with pytest.raises(ValueError, match=f"what the original computes, but for .*: {words}"):
            from_multihead_attention(module, dropout=0.0, **change)


def test_what_a_layer_hides_itself_stays_hidden():
    _, layer = attention_of("gemma2", 0)
    own = compat.transformers.from_attention(layer).config
    for change in ({"causal": False}, {"window": own.window + 1}, {"window": None}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: "):
            compat.transformers.from_attention(layer, **change)


def test_what_is_converted_is_a_copy():
    module = stock()
    found = from_multihead_attention(module)
    before = found.weights["query.weight"].copy()
    with torch.no_grad():
        module.in_proj_weight.zero_()
    np.testing.assert_array_equal(found.weights["query.weight"], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    found = from_multihead_attention(stock().to(dtype))
    assert found.config.dtype == str(dtype).removeprefix("torch.")
    assert {x.dtype.name for x in found.weights.values()} == {found.config.dtype}


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_added_keys_are_refused(option):
    with pytest.raises(ValueError, match=f"`{option}` of torch.nn.MultiheadAttention must be"):
        from_multihead_attention(torch.nn.MultiheadAttention(12, 4, **{option: True}))


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"`module` must be a torch\.nn\.MultiheadAttention"):
        from_multihead_attention(torch.nn.Linear(3, 4))
    with pytest.raises(TypeError, match="one of transformers' GPT2Attention, BertAttention"):
        compat.transformers.from_attention(torch.nn.Linear(3, 4))


def test_a_subclass_is_refused_and_a_parametrization_is_none():
    class Doubled(torch.nn.MultiheadAttention):
        def forward(self, query, key, value):
            return super().forward(2 * query, key, value)

    with pytest.raises(TypeError, match=r"and no subclass of it, .* Got Doubled"):
        from_multihead_attention(Doubled(12, 4))
    module = torch.nn.MultiheadAttention(12, 4)
    torch.nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
    assert type(module) is not torch.nn.MultiheadAttention
    with torch.no_grad():
        module.parametrizations.in_proj_weight.original0.mul_(3.0)
    want = module.in_proj_weight.detach()[:12].T.numpy()
    np.testing.assert_array_equal(from_multihead_attention(module).weights["query.weight"], want)


# transformers -----------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers", minversion="5")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LLAMA = {**SMALL, **HEADS, "max_position_embeddings": 64}
MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60),
    "gpt2-by-layer": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=60, scale_attn_by_inverse_layer_idx=True
    ),
    "bert": lambda: transformers.BertConfig(**SMALL, num_attention_heads=4),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "llama-bias": lambda: transformers.LlamaConfig(
        **LLAMA,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=3),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=2
    ),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA),
    "gemma2": lambda: transformers.Gemma2Config(
        **LLAMA, sliding_window=3, attn_logit_softcapping=1.0, query_pre_attn_scalar=4
    ),
}


def attention_of(name: str, at: int) -> tuple[Any, Any]:
    """The model, and its attention layer."""
    config = MODELS[name]()
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for word, parameter in model.named_parameters():
            if "norm" not in word.lower() or "q_norm" in word or "k_norm" in word:
                parameter.normal_(0, 0.3)
    blocks = model.h if hasattr(model, "h") else getattr(model, "layers", None)
    blocks = model.encoder.layer if blocks is None else blocks
    for word in ("attn", "attention", "self_attn"):
        if hasattr(blocks[at], word):
            return model, getattr(blocks[at], word)
    raise AssertionError(name)


def its_answer(model: Any, layer: Any, x: np.ndarray, seen: np.ndarray) -> torch.Tensor:
    """The layer's own output under a boolean mask (B, 1, T, T), eager."""
    hidden = torch.tensor(x)
    added = torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)
    options: dict[str, Any] = {"attention_mask": added}
    if hasattr(model, "rotary_emb"):
        positions = torch.arange(x.shape[1])[None]
        options["position_embeddings"] = model.rotary_emb(hidden, positions)
    with torch.no_grad():
        if hasattr(layer, "self"):
            return layer.output.dense(layer.self(hidden, **options)[0])
        return layer(hidden, **options)[0]


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers(name, side, at):
    model, layer = attention_of(name, at)
    found = compat.transformers.from_attention(layer)
    x = layers.draw(3, 2, 9, 32)
    tokens = np.ones((2, 9), np.int64)
    tokens[1, slice(5, None) if side == "right" else slice(0, 4)] = 0
    i, j = np.ogrid[:9, :9]
    seen = np.broadcast_to(tokens[:, None, None, :] == 1, (2, 1, 9, 9))
    if found.config.causal:
        seen = seen & (j <= i)
    if name == "mistral" or (name == "gemma2" and at == 0):
        assert found.config.window == 2
        seen = seen & (j > i - 3)
    else:
        assert found.config.window is None
    its = its_answer(model, layer, x, seen)
    mine = ours(found, x, mask=compat.from_hf_mask(torch.tensor(tokens)))
    shares = layers.used(
        *(found, {"its": its, "ours": mine}, x),
        alive=tokens == 1,
        sees=lambda b, h, q, k: tokens[b, k] == 1,
    )
    assert layers.within(shares), shares


@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_prefill_and_steps_with_a_cache_are_the_full_pass(name):
    model, layer = attention_of(name, 0)
    found = compat.transformers.from_attention(layer)
    x = layers.draw(3, 2, 9, 32)
    i, j = np.ogrid[:9, :9]
    seen = j <= i
    if found.config.window is not None:
        seen = seen & (j > i - 3)
    its = its_answer(model, layer, x, np.broadcast_to(seen, (2, 1, 9, 9)))
    mine = MultiHeadAttention(found.config)
    mine.load_weights(found.weights)
    cache = mine.eval().make_cache(2, 9)
    parts = []
    with torch.no_grad():
        for first, last in ((0, 5), (5, 6), (6, 9)):
            out, _, cache = mine(torch.tensor(x[:, first:last]), cache=cache)
            parts.append(out)
    shares = layers.used(found, {"its": its, "ours": torch.cat(parts, 1)}, x)
    assert layers.within(shares), shares


def test_cross_attention_of_gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=60)
    config.add_cross_attention, config._attn_implementation = True, "eager"
    torch.manual_seed(0)
    layer = transformers.GPT2Model(config).eval().h[0].crossattention
    found = compat.transformers.from_attention(layer)
    assert not found.config.causal
    x, source = layers.draw(3, 2, 5, 32), layers.draw(4, 2, 7, 32)
    with torch.no_grad():
        its = layer(torch.tensor(x), encoder_hidden_states=torch.tensor(source))[0]
    shares = layers.used(found, {"its": its, "ours": ours(found, x, source)}, x, source)
    assert layers.within(shares), shares


def test_scaled_rotary_positions_are_refused():
    config = MODELS["llama"]()
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    layer = transformers.AutoModel.from_config(config).layers[0].self_attn
    with pytest.raises(ValueError, match="`rope_type` of LlamaAttention must be left out"):
        compat.transformers.from_attention(layer)


def test_a_layer_that_only_has_the_name_is_refused():
    """Another library's may pair its channels otherwise."""
    layer = transformers.AutoModel.from_config(MODELS["llama"]()).layers[0].self_attn
    theirs = type("LlamaAttention", (type(layer),), {"__module__": "somebody.models"})
    layer.__class__ = theirs
    with pytest.raises(TypeError, match=r"Got somebody\.models\.LlamaAttention"):
        compat.transformers.from_attention(layer)


def test_dropout_comes_along():
    config = MODELS["llama"]()
    config.attention_dropout = 0.25
    layer = transformers.AutoModel.from_config(config).layers[0].self_attn
    assert compat.transformers.from_attention(layer).config.dropout == 0.25
    assert compat.transformers.from_attention(layer, dropout=0.0).config.dropout == 0.0
    assert (
        from_multihead_attention(torch.nn.MultiheadAttention(12, 4, dropout=0.5)).config.dropout
        == 0.5
    )
