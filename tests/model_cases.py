"""Models that each framework's tests build, with what the judge says of them; framework-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import model_judge
import numpy as np

from attn_core import TransformerConfig
from attn_core.conformance import tolerance
from attn_core.model.seeds import sites

B, T, S = 2, 5, 7
SMALL = {"width": 8, "depth": 2, "heads": 2, "hidden": 12}
TYPES = np.array([[0, 0, 1, 2, 1], [2, 1, 1, 0, 0]], np.int32)
LENGTHS, SOURCE_LENGTHS = np.array([5, 3], np.int32), np.array([4, 7], np.int32)


@dataclass(frozen=True)
class Case:
    """One call of one model.

    Attributes:
        config: fields of the TransformerConfig.
        call: options of the call.
        training: with dropout.
    """

    config: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    training: bool = False


DECODER = {**SMALL, "kind": "decoder", "vocabulary": 11}
ENCODER = {**SMALL, "kind": "encoder", "vocabulary": 11}
BOTH = {**SMALL, "kind": "encoder-decoder", "vocabulary": 11, "source_vocabulary": 9}
RAGGED = {"lengths": LENGTHS}

CASES: dict[str, Case] = {
    "decoder": Case(DECODER),
    "encoder": Case(ENCODER),
    "encoder-decoder": Case(BOTH),
    "ragged decoder": Case(DECODER, RAGGED),
    "ragged encoder": Case(ENCODER, RAGGED),
    "ragged both": Case(BOTH, {**RAGGED, "source_lengths": SOURCE_LENGTHS}),
    "classes": Case({**ENCODER, "classes": 3}, RAGGED),
    "vectors": Case({**SMALL, "kind": "encoder", "inputs": 6, "classes": 3}),
    "vectors to tokens": Case({**SMALL, "kind": "encoder-decoder", "vocabulary": 11, "inputs": 6}),
    "depths": Case({**BOTH, "encoder_depth": 1, "decoder_depth": 3}),
    "norms after": Case({**BOTH, "norm_first": False}),
    "norms after, and one more": Case({**DECODER, "norm_first": False, "final_norm": True}),
    "no last norm": Case({**DECODER, "final_norm": False}),
    "rms": Case({**DECODER, "norm": "rms", "norm_epsilon": 1e-2}),
    "no biases": Case({**BOTH, "bias": False}),
    "learned": Case({**DECODER, "positions": "learned", "max_length": 13}),
    "rotary": Case({**BOTH, "positions": "rotary", "rotary_fraction": 0.5}),
    "alibi": Case({**DECODER, "positions": "alibi"}),
    "no positions": Case({**DECODER, "positions": "none"}),
    "tied": Case({**DECODER, "tie_embeddings": True}),
    "embeddings as they are": Case({**DECODER, "scale_embedding": False}),
    "gelu": Case({**DECODER, "activation": "gelu"}),
    "gelu_tanh": Case({**DECODER, "activation": "gelu_tanh"}),
    "window": Case({**BOTH, "window": 1}),
    "window in one block": Case({**BOTH, "window": 1, "window_blocks": [1]}),
    "scale": Case({**BOTH, "scale": 0.9}),
    "norms before and after": Case({**BOTH, "norm_out": True}),
    "norms after, within and without": Case({**BOTH, "norm_first": False, "norm_out": True}),
    "normed embedding": Case({**BOTH, "norm_embedding": True}),
    "capped logits": Case({**DECODER, "logit_softcap": 0.5}),
    "capped logits of a table": Case({**DECODER, "logit_softcap": 0.5, "tie_embeddings": True}),
    "capped classes": Case({**ENCODER, "classes": 3, "logit_softcap": 0.5}),
    "types of tokens": Case({**ENCODER, "token_types": 3}, {"types": TYPES}),
    "types left out": Case({**ENCODER, "token_types": 3}),
    "attention's options": Case(
        {**BOTH, "kv_heads": 1, "head_width": 6, "qk_norm": "rms", "gate": True, "softcap": 2.0}
    ),
    "gated": Case({**DECODER, "activation": "silu", "gated_hidden": True}),
    "dropout": Case({**BOTH, "dropout": 0.2}, {"seed": 2**32 + 5}, training=True),
    "dropout of weights alone": Case(
        {**DECODER, "attention_dropout": 0.3}, {"seed": 5}, training=True
    ),
    "hidden dropout alone": Case(
        {**DECODER, "dropout": 0.3, "attention_dropout": 0.0}, {"seed": 5}, training=True
    ),
    "as Gemma": Case(
        {
            **DECODER,
            "kv_heads": 1,
            "norm": "rms",
            "norm_out": True,
            "bias": False,
            "positions": "rotary",
            "activation": "gelu_tanh",
            "gated_hidden": True,
            "softcap": 2.0,
            "scale": 0.6,
            "window": 1,
            "window_blocks": [0],
            "logit_softcap": 1.5,
            "tie_embeddings": True,
        },
        RAGGED,
    ),
    "as BERT": Case(
        {
            **ENCODER,
            "norm_first": False,
            "norm_embedding": True,
            "token_types": 3,
            "positions": "learned",
            "max_length": 9,
            "scale_embedding": False,
            "classes": 3,
        },
        {"types": TYPES, **RAGGED},
    ),
    "everything": Case(
        {
            **BOTH,
            "kv_heads": 1,
            "norm": "rms",
            "positions": "rotary",
            "activation": "silu",
            "gated_hidden": True,
            "qk_norm": "rms",
            "bias": False,
            "dropout": 0.1,
            "window": 2,
            "tie_embeddings": True,
        },
        {"seed": 7, **RAGGED, "source_lengths": SOURCE_LENGTHS},
        training=True,
    ),
}


GRADED = ["everything", "norms after", "gelu", "learned", "classes", "as Gemma", "as BERT"]
"""Cases whose gradients are judged."""


def inputs_of(case: Case) -> list[np.ndarray]:
    """What the model reads: `given`, and `source` in an encoder-decoder."""
    config, rng = TransformerConfig.load(case.config), np.random.default_rng(3)
    made = []
    for stack, rows in zip(reversed(config.stacks), (T, S), strict=False):
        tokens = config.tokens(stack)
        if tokens is None:
            made.append(rng.standard_normal((B, rows, config.inputs or 0)).astype(np.float32))
        else:
            made.append(rng.integers(0, tokens, (B, rows)).astype(np.int32))
    return made


def judged(case: Case, weights: dict[str, Any], inputs: list[Any], dtype: Any = np.float64) -> Any:
    call = dict(case.call)
    seed = call.pop("seed", None)
    config = TransformerConfig.load(case.config)
    options = {n: None if x == "none" else x for n, x in case.config.items()}
    more = {"sites": sites(config), "seed": seed if case.training else None, "dtype": dtype}
    return model_judge.model(options, weights, *inputs, **call, **more)


def share(got: Any, case: Case, weights: Any, inputs: Any) -> float:
    """The error of a float32 answer as a share of what is allowed; at most 1 passes."""
    want, logit = judged(case, weights, inputs)
    plain, _ = judged(case, weights, inputs, np.float32)
    return tolerance.share(np.asarray(got), want, plain, "float32", "out", logit)


def slope(
    case: Case, weights: dict[str, Any], inputs: list[Any], pull: np.ndarray, way: dict[str, Any]
) -> float:
    """d/dt of sum(pull * out) where weights move by t * way; as layer_cases.slope."""

    def loss(t: float) -> float:
        moved = {n: w.astype(np.float64) + t * way.get(n, 0.0) for n, w in weights.items()}
        return float((pull * judged(case, moved, inputs)[0]).sum())

    def central(step: float) -> float:
        return (loss(step) - loss(-step)) / (2 * step)

    return (4 * central(2.0**-13) - central(2.0**-12)) / 3
