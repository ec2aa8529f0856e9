"""One case, one subject, one form: ask, judge, and say how much of the allowance was used."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from attn_core import reference
from attn_core.config import nearest
from attn_core.conformance.cases import tier
from attn_core.conformance.diagnosis import diagnose
from attn_core.conformance.misuse import MISUSES, Misuse
from attn_core.conformance.plain import Textbook, plain
from attn_core.conformance.questions import Case, Question, numpy_dtype
from attn_core.conformance.subjects import Ours, Subject, arrays
from attn_core.conformance.tolerance import share
from attn_core.registry import UnsupportedError
from attn_core.spec import AttentionOutput, as_output

BY_NAME = {case.name: case for case in tier("exhaustive")}
WRONG = {misuse.name: misuse for misuse in MISUSES}


@dataclass
class Verdict:
    """What came of a case: each result's error as a share of what is allowed.

    `problem` says in words what a number cannot: an exception, a wrong dtype or shape. `missing`
    is why the subject was not asked: an option that it does not offer is never a pass. `where` is
    the first index at which a failed result departs from the judge, `cause` the known mistake
    that explains it, where one does.
    """

    case: str
    backend: str
    form: str
    shares: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0
    missing: str = ""
    where: dict[str, list[int]] = field(default_factory=dict)
    cause: str = ""

    @property
    def worst(self) -> float:
        return max(self.shares.values(), default=float("inf" if self.problem else 0))

    @property
    def passed(self) -> bool:
        inside = all(used <= 1 for used in self.shares.values())  # NaN is not
        return not self.problem and not self.missing and bool(self.shares) and inside

    @property
    def status(self) -> str:
        """ "passed", "failed", "error" (it raised, crashed or hung) or "not offered"."""
        if self.missing:
            return "not offered"
        if self.problem:
            return "error"
        return "passed" if self.passed else "failed"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Expected(NamedTuple):
    """A case's question, the judge's answer to it, and the textbook's."""

    asked: Question
    judged: reference.Judged
    pulled: dict[str, Any]
    textbook: Textbook


OUTPUTS = ("out", "lse", "weights")


@cache
def expected(case: Case, outputs: tuple[str, ...] = OUTPUTS) -> Expected:
    """What the judge and the plain computation make of a case, with cotangents of these outputs."""
    asked = case.question()
    for output in OUTPUTS:
        if output not in outputs:
            asked.cotangents[output] = np.zeros_like(asked.cotangents[output])
    judged = reference.attention(**asked.judge)
    cotangents: dict[str, Any] = {f"d_{output}": asked.cotangents[output] for output in outputs}
    pulled = reference.gradients(**asked.judge, **cotangents)
    textbook = plain(asked.judge, asked.cotangents, numpy_dtype(case.dtype))
    wide = np.dtype(np.float64 if case.dtype == "float64" else np.float32)
    if wide != numpy_dtype(case.dtype):
        # lse is held in the accumulation dtype whatever the dtype of the arrays.
        textbook.outputs["lse"] = plain(asked.judge, asked.cotangents, wide).outputs["lse"]
    return Expected(asked, judged, pulled, textbook)


def judge(name: str, subject: Subject, backend: Any, form: str) -> Verdict:
    """Ask a subject the case in this form, forward and backward.

    `backend` is the module of verbs of the subject's framework: it makes its arrays and
    differentiates. A misuse must be refused instead, in the spec's words: only our own backends are
    bound to them.
    """
    started = time.perf_counter()
    verdict = Verdict(name, subject.name, form)
    if name in WRONG:
        _refused(verdict, WRONG[name], subject, backend)
        verdict.seconds = time.perf_counter() - started
        return verdict
    case = BY_NAME[name].fitted(subject.grouped, subject.widths, subject.dtypes)
    if case is None:
        verdict.missing = "grouped heads, values of another width, or the dtype"
        return verdict
    asked = case.question()
    call, verdict.missing = subject.put(asked)
    if not verdict.missing:
        try:
            got, found, outputs = _answer(subject, backend, form, asked, call)
        except UnsupportedError as error:
            if isinstance(subject, Ours) and subject.partial:
                verdict.missing = str(error)
            else:
                verdict.problem = f"UnsupportedError: {error}"
        except Exception as error:  # whatever a subject raises is its answer, and is shown
            verdict.problem = f"{type(error).__name__}: {error}".strip()
        else:
            _compare(verdict, case, backend, got, found, outputs)
            if verdict.status == "failed" and not isinstance(subject, Ours):
                _repeated(verdict, subject, backend, call, got)
    verdict.seconds = time.perf_counter() - started
    return verdict


