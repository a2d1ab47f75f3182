"""Which learning rate of a grid each contestant takes, by runs that are not reported."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

NEARLY_AS_GOOD = 1.5  # times the best: chance alone hardly makes two runs differ by more


class Trial(NamedTuple):
    """A run."""

    name: str  # of the contestant
    rate: float
    seed: int


class Tuned(NamedTuple):
    """A contestant's choice.

    Attributes:
        rate: the best of the grid.
        reached: geometric mean of the metric by rate; infinite where a run failed.
    """

    rate: float
    reached: dict[float, float]


def tune(
    names: Sequence[str],
    rates: Sequence[float],
    seeds: Iterable[int],
    measure: Callable[[list[Trial]], list[float]],
) -> dict[str, Tuned]:
    """The best rate of every contestant.

    The first seed is run with every rate, each further one only where chance may decide: with the
    rates that are nearly as good as a contestant's best so far.

    Args:
        names: of the contestants.
        rates: the grid, for all.
        seeds: of the runs.
        measure: what each of some trials reached, lower is better; infinite if it failed.
    """
    values = {name: {rate: list[float]() for rate in rates} for name in names}
    contenders = {name: list(rates) for name in names}
    for seed in seeds:
        trials = [Trial(name, rate, seed) for name in names for rate in contenders[name]]
        if not trials:
            break
        for trial, value in zip(trials, measure(trials), strict=True):
            values[trial.name][trial.rate].append(value)
        for name, tried in contenders.items():
            reached = {rate: _mean(values[name][rate]) for rate in tried}
            limit = NEARLY_AS_GOOD * min(reached.values(), default=0.0)
            near = [rate for rate in tried if reached[rate] <= limit]
            contenders[name] = near if len(near) > 1 else []
    return {name: _best(tried) for name, tried in values.items()}


def _best(tried: dict[float, list[float]]) -> Tuned:
    """Among those that were tried the most often: others were given up."""
    reached = {rate: _mean(values) for rate, values in tried.items()}
    return Tuned(min(tried, key=lambda rate: (-len(tried[rate]), reached[rate])), reached)


def _mean(values: list[float]) -> float:
    return math.inf if math.inf in values else statistics.geometric_mean(values)
