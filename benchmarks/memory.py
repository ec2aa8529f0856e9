"""Memory: the most that a call holds beside its arguments and its results.

    temporaries = high-water mark during the call - resident before it - its results

Linux keeps the mark, and forgets it when asked (proc(5), clear_refs). A worker that measures is
started with the allocator told to give every large block back at once (`ALLOCATOR`): what an
earlier call had freed and the process kept would otherwise be taken again without being seen. The
call has been made once before, so that threads, compiled code and caches exist.

TensorFlow keeps what it frees whatever the allocator is told, so there a second call shows nothing:
its first call of full size is measured, after one of a sixteenth of the length. With unknown shapes
that is the same graph; with known ones it is another, and some 20 MB that TensorFlow sets up for a
new graph are counted with the temporaries.

XLA knows better than the kernel does: what it plans to allocate is asked of it, and the mark stands
beside that for comparison.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

ALLOCATOR = {
    # glibc would raise the threshold itself after the first large block is freed.
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak(run: Callable[[], object], results: int, *, first: bool = False) -> int:
    """Bytes of temporaries of one call, whose results take `results` bytes; never below 0.

    `first` measures the first call there is, others a second one.

    Raises:
        OSError: the system keeps no such mark, or does not let us reset it.
    """
    if sys.platform != "linux":
        raise OSError(f"peak memory must be measured on Linux, by its /proc. Got {sys.platform}.")
    if not first:
        run()
    gc.collect()
    _CLEAR.write_text("5")
    before = _read("VmRSS")
    held = run()
    most = _read("VmHWM")
    del held
    return max(most - before - results, 0)


def _read(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text("ascii"), re.M)
    if found is None:
        raise OSError(f"{_STATUS} must say {name}. Got no such line.")
    return int(found[1]) * 1024
