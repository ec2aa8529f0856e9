"""Memory: the most that a call holds beside its arguments and its results.

    temporaries = high-water mark during the call - resident before it - its results

Linux keeps the mark, and forgets it when asked (proc(5), clear_refs). A worker that measures is
started with the allocator told to give every large block back at once (`ALLOCATOR`): what an
earlier call had freed and the process kept would otherwise be taken again without being seen. The
call has been made once before, so that threads, compiled code and caches exist.

XLA and TensorFlow know better than the kernel does, and the mark stands beside what they say for
comparison. XLA tells what it plans to allocate. TensorFlow takes memory from a pool of its own and
gives none back, whatever the allocator is told: what a call takes again there the kernel does not
see, and the mark moves by what happens to be missing. So its pool is asked how much of it was in
use at most, less what was so before the call and what its results take. It is told to keep all
tensors (`ALLOCATOR`), which otherwise are only those of 256 KiB and more, and that is all that is
changed: operations are the same. A block may have been handed out that is larger than what was
asked for, so the account errs upwards by up to that, and the least of `CALLS` calls stands.
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
    "TF_CPU_ALLOCATOR_USE_BFC": "true",
}
CALLS = 3
"""Calls of which a pool that may hand out too much is asked about."""
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


def pooled(
    run: Callable[[], object], results: int, reset: Callable[[], int], most: Callable[[], int]
) -> int:
    """Bytes of temporaries of one call, by a pool's own account; never below 0.

    Args:
        results: bytes of what the call returns.
        reset: forgets the most, and tells the bytes that are in use.
        most: tells the most bytes that have been in use since.
    """
    found = []
    for _ in range(CALLS):
        gc.collect()
        before = reset()
        held = run()
        found.append(most() - before - results)
        del held
    return max(min(found), 0)


def _read(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text("ascii"), re.M)
    if found is None:
        raise OSError(f"{_STATUS} must say {name}. Got no such line.")
    return int(found[1]) * 1024
