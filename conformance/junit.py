"""The run as JUnit XML, the file that every CI service shows.

A testsuite to each backend and form, a testcase to each case: what departs from the judge is a
failure, what raised, crashed or hung an error, what is not offered skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from attn_core.conformance import report
from attn_core.conformance.judgement import Verdict

# What XML 1.0 cannot hold in any spelling: a terminal's colours in a message would spoil the file.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def document(
    verdicts: Sequence[Verdict], environment: Mapping[str, Any] | None = None
) -> ET.Element:
    """The <testsuites> element; the environment (this process's, if left out) as properties."""
    block = dict(environment or report.environment())
    root = ET.Element("testsuites", {"name": "attn-core conformance", **_counts(verdicts)})
    for backend, form in dict.fromkeys((v.backend, v.form) for v in verdicts):
        part = [v for v in verdicts if (v.backend, v.form) == (backend, form)]
        suite = ET.SubElement(root, "testsuite", {"name": _legal(f"{backend} {form}")})
        suite.attrib |= _counts(part)
        if "date" in block:
            suite.set("timestamp", _legal(str(block["date"])))
        properties = ET.SubElement(suite, "properties")
        for name, value in {**block, **block.get("packages", {})}.items():
            if name != "packages":
                pair = {"name": _legal(str(name)), "value": _legal(str(value))}
                ET.SubElement(properties, "property", pair)
        for verdict in part:
            _testcase(suite, verdict)
    return root


def _counts(verdicts: Sequence[Verdict]) -> dict[str, str]:
    counts = report.counted(verdicts)
    return {
        "tests": str(len(verdicts)),
        "failures": str(counts["failed"]),
        "errors": str(counts["error"]),
        "skipped": str(counts["not offered"]),
        "time": f"{sum(v.seconds for v in verdicts):.3f}",
    }


def _testcase(suite: ET.Element, verdict: Verdict) -> None:
    # Dots are how CI services fold names; those of a subject's path are the same kind.
    place = f"conformance.{verdict.backend}.{verdict.form}"
    attributes = {"classname": _legal(place), "name": _legal(verdict.case)}
    case = ET.SubElement(suite, "testcase", attributes | {"time": f"{verdict.seconds:.3f}"})
    if verdict.status == "not offered":
        ET.SubElement(case, "skipped", {"message": _legal(f"not offered: {verdict.missing}")})
    elif verdict.status in report.FAILURES:
        tag = "failure" if verdict.status == "failed" else "error"
        details = {"message": _legal(message(verdict)), "type": _type(verdict)}
        ET.SubElement(case, tag, details).text = _legal(
            "\n".join([*report.told(verdict), "", *_shares(verdict)])
        )


def message(verdict: Verdict) -> str:
    """One line: the problem or the worst share, the cause, and the first differing index."""
    if verdict.problem:
        parts = [verdict.problem.splitlines()[0]]
    else:
        what = max(verdict.shares, key=lambda name: _rank(verdict.shares[name]))
        parts = [f"{what} is {verdict.shares[what]:.3g} of what is allowed"]
        if what in verdict.where:
            parts.append(f"first differs at {verdict.where[what]}")
    if verdict.cause:
        parts.append(f"likely cause: {verdict.cause}")
    return "; ".join(parts)


def _rank(share: float) -> float:
    """NaN compares with nothing, and is as bad as a share can be."""
    return math.inf if math.isnan(share) else share


def _type(verdict: Verdict) -> str:
    """The exception's name, where the problem starts with one."""
    named = re.match(r"[A-Za-z_][\w.]*(?=:)", verdict.problem)
    return named[0] if named else "Departure" if verdict.status == "failed" else "Error"


def _shares(verdict: Verdict) -> list[str]:
    return [f"{what}: {share:.3g} of what is allowed" for what, share in verdict.shares.items()]


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)


def save(
    verdicts: Sequence[Verdict], path: Path, environment: Mapping[str, Any] | None = None
) -> None:
    """The run as a JUnit file, in one rename."""
    root = document(verdicts, environment)
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    report.write_whole(path, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')
