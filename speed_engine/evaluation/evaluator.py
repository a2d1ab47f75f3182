"""A model's quality: images drawn for every class in turn, compared with the data."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable
from speed_engine.distributed import ALONE, World
from speed_engine.evaluation.features import Extractor
from speed_engine.evaluation.fidelity import FidelityResult, check_counts, measure
from speed_engine.evaluation.generate import class_cycle, generate

METRICS = ("fid", "kid")


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Draws and measures the same images, by seed, each time it is called.

    Attributes:
        reference: (M, C, H, W) uint8 real images.
        extractor: of the features that are compared.
        num_classes: labels drawn in turn; the next label means "no label".

    Raises:
        ValueError: too few images for FID with this extractor.
    """

    schedule: NoiseSchedule
    table: TimestepTable
    reference: Tensor
    extractor: Extractor
    num_classes: int
    num_images: int
    solver_steps: int
    guidance: float
    seed: int
    world: World = ALONE

    def __post_init__(self) -> None:
        check_counts(self.num_images, len(self.reference), self.extractor, METRICS)

    def __call__(self, model: nn.Module) -> tuple[Tensor, Tensor, FidelityResult | None]:
        """Images (N, C, H, W) uint8, their labels (N,) and their fidelity.

        Every process draws its part of the images; all get all images, and the first one
        measures them; the others have None.
        """
        labels = class_cycle(self.num_images, self.num_classes)
        channels, height, width = self.reference.shape[1:]
        # Each process draws equally many, for sharded models compute together: the last image again
        # where there is none left.
        share = -(-self.num_images // self.world.size)
        first = self.world.rank * share
        ids = torch.arange(first, first + share).clamp(max=self.num_images - 1)
        images = generate(
            model,
            self.schedule,
            self.table,
            labels[ids],
            ids=ids,
            image_shape=(channels, height, width),
            null_label=self.num_classes,
            seed=self.seed,
            num_steps=self.solver_steps,
            guidance=self.guidance,
        )
        images = self.world.gather_on_host(images)[: self.num_images]
        if not self.world.is_first:
            return images, labels, None
        return images, labels, measure(images, self.reference, self.extractor, METRICS)
