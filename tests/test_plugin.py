"""The pytest plugin, in a project of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SUBJECT = """
import numpy as np
from attn_core.conformance import subject

@subject("numpy")
def mine(query, key, value, mask=None, scale=None):
    group = query.shape[1] // key.shape[1]
    key, value = [np.repeat(x, group, 1).astype(query.dtype) for x in (key, value)]
    s = scale * (query @ key.swapaxes(-1, -2))
    if mask is not None:
        s = np.where({mask}, s, -np.inf)
    with np.errstate(all="ignore"):
        m = s.max(-1, keepdims=True, initial=-1e30)
        e = np.exp(s - m)
        total = e.sum(-1, keepdims=True)
        return ((e / np.where(total == 0, 1, total)) @ value).astype(query.dtype)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SUBJECT.replace("{mask}", "mask"))
    (tmp_path / "wrong.py").write_text(SUBJECT.replace("{mask}", "~mask"))
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_a_case_is_a_test_and_what_is_not_offered_is_skipped(project: Path) -> None:
    done = run(project, "--attn-subject", "mine:mine", "-rs", "-k", "mask-c or sinks or plain")
    assert done.returncode == 0, done.stdout
    assert "not offered: sinks" in done.stdout
    assert " passed" in done.stdout
    listed = run(project, "--attn-subject", "mine:mine", "--collect-only", "-q")
    assert "attn::mine:mine::eager::mask-causal" in listed.stdout


def test_a_wrong_subject_fails_with_the_cause(project: Path) -> None:
    done = run(project, "--attn-subject", "wrong:mine", "-k", "mask-window")
    assert done.returncode == 1
    assert "looks like: mask inverted (True = hidden)" in done.stdout
    assert "of what is allowed, first at [" in done.stdout


def test_misuse_is_said_before_anything_runs(project: Path) -> None:
    done = run(project, "--attn-subject", "mine:mine", "--attn-tier", "smoky")
    assert done.returncode == 4
    assert "`tier` must be one of" in done.stderr + done.stdout


def test_it_is_silent_where_it_is_not_asked_for(project: Path) -> None:
    (project / "test_own.py").write_text("def test_own():\n    pass\n")
    done = run(project, "-q")
    assert done.returncode == 0
    assert "1 passed" in done.stdout


def test_a_project_needs_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SUBJECT.replace("{mask}", "mask"))
    script = Path(sys.executable).with_name("pytest")
    command = [str(script), "-p", "no:cacheprovider", "--attn-subject", "mine:mine", "-k", "plain"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    command[4] = "mine:mien"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4
    assert "mine must have a subject 'mien'. Got none. Did you mean 'mine'?" in done.stderr


def test_it_runs_in_parallel_under_xdist(project: Path) -> None:
    done = run(project, "--attn-subject", "mine:mine", "-n", "2", "-k", "mask-", "-v")
    assert done.returncode == 0, done.stdout
    assert "[gw0]" in done.stdout
    assert "[gw1]" in done.stdout
    alone = run(project, "--attn-subject", "mine:mine", "-k", "mask-", "-q")
    assert "14 passed, 1 skipped" in done.stdout
    assert "14 passed, 1 skipped" in alone.stdout
