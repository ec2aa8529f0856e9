"""Results of the benchmarks: targets, the page, the terminal, and the command that makes them."""

from __future__ import annotations

import io
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from attn_core import cli
from attn_core.benchmarks import page, report, results, rooms, runner, targets, timing
from attn_core.benchmarks.cases import BY_NAME, CASES, DIRECTIONS
from attn_core.benchmarks.results import Measurement, Results

# Results, targets, page ------------------------------------------------------------------------

PLACE: dict[str, Any] = {
    "date": "2026-01-31T12:00:00+00:00",
    "python": "3.11.9",
    "packages": {"numpy": "2.3.0", "torch": "2.13.0"},
    "cpu": "A processor",
    "cores": 2,
    "threads": 2,
    "load": [0.1, 0.2, 0.3],
}


def timed(case: str, subject: str, direction: str, *seconds: float) -> Measurement:
    rounds = [[x, x] for x in seconds]
    return Measurement(case, subject, direction, shares={"out": 0.25}, repeats=3, rounds=rounds)


def run_of(*measurements: Measurement) -> Results:
    known = {each.case: BY_NAME[each.case] for each in measurements}
    return Results(PLACE, known, list(measurements))


def target(name: str) -> targets.Target:
    (found,) = [each for each in targets.TARGETS if each.name == name]
    return found


DENSE = [
    f"{mask}-T{length}-D{width}-float32"
    for mask in ("full", "causal")
    for length, width in ((2048, 64), (4096, 64), (2048, 128))
]


@pytest.mark.parametrize(("seconds", "verdict"), [(0.5, "aim met"), (1.05, "met"), (1.2, "missed")])
def test_a_speed_target_is_decided_by_its_worst_case(seconds: float, verdict: str) -> None:
    parts = [timed(case, "torch-sdpa-flash", "forward", 1.0) for case in DENSE]
    parts += [timed(case, "jax:auto", "forward", 0.5) for case in DENSE[1:]]
    asked = target("JAX forward against torch flash, float32")
    before = targets.evaluate(asked, run_of(*parts))
    assert (before.verdict, before.worst) == ("incomplete", 2.0)
    after = targets.evaluate(asked, run_of(*parts, timed(DENSE[0], "jax:auto", "forward", seconds)))
    assert after.verdict == verdict
    assert after.worst == pytest.approx(1 / seconds)
    assert targets.evaluate(asked, run_of()).verdict == "not measured"


def test_what_misses_is_told_of_a_target_that_was_not_measured_whole() -> None:
    parts = [timed(case, "torch-sdpa-flash", "forward", 1.0) for case in DENSE]
    parts += [timed(DENSE[0], "jax:auto", "forward", 2.0)]
    parts += [timed(DENSE[1], "jax:auto", "forward", 0.5)]
    found = targets.evaluate(target("JAX forward against torch flash, float32"), run_of(*parts))
    assert (found.verdict, found.missing, found.misses) == ("incomplete", 4, 1)
    said = "not measured: 4 of 6 cases; 1 of the other 2 missed"
    assert report.in_words(found) == said
    text = page.page(run_of(*parts), "x", picture=False)
    assert f"| 0.5 x | **{said}** |" in text
    assert f"| {DENSE[2]} | not measured |  |" in text


def test_a_wrong_subject_has_no_part_in_a_target() -> None:
    parts = [timed(case, "torch-sdpa-flash", "forward", 1.0) for case in DENSE]
    parts += [replace(timed(c, "jax:auto", "forward", 0.1), status="wrong") for c in DENSE]
    asked = target("JAX forward against torch flash, float32")
    assert targets.evaluate(asked, run_of(*parts)).verdict == "not measured"


