"""The speed-up on curves whose speed-up is known, and on equals: no false alarms."""

import dataclasses
import math

import numpy as np
import pytest
from arena_curves import comparison
from hypothesis import given, settings
from hypothesis import strategies as st

from speed_engine.arena.bootstrap import Bootstrap, _stretch, student_quantile
from speed_engine.arena.results import Curve, Results
from speed_engine.arena.speedup import complete_runs, speed_up

SPEEDS = st.floats(0.2, 8.0)


def with_curves(results: Results, change) -> Results:
    return dataclasses.replace(results, curves=tuple(change(curve) for curve in results.curves))


def with_metric(results: Results, transform) -> Results:
    def changed(curve: Curve) -> Curve:
        points = [
            dataclasses.replace(p, values={k: transform(v) for k, v in p.values.items()})
            for p in curve.points
        ]
        return dataclasses.replace(curve, points=tuple(points))

    return with_curves(results, changed)


def numbers(speedup) -> list[float]:
    ratios = [*speedup.curve, speedup.median, speedup.worst, speedup.best]
    return [x for r in ratios for x in (r.low, r.high, *(r.interval or ()))]


@settings(max_examples=30, deadline=None)
@given(SPEEDS, st.sampled_from(["images", "seconds"]), st.integers(1, 4))
def test_of_power_laws_it_is_their_ratio_or_brackets_it(speed, unit, seeds):
    found = speed_up(comparison({"a": 1.0, "b": speed}, seeds), "b", "a", unit)
    measured = 0
    for k, ratio in enumerate(found.curve, start=2):
        assert ratio.low <= speed * (1 + 1e-9) and ratio.high >= speed * (1 - 1e-9)
        if 1 / 20 * (1 + 1e-6) < k / 20 / speed < 1 - 1e-6:  # within what the method trained
            assert ratio.low == pytest.approx(speed) and ratio.high == pytest.approx(speed)
            measured += 1
    assert measured > 0 and len(found.curve) == 19
    assert found.worst.low <= found.median.low <= found.best.high


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.floats(0.2, 3), st.integers(0, 1000))
def test_units_and_powers_of_the_metric_change_nothing(scale, power, seed):
    draw = np.random.default_rng(seed)
    results = comparison({"a": 1.0, "b": 1.7}, 3, 0.1, draw)
    changed = with_metric(results, lambda v: scale * v**power)
    assert numbers(speed_up(changed, "b", "a")) == pytest.approx(
        numbers(speed_up(results, "b", "a"))
    )


def test_another_monotone_transform_changes_little():
    results = comparison({"a": 1.0, "b": 1.7}, 3, 0.02)
    before, after = (
        speed_up(r, "b", "a").median.low for r in (results, with_metric(results, math.log1p))
    )
    assert after == pytest.approx(before, rel=0.03)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.3, 3.0))
def test_swapping_method_and_baseline_inverts(speed):
    results = comparison({"a": 1.0, "b": speed})
    there, back = speed_up(results, "b", "a"), speed_up(results, "a", "b")
    there, back = (
        [ratio.low for ratio in found.curve if math.isclose(ratio.low, ratio.high)]
        for found in (there, back)
    )
    assert there == pytest.approx([speed] * len(there))
    assert back == pytest.approx([1 / speed] * len(back)) and there and back


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_a_contestant_against_itself_is_exactly_as_fast(seeds):
    found = speed_up(comparison({"a": 1.0}, seeds, 0.2), "a", "a")
    for ratio in (*found.curve, found.median):
        assert ratio.low == ratio.high == 1
        assert ratio.interval == (None if seeds < 3 else (1, 1))


def test_equals_are_called_equal_at_the_nominal_rate():
    draw = np.random.default_rng(7)
    repetitions, held = 300, {"median": 0, "final": 0}
    for _ in range(repetitions):
        found = speed_up(comparison({"a": 1.0, "b": 1.0}, 5, 0.1, draw), "b", "a")
        for name in held:
            ratio = getattr(found, name)
            held[name] += not (ratio.faster or ratio.slower)
    assert 0.90 <= held["median"] / repetitions <= 0.99
    assert 0.90 <= held["final"] / repetitions  # above 0.99: not reaching it bounds nothing below


