"""Locks and a thread of this process, of which a child that is forked has its own.

A fork copies a lock as it stands: one that another thread holds is held for good in the child,
where there is no such thread; and of a pool of threads it copies all but the threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakSet

Value = TypeVar("Value")


class Alone:
    """A lock.

    Args:
        make: threading.Lock or RLock.
    """

    def __init__(self, make: Callable[[], Any] = Lock) -> None:
        self._make = make
        self._lock = make()
        _locks.add(self)

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:  # and lets go of this very one, if its thread forks in between
            yield

    def anew(self) -> None:
        self._lock = self._make()


class Elsewhere:
    """A thread that lives as long as the process, and is there from the first call on.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Alone()
        _threads.add(self)

    def call(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """What the function returns or raises, run in that thread: for all callers in turn."""
        with self._lock.held():
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, self._name)
            future = self._pool.submit(function, *arguments)
        return future.result()

    def anew(self) -> None:
        self._pool = None


_locks: WeakSet[Alone] = WeakSet()
_threads: WeakSet[Elsewhere] = WeakSet()


def _forked() -> None:
    each: Any
    for each in (*_locks, *_threads):
        each.anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
