"""The Python of docs/LAYERS.md, as written."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "LAYERS.md"


def test_the_pages_python_runs() -> None:
    """The blocks follow one another, as a reader would type them."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 8
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "made" in names


def test_the_pages_toml_is_a_config(tmp_path: Path) -> None:
    from attn_core import TransformerConfig
    from attn_core.model.build import read_config

    (found,) = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    (tmp_path / "a.toml").write_text(found)
    assert TransformerConfig.load(tmp_path / "a.toml").positions == "rotary"
    assert read_config(tmp_path / "a.toml").backend == "torch"
