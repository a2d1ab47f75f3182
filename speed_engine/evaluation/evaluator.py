"""A model's quality: images drawn under given conditions, compared with the data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speed_engine.diffusion.conditions import Conditions
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable
from speed_engine.distributed import ALONE, World
from speed_engine.evaluation.features import Extractor
from speed_engine.evaluation.fidelity import FidelityResult, check_counts, measure
from speed_engine.evaluation.generate import check_guidance, generate

METRICS = ("fid", "kid")


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Draws and measures the same images, by seed, each time it is called.

    Attributes:
        reference: (M, C, H, W) uint8 real images; None measures nothing.
        extractor: of the features that are compared; None with no reference.
        conditions: (num_images, ...) each, of the images drawn.
        null: what hides them for guidance.
        decode: latents to pictures; None leaves what is drawn as it is.

    Raises:
        ValueError: too few images for FID with this extractor, or guidance on a model that is told
            nothing that can be hidden.
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
    solver: str = "ddim"
    guidance_interval: tuple[float, float] | None = None
    world: World = ALONE
    decode: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_guidance(self.guidance, self.conditions, self.null)
        if self.reference is not None and self.extractor is not None:
            check_counts(self.num_images, len(self.reference), self.extractor, METRICS)

    def __call__(self, model: nn.Module) -> tuple[Tensor, FidelityResult | None]:
        """Images (N, C, H, W), decoded or as ``generate`` returns them, and their fidelity.

        Every process draws its part of the images and gets all; the first one measures them, the
        others have None.
        """
        # Each process draws equally many, for sharded models compute together: the last image again
        # where there is none left.
        share = -(-self.num_images // self.world.size)
        first = self.world.rank * share
        ids = torch.arange(first, first + share).clamp(max=self.num_images - 1)
        images = generate(
            model,
            self.schedule,
            self.table,
            {name: value[ids] for name, value in self.conditions.items()},
            ids,
            image_shape=self.image_shape,
            null=self.null,
            seed=self.seed,
            num_steps=self.solver_steps,
            solver=self.solver,
            guidance=self.guidance,
            guidance_interval=self.guidance_interval,
            latents=self.latents,
        )
        if self.decode is not None:
            images = self.decode(images)
        images = self.world.gather_on_host(images)[: self.num_images]
        if self.reference is None or self.extractor is None or not self.world.is_first:
            return images, None
        return images, measure(images, self.reference, self.extractor, METRICS)
