"""What `attn-core doctor` tells: what is installed, and which backends can be used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from attn_core import config

_PACKAGES = {"torch": "torch", "tf": "tensorflow", "jax": "jax", "numpy": "numpy"}


def lines() -> Iterator[str]:
    """A line to a finding; each backend is tried in a process of its own."""
    yield f"attn-core {version('attn-core')}, Python {sys.version.split()[0]}"
    for name in config.BACKENDS:
        found = _version(_PACKAGES[name])
        if found is None:
            yield f"  {name}: not installed; pip install 'attn-core[{name}]'"
            continue
        # In a process of its own: two frameworks are never imported into one.
        check = subprocess.run(
            [sys.executable, "-c", f"from attn_core import registry; registry.load({name!r})"],
            capture_output=True,
            text=True,
        )
        last = (check.stderr.strip().splitlines() or ["no message"])[-1]
        state = "ready" if check.returncode == 0 else f"broken: {last}"
        yield f"  {name}: {_PACKAGES[name]} {found}, {state}"
    triton = _version("triton")
    if triton and _version("tensorflow") and not triton.startswith(("3.4", "3.5", "3.6")):
        yield (
            f"  triton {triton} aborts a process that imported TensorFlow first (3.7 to 3.9 do); "
            "3.6.0 does not."
        )


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
