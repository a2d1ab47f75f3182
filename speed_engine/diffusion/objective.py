"""The training objective: draw timesteps, noise the input, weigh the prediction error.

    E over (x0, t, noise) of  w(t) mean((model(x_in, t, conditions) - target)**2)

All randomness is a function of (seed, image counter, step); evaluating twice gives the same bits.

Letters: B images, C channels, H x W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from speed_engine.diffusion.conditions import ConditionChange, Conditions
from speed_engine.diffusion.distributions import Law
from speed_engine.diffusion.method import Method
from speed_engine.diffusion.timesteps import TimestepSampler
from speed_engine.ops import operators_for


class Denoiser(Protocol):
    """Any model of this signature can be trained; it does not know what it predicts."""

    def __call__(self, x_in: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """(B, C, H, W), (B,), (B, ...) each -> (B, C, H, W)."""
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
        changes: what is done to the conditions, in turn; modules.
        store_noise: keep the noise from input to loss instead of drawing it again. The bits are
            the same; which is faster depends on the device.
    """

    seed: Tensor

    def __init__(
        self,
        method: Method,
        seed: int,
        changes: Sequence[ConditionChange] = (),
        store_noise: bool = False,
    ) -> None:
        super().__init__()
        self.schedule, self.timesteps = method.schedule, method.timesteps
        self.table, self.batch_loss = method.table, method.batch_loss
        self.changes = nn.ModuleList(cast(Sequence[nn.Module], changes))
        self.store_noise = store_noise
        self.register_buffer("seed", torch.tensor(seed), persistent=False)

    def forward(
        self, model: Denoiser, images: Tensor, conditions: Conditions, ids: Tensor, step: int
    ) -> ObjectiveOutput:
        """Mean loss and its parts.

        Args:
            model: what is trained.
            images: (B, C, H, W) in [-1, 1].
            conditions: (B, ...) each, by the name of the model's argument.
            ids: (B,) int64 image counters.
            step: optimizer steps done so far.
        """
        t = self.timesteps.sample(self.seed, ids, step)
        coefficients = self.table(t)
        x_in, noise = self._noised_input(images, coefficients, ids)
        for change in self.changes:
            conditions = change(conditions, self.seed, ids)
        answer = model(x_in, self.schedule.model_time(t), **conditions)
        loss, squared_error = self._errors(answer, images, coefficients, ids, t, noise)
        mean = self.batch_loss(self.schedule.cell(t), loss * self.timesteps.importance(t))
        return ObjectiveOutput(mean, squared_error, loss.detach(), t)

    @property
    def sampler(self) -> TimestepSampler:
        """Of the timesteps; its buffers are what it has learned."""
        return self.timesteps

    @property
    def learns_timesteps(self) -> bool:
        """Whether the sampler's law depends on what it observes."""
        return type(self.timesteps.law).observe is not Law.observe

    def observe(self, step: int, output: ObjectiveOutput) -> None:
        """Tell the sampler what the step cost, after it; see ``TimestepSampler.observe``."""
        self.timesteps.observe(step, output.t, output.weighted_error)

    def _noised_input(
        self, images: Tensor, coefficients: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the model sees, and the noise if it is stored.

        Under autocast in its dtype, to which the model's first product would round it anyway.
        """
        operators, kind = operators_for(images.device), images.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else images.dtype
        if self.store_noise:
            return operators.noised_input_and_noise(images, coefficients, self.seed, ids, dtype)
        return operators.noised_input(images, coefficients, self.seed, ids, dtype), None

    def _errors(
        self,
        answer: Tensor,
        images: Tensor,
        coefficients: Tensor,
        ids: Tensor,
        t: Tensor,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(B,) loss and (B,) squared error."""
        weighted_mse = operators_for(images.device).weighted_mse
        return weighted_mse(answer, images, coefficients, self.seed, ids, noise)
