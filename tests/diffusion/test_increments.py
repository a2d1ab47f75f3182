"""The areas of Sec. 2 of SpeeD: closed forms, bounds, borders."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from speed_engine.diffusion.continuous import RectifiedFlow
from speed_engine.diffusion.discrete import from_alphas_cumprod, from_betas, linear
from speed_engine.diffusion.increments import increments, table_1
from speed_engine.diffusion.processes import SCHEDULES, build_schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "methods.json").read_text())


def test_borders_of_the_areas_equal_the_reference_values():
    areas = increments(linear())
    assert areas.t_ad == pytest.approx(GOLDEN["t_ad"], abs=1e-6)
    exact = increments(from_alphas_cumprod(linear().alphas_cumprod))
    for r, tau in GOLDEN["tau_closed"].items():
        assert areas.tau(float(r)) == pytest.approx(tau, abs=1e-6)
        assert exact.tau(float(r)) == GOLDEN["tau_exact"][r]


@pytest.mark.parametrize(
    "name, t_ad, tau",
    [("linear", 220, 698), ("quadratic", 412, 873), ("cosine", 496, 946)],
)
def test_borders_follow_the_schedule_instead_of_staying_at_700(name, t_ad, tau):
    areas = increments(from_alphas_cumprod(build_schedule(name).alphas_cumprod))  # type: ignore
    assert (areas.t_ad, areas.tau(138.6)) == (t_ad, tau)


def test_stable_diffusion_s_borders():
    areas = increments(build_schedule("scaled_linear"))
    assert [areas.tau(r) for r in (5, 10, 50, 100, 138.6)] == [564, 675, 867, 934, 963]


@pytest.mark.parametrize("r", [5.0, 10.0, 138.6])
def test_in_continuous_time_the_border_is_where_noise_is_sqrt_r_minus_1(r):
    """EDM's sigma is sigma_data q there, a flow's t is q / (1 + q), with q = sqrt(r - 1)."""
    root = math.sqrt(r - 1)
    flow = increments(RectifiedFlow(10_000)).tau(r) / 10_000
    assert flow == pytest.approx(root / (1 + root), abs=2e-4)
    edm = build_schedule("edm", 10_000)
    border = torch.tensor([increments(edm).tau(r) / 10_000], dtype=torch.float64)
    assert float(edm.sigma(border)) == pytest.approx(0.5 * root, rel=0.02)


@pytest.mark.parametrize(
    "name, r, share",
    [("edm", 138.6, 0.0067), ("edm", 10, 0.090), ("ve", 138.6, 0.33), ("ve", 10, 0.49)],
)
def test_the_share_of_the_convergence_area(name, r, share):
    tau = increments(build_schedule(name)).tau(r)
    assert 1 - tau / 1000 == pytest.approx(share, abs=0.006)


def test_rates_peak_where_the_formulas_do():
    """A flow's 2 t (1 - t) / ((1 - t)**2 + t**2)**2 at 1/2; VP's rate at sqrt(1/D) - b0/D."""
    flow = increments(build_schedule("flow"))
    t = flow.schedule.timesteps.numpy()
    rate = 2 * t * (1 - t) / ((1 - t) ** 2 + t**2) ** 2
    np.testing.assert_allclose(flow.rate.numpy()[1:-1] * 1000 / 2, rate[1:-1], 1e-3, 1e-3)
    assert flow.t_ad == pytest.approx(500, abs=1)
    vp = increments(build_schedule("vp"))
    assert vp.t_ad == pytest.approx(1000 * (math.sqrt(1 / 19.9) - 0.1 / 19.9), abs=1.5)


@given(T=st.integers(10, 2000), beta_min=st.floats(1e-5, 1e-3), beta_max=st.floats(0.01, 0.2))
def test_theorem_1_bounds_mean_and_variance(T, beta_min, beta_max):
    areas = increments(linear(T, beta_min, beta_max))
    assert bool((areas.variance >= areas.variance_bound[:-1] - 1e-12).all())
    assert bool((areas.mean.square() <= areas.mean_bound[:-1] + 1e-12).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bounds_hold_for_every_process(name):
    areas = increments(build_schedule(name))
    assert bool((areas.variance >= areas.variance_bound[:-1] - 1e-12).all())
    assert bool((areas.mean.square() <= areas.mean_bound[:-1] + 1e-12).all())
    assert bool((areas.suppression.diff() > 0).all() & (areas.mean < 0).all())


BETAS = st.floats(1e-4, 0.2)


@given(r=st.floats(1.01, 1e4), factor=st.floats(1.001, 10), first=BETAS, last=BETAS)
@example(r=2.0, factor=2.0, first=0.01, last=0.01)
def test_tau_is_monotone_and_inverts_suppression(r, factor, first, last):
    """Whether betas rise, fall or stay."""
    for areas in (
        increments(linear(1000, first, last)),
        increments(from_betas(torch.linspace(first, last, 1000))),
    ):
        tau = areas.tau(r)
        assert areas.tau(r * factor) >= tau
        if 2 <= tau <= 1000:
            assert areas.suppression[math.ceil(tau) - 1] >= math.log(r) - 1e-9
            assert areas.suppression[math.ceil(tau) - 2] < math.log(r) + 1e-9


@given(name=st.sampled_from(list(SCHEDULES)), r=st.floats(1.01, 1e3), factor=st.floats(1.1, 10))
def test_tau_is_monotone_in_every_process(name, r, factor):
    areas = increments(build_schedule(name, 300))
    assert areas.tau(r * factor) >= areas.tau(r) >= 1


@pytest.mark.parametrize("first, last", [(0.01, 0.01), (0.02, 1e-4), (0.02, 0.019)])
def test_where_betas_do_not_rise_the_rate_falls_from_the_start(first, last):
    areas = increments(linear(1000, first, last))
    assert areas.t_ad == 1 == float(areas.rate.argmax()) + 1
    assert increments(linear(1000, 0.01, 0.01)).tau(math.e) == pytest.approx(100)


TABLE_1 = {  # s, sigma^2 and the limit of dSigma/dt
    "VP": (
        lambda t: np.exp(-19.9 * t**2 / 4 - 0.1 * t / 2),
        lambda t: np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1,
        lambda t: 2 * (0.1 + 19.9 * t) * np.exp(-19.9 * t**2 / 2 - 0.1 * t),
    ),
    "VE": (np.ones_like, lambda t: t, lambda t: 2 + 0 * t),
    "EDM": (np.ones_like, np.square, lambda t: 4 * t),
}


@pytest.mark.parametrize("process", TABLE_1)
def test_the_increments_rates_are_those_of_table_1(process):
    s, power, limit = TABLE_1[process]
    t, step, h = np.linspace(0.01, 0.99, 99), 0.1, 1e-6
    mean, variance = (of.numpy() for of in table_1(process, torch.tensor(t), step))
    a = lambda t: s(t + step) - s(t)
    sigma = lambda t: s(t + step) ** 2 * power(t + step) + s(t) ** 2 * power(t)
    np.testing.assert_allclose(mean, (a(t + h) - a(t - h)) / (2 * h), atol=1e-7)
    np.testing.assert_allclose(variance, (sigma(t + h) - sigma(t - h)) / (2 * h), atol=1e-6)
    mean, variance = table_1(process, torch.tensor(t))
    assert float(mean.abs().max()) == 0
    np.testing.assert_allclose(variance.numpy(), limit(t), rtol=1e-9)


def test_only_vp_has_a_peak_in_the_papers_own_coordinate():
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    peaks = {name: float(t[table_1(name, t)[1].argmax()]) for name in TABLE_1}
    assert peaks["VP"] == pytest.approx(0.2191, abs=1e-4) and peaks["EDM"] == 1
    assert float(table_1("VE", t)[1].std()) == 0
    ours = increments(build_schedule("vp")).rate / 1e-3  # per cell; its coordinate is the paper's
    centres = build_schedule("vp").timesteps
    theirs = table_1("VP", centres)[1]
    torch.testing.assert_close(ours[1:-1], theirs[1:-1], rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="'flow' is not in Table 1; choose from VP, VE, EDM"):
        table_1("flow", t)
