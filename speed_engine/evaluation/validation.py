"""The validation loss: denoising of images that are not trained on, always with the same noise.

Timesteps and noise are fixed, so that the figure of two checkpoints differs by the model alone. It
needs no features and no generated images, and is far less noisy than distances between sets of
images. The error is that of the process's own target (velocity of flows, epsilon of DDPM, F of
EDM), whatever the model predicts and however the loss is weighted, so that all models of one
process can be compared by it; those of different processes cannot.

Letters: B images, M of them all, W processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speed_engine.data.batch import Batch
from speed_engine.diffusion.fitted import Method
from speed_engine.diffusion.prediction import linear_form, weight_conversion
from speed_engine.ops import Stream, normal
from speed_engine.runtime.precision import autocast
from speed_engine.runtime.world import ALONE, World

IMAGES = 512  # at most
LEVELS = 8  # timesteps, the centres of so many equal parts of the process's time
BATCH = 64  # images that go through the model at once


class Validation:
    """Measures the error of a model at fixed timesteps and noise.

    Args:
        process: on which the model was trained.
        batch: M clean images with conditions, on the model's device; equal on every process.
        seed: root of the noise.
        world: the processes that share the images out; each calls the model equally often.

    Attributes:
        batch: the images of this process.
    """

    def __init__(self, process: Method, batch: Batch, seed: int, world: World = ALONE) -> None:
        self.process, self.world = process, world
        share = -(-len(batch.ids) // world.size)
        first = world.rank * share
        self._rows = torch.arange(first, first + share, device=batch.ids.device)
        self._counts = self._rows < len(batch.ids)  # a last process may have fewer: one again
        self.batch = batch.at(self._rows.clamp(max=len(batch.ids) - 1))
        root = torch.tensor(seed, device=batch.ids.device)
        x = self.batch.images
        self._noise = normal(root, self.batch.ids, x[0].numel(), Stream.NOISE).view_as(x)

    def __call__(self, model: nn.Module) -> float:
        """Mean squared error of the process's own target, over images and levels."""
        schedule = self.process.schedule
        parts = torch.arange(LEVELS, dtype=torch.float64) + 0.5
        cells = (parts / LEVELS * schedule.num_timesteps).long()
        return float(self.errors(model, schedule.timesteps[cells], schedule.prediction).mean())

    @torch.inference_mode()
    def errors(self, model: nn.Module, times: Tensor | Sequence[float], target: str) -> Tensor:
        """(L,) float64 mean squared errors of a target, over all images, on every process.

        Args:
            model: its answer is the process's prediction, perhaps with further channels.
            times: (L,) timesteps of the process.
            target: a key of ``PREDICTIONS``.
        """
        schedule, table = self.process.schedule, self.process.table
        found = []
        for t in torch.as_tensor(times, dtype=schedule.timesteps.dtype):
            rows = table.rows_at(float(t))
            factor = weight_conversion(linear_form(schedule, target, t), rows)
            found.append(factor * self._error(model, t))
        sums = torch.stack(found)
        counts = self._counts.sum().double().cpu().view(1)
        total = self.world.gather_on_host(torch.cat([sums, counts])[None])
        return total[:, :-1].sum(0) / total[:, -1].sum()

    def _error(self, model: nn.Module, t: Tensor) -> Tensor:
        """() float64 on the host: squared error of the model's own target, summed over images."""
        rows, x, noise = self.process.table.rows_at(float(t)), self.batch.images, self._noise
        x_in = (rows.a_x * x + rows.a_e * noise).float()
        wanted = rows.b_x * x + rows.b_e * noise
        time = self.process.schedule.model_time(t).to(x.device).expand(len(x))
        answers = []
        with autocast(x.device.type):
            for part in torch.arange(len(x), device=x.device).split(BATCH):
                conditions = {name: value[part] for name, value in self.batch.conditions.items()}
                answers.append(model(x_in[part], time[part], **conditions)[:, : x.shape[1]].float())
        errors = (torch.cat(answers) - wanted).double().square().flatten(1).mean(1)
        return (errors * self._counts).sum().cpu()
