"""A model's quality: images drawn under given conditions, compared with the data."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from speed_engine.diffusion.conditions import Conditions
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable
from speed_engine.evaluation.features import Extractor
from speed_engine.evaluation.fidelity import FidelityResult, check_counts, measure
from speed_engine.evaluation.generate import generate

METRICS = ("fid", "kid")


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Draws and measures the same images, by seed, each time it is called.

    Attributes:
        reference: (M, C, H, W) uint8 real images; None measures nothing.
        extractor: of the features that are compared; None with no reference.
        conditions: (num_images, ...) each, of the images drawn.
        null: what hides them for guidance.

    Raises:
        ValueError: too few images for FID with this extractor.
    """

    schedule: NoiseSchedule
    table: TimestepTable
    reference: Tensor | None
    extractor: Extractor | None
    conditions: Conditions
    null: Mapping[str, Tensor]
    image_shape: tuple[int, int, int]
    latents: bool
    num_images: int
    solver_steps: int
    guidance: float
    seed: int

    def __post_init__(self) -> None:
        if self.reference is not None and self.extractor is not None:
            check_counts(self.num_images, len(self.reference), self.extractor, METRICS)

    def __call__(self, model: nn.Module) -> tuple[Tensor, FidelityResult | None]:
        """Images (N, C, H, W) as ``generate`` returns them, and their fidelity."""
        images = generate(
            model,
            self.schedule,
            self.table,
            self.conditions,
            self.num_images,
            image_shape=self.image_shape,
            null=self.null,
            seed=self.seed,
            num_steps=self.solver_steps,
            guidance=self.guidance,
            latents=self.latents,
        )
        if self.reference is None or self.extractor is None:
            return images, None
        return images, measure(images, self.reference, self.extractor, METRICS)
