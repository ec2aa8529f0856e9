"""Golden vectors: the suite's questions and the judge's answers as files, for any language.

    from attn_core.conformance import golden_check, golden_write
    golden_write.write("vectors")             every case, or write("vectors", ["plain", ...])
    golden_check.check("vectors", "torch")    verdicts; the set that is shipped, by default

A set is a folder: a safetensors file to a case (what goes in, what comes out, every gradient),
index.json (the options, in numbers and in words, and the error allowed for each result) and
SHA256SUMS. docs/GOLDEN.md describes it for readers without this package.

This file reads such a folder, and believes nothing in it that it has not compared: the format
first, then sizes and checksums, then dtypes and shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from attn_core import __version__
from attn_core.conformance.questions import numpy_dtype

FORMAT = 1
"""Raised when a reader of the last one would misread; `check` refuses every other."""

INDEX, SUMS = "index.json", "SHA256SUMS"

SHIPPED_AT = Path(__file__).parent / "golden_set"

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

KEYS = (
    *("name", "file", "bytes", "sha256", "sizes", "layout", "dtype", "accumulation", "scale"),
    *("query_offset", "kv_lengths", "q_lengths", "mask", "score", "dropout", "words", "tensors"),
    *("largest_logit", "results"),
)
"""What an entry of the index states, in this order."""


class GoldenError(ValueError):
    """A golden set is missing, truncated, altered, or of another format."""


def verify(directory: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """The entries of a golden set whose format, sizes and checksums are right; the shipped set's.

    Raises:
        GoldenError: missing, truncated, altered, or of another format; which file, and how.
    """
    where = SHIPPED_AT if directory is None else Path(directory)
    index = parsed(where)
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
        ImportError: safetensors is missing.
    """
    library = import_safetensors()
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
    found = numpy_dtype(name)
    return found if name == "bfloat16" else found.newbyteorder("<")


def parsed(where: Path) -> dict[str, Any]:
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
        missing = [key for key in KEYS if not isinstance(entry, dict) or key not in entry]
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


def import_safetensors() -> Any:
    """safetensors, which only golden vectors need."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "golden vectors are read and written with safetensors, which must be installed: "
            f"pip install 'attn-core[golden]'. Got {error}."
        ) from error
    return safetensors
