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


def epsilon(alpha: Tensor, sigma: Tensor) -> Rows:
    """The noise itself (Ho et al. 2020)."""
    return Rows(alpha, sigma, torch.zeros_like(alpha), torch.ones_like(alpha))


def x0(alpha: Tensor, sigma: Tensor) -> Rows:
    """The clean data."""
    return Rows(alpha, sigma, torch.ones_like(alpha), torch.zeros_like(alpha))


def v(alpha: Tensor, sigma: Tensor) -> Rows:
    """v = alpha noise - sigma x0 (Salimans and Ho 2022)."""
    return Rows(alpha, sigma, -sigma, alpha)


PREDICTIONS: dict[str, Callable[[Tensor, Tensor], Rows]] = {"epsilon": epsilon, "x0": x0, "v": v}


def from_epsilon_weight(rows: Rows) -> Tensor:
    """(N,) factor that turns a weight of the epsilon-MSE into one of this target's MSE."""
    return (rows.a_x / rows.determinant).square()


def solve(rows: Rows, x_in: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, noise) that explain a model input and an answer; rows broadcast against both."""
    clean = (rows.b_e * x_in - rows.a_e * target) / rows.determinant
    noise = (rows.a_x * target - rows.b_x * x_in) / rows.determinant
    return clean, noise
