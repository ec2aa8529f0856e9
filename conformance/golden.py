"""Golden vectors: the suite's questions and the judge's answers as files, for any language.

    from attn_core.conformance import golden
    golden.write("vectors")                 every case, or golden.write("vectors", ["plain", ...])
    golden.check("vectors", "torch")        verdicts; the set that is shipped, by default

A set is a folder: a safetensors file to a case (what goes in, what comes out, every gradient),
index.json (the options, in numbers and in words, and the error allowed for each result) and
SHA256SUMS. docs/GOLDEN.md describes it for readers without this package.

What is written is what the judge was given and what it said. `check` reads nothing but the folder:
masks and scores come from their text in the index and not from the case of that name, so that a
set which says too little fails here before it fails a stranger.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from attn_core import __version__, reference, registry
from attn_core.config import check_backend, nearest
from attn_core.conformance import tolerance
from attn_core.conformance.cases import CASES
from attn_core.conformance.judgement import BY_NAME, Verdict, expected, first_difference
from attn_core.conformance.questions import Case
from attn_core.conformance.runner import Work, attend
from attn_core.language.expr import Table
from attn_core.language.text import parse, text
from attn_core.language.values import Dropout, Mask, Score, drop_threshold

FORMAT = 1
"""Raised when a reader of the last one would misread; `check` refuses every other."""

INDEX, SUMS = "index.json", "SHA256SUMS"

SHIPPED_AT = Path(__file__).parent / "golden_set"

_SHIPPED = (
    *("plain", "plain-float64", "width-1", "one-query", "heads-gqa-6-2", "mask-causal"),
    *("mask-window-causal", "mask-segments-prefix", "offset-each", "lengths-and-mask"),
    *("score-softcap", "score-alibi", "bias-hides", "bias-row--1e9", "sinks-mixed", "empty-rows"),
    *("dropout", "poison-all", "none-keys"),
    *("everything-bthd", "everything-bfloat16", "everything-float16"),
)

# The judge's float64 and what a case's own arrays can be, by their names in safetensors.
_STORED = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U32": "uint32",
    "U8": "uint8",
    "BOOL": "bool",
}

_ENTRY = (
    *("name", "file", "bytes", "sha256", "sizes", "layout", "dtype", "accumulation", "scale"),
    *("query_offset", "kv_lengths", "q_lengths", "mask", "score", "dropout", "words", "tensors"),
    *("largest_logit", "results"),
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


class GoldenError(ValueError):
    """A golden set is missing, truncated, altered, or of another format."""


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


# --- Writing. -------------------------------------------------------------------------------------


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
        ImportError: safetensors, or ml_dtypes for a bfloat16 case, is missing.
    """
    library = _library()
    asked = {case.name: case for case in map(_case, CASES if cases is None else cases)}
    target = Path(directory).resolve()
    replaced = _replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        whole = Path(scratch) / "new"
        whole.mkdir()  # with the modes the user's umask gives, which `scratch` itself has not
        entries = []
        for case in asked.values():
            tensors, entry = _record(case)
            content = library.numpy.save(tensors)
            (whole / entry["file"]).write_bytes(content)
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            entries.append({key: entry[key] for key in _ENTRY})
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