def test_share_of_work_is_one_where_time_follows_live_entries() -> None:
    name = "window-256-T8192-D64-float32"
    case = BY_NAME[name]
    live = case.asked_of("torch:auto@causal").entries / case.entries
    assert 16 < live < 17
    parts = [
        timed(name, "torch:auto@causal", "forward", live),
        timed(name, "torch:auto", "forward", 2.0),
    ]
    rows = targets._work(name)(run_of(*parts))
    assert rows[0].label == "torch forward"
    assert rows[0].value == pytest.approx(0.5)
    assert rows[1].value is None


def test_straight_and_bent_lines() -> None:
    x = [100.0, 200.0, 400.0, 800.0]
    assert targets.straightness(x, [3 + 2 * a for a in x]) == pytest.approx(0, abs=1e-9)
    bent = targets.straightness(x, [a**2 for a in x])
    assert bent > 0.25
    assert targets.straightness([1, 2, 3], [1.0, 2.2, 3.0]) < 0.1


@pytest.mark.parametrize(("power", "verdict"), [(1, "aim met"), (2, "missed")])
def test_windows_must_cost_in_proportion(power: int, verdict: str) -> None:
    name = "windows-T8192-D64-float32"
    case, parts = BY_NAME[name], []
    for subject in case.subjects:
        parts.append(timed(name, subject, "forward", float(case.asked_of(subject).blocks) ** power))
    asked = target("time against live blocks, windows 128 to 4096, linear")
    assert targets.evaluate(asked, run_of(*parts)).verdict == verdict


def test_memory_overhead_and_first_calls() -> None:
    def held(mask: str, length: int, subject: str, side: str, size: int) -> Measurement:
        name = f"memory-{mask}-T{length}-D64-float32"
        return Measurement(name, subject, side, shares={"out": 0.1}, peak=size, planned=None)

    def every(power: int, unit: int, without: str = "", more: int = 0) -> Results:
        return run_of(
            *(
                held(mask, length, subject, side, unit * (length // 4096) ** power + extra)
                for mask in ("full", "causal")
                for length in (4096, 8192, 16384)
                for subject, extra in zip(asked, (0, 0, more, 0), strict=True)
                for side in DIRECTIONS
                if subject != without
            )
        )

    asked = ("torch:auto", "jax:auto", "tf:auto", "tf-unknown:auto")

    growth = target("temporaries at twice the length, growth")
    assert targets.evaluate(growth, every(1, 4_000_000)).verdict == "aim met"
    assert targets.evaluate(growth, every(2, 4_000_000)).verdict == "missed"
    assert targets.evaluate(growth, every(2, 1000)).verdict == "aim met"  # all below the floor
    forward = target("temporaries at T 16384, forward")
    assert targets.evaluate(forward, every(1, 4_000_000)).worst == 16
    assert targets.evaluate(forward, every(2, 4_000_000)).verdict == "missed"
    assert targets.evaluate(forward, every(1, 4_000_000, more=3_000_000)).worst == 19
    assert targets.evaluate(forward, every(1, 4_000_000, "tf:auto")).verdict == "incomplete"

    name = "tiny-T4-D8-float32"
    pair = [
        timed(name, "torch:auto", "forward", 50e-6),
        timed(name, "torch-sdpa", "forward", 20e-6),
    ]
    tiny = targets.evaluate(target("overhead on tiny tensors"), run_of(*pair))
    assert tiny.verdict == "met"
    assert tiny.worst == pytest.approx(30)


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    wrong = Measurement(DENSE[0], "jax-nn", "forward", "wrong", "p", {"out": float("inf")})
    before = run_of(timed(DENSE[0], "jax:auto", "forward", 0.25, 0.5), wrong)
    path = tmp_path / "deep" / "run.json"
    results.save(before, path)
    after = results.load(path)
    assert after.measurements == before.measurements
    assert after.cases == before.cases
    path.write_text(path.read_text("utf-8").replace('"version": 1', '"version": 7'), "utf-8")
    with pytest.raises(
        ValueError, match=r"must hold benchmark results of version 1. Got version 7"
    ):
        results.load(path)
    path.write_text('{"version": 1, "cases": []}', "utf-8")
    with pytest.raises(ValueError, match="must hold an environment, cases and measurements"):
        results.load(path)


def test_the_commit_is_that_of_the_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*words: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    for name in ("benchmarks/results/cpu.json", "benchmarks/results.py", "docs/B.md", "other.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n", "utf-8")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "benchmarks" / "results.py"))
    git("init")
    assert results.commit() == ""  # nothing of ours is in that checkout
    git("add", ".")
    git("commit", "-m", "one")
    clean = results.commit()
    assert len(clean) >= 7
    (tmp_path / "benchmarks/results/cpu.json").write_text("2\n", "utf-8")
    (tmp_path / "docs/B.md").write_text("2\n", "utf-8")
    assert results.commit() == clean
    (tmp_path / "other.py").write_text("2\n", "utf-8")
    assert results.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert results.commit() == ""


