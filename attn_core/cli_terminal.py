"""What commands share: an error as one line and an exit status, a bar, the names of backends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attn_core import config

_WIDE = 400
"""Columns that no table fills."""


def backends(incomplete: str) -> list[str]:
    return [name for name in config.BACKENDS if name.startswith(incomplete)]


def page() -> Console:
    """Where tables go: in a pipe or a file, where nothing wraps, as wide as they are."""
    screen = Console()
    return screen if screen.is_terminal or "COLUMNS" in os.environ else Console(width=_WIDE)


def refused(error: Exception, status: int = 2) -> typer.Exit:
    """What to raise when an error ends a command: its message has been said."""
    Console(stderr=True).print(f"attn-core: {error}", markup=False, soft_wrap=True)
    return typer.Exit(status)


@contextmanager
def told(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """End with that exit status where one of these is raised, and say its message."""
    try:
        yield
    except kinds as error:
        raise refused(error, status) from error


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
