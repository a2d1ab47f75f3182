"""Processes in continuous time, as functions of u in [0, 1] that their baselines draw uniformly.

    VariancePreserving   t = e + (1 - e) u                   alpha**2 = exp(-19.9 t**2 / 2 - 0.1 t)
    VarianceExploding    log sigma linear in u               alpha = 1
    Edm                  log sigma ~ N(-1.2, 1.2**2), u its quantile            alpha = 1
    MomentumEdm          as Edm, but the model sees a momentum process
    RectifiedFlow        t = a u / (1 + (a - 1) u)           alpha = 1 - t, sigma = t

Letters: N timesteps asked for; u and results are (N,) float64.
"""

import math

import torch
from torch import Tensor

from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import UserError


class ContinuousSchedule(NoiseSchedule):
    """Common to processes whose t is u itself; T is only a resolution."""

    discrete = False

    def __init__(self, name: str, num_timesteps: int) -> None:
        if num_timesteps < 2:
            raise UserError(f"schedule {name!r}: {num_timesteps} cells; at least 2 are needed.")
        self.name, self.num_timesteps = name, num_timesteps

    @property
    def timesteps(self) -> Tensor:
        """(T,) float64 centres of the cells of u."""
        return (torch.arange(self.num_timesteps, dtype=torch.float64) + 0.5) / self.num_timesteps

    @property
    def edges(self) -> Tensor:
        """(T + 1,) log(sigma / alpha) at u = 0, 1/T, .., 1."""
        u = torch.arange(self.num_timesteps + 1, dtype=torch.float64) / self.num_timesteps
        return (self.sigma(u) / self.alpha(u)).log()

    def alpha(self, t: Tensor) -> Tensor:
        """One, as for every process in sigma space."""
        return torch.ones_like(t)

    def time_at(self, level: float) -> float:
        """By bisection."""
        low, high = 0.0, 1.0
        for _ in range(60):
            t = torch.tensor((low + high) / 2, dtype=torch.float64)
            below = float(self.sigma(t)) < level * float(self.alpha(t))
            low, high = (float(t), high) if below else (low, float(t))
        return low

    def solver_times(self, num_steps: int) -> list[float]:
        """Evenly spaced, from the centre of the noisiest cell to one step before 0."""
        if num_steps < 1:
            raise UserError(f"{num_steps} solver steps: must be at least 1.")
        noisiest = 1 - 0.5 / self.num_timesteps
        return [noisiest * (1 - i / num_steps) for i in range(num_steps)]


class VariancePreserving(ContinuousSchedule):
    """The stochastic differential equation whose discretisation DDPM is (Song et al. 2021)."""

    beta_min, beta_max, smallest_time = 0.1, 20.0, 1e-5

    def __init__(self, num_timesteps: int = 1000) -> None:
        super().__init__("vp", num_timesteps)

    def alpha(self, t: Tensor) -> Tensor:
        """exp of half the integral of -beta."""
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha**2)."""
        return (-torch.expm1(-self._integral(t))).sqrt()

    def model_time(self, t: Tensor) -> Tensor:
        """1000 times the process's own time."""
        return 1000 * self._time(t)

    def _time(self, u: Tensor) -> Tensor:
        return self.smallest_time + (1 - self.smallest_time) * u

    def _integral(self, u: Tensor) -> Tensor:
        time = self._time(u)
        return (self.beta_max - self.beta_min) * time.square() / 2 + self.beta_min * time


class VarianceExploding(ContinuousSchedule):
    """Clean data plus noise of log-uniform sigma (Song and Ermon 2019; Song et al. 2021).

    The model sees the state scaled to unit variance, as EDM's does.
    """

    sigma_data = 0.5
    sigma_min, sigma_max = 0.02, 100.0

    def __init__(self, num_timesteps: int = 1000) -> None:
        super().__init__("ve", num_timesteps)

    def sigma(self, t: Tensor) -> Tensor:
        """Geometric from sigma_min to sigma_max."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def input_scale(self, t: Tensor) -> Tensor:
        """To unit variance."""
        return (self.sigma(t).square() + self.sigma_data**2).rsqrt()

    def model_time(self, t: Tensor) -> Tensor:
        """1000 c_noise = 250 log(sigma)."""
        return 250 * self.sigma(t).log()


class Edm(ContinuousSchedule):
    """Karras et al. 2022 (NVlabs/edm, training/loss.py and networks.py)."""

    prediction = "F"
    sigma_data = 0.5
    log_mean, log_std = -1.2, 1.2
    sigma_min, sigma_max, rho = 0.002, 80.0, 7.0  # of the solver's noise levels

    def __init__(self, num_timesteps: int = 1000, name: str = "edm") -> None:
        super().__init__(name, num_timesteps)

    def sigma(self, t: Tensor) -> Tensor:
        """The u-quantile of the log-normal distribution."""
        return torch.exp(self.log_mean + self.log_std * torch.special.ndtri(t))

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in: to unit variance."""
        return (self.sigma(t).square() + self.sigma_data**2).rsqrt()

    def model_time(self, t: Tensor) -> Tensor:
        """1000 c_noise = 250 log(sigma)."""
        return 250 * self.sigma(t).log()

    def solver_times(self, num_steps: int) -> list[float]:
        """Evenly spaced in sigma**(1/7), from sigma_max down to sigma_min."""
        if num_steps < 1:
            raise UserError(f"{num_steps} solver steps: must be at least 1.")
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigma = torch.linspace(high, low, num_steps, dtype=torch.float64) ** self.rho
        u = torch.special.ndtr((sigma.log() - self.log_mean) / self.log_std)
        return u.tolist()


class MomentumEdm(Edm):
    """FDM's momentum forward process (sail-sg/FDM, networks.py): EDM with another input scaling.

    c_in = (1 + m B) exp(-m B), B = 0.1 t + 9.95 t**2, t = sigma on [sigma_min, sigma_max] mapped
    onto [0, 1], m = 2; FFHQ has m = 1 there.
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        super().__init__(num_timesteps, name="fdm")

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in of the momentum process."""
        time = ((self.sigma(t) - self.sigma_min) / (self.sigma_max - self.sigma_min)).clamp(0, 1)
        decay = 2 * (0.1 * time + 9.95 * time.square())
        return (1 + decay) * torch.exp(-decay)


class RectifiedFlow(ContinuousSchedule):
    """Straight lines from data to noise (Liu et al. 2022; Lipman et al. 2022).

    Args:
        num_timesteps: T.
        shift: a, moves time towards noise for larger images (Esser et al. 2024, Eq. 23); 1 is none.
        name: what errors and reports call it.

    Raises:
        UserError: shift is not positive.
    """

    prediction = "velocity"

    def __init__(self, num_timesteps: int = 1000, shift: float = 1.0, name: str = "flow") -> None:
        super().__init__(name, num_timesteps)
        if not (shift > 0 and math.isfinite(shift)):
            raise UserError(f"shift={shift}: must be positive; 1 is none, SD3 uses 3 at 1024**2.")
        self.shift = shift

    def alpha(self, t: Tensor) -> Tensor:
        """One minus the shifted time."""
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        """The shifted time."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def model_time(self, t: Tensor) -> Tensor:
        """1000 times the shifted time."""
        return 1000 * self.sigma(t)
