"""docs/FROM_JAX.md, docs/RECIPES.md and docs/SWITCH.md as written."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pages
import pytest


# JAX before 0.9 says so of every mesh that leaves its kind of axes to it, as the page does.
@pytest.mark.filterwarnings("ignore:The default axis_types will change:DeprecationWarning")
def test_the_page() -> None:
    assert hasattr(pages.run("FROM_JAX.md", "jax")["layer"], "export_weights")


def test_the_page_on_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CORE_BACKEND", "jax")
    held = pages.run("SWITCH.md", "any")
    assert type(held["model"]).__name__ == "Transformer"


def test_the_recipe_for_flax() -> None:
    assert pages.run("RECIPES.md", "jax")["out"].shape == (2, 10, 64)


def test_what_the_readme_says_of_jax() -> None:
    """Its own block, and the flag with arrays of NumPy."""
    ours = [code for code in pages.readme() if re.search(r"import jax|use\(.*jax", code)]
    assert len(ours) == 2
    names: dict[str, Any] = {}
    exec(compile(ours[0], "README.md", "exec"), names)
    assert names["gradient"].shape == (2, 8, 128, 64)
    names |= {x: np.asarray(names[x]) for x in ("query", "key", "value")}
    exec(compile(ours[1], "README.md", "exec"), names)
    assert isinstance(names["out"], np.ndarray)
