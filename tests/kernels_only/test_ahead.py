"""Kernels compiled without a GPU: what is shipped compiles clean, and what does not is told.

The whole is `attn-core kernels compile`, and one of each class its `--few`, which `make test` runs
from a file; here some of that is compiled again.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attn_core.benchmarks import tune
from attn_core.kernels import ahead, configs, findings, hazards
from attn_core.kernels.ahead import Finding, Job
from attn_core.kernels.configs import Config
from attn_core.kernels.samples import SAMPLES

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ,
    reason="compiles for GPUs that are not there, by compilers that are the same without one",
)

FILE = Path(__file__).parents[2] / "benchmarks/results/kernels/few.json"
"""What `make test` resumes, and so compiles again only as far as kernels have changed."""


def test_what_is_written_is_of_every_kernel_that_is_asked_about() -> None:
    """And nothing else: what is shipped is judged by this file, and by what is compiled since."""
    asked = list(ahead.jobs(few=True))
    # At this width nothing runs in the place of d_keys.
    assert {job.kernel for job in asked} == {*ahead.KERNELS} - {"d_value", "d_key"}
    assert {job.target for job in asked} == set(ahead.TARGETS)
    assert {job.sample.mask_class for job in asked} >= {*configs.CLASSES} - {"bias", "loose"}
    held = findings.load(FILE)
    assert set(held) == set(asked)
    assert [finding for finding in held.values() if finding.problems] == []
    hopper = [f for f in held.values() if f.job.target == "sm_90" and f.job.kernel == "forward"]
    assert min(min(finding.wgmma) for finding in hopper) > 0


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_what_is_shipped_compiles_clean_and_as_is_written(target: str) -> None:
    """The lightest class and the heaviest; the file has the others."""
    asked = [
        next(job for job in ahead.jobs([target], [kernel], [sample], few=True) if job.even == even)
        for kernel, sample, even in (
            ("forward", "causal", True),
            ("d_keys", "everything", False),
        )
    ]
    found = ahead.run(asked)
    assert [finding.job for finding in found] == asked
    assert [finding for finding in found if finding.problems] == []
    # A tile of one class has the registers of a kernel that does something.
    assert all((finding.registers or 0) > 32 for finding in found)
    if target == "sm_90":
        assert min(found[0].wgmma) > 0
    held = findings.load(FILE)
    for new in found:
        old = held[new.job]
        if old.digest == new.digest:  # else the kernel, or its compiler, has changed since
            assert new._replace(seconds=0.0) == old._replace(seconds=0.0)


def test_gpus_of_one_kind_have_the_tiles_of_their_kind() -> None:
    """Small tiles that run anywhere are for GPUs that no compiler here was asked about."""
    for target in sorted(set(ahead.SHARED) - {"sm_75"}):
        for kernel in ("forward", "decode", "d_keys", "d_query"):
            for width in (64, 128, 256):
                found = configs.explain(kernel, target, width, width, "bfloat16", "positions")
                assert configs.ANY not in found.on, (target, kernel, width)
    assert configs.explain("forward", "sm_75", 64, 64, "float16", "positions").on == (configs.ANY,)


@pytest.mark.parametrize("target", ["sm_89", "sm_120", "gfx950"])
def test_tiles_of_a_kind_compile_clean(target: str) -> None:
    """With 99 KB of shared memory, or registers of their own, on GPUs beside those of `TARGETS`."""
    asked = list(ahead.jobs([target], ("forward", "d_keys", "d_query"), ("causal",), few=True))
    assert len(asked) == 6
    found = ahead.run(asked)
    assert [finding for finding in found if finding.problems] == []
    assert all((finding.registers or 0) > 64 for finding in found)


def test_threads_share_the_tiles_of_a_schedule() -> None:
    """Whichever axis Triton spreads a warp along: with every tile in every thread there is no room
    for them, and that was so with Triton 3.7."""
    (job,) = ahead.jobs(["sm_90"], ["schedule"], ["documents"])
    (found,) = ahead.run([job])
    assert found.problems == []
    assert found.registers is not None
    assert found.registers <= 128


@pytest.mark.parametrize("sample", ["table", "relative", "bias"])
def test_softmax_is_computed_once(sample: str) -> None:
    """What is read for every entry is read before the product that it meets: read after it, Triton
    lays the product out as the load, too, and computes softmax as both have their numbers."""
    (found,) = ahead.run(
        [Job("forward", "sm_90", SAMPLES[sample], 128, 128, "bfloat16")], texts=True
    )
    assert found.texts is not None
    shape = f"{found.config.rows}x{found.config.keys}xf32"
    exponents = re.findall(rf"math\.exp2 .* tensor<{shape}, (#\w+)>", found.texts["ttgir"])
    assert exponents
    assert set(exponents) == {"#mma"}


def test_what_is_tried_at_width_256_compiles_clean() -> None:
    """On a GPU that is there for minutes no tile is worth its compiling that spills."""
    asked = [
        Job(kernel, "sm_90", SAMPLES["causal"], 256, 256, "bfloat16", Config(*tile), even)
        for kernel, tiles in tune.WIDEST.items()
        for tile in tiles
        for even in (True, False)
    ]
    assert [finding for finding in ahead.run(asked) if finding.problems] == []


def test_what_does_not_fit_is_told() -> None:
    """Too many registers, too much memory, and a kernel that is none."""
    causal = Job("forward", "sm_90", SAMPLES["causal"], 64, 64, "bfloat16")
    broad = causal._replace(width=256, v_width=256)
    found = ahead.run(
        [
            causal._replace(config=Config(128, 128, 4, 2)),
            broad._replace(target="gfx942", config=Config(16, 128, 4, 2)),
            causal._replace(config=Config(48, 128, 4, 2)),
            broad._replace(target="sm_100", config=Config(256, 64, 8, 1)),
        ],
        processes=2,
    )
    spilled, large, none, wide = found
    assert spilled.spills > 0
    assert any("spilled" in reason for reason in spilled.problems)
    assert large.shared > ahead.SHARED["gfx942"] or large.error
    assert large.problems
    assert none.error
    assert none.problems == [none.error]
    # 256 rows of 256 columns of sums, and their logits.
    assert f"{wide.columns} columns of tensor memory of 512" in wide.problems
    assert spilled.columns == large.columns == 0


def test_a_target_that_no_compiler_here_knows_is_told() -> None:
    """At once, with what the compiler says, and the others are compiled."""
    from attn_core.cli import app

    words = ["kernels", "compile", "--target", "sm_99", "--target", "sm_80", "--kernel", "delta"]
    words += ["--sample", "plain", "--width", "64", "--dtype", "float16"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 1
    assert "sm_99: the compilers here make nothing for it, and none was tried." in found.output
    assert found.output.split("none was tried. ")[1].startswith("LLVM ended its process")
    assert "2 compiled, 0 with problems" in found.output


def test_what_ptxas_says_is_read() -> None:
    """Sentences as ptxas 12.8 writes them."""
    log = (
        "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to ill formed pipeline stage in the function 'forward'\n"
        "ptxas info    : Function properties for forward\n"
        "    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    assert ahead._of_ptxas(log) == (255, 24, ("C7511",))
    job = Job("forward", "sm_90", SAMPLES["plain"], 128, 128, "bfloat16")
    finding = Finding(job, Config(64, 64, 4, 2), 1.0, 255, 24, 300_000, 513, ("C7511",))
    assert finding.problems == [
        "24 bytes spilled",
        "wgmma serialized (C7511)",
        "300000 bytes of shared memory of 232448",
        "513 columns of tensor memory of 512",
    ]
    turing = finding._replace(job=job._replace(target="sm_75"), shared=67_584)
    assert "67584 bytes of shared memory of 65536" in turing.problems
    ptx = (
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,%f2}, %rd1, %rd2, 1, 1, 1;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1,%f2}, {%r1,%r2}, %rd2, 1;\n"
    )
    assert ahead._products(ptx) == (2, 1)


def test_what_is_never_launched_is_not_compiled() -> None:
    """Fused, where a table says that no tile of it is free of spills."""
    for name, refused in (("everything", True), ("causal", False)):
        (job,) = [Job("fused", "sm_90", SAMPLES[name], 256, 256, "bfloat16")]
        assert bool(job.refused) is refused
        assert list(ahead.jobs(["sm_90"], ["fused"], [name], [256], ["bfloat16"])) == (
            [] if refused else [job, job._replace(even=False)]
        )


def test_a_bias_has_rows_that_begin_anywhere() -> None:
    """Where a kernel reads one."""
    about = ("bias", "everything"), (64,), ("bfloat16",)
    for kernel in ahead.KERNELS:
        loose = [job for job in ahead.jobs(["sm_80"], [kernel], *about) if job.loose]
        read = kernel in ("forward", "decode", "d_keys", "d_query", "fused", "d_bias")
        assert [job.sizes for job in loose] == (
            [] if not read
            else 2 * ["odd, loose bias", "odd, one query, loose bias"] if kernel == "decode"
            else 2 * ["odd, loose bias"]
        )  # fmt: skip
    without = ("causal", "documents", "dropout")
    assert not any(job.loose for job in ahead.jobs(["sm_80"], (), without))


def test_names_that_nothing_has_are_refused() -> None:
    for words in ({"targets": ["sm90"]}, {"kernels": ["backward"]}, {"samples": ["casual"]}):
        with pytest.raises(ValueError, match="must be"):
            list(ahead.jobs(**words))


def test_an_interpreting_process_compiles_nothing() -> None:
    with pytest.raises(ahead.Interpreted, match="TRITON_INTERPRET"):
        ahead.compiled(Job("forward", "sm_90", SAMPLES["plain"], 64, 64, "float16"))


def ptxas(where: Path, release: str) -> Path:
    """A program that says its version as ptxas does."""
    path = where / f"ptxas-{release}"
    path.write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.73'\n", "utf-8"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(("release", "bad"), [("12.9", True), ("13.2", True), ("13.3", False)])
def test_the_hazard_is_told_by_the_version_in_use(tmp_path: Path, release: str, bad: bool) -> None:
    tool = ptxas(tmp_path, release)
    code = "from attn_core.kernels.hazards import hazard; print(hazard('sm_90'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_PTXAS_PATH": str(tool)},
        capture_output=True,
        text=True,
        check=True,
    )
    if bad:
        assert f"ptxas of CUDA {release} ({tool})" in run.stdout
        assert "TRITON_PTXAS_PATH" in run.stdout
    else:
        assert run.stdout.strip() == "None"


def test_the_hazard_is_hoppers_alone() -> None:
    assert hazards.hazard("sm_80") is None
    assert hazards.hazard("gfx942") is None
    found = hazards.assembler("sm_90")
    assert found.version is not None
    assert found.version >= (12, 0)


def test_every_launch_has_a_configuration() -> None:
    for target in ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"):
        for kernel in configs.KERNELS:
            for width in (16, 40, 64, 128, 256):
                for dtype in configs.DTYPES:
                    for name in configs.CLASSES:
                        configs.choose(kernel, target, width, 16, dtype, name)
