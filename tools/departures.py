"""Where the libraries depart from the spec: measured by the suite, written as a page.

python tools/departures.py             asks every peer, writes docs/departures.json and the page
python tools/departures.py --page      writes the page again from the measurement
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from pathlib import Path

from rich.progress import Progress

from attn_core.conformance import report
from attn_core.conformance.judgement import Verdict
from attn_core.conformance.peers import PEERS
from attn_core.conformance.runner import plan, run

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = """# Where the libraries depart from the spec

Measured, not written: `python tools/departures.py` puts the {cases} cases of the smoke tier to each
library through an adapter that only passes on (`conformance/peers.py`), and this page is made from
what came back (`departures.json`). A departure is a difference of convention or a defect, seen from
[SPEC.md](SPEC.md); many are documented by the library. What an adapter cannot express is not
offered, and counts neither way.

Versions: {versions}. Measured {date} on {machine}, CPU, eager.

| library | passed | departs | not offered |
| --- | --- | --- | --- |
"""


def main() -> None:
    place = DOCS / "departures.json"
    if "--page" not in sys.argv:
        measure(place)
    verdicts, environment = report.load(place)
    (DOCS / "DEPARTURES.md").write_text(page(verdicts, environment), "utf-8")


def measure(place: Path) -> None:
    """Ask every peer the smoke tier."""
    total = sum(len(work.cases) for work in plan(list(PEERS), tier="smoke"))
    with Progress() as bar:
        task = bar.add_task("peers", total=total)
        verdicts = run(list(PEERS), tier="smoke", seen=lambda verdict: bar.update(task, advance=1))
    report.save(verdicts, place, report.environment())


def page(verdicts: list[Verdict], environment: dict[str, object]) -> str:
    """The page: a table of counts, then for each library what departs and in which cases."""
    peers = list(dict.fromkeys(v.backend for v in verdicts))
    packages = environment["packages"]
    assert isinstance(packages, dict)
    shown = ("torch", "transformers", "jax", "flax", "keras", "tensorflow", "numpy")
    # TensorFlow's CPU wheel is the same code under another name.
    found = {name: packages.get(name) or packages.get(f"{name}-cpu") for name in shown}
    text = HEAD.format(
        cases=len({v.case for v in verdicts}),
        versions=", ".join(f"{name} {version}" for name, version in found.items() if version),
        date=str(environment["date"])[:10],
        machine=environment["machine"],
    )
    for peer in peers:
        part = [v for v in verdicts if v.backend == peer]
        counts = [sum(v.status in kind for v in part) for kind in _KINDS]
        text += f"| {peer} | " + " | ".join(map(str, counts)) + " |\n"
    for peer in peers:
        causes: dict[str, list[str]] = defaultdict(list)
        for v in verdicts:
            if v.backend == peer and v.status in ("failed", "error"):
                causes[_cause(v)].append(v.case)
        text += f"\n## {peer}\n\n{_docstring(peer)}\n"
        if not causes:
            text += "\nNo departure in what it offers.\n"
            continue
        text += "\n| what departs | cases |\n| --- | --- |\n"
        for cause, cases in sorted(causes.items(), key=lambda item: -len(item[1])):
            some = ", ".join(f"`{case}`" for case in cases[:4])
            more = f" and {len(cases) - 4} more" if len(cases) > 4 else ""
            text += f"| {cause} | {some}{more} |\n"
    return text


_KINDS = (("passed",), ("failed", "error"), ("not offered",))


def _cause(verdict: Verdict) -> str:
    if verdict.problem:
        first = verdict.problem.splitlines()[0].replace("|", "\\|")
        return f"raises `{first[:100]}`"
    if verdict.cause:
        return verdict.cause
    return f"{', '.join(verdict.where)} differ, by no known mistake"


def _docstring(peer: str) -> str:
    return inspect.cleandoc(str(PEERS[peer].__doc__))


if __name__ == "__main__":
    main()
