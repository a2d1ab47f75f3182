"""Named methods: a distribution over timesteps together with a loss weighting.

A method is a function of the schedule; its keyword arguments are what a user may tune. Weights are
defined on the epsilon-MSE, see ``weighting``.
"""

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from speed_engine.diffusion import timesteps, weighting
from speed_engine.diffusion.increments import increments
from speed_engine.diffusion.schedule import NoiseSchedule

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Method:
    """Attributes: both (T,) float64.

    probabilities: P(t).
    epsilon_weight: w(t) of the epsilon-MSE.
    """

    name: str
    probabilities: Tensor
    epsilon_weight: Tensor


def uniform(schedule: NoiseSchedule) -> Method:
    """All timesteps alike, weight one: the baseline (Ho et al. 2020; DiT)."""
    return Method(
        "uniform", timesteps.uniform(schedule.num_timesteps), weighting.constant(schedule)
    )


def speed_paper(
    schedule: NoiseSchedule,
    k: float = 5.0,
    r: float = 138.6,
    tau: float | None = None,
    lam: float = 0.6,
) -> Method:
    """SpeeD as the paper writes it (arXiv 2405.17403, Eq. 3 and Sec. 2.6).

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
    probabilities = timesteps.asymmetric(schedule.num_timesteps, tau, k)
    return Method("speed_paper", probabilities, weighting.change_aware(schedule, lam))


METHODS: dict[str, Callable[..., Method]] = {"uniform": uniform, "speed_paper": speed_paper}


def build_method(name: str, schedule: NoiseSchedule, **tuned: float) -> Method:
    """The named method; ``tuned`` overrides its defaults.

    Raises:
        ValueError: an unknown name, an argument that the method does not have, or one out of range.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; choose from {', '.join(METHODS)}.")
    known = list(inspect.signature(METHODS[name]).parameters)[1:]
    for argument in tuned:
        if argument not in known:
            raise ValueError(
                f"method {name!r} has no {argument}; it takes {', '.join(known) or 'no arguments'}."
            )
    return METHODS[name](schedule, **tuned)
