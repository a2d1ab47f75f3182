"""What the model predicts: every target is linear in clean data and noise.

    x_in   = a_x x0 + a_e noise        target = b_x x0 + b_e noise

so the two can be solved for x0 and noise, and a loss weight moves from one target to another:
at fixed x_in an error d in the target is an error d a_x / det in the noise, with
det = a_x b_e - a_e b_x.

Letters: N timesteps; a coefficient column is (N,) float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import UserError


class Rows(NamedTuple):
    """The linear form at N timesteps; each (N,)."""

    a_x: Tensor
    a_e: Tensor
    b_x: Tensor
    b_e: Tensor

    @property
    def determinant(self) -> Tensor:
        """(N,), zero where the model's answer says nothing about x0."""
        return self.a_x * self.b_e - self.a_e * self.b_x


def epsilon(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The noise itself (Ho et al. 2020)."""
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def x0(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The clean data."""
    return torch.ones_like(alpha), torch.zeros_like(alpha)


def v(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """v = alpha noise - sigma x0 (Salimans and Ho 2022)."""
    return -sigma, alpha


def velocity(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """Noise - x0, the velocity of a rectified flow (Liu et al. 2022)."""
    return -torch.ones_like(alpha), torch.ones_like(alpha)


def preconditioned(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """EDM's F = (x0 - c_skip y) / c_out of y = x0 + sigma / alpha noise (Karras et al. 2022)."""
    total = (sigma.square() + (alpha * sigma_data).square()).sqrt()
    return sigma / (sigma_data * total), -alpha * sigma_data / total


def negative_preconditioned(
    alpha: Tensor, sigma: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """-F, the v of k-diffusion and of diffusers' EDM schedulers: v for data of deviation 1."""
    b_x, b_e = preconditioned(alpha, sigma, sigma_data)
    return -b_x, -b_e


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "epsilon": epsilon,
    "x0": x0,
    "v": v,
    "velocity": velocity,
    "F": preconditioned,
    "negative_F": negative_preconditioned,
}


def linear_form(schedule: NoiseSchedule, prediction: str, t: Tensor) -> Rows:
    """Rows of a process and a target at timesteps t (N,).

    Raises:
        UserError: an unknown prediction.
    """
    if prediction not in PREDICTIONS:
        raise UserError(
            f"prediction {prediction!r} is unknown; choose from {', '.join(PREDICTIONS)}."
        )
    alpha, sigma, scale = schedule.alpha(t), schedule.sigma(t), schedule.input_scale(t)
    b_x, b_e = PREDICTIONS[prediction](alpha, sigma, schedule.sigma_data)
    return Rows(scale * alpha, scale * sigma, b_x, b_e)


def weight_conversion(here: Rows, there: Rows) -> Tensor:
    """(N,) factor that turns a weight of one target's MSE into one of another's, same x_in."""
    return (here.determinant / there.determinant).square()


def solve(rows: Rows, x_in: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, noise) that explain a model input and an answer; rows broadcast against both."""
    clean = (rows.b_e * x_in - rows.a_e * target) / rows.determinant
    noise = (rows.a_x * target - rows.b_x * x_in) / rows.determinant
    return clean, noise
