"""The Python of documentation pages, cut out as written.

The first line of a block says where it runs: `# torch`, `# tf`, `# jax`, or `# any` for each of
them under the flag. Blocks of a page follow one another.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run(page: str, head: str) -> dict[str, Any]:
    """What the blocks of a page with this first line leave behind."""
    text = (DOCS / page).read_text("utf-8")
    found = re.findall(r"^```python\n# (\w+)\n(.*?)^```", text, re.M | re.S)
    assert len(found) == text.count("```python\n"), f"a block of {page} says not where it runs"
    chosen = [code for name, code in found if name == head]
    assert chosen
    names: dict[str, Any] = {}
    for code in chosen:
        exec(compile(code, page, "exec"), names)
    return names
