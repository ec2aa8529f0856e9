"""A case as a golden set holds it: its tensors, and its entry in the index.

What is written is what the judge was given and what it said, beside how far the textbook's
computation came from that; `allowed` follows from these numbers alone, by tolerance.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from attn_core import reference
from attn_core.conformance import tolerance
from attn_core.conformance.judgement import Expected, expected
from attn_core.conformance.questions import Case, Question
from attn_core.language.operands import Table
from attn_core.language.text import text
from attn_core.language.values import Mask, Score, drop_threshold


def record(case: Case) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A case's tensors, and its entry in the index but for size and checksum."""
    made = expected(case)
    wide = "float64" if case.dtype == "float64" else "float32"
    tensors, options = _given(case, made.asked, wide)
    results = {}
    for result in _results(case, made, wide, options["score"], tensors):
        error, spread = tolerance.measured(result.want, result.ordinary, result.summed)
        allowed = tolerance.allowance(
            error,
            spread,
            result.dtype,
            "gradient" if result.name.startswith("gradient.") else "out",
            made.textbook.logit,
            result.through_score,
        )
        tensors[result.name] = result.want
        results[result.name] = {
            "dtype": result.dtype,
            "plain_error": error,
            "spread": spread,
            "through_score": result.through_score,
            "allowed": allowed,
        }
    # C order and a copy, since safetensors takes the bytes as they lie.
    arrays = {n: np.array(x, order="C") for n, x in tensors.items()}
    size = case.shape
    entry = {
        "name": case.name,
        "file": f"{case.name}.safetensors",
        "sizes": dict(zip(("B", "Hq", "Hk", "Tq", "Tk", "D", "Dv"), size, strict=True)),
        "layout": case.layout,
        "dtype": case.dtype,
        "accumulation": wide,
        "scale": float(made.asked.judge.get("scale", size.width**-0.5)),
        **options,
        "tensors": {n: [x.dtype.name, list(x.shape)] for n, x in arrays.items()},
        "largest_logit": made.textbook.logit,
        "results": results,
    }
    entry["words"] = _words(entry, arrays)
    return arrays, entry


def _given(case: Case, asked: Question, wide: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors that go in, with what follows from them alone, and the options."""
    judge, size = asked.judge, case.shape
    sees = {n: x for n, x in judge.items() if n not in ("value", "sinks", "dropout")}
    offset = _each(judge.get("query_offset", 0), size.batch)
    tensors: dict[str, Any] = {n: judge[n] for n in ("query", "key", "value")}
    tensors |= {n: judge[n] for n in ("bias", "sinks", "mask") if n in judge}
    tensors |= {"seen": np.asarray(reference.allowed(**sees)), "query_offset": offset}
    options: dict[str, Any] = {"query_offset": offset.tolist()}
    for n in ("kv_lengths", "q_lengths"):
        options[n] = None
        if judge.get(n) is not None:
            tensors[n] = _each(judge[n], size.batch)
            options[n] = tensors[n].tolist()
    for n in ("mask", "score"):
        programme = asked.call.get(n)
        options[n] = None
        if isinstance(programme, (Mask, Score)):
            operands = _operands(n, programme, wide)
            options[n] = {"text": text(programme.tree), "operands": list(operands)}
            tensors |= operands
    options["dropout"] = None
    if "dropout" in judge:
        rate, seed = judge["dropout"]
        words = [int(seed) % 2**64 % 2**32, int(seed) % 2**64 // 2**32]
        options["dropout"] = {"rate": rate, "threshold": drop_threshold(rate), "seed": words}
        at = np.arange(size.q_len) + offset[:, None]
        heads, keys = np.arange(size.heads), np.arange(size.k_len)
        tensors["dropout_keep"] = reference.keep(rate, seed, np.arange(size.batch), heads, at, keys)
    tensors |= {f"cotangent.{n}": x for n, x in asked.cotangents.items()}
    return tensors, options


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


class _Result(NamedTuple):
    """What a subject is held to: the judge's answer beside the textbook's, `ordinary`."""

    name: str
    dtype: str
    want: np.ndarray
    ordinary: np.ndarray
    through_score: bool = False
    summed: float = 0.0


def _results(
    case: Case,
    made: Expected,
    wide: str,
    score: dict[str, Any] | None,
    tensors: dict[str, Any],
) -> Iterator[_Result]:
    asked, judged, pulled, textbook = made
    for n, dtype in (("out", case.dtype), ("lse", wide), ("weights", case.dtype)):
        yield _Result(n, dtype, getattr(judged, n), textbook.outputs[n])
    for n in ("query", "key", "value", "bias", "sinks"):
        if n in asked.judge:
            yield _Result(
                f"gradient.{n}",
                asked.judge[n].dtype.name,
                pulled[n],
                textbook.gradients[n],
                "score" in asked.judge and n != "value",
                textbook.summed.get(n, 0.0),
            )
    names = score["operands"] if score else []
    for number, table in enumerate(asked.judge.get("operands", ())):
        if pulled["operands"][number] is None:
            continue
        if not np.array_equal(tensors[names[number]], table, equal_nan=True):
            raise AssertionError(
                f"case {case.name}: judge and language number operands differently"
            )
        yield _Result(
            f"gradient.{names[number]}",
            table.dtype.name,
            pulled["operands"][number],
            textbook.gradients["score"][number],
            True,
            textbook.summed[f"score{number}"],
        )


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
