"""The reports of a run: JSON that comes back, JUnit, the page in a browser, the difference."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console
from typer.testing import CliRunner

from attn_core.cli import app
from attn_core.conformance import difference, junit, page, report
from attn_core.conformance.judgement import Verdict

HOSTILE = "</script><script>document.title='owned'</script><!-- <b>&amp;\u2028 \x1b[31m\x00 \ud800"
START = '{"version": 2, "environment": {}, "verdicts": ['
PLACE = report.environment(datetime(2026, 1, 31, 12, tzinfo=UTC))


def verdicts() -> list[Verdict]:
    """Every status, every kind of share, and a message that tries to break out."""
    good = {"out": 0.25, "d_query": 0.5}
    bad = {"out": 1.25, "d_key": math.inf, "d_value": math.nan}
    at = {"out": [0, 1, 2, 3], "d_key": [0, 0, 0, 1]}
    found = [Verdict("plain", b, f, dict(good), seconds=0.5) for b, f in (*ONE, *TWO)]
    found += [Verdict("mask-causal", *ONE[0], dict(good))]
    found += [Verdict("mask-causal", *TWO[0], bad, where=at, cause="top-left for bottom-right")]
    found += [Verdict("mask-causal", *TWO[1], problem=f"RuntimeError: {HOSTILE}")]
    found += [Verdict("sinks", *TWO[0], missing="torch-sdpa takes no sinks.")]
    return found


ONE = [("numpy", "eager")]
TWO = [("torch", "eager"), ("torch", "aot_eager")]


def printed(*drawn: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(*drawn)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestTerminal:
    def test_what_is_not_offered_is_a_dash_and_is_counted_apart(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        drawn = printed(report.matrix(verdicts())).splitlines()
        rows = {line.split()[1]: line for line in drawn if line.startswith("│")}
        assert "–" in rows["sinks"]
        assert "·" in rows["sinks"]
        assert "✗ error" in rows["mask-causal"]
        report.summary(verdicts(), Console(width=200))
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == "4 passed, 2 failed, 1 skipped"
        assert "torch eager: 1 of 2 cases" in "\n".join(lines)
        assert "1 not offered" in "\n".join(lines)
        assert "    likely cause in 1 case: top-left for bottom-right" in lines
        assert "likely cause: top-left for bottom-right" in "\n".join(lines)
        assert "out: 1.25 of what is allowed, first at [0, 1, 2, 3]" in "\n".join(lines)

    def test_only_failures_leaves_out_what_is_merely_not_offered(self) -> None:
        shown = printed(report.matrix(verdicts(), every=False))
        assert "mask-causal" in shown
        assert "sinks" not in shown

    def test_without_skips_the_last_line_is_two_counts(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report.summary(verdicts()[:3], Console())
        assert capsys.readouterr().out.splitlines()[-1] == "3 passed, 0 failed"

    def test_nothing_offered_is_summed_up_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        report.summary([verdicts()[-1]], Console())
        assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 0 failed, 1 skipped"


class TestJson:
    def test_it_comes_back(self, tmp_path: Path) -> None:
        into = tmp_path / "made" / "on the way" / "run.json"
        report.save(verdicts(), into, PLACE)
        back, place = report.load(into)
        # repr, since NaN is not equal to itself.
        assert [repr(v) for v in back] == [repr(v) for v in verdicts()]
        assert place == PLACE
        assert list(into.parent.iterdir()) == [into]

    def test_it_is_json_for_strict_readers(self, tmp_path: Path) -> None:
        def refuse(word: str) -> None:
            raise AssertionError(word)

        report.save(verdicts(), tmp_path / "run.json")
        found = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
        row = next(row for row in found["verdicts"] if row["status"] == "failed")
        assert row["shares"] == {"out": 1.25, "d_key": "inf", "d_value": "nan"}
        assert row["worst"] is None
        assert row["passed"] is False

    def test_the_environment_names_versions_and_the_day(self) -> None:
        assert PLACE["date"] == "2026-01-31T12:00:00+00:00"
        assert PLACE["packages"]["attn-core"]
        assert {"numpy"} < set(PLACE["packages"])
        assert all(PLACE[name] for name in ("python", "platform", "machine"))
        now = datetime.fromisoformat(report.environment()["date"])
        assert abs((datetime.now(UTC) - now).total_seconds()) < 60

    def test_half_a_file_is_refused(self, tmp_path: Path) -> None:
        into = tmp_path / "run.json"
        report.save(verdicts(), into)
        whole = into.read_bytes()
        for length in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 3):
            into.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="must be a whole JSON report"):
                report.load(into)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('{"version": 1, "verdicts": []}', "of version 2. Got version 1"),
            ("[]", "Got no version"),
            ('{"version": 2, "verdicts": []}', "must hold an environment and verdicts"),
            ('{"version": 2, "environment": {}, "verdicts": [3]}', "must be an object"),
            ('{"version": 2, "environment": {}, "verdicts": [{"case": "a"}]}', "verdict 0 must"),
            (
                START + '{"case": "a", "backend": "b", "form": "c", "shares": {"out": "much"}}]}',
                "shares that are numbers",
            ),
            (
                START + '{"case": "a", "backend": "b", "form": "c", "colour": "red"}]}',
                "Got case, backend, form, colour",
            ),
            ("\xff", "must be a whole JSON report"),
        ],
    )
    def test_what_is_no_report_is_refused(self, tmp_path: Path, text: str, words: str) -> None:
        into = tmp_path / "run.json"
        into.write_text(text, "latin-1")
        with pytest.raises(ValueError, match=re.escape(words)):
            report.load(into)

    def test_a_failed_write_leaves_what_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        into = tmp_path / "run.json"
        into.write_text("before")

        def full(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(Path, "replace", full)
        for kind in (report, junit, page):
            with pytest.raises(OSError, match="no space left"):
                kind.save(verdicts(), into)
        assert into.read_text() == "before"
        assert list(tmp_path.iterdir()) == [into]


class TestJunit:
    def test_suites_cases_and_counts(self, tmp_path: Path) -> None:
        junit.save(verdicts(), tmp_path / "run.xml", PLACE)
        root = ET.parse(tmp_path / "run.xml").getroot()
        assert root.attrib["tests"] == "7"
        assert [suite.attrib["name"] for suite in root] == [
            "numpy eager",
            "torch eager",
            "torch aot_eager",
        ]
        counts = [
            tuple(suite.attrib[n] for n in ("tests", "failures", "errors", "skipped"))
            for suite in root
        ]
        assert counts == [("2", "0", "0", "0"), ("3", "1", "0", "1"), ("2", "0", "1", "0")]
        assert root[0].attrib["timestamp"] == PLACE["date"]
        assert root.find(".//property[@name='numpy']") is not None
        skipped = root.find(".//testcase[@name='sinks']/skipped")
        assert skipped is not None
        assert skipped.attrib["message"] == "not offered: torch-sdpa takes no sinks."

    def test_a_failure_names_the_worst_the_place_and_the_cause(self) -> None:
        root = junit.document(verdicts(), PLACE)
        failure = root.find(".//failure")
        assert failure is not None
        assert failure.attrib["message"] == (
            "d_key is inf of what is allowed; first differs at [0, 0, 0, 1]; "
            "likely cause: top-left for bottom-right"
        )
        assert "d_value: nan of what is allowed" in (failure.text or "")

    def test_messages_that_xml_cannot_hold_are_held(self, tmp_path: Path) -> None:
        junit.save(verdicts(), tmp_path / "run.xml")
        error = ET.parse(tmp_path / "run.xml").getroot().find(".//error")
        assert error is not None
        assert error.attrib["type"] == "RuntimeError"
        assert "</script><script>" in error.attrib["message"]
        assert "\ufffd[31m\ufffd" in (error.text or "")


class TestDifference:
    def test_every_kind_of_change(self) -> None:
        def cell(case: str, share: float | None, **more: Any) -> Verdict:
            return Verdict(case, "jax", "jit", {} if share is None else {"out": share}, **more)

        before = [cell("same", 0.2), cell("breaks", 0.2), cell("mends", 3.0), cell("grows", 0.2)]
        before += [cell("tiny", 0.01), cell("goes", 0.2), cell("goes-red", 2.0), cell("raises", 0)]
        before += [cell("dropped", 0.1), cell("doubles", 0.2), cell("worse", 2.0)]
        after = [cell("same", 0.2), cell("breaks", 1.2), cell("mends", 0.3), cell("grows", 0.41)]
        after += [cell("tiny", 0.09), cell("new", 0.1), cell("raises", None, problem="E: x")]
        after += [cell("dropped", None, missing="no"), cell("doubles", 0.4), cell("worse", 4.5)]
        changes = difference.difference(before, after)
        assert {c.cell[0]: (c.what, c.regressed) for c in changes} == {
            "breaks": ("changed", True),
            "raises": ("changed", True),
            "dropped": ("changed", True),
            "goes": ("vanished", True),
            "goes-red": ("vanished", False),
            "mends": ("changed", False),
            "grows": ("grew", False),
            "worse": ("grew", False),
            "new": ("appeared", False),
        }
        assert [c.regressed for c in changes] == sorted(
            (c.regressed for c in changes), reverse=True
        )
        assert difference.difference(before, before) == []
        assert [c.cell[0] for c in difference.difference(before, after, factor=2.2)] == [
            c.cell[0] for c in changes if c.what != "grew" or c.cell[0] == "worse"
        ]
        with pytest.raises(ValueError, match=r"must be at least 1\. Got 0\.5"):
            difference.difference(before, after, factor=0.5)

    def test_the_command_says_what_moved_and_fails_on_a_regression(self, tmp_path: Path) -> None:
        old, new = tmp_path / "a.json", tmp_path / "b.json"
        packages = PLACE["packages"]
        report.save(verdicts(), old, PLACE | {"packages": {**packages, "torch": "2.12.0"}})
        worse = [Verdict("plain", "numpy", "eager", {"out": 7.0}), *verdicts()[1:]]
        report.save(worse, new, PLACE | {"packages": {**packages, "torch": "2.13.0"}})
        console = Console(file=io.StringIO(), width=120)
        assert difference.compare(old, new, console) == 1
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        assert "torch 2.12.0 -> 2.13.0" in shown
        assert "✗ changed" in shown
        assert "failed 7" in shown
        assert shown.splitlines()[-1] == "7 cells, 1 changed, 1 regressed"
        assert difference.compare(old, old, Console(file=io.StringIO())) == 0
        assert difference.compare(new, old, Console(file=io.StringIO())) == 0

    def test_in_a_pipe_names_are_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)
        names = [f"score-softcap-then-{n}-documents-of-many-lengths-within-a-window" for n in "ab"]
        where = tmp_path / "before.json", tmp_path / "after.json"
        for path, share in zip(where, (0.2, 7.0), strict=True):
            cells = [Verdict(n, "torch:triton", "aot_eager", {"out": share}) for n in names]
            report.save(cells, path, PLACE)
        run = CliRunner().invoke(app, ["conformance", "diff", *map(str, where)])
        assert run.exit_code == 1
        for name in names:
            (line,) = [line for line in run.output.splitlines() if name in line]
            assert line.split() == [
                *("│", "✗", "changed", "│", name, "│", "torch:triton", "│", "aot_eager"),
                *("│", "passed", "0.2", "│", "failed", "7", "│"),
            ]


def test_the_page_asks_nothing_of_the_network() -> None:
    source = page.document(verdicts(), PLACE)
    assert not re.search(r"https?:|@import|url\(|<script[^>]+src|fetch\(|XMLHttp", source)
    assert "default-src 'none'" in source
    assert set(re.findall(r"""(?:src|href)="([^"]*)""", source)) == {"data:,", "#matrix"}
    assert not re.search(r"\{\{\w+\}\}", source)


def test_nothing_in_a_message_breaks_out_of_the_page() -> None:
    source = page.document(verdicts(), PLACE, title="<b>{{data}}")
    assert source.count("</script") == 2
    assert "owned'</script" not in source
    assert "<title>&lt;b&gt;{{data}}</title>" in source
    (embedded,) = re.findall(r'id="data">(.*?)</script>', source, re.S)
    assert not set("<>&") & set(embedded)
    messages = {cell.get("problem") for cell in json.loads(embedded)["cells"]}
    assert report.printable(f"RuntimeError: {HOSTILE}") in messages


def test_a_cell_is_reproduced_by_the_words_of_the_command() -> None:
    assert page.command("jax", "jit") == "attn-core conformance run --backend jax --form jit"
    assert "--backend torch:chunked" in page.command("torch:chunked", "eager")
    assert "--subject 'my pack:attend'" in page.command("my pack:attend", "eager")


# In a browser ------------------------------------------------------------------------------------

QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
]


@pytest.fixture(scope="module")
def chromium() -> str:
    """Chromium's path; CI installs it, so that these tests are never skipped there."""
    found = shutil.which("chromium")
    if not found and os.environ.get("CI"):
        # Other test processes may be installing it as well: they wait for one another.
        apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-y"]
        apt = apt if os.geteuid() == 0 else ["sudo", *apt]
        subprocess.run([*apt, "update"], check=False, timeout=300)
        subprocess.run([*apt, "install", "chromium"], check=False, timeout=600)
        found = shutil.which("chromium")
        assert found, "CI must have chromium. Got none from apt-get."
    if not found:
        pytest.skip("chromium is not installed")
    return found


