"""Golden vectors: they say enough, damage to them is named, and they catch what is wrong."""

from __future__ import annotations

import builtins
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from attn_core import cli, registry
from attn_core.conformance import golden, golden_check, tolerance
from attn_core.conformance.cases import CASES, SAMPLE
from attn_core.conformance.golden_check import check
from attn_core.conformance.golden_write import shipped, write
from attn_core.conformance.judgement import BY_NAME, Verdict, expected
from attn_core.conformance.questions import Case
from attn_core.conformance.runner import Work, attend

safetensors = pytest.importorskip("safetensors")

NUMPY = registry.load("numpy")
FEW = ("mask-causal", "sinks-mixed", "everything")
MODULE = {"torch": "torch", "tf": "tensorflow", "jax": "jax"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three cases; nobody alters it."""
    return write(tmp_path_factory.mktemp("golden") / "few", FEW)


@pytest.fixture
def few(written: Path, tmp_path: Path) -> Path:
    """A copy to alter."""
    folder = tmp_path / "few"
    folder.mkdir()
    for path in written.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index and make every checksum fit again."""
    index = json.loads((folder / golden.INDEX).read_text("utf-8"))
    change(index)
    for entry in index["cases"]:
        path = folder / str(entry.get("file"))
        if path.is_file():
            content = path.read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / golden.INDEX).write_text(json.dumps(index), "utf-8")
    sums = [
        f"{hashlib.sha256(content).hexdigest()}  {name}"
        for name, content in files(folder).items()
        if name != golden.SUMS
    ]
    (folder / golden.SUMS).write_text("\n".join(sums) + "\n", "utf-8")


# --- Round trip. ----------------------------------------------------------------------------------


def test_every_case_survives_the_round_trip_and_passes(tmp_path: Path) -> None:
    """`check` reads the folder alone, so this says that the folder says enough."""
    told: list[str] = []
    folder = write(tmp_path / "all", seen=told.append)
    assert told == [case.name for case in CASES]
    verdicts = check(folder)
    assert [v.case for v in verdicts] == told
    assert [(v.case, v.problem, v.shares) for v in verdicts if not v.passed] == []


def test_what_is_stored_is_what_was_asked_and_answered(written: Path) -> None:
    for entry in golden.verify(written):
        asked, judged, pulled, _ = expected(BY_NAME[entry["name"]])
        tensors = golden.load(written, entry)
        for name in ("query", "key", "value", "bias", "sinks", "mask"):
            assert (name in tensors) == (name in asked.judge)
            if name in tensors:
                assert tensors[name].dtype == asked.judge[name].dtype
                np.testing.assert_array_equal(tensors[name], asked.judge[name])
        for name, x in asked.cotangents.items():
            np.testing.assert_array_equal(tensors[f"cotangent.{name}"], x)
        for name in ("out", "lse", "weights"):
            np.testing.assert_array_equal(tensors[name], getattr(judged, name))
        for name in ("query", "key", "value"):
            np.testing.assert_array_equal(tensors[f"gradient.{name}"], pulled[name])
        for name in ("query_offset", "kv_lengths", "q_lengths"):
            if entry[name] is not None:
                assert tensors[name].tolist() == entry[name]
        assert set(entry["results"]) <= set(tensors)
        # What is not seen weighs nothing, and what is not kept was seen or not: dense arrays agree.
        assert not tensors["weights"][~tensors["seen"]].any()


def test_dropout_is_stored_as_bits_and_as_words(written: Path) -> None:
    entry = golden.verify(written)[FEW.index("everything")]
    assert entry["dropout"] == {"rate": 0.2, "threshold": round(0.2 * 2**32), "seed": [11, 0]}
    kept = golden.load(written, entry)["dropout_keep"]
    assert kept.shape == (2, 4, 5, 7)
    assert 0 < kept.mean() < 1


def test_16_bit_inputs_are_stored_in_their_own_dtype(tmp_path: Path) -> None:
    folder = write(tmp_path / "half", ["plain-bfloat16", "plain-float16"])
    raw = dict(safetensors.deserialize((folder / "plain-bfloat16.safetensors").read_bytes()))
    assert raw["query"]["dtype"] == "BF16"
    assert raw["out"]["dtype"] == "F64"
    for entry in golden.verify(folder):
        query = golden.load(folder, entry)["query"]
        assert query.dtype.name == entry["dtype"]
        assert query.tobytes() == BY_NAME[entry["name"]].question().call["query"].tobytes()


