"""Timestep samplers: which timestep each image is trained on.

A sampler is a probability P(t) over T timesteps. A draw inverts its cumulative distribution, as
32-bit integers, at a counter-based uniform word of the image: the same image counter gives the same
timestep on every device, in every batch and on any number of processes.

Letters: B images, T timesteps.
"""

import math

import torch
from torch import Tensor

from speed_engine.ops import Stream, random_bits

_WORD = 2**32


class TimestepSampler:
    """Independent draws from a fixed P(t).

    Args:
        probabilities: (T,) float64, non-negative; normalised here.

    Raises:
        ValueError: a probability is negative or not finite, or all are zero.
    """

    def __init__(self, probabilities: Tensor) -> None:
        p = probabilities.double()
        if not bool(torch.isfinite(p).all()) or float(p.min()) < 0 or float(p.sum()) == 0:
            raise ValueError(
                f"timestep probabilities lie in [{float(p.min()):.3g}, {float(p.max()):.3g}]; "
                "they must be finite, non-negative and not all zero."
            )
        self._probabilities = p / p.sum()
        # t is drawn if thresholds[t-1] <= word < thresholds[t]; exact in integers on any device.
        self._thresholds = (self._probabilities.cumsum(0) * _WORD).round().long()
        self._thresholds[-1] = _WORD

    def to(self, device: torch.device) -> "TimestepSampler":
        """Moves the tables; returns self."""
        self._thresholds = self._thresholds.to(device)
        return self

    def probabilities(self) -> Tensor:
        """(T,) float64 P(t) on the host."""
        return self._probabilities

    def sample(self, seed: Tensor, ids: Tensor) -> Tensor:
        """() int64, (B,) int64 image counters -> (B,) int64 timesteps."""
        words = random_bits(seed, ids, 1, Stream.TIMESTEP)[:, 0]
        return torch.searchsorted(self._thresholds, words, right=True)


def uniform(num_timesteps: int) -> Tensor:
    """(T,) all timesteps alike."""
    return torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)


def asymmetric(num_timesteps: int, tau: float, k: float = 5.0) -> Tensor:
    """(T,) P(t), k times higher up to tau than in the convergence area beyond (SpeeD, Eq. 3).

    Args:
        num_timesteps: T.
        tau: border in the paper's t (counted from 1): indices below tau are the frequent ones.
        k: ratio of the two probabilities, at least 1.

    Raises:
        ValueError: k is below 1 or tau outside [1, T].
    """
    if not (k >= 1 and math.isfinite(k)):
        raise ValueError(f"k={k}: the sampling ratio must be a finite number of at least 1.")
    if not 1 <= tau <= num_timesteps:
        raise ValueError(f"tau={tau} is outside [1, {num_timesteps}], the process's timesteps.")
    t = torch.arange(1, num_timesteps + 1)
    p = torch.where(t <= tau, k, 1.0).double()
    return p / p.sum()
