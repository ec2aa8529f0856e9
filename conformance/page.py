"""The run as one HTML page that opens from disk: matrix, filters, details, how to see it again.

The template is page.html, with page.css and page.js put into it; the verdicts travel as JSON in a
script element, and page.js draws everything from them. A content security policy in the page
forbids it to load anything from anywhere.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_core.config import BACKENDS
from attn_core.conformance import report
from attn_core.conformance.judgement import Verdict

_HERE = Path(__file__).parent


def document(
    verdicts: Sequence[Verdict],
    environment: Mapping[str, Any] | None = None,
    title: str = "Conformance report",
) -> str:
    """The page's source; the environment is this process's where it is left out."""
    block = dict(environment or report.environment())
    parts = {
        "title": html.escape(title),
        "style": (_HERE / "page.css").read_text("utf-8"),
        "script": (_HERE / "page.js").read_text("utf-8"),
        "data": _embedded(data(verdicts, block)),
    }
    template = (_HERE / "page.html").read_text("utf-8")
    # One pass: what is put in is never searched again, whatever it holds.
    return re.sub(r"\{\{(title|style|script|data)\}\}", lambda found: parts[found[1]], template)


def data(verdicts: Sequence[Verdict], environment: Mapping[str, Any]) -> dict[str, Any]:
    """What page.js draws from. Empty fields are left out; columns are [backend, form]."""
    pairs = list(dict.fromkeys((v.backend, v.form) for v in verdicts))
    names = list(dict.fromkeys(v.case for v in verdicts))
    at = {pair: i for i, pair in enumerate(pairs)}
    row = {name: i for i, name in enumerate(names)}
    packages = environment.get("packages", {})
    cells = []
    for verdict in verdicts:
        told = report.encoded(verdict)
        shares = {what: _short(share) for what, share in told["shares"].items()}
        cell = {
            "case": row[verdict.case],
            "column": at[verdict.backend, verdict.form],
            "status": verdict.status,
            "worst": _short(_written(verdict.worst)),
            "shares": shares,
            **{name: report.printable(told[name]) for name in ("problem", "missing", "cause")},
            "where": told["where"],
            "seconds": _short(verdict.seconds),
        }
        cells.append({name: x for name, x in cell.items() if x not in ("", {})})
    return {
        "date": str(environment.get("date", "")),
        "environment": [
            [str(name), str(x)]
            for name, x in {**environment, **packages}.items()
            if name not in ("date", "packages")
        ],
        "columns": [
            {"backend": backend, "form": form, "command": command(backend, form)}
            for backend, form in pairs
        ],
        "cases": names,
        "cells": cells,
    }


def command(backend: str, form: str) -> str:
    """The command that runs this column again; page.js adds the case."""
    # One implementation of ours is named "torch:chunked", a stranger's "package.module:function".
    kind = "backend" if backend.partition(":")[0] in BACKENDS else "subject"
    words = ["attn-core", "conformance", "run", f"--{kind}", backend, "--form", form]
    return shlex.join(words)


def _short(share: float | str) -> float | str:
    """Four digits: the page shows three, and a thousand cells add up."""
    return share if isinstance(share, str) else float(f"{share:.4g}")


def _written(share: float) -> float | str:
    return float(share) if math.isfinite(share) else str(float(share))


def _embedded(found: Mapping[str, Any]) -> str:
    """JSON that no HTML parser can take for markup: a message may hold `</script>` or `<!--`."""
    text = json.dumps(found, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def save(
    verdicts: Sequence[Verdict], path: Path, environment: Mapping[str, Any] | None = None
) -> None:
    """The run as an HTML file, in one rename."""
    report.write_whole(path, document(verdicts, environment))
