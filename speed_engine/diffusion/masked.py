"""Masked training: every image is denoised twice, once with a part hidden (MDT, Gao et al. 2023).

    loss(model) + loss(model under a mask)

with the same timesteps, noise and weights. Which tokens are hidden is a function of (seed, image
counter), too.

Letters: B images, C channels, H x W pixels.
"""

import functools

from torch import Tensor, nn

from speed_engine.diffusion.conditions import Conditions
from speed_engine.diffusion.objective import Denoiser, Objective, ObjectiveOutput
from speed_engine.diffusion.timesteps import TimestepSampler
from speed_engine.ops import Stream, random_bits


class MaskedObjective(nn.Module):
    """Sum of an objective with and without a mask.

    Args:
        objective: evaluated twice; what it draws does not depend on the model.
        mask_words: random words per image that the model makes its mask of.
    """

    def __init__(self, objective: Objective, mask_words: int) -> None:
        super().__init__()
        self.objective, self.mask_words = objective, mask_words

    def forward(
        self, model: Denoiser, images: Tensor, conditions: Conditions, ids: Tensor, step: int
    ) -> ObjectiveOutput:
        """Arguments as of ``Objective``; the model also takes ``mask_draws`` (B, mask_words) int64.

        The squared error is that without a mask, comparable with other objectives'.
        """
        draws = random_bits(self.objective.seed, ids, self.mask_words, Stream.TOKEN_MASK)
        under_mask = functools.partial(model, mask_draws=draws)
        seen = self.objective(model, images, conditions, ids, step)
        hidden = self.objective(under_mask, images, conditions, ids, step)
        return ObjectiveOutput(
            seen.loss + hidden.loss,
            seen.squared_error,
            seen.weighted_error + hidden.weighted_error,
            seen.t,
        )

    @property
    def sampler(self) -> TimestepSampler:
        """Of the timesteps."""
        return self.objective.timesteps

    @property
    def learns_timesteps(self) -> bool:
        """Whether the sampler's law depends on what it observes."""
        return self.objective.learns_timesteps

    def observe(self, step: int, output: ObjectiveOutput) -> None:
        """Tell the sampler what the step cost, after it; see ``TimestepSampler.observe``."""
        self.objective.observe(step, output)
