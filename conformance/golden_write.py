"""Writing a golden set: the folder that golden.py reads, whole or not at all.

    write("vectors")                           every case of the suite
    write("vectors", ["plain", "dropout"])     some of them, or cases of your own
    write(SHIPPED_AT, shipped())               the set in this package, anew

The index opens with the conventions and the rule of the tolerance, in words that a reader without
this package can follow; what a case says of itself is made in golden_record.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attn_core import __version__
from attn_core.config import nearest
from attn_core.conformance import tolerance
from attn_core.conformance.cases import CASES
from attn_core.conformance.golden import (
    FORMAT,
    INDEX,
    KEYS,
    SUMS,
    GoldenError,
    import_safetensors,
    parsed,
)
from attn_core.conformance.golden_record import record
from attn_core.conformance.judgement import BY_NAME
from attn_core.conformance.questions import Case

_SHIPPED = (
    *("plain", "plain-float64", "width-1", "one-query", "heads-gqa-6-2", "mask-causal"),
    *("mask-window-causal", "mask-segments-prefix", "offset-each", "lengths-and-mask"),
    *("score-softcap", "score-alibi", "bias-hides", "bias-row--1e9", "sinks-mixed", "empty-rows"),
    *("dropout", "poison-all", "none-keys"),
    *("everything-bthd", "everything-bfloat16", "everything-float16"),
)

_CONVENTIONS = {
    "axes": (
        "B batch, Hq query heads, Hk key heads, Tq queries, Tk keys, D and Dv widths; query head h "
        "reads key head h // (Hq / Hk). BHTD: query (B, Hq, Tq, D), key (B, Hk, Tk, D), value "
        "(B, Hk, Tk, Dv), out (B, Hq, Tq, Dv); BTHD swaps the two middle axes of these four and of "
        "their gradients, and of nothing else."
    ),
    "formula": (
        "s = scale * dot(query, key); s = score(s); s = s + bias; a key is seen where mask, "
        "k < kv_lengths[b], i < q_lengths[b] and s > -inf; l = sum over seen of exp(s) + "
        "exp(sinks[h]); weights = exp(s) / l; out = sum over seen of weights * dropout_keep / "
        "(1 - rate) * value; lse = log(l), natural. Row i stands at q = i + query_offset[b]."
    ),
    "mask": "True = attend.",
    "empty_row": (
        "A row that sees no key: out 0, weights 0, lse = sinks[h] where there is a sink above "
        "-inf, else -inf; its only gradient is 1 from lse to that sink."
    ),
    "padded_row": (
        "A row i >= q_lengths[b]: out 0, weights 0, lse -inf even with sinks, all gradients 0 "
        "whatever its cotangent, NaN included."
    ),
    "poison": (
        "NaN and Inf in inputs where `seen` lets nobody look reach no result: select before every "
        "sum, never multiply by 0."
    ),
    "weights": "Per query head, after the softmax, before dropout.",
    "gradients": (
        "gradient.x = d/dx of sum(out * cotangent.out) + sum(lse * cotangent.lse) + "
        "sum(weights * cotangent.weights), over what is not -inf and not poison."
    ),
    "expressions": (
        "Python precedence and operators over b, h, q, k (and s, and row = i): // and % floor, "
        "x // 0 = x % 0 = 0, integers are int32. int0[b, q] looks up the tensor mask.int0 or "
        "score.int0; an index is clamped to [0, size - 1], axes of size 1 broadcast."
    ),
}

_RULE = (
    "Infinities must be equal; elsewhere max |got - stored| <= allowed. allowed = "
    "min(2 * plain_error + floor[dtype] * spread, cap[direction][dtype] * spread * "
    "max(1, largest_logit)) + (judge * spread where through_score), and 0 where spread is 0; "
    "dtype is the result's, direction is 'gradient' for gradient.*, else 'out'."
)


def write(
    directory: str | os.PathLike[str],
    cases: Sequence[str | Case] | None = None,
    *,
    seen: Callable[[str], None] | None = None,
) -> Path:
    """Write a golden set of these cases, the suite's full tier by default; returns the folder.

    The folder appears whole or not at all. Equal cases give equal bytes on one machine; another
    machine's matrix products may round the judge's float64 in its last bits.

    Args:
        directory: new, empty, or a golden set, which is replaced.
        cases: names as in `attn_core.conformance.cases`, or cases of your own.
        seen: told of each case once it is made.

    Raises:
        ValueError: an unknown case, or a directory that holds anything else.
        ImportError: safetensors is missing.
    """
    library = import_safetensors()
    asked = {case.name: case for case in map(_case, CASES if cases is None else cases)}
    target = Path(directory).resolve()
    replaced = _replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        whole = Path(scratch) / "new"
        whole.mkdir()  # with the modes the user's umask gives, which `scratch` itself has not
        entries = []
        for case in asked.values():
            tensors, entry = record(case)
            content = library.numpy.save(tensors)
            (whole / entry["file"]).write_bytes(content)
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            entries.append({key: entry[key] for key in KEYS})
            if seen:
                seen(case.name)
        index = _index(entries)
        (whole / INDEX).write_bytes(index)
        sums = [(entry["sha256"], entry["file"]) for entry in entries]
        sums.append((hashlib.sha256(index).hexdigest(), INDEX))
        # The form that `sha256sum --check` reads.
        (whole / SUMS).write_bytes("".join(f"{s}  {file}\n" for s, file in sums).encode())
        _put(whole, target, Path(scratch) / "old", replaced)
    return target


def _replaceable(target: Path) -> bool:
    """Whether a golden set stands there, which may go; nothing else that stands there may."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise ValueError(f"`directory` must be a folder. Got a file, {target}.")
    there = {path.name for path in target.iterdir()}
    if not there:
        return False
    try:
        # A set that was truncated or altered is one still, and writing it anew is the cure.
        ours = {INDEX, SUMS, *[str(entry["file"]) for entry in parsed(target)["cases"]]}
    except (GoldenError, KeyError, TypeError) as error:
        raise ValueError(
            f"`directory` must be new, empty or a golden set. Got {target}, which holds "
            f"{min(there)!r} and is no golden set: {error}"
        ) from error
    if there - ours:
        raise ValueError(
            f"`directory` must hold nothing but its golden set to be replaced. "
            f"Got {min(there - ours)!r} beside it in {target}."
        )
    return True


