"""Type-check the package under its real import names.

Type checkers do not follow setuptools' package-dir, so `attn_core.backends` is nowhere to be found
for them. This makes a tree of links, build/types/attn_core, in which every folder stands where it
will be imported from, and runs mypy there. Extra arguments go to mypy.

    python tools/typecheck.py [mypy arguments]
"""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "types"


def link_tree(root: Path, tree: Path) -> None:
    """Build `tree` afresh from the package-dir table of `root`/pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    table: dict[str, str] = project["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(tree, ignore_errors=True)
    for package, folder in sorted(table.items()):  # a parent comes before its children
        target = tree.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for entry in sorted((root / folder).iterdir()):
            if entry.name != "__pycache__":
                (target / entry.name).symlink_to(entry)


def main(arguments: list[str]) -> int:
    link_tree(ROOT, TREE)
    command = [sys.executable, "-m", "mypy"]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "attn_core", *arguments]
    return subprocess.run(command, cwd=TREE, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
