"""Noise schedules: x_t = alpha(t) x0 + sigma(t) noise, with t = 0 the cleanest timestep.

Letters: T timesteps, N timesteps asked for. Timesteps are int64 indices 0 .. T-1; papers that count
from 1 call our t their t + 1. All quantities are float64: they are computed once, on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving process on T discrete timesteps, given by its cumulative signal power.

    Attributes:
        name: what errors and reports call it.
        alphas_cumprod: (T,) float64 alpha**2, in (0, 1), strictly decreasing.
        linear_betas: (beta_1, beta_T) if beta is linear in t, where closed forms exist.

    Raises:
        ValueError: ``alphas_cumprod`` is not a strictly decreasing sequence inside (0, 1).
    """

    name: str
    alphas_cumprod: Tensor
    linear_betas: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if abar.ndim != 1 or len(abar) < 2:
            raise ValueError(
                f"schedule {self.name!r} has shape {tuple(abar.shape)}; needs 2 timesteps or more."
            )
        if not (0 < float(abar.min()) and float(abar.max()) < 1):
            raise ValueError(
                f"schedule {self.name!r} has alphas_cumprod in [{float(abar.min()):.3g}, "
                f"{float(abar.max()):.3g}]; they must lie strictly between 0 and 1."
            )
        if not bool((abar.diff() < 0).all()):
            where = int((abar.diff() >= 0).nonzero()[0])
            raise ValueError(
                f"schedule {self.name!r} is not monotone: alphas_cumprod does not fall from "
                f"timestep {where} to {where + 1}; noise must grow with t."
            )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def timesteps(self) -> Tensor:
        """(T,) int64, every timestep from clean to noisy."""
        return torch.arange(self.num_timesteps)

    def alpha(self, t: Tensor) -> Tensor:
        """(N,) int64 -> (N,) factor of the clean data."""
        return self.alphas_cumprod[t].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """(N,) int64 -> (N,) standard deviation of the noise."""
        return (1 - self.alphas_cumprod[t]).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """(N,) int64 -> (N,) signal-to-noise ratio alpha**2 / sigma**2."""
        return self.alphas_cumprod[t] / (1 - self.alphas_cumprod[t])


def from_betas(betas: Tensor, name: str = "custom") -> NoiseSchedule:
    """The process with per-step noise variances ``betas`` (T,), each in (0, 1).

    Raises:
        ValueError: a beta lies outside (0, 1).
    """
    betas = betas.double()
    outside = ((betas <= 0) | (betas >= 1)).nonzero()
    if len(outside):
        where = int(outside[0])
        raise ValueError(
            f"schedule {name!r}: betas[{where}] = {float(betas[where]):.6g}; "
            "every beta must lie strictly between 0 and 1."
        )
    return NoiseSchedule(name, torch.cumprod(1 - betas, dim=0))


def linear(
    num_timesteps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02
) -> NoiseSchedule:
    """Betas linear in t (Ho et al. 2020)."""
    betas = torch.linspace(beta_min, beta_max, num_timesteps, dtype=torch.float64)
    schedule = from_betas(betas, "linear")
    return NoiseSchedule("linear", schedule.alphas_cumprod, (beta_min, beta_max))


SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {"linear": linear}