def test_the_page_publishes_losses_and_refusals(tmp_path: Path) -> None:
    parts = [timed(DENSE[0], "torch-sdpa-flash", "forward", 0.1, 0.1)]
    parts += [timed(DENSE[0], "jax:auto", "forward", 0.2, 0.2)]
    parts += [timed(DENSE[0], "matmul", "forward", 0.05, 0.05)]
    parts += [Measurement(DENSE[0], "onnxruntime", "forward", "refused", "it | is not here")]
    source = tmp_path / "cpu.json"
    run = run_of(*parts)
    results.save(run, source)
    assert not page.write_page(source, results.load(source), tmp_path / "B.md")
    text = (tmp_path / "B.md").read_text("utf-8")
    assert (
        "| JAX forward against torch flash, float32 | ≥ 0.9 x | ≥ 1 x | 0.5 x "
        "| **not measured: 5 of 6 cases; 1 of the other 1 missed** |" in text
    )
    assert "A processor, 2 threads on 2 cores; load before the run 0.1, 0.2, 0.3." in text
    rate = BY_NAME[DENSE[0]].operations("forward") / 0.2 / 1e9
    top = 2 * 2048**3 / 0.05 / 1e9
    row = f"| jax:auto | 200 | 200 to 200 | {rate:.3g} | {100 * rate / top:.0f}% | 0.25 |"
    assert row in text
    assert "| onnxruntime | refused | it \\| is not here | 1 |" in text
    assert page.PICTURE not in text
    run.quick = True
    with pytest.raises(ValueError, match=r"must be made from a full run. Got one with --quick"):
        page.page(run, "cpu.json", picture=False)


def test_a_page_says_of_which_commit_each_figure_is() -> None:
    def on(commit: str, date: str, case: str) -> Measurement:
        return replace(timed(case, "jax:auto", "forward", 0.2), commit=commit, date=date)

    def text(*measurements: Measurement, **place: Any) -> str:
        run = run_of(*measurements)
        return page.page(
            replace(run, environment={**PLACE, **place}), "cpu.json", picture=False
        ).replace("\n", " ")

    first, second = on("abc1234", "2026-01-31T13", DENSE[0]), on("def5678", "2026-02-03", DENSE[1])
    third = on("abc1234", "2026-02-02", DENSE[2])
    whole = text(first, third)
    assert (
        "Measured on 2026-01-31: commit abc1234 (2026-01-31 to 2026-02-02, 2 measurements)."
        in whole
    )
    assert "Commit abc1234." not in whole
    parts = text(first, second, parts=[PLACE["date"], "2026-02-03"])
    assert (
        "Measured in parts, begun 2 times, from 2026-01-31: commit abc1234 (2026-01-31, "
        "1 measurements); commit def5678 (2026-02-03, 1 measurements)." in parts
    )
    assert f"### {DENSE[1]}, forward  Commit def5678." in parts
    old = text(timed(DENSE[0], "jax:auto", "forward", 0.2), second)
    assert "commit not recorded (day not recorded, 1 measurements)" in old
    assert f"### {DENSE[0]}, forward  Commit not recorded." in old


