"""Kernels compiled ahead of time, for any GPU and without one.

What the compiler says of a kernel is read: registers, those that it spilled to memory, the shared
memory it takes, and ptxas' word that tensor-core instructions wait for each other
("wgmma ... serialized", C7510 to C7515); of Blackwell, the columns of tensor memory. Spilling and
waiting cost most of a kernel's speed, and one that asks for more memory than there is cannot be
launched: each is a problem of a shipped configuration.

    compiled(Job("forward", "sm_90", SAMPLES["causal"], 128, 128, "bfloat16")) -> Finding

All that decides what comes of a job has a digest (`digest`), so that a finding of an earlier run is
good for as long as nothing of it has changed: `findings.py` keeps them in a file.

Nothing here imports triton before a job runs: a worker process decides first that kernels are
compiled and not interpreted (`Interpreted`).
"""

from __future__ import annotations

import io
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import replace
from difflib import get_close_matches
from hashlib import sha256
from importlib.metadata import version
from multiprocessing import get_context
from typing import NamedTuple

from attn_core.kernels import configs, hazards
from attn_core.kernels.configs import Config
from attn_core.kernels.samples import FEW, SAMPLES, Sample, operands_of, tree_of

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

KERNELS = (*configs.KERNELS, *configs.PREPARING)

WIDTHS = (64, 128, 256)

SHARED = {
    "sm_75": 65_536,
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_87": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "sm_120": 101_376,
    "sm_121": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
    "gfx950": 163_840,
}
"""Bytes of shared memory that one program may have."""

_COLUMNS = 512
"""Columns of tensor memory that one program may have, on the GPUs that have any (Blackwell)."""

_LEAST = 16
"""Registers below which there is no kernel, whatever the compiler says: it gave up in silence."""

_UNTOLD = ("combine", "schedule", "facts")
"""Kernels that are told nothing of sizes: odd ones are all (`signatures.py`)."""

_UNBIASED = (*configs.PREPARING, "combine", "delta")
"""Kernels that read no bias."""

_SERIALIZED = re.compile(r"\bC751[0-5]\b")


class Job(NamedTuple):
    """One kernel for one GPU.

    Attributes:
        config: another one than the table's, for trying it out.
        even: whether sizes are multiples of 16 and each query head has keys of its own, which a
            launch tells the compiler. With what it knows it takes other registers: either may
            spill where the other does not.
        queries: of `decode`: 1 or, with 0, up to 16 (`signatures.py`).
        loose: whether rows of a bias begin anywhere, and not at multiples of 16.
    """

    kernel: str
    target: str
    sample: Sample
    width: int
    v_width: int
    dtype: str
    config: Config | None = None
    even: bool = True
    queries: int = 0
    loose: bool = False

    @property
    def sizes(self) -> str:
        """In words."""
        words = ["even" if self.even else "odd"]
        words += ["one query"] if self.queries == 1 else []
        words += ["loose bias"] if self.loose else []
        return ", ".join(words)

    @property
    def chosen(self) -> Config:
        if self.config is not None:
            return self.config
        if self.kernel in configs.PREPARING:
            # Of the tiles that a forward pass is cut into.
            tile, launch = self._replace(kernel="forward").chosen, configs.PREPARED
            return replace(launch, rows=tile.rows, keys=tile.keys)
        return self._entry.config

    @property
    def mask_class(self) -> str:
        return configs.LOOSE if self.loose else self.sample.mask_class

    @property
    def refused(self) -> str:
        """Why it is never launched with what the table says, or ""."""
        return "" if self.kernel in configs.PREPARING else configs.idle(*self._asked)

    @property
    def _entry(self) -> configs.Entry:
        return configs.explain(*self._asked)

    @property
    def _asked(self) -> tuple[str, str, int, int, str, str]:
        sizes = (self.width, self.v_width, self.dtype)
        return self.kernel, self.target, *sizes, self.mask_class


