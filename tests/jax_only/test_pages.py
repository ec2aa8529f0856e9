"""docs/FROM_JAX.md and docs/SWITCH.md as written."""

from __future__ import annotations

import pages
import pytest

import attn_core

PAGE = "FROM_JAX.md"
# TODO(issue 6): both run once the models of jax are here.
with_layers = pytest.mark.skipif(
    not hasattr(attn_core.backends.jax, "Transformer"), reason="jax has no models yet"
)


def test_the_page_without_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    pages.run(PAGE, "jax")
    monkeypatch.setenv("ATTN_CORE_BACKEND", "jax")
    pages.run("SWITCH.md", "any")


@with_layers
def test_the_page_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(pages.run(PAGE, "jax", "jax, layers")["layer"], "export_weights")
    monkeypatch.setenv("ATTN_CORE_BACKEND", "jax")
    assert hasattr(pages.run("SWITCH.md", "any", "any, layers")["model"], "export_weights")
