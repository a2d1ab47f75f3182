"""Weights against independent transcriptions of their sources."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speed_engine.diffusion import weighting
from speed_engine.diffusion.discrete import from_alphas_cumprod, linear
from speed_engine.diffusion.increments import increments
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.processes import SCHEDULES, build_schedule
from speed_engine.diffusion.table import TimestepTable
from speed_engine.diffusion.uncertainty import ClusterUncertainty, FourierUncertainty, MeanLoss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "methods.json").read_text())
INDICES = torch.tensor(GOLDEN["idx0"])
ABAR = linear().alphas_cumprod.numpy()
SNR = ABAR / (1 - ABAR)


def golden(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.float64)


def test_change_aware_weights_equal_the_reference_values():
    paper = weighting.change_aware(linear(), 0.6).values
    torch.testing.assert_close(paper[INDICES], golden("w_paper_lam0.6"), rtol=0, atol=1e-6)
    released = weighting.change_aware_released(linear(), 0.6, 700).values
    reference = golden("w_official_lam0.6_tau700")
    torch.testing.assert_close(released[INDICES], reference, rtol=0, atol=1e-6)


def test_change_aware_weights_are_the_paper_s_table():
    """Sec. 2.6, evaluated at the paper's t with lambda 0.8."""
    t = torch.tensor([1, 50, 100, 150, 200, 220, 300, 400, 500, 600, 700, 800, 1000]) - 1
    expected = [
        0.222, 0.4315, 0.6121, 0.7368, 0.795, 0.8, 0.7348, 0.5513, 0.3774, 0.2705, 0.2222, 0.2055,
        0.2,
    ]  # fmt: skip
    np.testing.assert_allclose(weighting.change_aware(linear(), 0.8).values[t], expected, 0, 5e-4)


def test_the_released_weights_are_their_transcription():
    """SpeeD's repository: numpy gradient of 1 - abar, stretched, then 1 from tau on."""
    gradient = np.gradient(1 - ABAR)
    share = (gradient - gradient.min()) / (gradient.max() - gradient.min())
    w = 0.4 + 0.2 * share
    w[700:] = 1
    np.testing.assert_allclose(weighting.change_aware_released(linear()).values, w, 1e-12)


@given(
    name=st.sampled_from([*SCHEDULES, "any linear"]),
    T=st.integers(50, 1000),
    lam=st.floats(0.5, 1),
    beta_max=st.floats(0.01, 0.2),
)
def test_change_aware_weights_span_their_interval_and_peak_at_t_ad(name, T, lam, beta_max):
    if name == "any linear":
        schedule = linear(T, 1e-4, beta_max)
    else:
        schedule = build_schedule(name, T)
    w = weighting.change_aware(schedule, lam).values
    assert float(w.min()) == pytest.approx(1 - lam, abs=1e-12)
    assert float(w.max()) == pytest.approx(lam, abs=1e-12)
    t_ad = increments(schedule).t_ad
    if lam > 0.51 and 1 < t_ad < T:
        assert abs(float(w.argmax()) + 1 - t_ad) <= 1


@given(name=st.sampled_from(list(SCHEDULES)), T=st.integers(21, 300))
def test_lambda_one_half_is_constant(name, T):
    w = weighting.change_aware(build_schedule(name, T), 0.5).values
    torch.testing.assert_close(w, torch.full_like(w, 0.5))


