"""Public functions say in their docstrings what they raise."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

import attn_core
from attn_core import compat, config, conformance, masks, scores

NOTHING_TO_RAISE = {"causal", "exp", "log", "tanh", "where", "minimum", "maximum"}


def public() -> list[Any]:
    found = []
    rooms: tuple[ModuleType, ...] = (attn_core, masks, scores, compat, conformance)
    for room in rooms:
        for name in room.__all__:
            function = getattr(room, name)
            if inspect.isfunction(function) and name not in NOTHING_TO_RAISE:
                found.append(pytest.param(function, id=f"{room.__name__}.{name}"))
    for function in (config.set, config.load):
        found.append(pytest.param(function, id=f"attn_core.config.{function.__name__}"))
    return found


@pytest.mark.parametrize("function", public())
def test_what_is_raised_is_said(function: Any) -> None:
    said = inspect.getdoc(function) or ""
    assert "Raises:\n" in said
    assert "Error: " in said.partition("Raises:\n")[2]
