"""The flag: which backend answers for NumPy arrays and layers, and which implementation.

Looked up in this order: the argument of the call, `attn_core.use(...)` (this thread, inside the
`with`), `config.set` or `config.load` (this process), the environment variables ATTN_CORE_BACKEND
and ATTN_CORE_IMPL. Framework arrays are always computed in their own framework. The flag is read
when a function is traced, so a function that is already compiled keeps its choice.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from attn_core.spec import IMPLEMENTATIONS

BACKENDS = ("numpy", "torch", "tf", "jax")
SETTINGS = ("backend", "impl")
_ALSO_CALLED = {"tensorflow": "tf", "keras": "tf", "flax": "jax"}

_process: dict[str, str | None] = {"backend": None, "impl": None}


class _Chosen(threading.local):
    """What `use` says in this thread; there from the start, as torch.compile guards on it."""

    def __init__(self) -> None:
        self.backend: str | None = None
        self.impl: str | None = None
        self.open: tuple[list[Any], ...] = ()  # [backend, impl] of each `with` that is open


_thread = _Chosen()


def nearest(name: Any, known: tuple[str, ...]) -> str:
    """ " Did you mean 'torch'?" where something known is close to `name`, else nothing."""
    said = str(name).lower()
    close = get_close_matches(_ALSO_CALLED.get(said, said), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def near(name: Any, known: str) -> bool:
    """Whether `name` is `known` misspelt: nearer than what `nearest` asks about."""
    return bool(get_close_matches(str(name).lower(), [known], cutoff=0.8))


def check_backend(name: Any) -> str:
    """`name`, if it names a backend."""
    if name in BACKENDS:
        return str(name)
    raise ValueError(
        f"`backend` must be one of {', '.join(BACKENDS)} (installed: {installed()}). "
        f"Got {name!r}.{nearest(name, BACKENDS)}"
    )


def check_impl(name: Any) -> str:
    """`name`, if it names an implementation or "auto"."""
    if name == "auto" or name in IMPLEMENTATIONS:
        return str(name)
    known = ("auto", *IMPLEMENTATIONS)
    raise ValueError(
        f"`impl` must be one of {', '.join(known)}. Got {name!r}.{nearest(name, known)}"
    )


def installed() -> str:
    """The backends whose framework can be found, without importing it."""
    from importlib.util import find_spec

    modules = {"numpy": "numpy", "torch": "torch", "tf": "tensorflow", "jax": "jax"}
    return ", ".join(name for name, module in modules.items() if find_spec(module) is not None)


_CHECKS = {"backend": check_backend, "impl": check_impl}
_VARIABLES = {"backend": "ATTN_CORE_BACKEND", "impl": "ATTN_CORE_IMPL"}


def get(setting: str) -> str | None:
    """The value in force for "backend" or "impl", None where nobody has said."""
    if setting not in ("backend", "impl"):
        raise ValueError(f'`setting` must be "backend" or "impl". Got {setting!r}.')
    chosen = getattr(_thread, setting)
    if chosen is None:
        chosen = _process[setting]
    if chosen is None:
        chosen = os.environ.get(_VARIABLES[setting]) or None
        if chosen is not None:
            try:
                _CHECKS[setting](chosen)
            except ValueError as error:
                raise ValueError(f"{_VARIABLES[setting]} of the environment: {error}") from None
    return chosen


def origin(setting: str) -> str | None:
    """Who said what `get` gives: "use", "config" or "environment"; None where nobody did."""
    if getattr(_thread, setting) is not None:
        return "use"
    if _process[setting] is not None:
        return "config"
    return "environment" if os.environ.get(_VARIABLES[setting]) else None


@contextmanager
def use(backend: str | None = None, impl: str | None = None) -> Iterator[None]:
    """Within the `with`, in this thread: NumPy arrays and layers go to `backend`, through `impl`.

    It belongs to the thread, not to a coroutine or generator: while one waits within the `with`
    (`await`, `yield`), others in the thread see the flag too. What is closed no longer counts, in
    whichever order that happens.

    Raises:
        ValueError: an unknown backend or implementation, with the nearest known one.

    Example::

        with attn_core.use(backend="jax"):
            out = attn_core.attention(query, key, value)    # NumPy in, JAX computes, NumPy out
    """
    if backend is not None:
        check_backend(backend)
    if impl is not None:
        check_impl(impl)
    said: list[Any] = [backend, impl]
    _reopen((*_thread.open, said))
    try:
        yield
    finally:
        # Not what was there before: coroutines may close in another order than they opened.
        _reopen(tuple([each for each in _thread.open if each is not said]))


def _reopen(said: tuple[list[Any], ...]) -> None:
    """These `with`s are open, and of each setting the innermost that names one is in force."""
    _thread.open = said
    _thread.backend = _thread.impl = None
    for backend, impl in said:
        if backend is not None:
            _thread.backend = backend
        if impl is not None:
            _thread.impl = impl


def set(**settings: str | None) -> None:
    """Choose for the whole process: `set(backend="jax", impl="reference")`, either or both.

    What is not named stays as it was; None clears a setting.

    Raises:
        TypeError: another setting than those.
        ValueError: an unknown backend or implementation, with the nearest known one.
    """
    for key in settings:
        if key not in SETTINGS:
            raise TypeError(
                f"`set` must be given only {' and '.join(SETTINGS)}. "
                f"Got {key!r}.{nearest(key, SETTINGS)}"
            )
    _process.update(
        {key: None if name is None else _CHECKS[key](name) for key, name in settings.items()}
    )


def load(source: str | Path | Mapping[str, Any]) -> None:
    """Choose for the whole process from a TOML, YAML or JSON file, or a mapping.

    The keys are `backend` and `impl`, at the top or in a table `attn_core`. YAML needs the extra
    `attn-core[yaml]`.

    Raises:
        ValueError: for an unknown key (with the nearest known one) or value, before anything
            is changed.
    """
    settings = dict(source) if isinstance(source, Mapping) else read(Path(source))
    if "attn_core" in settings:
        if len(settings) > 1 and isinstance(source, Mapping):
            stray = next(key for key in settings if key != "attn_core")
            raise ValueError(f"a config must hold its keys in one place. Got {stray!r} beside it.")
        settings = as_mapping(settings["attn_core"], "`attn_core` of a config")
    set(**settings_of(settings))


def settings_of(held: Mapping[str, Any]) -> dict[str, str | None]:
    """`backend` and `impl` as a config file's table `attn_core` has them, found to be such."""
    for key in held:
        if key not in SETTINGS:
            raise ValueError(
                f"a config must hold only {' and '.join(SETTINGS)}. "
                f"Got {key!r}.{nearest(key, SETTINGS)}"
            )
    return {key: None if name is None else _CHECKS[key](name) for key, name in held.items()}


def as_mapping(found: Any, what: str) -> dict[str, Any]:
    """`found`, if it is a mapping."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{what} must be a mapping. Got {type(found).__name__}.")
    return dict(found)


def read(path: Path) -> dict[str, Any]:
    """What a TOML, YAML or JSON file says, a mapping."""
    parse = _PARSERS.get(path.suffix)
    if parse is None:
        raise ValueError(
            f"a config must be a .toml, .yaml, .yml or .json file or a mapping. Got {path.name}."
        )
    try:
        found = parse(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be complete {path.suffix[1:].upper()}: {error}") from error
    return as_mapping(found, f"a config such as {path}")


def _toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _json(text: str) -> Any:
    import json

    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of pairs, none of whose keys comes twice: neither value would be the right one."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"each key must stand once. Got {key!r} twice.")
        found[key] = value
    return found


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "reading a YAML config needs PyYAML: pip install 'attn-core[yaml]'."
        ) from error

    class Loader(yaml.SafeLoader):
        """PyYAML follows YAML 1.1, in which 1e-6 is a word; here it is a number.

        Of a key that comes twice it would take the last value; here it is refused.
        """

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            _once([(key.value, None) for key in keys])
            return node

    number = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


_PARSERS = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}
