"""Learning rates over the steps of a run."""

import pytest

from speed_engine.training.schedules import SCHEDULES, linear_warmup

OPTIONS = {"decay_share": 0.25, "reference_steps": 4}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [1, 1, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
        ("wsd", [1, 1, 1, 1, 1, 1, 1, 1 / 2]),
        ("inverse_sqrt", [1, 1, 1, 1, 0.8**0.5, (4 / 6) ** 0.5, (4 / 7) ** 0.5, 0.5**0.5]),
    ],
)
def test_a_schedule_of_eight_steps_with_a_warm_up_of_two(name, expected):
    factor = SCHEDULES[name](8, 2, **OPTIONS)
    assert [factor(step) for step in range(1, 9)] == pytest.approx(expected)


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 5), (3, 3), (3, 100), (10**9, 100)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_step_of_any_length_is_lost(name, steps, warmup):
    factor = SCHEDULES[name](steps, warmup, **OPTIONS)
    assert all(0 < factor(step) <= 1 for step in (1, (steps + 1) // 2, steps))


def test_warmup_stable_decay_is_the_same_for_every_length_until_it_decays():
    short, long = (SCHEDULES["wsd"](steps, 10, **OPTIONS) for steps in (400, 4000))
    assert all(short(step) == long(step) == 1 for step in range(1, 302))
    assert short(302) < 1 == long(302)


def test_the_warm_up_rises_linearly_then_stays():
    rate = linear_warmup(0.4, 4)
    assert [rate(step) for step in range(1, 7)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert linear_warmup(0.4, 0)(1) == 0.4
