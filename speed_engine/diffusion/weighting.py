"""Loss weightings: w(t) of a process, each together with the target on whose MSE it is defined.

``converted`` moves a weight to another target such that the loss stays the same function of the
model. Using its values on another target unchanged is a different method, see ``methods``.

Letters: T cells; values are (T,) float64, non-negative.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from speed_engine.diffusion.increments import increments, measured_rate
from speed_engine.diffusion.prediction import linear_form, weight_conversion
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.runtime.checks import UserError


class LossWeighting(NamedTuple):
    """A weight and what it multiplies."""

    values: Tensor  # (T,)
    target: str  # a key of PREDICTIONS


def constant(schedule: NoiseSchedule) -> LossWeighting:
    """One, on the target of the process's baseline.

    That is epsilon for DDPM (the simple loss of Ho et al. 2020), the velocity for flows, F for EDM.
    """
    return LossWeighting(_ones(schedule), schedule.prediction)


def change_aware(schedule: NoiseSchedule, lam: float = 0.6) -> LossWeighting:
    """The rate of the process increment, mapped onto [1 - lam, lam] (SpeeD, Sec. 2.6).

    Args:
        schedule: the process.
        lam: the paper's lambda in [0.5, 1]; 0.5 is a constant weight of one half.

    Raises:
        UserError: lam lies outside [0.5, 1].
    """
    return LossWeighting(_stretched(increments(schedule).rate, lam), "epsilon")


def change_aware_released(
    schedule: NoiseSchedule, lam: float = 0.6, tau: int = 700
) -> LossWeighting:
    """The same as SpeeD's released code has it (NUS-HPC-AI-Lab/SpeeD, speed/diffusion/speed).

    The rate is measured, and from index tau on the weight is 1, although the paper gives those
    timesteps its smallest weight.
    """
    values = _stretched(measured_rate(schedule), lam)
    return LossWeighting(values.index_fill(0, torch.arange(tau, len(values)), 1.0), "epsilon")


def p2(schedule: NoiseSchedule, gamma: float = 1.0, k: float = 1.0) -> LossWeighting:
    """1 / (k + SNR)**gamma (Choi et al. 2022, jychoi118/P2-weighting).

    Raises:
        UserError: gamma or k is negative or infinite.
    """
    if not (0 <= gamma < math.inf and 0 <= k < math.inf):
        raise UserError(f"gamma={gamma}, k={k}: P2 needs both to be at least 0, and finite.")
    return LossWeighting((k + _snr(schedule)) ** -gamma, "epsilon")


def min_snr(schedule: NoiseSchedule, gamma: float = 5.0) -> LossWeighting:
    """min(SNR, gamma) on x0 (Hang et al. 2023): caps the pull of nearly clean timesteps.

    Their forms for other targets are its conversions: min(SNR, gamma) / SNR on epsilon and
    min(SNR, gamma) / (SNR + 1) on v.

    Raises:
        UserError: gamma is not positive.
    """
    if not gamma > 0:
        raise UserError(f"gamma={gamma}: Min-SNR needs a positive one; the paper uses 5.")
    return LossWeighting(_snr(schedule).clamp(max=gamma), "x0")


def edm(schedule: NoiseSchedule) -> LossWeighting:
    """(s**2 + d**2) / (s d)**2 on x0, s = sigma / alpha, d = sigma_data (Karras et al. 2022).

    It is one on F.
    """
    return LossWeighting(_snr(schedule) + schedule.sigma_data**-2, "x0")


def sigma_sqrt(schedule: NoiseSchedule) -> LossWeighting:
    """sigma**-2 on the velocity, sigma the time of a flow with as much noise.

    So diffusers' ``compute_loss_weighting_for_sd3`` has it, which calls it ``sigma_sqrt``.
    """
    return LossWeighting(_flow_time(schedule) ** -2, "velocity")


def cosmap(schedule: NoiseSchedule) -> LossWeighting:
    """SD3: 2 / (pi (1 - 2 s + 2 s**2)) on the velocity, s the time of a flow with as much noise."""
    s = _flow_time(schedule)
    return LossWeighting(2 / (math.pi * (1 - 2 * s + 2 * s.square())), "velocity")


def converted(weighting: LossWeighting, schedule: NoiseSchedule, target: str) -> Tensor:
    """(T,) weight of the target's MSE that makes the same loss.

    Raises:
        UserError: an unknown target.
    """
    t = schedule.timesteps
    there = linear_form(schedule, target, t)
    if target == weighting.target:
        return weighting.values
    return weighting.values * weight_conversion(linear_form(schedule, weighting.target, t), there)


def _stretched(rate: Tensor, lam: float) -> Tensor:
    """``rate`` mapped linearly onto [1 - lam, lam]."""
    if not 0.5 <= lam <= 1:
        raise UserError(f"lambda={lam} is outside [0.5, 1]; the paper uses 0.6.")
    span = (rate.max() - rate.min()).clamp(min=1e-300)  # a constant rate gets the smallest weight
    share = (rate - rate.min()) / span
    return (1 - lam) + (2 * lam - 1) * share


def _snr(schedule: NoiseSchedule) -> Tensor:
    return schedule.snr(schedule.timesteps)


def _flow_time(schedule: NoiseSchedule) -> Tensor:
    """(T,) sigma / (alpha + sigma), for data scaled to unit deviation."""
    signal = schedule.alpha(schedule.timesteps) * schedule.sigma_data
    noise = schedule.sigma(schedule.timesteps)
    return noise / (signal + noise)


def _ones(schedule: NoiseSchedule) -> Tensor:
    return torch.ones(schedule.num_timesteps, dtype=torch.float64)
