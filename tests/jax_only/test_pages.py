"""docs/FROM_JAX.md, docs/RECIPES.md and docs/SWITCH.md as written."""

from __future__ import annotations

import pages
import pytest


def test_the_page() -> None:
    assert hasattr(pages.run("FROM_JAX.md", "jax")["layer"], "export_weights")


def test_the_page_on_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CORE_BACKEND", "jax")
    held = pages.run("SWITCH.md", "any")
    assert type(held["model"]).__name__ == "Transformer"


def test_the_recipe_for_flax() -> None:
    assert pages.run("RECIPES.md", "jax")["out"].shape == (2, 10, 64)
