"""What each named method does, for any process.

A method's definition is a function of the process. Its further arguments are the options of the
method, as in ``speed_paper+k=3``: their names, types and defaults stand in its signature alone,
what they mean in its docstring, and their ranges are checked where they are used.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speed_engine.diffusion import probabilities, weighting
from speed_engine.diffusion.distributions import (
    AdaptiveDistribution,
    ClimbingDistribution,
    Distribution,
    TaskCurriculum,
)
from speed_engine.diffusion.increments import increments
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.timesteps import (
    MirroredSampler,
    TimestepSampler,
    by_interval,
    stratified,
)
from speed_engine.diffusion.uncertainty import ClusterUncertainty, FourierUncertainty, MeanLoss
from speed_engine.diffusion.weighting import LossWeighting
from speed_engine.runtime.checks import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Definition:
    """What a method consists of, before it is fitted to a prediction target.

    Attributes:
        timesteps: the sampler.
        weighting: of the loss.
        batch_loss: from per-image losses to one, where weights are learned.
        momentum_decay: the optimizer's part of the method, see ``training/schedules.py``.
    """

    timesteps: TimestepSampler
    weighting: LossWeighting
    batch_loss: MeanLoss = field(default_factory=MeanLoss)
    momentum_decay: str = "none"


def uniform(schedule: NoiseSchedule) -> Definition:
    """Every process's own baseline: uniform in its coordinate, weight one on its own target.

    DDPM: uniform t on epsilon (Ho et al. 2020; DiT); EDM: log-normal sigma on F; flows: uniform
    time on the velocity.
    """
    return Definition(
        timesteps=_sampler(schedule, probabilities.uniform(schedule.num_timesteps)),
        weighting=weighting.constant(schedule),
    )


def speed_paper(
    schedule: NoiseSchedule,
    k: float = 5.0,
    r: float = 138.6,
    tau: float | None = None,
    lam: float = 0.6,
) -> Definition:
    """SpeeD as the paper writes it (arXiv 2405.17403, Eq. 3 and Sec. 2.6), for any process.

    Args:
        schedule: the process.
        k: how many times more often a timestep up to tau is drawn than one beyond it; at least 1.
        r: signal suppression at which the convergence area begins; above 1. The default puts tau at
            700 of 1000 timesteps with linear betas.
        tau: the border itself, in the paper's t; overrides r.
        lam: the paper's lambda, the largest weight; in [0.5, 1].
    """
    if tau is None:
        tau = increments(schedule).tau(r)
        if math.isinf(tau):
            log.warning(
                "schedule %r never suppresses the signal %g-fold: there is no convergence area, "
                "so timesteps are drawn uniformly; lower r to make one.", schedule.name, r,
            )  # fmt: skip
            tau = schedule.num_timesteps
    return Definition(
        timesteps=_sampler(schedule, probabilities.asymmetric(schedule.num_timesteps, tau, k)),
        weighting=weighting.change_aware(schedule, lam),
    )


def speed_official(
    schedule: NoiseSchedule, k: float = 5.0, tau: int = 700, lam: float = 0.6
) -> Definition:
    """SpeeD as released (NUS-HPC-AI-Lab/SpeeD f5650f9).

    Every draw's mirror image is trained on, too, tau is a constant, and weights beyond it are 1.

    Args:
        schedule: the process.
        k: ratio of the unmirrored P.
        tau: the border, for both P and weights.
        lam: the largest weight up to tau.

    Raises:
        UserError: the process has fewer timesteps than tau, or no point to mirror at.
    """
    distribution = Distribution(probabilities.asymmetric(schedule.num_timesteps, tau, k))
    return Definition(
        timesteps=MirroredSampler(schedule, distribution, _released_pivot(schedule)),
        weighting=weighting.change_aware_released(schedule, lam, int(tau)),
    )


def p2(schedule: NoiseSchedule, gamma: float = 1.0, p2_k: float = 1.0) -> Definition:
    """P2 weighting, 1 / (k + SNR)**gamma (Choi et al. 2022), uniform timesteps.

    Args:
        schedule: the process.
        gamma: the exponent, 0 or more.
        p2_k: k, added to the signal-to-noise ratio, 0 or more.
    """
    return Definition(
        timesteps=_sampler(schedule, probabilities.uniform(schedule.num_timesteps)),
        weighting=weighting.p2(schedule, gamma, p2_k),
    )


def min_snr(schedule: NoiseSchedule, gamma: float = 5.0) -> Definition:
    """Min-SNR weighting (Hang et al. 2023), uniform timesteps.

    Args:
        schedule: the process.
        gamma: the largest signal-to-noise ratio that counts, above 0.
    """
    return Definition(
        timesteps=_sampler(schedule, probabilities.uniform(schedule.num_timesteps)),
        weighting=weighting.min_snr(schedule, gamma),
    )


def lognormal_edm(schedule: NoiseSchedule, mean: float = -1.2, std: float = 1.2) -> Definition:
    """EDM's distribution of noise levels, on any process, weight one on its own target.

    Karras et al. 2022.

    Args:
        schedule: the process.
        mean: of log sigma; EDM2 has -0.4.
        std: standard deviation of log sigma, above 0; EDM2 has 1.0.
    """
    return Definition(
        timesteps=_sampler(schedule, probabilities.log_normal(schedule, mean, std)),
        weighting=weighting.constant(schedule),
    )


def edm(schedule: NoiseSchedule, mean: float = -1.2, std: float = 1.2) -> Definition:
    """EDM's distribution and weighting, on any process; large where one is nearly pure noise.

    Args:
        schedule: the process.
        mean: of log sigma.
        std: standard deviation of log sigma, above 0.
    """
    return Definition(
        timesteps=_sampler(schedule, probabilities.log_normal(schedule, mean, std)),
        weighting=weighting.edm(schedule),
    )


def edm2(schedule: NoiseSchedule, mean: float = -0.4, std: float = 1.0) -> Definition:
    """EDM2's distribution and weighting, with its learned weights (Karras et al. 2024).

    Args:
        schedule: the process.
        mean: of log sigma.
        std: standard deviation of log sigma, above 0.
    """
    definition = edm(schedule, mean, std)
    return Definition(
        timesteps=definition.timesteps,
        weighting=definition.weighting,
        batch_loss=FourierUncertainty(schedule),
    )


def sigma_sqrt(schedule: NoiseSchedule) -> Definition:
    """Weight sigma**-2 on a flow's velocity, by diffusers' name of SD3's scripts; uniform."""
    return Definition(
        timesteps=_sampler(schedule, probabilities.uniform(schedule.num_timesteps)),
        weighting=weighting.sigma_sqrt(schedule),
    )


