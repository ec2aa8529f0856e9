"""What is made on a device once and read by every later call, from any stream and in CUDA graphs.

A schedule of tiles that sizes alone have a say in, a copy of what the host holds: they are the same
in every layer and in every step, and making them costs launches. Three things could go wrong:

    another stream       might read before there is something to read. So what is kept is made on a
                         stream of its own, and the host waits for that stream, which has nothing
                         else to do: once for every content, and no queue of yours is emptied
    memory let go        is given to others while a kernel still reads it. So the allocator is told
                         of each stream that reads (`record_stream`), once
    memory of a graph    is written by its replays. While torch.compile warms up for one, whatever
                         its thread allocates is of that kind. So it is made in another thread, one
                         for all
    a graph, captured    reads the same memory as often as it is replayed. So what a capture has
                         read is never let go (`PINNED` bytes of it at most)

While a graph is captured nothing can be made beside it, and what is made in it is its own: what is
not there by then becomes part of the graph, is right in every replay, and is not kept. A call
before the capture, which torch asks for anyway, has it made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from threading import local
from typing import Any, TypeVar

import torch

from attn_core.backends.torch.forks import Alone, Elsewhere

Value = TypeVar("Value")

PINNED = 2**28
"""Bytes that captured graphs may pin; what would be more is made in the graph."""


class _Entry:
    """A tensor or a tuple of tensors, and the streams that the allocator knows to read it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.tensors = (value,) if isinstance(value, torch.Tensor) else tuple(value)
        self.readers: set[int] = set()

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)


class Kept:
    """Values by key, those used last.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._pinned: dict[Hashable, _Entry] = {}
        self._lock = Alone()

    def of(self, key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
        """What `make()` gives on this device, a tensor or a tuple of them, made once for a key."""
        if capturing(device):
            found = self._captured(key, device)
            if found is not None:
                return found
            return make()
        entry = self._found(key, device)
        if entry is None:
            entry = _Entry(apart(device, make))
            with self._lock.held():
                self._entries[key, device] = entry
                while len(self._entries) > self.most:
                    self._entries.popitem(last=False)
        _read(entry, device)
        value: Value = entry.value
        return value

    def clear(self) -> None:
        """Let all of it go that no graph reads."""
        with self._lock.held():
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries) + len(self._pinned)

    def _found(self, key: Hashable, device: torch.device) -> _Entry | None:
        with self._lock.held():
            if (key, device) in self._pinned:
                return self._pinned[key, device]
            entry = self._entries.get((key, device))
            if entry is not None:
                self._entries.move_to_end((key, device))
            return entry

    def _captured(self, key: Hashable, device: torch.device) -> Any:
        """What a graph may read from now on; None where there is nothing, or no room for it."""
        entry = self._found(key, device)
        if entry is None:
            return None
        with self._lock.held():
            if (key, device) not in self._pinned:
                if _held() + entry.bytes > PINNED:
                    return None
                _pins[id(entry)] = entry
                self._pinned[key, device] = entry
                self._entries.pop((key, device), None)
        return entry.value


_pins: dict[int, _Entry] = {}


def _held() -> int:
    return sum(entry.bytes for entry in _pins.values())


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


def apart(device: torch.device, make: Callable[[], Value]) -> Value:
    """What `make()` gives, made on a stream and in a thread of its own, complete on return."""
    if device.type != "cuda":
        with torch.inference_mode(False):  # it outlives whoever asked first
            return make()
    if getattr(_here, "alone", False):
        return _alone(device, make)
    return _other.call(_alone, device, make)


_here = local()
_other = Elsewhere("attn-core-kept")


def _alone(device: torch.device, make: Callable[[], Value]) -> Value:
    _here.alone = True  # what is made of other things that are kept makes them here, too
    stream = _stream(device)
    # A thread begins on device 0. Of a stream alone torch would go back there, and so begin to use
    # it, which takes half a GB of a GPU that another process may have; of a device it would not.
    with torch.cuda.device(device), torch.cuda.stream(stream):
        value = make()
    stream.synchronize()
    return value


@lru_cache(maxsize=64)
def _stream(device: torch.device) -> Any:
    # Before what waits on others: there is little to do, and a host waits for it.
    return torch.cuda.Stream(device, priority=-1)


def _read(entry: _Entry, device: torch.device) -> None:
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    if stream.cuda_stream not in entry.readers:
        for x in entry.tensors:
            x.record_stream(stream)
        entry.readers.add(stream.cuda_stream)
