"""The Python of documentation pages, cut out as written.

The first line of a block says where it runs: `# torch`, `# tf`, `# jax` (or a library on one of
them, `# keras`, `# flax`), or `# any` for each framework under the flag.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(page: str, head: str) -> list[str]:
    """The blocks of a page with this first line, of which there is one at least."""
    text = (DOCS / page).read_text("utf-8")
    found = re.findall(r"^```python\n# (\w+)\n(.*?)^```", text, re.M | re.S)
    assert len(found) == text.count("```python\n"), f"a block of {page} says not where it runs"
    chosen = [code for name, code in found if name == head]
    assert chosen, head
    return chosen


def run(page: str, head: str) -> dict[str, Any]:
    """What those blocks, which follow one another, leave behind."""
    names: dict[str, Any] = {}
    for code in blocks(page, head):
        exec(compile(code, page, "exec"), names)
    return names


def readme() -> list[str]:
    """The blocks of Python in the README, which do not say where they run."""
    text = (DOCS.parent / "README.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
