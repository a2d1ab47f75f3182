import math
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from speed_engine.diffusion.grammar import Spelling, canonical, read_spelling
from speed_engine.runtime.checks import UserError

NAMES = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
VALUES = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False),
    st.sampled_from(["definition", "prediction"]),
)


def test_a_spelling_is_taken_apart():
    assert read_spelling("speed_paper@linear:v+k=3+optimizer.beta1=0.5+stratified=True") == (
        Spelling("speed_paper", {"k": 3, "optimizer.beta1": 0.5, "stratified": True}, "linear", "v")
    )
    assert read_spelling("uniform") == Spelling("uniform", {})


@given(
    method=NAMES,
    options=st.dictionaries(NAMES, VALUES, max_size=4),
    schedule=st.none() | NAMES,
    prediction=st.none() | NAMES,
)
@example(method="p2", options={"a": 1e300, "b": 5e-324, "c": -0.0}, schedule=None, prediction=None)
def test_what_is_put_together_is_taken_apart_again(method, options, schedule, prediction):
    spelling = Spelling(method, options, schedule, prediction)
    assert read_spelling(str(spelling)) == spelling
    assert str(read_spelling(str(spelling))) == str(spelling)


@pytest.mark.parametrize(
    "text, same",
    [
        ("speed_paper+lam=.70+k=3.0", "speed_paper+k=3+lam=0.7"),
        ("speed_paper+tau=7e2", "speed_paper+tau=700"),
        ("uniform+stratified=true", "uniform+stratified=True"),
        ("speed_paper+tau=none", "speed_paper+tau=None"),
        ("min_snr+gamma=INF", "min_snr+gamma=inf"),
        ("min_snr+gamma=1e-05", "min_snr+gamma=1e-05"),
        ("min_snr+gamma=1e30", "min_snr+gamma=1e30"),
    ],
)
def test_there_is_one_canonical_spelling(text, same):
    assert canonical(text) == same == canonical(same)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "a+",
        "a+k",
        "a+k=",
        "a+=3",
        "a+k=3+",
        "a+k=1+1",
        "a@",
        "a:",
        "a:v@flow",
        "é",
        "a\n",
    ],
)
def test_what_does_not_follow_the_grammar_is_refused(text):
    with pytest.raises(UserError, match="write METHOD"):
        read_spelling(text)


def test_an_option_that_is_set_twice_is_refused():
    with pytest.raises(UserError, match="sets k twice"):
        read_spelling("speed_paper+k=3+k=3")


@pytest.mark.parametrize("text", ["uniform@flow", "uniform:v"])
def test_process_and_prediction_are_no_part_of_a_method(text):
    with pytest.raises(UserError, match="options of their own here: schedule and prediction"):
        canonical(text)


def test_a_path_is_no_value_of_a_method():
    """Run folders are called as their method."""
    assert read_spelling("a+model.size=DiT-S/2").options == {"model.size": "DiT-S/2"}
    with pytest.raises(UserError, match="write METHOD"):
        canonical("a+b=../../c")


def test_numbers_that_are_too_long_for_an_integer_are_read():
    assert read_spelling(f"uniform+k={'9' * 5000}").options == {"k": math.inf}