def _library() -> Any:
    """safetensors, which only golden vectors need."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "golden vectors are read and written with safetensors, which must be installed: "
            f"pip install 'attn-core[golden]'. Got {error}."
        ) from error
    return safetensors


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
        ours = {INDEX, SUMS, *[str(entry["file"]) for entry in _parsed(target)["cases"]]}
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


def _record(case: Case) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A case's tensors, and its entry in the index but for size and checksum."""
    asked, judged, pulled, textbook = expected(case)
    call, judge, size = asked.call, asked.judge, case.shape
    wide = "float64" if case.dtype == "float64" else "float32"
    sees = {n: x for n, x in judge.items() if n not in ("value", "sinks", "dropout")}
    seen = np.asarray(reference.allowed(**sees))
    offset = _each(judge.get("query_offset", 0), size.batch)

    tensors: dict[str, Any] = {n: judge[n] for n in ("query", "key", "value")}
    tensors |= {n: judge[n] for n in ("bias", "sinks", "mask") if n in judge}
    tensors |= {"seen": seen, "query_offset": offset}
    for n in ("kv_lengths", "q_lengths"):
        if judge.get(n) is not None:
            tensors[n] = _each(judge[n], size.batch)
    programmes: dict[str, Any] = {}
    for n in ("mask", "score"):
        given = call.get(n)
        programmes[n] = None
        if isinstance(given, (Mask, Score)):
            operands = _operands(n, given, wide)
            programmes[n] = {"text": text(given.tree), "operands": list(operands)}
            tensors |= operands
    dropout = None
    if "dropout" in judge:
        rate, seed = judge["dropout"]
        words = [int(seed) % 2**64 % 2**32, int(seed) % 2**64 // 2**32]
        dropout = {"rate": rate, "threshold": drop_threshold(rate), "seed": words}
        at = np.arange(size.q_len) + offset[:, None]
        heads, keys = np.arange(size.heads), np.arange(size.k_len)
        tensors["dropout_keep"] = reference.keep(rate, seed, np.arange(size.batch), heads, at, keys)
    tensors |= {f"cotangent.{n}": x for n, x in asked.cotangents.items()}

    scored, results = "score" in judge, {}

    def result(
        what: str,
        dtype: str,
        want: Any,
        ordinary: Any,
        *,
        through: bool = False,
        summed: float = 0.0,
    ) -> None:
        tensors[what] = want
        reached, spread = _measured(want, ordinary, summed)
        row = {"dtype": dtype, "plain_error": reached, "spread": spread, "through_score": through}
        results[what] = row | {"allowed": allowance(what, row, textbook.logit)}

    for n, dtype in (("out", case.dtype), ("lse", wide), ("weights", case.dtype)):
        result(n, dtype, getattr(judged, n), textbook.outputs[n])
    for n in ("query", "key", "value", "bias", "sinks"):
        if n in judge:
            result(
                f"gradient.{n}",
                judge[n].dtype.name,
                pulled[n],
                textbook.gradients[n],
                through=scored and n != "value",
                summed=textbook.summed.get(n, 0.0),
            )
    names = programmes["score"]["operands"] if scored else []
    for number, table in enumerate(judge.get("operands", ())):
        if pulled["operands"][number] is None:
            continue
        if not np.array_equal(tensors[names[number]], table, equal_nan=True):
            raise AssertionError(
                f"case {case.name}: judge and language number operands differently"
            )
        result(
            f"gradient.{names[number]}",
            table.dtype.name,
            pulled["operands"][number],
            textbook.gradients["score"][number],
            through=True,
            summed=textbook.summed[f"score{number}"],
        )

    # C order and a copy, since safetensors takes the bytes as they lie.
    arrays = {n: np.array(x, order="C") for n, x in tensors.items()}
    entry = {
        "name": case.name,
        "file": f"{case.name}.safetensors",
        "sizes": dict(zip(("B", "Hq", "Hk", "Tq", "Tk", "D", "Dv"), size, strict=True)),
        "layout": case.layout,
        "dtype": case.dtype,
        "accumulation": wide,
        "scale": float(judge.get("scale", size.width**-0.5)),
        "query_offset": offset.tolist(),
        "kv_lengths": arrays["kv_lengths"].tolist() if "kv_lengths" in arrays else None,
        "q_lengths": arrays["q_lengths"].tolist() if "q_lengths" in arrays else None,
        **programmes,
        "dropout": dropout,
        "tensors": {n: [x.dtype.name, list(x.shape)] for n, x in arrays.items()},
        "largest_logit": textbook.logit,
        "results": results,
    }
    entry["words"] = _words(entry, arrays)
    return arrays, entry


def _each(x: Any, batch: int) -> np.ndarray:
    """A number for each batch entry."""
    return np.array(np.broadcast_to(np.asarray(x, np.int32), (batch,)))


def _operands(which: str, given: Mask | Score, wide: str) -> dict[str, np.ndarray]:
    """The arrays a programme looks up, under their names in its text, in order of number."""
    kinds = {int(s.value or 0): s.kind for s in given.tree.steps if s.op == "lookup"}
    return {
        f"{which}.{kinds[n]}{n}": x.numpy(wide) if isinstance(x, Table) else np.asarray(x)
        for n, x in enumerate(given.arrays)
    }


def _measured(want: np.ndarray, ordinary: np.ndarray, summed: float) -> tuple[float, float]:
    """The textbook's largest error, and the spread that floors and caps are shares of."""
    finite = np.isfinite(want)
    spread = float(np.abs(want[finite]).max(initial=0.0))
    if spread == 0.0:
        return 0.0, 0.0
    reach = np.abs(ordinary.astype(np.float64)[finite] - want[finite])
    return float(reach[np.isfinite(reach)].max(initial=0.0)), max(spread, summed)


def allowance(what: str, row: dict[str, Any], logit: float) -> float:
    """The largest absolute error that passes, from the numbers in the index (`tolerance.py`)."""
    dtype, spread = row["dtype"], row["spread"]
    if spread == 0.0:
        return 0.0
    cap = tolerance.CAP["gradient" if what.startswith("gradient.") else "out"][dtype]
    most = min(
        2 * row["plain_error"] + tolerance.FLOOR[dtype] * spread, cap * spread * max(1.0, logit)
    )
    return float(most + (tolerance.JUDGE * spread if row["through_score"] else 0.0))


def _words(entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[str]:
    """The options as sentences: what differs from plain attention, and what follows for rows."""
    mask, score, dropout = entry["mask"], entry["score"], entry["dropout"]
    words = [f"scale {entry['scale']:.6g}, layout {entry['layout']}"]
    if any(entry["query_offset"]):
        words.append(f"row i of batch b stands at q = i + {entry['query_offset']}[b]")
    if mask:
        words.append(f"mask: key k is seen from q where {mask['text']}")
    elif "mask" in arrays:
        words.append("mask: an array, the tensor mask")
    for name, meaning in (("kv_lengths", "keys k <"), ("q_lengths", "rows i <")):
        if entry[name] is not None:
            words.append(f"{name}: only {meaning} {entry[name]}[b]")
    if score:
        words.append(f"score: the scaled s becomes {score['text']}, before bias and mask")
    if "bias" in arrays:
        shape = tuple(arrays["bias"].shape)
        bias = arrays["bias"].astype(np.float64)
        hides = np.isneginf(bias).any() and not np.isnan(bias).any()  # beside NaN it is poison
        words.append(
            f"bias of shape {shape} is added after the score{', -inf hides its key' * bool(hides)}"
        )
    if "sinks" in arrays:
        words.append("sinks: exp(sinks[h]) joins the sum of head h; -inf is no sink")
    if dropout:
        words.append(
            f"dropout: a weight is kept where its Philox word >= {dropout['threshold']}, "
            f"and divided by 1 - {dropout['rate']}; the tensor dropout_keep says where"
        )
    empty = int((~arrays["seen"].any(-1)).sum())
    if empty:
        words.append(f"{empty} of {arrays['seen'][..., 0:1].any(-1).size} rows see no key")
    inputs = [n for n in ("query", "key", "value", "bias") if n in arrays]
    if any(np.isnan(arrays[n].astype(np.float64)).any() for n in inputs):
        words.append("poison: NaN and Inf stand where nobody may look")
    return words


# --- Reading. -------------------------------------------------------------------------------------


def verify(directory: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """The entries of a golden set whose format, sizes and checksums are right; the shipped set's.

    Raises:
        GoldenError: missing, truncated, altered, or of another format; which file, and how.
    """
    where = SHIPPED_AT if directory is None else Path(directory)
    index = _parsed(where)
    sums = _sums(where)
    content = (where / INDEX).read_bytes()
    if hashlib.sha256(content).hexdigest() != sums.get(INDEX):
        raise GoldenError(f"{INDEX} must have the checksum in {SUMS}. Got another: it was altered.")
    entries: list[dict[str, Any]] = index["cases"]
    for entry in entries:
        if sums.get(entry["file"]) != entry["sha256"]:
            raise GoldenError(f"{SUMS} must agree with {INDEX}. Got another sum: {entry['file']}.")
        _content(where, entry)
    extra = {path.name for path in where.glob("*.safetensors")} - {e["file"] for e in entries}
    if extra:
        raise GoldenError(f"{INDEX} must list every safetensors file. Got {min(extra)!r} besides.")
    return entries


def load(directory: str | os.PathLike[str], entry: dict[str, Any]) -> dict[str, np.ndarray]:
    """A case's tensors, their checksum, dtypes and shapes compared with the index first.

    Raises:
        GoldenError: the file is not what the index says.
        ImportError: safetensors, or ml_dtypes for a bfloat16 case, is missing.
    """
    library = _library()
    content = _content(Path(directory), entry)
    try:
        # Not safetensors.numpy.load, which knows no bfloat16 when it reads from memory.
        raw = dict(library.deserialize(content))
    except library.SafetensorError as error:
        raise GoldenError(f"{entry['file']} must be safetensors. Got {error}.") from error
    tensors = {}
    for name, x in raw.items():
        dtype = _STORED.get(x["dtype"], x["dtype"])
        if [dtype, list(x["shape"])] != entry["tensors"].get(name):
            raise GoldenError(
                f"{name} in {entry['file']} must be as in {INDEX}, {entry['tensors'].get(name)}. "
                f"Got {[dtype, list(x['shape'])]}."
            )
        tensors[name] = np.frombuffer(x["data"], _dtype(dtype)).reshape(x["shape"]).copy()
    for name in entry["tensors"]:
        if name not in tensors:
            raise GoldenError(f"{entry['file']} must hold {name}. Got a file without it.")
    return tensors


def _dtype(name: str) -> np.dtype:
    """Files are little-endian, whatever the machine."""
    if name != "bfloat16":
        return np.dtype(name).newbyteorder("<")
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            "ml_dtypes must be installed for the bfloat16 cases: pip install 'attn-core[golden]'. "
            f"Got {error}."
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def _parsed(where: Path) -> dict[str, Any]:
    """index.json, its format and the keys of its entries found in order; nothing is summed yet."""
    try:
        content = (where / INDEX).read_bytes()
    except OSError as error:
        raise GoldenError(
            f"`directory` must hold a golden set, {INDEX} and its files. Got {where}: "
            f"{error.strerror or error}."
        ) from error
    try:
        index = json.loads(content)
    except ValueError as error:  # half a UTF-8 character included
        raise GoldenError(
            f"{INDEX} must be whole JSON. Got {len(content)} bytes that end or break early: {error}"
        ) from error
    if not isinstance(index, dict) or "format" not in index:
        raise GoldenError(f"{INDEX} must state its `format`. Got none; is {where} a golden set?")
    if index["format"] != FORMAT:
        raise GoldenError(
            f"`format` in {INDEX} must be {FORMAT}, which attn-core {__version__} reads. "
            f"Got {index['format']!r}, written by {index.get('generator', 'who knows what')}."
        )
    entries = index.get("cases")
    if not isinstance(entries, list):
        raise GoldenError(f"{INDEX} must hold a list of `cases`. Got {type(entries).__name__}.")
    for entry in entries:
        missing = [key for key in _ENTRY if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise GoldenError(f"each case in {INDEX} must state {missing[0]!r}. Got one without.")
        file = str(entry["file"])
        # A set is read by strangers' programmes too: no name may lead out of the folder.
        if Path(file).name != file or "\\" in file or file in (".", ".."):
            raise GoldenError(f"`file` in {INDEX} must be a bare file name. Got {file!r}.")
    return index


def _sums(where: Path) -> dict[str, str]:
    """Checksums by file name."""
    try:
        lines = (where / SUMS).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GoldenError(
            f"a golden set must hold {SUMS}. Got {where} without: {error}."
        ) from error
    pairs = [line.split("  ", 1) for line in lines]
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _content(where: Path, entry: dict[str, Any]) -> bytes:
    """The bytes of a case's file, of the length and checksum that the index states."""
    try:
        content = (where / entry["file"]).read_bytes()
    except OSError as error:
        raise GoldenError(
            f"{entry['file']} must be in {where}, as {INDEX} says. Got {error.strerror or error}."
        ) from error
    if len(content) != entry["bytes"]:
        raise GoldenError(
            f"{entry['file']} must have {entry['bytes']} bytes. Got {len(content)}: "
            f"{'truncated' if len(content) < entry['bytes'] else 'something was added'}."
        )
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise GoldenError(
            f"{entry['file']} must have sha256 {entry['sha256']}. Got {found}: it was altered."
        )
    return content


# --- Checking. ------------------------------------------------------------------------------------


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
        ImportError: safetensors, ml_dtypes or the backend's framework is missing.
    """
    if isinstance(backend, str):
        check_backend(backend)
    where = (SHIPPED_AT if directory is None else Path(directory)).resolve()
    _library()
    entries = verify(where)
    if isinstance(backend, str) and backend != "numpy":
        work = Work(backend, "eager", tuple(entry["name"] for entry in entries))
        return attend(work, worker(where, backend), seen=seen or (lambda verdict: None))
    verbs = registry.load("numpy") if backend is None or isinstance(backend, str) else backend
    return list(_answers(where, entries, verbs, seen))


def _answers(
    where: Path,
    entries: Iterable[dict[str, Any]],
    verbs: Any,
    seen: Callable[[Verdict], None] | None,
) -> Iterable[Verdict]:
    for entry in entries:
        started = time.perf_counter()
        verdict = _ask(entry, load(where, entry), verbs)
        verdict.seconds = time.perf_counter() - started
        if seen:
            seen(verdict)
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
            used = _share(array.astype(np.float64), want, row["allowed"])
            verdict.shares[what] = used
            if not used <= 1:
                verdict.where[what] = first_difference(array, want, used)
    return verdict


def _share(got: np.ndarray, want: np.ndarray, allowed: float) -> float:
    """The error as a share of what is allowed; inf for a wrong infinity or any NaN."""
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite]) or not np.isfinite(got[finite]).all():
        return float("inf")
    error = float(np.abs(got[finite] - want[finite]).max(initial=0.0))
    if error == 0.0:
        return 0.0
    return error / allowed if allowed else float("inf")


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
    start = "from attn_core.conformance.golden import answer; answer()"
    return (sys.executable, "-c", start, str(where), backend)


def answer() -> None:
    """The worker: names on stdin, "ready" and verdicts as JSON lines on stdout."""
    where, backend = Path(sys.argv[1]), sys.argv[2]
    # Verdicts keep the real stdout; whatever a framework prints goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    verbs = registry.load(backend)
    print("ready", file=channel)
    by_name = {entry["name"]: entry for entry in _parsed(where)["cases"]}
    asked = [by_name[line.strip()] for line in sys.stdin]
    for verdict in _answers(where, asked, verbs, None):
        print(json.dumps(verdict.as_dict()), file=channel)
