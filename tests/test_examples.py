"""The examples, each run briefly, as a reader would run it: in a process of its own."""

from __future__ import annotations

import collections
import datetime
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import dates
import numpy as np
import pytest

import attn_core
from attn_core.model.parameters import parameters

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODULE = {"torch": "torch", "tf": "tensorflow", "jax": "jax"}
# TensorFlow imports JAX itself, where it is installed.
STRANGERS = {"torch": {"tensorflow", "jax"}, "tf": {"torch"}, "jax": {"tensorflow", "torch"}}

each_framework = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(find_spec(module) is None, reason=f"no {module}")
        )
        for name, module in MODULE.items()
    ],
)

# What a process has loaded, written as the last line.
LOADED = """
import json, runpy, sys
sys.path.insert(0, {folder!r})
sys.argv = {argv!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted({{m.split(".")[0] for m in sys.modules}})))
"""


# As JAX's unit tests are compiled, where few steps are run: sixty take longer then. The Makefile
# says which flags XLA knows here; these it has known for long.
PLAIN_CODE = {
    "XLA_FLAGS": os.environ.get("PLAIN_CODE")
    or "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
}


def run(name: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *[str(word) for word in words]]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def is_picture(path: Path) -> bool:
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


@each_framework
def test_dates(backend: str, tmp_path: Path) -> None:
    short = ("--steps", 2, "--size", 16, "--learnt", 400, "--judged", 4, "--out", tmp_path)
    done = run("dates", "--backend", backend, *short, **PLAIN_CODE)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+\.\d\d% of 4 held-out dates exact, after 2 steps", done.stdout)
    loaded = attn_core.load_weights(tmp_path / "dates.safetensors")
    assert loaded.config.kind == "encoder-decoder"
    assert set(loaded.weights) == set(parameters(loaded.config))
    assert is_picture(tmp_path / "dates.png")


@each_framework
def test_digits_are_learnt_in_the_framework_that_the_flag_names(
    backend: str, tmp_path: Path
) -> None:
    """Sixty steps beat chance by far, and no other framework comes into the process."""
    argv = [str(EXAMPLES / "digits.py"), "--steps", "60", "--out", str(tmp_path)]
    code = LOADED.format(folder=str(EXAMPLES), argv=argv)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ATTN_CORE_BACKEND": backend},
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"([\d.]+)% of 360 held-out digits, after 60 steps", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) > 50
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert MODULE[backend] in loaded
    assert not loaded & STRANGERS[backend]
    assert attn_core.load_weights(tmp_path / "digits.safetensors").config.classes == 10
    assert is_picture(tmp_path / "digits.png")


def same_run(out: Path, *words: object, **environment: str) -> tuple[str, ...]:
    """In every framework that is installed: the losses in the picture's title, first and last."""
    names = [name for name, module in MODULE.items() if find_spec(module)]
    backends = [word for name in names for word in ("--backend", name)]
    done = run("same_run", *backends, *words, "--out", out, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same run: worst" in done.stdout
    assert done.stdout.count("continued in") == len(names)
    assert is_picture(out / "same_run.png")
    found = re.search(r"(\d+) steps, loss ([\d.]+) to ([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return found.groups()


some_framework = pytest.mark.skipif(not any(map(find_spec, MODULE.values())), reason="no framework")


@some_framework
def test_a_run_is_the_same_and_continues_from_its_checkpoint(tmp_path: Path) -> None:
    assert same_run(tmp_path, "--steps", 4, **PLAIN_CODE)[0] == "4"


@pytest.mark.slow
@some_framework
def test_three_hundred_steps_are_the_same_run(tmp_path: Path) -> None:
    """The example as it stands: to 1e-4 at every step, while the loss falls by half and more."""
    steps, first, last = same_run(tmp_path)
    assert steps == "300"
    assert float(last) < float(first) / 2


@pytest.mark.parametrize("name", ["dates", "digits", "same_run"])
def test_what_is_missing_is_said_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    done = run(name, "--backend", "numpy", "--out", tmp_path)
    assert done.returncode == 1
    assert "backend 'numpy' has no Transformer." in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_flag_the_reader_is_told_of_it(tmp_path: Path) -> None:
    done = run("digits", "--out", tmp_path, ATTN_CORE_BACKEND="")
    assert done.returncode == 1
    assert "`backend` must be named" in done.stderr


# The data ---------------------------------------------------------------------------------------


def test_no_text_stands_for_two_days_and_every_text_fits() -> None:
    """All languages, all formats, every day of a leap year."""
    first = (datetime.date(2024, 1, 1) - dates.FIRST).days
    meant = collections.defaultdict(set)
    for day in range(first, first + 366):
        for language in dates.LANGUAGES:
            for form in dates.FORMATS:
                meant[dates.written(day, language, form)].add(day)
    assert [text for text, days in meant.items() if len(days) > 1] == []
    assert max(map(len, meant)) <= dates.WIDTHS[-1]
    assert all("2024" in text for text in meant)


def test_held_out_days_are_never_learnt() -> None:
    rng = np.random.default_rng(0)
    learnt, held_out = dates.draw(3000, False, rng), dates.draw(300, True, rng)
    assert not set(learnt.isos) & set(held_out.isos)
    days = [(datetime.date.fromisoformat(iso) - dates.FIRST).days for iso in held_out.isos]
    assert all(day % dates.EVERY == 0 for day in days)


def test_batches_hold_what_the_decoder_is_to_write_one_place_later() -> None:
    found = dates.draw(200, False, np.random.default_rng(1))
    letters = dates.Letters(found.texts)
    pairs = set(zip(found.texts, found.isos, strict=True))
    back = {number: letter for letter, number in letters.numbers.items()}
    seen = 0
    stream = dates.batches(letters, found, 16, 0)
    for _ in range(9):
        told, targets = next(stream)
        assert (told["given"][:, 0] == dates.START).all()
        assert (told["given"][:, 1:] == targets[:, :-1]).all()
        for row, length, wanted in zip(
            told["source"], told["source_lengths"], targets, strict=True
        ):
            text = "".join(back[token] for token in row[:length])
            assert (row[length:] == dates.PADDING).all()
            assert (text, "".join(dates.TARGET[i] for i in wanted)) in pairs
            seen += 1
    assert seen == 144