def test_a_true_speed_up_is_found():
    draw = np.random.default_rng(8)
    found = [speed_up(comparison({"a": 1.0, "b": 3.0}, 5, 0.1, draw), "b", "a") for _ in range(40)]
    assert all(f.median.faster and f.final.faster for f in found)
    assert np.median([f.final.low for f in found]) == pytest.approx(3, rel=0.1)


def test_a_quality_that_is_never_reached_counts_as_slower_and_is_not_dropped():
    found = speed_up(comparison({"a": 1.0, "b": 0.25}, 5, 0.01), "b", "a")
    assert len(found.curve) == 19
    assert found.final.low == 0 and found.final.high == pytest.approx(1, abs=0.05)
    assert found.final.interval is not None and found.final.interval[0] == 0
    assert found.median.low == 0 and found.median.high < 1 and found.worst.low == 0


def test_a_quality_that_is_there_when_first_seen_is_a_lower_bound():
    found = speed_up(comparison({"a": 1.0, "b": 100.0}), "b", "a")
    assert found.final.low == pytest.approx(20) and found.final.high == math.inf
    assert found.best.high == math.inf


def test_seeds_are_paired_and_failed_runs_left_out_with_their_pair():
    def fail(curve: Curve) -> Curve:
        spoils = (curve.contestant, curve.seed) in {("a", 0), ("b", 3)}
        return dataclasses.replace(curve, failure="killed", points=()) if spoils else curve

    results = with_curves(comparison({"a": 1.0, "b": 2.0}, 5), fail)
    assert speed_up(results, "b", "a").seeds == (1, 2, 4)
    assert set(complete_runs(results, "a")) == {1, 2, 3, 4}


def test_without_a_common_seed_there_is_none():
    results = with_curves(
        comparison({"a": 1.0, "b": 2.0}, 2),
        lambda c: dataclasses.replace(c, failure="x" if (c.contestant == "a") == c.seed else None),
    )
    with pytest.raises(ValueError, match="No seed is complete for both b and a"):
        speed_up(results, "b", "a")


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0])
def test_a_run_without_a_usable_metric_is_left_out(value):
    results = with_metric(comparison({"a": 1.0}), lambda v: value if v < 3 else v)
    assert complete_runs(results, "a") == {}


def test_runs_evaluated_elsewhere_are_refused():
    results = with_curves(
        comparison({"a": 1.0}, 2),
        lambda c: dataclasses.replace(c, points=c.points[c.seed :]),
    )
    with pytest.raises(ValueError, match="at different numbers of images"):
        speed_up(results, "a", "a")


def test_a_baseline_that_never_improves_is_refused():
    with pytest.raises(ValueError, match="did not measurably improve"):
        speed_up(with_metric(comparison({"a": 1.0}), lambda v: 1.0), "a", "a")


@pytest.mark.parametrize("seeds", [1, 2, 5, 7, 12])
def test_resamples_are_a_distribution_that_begins_with_the_sample(seeds):
    bootstrap = Bootstrap(seeds)
    assert bootstrap.probability.sum() == pytest.approx(1)
    assert (bootstrap.counts.sum(1) == seeds).all() and (bootstrap.counts[0] == 1).all()
    mean = bootstrap.probability @ bootstrap.counts
    assert mean == pytest.approx(np.ones(seeds), abs=0.1)


def test_student_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 4, 30):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-3)


def test_of_normal_numbers_the_interval_is_nearly_students():
    stats = pytest.importorskip("scipy.stats")
    bootstrap, x = Bootstrap(7), np.random.default_rng(0).normal(size=7)
    means = bootstrap.counts @ x / 7
    low, high = stats.t.interval(0.95, 6, x.mean(), x.std(ddof=1) / math.sqrt(7))
    found = bootstrap.interval(means, means)
    assert found is not None and found == pytest.approx((low, high), abs=0.15 * x.std())
    assert found[1] - found[0] == pytest.approx(high - low, rel=0.02)
    assert _stretch(5) == pytest.approx(1.58, abs=0.005)  # as bootstrap.py has it
