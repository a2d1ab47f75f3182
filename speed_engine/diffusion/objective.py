"""The training objective: draw timesteps, noise the input, weigh the prediction error.

    E over (x0, t, noise) of  w(t) mean((model(x_in, t, label) - target)**2)

All randomness is a function of (seed, image counter); evaluating twice gives the same bits.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from speed_engine.diffusion.table import TimestepTable
from speed_engine.diffusion.timesteps import TimestepSampler
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
    t: Tensor  # (B,) int64


@dataclass(frozen=True, eq=False)
class Objective:
    """Denoising with weighted squared error.

    Attributes:
        timesteps: the distribution of t.
        table: coefficients of every t.
        seed: () int64, root of all draws.
        null_label: what a dropped label becomes, for classifier-free guidance.
        label_dropout: share of the labels dropped, in [0, 1].
    """

    timesteps: TimestepSampler
    table: TimestepTable
    seed: Tensor
    null_label: int
    label_dropout: float = 0.1

    def to(self, device: torch.device) -> "Objective":
        """A copy whose tables are on ``device``."""
        return Objective(
            self.timesteps.to(device),
            self.table.to(device),
            self.seed.to(device),
            self.null_label,
            self.label_dropout,
        )

    def __call__(
        self, model: Denoiser, images: Tensor, labels: Tensor, ids: Tensor
    ) -> ObjectiveOutput:
        """(B, C, H, W) in [-1, 1], (B,) int64, (B,) int64 image counters -> mean loss and parts."""
        t = self.timesteps.sample(self.seed, ids)
        coefficients = self.table(t)
        noised_input, weighted_mse = operators_for(images.device)
        x_in = noised_input(images, coefficients, self.seed, ids, images.dtype)
        prediction = model(x_in, t, self._drop_labels(labels, ids))
        loss, squared_error = weighted_mse(prediction, images, coefficients, self.seed, ids)
        return ObjectiveOutput(loss.mean(), squared_error, t)

    def _drop_labels(self, labels: Tensor, ids: Tensor) -> Tensor:
        words = random_bits(self.seed, ids, 1, Stream.LABEL_DROPOUT)[:, 0]
        return torch.where(words < round(self.label_dropout * 2**32), self.null_label, labels)
