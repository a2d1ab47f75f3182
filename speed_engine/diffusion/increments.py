"""The process increment's quantities: how fast noise accumulates, and the three areas this makes.

SpeeD (arXiv 2405.17403, Sec. 2) splits the timesteps by the variance of the increment
delta_t = x_{t+1} - x_t, which it bounds by Psi(t) = 2 (1 - exp(-E(t))), E(t) ~ -log(alpha(t)**2):

    acceleration  t <= t_ad           the rate dPsi/dt grows
    deceleration  t_ad < t <= tau     the rate falls
    convergence   tau < t             the signal is suppressed by r or more: exp(E(t)) >= r

With linear betas (Sec. 2.3, A.8; D = beta_T - beta_1, beta_0 = beta_1 - D/T) E is closed:

    E(t) = (beta_0 + D t / 2T) t        dPsi/dt = 2 (beta_0 + D t / T) exp(-E(t))

For every other schedule E = -log(alpha**2) exactly, and the rate is a central difference.
Positions t here count from 1, as the paper's do: timestep index i is t = i + 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speed_engine.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Increments:
    """Attributes: all (T,) float64, by timestep index.

    suppression: E(t), the log of the factor by which signal power has fallen.
    rate: dPsi/dt per timestep, the signal of change-aware weighting.
    """

    schedule: NoiseSchedule
    suppression: Tensor
    rate: Tensor

    @property
    def variance(self) -> Tensor:
        """(T,) Psi(t), the bound on the increment's variance."""
        return -2 * torch.expm1(-self.suppression)

    @property
    def t_ad(self) -> float:
        """Border of acceleration and deceleration: where the rate peaks (paper's t)."""
        if self.schedule.linear_betas is None:
            return float(self.rate.argmax()) + 1
        num_timesteps = self.schedule.num_timesteps
        beta_0, delta = _line(self.schedule)
        return math.sqrt(num_timesteps / delta) - num_timesteps * beta_0 / delta

    def tau(self, r: float) -> float:
        """Border of deceleration and convergence: where signal power has fallen ``r``-fold.

        Real-valued from the closed form if betas are linear, else the first such timestep; the
        paper's t. Infinite if the process never gets there.

        Raises:
            ValueError: r is not above 1.
        """
        if not (r > 1 and math.isfinite(r)):
            raise ValueError(f"r={r}: the suppression factor must be above 1, such as 138.6.")
        reached = self.suppression >= math.log(r)
        if not bool(reached.any()):
            return math.inf
        if self.schedule.linear_betas is None:
            return float(reached.int().argmax()) + 1
        num_timesteps = self.schedule.num_timesteps
        beta_0, delta = _line(self.schedule)
        offset = num_timesteps * beta_0 / delta
        return math.sqrt(2 * num_timesteps * math.log(r) / delta + offset**2) - offset


def increments(schedule: NoiseSchedule) -> Increments:
    """Suppression and rate of a schedule: Theorem 1's closed forms if its betas are linear."""
    if schedule.linear_betas is None:
        abar = schedule.alphas_cumprod
        return Increments(schedule, -abar.log(), 2 * torch.gradient(1 - abar)[0])
    beta_0, delta = _line(schedule)
    t = schedule.timesteps.double() + 1
    num_timesteps = schedule.num_timesteps
    suppression = (beta_0 + delta * t / (2 * num_timesteps)) * t
    rate = 2 * (beta_0 + delta * t / num_timesteps) * torch.exp(-suppression)
    return Increments(schedule, suppression, rate)


def _line(schedule: NoiseSchedule) -> tuple[float, float]:
    """(beta_0, D) of beta(t) = beta_0 + D t / T."""
    assert schedule.linear_betas is not None
    beta_first, beta_last = schedule.linear_betas
    delta = beta_last - beta_first
    return beta_first - delta / schedule.num_timesteps, delta
