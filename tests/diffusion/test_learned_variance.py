"""Learned variance against a float64 transcription of IDDPM's gaussian_diffusion.py."""

import math

import numpy as np
import pytest
import torch

from speed_engine.diffusion.discrete import linear
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.learned_variance import SquaredErrorAndBound, bound_rows
from speed_engine.diffusion.method import build_method
from speed_engine.diffusion.objective import Objective
from speed_engine.diffusion.processes import build_schedule
from speed_engine.ops import FUSED, REFERENCE, normal

SEED = torch.tensor(3)


def variational_bound(eps, v, x0, rows, seed, ids, operators=REFERENCE):
    """(B,) the bound alone: the squared error has weight 0."""
    nothing, one = torch.zeros(len(x0), 5), torch.ones(len(x0), 1)
    answer, rows = torch.cat([eps, v], dim=1), torch.cat([rows[:, :4], one], dim=1)
    return operators.hybrid_loss(answer, x0, nothing, rows, seed, ids)[0]


class Transcribed:
    """The parts of GaussianDiffusion that the bound needs, for learned range variance."""

    def __init__(self, betas: np.ndarray) -> None:
        self.betas = betas
        alphas = 1 - betas
        self.abar = np.cumprod(alphas)
        prev = np.append(1.0, self.abar[:-1])
        variance = betas * (1 - prev) / (1 - self.abar)
        self.log_variance_clipped = np.log(np.append(variance[1], variance[1:]))
        self.coef1 = betas * np.sqrt(prev) / (1 - self.abar)
        self.coef2 = (1 - prev) * np.sqrt(alphas) / (1 - self.abar)

    def bound(self, x0: np.ndarray, noise: np.ndarray, eps: np.ndarray, v: np.ndarray, t: int):
        a = self.abar[t]
        x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * noise
        frac = (v + 1) / 2
        log_variance = frac * np.log(self.betas[t]) + (1 - frac) * self.log_variance_clipped[t]
        pred = np.sqrt(1 / a) * x_t - np.sqrt(1 / a - 1) * eps
        mean = self.coef1[t] * pred + self.coef2[t] * x_t
        true_mean = self.coef1[t] * x0 + self.coef2[t] * x_t
        true_log = self.log_variance_clipped[t]
        kl = 0.5 * (
            -1 + log_variance - true_log + np.exp(true_log - log_variance)
            + (true_mean - mean) ** 2 * np.exp(-log_variance)
        )  # fmt: skip
        nll = -self.log_likelihood(x0, mean, 0.5 * log_variance)
        return (nll if t == 0 else kl).mean() / np.log(2)

    def log_likelihood(self, x: np.ndarray, means: np.ndarray, log_scales: np.ndarray):
        cdf = lambda y: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        centered, inv = x - means, np.exp(-log_scales)
        plus, minus = cdf(inv * (centered + 1 / 255)), cdf(inv * (centered - 1 / 255))
        log = lambda y: np.log(np.maximum(y, 1e-12))
        middle = np.where(x > 0.999, log(1 - minus), log(plus - minus))
        return np.where(x < -0.999, log(plus), middle)


@pytest.mark.parametrize("operators", [REFERENCE, FUSED], ids=["reference", "fused"])
@pytest.mark.parametrize("t", [0, 1, 2, 100, 700, 999])
def test_the_bound_is_its_transcription(t, operators):
    expected = Transcribed(np.linspace(1e-4, 0.02, 1000))
    generator = torch.Generator().manual_seed(t)
    ids = torch.tensor([5, 6])
    x0 = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    x0[:, 0] = torch.tensor([-1.0, 1.0]).view(2, 1, 1)  # both ends have their own formula
    noise = normal(SEED, ids, 48).view_as(x0)
    eps = noise + 0.1 * torch.randn(2, 3, 4, 4, generator=generator)
    v = torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1
    rows = bound_rows(linear())[t].float().expand(2, 4)
    found = variational_bound(eps, v, x0, rows, SEED, ids, operators)
    for i in range(2):
        a, b, c, d = (part[i].double().numpy() for part in (x0, noise, eps, v))
        assert float(found[i]) == pytest.approx(expected.bound(a, b, c, d, t), rel=2e-3, abs=1e-5)


