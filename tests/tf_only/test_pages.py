"""docs/FROM_TENSORFLOW.md, docs/RECIPES.md and docs/SWITCH.md as written."""

from __future__ import annotations

import numpy as np
import pages
import pytest


def test_the_page() -> None:
    assert hasattr(pages.run("FROM_TENSORFLOW.md", "tf")["layer"], "export_weights")


def test_the_page_on_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CORE_BACKEND", "tf")
    held = pages.run("SWITCH.md", "any")
    assert type(held["model"]).__name__ == "Transformer"


def test_the_recipe_for_keras_hides_padding() -> None:
    model = pages.run("RECIPES.md", "tf")["model"]
    short, padded = (model(np.array([row])) for row in ([5, 6, 7], [5, 6, 7, 0]))
    np.testing.assert_allclose(short, padded[:, :3], atol=1e-5)
