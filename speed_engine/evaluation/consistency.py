"""Consistency: how alike the images are that two models generate from the same noise.

Models of one data set generate similar images from the same noise, whatever their seed or
architecture (Xu et al. 2024, arXiv 2404.07946). "Similar" needs a yardstick, since all images of a
class are somewhat alike: pairs are the two models' images of one noise and one class; partners are
images of the same class, but of different noise.

    distance   mean squared difference of two images, pixels from -1 to 1, or of their features
    cosine     of two images, or features, minus the mean of all images of both models

Letters: N images, C, H, W as usual, D features, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speed_engine.evaluation.generate import GRID_COLUMNS, GRID_ROWS
from speed_engine.runtime.checks import UserError


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Of two models' images in one space: of pairs, and of partners as the yardstick."""

    distance: float  # mean over pairs
    distance_unpaired: float
    cosine: float  # in [-1, 1], mean over pairs
    cosine_unpaired: float

    @property
    def ratio(self) -> float:
        """Distance of pairs in units of that of partners: 0 the same images, 1 nothing shared."""
        return self.distance / max(self.distance_unpaired, 1e-12)


def likeness(a: Tensor, b: Tensor, partners: Tensor) -> Likeness:
    """Compare image i of one model with image i, and with image ``partners[i]``, of the other.

    Args:
        a: (N, ...) of one model, float or uint8 pixels in 0..255.
        b: the same of the other.
        partners: (N,) int64, as ``partners_of`` gives them.
    """
    a, b = _as_vectors(a), _as_vectors(b)
    mean = torch.cat([a, b]).mean(0)

    def cosine(x: Tensor, y: Tensor) -> float:
        return F.cosine_similarity(x - mean, y - mean).mean().item()

    return Likeness(
        distance=(a - b).square().mean().item(),
        distance_unpaired=(a - b[partners]).square().mean().item(),
        cosine=cosine(a, b),
        cosine_unpaired=cosine(a, b[partners]),
    )


def _as_vectors(images: Tensor) -> Tensor:
    """(N, ...) -> (N, D) float64; pixels in -1..1."""
    pixels = images.dtype == torch.uint8
    vectors = images.double().flatten(1)
    return vectors / 127.5 - 1 if pixels else vectors


def partners_of(labels: Tensor | None, count: int) -> Tensor:
    """(N,) int64: for each image another of its class, each once; without classes, any other.

    Args:
        labels: (N,) int64, or None.
        count: N.

    Raises:
        UserError: an image is alone in its class, or alone.
    """
    labels = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    partners = torch.empty(count, dtype=torch.int64)
    classes = labels.unique().tolist()
    for label in classes:
        (members,) = torch.nonzero(labels == label, as_tuple=True)
        if len(members) < 2:
            raise UserError(
                f"{count} images of {len(classes)} classes: class {label} has one only, which is "
                f"compared with nothing; needed are 2 of each, --count {2 * len(classes)} or more."
            )
        partners[members] = members.roll(1)
    return partners


def side_by_side(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(images, rows) for ``generate.save_images``: a row of one model over the same of the other.

    Args:
        a: (N, C, H, W).
        b: the same of the other; as many images are taken as a picture shows.
    """
    shown = min(len(a), GRID_COLUMNS * GRID_ROWS // 2)
    rows = 2 * (torch.arange(shown) // GRID_COLUMNS)
    return torch.cat([a[:shown], b[:shown]]), torch.cat([rows, rows + 1])
