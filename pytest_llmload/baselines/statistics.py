"""Judge whether times have changed, from samples of several processes on both sides.

Times of one process agree with each other far better than with those of the next process: where its pages lie, which
core it got and what else the machine did then are the same for all its samples (Kalibera and Jones, *Rigorous
Benchmarking in Reasonable Time*, ISMM 2013; Barrett et al., *Virtual Machine Warmup Blows Hot and Cold*, OOPSLA 2017).
So a process counts as one observation, however many samples it has, and the scatter of the processes is the
uncertainty.

* **Two estimators**, both of the ratio of the sides' locations. *Middle*: the median of each process, averaged over the
  processes (geometrically). *Floor*: the 10 % quantile of each process, averaged over the faster half of the processes.
  Noise of a host only ever adds time, so the floor often scatters less; if the control that the times were divided by
  was disturbed, the middle scatters less. From ten processes per side on, the estimator with the smaller standard error
  is taken; the choice does not depend on the ratio. (Chen and Revels, *Robust Benchmarking in Noisy Environments*,
  2016, on minima and medians.)
* **Standard error** by a hierarchical bootstrap: processes are drawn with replacement, each with all its samples.
  Drawing the samples of a process again as well would count their scatter twice, since the processes' locations hold
  it already (Davison and Hinkley, *Bootstrap Methods and their Application*, 1997, section 3.8). So a few quantiles of
  a process are as good as all its samples, and baselines keep only these.
* **Interval** by Student's t on the logarithm, with Welch's degrees of freedom: with five processes, percentiles of the
  bootstrap itself are far too narrow (Hesterberg, *What Teachers Should Know About the Bootstrap*, 2015). The bootstrap
  of n values also has a variance that is too small by (n - 1) / n, which is corrected.
* **Decision** as in tests of equivalence (Schuirmann 1987): ``ok`` is a finding, not the absence of one. An interval
  too wide to tell is ``inconclusive``.

Limits: effects that differ between runs but not between the processes of a run (a different machine of the same kind,
its temperature) are not in the interval; dividing by a control that alternated with the model removes a part of them.
A slowdown of only a few samples (one token in twenty) changes neither estimator.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pytest_llmload.core.verdicts import IMPROVED, INCONCLUSIVE, OK, REGRESSED

#: Confidence of the interval: one judgement in 400 errs on each side, which allows several looks at a growing sample.
CONFIDENCE = 0.995
#: Fewest processes per side for a verdict: with fewer, the scatter is a guess.
PROCESSES = 3
#: Draws of the bootstrap: its standard error is then accurate to 4 %.
_DRAWS = 400
_FLOOR = 0.1
#: Fewest processes per side for the floor: the fastest three of five are close to each other by chance.
_FLOOR_PROCESSES = 10
_SEED = 20130620


@dataclass(frozen=True)
class Judgement:
    """The verdict on the ratio of two sides' times."""

    #: ``ok``, ``regressed``, ``improved`` or ``inconclusive``.
    verdict: str
    #: Current time divided by the baseline's, estimated.
    ratio: float
    #: 99.5 % confidence interval of the ratio; ``(0, inf)`` if a side has too few processes for one.
    interval: tuple[float, float]


def judge(
    baseline: Sequence[Sequence[float]], current: Sequence[Sequence[float]], *, tolerance: float = 0.10
) -> Judgement:
    """Judge whether ``current`` takes longer than ``baseline``; each is a list of processes, each a list of samples.

    Samples are in seconds, or in any other positive unit that both sides share; ``tolerance`` is a share (0.1 is 10 %).
    ``regressed``: certainly slower, and not certainly by less than ``tolerance``. ``improved``: the same the other way
    round. ``ok``: certainly neither slower nor faster by ``tolerance``. ``inconclusive``: the interval is too wide for
    any of these, or a side has fewer than three processes. Raises ValueError for a side or a process without samples, a
    sample that is not a positive finite number, or a tolerance that is not positive.
    """
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ValueError(f"the tolerance is {tolerance!r}, but must be positive")
    sides = [_sorted(side, name) for side, name in ((baseline, "baseline"), (current, "current"))]
    fewest = min(map(len, sides))
    estimators = (_MIDDLE, _FASTEST) if fewest >= _FLOOR_PROCESSES else (_MIDDLE,)
    draws = iter(_draws((len(sides[0]), len(sides[1])) * len(estimators)))
    ratio, error, freedom = min((_estimate(sides, one, draws) for one in estimators), key=lambda item: item[1])
    if fewest < PROCESSES:
        return Judgement(INCONCLUSIVE, math.exp(ratio), (0.0, math.inf))
    room = error * student(1 - (1 - CONFIDENCE) / 2, freedom)
    low, high = math.exp(ratio - room), math.exp(ratio + room)
    return Judgement(_verdict(low, high, tolerance), math.exp(ratio), (low, high))


