"""docs/FROM_TENSORFLOW.md and docs/SWITCH.md as written."""

from __future__ import annotations

import pages
import pytest


def test_the_page() -> None:
    assert hasattr(pages.run("FROM_TENSORFLOW.md", "tf")["layer"], "export_weights")


def test_the_page_on_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CORE_BACKEND", "tf")
    held = pages.run("SWITCH.md", "any")
    assert type(held["model"]).__name__ == "Transformer"
