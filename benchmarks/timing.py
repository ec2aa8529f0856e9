"""Timing: who follows whom, and what may be concluded from it.

A machine drifts: it warms up, its clocks change, somebody else wants a core. And whoever is asked
pays for what came before: its threads sleep, its code and data have left the caches, and more so
after some predecessors than after others. So subjects that are to be compared take turns, there and
back along a circle, and the circle changes from round to round so that all follow all:

    round 0     (C) D A B C  (D) C B A D        in brackets: asked, and not counted, so that the
    round 1     (D) B C A D  (B) D A C B        first has the predecessor that the circle gives it

In each round every subject has the same average place, so what drifts evenly cancels. The circles
are those of `circle`: of n subjects, after n - 1 rounds each has followed each other one exactly
twice, none has followed itself, and on the way there no two counts differ by more than one. What
waking up costs after one predecessor or another is therefore paid by all alike, and most of it is
not counted at all: a sample comes after a pause, in which threads that other libraries left
spinning go to sleep, and after calls that last at least `WARM` seconds and are not counted either.
A sample is the mean of as many calls as make `LEAST` seconds.

    time        the median of all samples
    spread      quartiles
    ratio       median over median; beside it the median and quartiles of neighbours' ratios: each
                sample over what the other subject took at that moment, read between the two of its
                samples that stood next before and after
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles
from typing import NamedTuple

LEAST = 0.05
"""Seconds that a sample lasts, at least."""

LONG = 0.2
"""Seconds from which one call is a sample by itself, the first one."""

WARM = 0.02
"""Seconds that calls are made for before a sample, one call at least."""

PAUSE = 0.02
"""Seconds before a sample. GNU's OpenMP spins for a few milliseconds, XLA's and TensorFlow's pools
for less; Intel's OpenMP spins for 200, and is told not to (`rooms.py`). On a busy machine spinning
hurts whoever does it: beside a load of 4 on 2 cores, torch's small calls took 1.6 times as long as
under OMP_WAIT_POLICY=PASSIVE. Measure on a quiet one; workers keep the setting that users have."""

Clock = Callable[[], float]
Rounds = Sequence[Sequence[float]]
"""Seconds per call: for every round its samples, on the way there and on the way back."""

Series = Sequence[tuple[int, float]]
"""The same in the order of time: (number of the turn, seconds per call)."""


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    middle: float
    high: float


class Turn(NamedTuple):
    """Whose turn it is; one that is not `counted` only makes the next one's predecessor."""

    round: int
    name: str
    counted: bool = True


def turns(names: Sequence[str], rounds: int) -> Iterator[Turn]:
    """Whose turn it is: every name twice in each round, there and back along a circle."""
    for number in range(rounds):
        there = [names[at] for at in circle(len(names), number)]
        for way in (there, there[::-1]):
            if len(way) > 1:
                yield Turn(number, way[-1], counted=False)
            yield from (Turn(number, name) for name in way)


def circle(count: int, number: int) -> list[int]:
    """The places of a round: a circle through all of them, another one in each round.

    One stands still and the others, m of them, zigzag around it: 0, 1, -1, 2, -2, ... + number
    modulo m. Neighbours in a zigzag are 1, 2, ..., m - 1 apart, and as the number goes through all
    of its m values each pair is neighbours twice, each of them with the one that stands still, too
    (Walecki's circles). The circle begins elsewhere in each round.
    """
    m = count - 1
    if m < 1:
        return list(range(count))
    zigzag = [-(i // 2) if i % 2 == 0 else i // 2 + 1 for i in range(m)]
    found = [m, *((step + number) % m for step in zigzag)]
    first = number % count
    return found[first:] + found[:first]


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
    """Seconds per call, over that many calls, after a pause and calls that are not counted.

    A call longer than `LONG` is not made twice for its warming: all pay for that alike.
    """
    sleep(PAUSE)
    seconds = _timed(run, 1, clock)
    if repeats == 1 and seconds > LONG:
        return seconds
    while seconds < WARM:
        # A clock that does not move would keep us here.
        seconds += max(_timed(run, 1, clock), WARM / 10_000)
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


def ratios(base: Series, subject: Series) -> Spread:
    """The same of neighbours: median and quartiles over all samples of the two.

    Raises:
        ValueError: one of them has no sample.
    """
    logs = _beside(*([(at, math.log(x)) for at, x in each] for each in (base, subject)))
    return _spread([math.exp(b - s) for b, s in logs])


def difference(base: Series, subject: Series) -> Spread:
    """Seconds by which the subject is slower than the base, of neighbours, as `ratios`."""
    return _spread([s - b for b, s in _beside(base, subject)])


def _beside(base: Series, subject: Series) -> list[tuple[float, float]]:
    """For each sample of either what both took at that moment."""
    if not base or not subject:
        raise ValueError(
            f"a ratio must be of samples of both. Got {len(base)} and {len(subject)} of them."
        )
    found = [(x, _at(subject, turn)) for turn, x in base]
    return found + [(_at(base, turn), x) for turn, x in subject]


def _at(series: Series, turn: int) -> float:
    """What it took at a turn: on the line between the samples next before and after."""
    before = max((each for each in series if each[0] <= turn), default=min(series))
    after = min((each for each in series if each[0] >= turn), default=max(series))
    if before[0] == after[0]:
        return before[1]
    share = (turn - before[0]) / (after[0] - before[0])
    return before[1] + share * (after[1] - before[1])


def _spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(low, median(values), high)
