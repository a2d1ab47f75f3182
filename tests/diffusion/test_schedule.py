"""Processes against their papers' formulas, transcribed here with numpy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speed_engine.diffusion.continuous import Edm, MomentumEdm, RectifiedFlow, VarianceExploding
from speed_engine.diffusion.discrete import (
    DiscreteSchedule,
    cosine,
    from_alphas_cumprod,
    from_betas,
    from_diffusers,
    from_sigmas,
    linear,
    quadratic,
    scaled_linear,
)
from speed_engine.diffusion.processes import SCHEDULES, build_schedule


def test_linear_is_ho_et_al():
    abar, product = linear().alphas_cumprod, 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        assert float(abar[i]) == pytest.approx(product, rel=1e-12)


def test_quadratic_and_scaled_linear_square_a_line():
    for schedule, first, last in ((quadratic(), 1e-4, 0.02), (scaled_linear(), 0.00085, 0.012)):
        betas = np.linspace(first**0.5, last**0.5, 1000) ** 2
        np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), 1e-10)


def test_cosine_is_nichol_and_dhariwal():
    """Their betas_for_alpha_bar with alpha_bar(t) = cos((t + 0.008) / 1.008 * pi / 2)^2."""
    bar = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = [min(1 - bar((i + 1) / 1000) / bar(i / 1000), 0.999) for i in range(1000)]
    np.testing.assert_allclose(cosine().alphas_cumprod, np.cumprod(1 - np.array(betas)), 1e-9)


def test_vp_is_the_limit_of_ddpm():
    """With betas from 1e-4 to 0.02 over 1000 steps the integral of beta runs from 0.1 to 20."""
    vp, t = build_schedule("vp"), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    time = 1e-5 + (1 - 1e-5) * t.numpy()
    alpha = np.exp(-(time**2) * 19.9 / 4 - 0.1 * time / 2)
    np.testing.assert_allclose(vp.alpha(t), alpha, 1e-12)
    np.testing.assert_allclose(vp.sigma(t), np.sqrt(1 - alpha**2), 1e-9)
    middle = vp.noise_fraction(torch.tensor([0.5], dtype=torch.float64))
    assert float(middle) == pytest.approx(1 - float(linear().alphas_cumprod[499]), abs=1e-3)


def test_ve_is_log_uniform():
    ve, u = VarianceExploding(), torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(ve.sigma(u), 0.02 * 5000 ** u.numpy(), 1e-12)


def test_edm_noise_levels_are_log_normal_and_its_solver_ends_where_karras_does():
    edm = Edm()
    u = torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64)
    np.testing.assert_allclose(edm.sigma(u), [math.exp(-1.2), 1.0], 1e-9)
    sigma = edm.sigma(torch.tensor(edm.solver_times(18), dtype=torch.float64)).numpy()
    i = np.arange(18)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma, karras, 1e-6)


def test_fdm_only_replaces_what_edm_s_model_sees():
    edm, fdm = Edm(), MomentumEdm()
    sigma, scale = edm.sigma(edm.timesteps).numpy(), fdm.input_scale(fdm.timesteps).numpy()
    t = np.clip((sigma - 0.002) / (80 - 0.002), 0, 1)
    decay = 2 * (0.1 * t + 9.95 * t**2)
    np.testing.assert_allclose(scale, (1 + decay) * np.exp(-decay), 1e-9)
    np.testing.assert_allclose(edm.input_scale(edm.timesteps), 1 / np.sqrt(sigma**2 + 0.25), 1e-12)
    assert torch.equal(edm.sigma(edm.timesteps), fdm.sigma(fdm.timesteps))


@given(shift=st.floats(0.1, 10), u=st.floats(0.001, 0.999))
def test_a_shifted_flow_is_a_straight_line_in_shifted_time(shift, u):
    flow, t = RectifiedFlow(shift=shift), torch.tensor([u], dtype=torch.float64)
    time = shift * u / (1 + (shift - 1) * u)
    assert float(flow.sigma(t)) == pytest.approx(time)
    assert float(flow.alpha(t)) == pytest.approx(1 - time)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [21, 100, 1000])
def test_noise_grows_with_t_in_every_process(name, num_timesteps):
    schedule = build_schedule(name, num_timesteps)
    t = schedule.timesteps
    psi = schedule.noise_fraction(t)
    assert len(t) == num_timesteps == schedule.num_timesteps
    assert bool((psi.diff() > 0).all()) and 0 < psi[0] and psi[-1] < 1
    torch.testing.assert_close(schedule.snr(t), (schedule.alpha(t) / schedule.sigma(t)) ** 2)
    assert torch.equal(schedule.cell(t), torch.arange(num_timesteps))
    assert bool((schedule.edges.diff() > 0).all())
    log_noise = (schedule.sigma(t) / schedule.alpha(t)).log()
    assert bool((schedule.edges[1:] > log_noise).all() & (schedule.edges[:-1] < log_noise).all())
    assert bool((schedule.model_time(t).diff() > 0).all())
    assert schedule.solver_times(2)[0] > schedule.solver_times(2)[1]


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_beta_outside_0_1_is_named(beta):
    with pytest.raises(ValueError, match=r"betas\[2\] = .* strictly between 0 and 1"):
        from_betas(torch.tensor([0.1, 0.1, beta]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.6])), "fall from timestep 1 to 2"),
        (lambda: from_alphas_cumprod(torch.tensor([1.0, 0.5])), "strictly between 0 and 1"),
        (lambda: from_betas(torch.tensor([0.1])), "at least 2 timesteps"),
        (lambda: from_sigmas(torch.tensor([0.1, 0.3, 0.2])), "fall from timestep 1 to 2"),
        (lambda: from_sigmas(torch.tensor([-0.1, 0.3])), "above 0"),
        (lambda: from_sigmas(torch.tensor([0.1, 1.3]), flow=True), "1.3 of a flow exceeds 1"),
        (lambda: RectifiedFlow(shift=0.0), "shift=0.0: must be positive"),
        (lambda: build_schedule("lin"), "choose from linear, quadratic"),
        (lambda: build_schedule("edm", 1), "at least 2"),
        (lambda: Edm().solver_times(0), "must be at least 1"),
    ],
)
def test_what_is_no_process_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def diffusers_scheduler(config=None, **attributes):
    """What from_diffusers reads of a scheduler."""
    config = SimpleNamespace(num_train_timesteps=1000, **(config or {}))
    return SimpleNamespace(config=config, **attributes)


def test_a_diffusers_scheduler_with_alphas_cumprod_keeps_its_indices_and_target():
    abar = linear().alphas_cumprod.float()
    schedule = from_diffusers(
        diffusers_scheduler({"prediction_type": "v_prediction"}, alphas_cumprod=abar)
    )
    torch.testing.assert_close(schedule.alphas_cumprod, abar.double())
    assert schedule.prediction == "v" and schedule.name == "SimpleNamespace"
    t = torch.tensor([0, 5, 999])
    assert torch.equal(schedule.model_time(t), t)


def test_a_zero_snr_diffusers_schedule_is_accepted():
    abar = linear().alphas_cumprod.clone()
    abar[-1] = 0
    schedule = from_diffusers(diffusers_scheduler(alphas_cumprod=abar))
    assert 0 < float(schedule.snr(torch.tensor([999]))) < 1e-7


def test_a_diffusers_flow_keeps_its_own_timesteps():
    base = torch.linspace(1000, 1, 1000)
    sigmas = 3 * (base / 1000) / (1 + 2 * base / 1000)  # SD3's shift, noisiest first
    schedule = from_diffusers(diffusers_scheduler(sigmas=sigmas, timesteps=sigmas * 1000))
    assert schedule.prediction == "velocity"
    t = torch.tensor([0, 499, 999])
    assert torch.equal(schedule.model_time(t), (sigmas * 1000).flip(0)[t])
    torch.testing.assert_close(schedule.sigma(t), sigmas.double().flip(0)[t])
    torch.testing.assert_close(schedule.alpha(t)[:2], 1 - sigmas.double().flip(0)[t][:2])


def test_a_diffusers_cosine_schedule_keeps_its_last_step():
    abar = cosine().alphas_cumprod.float()
    schedule = from_diffusers(diffusers_scheduler(alphas_cumprod=abar))
    torch.testing.assert_close(schedule.alphas_cumprod, abar.double())


def test_a_diffusers_scheduler_in_sigma_space_is_edm_s():
    sigmas = torch.cat([torch.logspace(2, -2, 1000), torch.zeros(1)])  # it ends in a zero
    times = 0.25 * sigmas[:-1].log()
    config = {"sigma_data": 0.5, "prediction_type": "epsilon"}
    schedule = from_diffusers(diffusers_scheduler(config, sigmas=sigmas, timesteps=times))
    assert schedule.prediction == "F" and schedule.sigma_data == 0.5
    t = torch.tensor([0, 999])
    torch.testing.assert_close(schedule.sigma(t), torch.tensor([0.01, 100.0]).double())
    assert torch.equal(schedule.model_time(t), times.flip(0)[t])


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({}, "neither alphas_cumprod nor sigmas"),
        ({"sigmas": torch.ones(29)}, "29 sigmas for 1000 timesteps.*set_timesteps"),
        ({"sigmas": torch.logspace(2, -2, 1000)}, "has no sigma_data, .* use from_sigmas"),
    ],
)
def test_a_diffusers_scheduler_that_does_not_fit_is_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(diffusers_scheduler(**attributes))


def test_sigmas_may_come_in_either_order_and_with_a_last_zero():
    rising = torch.tensor([0.1, 1.0, 10.0])
    falling = torch.tensor([10.0, 1.0, 0.1, 0.0])
    for sigmas in (rising, falling):
        schedule = from_sigmas(sigmas)
        torch.testing.assert_close(schedule.sigma(schedule.timesteps), rising.double())
        assert schedule.prediction == "F"
        scale = schedule.input_scale(schedule.timesteps)
        torch.testing.assert_close(scale, (rising.double() ** 2 + 0.25) ** -0.5)


def test_only_unit_power_is_variance_preserving():
    assert linear().variance_preserving
    ones = torch.ones(2)
    assert not DiscreteSchedule("mine", ones, torch.tensor([0.1, 0.2])).variance_preserving


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_number_of_timesteps_ends_at_nearly_the_same_noise(name):
    ends = [build_schedule(name, T) for T in (250, 1000, 4000)]
    fractions = [float(1 - s.noise_fraction(s.timesteps)[-1]) for s in ends]
    assert all(fraction < 0.02 for fraction in fractions), fractions


def test_too_few_timesteps_for_linear_betas_are_named():
    with pytest.raises(ValueError, match=r"'linear': betas\[.*strictly between 0 and 1"):
        build_schedule("linear", 20)
