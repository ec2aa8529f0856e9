"""The backends, by name: attn_core.backends.torch is loaded when it is first spoken of."""

from typing import Any

if __name__ == "backends":
    raise ImportError(
        "`backends` must be imported as attn_core.backends. Got a bare import of `backends`; "
        "install the package (pip install -e .) instead of putting its source folder on sys.path."
    )


def __getattr__(name: str) -> Any:
    from attn_core import config, registry

    if name in config.BACKENDS:
        return registry.load(name)
    if name == "keras":
        raise AttributeError(
            "attn_core.backends.keras must be imported by name, as in `from "
            "attn_core.backends.keras import MultiHeadAttention`. Got an attribute."
        )
    raise AttributeError(
        f"attn_core.backends has {', '.join(config.BACKENDS)}. "
        f"Got {name!r}.{config.nearest(name, config.BACKENDS)}"
    )
