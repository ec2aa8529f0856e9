"""What a type checker knows of the public call, in a user's program under `mypy --strict`."""

from __future__ import annotations

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

import attn_core
from attn_core.api import Options

ROOT = Path(__file__).resolve().parent.parent
link_tree = runpy.run_path(str(ROOT / "tools" / "typecheck.py"))["link_tree"]

PROGRAM = """
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import attn_core
from attn_core import masks, scores

Floats = NDArray[np.float32]


def run(query: Floats, key: Floats, value: Floats, lse: bool) -> Floats:
    mask = masks.causal() & attn_core.mask(lambda b, h, q, k: (q - k < 256) | (k < 4))
    slopes = attn_core.operand(np.ones(8, np.float32))
    score = attn_core.score(lambda s, b, h, q, k: s - slopes[h] * abs(q - k))
    assert_type(mask, attn_core.Mask)
    assert_type(score.then(scores.softcap(5.0)), attn_core.Score)
    found = attn_core.attention(query, key, value, mask=mask, return_lse=True)
    assert_type(found, attn_core.AttentionOutput)
    assert_type(
        attn_core.attention(query, key, value, return_weights=True), attn_core.AttentionOutput
    )
    assert_type(attn_core.weights(query, key, heads=[0]), Floats)
    attn_core.attention(query, key, value, return_lse=lse)
    with attn_core.use(backend="numpy"):
        return attn_core.attention(query, key, value, mask=mask, score=score, scale=0.5)
"""

WRONG = """
import attn_core

attn_core.attention(1, 2, 3, is_causal=True)
attn_core.attention(1, 2, 3, layout=4)
attn_core.attention(1, 2, 3, score=4)
"""


def test_the_options_are_those_of_the_call() -> None:
    taken = inspect.signature(attn_core.attention).parameters
    named = {name for name, one in taken.items() if one.kind is one.KEYWORD_ONLY}
    assert set(Options.__annotations__) == named - {"return_lse", "return_weights"}


def test_a_users_program_is_typed(tmp_path: Path) -> None:
    link_tree(ROOT, tmp_path / "site")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--config-file=", "--cache-dir", str(tmp_path / "cache"), "program.py", "wrong.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout.splitlines()
    assert [line for line in told if line.startswith("program.py")] == []
    lines = {line.split(":")[1] for line in told if line.startswith("wrong.py") and "error" in line}
    assert lines == {"4", "5", "6"}, done.stdout + done.stderr
