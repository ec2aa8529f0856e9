"""What torch hands over to the kernels compiles as a launch specialises it, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "launches.py"
SHARED = 232_448
"""Bytes of shared memory that a program may take there."""


def test_every_launch_compiles_for_hopper() -> None:
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "90"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    kernels = defaultdict(set)
    for line in map(json.loads, run.stdout.splitlines()):
        kernels[line["case"]].add(line["kernel"])
        assert line["shared"] <= SHARED
    both = {"schedule", "forward", "delta", "d_keys", "d_query"}
    assert kernels["one of each"] == both
    assert kernels["odd sizes"] == {*both, "facts"}
    assert kernels["decode"] == {*both, "facts", "combine"}
    assert kernels["everything"] == {*both, "d_bias"}
    assert kernels["fused"] == {"schedule", "forward", "delta", "d_keys", "d_bias"}
