"""The blocks of docs/COMPAT.md, by the library that their first line names."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "COMPAT.md"


def blocks(library: str) -> list[str]:
    found = re.findall(r"```python\n# (\w+)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    chosen = [code for name, code in found if name == library]
    assert chosen, library
    return chosen
