"""Tables of configurations, and words for masks: what needs neither Triton nor a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import attn_core
from attn_core import cli_words, masks, scores
from attn_core.cli import app
from attn_core.kernels import configs
from attn_core.kernels.ahead import Job
from attn_core.kernels.configs import Config, Entry
from attn_core.kernels.samples import SAMPLES
from attn_core.language.text import parse, text
from attn_core.language.tree import looks_up_entries

MINE = Entry(
    "forward", ("sm_90",), (128,), 16, ("none",), Config(64, 32, 8, 4, True), 'on "a GPU"', "yours"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = tmp_path / "deep" / "kernels.toml"
    monkeypatch.setenv(configs.VARIABLE, str(path))
    configs.forget()
    yield path
    configs.forget()


def choose(**changes: Any) -> Config:
    asked = {
        "kernel": "forward",
        "architecture": "sm_90",
        "width": 100,
        "v_width": 128,
        "dtype": "bfloat16",
        "mask_class": "none",
    }
    return configs.choose(**{**asked, **changes})


def test_yours_come_first_and_only_where_they_fit(place: Path) -> None:
    before = choose()
    assert before != MINE.config
    configs.write(place, [MINE])
    configs.forget()
    assert configs.yours() == (MINE,)
    assert choose() == MINE.config
    for other in (
        {"kernel": "d_keys"},
        {"architecture": "sm_80"},
        {"v_width": 64, "width": 64},
        {"dtype": "float32"},
        {"mask_class": "mask"},
    ):
        assert choose(**other) != MINE.config


def test_a_broken_file_is_left_aside_with_its_reason(place: Path) -> None:
    before = choose()
    place.parent.mkdir()
    place.write_text("entries = [{ kernel = 3 }]", "utf-8")
    configs.forget()
    with pytest.warns(RuntimeWarning, match=re.escape(str(place))):
        assert choose() == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('kernel = "forwards"', "`kernel` must be one of"),
        ("rows = 48", "`rows` must be a power of two"),
        ("keys = 8", "`keys` must be a power of two"),
        ("stages = 0", "`stages` must be an int"),
        ('classes = ["causal"]', "`classes` must be some of"),
        ("colour = 3", "colour beside"),
        ("registers = 100", "`registers` must be 255, or a multiple of 8"),
        ("registers = 128", "`registers` must be of NVIDIA's GPUs alone"),
        ("descriptors = 1", "`descriptors` must be true or false"),
        ("instead = true", "`instead` must be of kernel fused"),
        ('refused = "so"', "`refused` must be of kernel fused"),
        ("programs = 0", "`programs` must be an int from 1 to 16"),
        ("programs = 2.5", "`programs` must be an int from 1 to 16"),
        ("programs = 4", "`programs` must be of kernel decode. Got it of 'forward'"),
        ("apart = true", "`apart` must be of kernel d_keys"),
        ("apart = 1", "`apart` must be true or false"),
    ],
)
def test_entries_are_checked(line: str, said: str) -> None:
    values = {"kernel": '"forward"', "on": '["any"]', "rows": "64", "keys": "64"}
    values |= {"warps": "4", "stages": "1", "source": '"x"'}
    name, _, value = line.partition(" = ")
    raw = ", ".join(f"{n} = {v}" for n, v in {**values, name: value}.items())
    with pytest.raises(ValueError, match=said):
        configs.read(f"entries = [{{ {raw} }}]", "shipped")


def test_an_entry_is_read_as_it_was_spelled() -> None:
    config = configs.Config(32, 64, 8, 2, descriptors=True, instead=True, registers=200)
    entry = configs.Entry("fused", ("sm_90",), (64,), 16, ("none",), config, 'a "test"', "yours")
    other = entry._replace(
        config=configs.Config(16, 16, 4, 1), refused="no tile", on=("gfx942",), classes=()
    )
    few = entry._replace(kernel="decode", config=configs.Config(16, 64, 4, 3, programs=4))
    usual = few._replace(config=configs.Config(16, 64, 4, 3))
    given = (entry, other, few, usual)
    text = "entries = [" + ", ".join(configs.spelled(e) for e in given) + "]"
    assert configs.read(text, "yours") == given
    assert text.count("programs = ") == 2  # of decoding alone
    assert "programs = 4" in text
    assert config.launch == {
        "num_warps": 8,
        "num_stages": 2,
        "enable_fp_fusion": True,
        "maxnreg": 200,
    }
    with pytest.raises(ValueError, match="one of `instead` and `refused`"):
        configs.read(f"entries = [{configs.spelled(entry._replace(refused='no'))}]", "yours")


def test_what_is_refused_is_fused_by_nobody() -> None:
    """Not even for who compares the two; elsewhere `fusing` says."""
    about = ("sm_90", 256, 256, "bfloat16")
    for yes in (True, False):
        with configs.fusing(yes):
            assert configs.choose("fused", *about, "more").instead is False
            assert configs.choose("fused", *about, "none").instead is yes
    assert configs.choose("fused", *about, "none").instead is False


def test_of_one_launch_or_two_the_table_says_which() -> None:
    """Or who compares them; whoever does not run is idle."""
    entry = configs.Entry(
        "d_keys", ("sm_90",), (256,), 16, ("none",), Config(32, 32, 8, 1, apart=True), "x", "yours"
    )
    assert configs.read(f"entries = [{configs.spelled(entry)}]", "yours") == (entry,)
    about = ("sm_90", 256, 256, "bfloat16", "none")
    for yes in (True, False):
        with configs.trying(entry._replace(config=Config(32, 32, 8, 1, apart=yes))):
            assert configs.choose("d_keys", *about).apart is yes
            assert bool(configs.idle("d_keys", *about)) is yes
            assert [bool(configs.idle(name, *about)) for name in configs.PARTS] == [not yes] * 2
            for other in (True, False):
                with configs.parting(other):
                    assert configs.choose("d_keys", *about).apart is other
    assert configs.idle("d_query", *about) == ""
    assert configs.idle("fused", *about[:-1], "more") == "no tile of it is free of spills"


def test_an_entry_without_a_source_is_none() -> None:
    with pytest.raises(ValueError, match="no source"):
        configs.read('entries = [{ kernel = "delta", on = ["any"], rows = 16 }]', "shipped")


def test_classes_follow_what_a_problem_has() -> None:
    found = {name: sample.mask_class for name, sample in SAMPLES.items()}
    assert found["plain"] == "none"
    assert found["window"] == "positions"
    assert found["documents"] == "mask"
    assert found["table"] == found["relative"] == "table"
    assert found["softcap"] == found["scored documents"] == "score"
    assert found["dropout"] == "dropout"
    assert found["bias"] == found["biased documents"] == "bias"
    assert found["everything"] == "more"
    assert {*found.values(), "loose"} == set(configs.CLASSES)
    job = Job("forward", "sm_90", SAMPLES["bias"], 64, 64, "bfloat16", even=False, loose=True)
    assert job.mask_class == "loose"


@pytest.mark.parametrize("name", ["bias", "loose"])
def test_a_bias_has_the_entries_of_more_where_it_has_none(name: str) -> None:
    about = ("none of them", 128, 128, "bfloat16")
    own = MINE._replace(on=("none of them",), classes=(name,))
    more = own._replace(classes=("more",), config=Config(16, 16, 4, 1))
    with configs.trying(more):
        assert configs.choose("forward", *about, name) == more.config
    with configs.trying(own):
        assert configs.choose("forward", *about, name) == own.config
        assert configs.choose("forward", *about, "more") != own.config


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({}, "bias"),
        ({"mask": True, "positions": True}, "bias"),
        ({"mask": True}, "bias"),
        ({"score": True}, "more"),
        ({"mask": True, "table": True}, "more"),
        ({"dropout": True}, "more"),
        ({"loose": True}, "loose"),
        ({"loose": True, "score": True, "dropout": True}, "loose"),
    ],
)
def test_what_stands_beside_a_bias_decides_its_class(found: dict[str, bool], name: str) -> None:
    assert configs.class_of(**{"mask": False, "score": False, **found}, bias=True) == name


@pytest.mark.parametrize(
    ("words", "yes"),
    [
        ("bool0[b, h, row, k]", True),
        ("s + float0[abs(q - k), h]", True),
        ("s + float0[int(s)]", True),
        ("(int0[b, q] == int0[b, k]) & (q >= k)", False),
        ("(int0[q] == int1[k]) & (k >= int2[int0[row] + q])", False),
        ("s - float0[h] * float(q - k)", False),
        ("bool1[k, int0[q]]", True),
        ("bool1[k, int0[b]]", False),
        ("q >= k", False),
    ],
)
def test_what_is_looked_up_at_every_entry(words: str, yes: bool) -> None:
    assert looks_up_entries(parse(words)) is yes
    assert looks_up_entries(None) is False


def test_choosing_loads_no_triton() -> None:
    code = (
        "import sys\nfrom attn_core.kernels import configs\n"
        "configs.choose('forward', 'sm_90', 64, 64, 'float16', 'none')\n"
        "assert not {'triton', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("words", "mask"),
    [
        ("causal()", masks.causal()),
        ("causal", masks.causal()),
        ("causal() & window(255)", masks.causal() & masks.window(255)),
        ("causal & window:255", masks.causal() & masks.window(255)),
        ("causal&window(255)", masks.causal() & masks.window(255)),
        ("window:7, 0", masks.window(7, 0)),
        ("~prefix:3 | window:2,1", ~masks.prefix(3) | masks.window(2, 1)),
        ("x = q - k; (x >= 0) & (x < 9)", None),
        ("~prefix(3) | window(left=2, right=1)", ~masks.prefix(3) | masks.window(2, 1)),
        ("q - k < 256", None),
        ("causal() & (k % 2 == 0)", None),
    ],
)
def test_masks_as_words(words: str, mask: Any) -> None:
    """Both spellings, in `explain` and in `kernels show`."""
    for vocabulary in (cli_words.MASKS, cli_words.STANDING):
        found = cli_words.mask_of([words], vocabulary)
        assert found is not None
        if mask is not None:
            assert found.tree == mask.tree
        else:
            printed = ("q - k < 256", "(q >= k) & (k % 2 == 0)", "(q - k >= 0) & (q - k < 9)")
            assert text(found.tree) in printed


def test_masks_that_look_arrays_up_are_for_kernels_alone() -> None:
    for words in ("segments()", "dense", "causal & segments"):
        assert cli_words.mask_of([words], cli_words.STANDING) is not None
        with pytest.raises(ValueError, match="must look no array up: there is none here"):
            cli_words.mask_of([words])


def test_scores_as_words() -> None:
    then = attn_core.score(lambda s, b, h, q, k: s * 2.0 + attn_core.tanh(s))
    for vocabulary in (cli_words.STANDING_SCORES, cli_words.scores_for(8)):
        for words in ("softcap(5)", "softcap:5", "softcap:5.0"):
            found = cli_words.score_of([words, "s * 2.0 + tanh(s)"], vocabulary)
            assert found is not None
            assert found.tree == scores.softcap(5).then(then).tree
        found = cli_words.score_of(["alibi"], vocabulary)
        assert found is not None
        assert found.tree == scores.alibi(heads=8).tree
        found = cli_words.score_of(["s - 0.5 * float(abs(q - k))"], vocabulary)
        assert found is not None
        assert text(found.tree) == "s - 0.5 * float(abs(q - k))"
        assert cli_words.score_of([], vocabulary) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("casual()", "Got 'casual' in 'casual()'. Did you mean 'causal'?"),
        ("casual:3", "Did you mean 'causal'?"),
        ("window", "the numbers it takes, as window:255. Got 'window': `left` or `right` must"),
        ("causal:3", "must give causal the numbers it takes, as causal. Got 'causal:3': too many"),
        ("window:a", "such as '(q >= k) & (q - k < 256)' or 'causal & window:255'. Got 'window:a'"),
        ("x = 3; causal & (q - k < x)", "must not have causal within other text"),
        ("[q for q in k]", "which is no expression of it"),
        ("causal() and window(3)", "by &, | and ~ alone"),
        ("(q < 3) and (k < 2)", "a & b"),
        ("window('a')", "the numbers it takes"),
        ("prefix()", "the numbers it takes"),
        ("ids[q] == ids[k]", "must"),
        ("q <", "must be an expression"),
        ("q.real < 3", "must look no array up"),
        ("lambda b, h, q, k: q >= k", "returns, as 'q >= k'. Got the function."),
        ("__import__('os')", "Got '__import__'"),
        ("q + k", "must"),
        ("q is k", "'q is k' in 'q is k', which is no expression"),
        ("q is not k", "which is no expression"),
        ("x = y; y = q - k; x >= y", "Got 'y'"),
        ("x = x + 1; x >= q", "Got 'x'"),
        ("'inf' * 3 < q", "which is no expression"),
        (" & ".join(["causal"] * 1500), "`mask` must"),
    ],
)
def test_words_that_are_no_mask(words: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        cli_words.mask_of([words])


def test_in_a_pipe_a_table_is_not_cut(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    run = CliRunner().invoke(app, ["kernels", "configs", "--target", "sm_90"])
    assert run.exit_code == 0, run.output
    lines = run.output.splitlines()
    assert lines[1].split()[:5] == ["kernel", "for", "widths", "bits", "classes"]
    assert "shipped: measured on NVIDIA H200, Triton" in lines[2]


def test_the_command_shows_configurations(place: Path) -> None:
    configs.write(place, [MINE])
    configs.forget()
    run = CliRunner().invoke(app, ["kernels", "configs"], env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert f"yours: 1 in {place}" in run.output
    assert 'yours: on "a GPU"' in run.output
    run = CliRunner().invoke(
        app, ["kernels", "configs", "--target", "sm_90"], env={"COLUMNS": "200"}
    )
    assert run.output.count("forward") == len(configs.CLASSES)
    # How many programs a processor has, of decoding alone.
    rows = [line.split() for line in run.output.splitlines()]
    at = rows[1].index("programs")
    decode = [row for row in rows if row[:1] == ["decode"]]
    assert len(decode) == len(configs.CLASSES)
    assert {row[at] for row in decode} <= {"1", "2", "4"}
    assert not any(row[at].isdigit() for row in rows if row[:1] == ["delta"])
    for words, said in (
        (["sm_90", "--dtype", "half"], "`dtype` must be one of"),
        (["sm90"], "`target` must be sm_NN or gfxNNN. Got 'sm90'. Did you mean 'sm_90'?"),
        (["sm_90", "--width", "300"], "`width` must be from 1 to 256. Got 300."),
    ):
        run = CliRunner().invoke(app, ["kernels", "configs", "--target", *words])
        assert run.exit_code == 2
        assert said in run.output
    # Of a GPU that no entry names, and of what stands in for one.
    for target in ("sm_75", "interpreter"):
        run = CliRunner().invoke(app, ["kernels", "configs", "--target", target])
        assert run.exit_code == 0, run.output


triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is missing")


@triton
def test_the_command_shows_device_functions() -> None:
    code = "from attn_core.cli import app; app()"
    command = [sys.executable, "-c", code, "kernels", "show", "--mask", "causal() & window(255)"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "# mask: (q >= k) & (q - k <= 255)" in run.stdout
    assert "# full tiles: neighbours" in run.stdout
    assert "def function(b, h, q, k, row, operands):\n    c0 = q >= k\n" in run.stdout
    run = subprocess.run(command[:5], capture_output=True, text=True, check=False)
    assert run.returncode == 2


@triton
@pytest.mark.parametrize(
    "words",
    [
        ("causal()&window(31)",),
        ("causal & window:31",),
        ("causal", "window:31"),
        ("q>=k", "window(31)"),
    ],
)
def test_both_commands_take_the_same_words(words: tuple[str, ...]) -> None:
    masks = [word for each in words for word in ("--mask", each)]
    shown = CliRunner().invoke(app, ["kernels", "show", *masks, "--score", "softcap:50"])
    assert "# mask: (q >= k) & (q - k <= 31)\n" in shown.output
    assert "# score: 50.0 * tanh(s / 50.0)\n" in shown.output
    told = CliRunner().invoke(app, ["explain", *masks, "--score", "softcap(50)", "--json"])
    assert json.loads(told.output)["mask"] == "(q >= k) & (q - k <= 31)"
    assert json.loads(told.output)["score"] == "50.0 * tanh(s / 50.0)"


@triton
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("d_bias",), "Got d_bias: there is no bias."),
        (("facts",), "Got facts: there are no lengths."),
        (("reduced",), "Got reduced: there is no mask that looks an array up."),
        (("d_keys", "--width", "256"), "Got d_keys: d_value and d_key run in its place."),
        (("d_value",), "Got d_value: d_keys makes both at once."),
        (("fused", "--target", "sm_75"), "launched for this on sm_75, at width 128 in bfloat16."),
        (("foward",), "Did you mean 'forward'?"),
    ],
)
@pytest.mark.parametrize("printed", [(), ("--ptx",)])
def test_a_kernel_that_nobody_launches_for_it_is_refused_with_the_reason(
    words: tuple[str, ...], printed: tuple[str, ...], said: str
) -> None:
    shown = ["kernels", "show", "--mask", "causal()", *printed, "--kernel", *words]
    run = CliRunner().invoke(app, shown)
    assert run.exit_code == 2
    assert said in run.output


@triton
def test_whether_a_kernel_runs_is_asked_of_what_is_shown(place: Path) -> None:
    """`d_keys` runs of a mask of positions, and not without one."""
    apart = Entry("d_keys", ("sm_90",), (), 0, ("none",), Config(64, 64, 8, 2, apart=True), "", "")
    whole = apart._replace(classes=("positions",), config=Config(64, 64, 8, 2))
    configs.write(place, [apart, whole])
    configs.forget()
    shown = ["kernels", "show", "--kernel", "d_keys", "--mask"]
    assert CliRunner().invoke(app, [*shown, "causal()"]).exit_code == 0
    configs.write(
        place, [apart._replace(classes=("positions",)), whole._replace(classes=("none",))]
    )
    configs.forget()
    run = CliRunner().invoke(app, [*shown, "causal()"])
    assert run.exit_code == 2
    assert "run in its place" in run.output


@triton
@pytest.mark.parametrize("printed", [["--ptx"], []])
@pytest.mark.parametrize("target", ["sm_88", "sm_999", "gfx999"])
def test_a_target_that_no_compiler_here_knows_is_named(
    tmp_path: Path, target: str, printed: list[str]
) -> None:
    """In the last line; what ptxas, MLIR or LLVM say of it may stand above."""
    program = tmp_path / "program.py"
    program.write_text("from attn_core.cli import app\nif __name__ == '__main__': app()", "utf-8")
    words = ["kernels", "show", "--mask", "causal()", "--target", target, *printed]
    run = subprocess.run(
        [sys.executable, str(program), *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    *_, last = run.stderr.splitlines()
    assert last.startswith("attn-core: `--target` must be a GPU that the compilers here make"), last
    assert "sm_75, sm_80, " in last
    assert f"Got {target}. " in last


@triton
def test_the_command_compiles(tmp_path: Path) -> None:
    where = tmp_path / "found.json"
    code = "from attn_core.cli import app\nif __name__ == '__main__': app()"
    program = tmp_path / "program.py"
    program.write_text(code, "utf-8")
    words = ["kernels", "compile", "--target", "sm_90", "--kernel", "delta", "--sample", "plain"]
    words += ["--width", "64", "--dtype", "float16", "--json", str(where)]
    run = subprocess.run(
        [sys.executable, str(program), *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 compiled, 0 with problems" in run.stdout
    found = json.loads(where.read_text("utf-8"))["findings"]
    assert {each["sizes"] for each in found} == {"even", "odd"}
    assert {each["kernel"] for each in found} == {"delta"}
    assert min(each["registers"] for each in found) > 8
    run = subprocess.run(
        [sys.executable, str(program), "kernels", "compile", "--target", "h100"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "must be sm_NN" in run.stderr