@pytest.mark.parametrize("gamma, k", [(1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (1.0, 0.1)])
def test_p2_is_its_repository_s_formula(gamma, k):
    """jychoi118/P2-weighting: weight = 1 / (p2_k + snr) ** p2_gamma on the epsilon-MSE."""
    w = weighting.p2(linear(), gamma, k)
    assert w.target == "epsilon"
    np.testing.assert_allclose(w.values, 1 / (k + SNR) ** gamma, 1e-9)


@pytest.mark.parametrize(
    "target, formula",
    [
        ("x0", lambda snr: np.minimum(snr, 5)),
        ("epsilon", lambda snr: np.minimum(snr, 5) / snr),
        ("v", lambda snr: np.minimum(snr, 5) / (snr + 1)),
    ],
)
def test_min_snr_is_its_repository_s_formula_for_each_target(target, formula):
    schedule = linear()
    w = weighting.converted(weighting.min_snr(schedule), schedule, target)
    np.testing.assert_allclose(w, formula(SNR), 1e-9)


def test_min_snr_is_not_five_times_p2():
    """A slip that a released implementation has: the minimum's first element instead of each."""
    schedule = linear()
    w = weighting.converted(weighting.min_snr(schedule), schedule, "epsilon")
    assert float(w[150]) == pytest.approx(1) and float(w[50]) == pytest.approx(0.155, abs=5e-3)


def test_edm_s_weight_is_one_on_f():
    schedule = build_schedule("edm")
    sigma = schedule.sigma(schedule.timesteps).numpy()
    w = weighting.edm(schedule)
    np.testing.assert_allclose(w.values, (sigma**2 + 0.25) / (sigma * 0.5) ** 2, 1e-9)
    on_f = weighting.converted(w, schedule, "F")
    torch.testing.assert_close(on_f, torch.ones_like(on_f))


@pytest.mark.parametrize("name", SCHEDULES)
def test_constant_is_one_on_the_baseline_s_target(name):
    schedule = build_schedule(name)
    w = weighting.constant(schedule)
    assert w.target == {"edm": "F", "fdm": "F", "flow": "velocity", "shifted_flow": "velocity"}.get(
        name, "epsilon"
    )
    assert torch.equal(weighting.converted(w, schedule, w.target), torch.ones(1000).double())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: weighting.change_aware(linear(), 0.4), r"lambda=0.4 is outside \[0.5, 1\]"),
        (lambda: weighting.change_aware(linear(), 5.0), r"lambda=5.0 is outside \[0.5, 1\]"),
        (lambda: weighting.change_aware(linear(), math.nan), "lambda=nan"),
        (lambda: weighting.p2(linear(), -1.0), "gamma=-1.0"),
        (lambda: weighting.min_snr(linear(), 0.0), "gamma=0.0"),
        (lambda: ClusterUncertainty(10, 11), r"clusters=11: must lie in \[1, 10\]"),
        (
            lambda: TimestepTable(linear(40), "epsilon", torch.linspace(-1, 1, 40)),
            "negative weight",
        ),
    ],
)
def test_what_is_no_weight_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Learned weights.


def test_cluster_uncertainty_is_ant_s_formula():
    """sum_i 0.5 (exp(-s_i) l_i + s_i), l_i the mean of cluster i over the number of clusters."""
    learned = ClusterUncertainty(100, 5)
    s = torch.tensor([0.1, -0.2, 0.3, 0.0, 1.0])
    learned.log_variance.data = s.clone()
    cells = torch.tensor([0, 25, 45, 60, 99, 19, 20, 40, 79, 80])
    loss = torch.rand(10, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for i in range(5):
        mine = [float(loss[j]) for j in range(10) if int(cells[j]) // 20 == i]
        l_i = sum(mine) / len(mine) / 5
        expected += 0.5 * (math.exp(-float(s[i])) * l_i + float(s[i]))
    assert float(learned(cells, loss).detach()) == pytest.approx(expected, rel=1e-6)


def test_a_learned_weight_finds_the_reciprocal_of_the_loss():
    """exp(-u) l + u is least at u = log l."""
    schedule = linear(50)
    learned = FourierUncertainty(schedule)
    cells = torch.arange(50)
    loss = torch.linspace(0.2, 2, 50)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        learned(cells, loss).backward()
        optimizer.step()
    floor = (1 + loss.log()).mean()
    assert float(floor) <= float(learned(cells, loss).detach()) < float(floor) + 0.01


def test_before_training_learned_weights_are_one():
    loss, cells = torch.rand(6), torch.arange(6)
    expected = loss.mean()
    torch.testing.assert_close(FourierUncertainty(linear(40))(cells, loss).detach(), expected)
    torch.testing.assert_close(2 * ClusterUncertainty(6, 3)(cells, loss).detach(), expected)
    torch.testing.assert_close(MeanLoss()(cells, loss), expected)


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_sd3_s_weights_are_those_of_diffusers(scheme):
    training_utils = pytest.importorskip("diffusers.training_utils")
    flow = build_schedule("flow")
    sigmas = flow.sigma(flow.timesteps)
    theirs = training_utils.compute_loss_weighting_for_sd3(scheme, sigmas)
    torch.testing.assert_close(build_method(scheme, flow).weight, theirs.double())
    # Another process of the same signal-to-noise ratio has the same objective.
    vp = from_alphas_cumprod(((1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2))[:-1])
    other = build_method(scheme, vp, "velocity").weight
    torch.testing.assert_close(other, theirs[:-1].double(), rtol=1e-6, atol=0)
