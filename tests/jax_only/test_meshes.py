"""Arrays that are spread over devices: `tests/jax_meshes.py` says what is called, and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "jax_meshes.py"
FLAG = "--xla_force_host_platform_device_count=4"


@pytest.mark.parametrize("where", ["shard_map", "explicit", "auto", "older"])
def test_arrays_on_four_devices(where: str) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), where],
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}",
            "JAX_USE_SHARDY_PARTITIONER": str(where != "older"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [f"{name}: {error}" for name, error in found if error is not None]
    assert not wrong, "\n".join(wrong)
    assert found
