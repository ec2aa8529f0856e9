"""Checking a golden set: a backend is asked the stored questions and held to the stored answers.

`check` reads nothing but the folder: masks and scores come from their text in the index and not
from the case of that name, so that a set which says too little fails here before it fails a
stranger.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attn_core import registry
from attn_core.config import check_backend
from attn_core.conformance import tolerance
from attn_core.conformance.golden import SHIPPED_AT, import_safetensors, load, parsed, verify
from attn_core.conformance.judgement import Verdict, first_difference
from attn_core.conformance.runner import Work, attend
from attn_core.conformance.worker import own_stdout
from attn_core.language.text import parse
from attn_core.language.values import Dropout, Mask, Score


def check(
    directory: str | os.PathLike[str] | None = None,
    backend: Any = None,
    *,
    seen: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:
    """Verify a golden set, then ask a backend its cases and hold the answers to what is stored.

    Args:
        directory: the golden set; the shipped one by default.
        backend: a backend's name ("numpy" by default; any other runs in a process of its own,
            one framework to a process), or a module of verbs (NAME, vjp, from_numpy, to_numpy).
        seen: told of each verdict as it comes.

    Raises:
        GoldenError: the set is missing, truncated, altered, or of another format.
        ValueError: an unknown backend.
        ImportError: safetensors or the backend's framework is missing.
    """
    backend = "numpy" if backend is None else backend
    if isinstance(backend, str):
        check_backend(backend)
    where = (SHIPPED_AT if directory is None else Path(directory)).resolve()
    import_safetensors()  # where it is missing, say so before a process is started
    tell = seen or (lambda verdict: None)
    entries = verify(where)
    if isinstance(backend, str) and backend != "numpy":
        work = Work(backend, "eager", tuple(entry["name"] for entry in entries))
        return attend(work, worker(where, backend), seen=tell)
    verbs = registry.load("numpy") if backend == "numpy" else backend
    verdicts = []
    for verdict in _answers(where, entries, verbs):
        tell(verdict)
        verdicts.append(verdict)
    return verdicts


def _answers(where: Path, entries: Iterable[dict[str, Any]], verbs: Any) -> Iterator[Verdict]:
    for entry in entries:
        started = time.perf_counter()
        verdict = _ask(entry, load(where, entry), verbs)
        verdict.seconds = time.perf_counter() - started
        yield verdict


def _ask(entry: dict[str, Any], tensors: dict[str, np.ndarray], verbs: Any) -> Verdict:
    """One stored case, forward and backward."""
    verdict = Verdict(entry["name"], verbs.NAME, "eager")
    cotangents = {
        name.removeprefix("cotangent."): verbs.from_numpy(x)
        for name, x in tensors.items()
        if name.startswith("cotangent.")
    }
    try:
        got, found = verbs.vjp(_arguments(entry, tensors, verbs), cotangents, "eager")
    except Exception as error:  # whatever a subject raises is its answer, and is shown
        verdict.problem = f"{type(error).__name__}: {error}".strip()
        return verdict
    operands = entry["score"]["operands"] if entry["score"] else []
    for what, row in entry["results"].items():
        if not what.startswith("gradient."):
            answer = getattr(got, what)
        elif (name := what.removeprefix("gradient.")) in operands:
            answer = found["score"][operands.index(name)]
        else:
            answer = found.get(name)
        if answer is None:
            verdict.problem = f"{what} must be given. Got None."
            continue
        array, want = verbs.to_numpy(answer), tensors[what]
        if array.dtype.name != row["dtype"]:
            verdict.problem = f"{what} must be {row['dtype']}. Got {array.dtype.name}."
        elif array.shape != want.shape:
            verdict.problem = f"{what} must have shape {want.shape}. Got {array.shape}."
        else:
            used = tolerance.used(array, want, row["allowed"])
            verdict.shares[what] = used
            if not used <= 1:
                verdict.where[what] = first_difference(array, want, used)
    return verdict


def _arguments(entry: dict[str, Any], tensors: dict[str, np.ndarray], verbs: Any) -> dict[str, Any]:
    """The call that an entry of the index describes, in the backend's arrays."""
    call: dict[str, Any] = {
        name: verbs.from_numpy(tensors[name])
        for name in ("query", "key", "value", "bias", "sinks")
        if name in tensors
    }
    for name, kind in (("mask", Mask), ("score", Score)):
        programme = entry[name]
        if programme is not None:
            arrays = tuple(verbs.from_numpy(tensors[n]) for n in programme["operands"])
            call[name] = kind(parse(programme["text"]), arrays)
        elif name in tensors:
            call[name] = verbs.from_numpy(tensors[name])
    for name in ("kv_lengths", "q_lengths"):
        if entry[name] is not None:
            call[name] = entry[name]
    if entry["dropout"]:
        call["dropout"] = Dropout(entry["dropout"]["rate"], tuple(entry["dropout"]["seed"]))
    # A host array in every framework, as offsets may be.
    call["query_offset"] = tensors["query_offset"]
    call |= {"scale": entry["scale"], "layout": entry["layout"]}
    return call | {"return_lse": True, "return_weights": True}


def worker(where: Path, backend: str) -> tuple[str, ...]:
    """The command that holds a backend to the set, in a process of its own."""
    start = "from attn_core.conformance.golden_check import answer; answer()"
    return (sys.executable, "-c", start, str(where), backend)


def answer() -> None:
    """The worker: names on stdin, "ready" and verdicts as JSON lines on stdout."""
    where, backend = Path(sys.argv[1]), sys.argv[2]
    channel = own_stdout()
    verbs = registry.load(backend)
    print("ready", file=channel)
    by_name = {entry["name"]: entry for entry in parsed(where)["cases"]}
    asked = [by_name[line.strip()] for line in sys.stdin]
    for verdict in _answers(where, asked, verbs):
        print(json.dumps(verdict.as_dict()), file=channel)