def test_allowances_are_those_of_the_suite_and_follow_from_the_index(tmp_path: Path) -> None:
    cases: tuple[Any, ...] = (*shipped(), *SAMPLE)
    folder = write(tmp_path / "sample", cases)
    rules = json.loads((folder / golden.INDEX).read_text("utf-8"))["tolerance"]
    by_name = {c.name: c for c in shipped()} | BY_NAME
    for entry in golden.verify(folder):
        _, judged, pulled, textbook = expected(by_name[entry["name"]])
        tensors = golden.load(folder, entry)
        operands = entry["score"]["operands"] if entry["score"] else []
        for what, row in entry["results"].items():
            direction, _, name = what.rpartition("gradient.")
            direction = "gradient" if what.startswith("gradient.") else "out"
            cap = rules["cap"][direction][row["dtype"]] * row["spread"]
            allowed = 2 * row["plain_error"] + rules["floor"][row["dtype"]] * row["spread"]
            allowed = min(allowed, cap * max(1.0, entry["largest_logit"]))
            allowed += rules["judge"] * row["spread"] if row["through_score"] else 0.0
            assert row["allowed"] == pytest.approx(allowed, rel=1e-12), (entry["name"], what)

            if name in operands:
                number = operands.index(name)
                want, ordinary = pulled["operands"][number], textbook.gradients["score"][number]
                name = f"score{number}"
            elif direction == "gradient":
                want, ordinary = pulled[name], textbook.gradients[name]
            else:
                want, ordinary = getattr(judged, what), textbook.outputs[what]
            np.testing.assert_array_equal(tensors[what], want)
            off = want + 0.75 * row["allowed"]
            suite = tolerance.share(
                off,
                want,
                np.asarray(ordinary),
                row["dtype"],
                direction=direction,
                logit=textbook.logit,
                through_score=row["through_score"],
                summed=textbook.summed.get(name, 0.0),
            )
            ours = tolerance.used(off, want, row["allowed"])
            assert suite == pytest.approx(ours, rel=1e-9), (entry["name"], what)


# --- Determinism and the folder on disk. ----------------------------------------------------------


def test_writing_twice_gives_the_same_bytes_in_any_process(written: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from attn_core.conformance.golden_write import write; "
        "write(sys.argv[1], sys.argv[2:])"
    )
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", code, str(folder), *FEW],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        assert files(folder) == files(written)


def test_sums_are_those_of_sha256sum(written: Path) -> None:
    lines = (written / golden.SUMS).read_text("utf-8").splitlines()
    found = {line[66:]: line[:64] for line in lines}
    assert set(found) == set(files(written)) - {golden.SUMS}
    for name, sum_ in found.items():
        assert hashlib.sha256((written / name).read_bytes()).hexdigest() == sum_


def test_a_golden_set_is_replaced_whole_and_an_empty_folder_is_filled(few: Path) -> None:
    (few / golden.SUMS).unlink()  # a damaged set is one still
    write(few, ["plain"])
    assert set(files(few)) == {"plain.safetensors", golden.INDEX, golden.SUMS}
    assert [path.name for path in few.parent.iterdir()] == ["few"]
    empty = few.parent / "empty"
    empty.mkdir()
    write(empty, ["plain"])
    assert files(empty) == files(few)
    assert all(v.passed for v in check(empty))


def test_what_is_no_golden_set_is_left_alone(few: Path, tmp_path: Path) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "dear.txt").write_text("yours")
    with pytest.raises(ValueError, match=r"must be new, empty or a golden set. Got .*'dear.txt'"):
        write(letters, ["plain"])
    assert files(letters) == {"dear.txt": b"yours"}
    (few / "mine.txt").write_text("mine")
    before = files(few)
    with pytest.raises(ValueError, match=r"nothing but its golden set .* Got 'mine.txt' beside"):
        write(few, ["plain"])
    assert files(few) == before
    with pytest.raises(ValueError, match=r"must be a folder\. Got a file"):
        write(letters / "dear.txt", ["plain"])


def test_a_write_that_fails_leaves_nothing_behind(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(few)

    def failing(name: str) -> None:
        if name == "scale":
            raise KeyboardInterrupt

    for folder in (few, few.parent / "new"):
        with pytest.raises(KeyboardInterrupt):
            write(folder, ["plain", "scale"], seen=failing)
    assert files(few) == before
    assert [path.name for path in few.parent.iterdir()] == ["few"]

    rename = Path.rename

    def full(self: Path, target: Any) -> Path:
        if self.name == "new":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="disk full"):
        write(few, ["plain"])
    assert files(few) == before


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be names of cases. Got 'plian'. Did you mean"):
        write(tmp_path / "new", ["plian"])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "half", ["plain-bfloat16"])
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "safetensors":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"safetensors.*pip install 'attn-core\[golden\]'"):
        check(folder)


