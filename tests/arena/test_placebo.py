import dataclasses

import numpy as np
from arena_curves import comparison

from speed_engine.arena.placebo import false_alarm_tests
from speed_engine.arena.results import Results


def with_placebo(speed: float, pace: float = 1.0) -> Results:
    """Uniform, and uniform with other seeds, said to be ``speed`` times as fast in images."""
    speeds = {"p2": 1.0, "uniform": 1.0, "uniform+seed_offset=9": speed}
    results = comparison(speeds, 5, 0.03, np.random.default_rng(2))
    curves = [
        dataclasses.replace(
            curve,
            points=tuple(
                dataclasses.replace(point, seconds=point.seconds / pace) for point in curve.points
            ),
        )
        if "seed_offset" in curve.contestant
        else curve
        for curve in results.curves
    ]
    contestants = [
        dataclasses.replace(c, method="uniform", options={"seed_offset": 9}, learning_rate=2e-3)
        if "seed_offset" in c.name
        else c
        for c in results.contestants
    ]
    return dataclasses.replace(results, curves=tuple(curves), contestants=tuple(contestants))


def test_equals_pass():
    in_images, in_seconds = false_alarm_tests(with_placebo(1.0))
    assert "uniform+seed_offset=9 against uniform" in in_images and in_images.endswith("Passed.")
    assert "in seconds" in in_seconds and in_seconds.endswith("Passed.")


def test_a_busy_machine_fails_the_test_in_seconds_alone():
    in_images, in_seconds = false_alarm_tests(with_placebo(1.0, pace=1.5))
    assert in_images.endswith("Passed.")
    assert "FAILED" in in_seconds and "believe no speed-up in seconds" in in_seconds


def test_a_placebo_that_works_fails_the_test():
    assert "FAILED" in false_alarm_tests(with_placebo(1.6))[0]


def test_without_a_placebo_nothing_is_said():
    assert false_alarm_tests(comparison({"uniform": 1.0, "p2": 1.0}, 3, 0.1)) == []