def cosmap(schedule: NoiseSchedule) -> Definition:
    """SD3's CosMap as a weight on a flow's velocity (Esser et al. 2024), uniform timesteps."""
    return Definition(
        timesteps=_sampler(schedule, probabilities.uniform(schedule.num_timesteps)),
        weighting=weighting.cosmap(schedule),
    )


def logit_normal(schedule: NoiseSchedule, mean: float = 0.0, std: float = 1.0) -> Definition:
    """SD3's distribution of times, weight one on the process's own target (Esser et al. 2024).

    Args:
        schedule: the process.
        mean: of the logit of the time; above 0 draws more noise, as in SD3's paper. diffusers'
            loops index their timesteps from the noisiest, so that ``logit_mean`` has the other
            sign there.
        std: standard deviation of the logit of the time, above 0.
    """
    return Definition(
        timesteps=_sampler(schedule, probabilities.logit_normal(schedule.num_timesteps, mean, std)),
        weighting=weighting.constant(schedule),
    )


def mode(schedule: NoiseSchedule, scale: float = 1.29) -> Definition:
    """SD3's mode sampling with heavy tails, weight one (Esser et al. 2024).

    Args:
        schedule: the process.
        scale: how much more of the middle is drawn, in [-1, 1.75]; 0 is uniform.
    """
    return Definition(
        timesteps=_sampler(schedule, probabilities.mode(schedule.num_timesteps, scale)),
        weighting=weighting.constant(schedule),
    )


def shifted(schedule: NoiseSchedule, shift: float = 3.0) -> Definition:
    """Uniform time moved towards noise, weight one (Esser et al. 2024, Eq. 23).

    Args:
        schedule: the process.
        shift: factor of the ratio of noise to signal, above 0; 1 moves nothing.
    """
    return Definition(
        timesteps=_sampler(schedule, probabilities.shifted(schedule.num_timesteps, shift)),
        weighting=weighting.constant(schedule),
    )


def clts(
    schedule: NoiseSchedule, ramp_steps: int = 50_000, mean: float = 0.3, std: float = 0.2
) -> Definition:
    """Curriculum from uniform to Gaussian timesteps, weight one (arXiv 2404.07946).

    Args:
        schedule: the process.
        ramp_steps: steps until P is the Gaussian alone; the trainer sets the run's length.
        mean: of the Gaussian, in units of T.
        std: of the Gaussian, in units of T; not confirmed by a public source.
    """
    return Definition(
        timesteps=TimestepSampler(
            schedule, ClimbingDistribution(schedule.num_timesteps, ramp_steps, mean, std)
        ),
        weighting=weighting.constant(schedule),
    )


