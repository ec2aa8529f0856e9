"""docs/FROM_TENSORFLOW.md, docs/RECIPES.md and docs/SWITCH.md as written."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pages
import pytest

import attn_core


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


def test_what_the_readme_says_of_tensorflow() -> None:
    ours = [code for code in pages.readme() if re.search(r"tensorflow|\.tf\b", code)]
    assert len(ours) == 2
    names: dict[str, Any] = {}
    exec(compile(ours[0], "README.md", "exec"), names)
    q, k, v = (names[x] for x in ("query", "key", "value"))
    names |= {"q": q, "k": k, "v": v, "mask": np.tri(128, dtype=bool)}
    exec(compile(ours[1], "README.md", "exec"), names)
    assert names["out"].shape == q.shape
    # Causal here as there.
    attended = attn_core.attention(q, k, v, mask=attn_core.masks.causal())
    np.testing.assert_allclose(names["out"], attended, atol=1e-5)
