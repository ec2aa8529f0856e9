"""docs/FROM_TENSORFLOW.md and docs/SWITCH.md as written."""

from __future__ import annotations

import pages
import pytest

import attn_core

PAGE = "FROM_TENSORFLOW.md"
# TODO(issue 6): both run once the models of tf are here.
with_layers = pytest.mark.skipif(
    not hasattr(attn_core.backends.tf, "Transformer"), reason="tf has no models yet"
)


def test_the_page_without_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    pages.run(PAGE, "tf")
    monkeypatch.setenv("ATTN_CORE_BACKEND", "tf")
    pages.run("SWITCH.md", "any")


@with_layers
def test_the_page_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(pages.run(PAGE, "tf", "tf, layers")["layer"], "export_weights")
    monkeypatch.setenv("ATTN_CORE_BACKEND", "tf")
    assert hasattr(pages.run("SWITCH.md", "any", "any, layers")["model"], "export_weights")
