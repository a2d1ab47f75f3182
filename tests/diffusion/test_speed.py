"""SpeeD's quantities against published closed forms and committed reference values."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from speed_engine.diffusion.increments import increments
from speed_engine.diffusion.methods import METHODS, build_method
from speed_engine.diffusion.schedule import NoiseSchedule, from_betas, linear
from speed_engine.diffusion.table import TimestepTable
from speed_engine.diffusion.timesteps import TimestepSampler, asymmetric
from speed_engine.diffusion.weighting import change_aware

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "methods.json").read_text())
INDICES = torch.tensor(GOLDEN["idx0"])
DRAWS = 1_000_000


def golden(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.float64)


def test_paper_weights_and_probabilities_equal_the_reference_values():
    method = build_method("speed_paper", linear())
    weights = golden("w_paper_lam0.6")
    torch.testing.assert_close(method.epsilon_weight[INDICES], weights, rtol=0, atol=1e-6)
    probabilities = golden("P_paper_k5_tau700")
    torch.testing.assert_close(method.probabilities[INDICES], probabilities, rtol=0, atol=1e-12)


def test_borders_of_the_areas_equal_the_reference_values():
    areas = increments(linear())
    assert areas.t_ad == pytest.approx(GOLDEN["t_ad"], abs=1e-6)
    exact = increments(NoiseSchedule("exact", linear().alphas_cumprod))
    for r, tau in GOLDEN["tau_closed"].items():
        assert areas.tau(float(r)) == pytest.approx(tau, abs=1e-6)
        assert exact.tau(float(r)) == GOLDEN["tau_exact"][r]


@pytest.mark.parametrize("name", METHODS)
def test_a_million_draws_follow_p(name):
    method = build_method(name, linear())
    sampler = TimestepSampler(method.probabilities)
    draws = torch.cat(
        [
            sampler.sample(torch.tensor(11), torch.arange(start, start + 100_000))
            for start in range(0, DRAWS, 100_000)
        ]
    )
    observed = torch.bincount(draws, minlength=1000).numpy()
    expected = (method.probabilities * DRAWS).numpy()
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_the_timestep_of_an_image_does_not_depend_on_its_batch():
    sampler = TimestepSampler(build_method("speed_paper", linear()).probabilities)
    whole = sampler.sample(torch.tensor(1), torch.arange(64))
    parts = [sampler.sample(torch.tensor(1), ids) for ids in torch.arange(64).split(7)]
    assert torch.equal(whole, torch.cat(parts))


@given(
    T=st.integers(2, 2000),
    k=st.floats(1, 100),
    share=st.floats(0, 1),
)
def test_asymmetric_sampling_is_a_distribution_with_ratio_k(T, k, share):
    tau = 1 + share * (T - 1)
    p = asymmetric(T, tau, k)
    assert float(p.sum()) == pytest.approx(1)
    assert bool((p > 0).all())
    frequent = int(tau)
    if frequent < T:
        assert float(p[frequent - 1] / p[frequent]) == pytest.approx(k)


@given(
    T=st.integers(50, 2000),
    lam=st.floats(0.5, 1),
    beta_max=st.floats(0.01, 0.2),
)
def test_change_aware_weights_span_their_interval_and_peak_at_t_ad(T, lam, beta_max):
    schedule = linear(T, 1e-4, beta_max)
    w = change_aware(schedule, lam)
    assert float(w.min()) == pytest.approx(1 - lam, abs=1e-12)
    assert float(w.max()) == pytest.approx(lam, abs=1e-12)
    t_ad = increments(schedule).t_ad
    if lam > 0.51 and 1 < t_ad < T:
        assert abs(float(w.argmax()) + 1 - t_ad) <= 1


@given(r=st.floats(1.01, 1e4), factor=st.floats(1.001, 10), beta_max=st.floats(0.02, 0.2))
def test_tau_is_monotone_and_inverts_suppression(r, factor, beta_max):
    schedule = linear(1000, 1e-4, beta_max)
    for areas in (
        increments(schedule),
        increments(from_betas(torch.linspace(1e-4, beta_max, 1000))),
    ):
        tau = areas.tau(r)
        assert areas.tau(r * factor) >= tau
        if 2 <= tau <= 1000:
            assert areas.suppression[math.ceil(tau) - 1] >= math.log(r) - 1e-9
            assert areas.suppression[math.ceil(tau) - 2] < math.log(r) + 1e-9


def test_lambda_one_half_is_constant_and_k_one_is_uniform():
    w = change_aware(linear(), 0.5)
    torch.testing.assert_close(w, torch.full_like(w, 0.5))
    p = asymmetric(1000, 700, 1)
    torch.testing.assert_close(p, torch.full_like(p, 1e-3))


def test_a_process_without_convergence_area_says_so_and_is_sampled_uniformly(caplog):
    schedule = linear(1000, 1e-5, 1e-3)
    method = build_method("speed_paper", schedule)
    assert "no convergence area" in caplog.text
    assert float(method.probabilities.max()) == pytest.approx(float(method.probabilities.min()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0.5}, "k=0.5: .* at least 1"),
        ({"k": math.nan}, "k=nan"),
        ({"r": 1.0}, "r=1.0: .* above 1"),
        ({"tau": 0.0}, r"tau=0.0 is outside \[1, 1000\]"),
        ({"tau": 1001.0}, r"tau=1001.0 is outside \[1, 1000\]"),
        ({"lam": 0.4}, r"lambda=0.4 is outside \[0.5, 1\]"),
        ({"lam": 5.0}, r"lambda=5.0 is outside \[0.5, 1\]"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_method("speed_paper", linear(), **options)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="uniform, speed_paper"):
        build_method("sped", linear())


def test_an_option_of_another_method_is_refused():
    with pytest.raises(ValueError, match="'uniform' has no k; it takes no arguments"):
        build_method("uniform", linear(), k=5.0)


def test_negative_probabilities_and_weights_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        TimestepSampler(torch.tensor([0.5, -0.1]))
    with pytest.raises(ValueError, match="negative weight"):
        TimestepTable(linear(10), "epsilon", torch.linspace(-1, 1, 10))
