"""What a forked child does not inherit: locks that another thread holds, and threads.

Each test forks in a process of its own, and its child has a deadline: SIGALRM ends it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from threading import get_ident, main_thread

import pytest
import torch

from attn_core.backends.torch import kept
from attn_core.backends.torch.forks import Elsewhere

FORKED = """
    import os, signal, sys, threading

    def forked(work):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            work()
            sys.exit(0)  # as a process ends: whatever waits for threads does so
        status = os.waitpid(child, 0)[1]
        assert status == 0, f"the child ended with {status}, and SIGALRM is 14"
"""


def run(code: str) -> None:
    whole = textwrap.dedent(FORKED) + textwrap.dedent(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "error", "-c", whole], check=True, env=env, timeout=300)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@forks
def test_a_lock_that_another_thread_holds_is_free_in_the_child() -> None:
    run("""
    from attn_core.backends.torch import kept, probe, unmade

    kinds = [kept.Kept(2)._lock, probe._LOCK, unmade._LOCK]
    inside, over = threading.Event(), threading.Event()

    def hold():
        with kinds[0].held(), kinds[1].held(), kinds[2].held():
            inside.set()
            over.wait()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    inside.wait()

    def work():
        for lock in kinds:
            with lock.held():
                pass

    forked(work)
    over.set()
    thread.join()
    work()
    with kinds[0].held():
        forked(lambda: None)  # a lock of the thread that forks, let go of in both
    """)


@forks
def test_a_child_has_a_thread_of_its_own() -> None:
    run("""
    from attn_core.backends.torch.forks import Elsewhere

    other = Elsewhere("other")
    first = other.call(os.getpid)
    assert first == os.getpid()

    def work():
        assert other.call(os.getpid) == os.getpid() != first
        assert other.call(threading.current_thread).name.startswith("other")

    forked(work)
    work_again = other.call(os.getpid)
    assert work_again == first
    """)


def test_one_thread_for_all_calls() -> None:
    other = Elsewhere("other")
    here, there = get_ident(), {other.call(get_ident) for _ in range(5)}
    assert len(there) == 1
    assert here not in there
    assert main_thread().ident not in there


def test_what_it_raises_is_raised_here_and_it_lives_on() -> None:
    other = Elsewhere("other")
    there = other.call(get_ident)
    with pytest.raises(KeyError, match="nothing"):
        other.call(lambda: {}["nothing"])
    assert other.call(get_ident) == there


def test_what_is_kept_is_made_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is not there. A cache that grows has another schedule made at every step."""
    monkeypatch.setattr(kept, "_alone", lambda device, make: make())
    gpu = torch.device("cuda", 0)
    there = {kept.apart(gpu, get_ident) for _ in range(5)}
    assert len(there) == 1
    assert get_ident() not in there
