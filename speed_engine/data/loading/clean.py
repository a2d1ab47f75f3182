"""Batches as the objective takes them, made on the device from what the data set stores.

The same for batches of a loader and for rows of a resident data set, so that a run does not depend
on which it was.

Letters: B images of a batch, N of what is stored; C channels, H, W.
"""

from typing import NamedTuple

from torch import Tensor

from speed_engine.data.batch import Batch, StoredBatch
from speed_engine.ops import operators_for

PICTURES = ("low_resolution",)  # conditions that are images of the same scene: mirrored with it


class Cleaning(NamedTuple):
    """How stored images become clean images x0, see ``speed_kernels.clean_images``."""

    seed: Tensor  # () int64 on the device, root of the run's draws
    posterior: bool = False  # mean and standard deviation are stored, to draw from
    scale: float = 1.0  # of latents
    shift: float = 0.0  # of latents, before scaling
    flip: bool = False  # mirror one image in two

    def batch(self, stored: StoredBatch, rows: Tensor | None = None) -> Batch:
        """A batch of clean images: here, and only here, pixels become values in [-1, 1].

        Args:
            stored: on the device; of N images and (N, ...) conditions, and B ids.
            rows: (B,) int64, which of the N; None takes all in turn, B = N.
        """
        ids, flip = stored.ids, self.flip
        clean = operators_for(stored.images.device).clean_images
        latents = dict(posterior=self.posterior, scale=self.scale, shift=self.shift)
        conditions = {}
        for name, value in stored.conditions.items():
            if name in PICTURES:
                conditions[name] = clean(value, self.seed, ids, rows, flip=flip)
            else:
                taken = value if rows is None else value[rows]
                conditions[name] = taken.float() if taken.is_floating_point() else taken
        x0 = clean(stored.images, self.seed, ids, rows, flip=flip, **latents)
        return Batch(x0, conditions, ids, replaced=stored.replaced)
