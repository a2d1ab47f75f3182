"""A learning rate is not chosen by chance, nor are runs spent on rates that cannot win."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speed_engine.arena.tuning import NEARLY_AS_GOOD, tune


def tuned(values: dict[float, list[float]], seeds: int = 3):
    """Of one contestant whose runs reach these values, seed by seed; and its trials."""
    trials = []

    def measure(asked):
        trials.extend(asked)
        return [values[trial.rate][trial.seed] for trial in asked]

    return tune(["x"], list(values), range(seeds), measure)["x"], trials


def test_rates_that_are_nearly_as_good_get_more_runs_and_their_mean_decides():
    found, trials = tuned({1.0: [4.0, 6.0, 6.0], 2.0: [4.1, 4.0, 4.2], 3.0: [6.2, 1.0, 1.0]})
    assert found.rate == 2.0
    assert found.reached[1.0] == statistics.geometric_mean([4.0, 6.0, 6.0])
    assert found.reached[3.0] == pytest.approx(6.2)  # too far off for a second run
    assert [(trial.rate, trial.seed) for trial in trials] == [
        (1.0, 0), (2.0, 0), (3.0, 0), (1.0, 1), (2.0, 1), (1.0, 2), (2.0, 2),
    ]  # fmt: skip


def test_a_clear_winner_needs_one_run():
    found, trials = tuned({1.0: [9.0], 2.0: [3.0]})
    assert found.rate == 2.0 and len(trials) == 2


def test_a_rate_that_fails_is_not_taken_unless_all_fail():
    found, _ = tuned({1.0: [math.inf], 2.0: [7.0]})
    assert found.rate == 2.0 and found.reached[1.0] == math.inf
    found, _ = tuned({1.0: [3.0, math.inf, 3.0], 2.0: [4.0, 4.0, 4.0]})
    assert found.rate == 2.0
    found, _ = tuned({1.0: [math.inf] * 3, 2.0: [math.inf] * 3})
    assert found.rate in (1.0, 2.0)


@given(st.lists(st.tuples(*[st.floats(0.1, 10)] * 3), min_size=1, max_size=5))
def test_the_choice_is_the_best_of_those_that_were_run_the_most_often(rows):
    values = {float(rate): list(row) for rate, row in enumerate(rows, 1)}
    found, trials = tuned(values)
    runs = {rate: [t.seed for t in trials if t.rate == rate] for rate in values}
    most = max(map(len, runs.values()))
    finalists = [rate for rate in values if len(runs[rate]) == most]
    assert found.reached[found.rate] == min(found.reached[rate] for rate in finalists)
    firsts = {rate: row[0] for rate, row in values.items()}
    near = [r for r in firsts if firsts[r] <= NEARLY_AS_GOOD * min(firsts.values())]
    assert [r for r in runs if len(runs[r]) > 1] == (near if len(near) > 1 else [])


def test_contestants_are_tuned_each_for_itself():
    best = {"a": 1.0, "b": 2.0}

    def measure(trials):
        return [1.0 if best[trial.name] == trial.rate else 9.0 for trial in trials]

    found = tune(list(best), [1.0, 2.0], [1000, 1001], measure)
    assert {name: of.rate for name, of in found.items()} == best
