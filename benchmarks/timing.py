"""Timing: A B B A, and what may be concluded from it.

A machine drifts: it warms up, its clocks change, somebody else wants a core. So subjects that are
to be compared take turns, there and back:

    round 0     A B C C B A
    round 1     B C A A C B          the one that begins changes

In each round every subject has the same average place, so what drifts evenly cancels, and a ratio
within a round compares neighbours. A sample is the mean of as many calls as make `LEAST` seconds.
Before it comes a pause, in which threads that other libraries left spinning go to sleep, and, where
a call is short, one that is not counted and fetches code and data back into the caches: without it
a call of 40 ms lost up to a fifth by coming after one that had swept them.

    time        the median of all samples
    spread      quartiles
    ratio       median over median; beside it the median and quartiles of the rounds' own ratios
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles
from typing import NamedTuple

LEAST = 0.05
"""Seconds that a sample lasts, at least."""

LONG = 0.2
"""Seconds from which one call is a sample by itself, the first one."""

PAUSE = 0.02
"""Seconds before a sample. GNU's OpenMP spins for a few milliseconds, XLA's and TensorFlow's pools
for less; Intel's OpenMP spins for 200, and is told not to (`rooms.py`). On a busy machine spinning
hurts whoever does it: beside a load of 4 on 2 cores, torch's small calls took 1.6 times as long as
under OMP_WAIT_POLICY=PASSIVE. Measure on a quiet one; workers keep the setting that users have."""

Clock = Callable[[], float]
Rounds = Sequence[Sequence[float]]
"""Seconds per call: for every round its samples, on the way there and on the way back."""


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    middle: float
    high: float


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Whose turn it is: (round, name), every name twice in each round."""
    for number in range(rounds):
        first = number % len(names) if names else 0
        there = [*names[first:], *names[:first]]
        for name in (*there, *reversed(there)):
            yield number, name


def calibrated(
    run: Callable[[], object], least: float = LEAST, clock: Clock = time.perf_counter
) -> int:
    """How many calls make a sample of `least` seconds."""
    repeats = 1
    while True:
        seconds = _timed(run, repeats, clock)
        if seconds >= least:
            return repeats
        # At most tenfold at once: a clock that has not moved yet says nothing about how many.
        grown = repeats * least / seconds * 1.1 if seconds > 0 else repeats * 10
        repeats = max(repeats + 1, min(int(grown), repeats * 10))


def sample(
    run: Callable[[], object],
    repeats: int,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> float:
    """Seconds per call, over that many calls, after a pause and a call that is not counted.

    A call longer than `LONG` needs no warming: what it would gain is far below the noise.
    """
    sleep(PAUSE)
    seconds = _timed(run, 1, clock)
    if repeats == 1 and seconds > LONG:
        return seconds
    return _timed(run, repeats, clock) / repeats


def _timed(run: Callable[[], object], repeats: int, clock: Clock) -> float:
    before = clock()
    for _ in range(repeats):
        run()
    return clock() - before


def spread(rounds: Rounds) -> Spread:
    """The median and quartiles of all samples."""
    return _spread([x for part in rounds for x in part])


def ratio(base: Rounds, subject: Rounds) -> float:
    """How many times faster the subject is than the base: above 1 it wins. Median over median."""
    return spread(base).middle / spread(subject).middle


def ratios(base: Rounds, subject: Rounds) -> Spread:
    """The same round by round: median and quartiles of ratios of samples that stood side by side.

    Raises:
        ValueError: they were not measured in the same rounds.
    """
    return _spread([b / s for b, s in _paired(base, subject)])


def difference(base: Rounds, subject: Rounds) -> Spread:
    """Seconds by which the subject is slower than the base, round by round, as `ratio`."""
    return _spread([s - b for b, s in _paired(base, subject)])


def _paired(base: Rounds, subject: Rounds) -> list[tuple[float, float]]:
    """The two's mean seconds in each round."""
    if len(base) != len(subject) or not base:
        raise ValueError(
            f"a ratio must be of the same rounds. Got {len(base)} and {len(subject)} of them."
        )
    return [(sum(b) / len(b), sum(s) / len(s)) for b, s in zip(base, subject, strict=True)]


def _spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(low, median(values), high)
