"""Loss weightings: functions w(t) of a schedule, defined on the epsilon-MSE.

Every function takes the schedule and returns (T,) float64, non-negative. Weights of another
target's MSE follow by ``prediction.from_epsilon_weight``.
"""

import torch
from torch import Tensor

from speed_engine.diffusion.increments import increments
from speed_engine.diffusion.schedule import NoiseSchedule


def constant(schedule: NoiseSchedule) -> Tensor:
    """One everywhere: the simple loss of Ho et al. 2020."""
    return torch.ones(schedule.num_timesteps, dtype=torch.float64)


def change_aware(schedule: NoiseSchedule, lam: float = 0.6) -> Tensor:
    """The rate of the process increment, mapped onto [1 - lam, lam] (SpeeD, Sec. 2.6).

    Args:
        schedule: the process.
        lam: the paper's lambda in [0.5, 1]; 0.5 is a constant weight of one half.

    Raises:
        ValueError: lam lies outside [0.5, 1].
    """
    if not 0.5 <= lam <= 1:
        raise ValueError(f"lambda={lam} is outside [0.5, 1]; the paper uses 0.6.")
    rate = increments(schedule).rate
    share = (rate - rate.min()) / (rate.max() - rate.min())
    return (1 - lam) + (2 * lam - 1) * share
