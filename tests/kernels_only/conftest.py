"""Triton's interpreter where there is no GPU: chosen before triton is imported, or not at all.

A machine with a GPU may be there for minutes only: each failure is told as it happens, too.
"""

import json
import os
from importlib.util import find_spec
from typing import Any

import pytest

COMPILED = False
"""Whether there is a GPU that kernels are compiled for."""

if find_spec("triton") is None or find_spec("torch") is None:
    collect_ignore_glob = ["*"]
else:
    import torch

    COMPILED = torch.cuda.is_available()
    if not COMPILED:
        os.environ["TRITON_INTERPRET"] = "1"

# What is shipped is judged, on any machine: a user's table is left aside, here and in subprocesses.
os.environ["ATTN_CORE_KERNEL_CONFIGS"] = os.devnull
# Without it torch refuses cuBLAS' products where deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _drawn_anew(request: pytest.FixtureRequest) -> None:
    from kernel_calls import begin

    begin(request.node.name)


FAILED = "== FAILED "
"""As `attn_core.benchmarks.gpu` counts them."""


class Failures:
    """Each failure and its reason as it comes in: a line on the screen, and all of it in a file.

    Whoever is cut off has had them.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.into = config, config.getoption("--failures-into")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        said = crash.message if crash is not None else str(report.longrepr)
        reason = " ".join(said.split())[:300]
        screen = self.config.pluginmanager.get_plugin("terminalreporter")
        if screen is not None:
            screen.ensure_newline()
            screen.write_line(f"{report.when} of {report.nodeid}: {reason}")
        if self.into:
            with open(self.into, "a", encoding="utf-8") as file:
                told = f"{report.longreprtext}\n{report.capstderr[-2000:]}".strip()
                file.write(f"{FAILED}{report.when} of {report.nodeid}\n{told}\n\n")


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--failures-into", help="A file to add each failure to, as it happens.")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """What a process of its own finds of the kernels is found once, before workers begin.

    Each would else ask one, all at once: forty seconds of every worker, on the GPU that it was
    first seen on.
    """
    if COMPILED:
        from attn_core.backends.torch import probe

        node.workerinput["probed"] = json.dumps(probe.finding())


def _take(probed: str | None) -> None:
    if probed is None:
        return
    from attn_core.backends.torch import probe

    gpus, problem, hazards = json.loads(probed)
    each = [
        probe.Gpu(name, tuple(at), wrong, tuple((d, n, why) for d, n, why in narrower))
        for name, at, wrong, narrower in gpus
    ]
    probe._found[:] = [probe.Finding(tuple(each), problem, tuple(hazards))]


def pytest_configure(config: Any) -> None:
    if COMPILED:
        # Torch says so once of a thread of its own that goes backward, and mends it by itself.
        config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS")
        # Of torch's own, where its compiler is first imported: by a reset, too, if there is a GPU.
        config.addinivalue_line(
            "filterwarnings", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
        )
        _take(getattr(config, "workerinput", {}).get("probed"))
    asked = COMPILED or config.getoption("--failures-into")
    if asked and not hasattr(config, "workerinput"):  # they have no screen
        config.pluginmanager.register(Failures(config), "attn-core-failures")