# --- Corruption. ----------------------------------------------------------------------------------

FILE = "mask-causal.safetensors"


def cut(path: Path, less: int) -> None:
    path.write_bytes(path.read_bytes()[:-less])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def listed_once_more(folder: Path) -> None:
    (folder / "extra.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: cut(d / FILE, 9), rf"{FILE} must have \d+ bytes. Got \d+: truncated"),
        (lambda d: (d / FILE).write_bytes(b""), rf"{FILE} must have .* Got 0: truncated"),
        (
            lambda d: (d / FILE).write_bytes((d / FILE).read_bytes() + b"\0"),
            rf"{FILE} must have .*: something was added",
        ),
        (lambda d: flip(d / FILE, -1), rf"{FILE} must have sha256 .*: it was altered"),
        (lambda d: flip(d / FILE, 30), rf"{FILE} must have sha256 .*: it was altered"),
        (lambda d: (d / FILE).unlink(), rf"{FILE} must be in .* Got No such file"),
        (listed_once_more, "must list every safetensors file. Got 'extra.safetensors'"),
        (lambda d: (d / golden.INDEX).unlink(), "must hold a golden set, index.json"),
        (lambda d: cut(d / golden.INDEX, 100), r"index.json must be whole JSON. Got \d+ bytes"),
        (lambda d: (d / golden.INDEX).write_bytes(b""), "must be whole JSON. Got 0 bytes"),
        (lambda d: (d / golden.INDEX).write_bytes(b"\xff{}"), "must be whole JSON"),
        (lambda d: (d / golden.INDEX).write_text("[1]"), "must state its `format`"),
        (lambda d: (d / golden.INDEX).write_text("{}"), "must state its `format`"),
        (
            lambda d: (d / golden.INDEX).write_text(
                (d / golden.INDEX).read_text().replace('"rate":0.2', '"rate":0.3')
            ),
            "index.json must have the checksum in SHA256SUMS. Got another: it was altered",
        ),
        (lambda d: (d / golden.SUMS).unlink(), "must hold SHA256SUMS"),
        (lambda d: (d / golden.SUMS).write_bytes(b"\xff"), "must hold SHA256SUMS"),
        (lambda d: (d / golden.SUMS).write_text(""), "must have the checksum in SHA256SUMS"),
        (lambda d: flip(d / golden.SUMS, 0), "SHA256SUMS must agree with index.json"),
        (lambda d: [path.unlink() for path in d.iterdir()], "must hold a golden set"),
        (lambda d: forge(d, lambda i: i.pop("cases") and i.update(cases=[])), "must list every"),
        (lambda d: forge(d, lambda i: i["cases"][0].pop("scale")), "must state 'scale'"),
        (
            lambda d: forge(d, lambda i: i["cases"][0].update(file="../few/" + FILE)),
            "must be a bare file name",
        ),
        (
            lambda d: forge(d, lambda i: i["cases"][0]["tensors"].update(query=["float32", [1]])),
            r"query in .* must be as in index.json, \['float32', \[1\]\]. Got",
        ),
        (
            lambda d: forge(d, lambda i: i["cases"][0]["tensors"].update(more=["float32", [1]])),
            f"{FILE} must hold more",
        ),
        (
            lambda d: (flip(d / FILE, 9), forge(d, lambda i: None)),
            f"{FILE} must be safetensors. Got",
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], Any], words: str, few: Path) -> None:
    damage(few)
    with pytest.raises(golden.GoldenError, match=words):
        check(few)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        golden.GoldenError, match=r"must hold a golden set.* Got .*nowhere: No such"
    ):
        check(tmp_path / "nowhere")


@pytest.mark.parametrize("found", [0, 2, "1", None])
def test_another_format_is_refused_by_name(found: Any, few: Path) -> None:
    forge(few, lambda index: index.update(format=found, generator="attn-core 9.9"))
    with pytest.raises(golden.GoldenError, match=r"must be 1, .* Got .*, written by attn-core 9.9"):
        check(few)


def test_unknown_keys_are_left_alone(few: Path) -> None:
    """The promise to readers in docs/GOLDEN.md, kept by ours."""
    forge(few, lambda index: (index.update(more=1), index["cases"][0].update(colour="red")))
    assert all(v.passed for v in check(few))


# --- Wrong implementations. -----------------------------------------------------------------------


