"""What `attn-core doctor` tells: what is installed, and which backends can be used."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from attn_core import config

_PACKAGES = {"torch": "torch", "tf": "tensorflow", "jax": "jax", "numpy": "numpy"}
_WORKSHOP = ("dev", "bench")
"""Extras for working on the package: nothing that it does for users needs them."""


def lines() -> Iterator[str]:
    """A line to a finding; each backend is tried in a process of its own."""
    yield f"attn-core {version('attn-core')}, Python {sys.version.split()[0]}"
    for name in config.BACKENDS:
        found = _version(_PACKAGES[name])
        if found is None:
            yield f"  {name}: not installed; pip install 'attn-core[{name}]'"
            continue
        # In a process of its own: two frameworks are never imported into one.
        broken, _ = _tried(f"from attn_core import registry; registry.load({name!r})")
        state = f"broken: {broken}" if broken else "ready"
        yield f"  {name}: {_PACKAGES[name]} {found}, {state}"
        if name == "torch" and not broken:
            yield from _kernels()
    yield from _old()
    triton = _version("triton")
    if triton and _version("tensorflow") and _numbers(triton) >= (3, 7):
        yield (
            f"  triton {triton} aborts a process that imported TensorFlow first (3.7 to 3.9 do); "
            "3.6.0 does not."
        )


def _old() -> Iterator[str]:
    """What is older than the lower bounds of the package, which pip checks for extras alone.

    What only extras for working on it ask for is nothing that a user has to have.
    """
    bounds: dict[str, str] = {}
    for line in requires("attn-core") or ():
        bound, extra = re.match(r"([\w-]+)>=([\d.]+)", line), re.search(r"extra == \W(\w+)", line)
        if bound and not (extra and extra[1] in _WORKSHOP):
            bounds[bound[1]] = bound[2]
    for name, least in bounds.items():
        here = _version(name)
        if here is not None and _numbers(here) < _numbers(least):
            yield f"  {name} {here} is older than {least}, the oldest that is tried: make it newer."


def _numbers(found: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 10, 0) of 2.10.0+cpu."""
    return tuple(int(n) for n in re.findall(r"\d+", re.sub(r"[^\d.].*", "", found)))


def _kernels() -> Iterator[str]:
    """What becomes of `impl="triton"`: whether kernels run here, and what to beware of."""
    broken, said = _tried(
        "from attn_core.backends.torch import probe; print(*probe.lines(), sep='\\n')"
    )
    for line in [f"triton: broken: {broken}"] if broken else said:
        yield f"    {line}"


def _tried(code: str) -> tuple[str, list[str]]:
    """What was wrong, "" where nothing was, and the lines that were printed."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
    return (last if ran.returncode else ""), ran.stdout.splitlines()


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
