"""Terms of the loss: what one forward pass of a model costs, image by image.

The first is the error of the prediction. What else a method adds, such as a loss on the model's
features, is a ``Term``.

Letters: B images, C channels, H x W pixels.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from speed_engine.ops import operators_for


class Pass(NamedTuple):
    """One forward pass, with all that a term may look at."""

    answer: Tensor  # (B, C, H, W), or twice the channels with a learned variance
    images: Tensor  # (B, C, H, W) clean, in [-1, 1]
    coefficients: Tensor  # (B, 5) float32 rows (a_x, a_e, b_x, b_e, w), see table.py
    t: Tensor  # (B,) timesteps
    seed: Tensor  # () int64 of the run; with the image counters it gives the noise again
    ids: Tensor  # (B,) int64 image counters
    noise: Tensor | None  # (B, C, H, W) float32 where it is stored
    features: Mapping[str, Tensor]  # (B, ...) each: what the terms ask the model for
    targets: Mapping[str, Tensor]  # (B, ...) each: what the batch holds for the terms


class Term(Protocol):
    """A module that computes one summand of the loss; its parameters are trained with the model.

    Attributes:
        features: names of the model's features that it needs, see ``Objective``; may be empty.
    """

    features: tuple[str, ...]

    def __call__(self, seen: Pass) -> Tensor:
        """One forward pass -> (B,) losses, with the factor that they have in the whole."""
        ...


class SquaredError(nn.Module):
    """w mean((answer - target)**2), the error that every method has."""

    def forward(self, seen: Pass) -> tuple[Tensor, Tensor]:
        """(B,) weighted, and (B,) without the weight, detached."""
        weighted_mse = operators_for(seen.images.device).weighted_mse
        return weighted_mse(
            seen.answer, seen.images, seen.coefficients, seen.seed, seen.ids, seen.noise
        )
