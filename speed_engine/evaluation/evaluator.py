"""A model's quality: images drawn under given conditions, compared with the data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from speed_engine.diffusion.conditions import Conditions
from speed_engine.diffusion.schedule import NoiseSchedule
from speed_engine.diffusion.table import TimestepTable
from speed_engine.encoders.clip import ClipScore
from speed_engine.evaluation.copies import Nearest, nearest
from speed_engine.evaluation.features import Extractor
from speed_engine.evaluation.fidelity import METRICS, check_channels, check_counts, compare
from speed_engine.evaluation.generate import check_guidance, generate
from speed_engine.evaluation.image_set import ImageSet
from speed_engine.runtime.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of drawn images, and what it depends on; None means not asked for.

    Fields without a prefix compare with the images that were trained on.
    """

    fid: float | None = None
    kid: float | None = None
    isc: float | None = None
    precision: float | None = None
    recall: float | None = None
    held_out_fid: float | None = None
    held_out_kid: float | None = None
    held_out_precision: float | None = None
    held_out_recall: float | None = None
    copied_share: float | None = None  # see copies.py
    clip_score: float | None = None  # see clip.py
    extractor: str | None = None
    weights_sha256: str | None = None  # of the extractor
    feature_dim: int | None = None
    num_generated: int
    num_reference: int | None = None
    num_held_out: int | None = None
    clip_weights_sha256: str | None = None
    solver: str
    solver_steps: int
    guidance: float
    guidance_interval: list[float] | None
    nearest: Nearest | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """What is known, by name, for metrics.jsonl."""
        return {k: v for k, v in vars(self).items() if v is not None and k != "nearest"}


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Draws and measures the same images, by seed, each time it is called.

    Attributes:
        reference: the images that are trained on; None compares with nothing.
        extractor: of the features that are compared; None with no reference.
        metrics: fid, kid, isc, prc, copies, clip.
        held_out: real images that are not trained on, of the same extractor; None if there are
            none.
        clip: of the metric of that name.
        texts: (num_images,) what it compares with.
        conditions: (num_images, ...) each, of the images drawn.
        null: what hides them for guidance.
        decode: latents to pictures; None leaves what is drawn as it is.

    Raises:
        UserError: too few images for a metric with this extractor, images of other channels than
            it takes, or guidance on a model that is told nothing that can be hidden.
    """

    schedule: NoiseSchedule
    table: TimestepTable
    reference: ImageSet | None
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
    metrics: tuple[str, ...] = ("fid", "kid")
    held_out: ImageSet | None = None
    clip: ClipScore | None = None
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_guidance(self.guidance, self.conditions, self.null)
        if self.extractor is None:
            return
        check_channels(self.image_shape[0], self.extractor)
        metrics = self._compared(METRICS)
        for real in (self.reference, self.held_out):
            if real is not None:
                check_counts(self.num_images, len(real), self.extractor, metrics)

    def __call__(self, model: nn.Module) -> tuple[Tensor, Evaluation | None]:
        """Images (N, C, H, W), decoded or as ``generate`` returns them, and what was measured.

        Every process draws its part of the images and gets all; the first one measures them, the
        others have None.
        """
        images = self.draw(model)
        return images, self.measure(images) if self.world.is_first else None

    def draw(self, model: nn.Module) -> Tensor:
        """The images alone, on every process."""
        # Each process draws equally many, for sharded models compute together: the last image again
        # where there is none left.
        share = -(-self.num_images // self.world.size)
        first = self.world.rank * share
        ids = torch.arange(first, first + share).clamp(max=self.num_images - 1)
        return self.world.gather_on_host(self.draw_some(model, ids))[: self.num_images]

    def draw_some(self, model: nn.Module, ids: Tensor) -> Tensor:
        """(B,) int64 -> (B, C, H, W): these of the images, on this process alone."""
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
        return images if self.decode is None else self.decode(images)

    def measure(self, images: Tensor) -> Evaluation | None:
        """What is to be measured of images that were drawn; None if that is nothing."""
        figures: dict[str, Any] = {}
        if self.extractor is not None and self.reference is not None:
            logits = "isc" in self.metrics
            drawn = ImageSet(images, len(images), self.extractor, logits=logits)
            figures |= compare(drawn, self.reference, self._compared(METRICS))
            figures |= self._held_out_figures(drawn)
        if self.clip is not None:
            figures["clip_score"] = self.clip(images, self.texts)
        return Evaluation(**figures, **self.circumstances()) if figures else None

    def circumstances(self) -> dict[str, Any]:
        """The fields of an evaluation that say what was measured and how."""
        facts: dict[str, Any] = {
            "num_generated": self.num_images,
            "solver": self.solver,
            "solver_steps": self.solver_steps,
            "guidance": self.guidance,
            "guidance_interval": self.guidance_interval and list(self.guidance_interval),
        }
        if self.extractor is not None and self.reference is not None:
            facts |= {
                "extractor": self.extractor.name,
                "weights_sha256": self.extractor.weights_sha256,
                "feature_dim": self.extractor.feature_dim,
                "num_reference": len(self.reference),
            }
        if self.held_out is not None:
            facts["num_held_out"] = len(self.held_out)
        if self.clip is not None:
            facts["clip_weights_sha256"] = self.clip.weights_sha256
        return facts

    def fields(self) -> set[str]:
        """The fields of an evaluation that are measured."""
        names = {name for metric in self._compared(METRICS) for name in METRICS[metric]}
        if self.held_out is not None:
            names |= {f"held_out_{name}" for name in names - {"isc"}}
        if "copies" in self.metrics:
            names.add("copied_share")
        names = names if self.reference is not None else set()
        return names | ({"clip_score"} if self.clip is not None else set())

    def _held_out_figures(self, drawn: ImageSet) -> dict[str, Any]:
        if self.held_out is None or self.reference is None:
            return {}
        against = self._compared(("fid", "kid", "prc"))  # isc compares with nothing
        figures: dict[str, Any] = {
            f"held_out_{name}": value
            for name, value in compare(drawn, self.held_out, against).items()
        }
        if "copies" in self.metrics:
            figures["nearest"] = nearest(drawn.features, self.reference.features)
            figures["copied_share"] = figures["nearest"].copied_share(self._nearest_of_held_out)
        return figures

    @cached_property
    def _nearest_of_held_out(self) -> Nearest:
        assert self.held_out is not None and self.reference is not None
        return nearest(self.held_out.features, self.reference.features)

    def _compared(self, among: Mapping[str, Any] | tuple[str, ...]) -> tuple[str, ...]:
        return tuple(metric for metric in self.metrics if metric in among)
