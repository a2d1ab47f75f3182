"""How many times fewer images or seconds a method needs than a baseline, and how sure that is.

A contestant's curve is the geometric mean of its seeds at each evaluation, then the best so far (a
quality counts as reached at its first crossing). Between evaluations it is a straight line in log
metric and log images, which is exact for a power law.

The levels are the baseline's own qualities at its evaluations, from the second on (where the curves
begin, nothing can be faster) to its final one. At each level the speed-up is the baseline's images
over the method's. What cannot be known is bracketed, never left out:

    method never gets there           0 to (baseline's images / method's budget)
    method is there when first seen   (baseline's images / method's first evaluation) to infinity

Intervals come from the bootstrap over seeds: seeds are drawn with replacement, together for both
contestants, and everything is computed again, levels included.

Letters: N seeds, E evaluations, K levels, R resamples.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from speed_engine.arena.bootstrap import Array, Bootstrap
from speed_engine.arena.results import REAL, Curve, Results
from speed_engine.runtime.checks import UserError

LOSS = "validation_loss"  # at fixed timesteps and noise, so that it hardly wavers
LEAST_GAIN = 1.1  # times that a baseline's distance must become better after its first evaluation
Unit = Literal["images", "seconds"]


@dataclass(frozen=True)
class Ratio:
    """A speed-up between ``low`` and ``high``, equal where it could be measured."""

    low: float
    high: float
    interval: tuple[float, float] | None = None  # 95 %; none below LEAST_SEEDS

    @property
    def faster(self) -> bool:
        """The whole interval is above 1."""
        return self.interval is not None and self.interval[0] > 1

    @property
    def slower(self) -> bool:
        """The whole interval is below 1."""
        return self.interval is not None and self.interval[1] < 1


@dataclass(frozen=True)
class SpeedUp:
    """Of a method over a baseline."""

    method: str
    baseline: str
    unit: Unit
    seeds: tuple[int, ...]  # complete for both
    levels: tuple[float, ...]  # (K,) metric, falling
    curve: tuple[Ratio, ...]  # (K,) one per level; the last is the baseline's final quality
    median: Ratio  # over levels
    worst: Ratio  # over levels, as is the best; extremes of noise, hence without interval
    best: Ratio
    # Median over the levels between the Gaussian's quality and that of real images; None where
    # there are none.
    beyond: Ratio | None

    @property
    def final(self) -> Ratio:
        """At the baseline's final quality."""
        return self.curve[-1]


def why_unusable(curve: Curve, metric: str) -> str | None:
    """Why no statistics are made from a run; None if they are."""
    if curve.failure is not None:
        return curve.failure
    values = [point.values.get(metric, math.nan) for point in curve.points if point.images > 0]
    if not values:
        return "it was never evaluated"
    if not all(math.isfinite(value) and value > 0 for value in values):
        return f"{metric} is not a positive number at every evaluation"
    return None


def complete_runs(results: Results, contestant: str) -> dict[int, Curve]:
    """Seed -> run of one contestant that statistics may use."""
    return {
        curve.seed: curve
        for curve in results.curves
        if curve.contestant == contestant and why_unusable(curve, results.metric) is None
    }


def stacked(
    runs: dict[int, Curve], seeds: tuple[int, ...], metric: str
) -> tuple[Array, Array, Array]:
    """Images (E,), log seconds (N, E) and log metric (N, E) of a contestant.

    Raises:
        UserError: the seeds were evaluated at different numbers of images.
    """
    points = [[point for point in runs[seed].points if point.images > 0] for seed in seeds]
    images = [[point.images for point in run] for run in points]
    if any(other != images[0] for other in images):
        raise UserError(
            f"The seeds of {runs[seeds[0]].contestant} were evaluated at different numbers of "
            f"images; evaluate every run of a comparison at the same ones."
        )
    seconds = np.log([[max(point.seconds, 1e-9) for point in run] for run in points])
    quality = np.log([[point.values[metric] for point in run] for run in points])
    return np.array(images[0], float), seconds, quality