class Finding(NamedTuple):
    """What the compiler said of a job.

    Attributes:
        registers: of a thread; None where it does not say.
        spills: bytes (of an AMD GPU: registers) that did not fit.
        shared: bytes of shared memory.
        columns: of tensor memory, which holds the sums of Blackwell's products.
        serialized: ptxas' warnings, by their numbers.
        wgmma: Hopper's products, and those of them that read their first operand from registers.
        error: why there is no kernel, or "".
        digest: of all that it came of (`digest`), or "".
        texts: of the kernel, by stage ("ttgir", "ptx", ...), where they were asked for.
    """

    job: Job
    config: Config
    seconds: float
    registers: int | None = None
    spills: int = 0
    shared: int = 0
    columns: int = 0
    serialized: tuple[str, ...] = ()
    wgmma: tuple[int, int] = (0, 0)
    error: str = ""
    digest: str = ""
    texts: dict[str, str] | None = None

    @property
    def problems(self) -> list[str]:
        """Why the configuration may not be shipped."""
        found = [self.error] if self.error else []
        if self.spills:
            unit = "registers" if self.job.target.startswith("gfx") else "bytes"
            found.append(f"{self.spills} {unit} spilled")
        small = self.job.kernel in configs.PREPARING  # there is little to hold
        if self.registers is not None and self.registers < _LEAST and not small:
            found.append(f"{self.registers} registers: nothing came of it")
        if self.serialized:
            found.append(f"wgmma serialized ({', '.join(self.serialized)})")
        most = SHARED.get(self.job.target)
        if most is not None and self.shared > most:
            found.append(f"{self.shared} bytes of shared memory of {most}")
        if self.columns > _COLUMNS:
            found.append(f"{self.columns} columns of tensor memory of {_COLUMNS}")
        return found


def jobs(
    targets: Sequence[str] = TARGETS,
    kernels: Sequence[str] = (),
    samples: Sequence[str] = (),
    widths: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    few: bool = False,
) -> Iterator[Job]:
    """Every kernel for every target and sample, or those named, of even sizes and of odd ones;
    `few` is one of each class.

    What a table refuses, or has another kernel run for, is never launched, and is not among them.

    Raises:
        ValueError: a name that nothing has.
    """
    _known(kernels, samples, widths, dtypes)
    for target in targets:
        known_target(target)
        for kernel in kernels or KERNELS:
            for name in samples or (FEW if few else SAMPLES):
                sample = SAMPLES[name]
                if not _asked(kernel, sample):
                    continue
                # What prepares knows neither widths nor numbers, only tiles.
                one = few or kernel in configs.PREPARING
                for width in widths or ((128,) if one else WIDTHS):
                    for dtype in dtypes or (("bfloat16",) if one else configs.DTYPES):
                        job = Job(kernel, target, sample, width, width, dtype)
                        if not job.refused:
                            yield from _ways(job)


def job_of(kernel: str, target: str, sample: Sample, width: int, dtype: str) -> Job:
    """One kernel for a sample of one's own.

    Raises:
        ValueError: a name that nothing has, or no call launches that kernel for such a problem.
    """
    _known([kernel], (), [width], [dtype])
    known_target(target)
    job = Job(kernel, target, sample, width, width, dtype)
    idle = _idle(kernel, sample) or job.refused
    if idle:
        raise ValueError(
            f"`kernel` must be one that is launched for this on {target}, at width {width} in "
            f"{dtype}. Got {kernel}: {idle.removesuffix('.')}."
        )
    return next(_ways(job))


def _known(
    kernels: Sequence[str], samples: Sequence[str], widths: Sequence[int], dtypes: Sequence[str]
) -> None:
    for width in widths:
        known_width(width)
    known = {"kernel": KERNELS, "sample": tuple(SAMPLES), "dtype": configs.DTYPES}
    for what, names in (("kernel", kernels), ("sample", samples), ("dtype", dtypes)):
        for name in names:
            if name not in known[what]:
                raise ValueError(
                    f"`{what}` must be one of {', '.join(known[what])}. "
                    f"Got {name!r}.{_nearest(name, known[what])}"
                )