def planted(alter: Callable[[dict[str, Any]], Any]) -> Any:
    """The numpy backend with its arguments, or its answer, altered on the way."""

    def vjp(arguments: dict[str, Any], cotangents: dict[str, Any], form: str) -> Any:
        changed = dict(arguments)
        after = alter(changed)
        output, gradients = NUMPY.vjp(changed, cotangents, form)
        return after(output, gradients) if after else (output, gradients)

    same = {name: getattr(NUMPY, name) for name in ("from_numpy", "to_numpy")}
    return types.SimpleNamespace(NAME="planted", vjp=vjp, **same)


def failing(alter: Callable[[dict[str, Any]], Any], folder: Path) -> dict[str, Any]:
    return {v.case: v for v in check(folder, planted(alter)) if not v.passed}


def untouched(arguments: dict[str, Any]) -> None:
    return None


def inverted(arguments: dict[str, Any]) -> None:
    arguments["mask"] = ~arguments["mask"]


def no_sinks(arguments: dict[str, Any]) -> Any:
    sinks = arguments.pop("sinks", None)
    zero = {} if sinks is None else {"sinks": 0 * sinks}
    return lambda output, gradients: (output, gradients | zero)


def answers(change: Callable[[Any, Any], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: change


def nan(output: Any, gradients: Any) -> Any:
    output.out[0, 0, 0, 0] = np.nan
    return output, gradients


def raises(output: Any, gradients: Any) -> Any:
    raise ZeroDivisionError("oh")


@pytest.mark.parametrize(
    ("fault", "cases"),
    [
        (lambda a: a.update(scale=2 * a["scale"]), set(FEW)),
        (lambda a: a.update(query_offset="start"), {"mask-causal", "everything"}),
        (inverted, set(FEW)),
        (no_sinks, {"sinks-mixed", "everything"}),
        (lambda a: a.pop("dropout", None) and None, {"everything"}),
        (lambda a: a.pop("score", None) and _scoreless, {"everything"}),
        (answers(nan), set(FEW)),
        (answers(raises), set(FEW)),
        (answers(lambda o, g: (o, g | {"query": 0 * g["query"]})), set(FEW)),
        (answers(lambda o, g: (o, {n: x for n, x in g.items() if n != "key"})), set(FEW)),
        (answers(lambda o, g: (o._replace(lse=None), g)), set(FEW)),
        (answers(lambda o, g: (o._replace(lse=np.maximum(o.lse, -1e30)), g)), {*FEW[1:]}),
        (answers(lambda o, g: (o._replace(out=o.out.astype(np.float64)), g)), set(FEW)),
        (answers(lambda o, g: (o._replace(out=o.out[..., :1]), g)), set(FEW)),
        (answers(lambda o, g: (o._replace(out=o.out + 1e-4), g)), set(FEW)),
    ],
)
def test_a_wrong_implementation_is_caught(fault: Any, cases: set[str], written: Path) -> None:
    assert failing(untouched, written) == {}
    assert set(failing(fault, written)) == cases


def _scoreless(output: Any, gradients: Any) -> Any:
    return output, gradients | {"score": (np.zeros(4, np.float32),)}


def test_a_verdict_says_what_failed_and_where(written: Path) -> None:
    found = failing(answers(nan), written)["mask-causal"]
    assert found.shares["out"] == np.inf
    assert found.where["out"] == [0, 0, 0, 0]
    assert found.shares["gradient.query"] <= 1
    found = failing(answers(raises), written)["mask-causal"]
    assert found.problem == "ZeroDivisionError: oh"


# --- Backends in processes of their own. ----------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(module) is None, reason=f"{module} is missing"
            ),
        )
        for name, module in MODULE.items()
    ],
)
def test_a_framework_is_asked_in_a_process_of_its_own(backend: str, written: Path) -> None:
    loaded = MODULE[backend] in sys.modules
    told: list[Any] = []
    verdicts = check(written, backend, seen=told.append)
    assert [(v.case, v.backend, v.problem) for v in verdicts] == [(n, backend, "") for n in FEW]
    assert all(v.passed for v in verdicts)
    assert told == verdicts
    assert (MODULE[backend] in sys.modules) == loaded


