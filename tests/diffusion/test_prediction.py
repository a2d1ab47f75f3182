"""Targets, their weights and their inverses are one algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speed_engine.diffusion.prediction import PREDICTIONS, from_epsilon_weight, solve
from speed_engine.diffusion.schedule import linear
from speed_engine.diffusion.table import TimestepTable

SCHEDULE = linear()


@given(
    prediction=st.sampled_from(list(PREDICTIONS)), t=st.integers(0, 999), seed=st.integers(0, 99)
)
def test_an_exact_answer_gives_back_clean_data_and_noise(prediction, t, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    rows = PREDICTIONS[prediction](*(f(torch.tensor(t)) for f in (SCHEDULE.alpha, SCHEDULE.sigma)))
    x_in = rows.a_x * x0 + rows.a_e * noise
    clean, back = solve(rows, x_in, rows.b_x * x0 + rows.b_e * noise)
    torch.testing.assert_close(clean, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back, noise, rtol=1e-6, atol=1e-6)


@given(
    prediction=st.sampled_from(list(PREDICTIONS)), t=st.integers(0, 999), seed=st.integers(0, 99)
)
def test_converting_a_weight_commutes_with_the_loss(prediction, t, seed):
    """The weighted error is the same whichever target the model's error is measured in."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise, error = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    rows = PREDICTIONS[prediction](*(f(torch.tensor(t)) for f in (SCHEDULE.alpha, SCHEDULE.sigma)))
    x_in = rows.a_x * x0 + rows.a_e * noise
    answer = rows.b_x * x0 + rows.b_e * noise + error
    _, implied_noise = solve(rows, x_in, answer)
    in_epsilon = (implied_noise - noise).square().mean()
    in_target = from_epsilon_weight(rows) * error.square().mean()
    torch.testing.assert_close(in_epsilon, in_target, rtol=1e-6, atol=1e-12)


def test_the_conversions_are_the_published_ones():
    t = SCHEDULE.timesteps
    snr, one = SCHEDULE.snr(t), torch.ones(1000, dtype=torch.float64)
    expected = {"epsilon": one, "x0": snr, "v": snr / (1 + snr)}
    for prediction, factor in expected.items():
        rows = PREDICTIONS[prediction](SCHEDULE.alpha(t), SCHEDULE.sigma(t))
        torch.testing.assert_close(from_epsilon_weight(rows), factor)


def test_an_unknown_prediction_lists_the_known_ones():
    with pytest.raises(ValueError, match="epsilon, x0, v"):
        TimestepTable(SCHEDULE, "eps", torch.ones(1000))
