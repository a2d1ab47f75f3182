"""Whether a model repeats what it was trained on: distances to the nearest training image.

    copied share   of the generated images, those as near to a training image as the nearest 5 %
                   of held-out images are; 0.05 where they are as new as held-out ones

Letters: N generated images, H held-out images, M training images, D features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUANTILE = 0.05
_ELEMENTS = 2**24  # of a matrix of distances at a time


@dataclass(frozen=True, eq=False)
class Nearest:
    """To each image of a set, the nearest one of the training set."""

    distances: Tensor  # (N,) float64, in the units of the features
    ids: Tensor  # (N,) int64

    def copied_share(self, held_out: "Nearest") -> float:
        """See the head of this module, in [0, 1]."""
        border = float(np.quantile(held_out.distances.numpy(), QUANTILE))
        return (self.distances <= border).double().mean().item()


def nearest(features: Tensor, training: Tensor) -> Nearest:
    """(N, D), (M, D) -> the Euclidean nearest of the second to each of the first."""
    features, training = features.double(), training.double()
    rows = max(1, _ELEMENTS // len(training))
    ids = torch.cat([torch.cdist(part, training).argmin(dim=1) for part in features.split(rows)])
    # Again by differences: matrix products leave a distance of zero at 1e-8 of the norm.
    return Nearest((features - training[ids]).norm(dim=1), ids)
