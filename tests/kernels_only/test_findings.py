"""What compiling found is kept in a file, and is good for as long as nothing of it has changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attn_core.cli import app
from attn_core.kernels import ahead, findings
from attn_core.kernels.ahead import Finding, Job
from attn_core.kernels.configs import Config
from attn_core.kernels.samples import SAMPLES

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ,
    reason="compiles for GPUs that are not there, by compilers that are the same without one",
)

WORDS = ["kernels", "compile", "--kernel", "delta", "--sample", "plain"]
WORDS += ["--width", "64", "--dtype", "float16", "--jobs", "1"]
CAUSAL = Job("forward", "sm_90", SAMPLES["causal"], 64, 64, "float16")


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, [*WORDS, *words], env={"COLUMNS": "200"})


def rows(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text("utf-8"))["findings"])


def rewrite(path: Path, changed: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"findings": changed}), "utf-8")


def test_a_finding_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "found.json"
    kept = Finding(
        CAUSAL, Config(64, 32, 4, 2, True, registers=200), 1.25, 255, 24, 4096, 128, ("C7510",),
        (4, 2), digest="0123456789abcdef",
    )  # fmt: skip
    one = CAUSAL._replace(
        kernel="decode", sample=SAMPLES["bias"], even=False, queries=1, loose=True
    )
    other = Finding(one, Config(16, 16, 4, 1, programs=4), 0.5, digest="ab")
    none = Finding(
        CAUSAL._replace(kernel="d_keys"), Config(16, 16, 4, 1), 0.5, error="no", digest="c"
    )
    findings.save([kept, other, none], path, {"sm_99": "nothing"})
    assert json.loads(path.read_text("utf-8"))["unmade"] == {"sm_99": "nothing"}
    assert rows(path)[0]["problems"] == ["24 bytes spilled", "wgmma serialized (C7510)"]
    found = findings.load(path)
    assert found[kept.job] == kept
    assert found[other.job] == other
    # What has no kernel is asked again: it may have been the machine's fault.
    assert found[none.job] == none._replace(digest="")
    # A problem that is no more, too.
    rewrite(path, [{**rows(path)[0], "problem": "yesterday's"}, rows(path)[1]])
    assert list(findings.load(path)) == [other.job]


def test_a_digest_is_of_all_that_decides() -> None:
    config = CAUSAL.chosen
    others = [
        CAUSAL._replace(target="sm_80"),
        CAUSAL._replace(sample=SAMPLES["causal"]._replace(mask="q > k")),
        CAUSAL._replace(sample=SAMPLES["causal"]._replace(dropout=True)),
        CAUSAL._replace(dtype="bfloat16"),
        CAUSAL._replace(even=False),
        CAUSAL._replace(sample=SAMPLES["bias"], even=False),
        CAUSAL._replace(sample=SAMPLES["bias"], even=False, loose=True),
        CAUSAL._replace(width=128, v_width=128, config=config),
        CAUSAL._replace(config=Config(*vars(config).values())),
        CAUSAL._replace(config=Config(**{**vars(config), "programs": 4})),
        CAUSAL._replace(config=Config(**{**vars(config), "stages": 1 + config.stages})),
        CAUSAL._replace(config=Config(**{**vars(config), "registers": 200})),
        CAUSAL._replace(config=Config(**{**vars(config), "keys": config.keys // 2})),
    ]
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=ahead.begin) as pool:
        first, again, *found = pool.map(ahead.digest, [CAUSAL, CAUSAL, *others])
    assert first == again
    # How many programs there are is nothing to a compiler.
    same = others.index(CAUSAL._replace(config=Config(*vars(config).values())))
    assert found.pop(same) == found.pop(same) == first
    assert len({first, *found}) == 1 + len(found)


def test_a_digest_does_not_depend_on_what_was_asked_before() -> None:
    kernels = [CAUSAL._replace(kernel=name) for name in ("d_keys", "d_query", "d_bias")]
    found = []
    for given in (kernels, kernels[::-1]):
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=ahead.begin) as pool:
            found.append(dict(zip(given, pool.map(ahead.digest, given), strict=True)))
    assert found[0] == found[1]


def test_a_digest_is_of_called_functions_and_of_compilers() -> None:
    code = """
from attn_core.kernels import ahead, hazards, tile
from attn_core.kernels.samples import SAMPLES
ahead.begin()
if {source}:
    tile.judged._unsafe_update_src(tile.judged.src.replace("if MASKED:", "if MASKED or BIAS:"))