def speed_up(results: Results, method: str, baseline: str, unit: Unit = "images") -> SpeedUp:
    """Of ``method`` over ``baseline``, on the seeds that are complete for both.

    Simulated: 400 comparisons of a power law with itself (20 evaluations; noise of 10 % per
    evaluation, 10 % per run, 10 % shared by a pair). The interval of the median over levels held 1
    in 96 % with 3 seeds, 95 % with 5, 96 % with 8, but 86 % with 2. At the final quality: 97 %,
    99 %, 99 %, 88 %. Of a method 3 times faster it held 3 in 93 % and 92 % with 5 seeds. The
    running best rewards noise a little: with it, 3 came out as 2.92, and 1 as 0.99.

    Raises:
        UserError: no seed is complete for both, or the baseline did not improve on its first
            evaluation, so that there are no levels of quality.
    """
    runs, of_baseline = complete_runs(results, method), complete_runs(results, baseline)
    seeds = tuple(sorted(runs.keys() & of_baseline.keys()))
    if not seeds:
        raise UserError(f"No seed is complete for both {method} and {baseline}.")
    bootstrap = Bootstrap(len(seeds))
    m = _mean_curve(runs, seeds, results.metric, unit, bootstrap)
    b = _mean_curve(of_baseline, seeds, results.metric, unit, bootstrap)
    _refuse_without_learning(of_baseline, seeds, results.metric, baseline, bootstrap)
    records = np.flatnonzero(np.diff(b[1][0]) < 0) + 1  # later ones repeat the best so far
    records[-1] = b[1].shape[1] - 1  # a resample may improve even later
    levels = b[1][:, records]
    low, high = _brackets(levels, m, b)
    real = results.references.get(REAL, {}).get(results.metric, 0.0)
    measured = np.exp(levels[0])
    far = (measured < (results.floor or 0.0)) & (measured >= real)
    beyond = None
    if far.any():
        beyond = _ratio(_median(low[:, far]), _median(high[:, far]), bootstrap)
    return SpeedUp(
        method,
        baseline,
        unit,
        seeds,
        tuple(measured.tolist()),
        tuple(_ratio(low[:, k], high[:, k], bootstrap) for k in range(len(records))),
        median=_ratio(_median(low), _median(high), bootstrap),
        worst=Ratio(math.exp(low[0].min()), math.exp(high[0].min())),
        best=Ratio(math.exp(low[0].max()), math.exp(high[0].max())),
        beyond=beyond,
    )


def _refuse_without_learning(
    runs: dict[int, Curve], seeds: tuple[int, ...], metric: str, name: str, bootstrap: Bootstrap
) -> None:
    """Levels between a first and a best quality that are the same but for noise measure noise."""
    _, _, quality = stacked(runs, seeds, metric)
    mean = bootstrap.counts / len(seeds) @ quality  # (R, E) log
    gain = mean[:, 0] - mean[:, 1:].min(axis=1, initial=np.inf)
    interval = bootstrap.interval(gain, gain)
    of_seeds = quality[:, 0] - quality[:, 1:].min(axis=1, initial=np.inf)
    # Seeds that begin far apart make the interval wide, however much each of them learns.
    all_learned = of_seeds.min() > math.log(LEAST_GAIN)
    least = 1.0 if metric == LOSS else LEAST_GAIN
    unsure = interval is not None and interval[0] <= 0 and not all_learned
    if gain[0] <= math.log(least) or unsure:
        raise UserError(
            f"{name} did not measurably improve after its first evaluation: at its best, {metric} "
            f"was {math.exp(gain[0]):.2f} times better; {least:g} times, and more than its seeds "
            "differ, are needed. Evaluate earlier, train longer, or look at the data."
        )


def _mean_curve(
    runs: dict[int, Curve], seeds: tuple[int, ...], metric: str, unit: Unit, bootstrap: Bootstrap
) -> tuple[Array, Array]:
    """Log cost (R, E) and best log metric so far (R, E), one row per resample."""
    images, seconds, quality = stacked(runs, seeds, metric)
    shares = bootstrap.counts / len(seeds)
    cost = shares @ seconds if unit == "seconds" else np.tile(np.log(images), (len(shares), 1))
    return cost, np.minimum.accumulate(shares @ quality, axis=1)


def _brackets(
    levels: Array, method: tuple[Array, Array], baseline: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Log speed-up at each level, from low to high: (R, K) twice."""
    of_baseline, _ = _first_crossing(levels, *baseline)
    least, most = _first_crossing(levels, *method)
    return of_baseline - most, of_baseline - least


def _first_crossing(levels: Array, cost: Array, quality: Array) -> tuple[Array, Array]:
    """Log cost at which each level (R, K) is reached, at least and at most: (R, K) twice."""
    after = (quality[:, None, :] > levels[:, :, None]).sum(2)  # (R, K) first evaluation that has it
    last = quality.shape[1] - 1
    right = np.clip(after, min(1, last), last)
    left = np.maximum(right - 1, 0)
    row = np.arange(len(levels))[:, None]
    fall = quality[row, left] - quality[row, right]
    share = (quality[row, left] - levels) / np.where(fall > 0, fall, 1)
    between = cost[row, left] + (cost[row, right] - cost[row, left]) * share
    at_start = (after == 0) & (levels > quality[:, :1])
    exact = np.where(after == 0, cost[:, :1], between)
    never = after > last
    least = np.where(never, cost[:, -1:], np.where(at_start, -np.inf, exact))
    return least, np.where(never, np.inf, exact)


def _median(logs: Array) -> Array:
    """(R, K) -> (R,), like ``np.median``, but with infinities."""
    ordered = np.sort(logs, axis=1)
    lower, upper = ordered[:, (logs.shape[1] - 1) // 2], ordered[:, logs.shape[1] // 2]
    return np.where(lower == upper, lower, (lower + upper) / 2)


def _ratio(low: Array, high: Array, bootstrap: Bootstrap) -> Ratio:
    """(R,) log brackets -> a speed-up."""
    interval = bootstrap.interval(low, high)
    limits = interval and (math.exp(interval[0]), math.exp(interval[1]))
    return Ratio(math.exp(low[0]), math.exp(high[0]), limits)
