"""One optimizer step: forward, backward, clip, update, average. No I/O, no clock, no waiting."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speed_engine.data.loader import Batch
from speed_engine.diffusion.masked import MaskedObjective
from speed_engine.diffusion.objective import Denoiser, Objective
from speed_engine.ema import Ema
from speed_engine.optim import set_rates


class StepReport(NamedTuple):
    """Device tensors of one step; reading one waits for the device."""

    loss: Tensor  # () weighted, what was minimised
    squared_error: Tensor  # () unweighted mean over the batch
    grad_norm: Tensor  # () before clipping


class Engine:
    """Trains a model on batches.

    Args:
        model: the parameters to train.
        objective: on the model's device.
        optimizer: of the parameters of model and objective.
        ema: average of the model's parameters.
        learning_rate: step number, from 1 -> learning rate.
        beta1: step number, from 1 -> decay of first moments; by default the optimizer's own.
        grad_clip: largest gradient norm of the model; inf never clips.
        forward: what is called in place of the model, such as its compiled form.
        seed: of the dropout inside the model, which is drawn by torch's generators: every step
            sets them, so that a resumed run draws what the whole one does.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | MaskedObjective,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        *,
        learning_rate: Callable[[int], float],
        beta1: Callable[[int], float] | None = None,
        grad_clip: float,
        forward: Denoiser | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.objective, self.optimizer, self.ema = model, objective, optimizer, ema
        self.learning_rate, self.beta1, self.grad_clip = learning_rate, beta1, grad_clip
        self.forward: Denoiser = model if forward is None else forward
        self.steps_done = 0
        self._seed = seed
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self._device_type = next(model.parameters()).device.type

    def step(self, batch: Batch) -> StepReport:
        """One update from one batch that is on the model's device."""
        before, step = self.steps_done, self.steps_done + 1
        set_rates(self.optimizer, self.learning_rate(step), self.beta1 and self.beta1(step))
        if self._has_dropout:
            torch.manual_seed(hash((self._seed, step)) % 2**63)
        with self._autocast():
            output = self.objective(self.forward, batch.images, batch.conditions, batch.ids, before)
        output.loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        self.objective.observe(before, output)
        self.steps_done = step
        return StepReport(output.loss.detach(), output.squared_error.mean(), grad_norm)

    def _autocast(self) -> AbstractContextManager:
        """bf16 matrix products on CUDA; float32 elsewhere, where bf16 is no faster at this size."""
        if self._device_type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()
