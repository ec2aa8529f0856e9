"""The floor under a benchmark takes as much in a turn as the implementation does."""

from __future__ import annotations

from attn_core.backends.tf import chunked_loops, chunked_narrow, chunked_runs
from attn_core.benchmarks import tf_calls


def test_turns_are_those_of_the_backend() -> None:
    assert tf_calls.RUN == chunked_runs.BLOCK
    for room in (chunked_narrow.AT_ONCE, chunked_runs.AT_ONCE):
        assert (room, chunked_loops.SIDE_BY_SIDE) == tf_calls.AT_ONCE