def test_the_committed_results_still_make_a_page() -> None:
    source = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu.json"
    assert "## Targets, case by case" in page.page(results.load(source), "cpu.json", picture=False)


def test_the_bare_products_share_of_work_stands_beside_ours() -> None:
    name, floor = "window-256-T8192-D64-float32", "floor-window-T8192-D64-float32"
    live = BY_NAME[name].asked_of("jax:auto@causal").entries / BY_NAME[name].entries
    parts = [timed(name, "jax:auto@causal", "forward", live)]
    parts += [timed(name, "jax:auto", "forward", 4.0)]
    parts += [timed(floor, "jax-floor@causal", "forward", live)]
    parts += [timed(floor, "jax-floor", "forward", 2.0)]
    text = page.page(run_of(*parts), "x", picture=False)
    assert "| jax forward | 0.25 x | 0.25 x to 0.25 x, median 0.25 x | 0.5 x |" in text
    assert "| jax backward | not measured |  | not measured |" in text
    assert "| tf both | not measured |  |  |" in text
    assert "| torch forward | not measured |  | not measured |" in text


def test_why_a_target_is_missed_stands_below_its_cases() -> None:
    each = next(t for t in targets.TARGETS if t.name.startswith("window of 256"))
    assert each.why
    row = targets.Row("jax both", 0.4)
    told = [
        " ".join(page._target_rows(run_of(), targets.Outcome(each, [row], 0.4, verdict)).split())
        for verdict in ("missed", "met")
    ]
    assert each.why in told[0]
    assert each.why not in told[1]


def test_bare_products_beside_jax_nn() -> None:
    name = "causal-T2048-D128-float32"
    parts = [timed(name, "jax:auto", "forward", 1.0), timed(name, "jax-nn", "forward", 4.0)]
    parts += [timed(f"floor-{name}", "jax-floor", "forward", 0.5)]
    parts += [timed(f"floor-{name}", "jax-nn", "forward", 4.5)]
    text = page.page(run_of(*parts), "x", picture=False)
    assert f"| {name} | 4 x | 4 x to 4 x, median 4 x | 9 x |" in text


def test_floors_stand_beside_what_they_are_the_floor_of() -> None:
    name = next(case.name for case in CASES if case.name.startswith("floor-window"))
    parts = [timed(name, "jax:auto", "forward", 0.2), timed(name, "jax-floor", "forward", 0.05)]
    text = page.page(run_of(*parts, timed(name, "tf:auto", "forward", 0.2)), "x", picture=False)
    assert f"| {name} | jax | 200 | 50 | 25% | 25% to 25% |" in text
    assert f"| {name} | tf |" not in text
    assert "Where the time goes" not in page.page(run_of(parts[0]), "x", picture=False)


@pytest.mark.parametrize("name", ["torch", "jax", "tf"])
def test_a_floor_is_timed_and_never_checked(name: str) -> None:
    if find_spec("tensorflow" if name == "tf" else name) is None:
        pytest.skip(f"{name} is not installed")
    with rooms.Worker(1) as room:
        for case in (c.small() for c in CASES if f"{name}-floor" in c.subjects):
            question = {"subject": f"{name}-floor", "case": case.as_dict()}
            command = {"do": "prepare", **question, "least": 0.001}
            got = room.ask({**command, "direction": case.directions[0]}, 300)
            if name == "torch" and case.mask in ("full", "causal"):
                assert "the kernel itself is the floor" in got["refused"]
                continue
            assert got["shares"] == {}
            assert room.ask({"do": "sample", **question}, 300)["seconds"] > 0
            got = room.ask({**command, "direction": "both"}, 300)
            assert "of one pass" in got["refused"] or "has no backward pass" in got["refused"]