def _put(whole: Path, target: Path, old: Path, replaced: bool) -> None:
    """Rename the finished folder into place; what it replaces goes with the scratch folder."""
    if not replaced:
        if target.exists():
            target.rmdir()  # empty: os.rename replaces that on POSIX only
        whole.rename(target)
        return
    target.rename(old)
    try:
        whole.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _index(entries: list[dict[str, Any]]) -> bytes:
    """index.json: a line to a case, so that a diff of two sets names the cases that differ."""
    head = {
        "format": FORMAT,
        "generator": f"attn-core {__version__}",
        "conventions": _CONVENTIONS,
        "tolerance": {
            "rule": _RULE,
            "floor": tolerance.FLOOR,
            "cap": tolerance.CAP,
            "judge": tolerance.JUDGE,
        },
    }
    lines = [f" {json.dumps(key)}: {_json(value)}" for key, value in head.items()]
    rows = ",\n".join(f"  {_json(entry)}" for entry in entries)
    lines.append(f' "cases": [\n{rows}\n ]')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _case(given: str | Case) -> Case:
    if not isinstance(given, str):
        return given
    if given not in BY_NAME:
        raise ValueError(
            f"`cases` must be names of cases. Got {given!r}.{nearest(given, tuple(BY_NAME))}"
        )
    return BY_NAME[given]


def shipped() -> tuple[Case, ...]:
    """The cases of the set in this package: each option at least once, and each dtype.

    They are the suite's with narrower heads, since the set travels in every wheel: width 3 and
    value width 2 at most, `small-` before the name.
    """
    small = []
    for name in _SHIPPED:
        case = BY_NAME[name]
        width, v_width = min(case.shape.width, 3), min(case.shape.v_width, 2)
        shape = case.shape._replace(width=width, v_width=v_width)
        small.append(replace(case, name=f"small-{name}", shape=shape))
    return tuple(small)