def _idle(kernel: str, sample: Sample) -> str:
    """Why a kernel has nothing to do for a sample, or ""."""
    if kernel == "d_bias" and not sample.bias:
        return "there is no bias"
    if kernel == "facts" and not sample.lengths:
        return "there are no lengths"
    if kernel == "reduced" and not operands_of(tree_of(sample.mask)):
        return "there is no mask that looks an array up"
    return ""


def _ways(job: Job) -> Iterator[Job]:
    """The sizes that make another kernel of it."""
    if job.kernel == configs.DECODE:
        # Of tiles of 16 rows the two are one, but for a bias.
        untold = job.chosen.rows <= 16 and not job.sample.bias
    else:
        untold = job.kernel in _UNTOLD
    if not untold:
        yield job
    odd = [job._replace(even=False)]
    if job.kernel == configs.DECODE:
        odd.append(job._replace(even=False, queries=1))
    yield from odd
    if job.sample.bias and job.kernel not in _UNBIASED:
        loose = [each._replace(loose=True) for each in odd]
        yield from (each for each in loose if not each.refused)


def known_target(name: str) -> None:
    """Raises:
    ValueError: it is spelled as no GPU is.
    """
    if _target(name) is None:
        near = _nearest(name, tuple(SHARED))
        raise ValueError(f"`target` must be sm_NN or gfxNNN. Got {name!r}.{near}")


def known_width(n: int) -> None:
    """Raises:
    ValueError: no kernel takes heads of it.
    """
    if not 1 <= n <= max(WIDTHS):
        raise ValueError(f"`width` must be from 1 to {max(WIDTHS)}. Got {n}.")


