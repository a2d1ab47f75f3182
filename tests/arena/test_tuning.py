"""A learning rate is ruled out only where it is far off, and chosen by all runs that count."""

import math

from hypothesis import given
from hypothesis import strategies as st

from speed_engine.arena.tuning import best, contenders

VALUES = st.one_of(st.floats(0.1, 100), st.just(math.inf))


def test_what_is_at_most_half_as_bad_again_as_the_best_is_left_in_its_order():
    reached = {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.9, 8e-3: 3.1, 1e-2: math.inf}
    assert contenders(reached) == [1e-3, 2e-3, 4e-3]


@given(st.dictionaries(st.floats(1e-5, 1), VALUES, min_size=1))
def test_the_best_is_left_and_where_all_failed_the_first(reached):
    left = contenders(reached)
    finest = min(reached, key=reached.__getitem__)
    if math.isinf(reached[finest]):
        assert left == [next(iter(reached))]  # one run that fails tells why
    else:
        assert finest in left


def test_the_mean_over_all_seeds_decides():
    assert best({1.0: [2.0, 8.0], 2.0: [5.0, 5.0]}) == 1.0  # 4 and 5
    assert best({1.0: [2.0, 18.0], 2.0: [5.0, 5.0]}) == 2.0


def test_a_rate_with_a_run_that_failed_is_taken_only_where_there_is_no_other():
    assert best({1.0: [1.0, math.inf], 2.0: [9.0, 9.0]}) == 2.0
    assert best({1.0: [1.0, math.inf], 2.0: [math.inf, 9.0]}) == 1.0