def test_the_picture_stands_beside_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "windows-T8192-D64-float32"
    parts = [timed(name, s, "forward", 0.1 + i / 10) for i, s in enumerate(BY_NAME[name].subjects)]
    assert page.write_page(tmp_path / "cpu.json", run_of(*parts), tmp_path / "B.md")
    assert (tmp_path / page.PICTURE).stat().st_size > 5000
    assert f"]({page.PICTURE})" in (tmp_path / "B.md").read_text("utf-8")


def test_the_terminal_shows_times_verdicts_and_reasons() -> None:
    parts = [
        timed(DENSE[0], "torch-sdpa-flash", "forward", 0.1),
        timed(DENSE[0], "jax:auto", "forward", 0.2),
    ]
    parts.append(Measurement(DENSE[0], "jax-nn", "forward", "wrong", "Got d_key 7."))
    run = run_of(*parts)
    console = Console(file=io.StringIO(), width=160)
    console.print(report.step_table(run, parts), report.targets_table(run))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "wrong: Got d_key 7." in text
    assert "missed" in text
    assert not run.broken  # a peer's mistake is its own
    ours = Measurement(DENSE[0], "tf:auto", "forward", "wrong", "Got out 9.")
    assert run_of(*parts, ours).broken == [ours]
    assert report.failures(run_of(*parts, ours))[0] == ours


# The command line ------------------------------------------------------------------------------


def test_the_command_line_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    run = CliRunner()
    unknown = run.invoke(cli.app, ["bench", "run", "--case", "nonesuch"])
    assert unknown.exit_code == 2
    assert "must name a case" in unknown.output
    near = run.invoke(cli.app, ["bench", "run", "--case", "cuasal-T2048-D64-float32"])
    assert near.exit_code == 2
    assert "Did you mean 'causal-T2048-D64-float32'?" in near.output
    missing = run.invoke(cli.app, ["bench", "page", str(tmp_path / "none.json")])
    assert missing.exit_code == 2


