"""docs/FROM_TORCH.md, docs/RECIPES.md, docs/SWITCH.md and docs/WEIGHTS.md as written."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest
import torch

import attn_core


@pytest.mark.filterwarnings("ignore")  # torch's own, of its exporters
def test_the_page() -> None:
    assert pages.run("FROM_TORCH.md", "torch")["out"].shape == (2, 10, 32)


def test_the_page_on_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CORE_BACKEND", "torch")
    held = pages.run("SWITCH.md", "any")
    assert type(held["model"]).__module__ == "attn_core.backends.torch.models"


def test_the_pages_toml_is_a_flag(tmp_path: Path) -> None:
    _, _, rest = (pages.DOCS / "SWITCH.md").read_text("utf-8").partition("```toml\n")
    (tmp_path / "config.toml").write_text(rest.partition("```")[0])
    attn_core.config.load(tmp_path / "config.toml")
    try:
        assert attn_core.config.get("backend") == "jax"
    finally:
        attn_core.config.set(backend=None)


def test_the_page_on_weights() -> None:
    held = pages.run("WEIGHTS.md", "torch")
    assert held["layer"].config == held["converted"].config


def test_the_page_of_recipes() -> None:
    held = pages.run("RECIPES.md", "torch")
    # The picture that it prints of a window of four.
    assert held["seen"].sum(-1).tolist() == [1, 2, 3, 4, 4, 4]


def test_the_recipe_for_transformers() -> None:
    pytest.importorskip("transformers", minversion="5")
    held = pages.run("RECIPES.md", "transformers")
    assert held["model"].config._attn_implementation == "attn_core"


def test_what_the_readme_says_of_torch() -> None:
    """Its Python as written, but for what loads another framework into this process."""
    every = pages.readme()
    ours = [code for code in every if not re.search(r"jax|tensorflow|\.tf\b", code)]
    assert (len(every), len(ours)) == (9, 4)
    array = torch.ones(8, requires_grad=True)
    names = {
        "array": array,
        "ids": torch.arange(128).repeat(2, 1) // 50,
        "bias": torch.zeros(128, 128),
        "sinks": torch.zeros(8),
        "lengths": torch.tensor([128, 70]),
        "seed": 7,
    }
    for code in ours:
        exec(compile(code, "README.md", "exec"), names)
    names["out"].sum().backward()
    assert array.grad is not None
    assert bool(array.grad.abs().min() > 0)
