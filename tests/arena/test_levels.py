"""What is said over all levels of quality: extremes, and the median where some are bounds only."""

import math

import pytest
from arena_curves import comparison

from speed_engine.arena.speedup import speed_up


@pytest.mark.parametrize("speed", [0.5, 1.7, 9.0])
def test_worst_and_best_are_the_extremes_over_levels(speed):
    found = speed_up(comparison({"a": 1.0, "b": speed}, 3, 0.1), "b", "a")
    lows, highs = ([getattr(ratio, end) for ratio in found.curve] for end in ("low", "high"))
    assert (found.worst.low, found.worst.high) == (min(lows), min(highs))
    assert (found.best.low, found.best.high) == (max(lows), max(highs))
    assert found.worst != found.best


@pytest.mark.parametrize(
    "speed, low, high",
    [
        (0.7, 0.0, (0.7 * 0.8) ** 0.5),  # 0.7, 0.7, below 0.8, below 1
        (3.5, (3 * 3.5) ** 0.5, math.inf),  # at least 2, at least 3, 3.5, 3.5
    ],
)
def test_the_median_of_an_even_number_of_levels_keeps_what_is_not_known(speed, low, high):
    found = speed_up(comparison({"a": 1.0, "b": speed}, evaluations=5), "b", "a")
    assert len(found.curve) == 4
    assert (found.median.low, found.median.high) == pytest.approx((low, high))
