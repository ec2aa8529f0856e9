"""What compiling found, in a file: as it comes, and good for as long as nothing has changed.

    {"triton": "3.6.0", "attn-core": "0.1.0", "unmade": {},
     "findings": [{"kernel": "forward", "target": "sm_90", "problem": "causal", "sizes": "even",
                   "digest": "0f3a...", "registers": 186, "spills": 0, "problems": [], ...}, ...]}

A run of all kernels takes an hour and more: cut off, it goes on from the file. A row is one finding
and stands on a line of its own. Its digest (`ahead.digest`) says what it came of; a row whose
digest is no longer its job's is stale, and so is one that says that there is no kernel: that may
have been the machine's fault, so it is asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attn_core.kernels.ahead import Finding, Job
from attn_core.kernels.configs import Config
from attn_core.kernels.samples import SAMPLES


def save(found: Iterable[Finding], path: Path, unmade: Mapping[str, str]) -> None:
    """All of them into a file, in one rename.

    Args:
        unmade: targets for which nothing can be made here, and why.
    """
    versions = {name: version(name) for name in ("triton", "attn-core")}
    head = json.dumps({**versions, "unmade": dict(unmade)})
    rows = ",\n".join(f"  {json.dumps(_row(finding))}" for finding in found)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(f'{head[:-1]},\n "findings": [\n{rows}\n]}}\n', "utf-8")
    beside.replace(path)


def load(path: Path) -> dict[Job, Finding]:
    """What `save` wrote, by job; without the problems that are no more.

    Raises:
        FileNotFoundError: nothing stands there.
        ValueError: it is no such file.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))["findings"]
        found = [_finding(row) for row in rows if row["problem"] in SAMPLES]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold what `attn-core kernels compile --json` writes. "
            f"Got {type(error).__name__}: {error}."
        ) from error
    return {finding.job: finding for finding in found}


def _row(finding: Finding) -> dict[str, Any]:
    job = finding.job
    return {
        **{name: getattr(job, name) for name in _OF_JOB},
        "problem": job.sample.name,
        "sizes": "even" if job.even else "odd",
        "queries": job.queries,
        "loose": job.loose,
        "class": job.mask_class,
        "config": asdict(finding.config),
        "seconds": round(finding.seconds, 2),
        **{name: getattr(finding, name) for name in _OF_FINDING},
        "problems": finding.problems,
    }


def _finding(row: Mapping[str, Any]) -> Finding:
    job = Job(
        sample=SAMPLES[row["problem"]],
        even=row["sizes"] == "even",
        queries=row.get("queries", 0),
        loose=row.get("loose", False),
        **{name: row[name] for name in _OF_JOB},
    )
    said = {name: row[name] for name in _OF_FINDING}
    for name in ("serialized", "wgmma"):
        said[name] = tuple(said[name])
    # What has no kernel is asked again.
    said["digest"] = "" if said["error"] else said["digest"]
    return Finding(job, Config(**row["config"]), row["seconds"], **said)


_OF_JOB = ("kernel", "target", "width", "v_width", "dtype")
_OF_FINDING = (
    *("registers", "spills", "shared", "columns", "serialized", "wgmma", "error", "digest"),
)
