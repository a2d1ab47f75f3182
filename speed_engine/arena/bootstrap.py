"""Intervals from few seeds: the bootstrap over seeds, widened to what so few of them can tell.

Seeds are drawn with replacement, as many as there are. The percentile interval of these resamples
is too narrow for few seeds; it is stretched about the estimate by

    Student's t(N - 1) at 97.5 % · sqrt(N / (N - 1)) / 1.96        1.58 for N = 5

which makes it Student's interval where the statistic is a mean of normal numbers (Hesterberg 2015,
arXiv 1411.5279, widens it by the same factor). Values may be infinite: not known.

Letters: N seeds, R resamples.
"""

import functools
import itertools
import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
LEAST_SEEDS = 3  # with which anything is said to be shown
MANY = 2_000  # resamples: all there are up to this number, else so many random ones
_TAIL = (1 - CONFIDENCE) / 2
_NORMAL = 1.959964  # 97.5 % of the normal distribution lie below it

Array = NDArray[np.float64]


class Bootstrap:
    """The resamples of N seeds; the first row is the sample itself. The same for every call.

    Attributes:
        counts: (R, N) how often each seed is drawn.
        probability: (R,) of each resample.
    """

    def __init__(self, seeds: int) -> None:
        self.seeds = seeds
        every = math.comb(2 * seeds - 1, seeds) <= MANY
        self.counts, self.probability = _all(seeds) if every else _some(seeds)

    def interval(self, low: Array, high: Array) -> tuple[float, float] | None:
        """(R,), (R,): the statistic, bracketed where it isn't known -> its 95 % interval.

        It always holds the first row, the estimate. None below ``LEAST_SEEDS``, where it would hold
        the truth in 86 % only.
        """
        if self.seeds < LEAST_SEEDS:
            return None
        return -self._upper_limit(-low), self._upper_limit(high)

    def _upper_limit(self, values: Array) -> float:
        order = np.argsort(-values, kind="stable")
        enough = np.cumsum(self.probability[order]) >= _TAIL
        percentile, estimate = float(values[order[enough.argmax()]]), float(values[0])
        if math.isinf(estimate) or percentile <= estimate:
            return estimate
        return estimate + (percentile - estimate) * _stretch(self.seeds)


@functools.cache
def student_quantile(freedom: int) -> float:
    """97.5 % point of Student's t: t = sqrt(freedom) tan(angle), density cos(angle)^(freedom-1)."""
    angle = np.linspace(0, math.pi / 2, 200_001)
    mass = np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2) ** (freedom - 1))
    at = np.interp(CONFIDENCE, mass / mass[-1], angle[1:])
    return math.sqrt(freedom) * math.tan(at)


def _stretch(seeds: int) -> float:
    return student_quantile(seeds - 1) * math.sqrt(seeds / (seeds - 1)) / _NORMAL


def _all(seeds: int) -> tuple[Array, Array]:
    """Every resample, and how probable it is."""
    tallies = [
        tuple(Counter(draw)[seed] for seed in range(seeds))
        for draw in itertools.combinations_with_replacement(range(seeds), seeds)
    ]
    tallies.sort(key=lambda tally: tally != (1,) * seeds)
    ways = [math.factorial(seeds) / math.prod(map(math.factorial, row)) for row in tallies]
    return np.array(tallies, float), np.array(ways) / seeds**seeds


def _some(seeds: int) -> tuple[Array, Array]:
    drawn = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), MANY - 1)
    return np.vstack([np.ones((1, seeds)), drawn]).astype(np.float64), np.full(MANY, 1 / MANY)