def clts_mdlrc(
    schedule: NoiseSchedule, ramp_steps: int = 50_000, mean: float = 0.3, std: float = 0.2
) -> Definition:
    """CLTS with momentum decay and learning rate compensation."""
    definition = clts(schedule, ramp_steps, mean, std)
    return Definition(
        timesteps=definition.timesteps, weighting=definition.weighting, momentum_decay="demon"
    )


def ant_uw(schedule: NoiseSchedule, clusters: int = 5) -> Definition:
    """ANT-UW: intervals drawn in turn, with one learned weight each (Go et al. 2023).

    Args:
        schedule: the process.
        clusters: number of intervals of timesteps, at most as many as timesteps.
    """
    num_timesteps = schedule.num_timesteps
    distribution = Distribution(probabilities.uniform(num_timesteps))
    return Definition(
        timesteps=TimestepSampler(schedule, distribution, by_interval(clusters)),
        weighting=weighting.constant(schedule),
        batch_loss=ClusterUncertainty(num_timesteps, clusters),
    )


def task_curriculum(schedule: NoiseSchedule, clusters: int = 20, patience: int = 200) -> Definition:
    """From the noisiest timesteps to all, as the loss stops improving (Kim et al. 2024).

    Args:
        schedule: the process.
        clusters: number of intervals of timesteps, each a stage.
        patience: steps without a better loss until the next stage begins, at least 1.
    """
    return Definition(
        timesteps=TimestepSampler(
            schedule, TaskCurriculum(schedule.num_timesteps, clusters, patience)
        ),
        weighting=weighting.constant(schedule),
    )


def adaptive(schedule: NoiseSchedule, floor: float = 0.1) -> Definition:
    """Importance sampling by the observed loss, with a uniform floor (Nichol and Dhariwal 2021).

    Args:
        schedule: the process.
        floor: share of the timesteps that is drawn uniformly, in (0, 1].
    """
    return Definition(
        timesteps=TimestepSampler(
            schedule, AdaptiveDistribution(schedule.num_timesteps, floor=floor)
        ),
        weighting=weighting.constant(schedule),
    )


def learned_uncertainty(schedule: NoiseSchedule) -> Definition:
    """A weight learned as a function of the noise level (EDM2, Karras et al. 2024), uniform."""
    definition = uniform(schedule)
    return Definition(
        timesteps=definition.timesteps,
        weighting=definition.weighting,
        batch_loss=FourierUncertainty(schedule),
    )


def speed_plus(schedule: NoiseSchedule, mean: float = -0.5, std: float = 1.0) -> Definition:
    """SD3's distribution moved towards clean images, drawn stratified, weight one; meant for flows.

    Like SpeeD it draws the noisy end of the process less. Chosen among fifteen candidates on the
    digits, by runs with seeds that no report uses: asymmetric sampling, change-aware weights, x0
    and v as targets, learned and adaptive weights and momentum decay did not add to it on a flow.

    Args:
        schedule: the process.
        mean: of the logit of the time.
        std: standard deviation of the logit of the time, above 0.
    """
    definition = logit_normal(schedule, mean, std)
    definition.timesteps.words = stratified
    return definition


METHODS: dict[str, Callable[..., Definition]] = {
    function.__name__: function
    for function in (
        uniform, speed_paper, speed_official, p2, min_snr, lognormal_edm, logit_normal, clts,
        clts_mdlrc, ant_uw, task_curriculum, speed_plus, edm, mode, shifted, adaptive,
        learned_uncertainty, edm2, sigma_sqrt, cosmap,
    )
}  # fmt: skip


def _sampler(schedule: NoiseSchedule, p: Tensor) -> TimestepSampler:
    return TimestepSampler(schedule, Distribution(p))


def _released_pivot(schedule: NoiseSchedule) -> int:
    """M, where the released code mirrors: the first index at which noise hardly grows, plus one.

    The threshold is absolute there, so that M depends on T: 642 of 1000 linear timesteps.
    """
    growth = torch.gradient(schedule.noise_fraction(schedule.timesteps).sqrt())[0]
    slow = growth < 1e-4
    pivot = int(slow.int().argmax()) + 1
    if not bool(slow.any()) or pivot == 1 or pivot == schedule.num_timesteps:
        raise UserError(
            f"speed_official has no point to mirror at on schedule {schedule.name!r} with "
            f"{schedule.num_timesteps} timesteps: its noise grows by less than 1e-4 per timestep "
            "at the first one or at none. Use speed_paper."
        )
    return pivot
