"""Triton's interpreter where there is no GPU: chosen before triton is imported, or not at all.

A machine with a GPU may be there for minutes only: each failure is told as it happens, too.
"""

import os
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("triton") is None or find_spec("torch") is None:
    collect_ignore_glob = ["*"]
else:
    import torch

    if not torch.cuda.is_available():
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


def pytest_configure(config: Any) -> None:
    compiled = "TRITON_INTERPRET" not in os.environ
    if compiled:
        # Torch says so once of a thread of its own that goes backward, and mends it by itself.
        config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS")
    asked = compiled or config.getoption("--failures-into")
    if asked and not hasattr(config, "workerinput"):  # they have no screen
        config.pluginmanager.register(Failures(config), "attn-core-failures")
