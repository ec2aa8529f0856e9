"""Several threads at once, each with a mask of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_calls import DEVICE

from attn_core import attention, masks

MASKS = [
    masks.causal(),
    masks.window(left=3),
    masks.chunks(5),
    masks.prefix(4),
    masks.segments([0] * 9 + [1] * 14),
]


def test_no_thread_gets_what_another_asked_for() -> None:
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, 16, generator=rng).to(DEVICE) for n in (17, 23))

    def answers(number: int, impl: str) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (query, key, key)]
        mask = MASKS[number % len(MASKS)]
        out = attention(*leaves, mask=mask, query_offset="end", impl=impl)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    want = [answers(number, "reference") for number in range(len(MASKS))]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: answers(number, "triton"), range(20)))
    for number, each in enumerate(found):
        for got, its in zip(each, want[number % len(MASKS)], strict=True):
            torch.testing.assert_close(got, its, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="interprets kernels, on the CPU, wherever it runs")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_forked_while_another_thread_interprets_answers() -> None:
    """The lock that the thread holds would be held for good in the child, which SIGALRM ends."""
    code = """
        import os, signal, threading, torch
        from attn_core import attention
        from attn_core.backends.torch import triton_launch

        inside, over = threading.Event(), threading.Event()

        def hold():
            with triton_launch._ALONE.held():
                inside.set()
                over.wait()

        x = torch.ones(1, 1, 4, 8)
        want = attention(x, x, x, impl="triton")
        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        inside.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            right = torch.equal(attention(x, x, x, impl="triton"), want)
            os._exit(0 if right else 1)
        status = os.waitpid(child, 0)[1]
        over.set()
        thread.join()
        assert status == 0, f"the child ended with {status}, and SIGALRM is 14"
    """
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, check=True, env=env, timeout=300)
