"""What torch's allocator held while a call ran."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch._C._profiler import _EventType


def peak(call: Any) -> int:
    """Most bytes that torch's allocator held at once, beyond those from before."""
    call()
    gc.collect()  # what that call left in a cycle is not to be freed while the next one is watched
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    events = []

    def walk(nodes: Any) -> None:
        for event in nodes:
            if event.tag == _EventType.Allocation:
                events.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(profile.profiler.kineto_results.experimental_event_tree())
    del kept
    now = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        most = max(most, now)
    return most