def browse(chromium: str, folder: Path, url: str, *options: str) -> str:
    command = [chromium, *QUIET, f"--user-data-dir={folder / 'profile'}", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout


def probed(chromium: str, folder: Path, script: str, fragment: str = "") -> Any:
    """What `script`, run in the page once it has been drawn, returns."""
    tail = f"""<script>(async () => {{
      const $ = (query) => document.querySelector(query);
      const press = (key, more = {{}}) => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", {{key, bubbles: true, cancelable: true, ...more}}));
      const all = (query) => [...document.querySelectorAll(query)];
      const cells = () => all("tbody tr:not([hidden]) td:not([hidden])");
      let found;
      try {{
        found = await (async () => {{ {script} }})();
      }} catch (error) {{
        found = `raised ${{error}}`;
      }}
      document.body.dataset.found = encodeURIComponent(JSON.stringify(found));
    }})()</script></body>"""
    into = folder / "probed.html"
    source = page.document(verdicts(), PLACE)
    into.write_text(source.replace("</body>", tail), "utf-8")
    dom = browse(chromium, folder, f"{into.as_uri()}{fragment}", "--dump-dom")
    (found,) = re.findall(r'data-found="([^"]*)"', dom)
    return json.loads(unquote(found))


def test_the_page_draws_its_matrix_and_loads_nothing(chromium: str, tmp_path: Path) -> None:
    found = probed(
        chromium,
        tmp_path,
        """return {
          headline: $("h1").textContent, title: document.title,
          cells: cells().map((td) => td.textContent),
          labels: cells().map((td) => td.getAttribute("aria-label")),
          stops: cells().filter((td) => td.tabIndex === 0).length,
          loaded: performance.getEntriesByType("resource").length,
          facts: $("#environment").textContent,
        }""",
    )
    assert found["headline"] == "2 of 6 cells depart from the judge"
    assert found["title"] == "Conformance report"  # the script in the message did not run
    # Each status has a text of its own: nothing is told by colour alone.
    assert found["cells"][:3] == ["0.50", "0.50", "0.50"]
    assert found["cells"][3:6] == ["0.50", "✗ ∞", "! error"]
    assert found["cells"][6:] == ["·", "–", "·"]
    assert found["labels"][4] == "mask-causal, torch eager: failed, ∞ of the allowance"
    assert found["stops"] == 1
    assert found["loaded"] == 0
    assert PLACE["packages"]["numpy"] in found["facts"]


def test_the_page_goes_by_keyboard(chromium: str, tmp_path: Path) -> None:
    found = probed(
        chromium,
        tmp_path,
        """const steps = [];
        const say = () => {
          const at = document.activeElement;
          steps.push(at.getAttribute("aria-label") ?? at.id);
        };
        $(".skip").click(); say();
        for (const key of ["ArrowUp", "ArrowDown", "ArrowRight", "End", "ArrowRight", "Home"]) {
          press(key); say();
        }
        press("End", {ctrlKey: true}); say();
        press("Home", {ctrlKey: true}); press("ArrowDown"); press("ArrowRight");
        press("Enter"); say();
        const panel = $("#panel").innerText, command = $("#command").textContent;
        const bars = all(".bar i").map((i) => i.style.width);
        const selected = all("[aria-selected=true]").length;
        press("Escape"); say();
        return {steps, panel, command, bars, selected, hidden: $("#panel").hidden,
                stops: cells().filter((td) => td.tabIndex === 0).length};""",
    )
    where = [step.split(":")[0] for step in found["steps"]]
    assert where == [
        "plain, numpy eager",
        "plain, numpy eager",
        "mask-causal, numpy eager",
        "mask-causal, torch eager",
        "mask-causal, torch aot_eager",
        "mask-causal, torch aot_eager",
        "mask-causal, numpy eager",
        "sinks, torch aot_eager",
        "panel",
        "mask-causal, torch eager",
    ]
    assert found["command"] == (
        "attn-core conformance run --backend torch --form eager --case mask-causal"
    )
    for words in ("top-left for bottom-right", "first differs at [0, 1, 2, 3]", "✗ 1.25", "✗ NaN"):
        assert words in found["panel"]
    assert found["bars"][0] == "83.3333%"
    assert found["bars"][1:] == ["100%", "100%"]
    assert (found["selected"], found["hidden"], found["stops"]) == (1, True, 1)


def test_the_page_filters_by_case_status_and_backend(chromium: str, tmp_path: Path) -> None:
    found = probed(
        chromium,
        tmp_path,
        """const rows = () => all("tbody tr:not([hidden]) th").map((th) => th.textContent);
        const chip = (text) => all(".chip").find((button) => button.textContent.includes(text));
        const seen = [];
        const type = (text) => {
          $("#search").value = text;
          $("#search").dispatchEvent(new Event("input"));
        };
        type("CAUSAL"); seen.push(rows(), $("#shown").textContent); type("");
        chip("error").click(); seen.push(rows(), chip("error").getAttribute("aria-pressed"));
        chip("torch").click(); seen.push(rows(), $("#empty").hidden);
        $("#clear").click(); seen.push(rows(), cells().length);
        chip("torch").click(); seen.push(cells().length); chip("torch").click();
        $("#order").click(); seen.push(rows());
        return seen;""",
    )
    assert found == [
        ["mask-causal"],
        "1 of 3 cases",
        ["mask-causal"],
        "true",
        [],
        False,
        ["plain", "mask-causal", "sinks"],
        9,
        2,
        ["mask-causal", "plain", "sinks"],
    ]


def test_a_link_opens_its_cell_and_shows_the_message_as_text(chromium: str, tmp_path: Path) -> None:
    found = probed(
        chromium,
        tmp_path,
        """return [$("#panel-title").textContent, $(".message").textContent,
                   document.querySelectorAll("script").length]""",
        "#mask-causal/torch/aot_eager",
    )
    assert found[0] == "mask-causal"
    assert "</script><script>document.title='owned'</script><!-- <b>&amp;" in found[1]
    assert found[2] == 3  # the data, the page's, and the probe


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800)])
def test_the_page_fits_a_phone_and_a_laptop(
    chromium: str, tmp_path: Path, width: int, height: int
) -> None:
    page.save(verdicts(), tmp_path / "run.html", PLACE)
    # In a frame, since a window narrower than 500 pixels is not to be had without a screenshot.
    source = (tmp_path / "run.html").read_text("utf-8")
    tell = "top.postMessage([innerWidth, document.documentElement.scrollWidth], '*')"
    framed = source.replace("</body>", f"<script>{tell}</script></body>")
    (tmp_path / "framed.html").write_text(framed, "utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<body><script>onmessage = (e) => document.body.dataset.found = e.data.join()</script>"
        f'<iframe src="framed.html#plain/torch/eager" width="{width}" height="{height}"></iframe>'
    )
    dom = browse(chromium, tmp_path, outer.as_uri(), "--dump-dom", "--virtual-time-budget=5000")
    (found,) = re.findall(r'data-found="(\d+),(\d+)"', dom)
    assert int(found[0]) == width
    assert int(found[1]) <= width
    into = tmp_path / "shot.png"
    size = f"--window-size={width},{height}"
    browse(chromium, tmp_path, (tmp_path / "run.html").as_uri(), size, f"--screenshot={into}")
    drawn = into.read_bytes()
    assert struct.unpack(">II", drawn[16:24]) == (width, height)
    assert len(drawn) > 15_000  # a blank page is about 2 kB
