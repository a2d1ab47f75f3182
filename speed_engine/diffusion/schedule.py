"""What every noise process offers: x_t = alpha(t) x0 + sigma(t) noise; noise grows with t.

One coordinate u in [0, 1] serves all processes: the one that the process's baseline draws
uniformly. It is divided into T cells of equal size.

    discrete     t is the cell, an int64 index 0 .. T-1 (papers that count from 1 call it t + 1)
    continuous   t is u itself, float64; T is the resolution of distributions, weights and plots

The noise fraction psi compares processes whatever their scale: a variance-preserving process of
unit-variance data has psi = sigma**2, and every other one is rescaled to it,

    psi = s**2 / (1 + s**2)      s = sigma / (alpha sigma_data)

Letters: T cells, N timesteps asked for. Quantities are float64.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class NoiseSchedule(ABC):
    """A noise process.

    Attributes:
        name: what errors and reports call it.
        num_timesteps: T.
        discrete: whether t is an index.
        prediction: the target that the process's baseline is trained on, with weight one.
        sigma_data: standard deviation of the clean data.
    """

    name: str
    num_timesteps: int
    discrete: bool
    prediction: str = "epsilon"
    sigma_data: float = 1.0

    @property
    @abstractmethod
    def timesteps(self) -> Tensor:
        """(T,) a t for every cell, its centre, from clean to noisy."""

    @property
    @abstractmethod
    def edges(self) -> Tensor:
        """(T + 1,) log(sigma / alpha) at the borders of the cells; ends may be infinite."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """(N,) -> (N,) factor of the clean data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """(N,) -> (N,) standard deviation of the noise."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """(N,) -> (N,) what the network is given for t, on the scale 0 .. 1000 of its sinusoids."""

    @abstractmethod
    def solver_times(self, num_steps: int) -> list[float]:
        """Values of t at which a solver asks the model, from the noisiest down.

        Raises:
            UserError: more steps than the process has timesteps.
        """

    @abstractmethod
    def time_at(self, level: float) -> float:
        """The t of noise level sigma / alpha, or the nearest one."""

    def input_scale(self, t: Tensor) -> Tensor:
        """(N,) -> (N,) factor between the process's state and what the model sees (EDM's c_in)."""
        return torch.ones_like(self.alpha(t))

    def snr(self, t: Tensor) -> Tensor:
        """(N,) -> (N,) signal-to-noise ratio alpha**2 / sigma**2."""
        return (self.alpha(t) / self.sigma(t)).square()

    def noise_fraction(self, t: Tensor) -> Tensor:
        """(N,) -> (N,) psi in [0, 1]."""
        noise = self.sigma(t).square()
        return noise / (noise + (self.alpha(t) * self.sigma_data).square())

    def cell(self, t: Tensor) -> Tensor:
        """(N,) -> (N,) int64 cell of t."""
        if self.discrete:
            return t
        return (t * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)