@pytest.mark.parametrize("bad", [False, True])
def test_the_command_line_fails_on_ours_being_wrong(
    bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(steps: Any, **given: Any) -> Any:
        for name in steps[0].subjects:
            found = timed(steps[0].case.name, name, "forward", 0.1)
            broken = bad and name == "torch:auto"
            yield replace(found, status="wrong", rounds=[]) if broken else found

    monkeypatch.setattr(runner, "run", run)
    path = tmp_path / "run.json"
    monkeypatch.setattr(results, "commit", lambda: "abc1234-dirty")
    found = CliRunner().invoke(cli.app, ["bench", "run", "--case", "tiny", "--json", str(path)])
    assert found.exit_code == int(bad), found.output
    for each in results.load(path).measurements:
        assert each.commit == "abc1234-dirty"
        assert datetime.fromisoformat(each.date).tzinfo is not None
    assert len(results.load(path).measurements) == len(BY_NAME["tiny-T4-D8-float32"].subjects)


@pytest.mark.parametrize(
    ("words", "rounds", "least"),
    [
        ((), 7, timing.LEAST),
        (("--rounds", "3"), 3, timing.LEAST),
        (("--quick",), 2, 0.001),
        (("--quick", "--rounds", "1"), 1, 0.001),
    ],
)
def test_the_pace_is_as_asked(
    words: tuple[str, ...], rounds: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces: list[runner.Pace] = []

    def run(steps: Any, *, threads: int, pace: runner.Pace, seen: Any) -> Any:
        paces.append(pace)
        return iter(())

    monkeypatch.setattr(runner, "run", run)
    CliRunner().invoke(cli.app, ["bench", "run", "--case", "tiny", "--timeout", "9", *words])
    assert paces == [runner.Pace(rounds, least, 9)]


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(steps: Any, **given: Any) -> Any:
        for step in steps:
            for name in step.subjects:
                if len(asked) == 12:
                    raise KeyboardInterrupt
                asked.append(f"{step.case.name} {step.direction} {name}")
                yield timed(step.case.name, name, step.direction, 0.1)

    monkeypatch.setattr(runner, "run", run)
    path = tmp_path / "run.json"
    command = ["bench", "run", "--case", "T4096-D64-bfloat16", "--json", str(path)]
    cut = CliRunner().invoke(cli.app, command)
    assert cut.exit_code == 130
    steps = runner.plan(["T4096-D64-bfloat16"])
    size = len(steps[0].subjects)
    assert len(results.load(path).measurements) == 12
    assert 12 % size, "a step must be cut in two for this to say anything"

    asked.clear()
    monkeypatch.setattr(runner, "run", lambda steps, **given: iter(asked.extend(steps) or ()))
    CliRunner().invoke(cli.app, [*command, "--resume"])
    assert asked == steps[12 // size :]
    kept = results.load(path)
    assert len(kept.measurements) == 12 // size * size


def test_a_case_is_measured_again_where_that_is_asked_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter((0.1, 0.2))

    def run(steps: Any, **given: Any) -> Any:
        seconds = next(taken)
        for step in steps:
            for name in step.subjects:
                yield timed(step.case.name, name, step.direction, seconds)

    monkeypatch.setattr(runner, "run", run)
    path = tmp_path / "run.json"
    command = ["bench", "run", "--json", str(path), "--case"]
    assert CliRunner().invoke(cli.app, [*command, "causal-T4096"]).exit_code == 0
    name = "causal-T4096-D64-bfloat16"
    found = CliRunner().invoke(cli.app, [*command, name, "--resume", "--again"])
    assert found.exit_code == 0, found.output
    after = results.load(path)
    assert after.environment["again"] == [name]
    assert {m.case: m.rounds[0][0] for m in after.measurements if "bfloat16" in m.case} == {
        name: 0.2
    }
    assert {m.rounds[0][0] for m in after.measurements if "float32" in m.case} == {0.1}
    assert f"told as it came out then: {name}." in page.page(after, "x", picture=False)
    for words in (["--again"], ["--resume", "--again"]):
        refused = CliRunner().invoke(cli.app, ["bench", "run", "--json", str(path), *words])
        assert refused.exit_code == 2
        assert "`--again` must come with --resume and --case" in refused.output


def test_a_case_that_changed_or_went_wrong_is_measured_again() -> None:
    good, bad = timed(DENSE[0], "jax:auto", "forward", 0.1), DENSE[1]
    before = run_of(good, Measurement(bad, "tf:auto", "both", "wrong", "Got out 9."))
    found = results.resumed(before, before)
    assert found.measurements == before.measurements
    assert found.holds(BY_NAME[DENSE[0]], "forward", ["jax:auto"])
    assert not found.holds(BY_NAME[bad], "both", ["tf:auto"])
    changed = replace(BY_NAME[DENSE[0]], subjects=("jax:auto",))
    now = replace(before, cases={**before.cases, changed.name: changed}, measurements=[])
    assert good not in results.resumed(before, now).measurements


def test_a_run_goes_on_only_where_it_began(tmp_path: Path) -> None:
    before = run_of(timed(DENSE[0], "jax:auto", "forward", 0.1))
    now = replace(before, environment={**PLACE, "date": "2026-02-01"}, measurements=[])
    found = results.resumed(before, now)
    assert found.environment["parts"] == [PLACE["date"], "2026-02-01"]
    assert len(found.measurements) == 1
    for name, other in (("cpu", "Another"), ("packages", {}), ("threads", 4)):
        with pytest.raises(ValueError, match=f"with {name} "):
            results.resumed(before, replace(now, environment={**PLACE, name: other}))
    with pytest.raises(ValueError, match="--quick"):
        results.resumed(before, replace(now, quick=True))
    refused = CliRunner().invoke(cli.app, ["bench", "run", "--case", "tiny", "--resume"])
    assert refused.exit_code == 2
    assert "--json" in refused.output
