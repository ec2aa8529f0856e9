"""`attn_core.build`: the layer or model of the framework that a config or the flag names."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from attn_core import config as flag
from attn_core import registry
from attn_core.model.additive import AdditiveConfig
from attn_core.model.config import ROOMS, AttentionConfig
from attn_core.model.transformer import TransformerConfig


def build(config: Any, *, backend: str | None = None, seed: int = 0, **options: Any) -> Any:
    """The layer or model that a config describes, in the framework that it or the flag names.

    Args:
        config: AttentionConfig, AdditiveConfig or TransformerConfig; or a TOML, YAML or JSON file,
            or a mapping, with the table `attention`, `additive` or `transformer`, or with the
            fields of a layer or a model at the top: as `AttentionConfig.load` reads them, with
            the table `attn_core` beside them.
        backend: "torch", "tf" or "jax". Left out, the config's own; where that is silent, the
            flag (`attn_core.use`, `attn_core.config`, ATTN_CORE_BACKEND).
        seed: of the first values: the same numbers in every framework.
        options: what else the framework's class takes, such as torch's `device`.

    Returns:
        torch.nn.Module, keras.layers.Layer or flax.nnx.Module: `MultiHeadAttention`,
        `AdditiveAttention` or `Transformer` of that backend.

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
    return registry.layer(name, _CLASSES[type(config)])(config, seed=seed, **options)


_CLASSES: dict[Any, str] = {
    AttentionConfig: "MultiHeadAttention",
    AdditiveConfig: "AdditiveAttention",
    TransformerConfig: "Transformer",
}


def read_config(source: Any) -> Any:
    """Whichever config `source` is or holds, as its own `load` reads it."""
    if type(source) in _CLASSES:
        return source
    if not isinstance(source, (str, PathLike, Mapping)):
        raise TypeError(
            "`config` must be an AttentionConfig, an AdditiveConfig, a TransformerConfig, a path "
            f"or a mapping. Got {type(source).__name__}."
        )
    held = dict(source) if isinstance(source, Mapping) else flag.read(Path(source))
    return _config_in(held)


def _config_in(held: dict[str, Any]) -> Any:
    known = tuple([kind.TABLE for kind in _CLASSES])
    tables = [kind for kind in _CLASSES if kind.TABLE in held]
    if len(tables) > 1:
        raise ValueError(
            f"a config must hold one of the tables {', '.join(known)} to be built. Got "
            f"{' and '.join(kind.TABLE for kind in tables)}: load the one that is meant."
        )
    if tables:
        return tables[0].load(held)
    for key, value in held.items():
        close = flag.nearest(key, known)
        if close and isinstance(value, Mapping):
            raise ValueError(
                f"a config must hold one of the tables {', '.join(known)}. Got {key!r}.{close}"
            )
    return TransformerConfig.load(held) if "kind" in held else AttentionConfig.load(held)
