"""One optimizer step: forward, backward, clip, update, average. No I/O, no clock, no waiting.

A step whose loss or gradient is not finite, on any process, changes nothing on any of them but the
number of steps done.

Letters: B images of one process.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speed_engine.data.batch import Batch
from speed_engine.diffusion.objective import Denoiser, Objective, ObjectiveOutput
from speed_engine.runtime.sharding import whole
from speed_engine.runtime.world import ALONE, World
from speed_engine.training.ema import Ema
from speed_engine.training.optimizers import OneSweep, set_rates


class StepReport(NamedTuple):
    """Device tensors of one step; reading one waits for the device."""

    loss: Tensor  # () weighted, what was minimised, mean over this process's images
    squared_error: Tensor  # () unweighted, mean over this process's images
    grad_norm: Tensor  # () before clipping, of all processes together
    skipped: Tensor  # () float32, 1 if the step was not finite and changed nothing


class Engine:
    """Trains a model on batches.

    Args:
        model: the parameters to train; with several processes laid out by ``distribute``.
        objective: on the model's device.
        optimizer: of the parameters of model and objective; ``OneSweep`` clips and averages, too.
        ema: average of the model's parameters.
        learning_rate: step number, from 1 -> learning rate.
        beta1: step number, from 1 -> decay of first moments; by default the optimizer's own.
        grad_clip: largest gradient norm of the model; inf never clips.
        forward: what is called in place of the model, such as its compiled form.
        microbatch_size: images per forward; gradients of a batch are summed over them. None takes
            the batch whole.
        world: the processes of the run.
        seed: of the dropout inside the model, which is drawn by torch's generators: every step
            sets them, so that a resumed run draws what the whole one does.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        *,
        learning_rate: Callable[[int], float],
        beta1: Callable[[int], float] | None = None,
        grad_clip: float,
        forward: Denoiser | None = None,
        microbatch_size: int | None = None,
        world: World = ALONE,
        seed: int = 0,
    ) -> None:
        self.model, self.objective, self.optimizer, self.ema = model, objective, optimizer, ema
        self.learning_rate, self.beta1, self.grad_clip = learning_rate, beta1, grad_clip
        self.forward: Denoiser = model if forward is None else forward
        self.microbatch_size, self.world = microbatch_size, world
        self.steps_done = 0
        self._seed = seed
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self._device_type = next(model.parameters()).device.type

    def step(self, batch: Batch) -> StepReport:
        """One update from this process's part of a batch, on the model's device."""
        before, step = self.steps_done, self.steps_done + 1
        set_rates(self.optimizer, self.learning_rate(step), self.beta1 and self.beta1(step))
        if self._has_dropout:
            torch.manual_seed(hash((self._seed, step, self.world.rank)) % 2**63)
        output = self._accumulate(batch, before)
        for parameter in self.objective.parameters():  # not sharded: nobody has summed these yet
            if parameter.grad is not None:
                self.world.mean_(parameter.grad)
        norm, finite = self._update(step)
        self.optimizer.zero_grad(set_to_none=True)
        self._observe(before, output, finite)
        self.steps_done = step
        skipped = (~finite).float()
        return StepReport(output.loss, output.squared_error.mean(), norm, skipped)

    def _accumulate(self, batch: Batch, before: int) -> ObjectiveOutput:
        """Gradients of the batch's mean loss, microbatch by microbatch."""
        size = self.microbatch_size or len(batch.ids)
        parts = batch.split(size)
        outputs = []
        for i, part in enumerate(parts):
            if self.world.size > 1:
                self.model.set_requires_gradient_sync(i == len(parts) - 1)  # pyright: ignore[reportCallIssue]
            with self._autocast():
                output = self.objective(
                    self.forward,
                    part.images,
                    part.conditions,
                    part.ids,
                    before,
                    part.targets,
                )
            loss = output.loss / len(parts)
            # An infinite loss may have finite gradients. Made NaN, they are so on every process.
            (loss * torch.where(torch.isfinite(loss), 1.0, torch.nan)).backward()
            outputs.append(output._replace(loss=loss.detach()))
        if len(outputs) == 1:
            return outputs[0]
        losses, *rest = zip(*outputs, strict=True)
        return ObjectiveOutput(torch.stack(losses).sum(), *(torch.cat(part) for part in rest))

    def _observe(self, before: int, output: ObjectiveOutput, finite: Tensor) -> None:
        """Show a sampler that learns the step of all processes, unless it was skipped."""
        if not self.objective.learns_timesteps:
            return
        t, errors = self.world.gather(output.t), self.world.gather(output.weighted_error)
        state = list(self.objective.timesteps.buffers())
        previous = [buffer.clone() for buffer in state]
        self.objective.observe(before, output._replace(t=t, weighted_error=errors))
        for now, was in zip(state, previous, strict=True):
            now.copy_(torch.where(finite, now, was))

    def _update(self, step: int) -> tuple[Tensor, Tensor]:
        """Clip, update, average, unless a gradient is not finite: (gradient norm, finite?)."""
        if isinstance(self.optimizer, OneSweep):
            decay = self.ema.decay_at(step)
            return self.optimizer.sweep([self.ema.averages], [decay], self.grad_clip)
        norm = whole(self._clip())
        finite = torch.isfinite(norm)
        # The fused optimizer's own switch (GradScaler's): it reads the tensor on the device.
        self.optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.ema.update(step, finite)
        return norm, finite

    def _clip(self) -> Tensor:
        """() gradient norm, before clipping; without a limit the gradients are read only."""
        if self.grad_clip == math.inf:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            return nn.utils.get_total_norm(gradients)
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)

    def _autocast(self) -> AbstractContextManager:
        """bf16 matrix products on CUDA; float32 elsewhere, where bf16 is no faster at this size."""
        if self._device_type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()
