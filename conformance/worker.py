"""One subject in a process of its own: case names come in on stdin, verdicts go out as JSON lines.

The first line out is "ready", once the framework has been imported.

No process ever imports two frameworks, and a backend that takes the interpreter down with it
takes down only this one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import TextIO

from attn_core import registry
from attn_core.conformance import subjects
from attn_core.conformance.judgement import judge


def own_stdout() -> TextIO:
    """The real stdout, for verdicts alone: whatever a framework prints goes to stderr from now."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


def main() -> None:
    spec, form = sys.argv[1:3]
    channel = own_stdout()
    # A stranger's module stands where the command was typed.
    sys.path.append(os.getcwd())
    subject = subjects.find(spec)
    backend = registry.load(subject.framework)
    if form not in backend.FORMS:
        raise SystemExit(
            f"`form` must be one of {', '.join(backend.FORMS)} for {spec}, a subject of "
            f"{subject.framework}. Got {form}."
        )
    # A framework is a million objects that live to the end, and tracing makes many more. Walked
    # each time that 700 are new, they take a fifth of the time in which torch compiles a case.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    print("ready", file=channel)
    for line in sys.stdin:
        verdict = judge(line.strip(), subject, backend, form)
        verdict.backend = spec  # as the command line knows it
        print(json.dumps(verdict.as_dict()), file=channel)


if __name__ == "__main__":
    main()
