"""The same layers and model as flax.linen modules, params under the words of the plan's names.

    layer = MultiHeadAttention(AttentionConfig(width=64, heads=4))
    variables = layer.init(jax.random.key(0), x)          or layer.load_weights("layer.safetensors")
    y = layer.apply(variables, x)

    {"params": {"query": {"weight": .., "bias": ..}, "key": .., "value": .., "out": ..}}

The computation is the flax.nnx module's, which is made for the time of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx, traverse_util

from attn_core.backends.jax import additive, layers, models
from attn_core.backends.jax.arrays import DTYPES, x64
from attn_core.backends.jax.portable import parameters, put
from attn_core.model.additive import AdditiveConfig
from attn_core.model.cache import Cache, Memory, ModelCache
from attn_core.model.config import AttentionConfig
from attn_core.model.initial import initial
from attn_core.model.parameters import Plan
from attn_core.model.transformer import TransformerConfig
from attn_core.model.weights import weights_for

Array = Any

# The distributions of model.initial, drawn from a key of JAX.
_DRAWN = {
    "matrix": jax.nn.initializers.glorot_uniform(),
    "table": jax.nn.initializers.variance_scaling(1.0, "fan_out", "uniform"),
    "vector": lambda key, shape: jax.nn.initializers.glorot_uniform()(key, (*shape, 1))[..., 0],
    "bias": jax.nn.initializers.zeros,
    "scale": jax.nn.initializers.ones,
}


class Wrapped(linen.Module):
    """What the linen modules of a config share: the call, and weights in and out."""

    def setup(self) -> None:
        self.held = self._held()

    @property
    def settings(self) -> Any:
        """The config, read."""
        raise NotImplementedError

    def __call__(self, *inputs: Any, deterministic: bool | None = None, **options: Any) -> Any:
        """The nnx module's call, whose arguments these are."""
        dropping = self._dropping(deterministic)
        return self._filled(self._blank(), dropping)(*inputs, **options)

    def export_weights(self, variables: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """The params among `variables` under their neutral names, matrices (in, out), NumPy."""
        if variables is None:
            raise TypeError(
                "`variables` must be given, as a module of linen holds none: "
                "save_weights(path, module.export_weights(variables), module.settings). Got none."
            )
        plan, held = parameters(self.settings), traverse_util.flatten_dict(variables["params"])
        return {name: np.array(held[tuple(name.split("."))]) for name in plan}

    def load_weights(self, source: str | PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
        """Variables from a file of any framework, or a mapping of neutral names to arrays.

        Raises:
            ValueError, TypeError: as those of the nnx module.
        """
        config = self.settings
        return {"params": _nested(config, weights_for(config, parameters(config), source))}

    def _held(self) -> dict[str, Any]:
        """The params, which `init` makes: portable first values of `seed`, or the key's own."""
        config = self.settings
        plan, found = parameters(config), {}
        for top in dict.fromkeys(name.partition(".")[0] for name in plan):
            part = {n: p for n, p in plan.items() if n.partition(".")[0] == top}
            found[top] = self.param(top, partial(_first, config, part, self.seed))
        return {".".join(path): x for path, x in traverse_util.flatten_dict(found).items()}

    def _blank(self) -> Any:
        raise NotImplementedError

    def _dropping(self, given: bool | None) -> bool:
        """Whether the module of a call drops: it must be said where there is a rate."""
        c = self.settings
        if not c.dropout and not getattr(c, "attention_dropout", None):
            return False
        return not linen.merge_param("deterministic", self.deterministic, given)

    def _filled(self, blank: Any, training: bool = False) -> Any:
        """A module of nnx that holds these params."""
        for name, x in self.held.items():
            put(blank.get_parameter(name), x)
        (blank.train if training else blank.eval)()
        return blank


class MultiHeadAttention(Wrapped):
    """Multi-head attention over (B, T, width): backends/jax/layers.py in linen.

    Attributes:
        config: AttentionConfig, a path or a mapping.
        seed: of the first values that `init` gives, the same numbers in every framework; left out,
            the key that `init` is given decides, Xavier uniform too.
        site: the number of this layer's stream of dropout, 0 on its own.
        deterministic: whether nothing is dropped; here, or in the call, where there is dropout.
    """

    config: Any
    seed: int | None = None
    site: int = 0
    deterministic: bool | None = None

    @property
    def settings(self) -> AttentionConfig:
        """The config, read."""
        return AttentionConfig.of(self.config)

    def make_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty Cache, as the nnx module's; it takes no params."""
        return self._blank().make_cache(batch, length, dtype)

    def memory(self, key: Array, value: Array | None = None, lengths: Any = None) -> Memory:
        """A source projected once: `layer.apply(variables, source, method="memory")`."""
        return self._filled(self._blank()).memory(key, value, lengths)

    def _blank(self) -> layers.MultiHeadAttention:
        return _blank(layers.MultiHeadAttention, self.settings, site=self.site)


class AdditiveAttention(Wrapped):
    """Additive attention in linear memory: backends/jax/additive.py in linen.

        {"params": {"query": {"weight": ..}, "key": {"weight": ..}, "bias": .., "score": ..}}

    Attributes:
        config: AdditiveConfig, a path or a mapping.
        seed, site, deterministic: as of MultiHeadAttention.
    """

    config: Any
    seed: int | None = None
    site: int = 0
    deterministic: bool | None = None

    @property
    def settings(self) -> AdditiveConfig:
        """The config, read."""
        return AdditiveConfig.of(self.config)

    def _blank(self) -> additive.AdditiveAttention:
        return _blank(additive.AdditiveAttention, self.settings, site=self.site)


class Transformer(Wrapped):
    """The Transformer of a TransformerConfig: backends/jax/models.py in linen.

        model = Transformer(TransformerConfig(kind="decoder", width=64, ...))
        variables = model.init(jax.random.key(0), tokens)
        logits = model.apply(variables, tokens, seed=step, deterministic=False)

    The tree of params, of which each stack has its own (a block's `cross` in an encoder-decoder)::

        encoder, decoder    embedding {weight}, or input {weight, bias}; types, positions {weight};
                            embedding_norm, norm {scale, bias}
            "0", "1", ..    attention, cross {query, key, value, out}; feed {input, output};
                            attention_norm, cross_norm, feed_norm {scale, bias}, .._out_norm
        head                {weight, bias}

    `export_weights` gives it flat, under the dotted names of a weights file.

    Attributes:
        config: TransformerConfig, a path or a mapping.
        seed, deterministic: as of MultiHeadAttention.
    """

    config: Any
    seed: int | None = None
    deterministic: bool | None = None

    @property
    def settings(self) -> TransformerConfig:
        """The config, read."""
        return TransformerConfig.of(self.config)

    def make_cache(
        self, batch: int, length: int, *, source: Array | None = None, **options: Any
    ) -> ModelCache:
        """An empty ModelCache, as the nnx module's, whose options these are.

        It takes params where it reads a source: `model.apply(variables, 2, 9, source=x,
        method="make_cache")`.
        """
        model = self._blank() if source is None else self._filled(self._blank())
        return model.make_cache(batch, length, source=source, **options)

    def generate(self, prompt: Array, steps: int, **options: Any) -> Array:
        """The likeliest next token, as the nnx module's, whose options these are, in evaluation.

        `model.apply(variables, prompt, 5, method="generate")`.
        """
        return self._filled(self._blank()).generate(prompt, steps, **options)

    def _blank(self) -> models.Transformer:
        return _blank(models.Transformer, self.settings)


def _blank(kind: type, config: Any, **make: int) -> Any:
    """A module of nnx whose parameters have shapes and no values yet."""
    definition, state = _abstract(kind, config, **make)
    return nnx.merge(definition, jax.tree.map(lambda x: x, state))  # a copy, of the trace at hand


@lru_cache
def _abstract(kind: type, config: Any, **make: int) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(partial(kind, config, **make)))


def _first(config: Any, plan: Plan, seed: int | None, key: Array) -> dict[str, Any]:
    """First values of the parameters of a plan under one name, (query.weight, query.bias)."""
    if seed is not None:
        made = initial(plan, seed)
    else:
        keys = jax.random.split(key, len(plan))
        made = {n: _DRAWN[p.kind](k, p.shape) for k, (n, p) in zip(keys, plan.items(), strict=True)}
    (held,) = _nested(config, made).values()
    return held


def _nested(config: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the config's dtype, by the words of their names."""
    dtype = jnp.dtype(DTYPES[config.dtype])
    with x64(config.dtype == "float64"):
        made = {tuple(name.split(".")): jnp.asarray(x, dtype) for name, x in weights.items()}
    return traverse_util.unflatten_dict(made)
