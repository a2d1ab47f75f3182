"""The training objective: draw timesteps, noise the input, weigh the prediction error.

    E over (x0, t, noise) of  w(t) mean((model(x_in, t, label) - target)**2)

All randomness is a function of (seed, image counter, step); evaluating twice gives the same bits.

Letters: B images, C channels, H x W pixels.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from speed_engine.diffusion.laws import Law
from speed_engine.diffusion.methods import Method
from speed_engine.ops import Stream, operators_for, random_bits


class Denoiser(Protocol):
    """Any model of this signature can be trained; it does not know what it predicts."""

    def __call__(self, x_in: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
        ...


class ObjectiveOutput(NamedTuple):
    """What one evaluation of the objective yields."""

    loss: Tensor  # () what the optimizer sees
    squared_error: Tensor  # (B,) unweighted, detached
    weighted_error: Tensor  # (B,) what samplers that learn observe, detached
    t: Tensor  # (B,) timesteps


class Objective(nn.Module):
    """Denoising with weighted squared error.

    The module's parameters are the method's own, trained beside the model's; its state, parameters
    and what samplers have learned, belongs into checkpoints.

    Args:
        method: process, target, law of timesteps and weights.
        seed: root of all draws.
        null_label: what a dropped label becomes, for classifier-free guidance.
        label_dropout: share of the labels dropped, in [0, 1].
    """

    seed: Tensor

    def __init__(
        self, method: Method, seed: int, null_label: int, label_dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.schedule, self.timesteps = method.schedule, method.timesteps
        self.table, self.batch_loss = method.table, method.batch_loss
        self.null_label, self.label_dropout = null_label, label_dropout
        self.register_buffer("seed", torch.tensor(seed), persistent=False)

    def forward(
        self, model: Denoiser, images: Tensor, labels: Tensor, ids: Tensor, step: int
    ) -> ObjectiveOutput:
        """Mean loss and its parts.

        Args:
            model: what is trained.
            images: (B, C, H, W) in [-1, 1].
            labels: (B,) int64.
            ids: (B,) int64 image counters.
            step: optimizer steps done so far.
        """
        t = self.timesteps.sample(self.seed, ids, step)
        coefficients = self.table(t)
        noised_input = operators_for(images.device).noised_input
        x_in = noised_input(images, coefficients, self.seed, ids, images.dtype)
        answer = model(x_in, self.schedule.model_time(t), self._drop_labels(labels, ids))
        loss, squared_error = self._errors(answer, images, coefficients, ids, t)
        mean = self.batch_loss(self.schedule.cell(t), loss * self.timesteps.importance(t))
        return ObjectiveOutput(mean, squared_error, loss.detach(), t)

    @property
    def learns_timesteps(self) -> bool:
        """Whether the sampler's law depends on what it observes."""
        return type(self.timesteps.law).observe is not Law.observe

    def observe(self, step: int, output: ObjectiveOutput) -> None:
        """Tell the sampler what the step cost, after it; see ``TimestepSampler.observe``."""
        self.timesteps.observe(step, output.t, output.weighted_error)

    def _errors(
        self, answer: Tensor, images: Tensor, coefficients: Tensor, ids: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B,) loss and (B,) squared error."""
        weighted_mse = operators_for(images.device).weighted_mse
        return weighted_mse(answer, images, coefficients, self.seed, ids)

    def _drop_labels(self, labels: Tensor, ids: Tensor) -> Tensor:
        words = random_bits(self.seed, ids, 1, Stream.LABEL_DROPOUT)[:, 0]
        return torch.where(words < round(self.label_dropout * 2**32), self.null_label, labels)
