"""The process increment's quantities: how fast noise accumulates, and the three areas this makes.

SpeeD (arXiv 2405.17403, Sec. 2) splits the timesteps by the increment x_{t+1} - x_t of the
variance-preserving process with noise fraction psi(t), whose variance it bounds from below by
Psi(t) = 2 (1 - exp(-E(t))), E(t) ~ -log(1 - psi(t)), and its mean, as a factor of x0, by
mean(t)**2 <= beta_max exp(-E(t)) (Theorem 1):

    acceleration  t <= t_ad           the rate dPsi/dt grows
    deceleration  t_ad < t <= tau     the rate falls
    convergence   tau < t             the signal is suppressed by r or more: exp(E(t)) >= r

With linear betas (Sec. 2.3 and A.8; D = beta_T - beta_1, beta_0 = beta_1 - D/T):

    E(t) = (beta_0 + D t / 2T) t        dPsi/dt = 2 (beta_0 + D t / T) exp(-E(t))

For every other process E = -log(1 - psi) exactly, and the rate is a central difference over its
cells, that is, in the coordinate that its baseline draws uniformly. Positions t here count from 1,
as the paper's do: cell i is t = i + 1. ``table_1`` has the paper's own rates for VP, VE and EDM.

The paper's variance is that of two samples with independent noise, psi(t) + psi(t + 1), not of the
Markov chain's step, which is far smaller.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speed_engine.diffusion.discrete import DiscreteSchedule
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import UserError


@dataclass(frozen=True, eq=False)
class Increments:
    """Attributes: all (T,) float64, by cell.

    suppression: E(t), the log of the factor by which signal power has fallen.
    rate: dPsi/dt per timestep, the signal of change-aware weighting.
    """

    schedule: NoiseSchedule
    suppression: Tensor
    rate: Tensor

    @property
    def variance_bound(self) -> Tensor:
        """(T,) Psi(t), below the increment's variance."""
        return -2 * torch.expm1(-self.suppression)

    @property
    def mean_bound(self) -> Tensor:
        """(T,) beta_max exp(-E(t)), above the square of the increment's mean factor."""
        beta_max = -torch.expm1(-_suppression(self.schedule).diff().max())
        return beta_max * torch.exp(-self.suppression)

    @property
    def variance(self) -> Tensor:
        """(T - 1,) of the increments between neighbours."""
        noise = self.schedule.noise_fraction(self.schedule.timesteps)
        return noise[1:] + noise[:-1]

    @property
    def mean(self) -> Tensor:
        """(T - 1,) factor of x0 in the increments between neighbours; negative."""
        return torch.exp(-_suppression(self.schedule) / 2).diff()

    @property
    def t_ad(self) -> float:
        """Border of acceleration and deceleration: where the rate peaks (paper's t)."""
        line = _line(self.schedule)
        if line is None:
            return float(self.rate.argmax()) + 1
        beta_0, delta = line
        if delta <= 0:
            return 1.0  # the rate falls from the start
        num_timesteps = self.schedule.num_timesteps
        return math.sqrt(num_timesteps / delta) - num_timesteps * beta_0 / delta

    def tau(self, r: float) -> float:
        """Border of deceleration and convergence: where signal power has fallen ``r``-fold.

        Real-valued from the closed form if betas are linear, else the first such cell; the
        paper's t. Infinite if the process never gets there.

        Raises:
            UserError: r is not above 1.
        """
        if not (r > 1 and math.isfinite(r)):
            raise UserError(f"r={r}: the suppression factor must be above 1, such as 138.6.")
        level = math.log(r)
        reached = self.suppression >= level
        if not bool(reached.any()):
            return math.inf
        line = _line(self.schedule)
        if line is None:
            return float(reached.int().argmax()) + 1
        beta_0, delta = line
        square = beta_0**2 + 2 * delta * level / self.schedule.num_timesteps
        return 2 * level / (beta_0 + math.sqrt(max(0.0, square)))  # the first root, for any delta


def increments(schedule: NoiseSchedule) -> Increments:
    """Suppression and rate of a process: Theorem 1's closed forms if its betas are linear."""
    line = _line(schedule)
    if line is None:
        return Increments(schedule, _suppression(schedule), measured_rate(schedule))
    beta_0, delta = line
    num_timesteps = schedule.num_timesteps
    t = schedule.timesteps.double() + 1
    suppression = (beta_0 + delta * t / (2 * num_timesteps)) * t
    rate = 2 * (beta_0 + delta * t / num_timesteps) * torch.exp(-suppression)
    return Increments(schedule, suppression, rate)


def measured_rate(schedule: NoiseSchedule) -> Tensor:
    """(T,) 2 dpsi per cell, by central differences, for any process."""
    return 2 * torch.gradient(schedule.noise_fraction(schedule.timesteps))[0]


def table_1(process: str, t: Tensor, step: float = 0.0) -> tuple[Tensor, Tensor]:
    """The paper's Table 1: how fast the mean and the variance of the increments change, in its t.

    With x_t = s (x0 + sigma noise) and + for t + step, an increment has mean A x0, A = s_+ - s, and
    variance Sigma = s_+**2 sigma_+**2 + s**2 sigma**2.

        VP    s = exp(-D t**2 / 4 - beta_0 t / 2)    sigma**2 = s**-2 - 1    D = 19.9, beta_0 = 0.1
        VE    s = 1                                  sigma**2 = t
        EDM   s = 1                                  sigma**2 = t**2

    Args:
        process: VP, VE or EDM.
        t: (N,) times, in [0, 1] for VP; 0 or more for the others.
        step: of an increment; with 0, the limit: dSigma/dt is 2 (beta_0 + D t) s**2, 2, and 4 t.

    Returns:
        (N,) dA/dt, and (N,) dSigma/dt, both float64.

    Raises:
        UserError: an unknown process.
    """
    if process not in _TABLE_1:
        raise UserError(f"process {process!r} is not in Table 1; choose from VP, VE, EDM.")
    scale, power = _TABLE_1[process]
    (s, s_), (p, p_) = _with_slope(scale, t), _with_slope(power, t)
    (after, after_), (p_after, p_after_) = (_with_slope(of, t + step) for of in (scale, power))
    variance = after**2 * p_after_ + 2 * after * after_ * p_after + s**2 * p_ + 2 * s * s_ * p
    return after_ - s_, variance


def _with_slope(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) values and derivatives."""
    t = t.double()
    found = torch.func.jvp(function, (t,), (torch.ones_like(t),))
    return found[0], found[1]


def _vp_scale(t: Tensor) -> Tensor:
    return torch.exp(-19.9 * t.square() / 4 - 0.1 * t / 2)


# process: s(t), sigma(t)**2
_TABLE_1: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "VP": (_vp_scale, lambda t: torch.expm1(19.9 * t.square() / 2 + 0.1 * t)),
    "VE": (torch.ones_like, lambda t: t),
    "EDM": (torch.ones_like, torch.square),
}


def _suppression(schedule: NoiseSchedule) -> Tensor:
    """(T,) -log(1 - psi), without cancellation where noise is small."""
    return (1 / (schedule.snr(schedule.timesteps) * schedule.sigma_data**2)).log1p()


def _line(schedule: NoiseSchedule) -> tuple[float, float] | None:
    """(beta_0, D) of beta(t) = beta_0 + D t / T, if betas are linear."""
    if not isinstance(schedule, DiscreteSchedule) or schedule.linear_betas is None:
        return None
    beta_first, beta_last = schedule.linear_betas
    delta = beta_last - beta_first
    return beta_first - delta / schedule.num_timesteps, delta