def _refused(verdict: Verdict, misuse: Misuse, subject: Subject, backend: Any) -> None:
    """The class and the whole text of the error, or what came instead of it."""
    if not isinstance(subject, Ours) or verdict.form != "eager":
        verdict.missing = "the spec's errors, which are raised eagerly by its own backends"
        return
    text = misuse.text.format(framework=backend.NAME)
    call = {**subject.options, **arrays(backend, misuse.call(), traced=False)}
    try:
        subject.function(**call)
    except Exception as error:  # whatever it raises is its answer, and is shown
        if type(error) is not misuse.error or str(error) != text:
            verdict.problem = (
                f"must raise {misuse.error.__name__}: {text} Got {type(error).__name__}: {error}"
            )
        else:
            verdict.shares["error"] = 0.0
    else:
        verdict.problem = f"must raise {misuse.error.__name__}: {text} Got a result."


def _answer(
    subject: Subject, backend: Any, form: str, asked: Question, call: dict[str, Any]
) -> tuple[AttentionOutput, dict[str, Any], tuple[str, ...]]:
    """What the subject returns, the gradients it gives, and which outputs it has."""
    # Copies, since some frameworks share memory with NumPy and a subject may write.
    copies = {n: _copy(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}
    given = arrays(backend, copies, traced=form != "eager" and isinstance(subject, Ours))
    outputs: tuple[str, ...] = OUTPUTS
    first = AttentionOutput(None)
    if not isinstance(subject, Ours) or subject.partial:
        # What it returns is known once it has been called; cotangents go to that alone.
        first = as_output(subject.function(**given))
        _untouched(backend, call, given)
        if first.out is None:
            raise TypeError("a subject must return out, or (out, lse, weights). Got no out.")
        outputs = tuple(name for name in OUTPUTS if getattr(first, name) is not None)
        if not subject.backward:
            return first, {}, outputs
    cotangents = {name: backend.from_numpy(asked.cotangents[name]) for name in outputs}
    try:
        got, gradients = backend.vjp(given, cotangents, form, subject.function)
    except Exception as error:
        # A framework words an output of the wrong shape as a gradient's.
        for name in outputs:
            want = asked.cotangents[name].shape
            shape = tuple(getattr(getattr(first, name), "shape", want))
            if shape != want:
                raise ValueError(f"{name} must have shape {want}. Got {shape}.") from error
        raise
    _untouched(backend, call, given)
    return got, gradients, outputs


def _copy(x: np.ndarray) -> np.ndarray:
    """Of the same strides, which are what some cases are about."""
    if x.flags.c_contiguous or not x.size:
        return x.copy()
    spread = np.zeros((*x.shape[:-1], x.shape[-1] * 2 + 1), x.dtype)
    spread[..., 1::2] = x
    return spread[..., 1::2]


def _untouched(backend: Any, call: dict[str, Any], given: dict[str, Any]) -> None:
    for name, before in call.items():
        if isinstance(before, np.ndarray):
            now = given[name]
            after = now if isinstance(now, np.ndarray) else np.asarray(backend.to_numpy(now))
            if after.dtype == before.dtype and after.tobytes() != before.tobytes():
                raise ValueError(f"a subject must not write into its inputs. Got a new `{name}`.")


def _repeated(
    verdict: Verdict, subject: Subject, backend: Any, call: dict[str, Any], got: AttentionOutput
) -> None:
    """Whether a failed subject answers the same thing twice; if not, that is the cause."""
    again = as_output(subject.function(**arrays(backend, call, traced=False)))
    one, other = (np.asarray(backend.to_numpy(x.out)) for x in (got, again))
    # JAX computes in float64 only within `vjp`: outside, a call is another one.
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    if verdict.form == "eager" and alike and one.tobytes() != other.tobytes():
        verdict.cause = "two calls with the same arguments differ"


def _compare(
    verdict: Verdict,
    case: Case,
    backend: Any,
    got: AttentionOutput,
    found: dict[str, Any],
    outputs: tuple[str, ...],
) -> None:
    asked, judged, pulled, textbook = expected(case, outputs)
    logit = textbook.logit
    wrong: dict[str, np.ndarray] = {}

    def compare(what: str, given: Any, dtype: str, want: Any, ordinary: Any, **way: Any) -> None:
        array = backend.to_numpy(given)
        if not isinstance(array, np.ndarray) or array.dtype.name != dtype:
            kind = getattr(array, "dtype", type(array).__name__)
            verdict.problem = f"{what} must be {dtype}. Got {kind}."
        elif array.shape != want.shape:
            verdict.problem = f"{what} must have shape {want.shape}. Got {array.shape}."
        else:
            used = share(array, want, ordinary, dtype, logit=logit, **way)
            verdict.shares[what] = used
            if not used <= 1:
                verdict.where[what] = first_difference(array, want, used)
                wrong[what] = array

    wide = "float64" if asked.dtype == "float64" else "float32"
    for output in outputs:
        dtype = wide if output == "lse" else asked.dtype
        want, ordinary = getattr(judged, output), textbook.outputs[output]
        compare(output, getattr(got, output), dtype, want, ordinary, direction="out")
    scored = "score" in asked.judge
    if "slopes" in found:
        found = {**found, "score": (found["slopes"],)}
    for key in ("query", "key", "value", "bias", "sinks"):
        if key in found:
            compare(
                f"d_{key}",
                found[key],
                asked.call[key].dtype.name,
                pulled[key],
                textbook.gradients[key],
                direction="gradient",
                through_score=scored and key != "value",
                summed=textbook.summed.get(key, 0.0),
            )
    for number, table in enumerate(asked.judge.get("operands", ())):
        if pulled["operands"][number] is not None and "score" in found:
            compare(
                f"d_score{number}",
                found["score"][number],
                table.dtype.name,
                pulled["operands"][number],
                textbook.gradients["score"][number],
                direction="gradient",
                through_score=True,
                summed=textbook.summed[f"score{number}"],
            )
    if wrong:
        verdict.cause = diagnose(asked, judged, pulled, textbook, wrong, list(wrong))


def first_difference(got: np.ndarray, want: np.ndarray, used: float) -> list[int]:
    """The first index, in C order, whose error is at least half of the worst one."""
    with np.errstate(all="ignore"):
        error = np.abs(got.astype(np.float64) - want)
    error = np.where(np.isnan(error), 0.0 if used < np.inf else np.inf, error)
    error[got.astype(np.float64) == want] = 0.0
    return [int(i) for i in np.argwhere(error >= error.max() / 2)[0]]


def chosen(patterns: list[str], name: str = "full") -> list[Case]:
    """Cases of the tier that a pattern names, or whose name holds it; all without patterns.

    A pattern that is the whole name of a case, of any tier, is that case and no other.
    """
    return _matching(patterns, tier(name), BY_NAME)


def named(patterns: list[str], name: str = "full") -> list[str]:
    """The names of those cases, and of the misuses that the patterns choose likewise."""
    asked: list[Any] = [*tier(name), *MISUSES]
    return [each.name for each in _matching(patterns, asked, {**BY_NAME, **WRONG})]


def _matching(patterns: list[str], among: Sequence[Any], known: Mapping[str, Any]) -> list[Any]:
    if not patterns:
        return list(among)
    whole = [known[p] for p in patterns if p in known]
    parts = [p for p in patterns if p not in known]
    found = whole + [c for c in among if c not in whole and any(p in c.name for p in parts)]
    if not found:
        raise ValueError(
            f"`cases` must name a case or a part of one. Got {', '.join(patterns)}."
            f"{nearest(patterns[0], tuple(case.name for case in among))}"
        )
    return found