def test_a_worker_that_dies_costs_its_case_alone(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The worker imports sitecustomize first: this one ends the process within one case.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, attn_core.conformance.golden_check as g\n"
        "ask = g._ask\n"
        "def dying(entry, *rest):\n"
        "    if entry['name'] == 'sinks-mixed': os._exit(7)\n"
        "    return ask(entry, *rest)\n"
        "g._ask = dying\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    work = Work("numpy", "eager", tuple(FEW))
    verdicts = attend(work, golden_check.worker(written, "numpy"))
    assert [v.passed for v in verdicts] == [True, False, True]
    assert "status 7" in verdicts[1].problem


def test_a_worker_that_cannot_start_is_an_error(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from attn_core import registry\n"
        "def load(name): raise ImportError(f'{name} is broken')\n"
        "registry.load = load\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match="torch is broken"):
        check(written, "torch")


def test_an_unknown_backend_is_refused(written: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        check(written, "torhc")


# --- The shipped set. -----------------------------------------------------------------------------


def test_the_shipped_set_passes_and_is_small() -> None:
    verdicts = check()
    assert [v.case for v in verdicts] == [case.name for case in shipped()]
    assert all(v.passed for v in verdicts)
    assert sum(len(content) for content in files(golden.SHIPPED_AT).values()) < 300_000


def test_the_shipped_set_holds_every_option_and_dtype() -> None:
    entries = golden.verify()
    tensors = {name for entry in entries for name in entry["tensors"]}
    assert {"bias", "sinks", "mask", "kv_lengths", "q_lengths", "dropout_keep"} <= tensors
    assert {e["dtype"] for e in entries} == {"float64", "float32", "float16", "bfloat16"}
    assert {e["layout"] for e in entries} == {"BHTD", "BTHD"}
    words = " ".join(word for entry in entries for word in entry["words"])
    for hard in ("poison", "see no key", "-inf hides its key", "dropout", "tanh", "int0[b, q]"):
        assert hard in words
    # A case of the shipped set is found in the suite by what follows "small-".
    cases: dict[str, Case] = BY_NAME
    for case in shipped():
        assert cases[case.name.removeprefix("small-")].changes == case.changes


def test_writing_the_shipped_set_again_gives_the_same_set(tmp_path: Path) -> None:
    """Inputs bit for bit. Results to rounding: another processor's matrix products and
    exponentials may differ in a float64's last bit, and a score's derivative, being a difference
    quotient, makes that 2**-35 or so."""
    again = write(tmp_path / "again", shipped())
    for old, new in zip(golden.verify(), golden.verify(again), strict=True):
        for key in set(old) - {"sha256", "largest_logit", "results"}:
            assert old[key] == new[key], (old["name"], key)
        kept, made = golden.load(golden.SHIPPED_AT, old), golden.load(again, new)
        assert list(old["results"]) == list(new["results"])
        for name in kept:
            if name not in old["results"]:
                assert kept[name].tobytes() == made[name].tobytes(), (old["name"], name)
                continue
            was, now = old["results"][name], new["results"][name]
            close = tolerance.JUDGE if was["through_score"] else 1e-12
            finite = np.isfinite(kept[name])
            np.testing.assert_array_equal(kept[name][~finite], made[name][~finite])
            error = np.abs(kept[name][finite] - made[name][finite]).max(initial=0.0)
            assert error <= close * max(1.0, was["spread"]), (old["name"], name)
            # The textbook's error is a handful of roundings: its size is kept, not its bits.
            assert now["allowed"] == pytest.approx(was["allowed"], rel=1.0, abs=0.0)


# --- The command. ---------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["conformance", "golden", *arguments])


def test_the_command_writes_and_checks(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    done = command("write", str(folder), "--case", "mask-causal", "--case", "sinks-mixed")
    assert done.exit_code == 0, done.output
    assert "sinks-mixed.safetensors" in files(folder)
    done = command("check", str(folder), "--backend", "numpy")
    assert done.exit_code == 0, done.output
    assert "mask-causal" in done.stdout
    assert "0 failed" in done.stdout
    flip(folder / "mask-causal.safetensors", -1)
    done = command("check", str(folder))
    assert done.exit_code == 1
    assert "it was altered" in done.output
    assert command("check", str(tmp_path / "nowhere")).exit_code == 2
    assert command("check", "--backend", "torhc").exit_code == 2
    assert command("write", str(tmp_path)).exit_code == 2


def test_the_command_checks_the_shipped_set_and_fails_by_its_exit_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = command("check")
    assert done.exit_code == 0, done.output
    assert f"{len(shipped())} passed, 0 failed" in done.stdout
    monkeypatch.setattr(
        golden_check, "check", lambda *_, **__: [Verdict("plain", "numpy", "eager", {"out": 3.0})]
    )
    done = command("check")
    assert done.exit_code == 1
    assert "out: 3 of what is allowed" in done.stdout