if {version}:
    hazards.assembler = lambda target: hazards.Assembler("", (13, 9))
print(ahead.digest(ahead.Job("forward", "sm_90", SAMPLES["causal"], 64, 64, "float16")))
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = [
        subprocess.run(
            [sys.executable, "-c", code.format(source=source, version=assembler)],
            env=env, capture_output=True, text=True, check=True,
        ).stdout
        for source, assembler in ((False, False), (False, False), (True, False), (False, True))
    ]  # fmt: skip
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_what_a_file_holds_is_kept_until_it_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    run = invoke("--target", "sm_80", "--json", str(path), "--resume")
    assert run.exit_code == 0, run.output
    assert "2 compiled, 0 with problems" in run.output
    even, odd = rows(path)
    assert (even["sizes"], odd["sizes"]) == ("even", "odd")
    # 77 is no compiler's word: where it is told, nothing was compiled.
    marked = {"registers": 77}
    elsewhere = {**even, "target": "sm_90", "digest": "of another day"}
    rewrite(path, [{**even, **marked}, {**odd, **marked, "digest": "stale"}, elsewhere])
    run = invoke("--target", "sm_80", "--json", str(path), "--resume")
    assert run.exit_code == 0, run.output
    assert f"1 compiled, 1 as {path} holds them, 0 with problems" in run.output
    assert [row["registers"] for row in rows(path)] == [77, odd["registers"], even["registers"]]
    assert rows(path)[1]["digest"] == odd["digest"]
    assert rows(path)[2] == elsewhere
    # A problem that is kept is a problem still.
    rewrite(path, [{**even, "spills": 8}, odd])
    run = invoke("--target", "sm_80", "--json", str(path), "--resume")
    assert run.exit_code == 1
    assert "0 compiled, 2 as" in run.output
    assert "8 bytes spilled" in run.output
    # Without --resume all is new.
    run = invoke("--target", "sm_80", "--json", str(path))
    assert run.exit_code == 0, run.output
    assert [row["registers"] for row in rows(path)] == [even["registers"], odd["registers"]]


def test_a_run_that_is_cut_off_goes_on(tmp_path: Path) -> None:
    path, program = tmp_path / "found.json", tmp_path / "program.py"
    # Who is started in the background hears no Ctrl-C, and neither do those that it starts.
    program.write_text(
        "import signal\n"
        "from attn_core.cli import app\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    app()\n",
        "utf-8",
    )
    words = ["kernels", "compile", "--target", "sm_80", "--kernel", "delta", "--kernel", "combine"]
    words += ["--jobs", "1", "--json", str(path)]
    run = subprocess.Popen(
        [sys.executable, str(program), *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    # As a terminal does: the compilers hear it, too.
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 130, said
    cut = findings.load(path)
    assert not any(finding.problems for finding in cut.values())
    assert f"interrupted: {len(cut)} compiled, 0 with problems; {54 - len(cut)} are left" in said
    words = [*words, "--resume", "--width", "64", "--dtype", "float16"]
    again = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert again.exit_code == 0, again.output
    assert {**findings.load(path), **cut} == findings.load(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"findings": [{"problem": "plain"}]}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(text, "utf-8")
    run = invoke("--target", "sm_80", "--json", str(path), "--resume")
    assert run.exit_code == 2
    assert f"{path} must hold what" in run.output
    assert path.read_text("utf-8") == text
    run = invoke("--target", "sm_80", "--resume")
    assert run.exit_code == 2
    assert "`--resume` must come with --json FILE" in run.output


def test_a_compiler_that_ends_its_process_costs_one_finding() -> None:
    """LLVM aborts for a GPU that it does not know; the others are compiled all the same."""
    plain = Job("delta", "sm_80", SAMPLES["plain"], 64, 64, "float16")
    asked = [plain, plain._replace(target="sm_99"), plain._replace(even=False)]
    first, none, last = ahead.run(asked, processes=2)
    assert not first.problems
    assert not last.problems
    assert none.error.startswith("LLVM ended its process")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sample casual", "Got 'casual'. Did you mean 'causal'?"),
        ("--kernel d_quer", "Got 'd_quer'. Did you mean 'd_query'?"),
        ("--dtype bf16", "`dtype` must be one of"),
        ("--target sm90", "Got 'sm90'. Did you mean 'sm_90'?"),
        ("--kernel xyz", "Got 'xyz'.\n"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(words: str, said: str) -> None:
    run = CliRunner().invoke(app, ["kernels", "compile", *words.split()])
    assert run.exit_code == 2
    assert said in run.output
