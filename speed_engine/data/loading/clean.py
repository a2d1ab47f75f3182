"""Batches as the objective takes them, made on the device from what the data set stores.

The same for batches of a loader and for rows of a resident data set, so that a run does not depend
on which it was.

Letters: B images of a batch, N of what is stored; C channels, H, W.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from speed_engine.data.loading.loader import Batch
from speed_engine.ops import operators_for

PICTURES = ("low_resolution",)  # conditions that are images of the same scene: mirrored with it


class Cleaning(NamedTuple):
    """How stored images become clean images x0, see ``speed_kernels.clean_images``."""

    seed: Tensor  # () int64 on the device, root of the run's draws
    posterior: bool = False  # mean and standard deviation are stored, to draw from
    scale: float = 1.0  # of latents
    shift: float = 0.0  # of latents, before scaling
    flip: bool = False  # mirror one image in two

    def batch(
        self,
        images: Tensor,
        conditions: Mapping[str, Tensor],
        ids: Tensor,
        rows: Tensor | None = None,
    ) -> Batch:
        """A batch of clean images.

        Args:
            images: (N, C or 2C, H, W) on the device: uint8 pixels, or floating point.
            conditions: (N, ...) each; floats become float32.
            ids: (B,) int64 positions in the stream.
            rows: (B,) int64, which of the N; None takes all in turn.
        """
        clean = operators_for(images.device).clean_images
        latents = dict(posterior=self.posterior, scale=self.scale, shift=self.shift)
        told = {}
        for name, value in conditions.items():
            if name in PICTURES:
                told[name] = clean(value, self.seed, ids, rows, flip=self.flip)
            else:
                taken = value if rows is None else value[rows]
                told[name] = taken.float() if taken.is_floating_point() else taken
        x0 = clean(images, self.seed, ids, rows, flip=self.flip, **latents)
        return Batch(x0, told, ids)
