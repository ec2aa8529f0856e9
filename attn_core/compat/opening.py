"""Opening a door: a library that is missing is named, with what installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def opening(door: str, library: str, install: str) -> Iterator[None]:
    """Around the imports of a door.

    Raises:
        ImportError: `library` is missing, in our words, or fails to import, with its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ImportError(
            f"attn_core.compat.{door} needs {library}, which is not installed: "
            f"pip install {install}."
        ) from error
