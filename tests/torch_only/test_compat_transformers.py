"""`attn_core.compat.transformers` in tiny models with random weights, against their eager form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pages
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import attn_core  # noqa: E402
from attn_core import UnsupportedError, reference  # noqa: E402
from attn_core.compat.transformers import (  # noqa: E402
    attention_forward,
    attention_mask,
    register,
)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
POSITIONS = {"max_position_embeddings": 64}

MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64
    ),
    "gpt2-by-layer": lambda: transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=60,
        n_positions=64,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "bert": lambda: transformers.BertConfig(**SMALL, **POSITIONS, num_attention_heads=4),
    "llama": lambda: transformers.LlamaConfig(**SMALL, **HEADS, **POSITIONS),
    "mistral-window": lambda: transformers.MistralConfig(
        **SMALL, **HEADS, **POSITIONS, sliding_window=4
    ),
    # Query scale, soft cap, a window in every other layer.
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL,
        **HEADS,
        **POSITIONS,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=4,
    ),
    # Sinks, a window in every other layer, experts.
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL,
        **HEADS,
        **POSITIONS,
        sliding_window=4,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}
QUIET = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
QUIET |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    register()  # twice changes nothing


def pair(name: str) -> tuple[Any, Any]:
    """The same model twice: eager, and ours. Weights are large enough for attention to matter."""
    models = []
    for implementation in ("eager", "attn_core"):
        config = MODELS[name]()
        for key, value in QUIET.items():
            if hasattr(config, key):
                setattr(config, key, value)
        config._attn_implementation = implementation
        torch.manual_seed(0)
        kind = transformers.BertModel if name == "bert" else transformers.AutoModelForCausalLM
        model = kind(config) if name == "bert" else kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
            for word, parameter in model.named_parameters():
                if word.endswith("sinks"):
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()))
        models.append(model.eval())
    return models[0], models[1]


def tokens(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 60, (batch, length), generator=generator)


def padding(side: str, length: int) -> torch.Tensor:
    seen = torch.ones(3, length, dtype=torch.long)
    if side == "left":
        seen[1, :4] = 0
        seen[2, :1] = 0
    if side == "right":
        seen[1, -4:] = 0
        seen[2, -1:] = 0
    return seen


def answer(output: Any) -> torch.Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits


def assert_same(mine: torch.Tensor, its: torch.Tensor, seen: torch.Tensor | None = None) -> None:
    """Where a token stands: eager makes a mean of rows that are padding, we make 0."""
    if seen is not None:
        mine, its = [x[seen.bool()] for x in (mine, its)]
    assert its.abs().max() > 0.1
    torch.testing.assert_close(mine, its, rtol=2e-4, atol=2e-4 * float(its.abs().max()))


@pytest.mark.parametrize("side", ["none", "full", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_eager(name, side):
    eager, ours = pair(name)
    ids = tokens(3, 11)
    seen = None if side == "none" else padding(side, 11)
    with torch.no_grad():
        mine, its = [answer(m(ids, attention_mask=seen)) for m in (ours, eager)]
    assert_same(mine, its, seen)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_ours_that_answers(name, monkeypatch):
    _, ours = pair(name)
    import attn_core.backends.torch.compat_transformers as room

    called = []
    real = room.attention

    def spy(*args, **kwargs):
        called.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(room, "attention", spy)
    with torch.no_grad():
        ours(tokens(3, 11))
    assert len(called) == 2
    asked = [set(kwargs) for kwargs in called]
    if name == "gemma2":
        assert all("score" in kwargs for kwargs in asked)
    if name == "gpt-oss":
        assert all("sinks" in kwargs for kwargs in asked)
    if name == "bert":
        assert not any("mask" in kwargs for kwargs in asked)
    else:
        assert all("mask" in kwargs for kwargs in asked)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_eager(name):
    eager, ours = pair(name)
    ids, seen = tokens(3, 11), padding("right", 11)
    found = []
    for model in (ours, eager):
        answer(model(ids, attention_mask=seen))[seen.bool()].square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for word in found[1]:
        its = found[1][word]
        limit = 5e-4 * max(float(its.abs().max()), 1e-3)
        torch.testing.assert_close(found[0][word], its, rtol=1e-3, atol=limit, msg=word)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_generation_with_a_cache(name, side, cache):
    eager, ours = pair(name)
    ids = tokens(3, 9)
    seen = torch.ones_like(ids) if side == "none" else padding("left", 9)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": seen,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
        "disable_compile": True,
    }
    if cache == "static":
        options["cache_implementation"] = "static"
    with torch.no_grad():
        mine, its = [m.generate(ids, **options) for m in (ours, eager)]
    assert torch.equal(mine.sequences, its.sequences)
    for x, y in zip(mine.logits, its.logits, strict=True):
        assert_same(x, y)


@pytest.mark.parametrize("name", MODELS)
def test_weights_where_the_call_asks_for_them(name):
    eager, ours = pair(name)
    ids, seen = tokens(3, 11), padding("right", 11)
    options = {"attention_mask": seen, "output_attentions": True}
    with torch.no_grad():
        mine, its = [m(ids, **options) for m in (ours, eager)]
        without = answer(ours(ids, attention_mask=seen))
    assert len(mine.attentions) == len(its.attentions) == 2
    for x, y in zip(mine.attentions, its.attentions, strict=True):
        assert_same(x.transpose(1, 2), y.transpose(1, 2), seen)
    assert_same(answer(mine), without, seen)


def test_weights_always_under_another_name():
    register("attn_core_weights", return_weights=True)
    _, ours = pair("llama")
    ours.config._attn_implementation = "attn_core_weights"
    found = []
    layer = ours.model.layers[0].self_attn
    layer.register_forward_hook(lambda module, given, output: found.append(output[1]))
    with torch.no_grad():
        ours(tokens(3, 11))
    assert found[0].shape == (3, 4, 11, 11)


def test_dropout_in_training_only():
    config = MODELS["llama"]()
    config.attention_dropout = 0.5
    config._attn_implementation = "attn_core"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = tokens(3, 11)

    def call(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return answer(model(ids))

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    model.eval()
    assert torch.equal(call(1), call(2))


class Layer(torch.nn.Module):
    is_causal = True


def draw(*shape: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(len(shape)).standard_normal(shape, np.float32))


@pytest.mark.parametrize("rows", [1, 5, 9])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_alignment_without_a_mask(rows, is_causal):
    """As transformers' sdpa: from the first key, but for a single query, which sees all."""
    q, k, v = draw(2, 4, rows, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 8)
    out, weights = attention_forward(Layer().eval(), q, k, v, None, is_causal=is_causal)
    assert weights is None
    sdpa = transformers.AttentionInterface()["sdpa"]
    layer = Layer().eval()
    layer.num_key_value_groups = 2
    want, _ = sdpa(layer, q, k, v, None, is_causal=is_causal)
    torch.testing.assert_close(out, want)


