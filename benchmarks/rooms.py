"""Rooms seen from outside: worker processes that stay, and are spoken to one at a time.

A worker that dies or does not answer takes the subject it was asked about with it, and nothing
else: the room is opened again for the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from signal import Signals
from threading import Timer
from types import TracebackType
from typing import Any

STARTUP = 120.0
"""Seconds that a worker may take to say "ready"; it has imported NumPy by then, no framework."""


class WorkerError(RuntimeError):
    """The worker died, or was ended for not answering; the message says how."""


def environment(threads: int) -> dict[str, str]:
    """What a worker's libraries read as they are imported."""
    count = str(threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        # NumPy's: the judge alone multiplies with it, in small pieces. With two threads that wait
        # for each other it took five to ten times the time wherever the machine had other work.
        "OPENBLAS_NUM_THREADS": "1",
        # Intel's OpenMP, where a wheel brings it, would spin for 200 ms after every region, and in
        # a room with two frameworks that is the other one's time.
        "KMP_BLOCKTIME": "1",
        # These are benchmarks of CPUs, and of what is compiled in this run.
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Otherwise inductor leaves a pool of compiling processes behind.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


class Worker:
    """One worker process; `command` starts another kind of worker than the package's own."""

    def __init__(
        self,
        threads: int,
        *,
        more: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
    ) -> None:
        suite = (sys.executable, "-m", "attn_core.benchmarks.worker", str(threads))
        # Kept for the process's life, and closed with it.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command or suite,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**environment(threads), **(more or {})},
        )
        if self._line(STARTUP) != "ready\n":
            raise WorkerError(self._ending(STARTUP))

    def ask(self, command: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            WorkerError: it died, or took longer than `timeout` seconds and was ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._ending(timeout)) from error
        line = self._line(timeout)
        if not line.endswith("\n"):
            raise WorkerError(self._ending(timeout))
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass  # a command that was never read

    def _line(self, timeout: float) -> str:
        assert self._process.stdout is not None
        self._late = False

        def expire() -> None:
            self._late = True
            self._process.kill()

        clock = Timer(timeout, expire)
        clock.start()
        try:
            return self._process.stdout.readline()
        finally:
            clock.cancel()

    def _ending(self, timeout: float) -> str:
        status = self._process.wait()
        if self._late:
            text = f"it gave no answer within {timeout:g} s, and was ended"
        else:
            self._log.seek(0)
            lines = [line for line in self._log.read().splitlines() if line.strip()]
            how = f"signal {Signals(-status).name}" if status < 0 else f"status {status}"
            text = f"the worker ended with {how}: {lines[-1] if lines else 'no message'}"
        self.close()
        return text

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
