"""The real images that a model is measured by: compared with generated ones, and denoised."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from speed_engine.data.batch import StoredBatch
from speed_engine.data.config import DataConfig
from speed_engine.data.format.held_out import Part, in_part, part_fingerprint
from speed_engine.data.format.reader import ShardReader
from speed_engine.data.loading.decoding import BatchReader, read_all
from speed_engine.data.loading.order import elsewhere
from speed_engine.data.opening import build_cleaning, open_data, stored_shape
from speed_engine.diffusion.fitted import Method
from speed_engine.evaluation.classifier import classifier_for
from speed_engine.evaluation.config import EvaluationConfig
from speed_engine.evaluation.features import Extractor, inception_features
from speed_engine.evaluation.image_set import ImageSet, statistics_path
from speed_engine.evaluation.validation import IMAGES, Validation
from speed_engine.runtime.checks import UserError
from speed_engine.runtime.files import cache_folder
from speed_engine.runtime.world import ALONE, World


def real_images(data: DataConfig, evaluation: EvaluationConfig) -> tuple[ImageSet, ImageSet | None]:
    """The images that are trained on, and those that are held out, if any, in one feature space."""
    image = data.members[0]
    reader = open_data(data, [m for m in data.members if m in (image, "cls")], part=None)
    share, is_held_out = data.held_out, np.zeros(len(reader), dtype=bool)
    if share:
        is_held_out = in_part(map(reader.key, range(len(reader))), share, "held_out")
    shape, policy = data.image_shape, data.on_bad_sample
    read = cache(lambda: read_all(reader, shape, policy, is_held_out))
    extractor = _extractor(evaluation, reader, read)

    def part(name: Part, rows: np.ndarray) -> ImageSet:
        whole = reader.fingerprint
        content = part_fingerprint(whole, share, name) if share else whole
        folder = cache_folder() / "statistics"
        file = statistics_path(folder, content, image, shape, extractor)
        images = lambda: torch.from_numpy(read()[0][rows] if share else read()[0])
        return ImageSet(images, int(rows.sum()), extractor, file)

    training = part("training", ~is_held_out)
    if data.test_source is not None:
        return training, _test_images(data, extractor)
    return training, part("held_out", is_held_out) if share else None


def _test_images(data: DataConfig, extractor: Extractor) -> ImageSet:
    """Of another data set than that which is trained on."""
    image, shape = data.members[0], data.image_shape
    reader = open_data(data, [image], part="held_out")
    file = statistics_path(
        cache_folder() / "statistics", reader.fingerprint, image, shape, extractor
    )
    images = lambda: torch.from_numpy(read_all(reader, shape, data.on_bad_sample)[0])
    return ImageSet(images, len(reader), extractor, file)


def validation_of(
    data: DataConfig,
    process: Method,
    seed: int,
    device: torch.device,
    world: World = ALONE,
    images: int = IMAGES,
) -> Validation:
    """With images of the held-out part, or of the training part where nothing is held out.

    Args:
        data: the configured data set; images are taken at equal distances over all of it.
        process: on which the model is trained.
        seed: root of the noise, and of the draws from posteriors of latents.
        device: of the model.
        world: the processes.
        images: at most so many.

    Raises:
        UserError: a sample is damaged and the policy is to stop.
    """
    reader = open_data(data, part="held_out" if data.holds_out else "training")
    numbers = np.linspace(0, len(reader), min(images, len(reader)), endpoint=False).astype(int)

    def substitute(place: int, attempt: int) -> int:
        return elsewhere(int(numbers[place]), attempt, len(reader))

    batches = BatchReader(reader, stored_shape(data, reader), on_bad_sample=data.on_bad_sample)
    stored = batches.read(numbers, substitute)
    stored = StoredBatch(stored.images, stored.conditions, stored.ids).to(device)
    cleaning = build_cleaning(data, reader, seed, device)._replace(flip=False)
    return Validation(process, cleaning.batch(stored), seed, world)


def _extractor(
    evaluation: EvaluationConfig, reader: ShardReader, read: Callable[[], Any]
) -> Extractor:
    """Of the features that images are compared by; ``read`` gives all images and conditions."""
    if evaluation.features == "inception":
        return inception_features(evaluation.inception_weights)
    if "cls" not in reader.keys:
        raise UserError(
            "evaluation.features=classifier needs the labels of the images (member cls); use "
            "inception, or none to generate images only."
        )
    pixels, conditions = read()
    images, labels = torch.from_numpy(pixels), torch.from_numpy(conditions["labels"])
    return classifier_for(images, labels, cache_folder() / "features", reader.fingerprint)
