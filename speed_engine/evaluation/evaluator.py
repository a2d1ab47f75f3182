"""A model's quality: images drawn for every class in turn, compared with the data."""

from dataclasses import dataclass

from torch import Tensor, nn

from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable
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

    def __post_init__(self) -> None:
        check_counts(self.num_images, len(self.reference), self.extractor, METRICS)

    def __call__(self, model: nn.Module) -> tuple[Tensor, Tensor, FidelityResult]:
        """Images (N, C, H, W) uint8, their labels (N,) and their fidelity."""
        labels = class_cycle(self.num_images, self.num_classes)
        channels, height, width = self.reference.shape[1:]
        images = generate(
            model,
            self.schedule,
            self.table,
            labels,
            image_shape=(channels, height, width),
            null_label=self.num_classes,
            seed=self.seed,
            num_steps=self.solver_steps,
            guidance=self.guidance,
        )
        return images, labels, measure(images, self.reference, self.extractor, METRICS)
