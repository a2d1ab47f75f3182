"""The loss of a model that learns its variance: squared error and variational bound.

Letters: B images, T timesteps.
"""

import torch
from torch import Tensor

from speed_engine.diffusion.discrete import DiscreteSchedule
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.terms import Pass, SquaredError
from speed_engine.ops import operators_for
from speed_engine.runtime.checks import UserError


class SquaredErrorAndBound(SquaredError):
    """Squared error of the noise and variational bound in one pass over the answer.

        w mean((epsilon - noise)**2) + T / 1000 bound

    The bound trains the variance, the error the mean (Nichol and Dhariwal 2021). A model for it
    answers with twice the channels: the noise, then v, see ``speed_kernels.variational_bound``.
    DiT trains with it.

    Args:
        method: on a variance-preserving discrete process, predicting epsilon.

    Raises:
        UserError: another process or prediction.
    """

    bound_rows: Tensor

    def __init__(self, method: Method) -> None:
        super().__init__()
        check_learned_variance(method.schedule, method.prediction)
        rows = bound_rows(method.schedule).float()
        scale = torch.full_like(rows[:, :1], method.schedule.num_timesteps / 1000)
        weight = scale * method.table.coefficients[:, 4:] if method.weigh_bound else scale
        self.register_buffer("bound_rows", torch.cat([rows, weight], dim=1), persistent=False)

    def forward(self, seen: Pass) -> tuple[Tensor, Tensor]:
        """(B,) both together, and (B,) squared error of the noise without a weight, detached."""
        hybrid_loss = operators_for(seen.images.device).hybrid_loss
        rows = self.bound_rows[seen.t]
        return hybrid_loss(
            seen.answer, seen.images, seen.coefficients, rows, seen.seed, seen.ids, seen.noise
        )


def check_learned_variance(schedule: NoiseSchedule, prediction: str) -> None:
    """Whether a variance can be learned on a process with a target, to be known before training.

    Raises:
        UserError: the target is not epsilon, or the process not discrete and variance-preserving.
    """
    if prediction != "epsilon":
        raise UserError(
            "model.learn_sigma=True: a learned variance needs prediction epsilon, not "
            f"{prediction}; train without it by --model.no-learn-sigma."
        )
    if not isinstance(schedule, DiscreteSchedule) or not schedule.variance_preserving:
        raise UserError(
            "model.learn_sigma=True: a learned variance needs a discrete variance-preserving "
            f"process, such as linear or cosine; schedule {schedule.name!r} is none: train without "
            "it by --model.no-learn-sigma."
        )


def bound_rows(schedule: NoiseSchedule) -> Tensor:
    """(T, 4) float64 rows (log posterior variance, log beta, gap, first) of the bound.

    The posterior variance is zero at t = 0; there, as published, that of t = 1 stands in.

    Args:
        schedule: discrete and variance-preserving.
    """
    assert isinstance(schedule, DiscreteSchedule)
    abar = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    posterior = torch.cat([posterior[1:2], posterior[1:]])
    gap = before.sqrt() * beta / (1 - abar) * ((1 - abar) / abar).sqrt()
    first = (schedule.timesteps == 0).double()
    return torch.stack([posterior.log(), beta.log(), gap, first], dim=1)
