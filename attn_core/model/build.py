"""`attn_core.build`: the layer or model of the framework that a config or the flag names."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from attn_core import config as flag
from attn_core import registry
from attn_core.model.config import ROOMS, AttentionConfig, Config
from attn_core.model.transformer import TransformerConfig


def build(config: Any, *, backend: str | None = None, seed: int = 0, **options: Any) -> Any:
    """The layer that an AttentionConfig, or the model that a TransformerConfig, describes.

    Args:
        config: either config; a TOML, YAML or JSON file, or a mapping, with the table `attention`
            or `transformer`, or with a model's or a layer's fields at the top.
        backend: "torch", "tf" or "jax". Left out, the config's own; where that is silent, the
            flag (`attn_core.use`, `attn_core.config`, ATTN_CORE_BACKEND).
        seed: of the first values: the same numbers in every framework.
        options: what else the framework's class takes, such as torch's `device`.

    Returns:
        torch.nn.Module, keras.layers.Layer or flax.nnx.Module: `MultiHeadAttention` or
        `Transformer` of that backend.

    Raises:
        ValueError: nobody names a backend, or a field of the config is wrong.
        ImportError: its framework is missing, with the extra to install; nothing has been built.

    Example::

        model = attn_core.build("model.toml", backend="torch", seed=1)
    """
    config = read_config(config)
    name = backend or config.backend or flag.get("backend")
    if name is None:
        raise ValueError(
            f"`backend` must be named to build a layer, one of {', '.join(ROOMS)}: in the call, in "
            "the config, with attn_core.use or attn_core.config, or as ATTN_CORE_BACKEND. Got none."
        )
    flag.check_backend(name)
    kind = "MultiHeadAttention" if isinstance(config, AttentionConfig) else "Transformer"
    return registry.layer(name, kind)(config, seed=seed, **options)


def read_config(source: Any) -> AttentionConfig | TransformerConfig:
    """Whichever config `source` is or holds."""
    if isinstance(source, (AttentionConfig, TransformerConfig)):
        return source
    if isinstance(source, Config) or not isinstance(source, (str, PathLike, Mapping)):
        raise TypeError(
            "`config` must be an AttentionConfig, a TransformerConfig, a path or a mapping. "
            f"Got {type(source).__name__}."
        )
    held = dict(source) if isinstance(source, Mapping) else flag.read(Path(source))
    tables = [kind for kind in (AttentionConfig, TransformerConfig) if kind.TABLE in held]
    if len(tables) == 2:
        raise ValueError(
            "a config must hold one of the tables `attention` and `transformer` to be built. "
            "Got both: load the one that is meant."
        )
    model = TransformerConfig in tables or (not tables and "kind" in held)
    return TransformerConfig.load(held) if model else AttentionConfig.load(held)