def _verdict(low: float, high: float, tolerance: float) -> str:
    slower, faster = 1 + tolerance, 1 / (1 + tolerance)
    if low > faster and high < slower:
        return OK
    if low > 1:
        return REGRESSED
    return IMPROVED if high < 1 else INCONCLUSIVE


def _sorted(side: Sequence[Sequence[float]], name: str) -> list[list[float]]:
    """Return the logarithms of each process's samples, in ascending order."""
    if not side or not all(side):
        raise ValueError(f"{name}: no samples, or a process without samples")
    for sample in (sample for process in side for sample in process):
        if not (sample > 0 and math.isfinite(sample)):
            raise ValueError(f"{name}: {sample!r} is not a time; expected a positive finite number")
    return [sorted(map(math.log, process)) for process in side]


# --- estimators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Estimator:
    #: The quantile of a process's samples.
    quantile: float
    #: Part of the processes, the fastest first, that is averaged.
    share: float

    def rank(self, size: int) -> int:
        """Return the index of the quantile in ``size`` sorted samples."""
        return round(self.quantile * (size - 1))

    def location(self, processes: list[float]) -> float:
        kept = self.share * len(processes)
        if kept == len(processes):
            return statistics.fmean(processes)
        # Half of five processes is two and a half: rounded up, it would be a larger part of five than of twenty.
        ordered, whole = sorted(processes), int(kept)
        return (sum(ordered[:whole]) + (kept - whole) * ordered[whole]) / kept


_MIDDLE = _Estimator(0.5, 1.0)
_FASTEST = _Estimator(_FLOOR, 0.5)


@lru_cache(maxsize=8)
def _draws(sizes: tuple[int, ...]) -> list[list[list[int]]]:
    """Return the draws of the bootstrap for each side of so many processes: which of them each draw has.

    Made once for all judgements of as many processes: to draw takes longer than all the rest.
    """
    generator = random.Random(_SEED)
    return [[generator.choices(range(size), k=size) for _ in range(_DRAWS if size > 1 else 0)] for size in sizes]


def _estimate(
    sides: list[list[list[float]]], estimator: _Estimator, draws: Iterator[list[list[int]]]
) -> tuple[float, float, float]:
    """Return the logarithm of the ratio, its standard error, and the standard error's degrees of freedom."""
    places = [[process[estimator.rank(len(process))] for process in side] for side in sides]
    variances = [_variance(side, estimator, next(draws)) for side in places]
    total = sum(variances)
    # Welch and Satterthwaite. For the faster half, only half of the processes determine the scatter.
    parts = zip(variances, places, strict=True)
    spread = sum(variance**2 / max(len(side) * estimator.share - 1, 1.0) for variance, side in parts)
    before, after = map(estimator.location, places)
    return after - before, math.sqrt(total), total**2 / spread if 0 < spread < math.inf else math.inf


def _variance(processes: list[float], estimator: _Estimator, draws: list[list[int]]) -> float:
    """Return the variance of the processes' location, by the bootstrap."""
    size = len(processes)
    if size < 2:
        return math.inf
    locations = [estimator.location([processes[index] for index in draw]) for draw in draws]
    return float(statistics.variance(locations)) * size / (size - 1)


# --- Student's t -----------------------------------------------------------------------------------------------------


def student(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t for a probability above one half and at least one degree of freedom.

    Hill, *Algorithm 396: Student's t-quantiles* (CACM 1970), has 3 correct digits from 1 degree on and 6 from 3 on.
    """
    if math.isinf(freedom):
        return statistics.NormalDist().inv_cdf(probability)
    tail = 2 * (1 - probability)
    if freedom < 2:
        # Interpolate between the closed forms of one and of two degrees of freedom, along the logarithm.
        one = 1 / math.tan(tail * math.pi / 2)
        two = math.sqrt(2 / (tail * (2 - tail)) - 2)
        return math.pow(one, 2 - freedom) * math.pow(two, freedom - 1)
    a = 1 / (freedom - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * freedom
    x = d * tail
    y = x ** (2 / freedom)
    if y > 0.05 + a:
        x = statistics.NormalDist().inv_cdf(tail / 2)
        y = x * x
        if freedom < 5:
            c += 0.3 * (freedom - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        e = 1 / (((freedom + 6) / (freedom * y) - 0.089 * d - 0.822) * (freedom + 2) * 3) + 0.5 / (freedom + 4)
        y = (e * y - 1) * (freedom + 1) / (freedom + 2) + 1 / y
    return math.sqrt(freedom * y)
