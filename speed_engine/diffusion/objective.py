"""The training objective: sample timesteps, noise the input, weigh the error of the prediction.

    E over (x0, t, noise) of  w(t) mean((model(x_in, t, conditions) - target)**2)  +  other terms

All randomness is a function of (seed, image counter, step), the same bits whenever it is evaluated.

A network declares what it needs beyond one plain forward pass, by attributes that it may have:

    training_passes   its forward passes of a step; each an argument's name -> how many random words
                      per image that argument takes. MDT: ({}, {"mask_draws": words}).
    features          names of the intermediate results that it can return. Called with
                      features=(names), it answers (answer, {name: (B, ...)}).

Letters: B images, C channels, H x W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from speed_engine.diffusion.conditions import ConditionChange, Conditions
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.terms import Pass, SquaredError, Term
from speed_engine.ops import Stream, operators_for, random_bits
from speed_engine.runtime.checks import UserError

Passes = Sequence[Mapping[str, int]]
"""Forward passes of one step: each names arguments, and the random words per image of each."""


class Denoiser(Protocol):
    """Any model of this signature can be trained; it does not know what it predicts."""

    def __call__(self, x_in: Tensor, t: Tensor, **conditions: Any) -> Any:
        """(B, C, H, W), (B,), (B, ...) each -> (B, C, H, W), with ``features`` if asked for."""
        ...


class ObjectiveOutput(NamedTuple):
    """What one evaluation of the objective yields."""

    loss: Tensor  # () what the optimizer sees, of all passes together
    squared_error: Tensor  # (B,) unweighted, of the first pass, detached
    weighted_error: Tensor  # (B,) what samplers that learn observe, of all passes, detached
    t: Tensor  # (B,) timesteps


class Objective(nn.Module):
    """Denoising with weighted squared error, and what a method adds to it.

    The module's parameters are the method's own, trained beside the model's; its state, parameters
    and what samplers have learned, belongs into checkpoints.

    Args:
        method: process, target, timestep distribution and weights.
        seed: root of all random words.
        network: what will be trained; only its declarations are read. None declares nothing.
        changes: what is done to the conditions, in turn; modules.
        error: the error of the prediction; by default ``SquaredError``.
        terms: what is added to it; modules. Learned weights and samplers do not see these.
        store_noise: keep the noise from input to loss instead of drawing it again. The bits are
            the same; which is faster depends on the device.

    Raises:
        UserError: a term needs features that the network does not return.
    """

    seed: Tensor

    def __init__(
        self,
        method: Method,
        seed: int,
        *,
        network: object = None,
        changes: Sequence[ConditionChange] = (),
        error: SquaredError | None = None,
        terms: Sequence[Term] = (),
        store_noise: bool = False,
    ) -> None:
        super().__init__()
        self.schedule, self.timesteps = method.schedule, method.timesteps
        self.table, self.batch_loss = method.table, method.batch_loss
        self.changes = nn.ModuleList(cast(Sequence[nn.Module], changes))
        self.error = error or SquaredError()
        self.terms = nn.ModuleList(cast(Sequence[nn.Module], terms))
        self.passes = training_passes(network)
        self.features = tuple(sorted({name for term in terms for name in term.features}))
        self.store_noise = store_noise
        self.register_buffer("seed", torch.tensor(seed), persistent=False)
        returned = tuple(getattr(network, "features", ()))
        if missing := [name for name in self.features if name not in returned]:
            raise UserError(
                f"the loss needs features {', '.join(missing)} of the model; it has "
                f"{', '.join(returned) or 'none'} to return."
            )

    def forward(
        self,
        model: Denoiser,
        images: Tensor,
        conditions: Conditions,
        ids: Tensor,
        step: int,
        targets: Mapping[str, Tensor] | None = None,
    ) -> ObjectiveOutput:
        """Mean loss and its parts.

        Args:
            model: the network, or what is called in its place.
            images: (B, C, H, W) in [-1, 1].
            conditions: (B, ...) each, by the name of the model's argument.
            ids: (B,) int64 image counters.
            step: optimizer steps done so far.
            targets: (B, ...) each, by name: what terms compare with; by default none.
        """
        t = self.timesteps.sample(self.seed, ids, step)
        coefficients = self.table(t)
        x_in, noise = self._noised_input(images, coefficients, ids)
        for change in self.changes:
            conditions = change(conditions, self.seed, ids)
        outputs = []
        for words in self._words(ids):
            answer, features = self._answer(model, x_in, t, conditions | words)
            seen = Pass(
                answer, images, coefficients, t, self.seed, ids, noise, features, targets or {}
            )
            outputs.append(self._loss(seen))
        total, *others = outputs
        for other in others:
            total = total._replace(
                loss=total.loss + other.loss,
                weighted_error=total.weighted_error + other.weighted_error,
            )
        return total

    def observe(self, step: int, output: ObjectiveOutput, finite: Tensor | bool = True) -> None:
        """Show the sampler what the step cost, after it; see ``TimestepSampler.observe``."""
        self.timesteps.observe(step, output.t, output.weighted_error, finite)

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

    def _words(self, ids: Tensor) -> list[dict[str, Tensor]]:
        """For every pass, (B, words) int64 in [0, 2**32) of each argument that takes some."""
        counts = [count for arguments in self.passes for count in arguments.values()]
        if not counts:
            return [{} for _ in self.passes]
        drawn = random_bits(self.seed, ids, sum(counts), Stream.TOKEN_MASK)
        parts = iter(drawn.split(counts, dim=1))
        return [{name: next(parts) for name in arguments} for arguments in self.passes]

    def _answer(
        self, model: Denoiser, x_in: Tensor, t: Tensor, arguments: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the model answers, and the features that the terms need."""
        time = self.schedule.model_time(t)
        if self.features:
            return model(x_in, time, **arguments, features=self.features)
        return model(x_in, time, **arguments), {}

    def _loss(self, seen: Pass) -> ObjectiveOutput:
        """Of one pass."""
        importance = self.timesteps.importance(seen.t)
        error, squared_error = self.error(seen)
        loss = self.batch_loss(self.schedule.cell(seen.t), error * importance)
        for term in self.terms:
            loss = loss + (term(seen) * importance).mean()
        return ObjectiveOutput(loss, squared_error, error.detach(), seen.t)


def training_passes(network: object) -> Passes:
    """The forward passes of a step that a network declares; by default one, without extras."""
    return getattr(network, "training_passes", ({},))
