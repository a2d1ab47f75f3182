"""One optimizer step: forward, backward, update. No I/O, no clock, no waiting.

A step whose loss or gradient is not finite, on any process, changes nothing on any of them but the
number of steps done.

Letters: B images of one process.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from speed_engine.data.batch import Batch
from speed_engine.diffusion.objective import Denoiser, Objective, ObjectiveOutput
from speed_engine.ops import Stream, random_bits
from speed_engine.runtime.precision import autocast
from speed_engine.runtime.sharding import computing_device
from speed_engine.runtime.world import ALONE, World
from speed_engine.training.update import Update


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
        update: of the parameters of model and objective.
        forward: what is called in place of the model, such as its compiled form.
        microbatch_size: images per forward; the gradient is that of the batch's mean loss, whether
            or not they divide it. None takes the batch whole.
        world: the processes of the run; each has an equal part of every batch.
        seed: of the dropout inside the model. It is drawn by torch's generators, in the order of
            the microbatches, which every step seeds by (seed, step, rank): a resumed run draws
            what the whole one does, but another number of processes draws anew.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        update: Update,
        *,
        forward: Denoiser | None = None,
        microbatch_size: int | None = None,
        world: World = ALONE,
        seed: int = 0,
    ) -> None:
        self.model, self.objective, self.update = model, objective, update
        self.forward: Denoiser = model if forward is None else forward
        self.microbatch_size, self.world = microbatch_size, world
        self.steps_done = 0
        self._seed = seed
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self._device = computing_device(model)

    def step(self, batch: Batch) -> StepReport:
        """One update from this process's part of a batch, on the model's device."""
        before, step = self.steps_done, self.steps_done + 1
        if self._has_dropout:
            torch.manual_seed(dropout_seed(self._seed, step, self.world.rank))
        output = self._accumulate(batch, before)
        for parameter in self.objective.parameters():  # not sharded: nobody has summed these yet
            if parameter.grad is not None:
                self.world.mean_(parameter.grad)
        norm, finite = (of.to(self._device) for of in self.update.step(step))
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
            with autocast(self._device.type):
                output = self.objective(
                    self.forward,
                    part.images,
                    part.conditions,
                    part.ids,
                    before,
                    part.targets,
                )
            loss = output.loss / (len(batch.ids) / len(part.ids))  # its share of the batch's mean
            # An infinite loss may have finite gradients. Made NaN, they are so on every process.
            (loss * torch.where(torch.isfinite(loss), 1.0, torch.nan)).backward()
            outputs.append(output._replace(loss=loss.detach()))
        if len(outputs) == 1:
            return outputs[0]
        losses, *rest = zip(*outputs, strict=True)
        return ObjectiveOutput(torch.stack(losses).sum(), *(torch.cat(part) for part in rest))

    def _observe(self, before: int, output: ObjectiveOutput, finite: Tensor) -> None:
        """Show a sampler that learns the step of all processes, unless it was skipped."""
        if not self.objective.timesteps.distribution.learns:
            return
        t, errors = self.world.gather(output.t), self.world.gather(output.weighted_error)
        self.objective.observe(before, output._replace(t=t, weighted_error=errors), finite)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of one process's dropout in a step, in [0, 2**64).

    Drawn like everything else by the counter-based generator: words 2 rank and 2 rank + 1 at
    address ``step`` of the stream of dropout.
    """
    address = torch.tensor(seed), torch.tensor([step])
    low, high = random_bits(*address, 2 * rank + 2, Stream.DROPOUT)[0, -2:].numpy()
    return int(high) << 32 | int(low)