def test_a_window_without_a_mask():
    q, k, v = draw(2, 4, 9, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 8)
    i, j = np.ogrid[:9, :9]
    for rows in (9, 1):
        out, _ = attention_forward(Layer().eval(), q[:, :, -rows:], k, v, None, sliding_window=3)
        seen = ((j <= i) & (j > i - 3))[-rows:]
        want = reference.attention(q[:, :, -rows:], k, v, mask=seen).out
        np.testing.assert_allclose(out.transpose(1, 2), want, atol=1e-6)


def test_every_option_of_the_function():
    q, k, v = draw(2, 4, 5, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 6)
    bias, sinks = draw(1, 4, 5, 9), draw(4)
    seen = draw(2, 1, 5, 9) > -0.5
    options = {"scaling": 0.3, "softcap": 1.5, "s_aux": sinks, "position_bias": bias}
    judge = {"scale": 0.3, "score": lambda s, *at: 1.5 * np.tanh(s / 1.5), "sinks": sinks}
    out, _ = attention_forward(Layer().eval(), q, k, v, seen, **options)
    want = reference.attention(q, k, v, mask=seen, bias=bias, **judge).out
    np.testing.assert_allclose(out.transpose(1, 2), want, atol=1e-6)
    added = torch.where(seen, 0.0, -torch.inf)
    out, _ = attention_forward(Layer().eval(), q, k, v, added, **options)
    np.testing.assert_allclose(out.transpose(1, 2), want, atol=1e-6)
    for name in options:
        fewer = {n: x for n, x in options.items() if n != name}
        other, _ = attention_forward(Layer().eval(), q, k, v, seen, **fewer)
        assert not torch.allclose(out, other, atol=1e-3), name


def test_masks_depend_on_no_values():
    """transformers leaves a mask out where nothing is padding; ours is then all the same."""
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5}
    assert attention_mask(**sizes) is None
    full = attention_mask(**sizes, attention_mask=torch.ones(2, 5, dtype=torch.bool))
    assert full.dtype == torch.bool
    assert full.shape == (2, 1, 5, 5)


@pytest.mark.parametrize("name", ["head_mask", "cache", "relative_position_bias"])
def test_what_it_cannot_honour_is_refused(name):
    q = draw(2, 4, 5, 8)
    with pytest.raises(UnsupportedError, match=f"`{name}` must be None"):
        attention_forward(Layer(), q, q, q, None, **{name: draw(4)})


@pytest.mark.parametrize(
    "name", ["eager", "sdpa", "flash_attention_2", "flex_attention", "paged|ours", None]
)
def test_names_of_transformers_own_are_refused(name):
    with pytest.raises(ValueError, match="`name` must be a name that transformers does not use"):
        register(name)


def test_the_flag_chooses_the_implementation():
    eager, ours = pair("llama")
    ids = tokens(3, 11)
    with torch.no_grad(), attn_core.use(impl="chunked"):
        assert_same(answer(ours(ids)), answer(eager(ids)))


def test_the_page_as_written():
    for code in pages.blocks("COMPAT.md", "transformers"):
        held: dict[str, Any] = {}
        exec(code, held)
        if "register" in code:
            assert held["model"].config._attn_implementation == "attn_core"
        else:
            assert held["ours"].config == held["converted"].config