def test_the_bound_trains_the_variance_only():
    x0 = torch.zeros(2, 1, 2, 2)
    eps, v = (torch.zeros(2, 1, 2, 2, requires_grad=True) for _ in range(2))
    rows = bound_rows(linear())[torch.tensor([0, 500])].float()
    variational_bound(eps, v, x0, rows, SEED, torch.arange(2)).sum().backward()
    assert eps.grad is not None and not bool(eps.grad.any())
    assert (
        v.grad is not None and bool(torch.isfinite(v.grad).all()) and float(v.grad.abs().min()) > 0
    )


def hybrid_of(method: Method) -> tuple[Objective, torch.Tensor]:
    """The objective, and the rows of its bound."""
    error = SquaredErrorAndBound(method)
    return Objective(method, 3, error=error), error.bound_rows


@pytest.mark.parametrize("weigh_bound", [False, True])
def test_the_hybrid_loss_adds_the_bound(weigh_bound):
    hybrid, table = hybrid_of(build_method("p2", linear(), weigh_bound=weigh_bound))
    images, ids = torch.rand(8, 1, 2, 2), torch.arange(8)
    model = lambda x, t: torch.cat([0.5 * x, 0.1 * x], dim=1)
    output = hybrid(model, images, {}, ids, 0)
    rows = hybrid.table(output.t)
    x_in = rows[:, 0].view(-1, 1, 1, 1) * images + rows[:, 1].view(-1, 1, 1, 1) * normal(
        hybrid.seed, ids, 4
    ).view_as(images)
    bound = variational_bound(0.5 * x_in, 0.1 * x_in, images, table[output.t], hybrid.seed, ids)
    weight = rows[:, 4]
    expected = weight * output.squared_error + (weight if weigh_bound else 1) * bound
    torch.testing.assert_close(output.weighted_error, expected)
    torch.testing.assert_close(output.loss, expected.mean())


def test_the_bound_is_scaled_as_if_there_were_1000_timesteps():
    """IDDPM's RESCALED_MSE: vb times num_timesteps / 1000."""
    hybrid, table = hybrid_of(build_method("uniform", linear(500)))
    images, ids = torch.zeros(4, 1, 2, 2), torch.arange(4)
    output = hybrid(lambda x, t: torch.cat([x, x], dim=1), images, {}, ids, 0)
    rows = hybrid.table(output.t)
    x_in = rows[:, 1].view(-1, 1, 1, 1) * normal(hybrid.seed, ids, 4).view_as(images)
    bound = variational_bound(x_in, x_in, images, table[output.t], hybrid.seed, ids)
    torch.testing.assert_close(output.weighted_error - output.squared_error, bound / 2)


@pytest.mark.parametrize("process", ["vp", "flow", "edm", "ve"])
def test_a_process_without_reverse_steps_is_refused(process):
    method = build_method("uniform", build_schedule(process), "epsilon")
    with pytest.raises(ValueError, match="discrete variance-preserving process"):
        SquaredErrorAndBound(method)


def test_a_target_other_than_epsilon_is_refused():
    with pytest.raises(ValueError, match="prediction epsilon, not v"):
        SquaredErrorAndBound(build_method("uniform", linear(), "v"))


def test_variance_rows_are_finite_for_every_schedule():
    for name in ("linear", "quadratic", "cosine", "scaled_linear"):
        rows = bound_rows(build_schedule(name))
        assert bool(torch.isfinite(rows).all())
        assert bool((rows[:, 0] <= rows[:, 1] + 1e-12).all())
        assert math.isclose(float(rows[:, 3].sum()), 1)