def _nearest(name: str, known: Sequence[str]) -> str:
    """ " Did you mean 'causal'?" where one that is known is close, else nothing."""
    close = get_close_matches(name.lower(), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _asked(kernel: str, sample: Sample) -> bool:
    """Whether the kernel has anything to do with what is special about the sample."""
    if _idle(kernel, sample):
        return False
    if kernel in ("combine", "delta"):
        return sample.name in ("plain", "everything")
    if kernel == "reduced":
        return sample.name == "table"
    if kernel == "schedule":
        return not (sample.score or sample.bias or sample.dropout) or sample.lengths
    return True


def _target(name: str) -> tuple[str, str | int, int] | None:
    if re.fullmatch(r"sm_\d{2,3}", name):
        return "cuda", int(name[3:]), 32
    if re.fullmatch(r"gfx9[0-9a-f]+", name):
        return "hip", name, 64
    if re.fullmatch(r"gfx1[0-9a-f]+", name):
        return "hip", name, 32
    return None


class Interpreted(RuntimeError):
    """Triton has been told to interpret kernels, in this process and for good."""


def begin() -> None:
    """In a worker, before its first job: compile, whatever the parent does."""
    os.environ.pop("TRITON_INTERPRET", None)
    # A terminal interrupts its whole group: the parent says when it ends, and what was found.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def digest(job: Job) -> str:
    """Of all that decides what comes of a job: the kernel's source and that of every function it
    calls, what its arguments are, configuration, target, and the versions of the compilers."""
    from attn_core.kernels.signatures import hash_in_order, source

    hash_in_order()
    config = job.chosen
    # AMD's assembler is LLVM, which is within Triton.
    cuda = job.target.startswith("sm_")
    tools = (version("triton"), hazards.assembler(job.target)[1:] if cuda else "")
    told = (source(job, config).hash(), config.compiled, job.target, tools)
    return sha256(repr(told).encode()).hexdigest()[:16]


def compiled(job: Job, texts: bool = False, known: Finding | None = None) -> Finding:
    """Compile, and read what the compiler says; an error is a finding too.

    Args:
        known: what was found earlier: handed back as it is, if its digest is still the job's.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if triton.knobs.runtime.interpret:
        raise Interpreted("Kernels are interpreted here (TRITON_INTERPRET): nothing is compiled.")
    from attn_core.kernels.signatures import source

    config = job.chosen
    began = time.perf_counter()
    target = _target(job.target)
    assert target is not None, job.target
    log = io.StringIO()
    of = ""
    try:
        of = digest(job)
        if known is not None and known.digest == of:
            return known
        made = source(job, config)
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            triton.knobs.compilation.always_compile = True
            found = triton.compile(made, target=GPUTarget(*target), options=config.launch)
    except Exception as error:  # whatever the compiler raises is what is told of this job
        reason = _last_of(error)
        return Finding(job, config, time.perf_counter() - began, error=reason, digest=of)
    seconds = time.perf_counter() - began
    kept = {name: text for name, text in found.asm.items() if isinstance(text, str)}
    if target[0] == "hip":
        said_of = _of_amdgcn(kept["amdgcn"])
    else:
        said_of = _of_ptxas(log.getvalue())
    return Finding(
        job,
        config,
        seconds,
        *said_of[:2],
        found.metadata.shared,
        getattr(found.metadata, "tmem_size", None) or 0,
        said_of[2],
        _products(kept.get("ptx", "")),
        digest=of,
        texts=kept if texts else None,
    )


def unmade(targets: Sequence[str]) -> dict[str, str]:
    """Targets for which the compilers here make nothing at all, and what they say: ptxas or LLVM
    may be older than a GPU. Asked with the smallest kernel."""
    smallest = Job("delta", "", SAMPLES["plain"], 64, 64, "float32")
    asked = [smallest._replace(target=target) for target in dict.fromkeys(targets)]
    return {each.job.target: each.error for each in run(asked) if each.error}


def run(
    given: Sequence[Job],
    processes: int = 1,
    seen: Callable[[Finding], None] = lambda _: None,
    texts: bool = False,
    known: Mapping[Job, Finding] | None = None,
) -> list[Finding]:
    """Compile all of them in processes of their own, in their order; `seen` as each one ends.

    LLVM ends its process where it does not know what to do: that, too, is a finding.

    Args:
        known: findings of an earlier run; those that are still true are not made again.
    """
    found: dict[Job, Finding] = {}
    before = known or {}

    def ended(finding: Finding) -> None:
        found[finding.job] = finding
        seen(finding)

    while left := [job for job in given if job not in found]:
        try:
            _pooled(left, processes, ended, texts, before)
        except BrokenProcessPool:
            # One of those that were being compiled did it: they are the first that have not ended.
            suspects = [job for job in left if job not in found][:processes]
            for job in suspects:
                try:
                    _pooled([job], 1, ended, texts, before)
                except BrokenProcessPool:
                    ended(Finding(job, job.chosen, 0.0, error=_ENDED))
    return [found[job] for job in given]


_ENDED = "LLVM ended its process: its words stand above, if it had any."


def _pooled(
    given: Sequence[Job],
    processes: int,
    seen: Callable[[Finding], None],
    texts: bool,
    known: Mapping[Job, Finding],
) -> None:
    # Spawned: a fork would inherit what a framework or Triton has started.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=begin)
    try:
        asked = [pool.submit(compiled, job, texts, known.get(job)) for job in given]
        for future in as_completed(asked):
            seen(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _of_ptxas(log: str) -> tuple[int | None, int, tuple[str, ...]]:
    registers = re.findall(r"Used (\d+) registers", log)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return (
        max(map(int, registers)) if registers else None,
        spills,
        tuple(sorted(set(_SERIALIZED.findall(log)))),
    )


def _last_of(error: BaseException) -> str:
    """What the compiler stumbled over: an error in a device function has its callers' before it."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = " | ".join(line.strip() for line in str(error).strip().splitlines() if line.strip())
    return f"{type(error).__name__}: {said[-300:]}"


def _products(ptx: str) -> tuple[int, int]:
    """How many wgmma there are, and how many whose first operand is a list of registers."""
    found = re.findall(r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*(\{)?", ptx)
    return len(found), sum(bool(braced) for braced in found)


def _of_amdgcn(text: str) -> tuple[int | None, int, tuple[str, ...]]:
    registers = [int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text)]
    spills = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
    return (max(registers) if registers else None), spills, ()
