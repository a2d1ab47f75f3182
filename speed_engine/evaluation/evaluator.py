"""A model's quality: images generated under given conditions, compared with the data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from speed_engine.diffusion.conditions import Conditions
from speed_engine.diffusion.table import TimestepTable
from speed_engine.encoders.clip import ClipScore
from speed_engine.encoders.vae import Decoder
from speed_engine.evaluation.classifier import ClassifierFeatures
from speed_engine.evaluation.features import Extractor
from speed_engine.evaluation.generate import GenerationSettings, check_guidance, generate
from speed_engine.evaluation.image_set import ImageSet
from speed_engine.evaluation.metrics import ENOUGH, HELD_OUT, METRICS, curve, fields, title, written
from speed_engine.evaluation.validation import Validation
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured of generated images, and how.

    Attributes:
        figures: by their names in records, see metrics.py; of FID also ``fid_within``, that of two
            random sets of ``fid_within_images`` real images, where so few bias it.
        circumstances: what they depend on: ``Evaluator.circumstances``.
        generated: the images, with the features that were compared; None without an extractor.
    """

    figures: Mapping[str, float]
    circumstances: Mapping[str, Any]
    generated: ImageSet | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """What is known, by name, for metrics.jsonl."""
        known = {**self.figures, **self.circumstances}
        return {name: value for name, value in known.items() if value is not None}

    def curves(self) -> dict[str, str]:
        """The name of each figure's curve, which says of what features it is."""
        extractor = self.circumstances.get("extractor")
        return {name: curve(name, extractor) for name in self.figures}

    def headline(self) -> str:
        """The figure that was asked for first, such as ``FID (classifier features) 0.436``."""
        name, value = next(iter(self.figures.items()))
        return f"{title(name, self.circumstances.get('extractor'))} {written(name, value)}"


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Generates and measures the same images, by seed, each time it is called.

    Attributes:
        table: the linear form of the process that the model was trained on.
        settings: how images are generated.
        training: the images that are trained on; None compares with none of them.
        extractor: of the features that are compared; None with no images to compare with.
        metrics: keys of ``METRICS``; those that lack what they need are not measured.
        held_out: real images that are not trained on, of the same extractor; None if there are
            none.
        reference: real images, or their statistics, of the same extractor, that take the place of
            the training and held-out images; None compares with those.
        reference_sha256: of the content of the reference.
        clip: of the metric of that name.
        texts: (num_images,) what it compares with.
        conditions: (num_images, ...) each, of the images generated.
        null: what hides them for guidance.
        decode: latents to pictures; None leaves what is generated as it is.
        validation: of the metric loss.
        batch_size: images that a process generates at a time.

    Raises:
        UserError: too few images for a metric with this extractor, images of other channels than
            it takes, a reference of statistics for a metric that needs images, or guidance on a
            model that is conditioned on nothing that can be hidden.
    """

    table: TimestepTable
    settings: GenerationSettings
    training: ImageSet | None
    extractor: Extractor | None
    conditions: Conditions
    null: Mapping[str, Tensor]
    image_shape: tuple[int, int, int]
    latents: bool
    num_images: int
    seed: int
    world: World = ALONE
    decode: Decoder | None = None
    metrics: tuple[str, ...] = ("fid", "kid")
    held_out: ImageSet | None = None
    reference: ImageSet | None = None
    reference_sha256: str | None = None
    clip: ClipScore | None = None
    texts: tuple[str, ...] = ()
    validation: Validation | None = None
    batch_size: int = 500

    def __post_init__(self) -> None:
        check_guidance(self.settings.guidance, self.conditions, self.null)
        if self.extractor is None:
            return
        shape, decode = self.image_shape, self.decode
        channels, _, _ = shape if decode is None else decode.picture_shape(shape)
        _check_channels(channels, self.extractor)
        for metric in self._measured():
            for real in self._real().values():
                count = len(real)
                # Images are not counted where their statistics suffice, or are all there is.
                if real.came_with_statistics and (METRICS[metric].by_statistics or not count):
                    count = _check_statistics(metric, self.num_images)
                _check_counts(metric, self.num_images, count, self.extractor)

    def __call__(self, model: nn.Module) -> tuple[Tensor, Evaluation | None]:
        """Images (N, C, H, W), decoded or as ``generate`` returns them, and what was measured.

        Every process generates its part of the images and gets all; the first one measures them,
        the others have None.

        Raises:
            FloatingPointError: on every process, if images are not finite.
        """
        images, validation = self.generate(model), self.validate(model)
        return images, self.measure(images, validation) if self.world.is_first else None

    def validate(self, model: nn.Module) -> float | None:
        """The validation loss, on every process; None where it is not to be measured."""
        return None if self.validation is None else self.validation(model)

    def generate(
        self, model: nn.Module, advance: Callable[[float], object] = lambda images: None
    ) -> Tensor:
        """The images alone, on every process.

        Args:
            model: as of ``generate_some``.
            advance: called with how many images, or parts of one, this process generated since.

        Raises:
            FloatingPointError: on every process, if images of one are not finite.
        """
        # Each process generates equally many, for sharded models compute together: the last image
        # again where there is none left.
        first, share = self.world.rank * self.share, self.share
        ids = torch.arange(first, first + share).clamp(max=self.num_images - 1)
        images, broken = None, None
        try:
            images = self.generate_some(model, ids, advance)
        except FloatingPointError as error:
            broken = error
        if self.world.gather_on_host(torch.tensor([broken is not None])).any() or images is None:
            raise broken or FloatingPointError("images of another process are not finite.")
        return self.world.gather_on_host(images)[: self.num_images]

    @property
    def share(self) -> int:
        """Images that each process generates."""
        return -(-self.num_images // self.world.size)

    def generate_some(
        self,
        model: nn.Module,
        ids: Tensor,
        advance: Callable[[float], object] = lambda images: None,
    ) -> Tensor:
        """(B,) int64 -> (B, C, H, W): these of the images, on this process alone.

        Raises:
            FloatingPointError: some are not finite: no figure of them would mean anything.
        """
        images = generate(
            model,
            self.table,
            {name: value[ids] for name, value in self.conditions.items()},
            ids,
            self.settings,
            image_shape=self.image_shape,
            null=self.null,
            seed=self.seed,
            latents=self.latents,
            batch_size=self.batch_size,
            advance=advance,
            on_broken=_refuse,
        )
        return images if self.decode is None else self.decode(images)

    @property
    def needs_images(self) -> bool:
        """Whether something that is measured looks at generated images."""
        return any(METRICS[name].needs != ("validation",) for name in self._measured())

    def measure(self, images: Tensor | None, validation: float | None = None) -> Evaluation | None:
        """What is to be measured of images that were generated; None if that is nothing.

        Args:
            images: (N, C, H, W), of ``generate``; None where none are needed, or where they are
                not finite: figures that need them are NaN then.
            validation: of ``validate``.
        """
        measured = [METRICS[name] for name in self._measured()]
        if not measured:
            return None
        given: dict[str, Any] = {
            "images": images,
            "training": self.training,
            "held_out": self.held_out,
            "labels": self._labels,
            "texts": self.texts,
            "clip": self.clip,
            "validation": validation,
        }
        if self.extractor is not None and images is not None:
            logits = any({"logits", "labels"} & {*metric.needs} for metric in measured)
            generated = ImageSet(images, len(images), self.extractor, logits=logits)
            given |= {"generated": generated, "logits": generated.logits if logits else None}
        figures: dict[str, float] = {}
        for metric in measured:
            for prefix, real in self._parts(metric.needs):
                if images is None and metric.needs != ("validation",):
                    figures |= {prefix + name: math.nan for name in metric.figures}
                    continue
                values = metric.compute(*((given | {"real": real})[need] for need in metric.needs))
                figures |= {prefix + name: values[name] for name in metric.figures}
        return Evaluation(
            figures=figures | self._bias,
            circumstances=self.circumstances(),
            generated=given.get("generated"),
        )

    def circumstances(self) -> dict[str, Any]:
        """The fields of a record that say what was measured and how.

        There are none where no images are needed: the validation loss depends on no setting.
        """
        if not self.needs_images:
            return {}
        facts: dict[str, Any] = {"num_generated": self.num_images, **self.settings.record()}
        facts["reference_sha256"] = self.reference_sha256
        if self.extractor is not None and (real := self._real().get("")) is not None:
            facts |= {
                "extractor": self.extractor.name,
                "weights_sha256": self.extractor.weights_sha256,
                "feature_dim": self.extractor.feature_dim,
                "num_reference": len(real) or None,
            }
        if self.held_out is not None:
            facts["num_held_out"] = len(self.held_out)
        if self.decode is not None:
            facts["vae_weights_sha256"] = self.decode.weights_sha256
        if self.clip is not None:
            facts["clip_weights_sha256"] = self.clip.weights_sha256
        return facts

    def fields(self) -> set[str]:
        """The fields of a record that are measured."""
        held_out = self.held_out is not None
        return {name for metric in self._measured() for name in fields(metric, held_out)}

    def _measured(self) -> tuple[str, ...]:
        """The metrics whose needs are there."""
        there = {"images"}
        if self.extractor is not None and self._real():
            there |= {"generated", "logits", "real"}
        there |= {"training"} if self.training is not None else set()
        there |= {"held_out"} if self.held_out is not None else set()
        there |= {"labels"} if self._labels is not None else set()
        there |= {"texts", "clip"} if self.clip is not None else set()
        there |= {"validation"} if self.validation is not None else set()
        return tuple(name for name in self.metrics if there >= set(METRICS[name].needs))

    @property
    def _labels(self) -> Tensor | None:
        """Of the images, where the features compared are of a classifier of the same classes."""
        own = isinstance(self.extractor, ClassifierFeatures) and self.training is not None
        return self.conditions.get("labels") if own else None

    def _real(self) -> dict[str, ImageSet]:
        """What begins the names of figures -> the real images that they compare with."""
        if self.reference is not None:
            return {"": self.reference}
        parts = {"": self.training, HELD_OUT: self.held_out}
        return {prefix: real for prefix, real in parts.items() if real is not None}

    def _parts(self, needs: tuple[str, ...]) -> list[tuple[str, ImageSet | None]]:
        return list(self._real().items()) if "real" in needs else [("", None)]

    @cached_property
    def _bias(self) -> dict[str, float]:
        """Of metrics that few images bias, the figure of two sets of as few real images.

        Those that were not read for another figure are not read for this one.
        """
        found: dict[str, float] = {}
        for name in self._measured():
            metric = METRICS[name]
            for prefix, real in self._parts(metric.needs):
                if metric.bias is None or real is None or not real.has_features:
                    continue
                count = min(self.num_images, len(real) // 2)
                if count < ENOUGH and count >= metric.least(real.extractor.feature_dim):
                    figure = prefix + next(iter(metric.figures))
                    found[f"{figure}_within"] = metric.bias(real, count)
                    found[f"{figure}_within_images"] = count
        return found


def _refuse(broken: str) -> NoReturn:
    raise FloatingPointError(f"{broken} Nothing is measured of them.")


def _check_channels(channels: int, extractor: Extractor) -> None:
    if channels != extractor.channels and (channels, extractor.channels) != (1, 3):
        raise UserError(
            f"images have {channels} channels, {extractor.name} takes {extractor.channels}; "
            "use an extractor trained on images like these."
        )


def _check_statistics(name: str, num_generated: int) -> int:
    """The number of images that statistics count as, if the metric needs no more than those."""
    metric = METRICS[name]
    if "real" in metric.needs and not metric.by_statistics:
        enough = " ".join(other for other in METRICS if METRICS[other].by_statistics)
        raise UserError(
            f"evaluation.metrics: {name} compares with real pictures, and evaluation.reference "
            f"holds their statistics only, which suffice for {enough}; leave {name} out, or name "
            "pictures."
        )
    return num_generated


def _check_counts(name: str, num_generated: int, num_real: int, extractor: Extractor) -> None:
    """Whether so many images suffice for a metric, to be known before they are generated."""
    metric = METRICS[name]
    least = metric.least(extractor.feature_dim)
    if min(num_generated, num_real) < least:
        raise UserError(
            f"{name} in {extractor.feature_dim} features needs {least} images or more on both "
            f"sides, {metric.why}; got {num_generated} generated, {num_real} real. Generate more "
            f"(evaluation.num_images); where too few are real, leave {name} out of "
            "evaluation.metrics."
        )
