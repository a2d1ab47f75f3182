"""Targets, their weights and their inverses are one algebra, on every process."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speed_engine.diffusion.prediction import (
    PREDICTIONS,
    linear_form,
    solve,
    weight_conversion,
)
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable

PROCESSES = {name: build_schedule(name) for name in SCHEDULES}
cases = given(
    name=st.sampled_from(list(SCHEDULES)),
    prediction=st.sampled_from(list(PREDICTIONS)),
    cell=st.integers(0, 899),
    seed=st.integers(0, 99),
)


def randn(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, dtype=torch.float64, generator=generator)


def from_epsilon(schedule: NoiseSchedule, prediction: str, t: torch.Tensor) -> torch.Tensor:
    """The factor that turns a weight of the epsilon-MSE into one of a target's MSE."""
    epsilon, target = (linear_form(schedule, name, t) for name in ("epsilon", prediction))
    return weight_conversion(epsilon, target)


@cases
def test_an_exact_answer_gives_back_clean_data_and_noise(name, prediction, cell, seed):
    x0, noise = randn(2, seed)
    schedule = PROCESSES[name]
    rows = linear_form(schedule, prediction, schedule.timesteps[cell])
    x_in = rows.a_x * x0 + rows.a_e * noise
    clean, back = solve(rows, x_in, rows.b_x * x0 + rows.b_e * noise)
    torch.testing.assert_close(clean, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back, noise, rtol=1e-6, atol=1e-6)


@cases
def test_converting_a_weight_commutes_with_the_loss(name, prediction, cell, seed):
    """The weighted error is the same whichever target the model's error is measured in."""
    x0, noise, error = randn(3, seed)
    schedule = PROCESSES[name]
    rows = linear_form(schedule, prediction, schedule.timesteps[cell])
    answer = rows.b_x * x0 + rows.b_e * noise + error
    clean, implied = solve(rows, rows.a_x * x0 + rows.a_e * noise, answer)
    in_target = error.square().mean()
    in_epsilon = (implied - noise).square().mean()
    factor = from_epsilon(schedule, prediction, schedule.timesteps[cell])
    torch.testing.assert_close(in_epsilon, factor * in_target, rtol=1e-5, atol=0)
    for other in PREDICTIONS:
        there = linear_form(schedule, other, schedule.timesteps[cell])
        wrong = there.b_x * (clean - x0) + there.b_e * (implied - noise)
        same = weight_conversion(rows, there) * wrong.square().mean()
        torch.testing.assert_close(same, in_target, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine", "vp", "edm"])
def test_the_conversions_are_the_published_ones(name):
    schedule = PROCESSES[name]
    t = schedule.timesteps[:990]
    snr, one = schedule.snr(t), torch.ones(990, dtype=torch.float64)
    expected = {"epsilon": one, "x0": snr}
    if name != "edm":
        expected["v"] = snr / (1 + snr)
    for prediction, factor in expected.items():
        torch.testing.assert_close(from_epsilon(schedule, prediction, t), factor)


def test_a_flow_s_velocity_takes_the_square_of_the_signal():
    schedule = PROCESSES["flow"]
    t = schedule.timesteps
    torch.testing.assert_close(from_epsilon(schedule, "velocity", t), (1 - t).square())


def test_f_is_edm_s_preconditioning():
    """NVlabs/edm, EDMPrecond: D = c_skip y + c_out F(c_in y), so F = (x0 - c_skip y) / c_out."""
    edm = PROCESSES["edm"]
    sigma = edm.sigma(edm.timesteps).numpy()
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / np.sqrt(sigma**2 + 0.25)
    c_in = 1 / np.sqrt(sigma**2 + 0.25)
    rows = linear_form(edm, "F", edm.timesteps)
    expected = (c_in, c_in * sigma, (1 - c_skip) / c_out, -c_skip * sigma / c_out)
    for column, formula in zip(rows, expected, strict=True):
        np.testing.assert_allclose(column.numpy(), formula, 1e-6)


def test_f_of_unit_variance_data_is_minus_v():
    schedule = PROCESSES["linear"]
    f, v = (linear_form(schedule, name, schedule.timesteps) for name in ("F", "v"))
    torch.testing.assert_close((f.b_x, f.b_e), (-v.b_x, -v.b_e))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_table_looks_up_what_the_closed_form_says(name):
    schedule = PROCESSES[name]
    table = TimestepTable(schedule, schedule.prediction, torch.arange(1000) / 1000)
    t = schedule.timesteps[::50]
    rows = table(t)
    exact = torch.stack(linear_form(schedule, schedule.prediction, t), dim=1).float()
    torch.testing.assert_close(rows[:, :4], exact)
    torch.testing.assert_close(rows[:, 4], torch.arange(0, 1000, 50) / 1000)
    assert rows.dtype == torch.float32
    at = torch.stack(table.rows_at(t[3].item())).float()
    torch.testing.assert_close(at, exact[3])


def test_an_unknown_prediction_lists_the_known_ones():
    with pytest.raises(ValueError, match="epsilon, x0, v, velocity, F"):
        TimestepTable(PROCESSES["linear"], "eps", torch.ones(1000))
